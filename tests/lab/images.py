"""What machines are made of: root file systems, a Consul binary, image archives; built once.

Each thing lies under `NODEAGENT_LAB_DIR` (default /var/tmp/nodeagent-lab) in `images/`, named by
a hash of its recipe. It is built beside its place and renamed when whole, so a killed build
leaves nothing that is taken for good.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.flavours import Flavour, apt_options, debian_mirror
from tests.lab.host import LabError, mounts, prepare, remove_tree, run

CONSUL_VERSION = "1.8.7"
CONSUL_IMAGE = f"nodeagent-lab/consul:{CONSUL_VERSION}"
BOX_IMAGE = "nodeagent-lab/box:1"

#: The only Debian release that carries Consul.
CONSUL_SUITE = "bullseye"

#: Units no test looks at, masked so that a boot is short, each with its reason.
MASKED: Mapping[str, str] = {
    "apt-daily.service": "there is no mirror inside the lab",
    "apt-daily.timer": "there is no mirror inside the lab",
    "apt-daily-upgrade.service": "there is no mirror inside the lab",
    "apt-daily-upgrade.timer": "there is no mirror inside the lab",
    "dpkg-db-backup.timer": "nothing to back up",
    "fstrim.timer": "the disk is the box's",
    "systemd-tmpfiles-clean.timer": "machines do not live that long",
    "ssh.service": "tests enter through the namespaces",
    "sshd.service": "another name of ssh.service",
    "ssh.socket": "tests enter through the namespaces",
    "sshd-keygen.service": "cloud-init makes host keys as on a real machine",
    "console-getty.service": "nobody sits at the console; its log stays readable",
    "getty-static.service": "a container has no virtual terminals",
    "systemd-firstboot.service": "asks on a terminal, fails without one",
    "systemd-hwdb-update.service": "no hardware",
    "systemd-journal-catalog-update.service": "catalogue texts are not looked at",
    "systemd-update-done.service": "/etc and /var are as fresh as /usr",
    "systemd-pstore.service": "the box's",
    "ldconfig.service": "the build ran it",
    "modprobe@.service": "modules are the box's",
    "systemd-modules-load.service": "modules are the box's",
    "kmod-static-nodes.service": "modules are the box's",
    "dev-hugepages.mount": "not used",
    "sys-kernel-debug.mount": "the box's",
    "sys-kernel-tracing.mount": "the box's",
    "sys-kernel-config.mount": "the box's",
    "sys-fs-fuse-connections.mount": "not used",
    "proc-sys-fs-binfmt_misc.automount": "the box's",
    "systemd-binfmt.service": "the box's",
    "systemd-udev-load-credentials.service": "no devices",
}

#: Rights to cgroup v1 groups. nspawn mounts them read-only; an Engine must write them.
_CGROUP_UNIT = """\
[Unit]
Description=Lab: make cgroup v1 controllers writable
DefaultDependencies=no
Before=sysinit.target
ConditionPathExists=!/sys/fs/cgroup/cgroup.controllers

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'for d in /sys/fs/cgroup/*; do mount -o remount,rw,bind "$d" || exit 1; done'

