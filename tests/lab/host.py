"""What the lab asks of the box: commands, processes, cgroups, packages.

Every command the lab runs goes through `run`, every long-lived process through `spawn`, and
every wait through `wait_until`; nothing else in the lab starts, kills or sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: What the lab needs from Debian, and the file by which its presence is told.
PACKAGES: Mapping[str, str] = {
    "systemd-container": "/usr/bin/systemd-nspawn",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "iproute2": "/usr/sbin/ip",
    "iptables": "/usr/sbin/iptables",
    "dnsmasq-base": "/usr/sbin/dnsmasq",
    "busybox-static": "/usr/share/doc/busybox-static",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "curl": "/usr/bin/curl",
    "jq": "/usr/bin/jq",
}

#: How often `wait_until` looks, in seconds: short against a boot (2 s), long against a look.
POLL_S = 0.1


class LabError(Exception):
    """Something the lab needs from the box or from a machine did not happen."""


@dataclass(frozen=True)
class Waiting:
    """What a condition says while it does not hold yet: falsy, and carries the state seen."""

    state: object

    def __bool__(self) -> bool:
        return False


def wait_until(condition: Callable[[], T | Waiting], timeout_s: float, what: str) -> T:
    """Return the first truthy value of `condition`.

    A condition may return `Waiting(state)`; that state (or the last falsy value) stands in the
    `LabError` raised after `timeout_s` seconds, so that a time-out says what was there instead.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        seen = condition()
        if seen and not isinstance(seen, Waiting):
            return seen
        if time.monotonic() >= deadline:
            state = seen.state if isinstance(seen, Waiting) else seen
            raise LabError(f"waited {timeout_s:g} s for {what}; last seen: {state}")
        time.sleep(POLL_S)


def run(
    *argv: str | Path,
    timeout_s: float = 60,
    check: bool = True,
    input: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run one command on the box; `LabError` with its output on a bad exit or a time-out."""
    words = [str(word) for word in argv]
    shown = " ".join(words)
    if len(shown) > 300:
        shown = shown[:300] + " …"
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            input=input,
            # Without input, /dev/null: a command must not read the test runner's terminal.
            stdin=subprocess.DEVNULL if input is None else None,
            cwd=cwd,
            env=None if env is None else dict(env),
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shown}: no end within {timeout_s:g} s") from error
    except OSError as error:
        raise LabError(f"{shown}: {error}") from error
    if check and done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"{shown}: exit {done.returncode}: {said}")
    return done


# -- processes -------------------------------------------------------------------------------


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process; proc(5), fields 3, 22."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Process:
    """A process named by pid and start time, so that a recycled pid is never taken for it."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with this pid, or None."""
        stat = _stat(pid)
        return cls(pid, stat[1]) if stat and stat[0] not in "ZX" else None

    @classmethod
    def load(cls, path: Path) -> Process | None:
        """Read what `save` wrote; None where nothing (whole) was written."""
        try:
            seen = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(seen["pid"]), int(seen["start"]))
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps({"pid": self.pid, "start": self.start}))

    @property
    def alive(self) -> bool:
        """Whether it runs; reaps it if it is a dead child of this process."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        stat = _stat(self.pid)
        return stat is not None and stat[0] not in "ZX" and stat[1] == self.start

    def signal(self, number: int) -> bool:
        """Send a signal to this very process; False if it is gone."""
        try:
            # The pidfd is taken first and the start time read after it: what the fd holds
            # cannot be recycled between the look and the kill.
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def kill(self, *, timeout_s: float = 10) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.signal(signal.SIGKILL):
            wait_until(lambda: not self.alive, timeout_s, f"the end of process {self.pid}")

    def children(self) -> list[Process]:
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            return []
        found = (Process.of(int(pid)) for pid in text.split())
        return [child for child in found if child]


def spawn(*argv: str | Path, log: Path, groups: Sequence[Path] = ()) -> Process:
    """Start a process that outlives this one, in a session and in cgroups of its own.

    Its output is appended to `log`. The pid does not change when it moves into the groups.
    """
    words = into_groups(groups, *argv)
    if shutil.which(str(argv[0])) is None:
        raise LabError(f"{argv[0]}: not found; python -m tests.lab build installs what is missing")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        words[0],
        words,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    process = Process.of(pid)
    if process is None:
        raise LabError(f"{argv[0]} ended at once; see {log}")
    return process


def into_groups(groups: Sequence[Path | str], *argv: str | Path) -> list[str]:
    """The words that run a command inside cgroups, without another process in between."""
    script = (
        'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit 125; shift; done; '
        'shift; exec "$@"'
    )
    return [str(word) for word in ("/bin/sh", "-c", script, "lab", *groups, "--", *argv)]


# -- files and mounts ------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def mounts() -> list[tuple[Path, str, str]]:
    """Mount points of this namespace in the order they were made: path, type, super options."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, right = line.split(" - ", 1)
        # proc(5): space, tab, newline and backslash stand as octal escapes.
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        kind, _, options = right.split(" ", 2)
        found.append((Path(point), kind, options))
    return found


