"""However nodeagent gets onto a machine, it runs there the same, and a way that fails says so."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent import __version__, paths, spec, userdata
from tests.lab import cluster, host, images
from tests.lab.flavours import flavour
from tests.lab.lab import Lab, Machine

UNITS = sorted(path.name for path in (cluster.PROJECT / "systemd").iterdir())
TOLD = "/var/log/cloud-init-output.log"
# What a machine has of its own, and an image made of it must not have (see cloud-init clean).
OF_THE_MACHINE = (
    "etc/machine-id",
    "etc/hostname",
    "etc/ssh/ssh_host_*",
    "var/lib/cloud",
    "var/log",
)


@pytest.fixture(scope="module")
def data(lab: Lab) -> dict[str, Any]:
    """The cluster file of a cluster of one; its agent comes as the file of a release."""
    return cluster.cluster_file(lab, cluster="ways", servers=1, join=[])


@contextmanager
def booted(
    lab: Lab,
    name: str,
    address: str,
    data: Mapping[str, Any] | None = None,
    layers: tuple[Path, ...] = (),
    state: Path | None = None,
) -> Iterator[Machine]:
    """A machine with a server's user-data (or none), switched on and destroyed in the end.

    `state` is what its /var/lib/nodeagent holds before the first boot.
    """
    text = cluster.user_data(data, "server") if data else "#cloud-config\n{}\n"
    machine = lab.machine(name, address=address, user_data=text, layers=layers)
    try:
        if state:
            volume = machine.volumes / str(paths.STATE).lstrip("/")
            shutil.copytree(state, volume, dirs_exist_ok=True)
        machine.boot()
        yield machine
    finally:
        machine.destroy()


def unit_pid(machine: Machine, unit: str) -> str:
    pid = machine.run("systemctl", "show", "-P", "MainPID", unit).stdout.strip()
    assert pid != "0", f"{unit} does not run"
    return pid


# -- ways that fail


def refused(machine: Machine) -> str:
    """The one sentence that the bootstrap ended with; cloud-init calls the boot a failure."""
    result = machine.wait_cloud_init()
    assert "(runcmd)" in str(result["errors"])
    said = machine.run("cloud-init", "status", check=False)
    assert (said.returncode, said.stdout) == (1, "status: error\n")
    lines = machine.read(TOLD).splitlines()
    (sentence,) = [line for line in lines if line.startswith("nodeagent: could not be installed")]
    assert "Traceback" not in "\n".join(lines)
    return sentence


def assert_nothing_is_installed(machine: Machine) -> None:
    names = ("node.yaml", "secrets.json", "bootstrap.json", "bootstrap.py")
    staged = {str(userdata.STAGE / name) for name in names}
    assert set(machine.sh("find /opt/nodeagent -type f").splitlines()) == staged
    assert machine.sh(f"stat -c %a {userdata.STAGE}/secrets.json") == "600"
    assert machine.sh("find /etc /usr/local /root /var/lib/nodeagent -name '*nodeagent*'") == (
        "/var/lib/nodeagent"
    )
    assert machine.sh("ls -A /var/lib/nodeagent") == ""


def test_a_program_with_a_wrong_digest_is_not_run(lab: Lab, data: dict[str, Any]) -> None:
    served = lab.http_root / "other.pyz"
    served.write_text("import pathlib\npathlib.Path('/root/it-was-run').touch()\n")
    url, wrong = f"{lab.url}/other.pyz", "f" * 64
    with booted(
        lab, "ways-wrong", "10.10.0.41", {**data, "agent": {"url": url, "sha256": wrong}}
    ) as machine:
        sentence = refused(machine)
        assert f"{url} has the sha256 {cluster.digest(served)}, not {wrong}" in sentence
        assert "nothing of it was run (correct agent.url or agent.sha256" in sentence
        assert machine.run("test", "-e", "/root/it-was-run", check=False).returncode == 1
        assert_nothing_is_installed(machine)


def test_an_image_without_the_program_says_so(lab: Lab, data: dict[str, Any]) -> None:
    with booted(lab, "ways-bare", "10.10.0.42", {**data, "agent": {}}) as machine:
        sentence = refused(machine)
        assert "this image has no /opt/nodeagent/nodeagent baked in" in sentence
        assert "set agent.url and agent.sha256, or agent.package" in sentence
        assert_nothing_is_installed(machine)


# -- from a package index


def requirements() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(cluster.PROJECT / "setup.cfg")
    return setup["options"]["install_requires"].split()


def package_index(lab: Lab) -> str:
    """The URL of a package index with our wheel and all it needs: plain files, as PEP 503 says."""
    (ours,) = (cluster.PROJECT / "dist").glob("nodeagent-*.whl")
    others = images.wheels(requirements(), flavour("trixie").python)
    for wheel in (ours, *others.iterdir()):
        project = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        page = lab.http_root / "simple" / project / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        (page.parent / wheel.name).unlink(missing_ok=True)
        (page.parent / wheel.name).symlink_to(wheel)
        page.write_text(
            f'<!DOCTYPE html>\n<a href="{wheel.name}#sha256={cluster.digest(wheel)}">'
            f"{wheel.name}</a>\n"
        )
    return f"{lab.url}/simple/"


@pytest.fixture(scope="module")
def indexed(lab: Lab, data: dict[str, Any]) -> Iterator[Machine]:
    """A ready node whose program came from a package index."""
    agent = {"package": f"nodeagent=={__version__}", "index": package_index(lab)}
    with booted(lab, "ways-index", "10.10.0.43", {**data, "agent": agent}) as machine:
        cluster.wait_ready([machine])
        yield machine


def test_from_a_package_index(indexed: Machine) -> None:
    assert indexed.wait_cloud_init()["errors"] == []
    venv = paths.PROGRAM / "venv"
    assert indexed.read(str(paths.LAUNCHER)).startswith(f"#!{venv}/bin/python")
    said = indexed.run("nodeagent", "--version").stdout
    assert said == f"nodeagent {__version__}\n"


def test_to_install_again_changes_nothing(indexed: Machine) -> None:
    before = unit_pid(indexed, "nodeagent")
    for words in ([], ["--spec", str(userdata.STAGE / "node.yaml")]):
        said = indexed.run("nodeagent", "install", *words)
        assert (said.stdout, said.stderr) == ("", ""), "a line for each change"
    assert unit_pid(indexed, "nodeagent") == before


@pytest.mark.parametrize("role", ["server", "worker"])
def test_cloud_init_finds_the_user_data_valid(
    indexed: Machine, data: dict[str, Any], role: spec.Role
) -> None:
    text = cluster.user_data({**data, "join": ["10.10.0.43"]}, role)
    assert len(text.encode()) < userdata.LIMIT_BYTES
    indexed.write("/tmp/user-data", text)
    said = indexed.run("cloud-init", "schema", "--config-file", "/tmp/user-data")
    assert "Valid schema /tmp/user-data" in said.stdout + said.stderr


# -- baked into an image


def baked_layer(machine: Machine, layer: Path) -> Path:
    """Switch the machine off; its disk, without what made it this machine, becomes a layer."""
    machine.power_off()
    host.run("cp", "-a", machine.upper, layer, timeout_s=60)
    for pattern in OF_THE_MACHINE:
        for path in layer.glob(pattern):
            host.remove_tree(path)
    return layer


def test_baked_into_an_image(lab: Lab, data: dict[str, Any], tmp_path: Path) -> None:
    with booted(lab, "ways-bake", "10.10.0.44") as machine:
        machine.wait_booted()
        machine.sh(f"curl -sf -o /tmp/nodeagent.pyz {data['agent']['url']}")
        machine.run("python3", "/tmp/nodeagent.pyz", "install", timeout_s=60)
        machine.run("rm", "-r", "/tmp/nodeagent.pyz", "/root/.shiv")
        assert machine.run("systemctl", "is-enabled", "nodeagent").stdout == "enabled\n"
        assert machine.run("systemctl", "is-active", "nodeagent", check=False).stdout == (
            "inactive\n"
        )
        layer = baked_layer(machine, tmp_path / "layer")
    archived = tmp_path / "state/images"
    archived.mkdir(parents=True)
    shutil.copy(images.consul_archive(), archived / data["consul"]["sha256"])
    log = lab.logs_dir / "http.log"
    asked_before = log.stat().st_size
    with booted(
        *(lab, "ways-baked", "10.10.0.45", {**data, "agent": {}}),
        layers=(layer,),
        state=archived.parent,
    ) as machine:
        cluster.wait_ready([machine])
        assert machine.wait_cloud_init()["errors"] == []
        assert "nodeagent: found /opt/nodeagent/nodeagent in the image" in machine.read(TOLD)
    assert machine.address not in log.read_text("utf-8")[asked_before:]
    host.remove_tree(layer)


@pytest.mark.full
def test_into_a_tree_that_is_not_running(lab: Lab, data: dict[str, Any]) -> None:
    machine = lab.machine("ways-chroot", address="10.10.0.46")
    try:
        shutil.copy(lab.http_root / Path(data["agent"]["url"]).name, machine.root / "opt")
        clean = ("env", "-i", "HOME=/root", "PATH=/usr/local/bin:/usr/bin:/usr/sbin")
        inside = ("chroot", machine.root, *clean)
        install = ("python3", "/opt/nodeagent.pyz", "install", "--no-start")
        first = host.run(*inside, *install, timeout_s=120)
        for unit in UNITS:
            assert f"write {paths.UNITS / unit}" in first.stderr
            assert (machine.root / "etc/systemd/system" / unit).exists()
        enabled = host.run(
            "systemctl", f"--root={machine.root}", "is-enabled", "nodeagent", timeout_s=30
        )
        assert enabled.stdout == "enabled\n"
        assert not list((machine.root / "run").glob("nodeagent*"))
        host.run("rm", "-r", machine.root / "root/.shiv", timeout_s=60)
        said = host.run(*inside, "nodeagent", "--version", timeout_s=30)
        assert said.stdout == f"nodeagent {__version__}\n"
        again = host.run(*inside, "nodeagent", "install", "--no-start", timeout_s=60)
        assert (again.stdout, again.stderr) == ("", "")
    finally:
        machine.destroy()


# -- Consul as a program of the machine


@pytest.fixture(
    scope="module",
    params=[pytest.param("consul", id="bare"), pytest.param("consul.zip", marks=pytest.mark.full)],
)
def binary(
    request: pytest.FixtureRequest,
    lab: Lab,
    data: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    """A ready node with `runtime: binary`, Consul being served as a program or in a .zip."""
    archive = images.consul_binary()
    if request.param.endswith(".zip"):
        archive = tmp_path_factory.mktemp("zip") / request.param
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(images.consul_binary(), "consul")
            packed.writestr("LICENSE.txt", "as in HashiCorp's own archives\n")
    source = {"archive": lab.serve(archive, request.param), "sha256": cluster.digest(archive)}
    wanted = {**data, "consul": {"runtime": "binary", **source}}
    with booted(lab, "ways-binary", "10.10.0.47", wanted) as machine:
        cluster.wait_ready([machine])
        yield machine


def test_consul_as_a_program_outlives_the_engines_restart(binary: Machine) -> None:
    assert binary.wait_cloud_init()["errors"] == []
    before = unit_pid(binary, paths.CONSUL_UNIT)
    engine = unit_pid(binary, paths.ENGINE_UNIT)
    binary.run("systemctl", "restart", "docker", timeout_s=60)
    assert unit_pid(binary, paths.ENGINE_UNIT) != engine
    assert unit_pid(binary, paths.CONSUL_UNIT) == before
    cluster.wait_ready([binary])


def test_a_changed_domain_restarts_consul_once(binary: Machine) -> None:
    def starts() -> int:
        return binary.journal(paths.CONSUL_UNIT).count(f"Started {paths.CONSUL_UNIT}")

    before = starts()
    binary.write(str(paths.SPEC), f"{binary.read(str(paths.SPEC))}domain: ways.example\n", 0o600)
    made = [binary.run("nodeagent", "apply", timeout_s=90).stdout for _ in range(2)]
    assert f"restart {paths.CONSUL_UNIT}" in made[0]
    assert made[1].endswith("(0 changes made)\n")
    cluster.wait_ready([binary])
    ask = ("dig", "+short", "-p", "8600", "@127.0.0.1", "consul.service.ways.example")
    assert binary.run(*ask).stdout == f"{binary.address}\n"
    assert starts() == before + 1
    assert json.loads(binary.read(str(paths.CONSUL_CONFIG)))["domain"] == "ways.example"