[Install]
WantedBy=sysinit.target
"""

_CLOUD_CFG = """\
# The lab: the seed in /var/lib/cloud/seed/nocloud is the only source, and the network is there.
datasource_list: [NoCloud]
network: {config: disabled}
# Making a locale and three kinds of host key takes longer than the rest of a boot.
locale: C.UTF-8
ssh_genkeytypes: [ed25519]
apt: {preserve_sources_list: true}
"""


def lab_dir() -> Path:
    """Where the lab keeps what it builds and runs: `NODEAGENT_LAB_DIR`."""
    return Path(os.environ.get("NODEAGENT_LAB_DIR", "/var/tmp/nodeagent-lab"))


# -- the store -------------------------------------------------------------------------------


def _stored(kind: str, recipe: object, build: Callable[[Path], None], suffix: str = "") -> Path:
    """The path of what `build(path)` makes, built if this recipe was not built before.

    Things of the same kind from other recipes are removed, unless a machine still stands on them.
    """
    text = json.dumps(recipe, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    store = lab_dir() / "images"
    place = store / f"{kind}-{key}{suffix}"
    if place.exists():
        return place
    store.mkdir(parents=True, exist_ok=True)
    with (store / f".{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():  # built by another process while we waited
            return place
        part = store / f".part-{kind}{suffix}"
        _discard(part)
        build(part)
        part.rename(place)
        name = re.compile(re.escape(kind) + r"-[0-9a-f]{12}" + re.escape(suffix))
        for old in store.iterdir():
            if name.fullmatch(old.name) and old != place and not _in_use(old):
                _discard(old)
    return place


def _discard(path: Path) -> None:
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    return any(str(path) in options for _, kind, options in mounts() if kind == "overlay")


# -- root file systems -----------------------------------------------------------------------


def rootfs(flavour: Flavour) -> Path:
    """The root file system of a flavour; about 50 s and 600 MB the first time."""
    recipe = [
        flavour.suite,
        flavour.extra_suites,
        flavour.all_packages,
        sorted(MASKED),
        _CGROUP_UNIT,
        _CLOUD_CFG,
        inspect.getsource(customise),
    ]

    def build(part: Path) -> None:
        prepare()
        mirror = debian_mirror()
        argv = ["mmdebstrap", "--variant=minbase", f"--include={','.join(flavour.all_packages)}"]
        argv += [f"--aptopt={line}" for line in apt_options()]
        argv += ["--mode=root", "--format=directory", flavour.suite, str(part)]
        argv += [mirror.line(suite) for suite in (flavour.suite, *flavour.extra_suites)]
        run(*argv, timeout_s=900)
        customise(part)

    return _stored(flavour.name, recipe, build)


def customise(root: Path) -> None:
    """Turn a fresh Debian tree into one that boots fast in a container and takes a seed."""
    units = root / "etc/systemd/system"
    for unit in MASKED:
        for wants in units.glob(f"*.wants/{unit}"):
            wants.unlink()
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (units / "lab-cgroups.service").write_text(_CGROUP_UNIT, encoding="utf-8")
    enabled = {
        "sysinit.target": ["/etc/systemd/system/lab-cgroups.service"],
        "multi-user.target": ["/usr/lib/systemd/system/systemd-networkd.service"],
        "sockets.target": ["/usr/lib/systemd/system/systemd-networkd.socket"],
        "network-online.target": ["/usr/lib/systemd/system/systemd-networkd-wait-online.service"],
    }
    for target, paths in enabled.items():
        wants = units / f"{target}.wants"
        wants.mkdir(exist_ok=True)
        for path in paths:
            link = wants / Path(path).name
            if not link.is_symlink():
                link.symlink_to(path)
    for directory in ("etc/cloud/cloud.cfg.d", "etc/systemd/network", "var/lib/cloud/seed/nocloud"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "etc/cloud/cloud.cfg.d/99-lab.cfg").write_text(_CLOUD_CFG, encoding="utf-8")
    # Empty, not absent: each machine makes its own at first boot, and the boot is not a
    # systemd "first boot" that would apply presets (machine-id(5)).
    (root / "etc/machine-id").write_text("")
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    # How the tree was fetched is the box's business.
    (root / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    (root / "etc/hostname").unlink(missing_ok=True)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()


# -- Consul ----------------------------------------------------------------------------------


def consul_binary() -> Path:
    """Consul as Debian 11 built it, fetched and verified by apt."""

    def build(part: Path) -> None:
        prepare()
        with tempfile.TemporaryDirectory(dir=part.parent, prefix=".part-consul-") as scratch:
            package = _download("consul", CONSUL_SUITE, Path(scratch))
            version = run("dpkg-deb", "--field", package, "Version", timeout_s=20).stdout.strip()
            if not version.startswith(CONSUL_VERSION):
                raise LabError(f"{CONSUL_SUITE} has consul {version}, wanted {CONSUL_VERSION}")
            # Never onto a root: an unpacked package replaces the /lib link of a merged-/usr tree.
            run("dpkg-deb", "--extract", package, Path(scratch) / "tree", timeout_s=120)
            shutil.move(Path(scratch) / "tree/usr/bin/consul", part)
        part.chmod(0o755)

    return _stored("consul-bin", [CONSUL_VERSION, CONSUL_SUITE], build)


def _download(package: str, suite: str, scratch: Path) -> Path:
    """Fetch a package of another suite; apt checks signature and hashes as for any install.

    apt's state, cache and sources are private to `scratch`: the box's own are not touched.
    """
    for directory in ("state/lists/partial", "cache/archives/partial", "got"):
        (scratch / directory).mkdir(parents=True)
    (scratch / "status").write_text("")
    (scratch / "sources.list").write_text(debian_mirror().line(suite) + "\n", encoding="utf-8")
    options = [
        f"Dir::State={scratch}/state",
        f"Dir::State::status={scratch}/status",
        f"Dir::Cache={scratch}/cache",
        f"Dir::Etc::sourcelist={scratch}/sources.list",
        "Dir::Etc::sourceparts=/dev/null",
        "Dir::Etc::preferencesparts=/dev/null",
        "APT::Sandbox::User=root",
    ]
    apt = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
    run(*apt, "update", timeout_s=300)
    run(*apt, "download", package, timeout_s=300, cwd=scratch / "got")
    found = list((scratch / "got").glob("*.deb"))
    if len(found) != 1:
        raise LabError(f"apt-get download {package} from {suite} left {found}")
    return found[0]


# -- Python packages -------------------------------------------------------------------------


def wheels(requirements: Sequence[str], python: str) -> Path:
    """A directory with the wheels of all that these requirements need on that Python's machines.

    They come from wherever the box's own pip is configured to get packages.
    """

    def build(part: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        pip += [f"--python-version={python}", "--only-binary=:all:", f"--dest={part}"]
        run(*pip, *requirements, timeout_s=600)

    return _stored("wheels", [sorted(requirements), python], build)


# -- container images ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One file of an image: content, or a link's target, or neither for a directory."""

    content: bytes | None = None
    link: str | None = None
    mode: int = 0o755


_PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nconsul:x:100:1000::/consul:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n"
)
_GROUP = "root:x:0:\nconsul:x:1000:\nnogroup:x:65534:\n"

#: The official image's manners: `agent …` gets its directories, other words of Consul's go to
#: consul, anything else is a command (hashicorp/consul .release/docker/docker-entrypoint.sh).
_CONSUL_ENTRYPOINT = """\
#!/bin/sh
set -e
if [ "$1" = agent ]; then
    shift
    exec consul agent -data-dir=/consul/data -config-dir=/consul/config "$@"
fi
if consul --help "$1" 2>&1 | grep -q "consul $1"; then
    exec consul "$@"
fi
exec "$@"
"""


def consul_archive() -> Path:
    """An archive for `docker load` that gives `CONSUL_IMAGE`; works as the official image does."""
    binary = consul_binary()
    recipe = [CONSUL_IMAGE, _CONSUL_ENTRYPOINT, _busybox_version(), binary.name, 2]

    def build(part: Path) -> None:
        tree = _box_tree()
        tree["bin/consul"] = _Entry(content=binary.read_bytes())
        for path in _libraries(binary):
            # At the very path the loader asks for; the file behind the links, as a plain file.
            tree[str(path).lstrip("/")] = _Entry(content=path.read_bytes())
        tree["usr/local/bin/docker-entrypoint.sh"] = _Entry(content=_CONSUL_ENTRYPOINT.encode())
        tree["consul/data"] = _Entry()
        tree["consul/config"] = _Entry()
        _write_image(
            part,
            CONSUL_IMAGE,
            tree,
            {
                "Entrypoint": ["docker-entrypoint.sh"],
                "Cmd": ["agent", "-dev", "-client", "0.0.0.0"],
                "Volumes": {"/consul/data": {}},
            },
        )

    return _stored("consul-image", recipe, build, ".tar")