def unmount_below(top: Path) -> None:
    """Unmount everything mounted at or below a directory, last mounted first."""
    for point, _, _ in reversed(mounts()):
        if point == top or top in point.parents:
            run("umount", point, timeout_s=30)


def remove_tree(path: Path) -> None:
    """Remove a directory tree; refuses one that something is still mounted in."""
    inside = [str(p) for p, _, _ in mounts() if p == path or path in p.parents]
    if inside:
        raise LabError(f"{path} is not removed: mounted inside: {', '.join(inside)}")
    if path.exists():
        run("rm", "-rf", "--one-file-system", path, timeout_s=120)


# -- cgroups ---------------------------------------------------------------------------------


def cgroup_hierarchies() -> list[tuple[Path, str]]:
    """Mounted cgroup hierarchies of the box: mount point and type (`cgroup` or `cgroup2`)."""
    return [(point, kind) for point, kind, _ in mounts() if kind in ("cgroup", "cgroup2")]


def cgroups_of(pid: int) -> list[Path]:
    """The group a process is in, one directory per hierarchy; empty if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    paths = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths[frozenset(filter(None, controllers.split(",")))] = path.lstrip("/")
    found = []
    for point, kind, options in mounts():
        if kind not in ("cgroup", "cgroup2"):
            continue
        named = set(options.split(",")) if kind == "cgroup" else set()
        path_here = next((p for c, p in paths.items() if c <= named and bool(c) == bool(named)), "")
        found.append(point / path_here)
    return found


def has_cgroup_v1() -> bool:
    """Whether controllers hang on cgroup v1 here (the hybrid layout counts as v1)."""
    return any(kind == "cgroup" for _, kind in cgroup_hierarchies())


def make_cgroups(group: str, name: str, *, leaf: bool) -> list[Path]:
    """Make `group/name` in every hierarchy; return the directories.

    A leaf takes processes; any other carries further groups (on cgroup v2 no group does both).

    Each machine must have its own: nspawn with --keep-unit puts every machine into the sub-groups
    `payload` and `supervisor` of the group it was started in, so two machines started in one group
    share their systemd's groups.
    """
    made = []
    for top, kind in cgroup_hierarchies():
        parent = top / group
        parent.mkdir(exist_ok=True)
        if (parent / "cpuset.cpus").exists() and kind == "cgroup":
            # cpuset(7): a v1 group without cpus and mems takes no process; inherit them.
            (parent / "cgroup.clone_children").write_text("1")
            for key in ("cpuset.cpus", "cpuset.mems"):
                (parent / key).write_text((top / key).read_text())
        own = parent / name
        own.mkdir(exist_ok=True)
        if kind == "cgroup2":
            for directory in (top, parent) if leaf else (top, parent, own):
                _delegate(directory)
        made.append(own)
    return made


def _delegate(directory: Path) -> None:
    """Turn on every controller for the children of a v2 group, as far as the box allows."""
    for controller in (directory / "cgroup.controllers").read_text().split():
        try:
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            # A controller that the box keeps for itself: the machine goes without it.
            continue


def cgroup_processes(group: str) -> list[Process]:
    """Every process in a group of any hierarchy, sub-groups included."""
    pids: set[int] = set()
    for top, _ in cgroup_hierarchies():
        for directory, _, files in os.walk(top / group):
            if "cgroup.procs" in files:
                try:
                    text = Path(directory, "cgroup.procs").read_text(encoding="ascii")
                except OSError:
                    continue  # removed while we looked
                pids.update(int(pid) for pid in text.split())
    found = (Process.of(pid) for pid in sorted(pids))
    return [process for process in found if process]


def remove_cgroups(group: str, *, timeout_s: float = 10) -> None:
    """Remove a group and its sub-groups from every hierarchy, when its last process is gone."""

    def removed() -> bool | Waiting:
        left = []
        for top, _ in cgroup_hierarchies():
            for directory, _, _ in os.walk(top / group, topdown=False):
                try:
                    os.rmdir(directory)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    left.append(f"{directory}: {error.strerror}")
        return Waiting(left[:3]) if left else True

    wait_until(removed, timeout_s, f"an empty cgroup {group}")


# -- packages --------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Packages of `PACKAGES` that this box lacks."""
    return [name for name, proof in PACKAGES.items() if not Path(proof).exists()]


def prepare(say: Callable[[str], None] = print) -> None:
    """Install what the box lacks, with apt-get; says what it does through `say`."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it mounts, makes network namespaces and boots machines")
    missing = missing_packages()
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise LabError(f"this box has no apt-get; install by hand: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    known = run("apt-cache", "show", *missing, check=False, timeout_s=60)
    if known.returncode != 0:
        say("apt-get update")
        run("apt-get", "update", "-q", timeout_s=300, env=env)
    say(f"apt-get install {' '.join(missing)}")
    run(
        "apt-get", "install", "-q", "-y", "--no-install-recommends", *missing,
        timeout_s=600, env=env,
    )  # fmt: skip
