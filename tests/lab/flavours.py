"""The kinds of machine the lab can boot, one row each, and where Debian comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lab.host import LabError, run

ARCHIVE_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: What every machine has: enough for systemd, cloud-init, an Engine and a look around.
BASE_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "dbus",
    "udev",
    "cloud-init",
    "iptables",
    "iproute2",
    "iputils-ping",
    "bind9-dnsutils",
    "python3",
    "python3-venv",
    "ca-certificates",
    "procps",
    "kmod",
    "netbase",
    "curl",
    "jq",
    "openssh-server",
    "locales",
)


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One kind of machine.

    `suite` is the Debian suite the tree is made of, `extra_suites` further ones apt may take
    packages from; a package may be pinned as `name=version`, with `*` for any ending. `engine` is
    the beginning of the version the Engine says of itself, `python` that of the machine's python3.
    `swarm_mode` is what nodeagent must choose there: `native` or `classic`. `boots_on_cgroup_v1` is
    false where systemd knows cgroup v2 alone (258 and newer).
    """

    name: str
    suite: str
    engine: str
    python: str
    swarm_mode: str
    boots_on_cgroup_v1: bool = True
    extra_suites: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def all_packages(self) -> tuple[str, ...]:
        return BASE_PACKAGES + self.packages


FLAVOURS: Mapping[str, Flavour] = {
    row.name: row
    for row in (
        Flavour(
            name="trixie",
            suite="trixie",
            packages=("docker.io", "docker-cli"),
            engine="26.1.5",
            python="3.13",
            swarm_mode="native",
        ),
        Flavour(
            name="classic",
            suite="bookworm",
            extra_suites=("bullseye",),
            # The last of Debian's builds with the Consul backend. containerd and runc are Debian
            # 12's: apt takes the newest that the Engine is content with (containerd >= 1.4).
            packages=("docker.io=20.10.5+dfsg1-1+deb11u2",),
            engine="20.10.5",
            python="3.11",
            swarm_mode="classic",
        ),
        # Its Engine says 20.10 and has no Consul backend all the same: Debian 12 took it out
        # (docker.io_20.10.24+dfsg1-1: debian/patches/avoid-consul.patch).
        Flavour(
            name="bookworm",
            suite="bookworm",
            packages=("docker.io",),
            engine="20.10.24",
            python="3.11",
            swarm_mode="native",
        ),
        Flavour(
            name="sid",
            suite="sid",
            # sid moves on: a build of the image that finds a newer Engine fails, and says so.
            packages=("docker.io=28.5.*", "docker-cli=28.5.*"),
            engine="28.5.",
            python="3.14",
            swarm_mode="native",
            boots_on_cgroup_v1=False,
        ),
    )
}


def flavour(name: str) -> Flavour:
    """The row of that name; `LabError` naming the known ones."""
    try:
        return FLAVOURS[name]
    except KeyError:
        known = ", ".join(sorted(FLAVOURS))
        raise LabError(f"no flavour is called {name!r}; there are: {known}") from None


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """The Debian archive this box uses: its URL, the keys that sign it, whether it is trusted."""

    url: str
    keyring: Path = ARCHIVE_KEYRING
    trusted: bool = False

    def line(self, suite: str, *components: str) -> str:
        """A one-line source (sources.list(5)) for a suite of this archive."""
        trust = " trusted=yes" if self.trusted else ""
        parts = " ".join(components or ("main",))
        return f"deb [signed-by={self.keyring}{trust}] {self.url} {suite} {parts}"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One entry of apt's configuration, from either format."""

    urls: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False


def debian_mirror(
    etc_apt: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")
) -> Mirror:
    """The archive from which this box takes Debian itself.

    That is the first entry in apt's configuration with the running suite and component main.
    Raises `LabError` where there is none (a box that is not Debian).
    """
    release = dict(
        line.partition("=")[::2] for line in os_release.read_text(encoding="utf-8").splitlines()
    )
    codename = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID", "").strip('"') != "debian":
        raise LabError("the lab takes its mirror from a Debian box's apt; this is not Debian")
    # A box on testing or unstable may name its suite so, whatever its release is called.
    names = {codename, "stable", "testing", "unstable", "sid"}
    for source in _sources(etc_apt):
        if names & set(source.suites) and "main" in source.components:
            named = Path(source.signed_by)
            keyring = named if source.signed_by.startswith("/") else ARCHIVE_KEYRING
            return Mirror(
                url=source.urls[0].rstrip("/"),
                # The box's own suite may be signed by keys of a narrower file than older and
                # newer suites need; Debian's own keyring has them all.
                keyring=ARCHIVE_KEYRING if ARCHIVE_KEYRING.exists() else keyring,
                trusted=source.trusted,
            )
    raise LabError(
        f"{etc_apt} names no Debian archive (suite {codename or '?'}, component main); "
        "the lab takes its mirror from there"
    )


def _sources(etc_apt: Path) -> Iterator[_Source]:
    parts = etc_apt / "sources.list.d"
    for path in [etc_apt / "sources.list", *sorted(parts.glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".list":
            yield from _one_line_sources(text)
        elif path.suffix == ".sources":
            yield from _deb822_sources(text)


def _one_line_sources(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        entry = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if entry is None:
            continue
        options = dict(word.partition("=")[::2] for word in (entry[1] or "").split())
        yield _Source(
            urls=(entry[2],),
            suites=(entry[3],),
            components=tuple(entry[4].split()),
            signed_by=options.get("signed-by", ""),
            trusted=options.get("trusted", "") == "yes",
        )


def _deb822_sources(text: str) -> Iterator[_Source]:
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
                continue
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
        wanted = "deb" in fields.get("types", "").split()
        if not wanted or fields.get("enabled", "yes") == "no" or not fields.get("uris"):
            continue
        yield _Source(
            urls=tuple(fields["uris"].split()),
            suites=tuple(fields.get("suites", "").split()),
            components=tuple(fields.get("components", "").split()),
            signed_by=fields.get("signed-by", ""),
            trusted=fields.get("trusted", "") == "yes",
        )


#: Settings of the box's apt that decide whether a download succeeds; the lab's apt inherits them.
_INHERITED = (
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::Retries",
)


def apt_options() -> list[str]:
    """The box's own apt settings for reaching its mirror, as `Name "value";` lines."""
    dump = run("apt-config", "dump", timeout_s=20).stdout
    pattern = re.compile(r'^(\S+) "(.+)";$')
    found = (pattern.match(line) for line in dump.splitlines())
    return [m[0] for m in found if m and m[1].startswith(_INHERITED)]