def box_archive() -> Path:
    """An archive for `docker load` that gives `BOX_IMAGE`: busybox with all its applets."""

    def build(part: Path) -> None:
        _write_image(part, BOX_IMAGE, _box_tree(), {"Cmd": ["sh"]})

    return _stored("box-image", [BOX_IMAGE, _busybox_version(), 2], build, ".tar")


def _busybox_version() -> str:
    prepare()
    return run("dpkg-query", "-W", "-f", "${Version}", "busybox-static", timeout_s=20).stdout


def _box_tree() -> dict[str, _Entry]:
    busybox = Path("/bin/busybox")
    applets = run(busybox, "--list", timeout_s=20).stdout.split()
    tree = {f"bin/{applet}": _Entry(link="busybox") for applet in applets}
    tree["bin/busybox"] = _Entry(content=busybox.read_bytes())
    tree["etc/passwd"] = _Entry(content=_PASSWD.encode(), mode=0o644)
    tree["etc/group"] = _Entry(content=_GROUP.encode(), mode=0o644)
    tree["etc/nsswitch.conf"] = _Entry(content=b"hosts: files dns\n", mode=0o644)
    for directory in ("root", "tmp", "var/tmp", "dev", "proc", "sys", "run"):
        tree[directory] = _Entry(mode=0o1777 if directory.endswith("tmp") else 0o755)
    return tree


def _libraries(binary: Path) -> Iterator[Path]:
    """The loader and libraries a program asks for, at the paths where it asks (ldd(1))."""
    for line in run("ldd", binary, timeout_s=20).stdout.splitlines():
        found = re.search(r"(?:=> )?(/\S+) \(0x", line)
        if found:
            yield Path(found[1])
        elif "not found" in line:
            raise LabError(f"{binary.name} needs a library this box lacks: {line.strip()}")


def _write_image(
    path: Path, tag: str, tree: Mapping[str, _Entry], config: Mapping[str, object]
) -> None:
    """Write a `docker save` archive of one layer; the same tree gives the same bytes."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        names = {str(parent) for name in tree for parent in Path(name).parents if parent.name}
        for name in sorted(names | set(tree)):
            _add(tar, name, tree.get(name, _Entry()))
    layer_bytes = layer.getvalue()
    digest = hashlib.sha256(layer_bytes).hexdigest()
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    image = {
        "architecture": arch,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Env": environment, **config},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "nodeagent lab"}],
    }
    image_bytes = json.dumps(image, sort_keys=True).encode()
    image_name = f"{hashlib.sha256(image_bytes).hexdigest()}.json"
    manifest = [{"Config": image_name, "RepoTags": [tag], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(path, mode="w", format=tarfile.GNU_FORMAT) as tar:
        _add(tar, digest, _Entry())
        _add(tar, f"{digest}/VERSION", _Entry(content=b"1.0", mode=0o644))
        _add(tar, f"{digest}/layer.tar", _Entry(content=layer_bytes, mode=0o644))
        _add(tar, image_name, _Entry(content=image_bytes, mode=0o644))
        content = json.dumps(manifest, sort_keys=True).encode()
        _add(tar, "manifest.json", _Entry(content=content, mode=0o644))


def _add(tar: tarfile.TarFile, name: str, entry: _Entry) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, root, by default
    info.mode = entry.mode
    if entry.link is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
        tar.addfile(info)
    elif entry.content is not None:
        info.size = len(entry.content)
        tar.addfile(info, io.BytesIO(entry.content))
    else:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
