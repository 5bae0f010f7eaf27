"""A network of the lab's own with whole machines on it, all of which can be taken down again.

    with Lab() as lab:
        one = lab.machine("one", address="10.10.0.11", user_data="#cloud-config\\n…")
        one.boot()
        one.wait_booted()
        print(one.sh("docker info"))

What the lab has made is written down under its state directory before it is used, so that any
later process can clear up after one that was killed. Machines are systemd-nspawn containers in
a network namespace with no way out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType
from typing import TypeVar

from tests.lab import host, images
from tests.lab.flavours import flavour as flavour_named
from tests.lab.host import LabError, Process, Waiting, run, wait_until

GATEWAY = "10.10.0.1"
PREFIX_BITS = 16
METADATA_ADDRESS = "169.254.169.254"
HTTP_PORT = 8000
BRIDGE = "br-lab"

#: What a command in a machine finds in its environment, as from a root shell.
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "xterm",
    "LANG": "C.UTF-8",
}

#: Directories of a machine that are the box's own file system: the Engine's overlay2 cannot stand
#: on the overlay a machine's root is. Same names below the machine's `volumes`.
_VOLUMES = ("var/lib/docker", "var/lib/nodeagent")

#: Runs a machine until it is powered off or killed. nspawn with --keep-unit does not restart a
#: rebooted machine itself but exits with 133, EXIT_FORCE_RESTART (systemd: src/nspawn/nspawn.c).
#: Each boot gets a cgroup of its own: on cgroup v2 a used one takes no process any more.
_SUPERVISE = """
boot=0
while :; do
    boot=$((boot + 1))
    mkdir -p {groups}
    {command}
    rc=$?
    [ $rc = 133 ] || exit $rc
done
"""

_NETWORK = """\
[Match]
Name=host0

[Network]
Address={address}/{bits}
Gateway={gateway}
DNS={gateway}
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is written down about a machine, so that any process can find it again."""

    name: str
    flavour: str
    address: str
    layers: tuple[str, ...]


class Machine:
    """One machine: an overlay on a flavour's root file system, booted in systemd-nspawn.

    Made by `Lab.machine`. Everything here works from any process that finds the machine's record.
    """

    def __init__(self, *, lab: Lab, record: _Record) -> None:
        self.lab = lab
        self.name = record.name
        self.flavour = record.flavour
        self.address = record.address
        self.layers = record.layers
        self.directory = lab.machines_dir / record.name
        self.root = self.directory / "root"
        #: What the machine has written over its lower layers: copy it for a baked layer.
        self.upper = self.directory / "upper"
        #: The real directories bound into the machine: `volumes/var/lib/docker` and so on.
        self.volumes = self.directory / "volumes"
        self.console_log = lab.logs_dir / f"{record.name}.console"

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.address})"

    # -- what it is now

    @property
    def port(self) -> str:
        """The machine's port on the lab's bridge."""
        return f"vb-{self.name}"

    @property
    def running(self) -> bool:
        """Whether it is switched on (also between the two halves of a reboot)."""
        return self._supervisor() is not None

    @property
    def leader(self) -> int:
        """The box's pid of the machine's pid 1; `LabError` if there is none now."""
        leader = self._leader()
        if leader is None:
            raise LabError(f"{self.name} is not running")
        return leader.pid

    def _supervisor(self) -> Process | None:
        process = Process.load(self._process_file)
        return process if process and process.alive else None

    @property
    def _process_file(self) -> Path:
        return self.directory / "process.json"

    def _leader(self) -> Process | None:
        supervisor = self._supervisor()
        for nspawn in supervisor.children() if supervisor else ():
            for child in nspawn.children():
                # proc(5): the last number is the pid in the innermost namespace.
                if _status(child.pid, "NSpid").split()[1:] == ["1"]:
                    return child
        return None

    @property
    def _group(self) -> str:
        return f"{self.lab.slug}/m-{self.name}"

    # -- switching it on and off

    def boot(self) -> None:
        """Switch it on; returns at once. A cut cable is whole again after it."""
        if self.running:
            raise LabError(f"{self.name} is running already")
        self._sweep()
        self._mount()
        log = self.console_log
        log.parent.mkdir(parents=True, exist_ok=True)
        groups = host.make_cgroups(self.lab.slug, f"m-{self.name}", leaf=False)
        boots = [f"{shlex.quote(str(group))}/boot$boot" for group in groups]
        # nsenter --net, not ip netns exec: the latter remounts /sys, which hides cgroup v1.
        words = ["nsenter", f"--net={self.lab.netns_path}", "--", *self._nspawn()]
        entered = host.into_groups(["@groups@"], *words)
        command = shlex.join(entered).replace("@groups@", " ".join(boots))
        script = _SUPERVISE.format(groups=" ".join(boots), command=command)
        supervisor = host.spawn(
            "/bin/sh", "-c", script, log=log, groups=self.lab.make_service_groups()
        )
        supervisor.save(self._process_file)

    def _nspawn(self) -> list[str]:
        on_v1 = host.has_cgroup_v1() and flavour_named(self.flavour).boots_on_cgroup_v1
        words = [
            # Without v1 the machine has the controllers the box has left for v2: often none, so
            # that its containers run but cannot be limited.
            *([] if on_v1 else ["/usr/bin/env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"]),
            "systemd-nspawn",
            "--quiet",
            "--boot",
            f"--directory={self.root}",
            f"--machine={self.name}",
            f"--network-bridge={BRIDGE}",
            "--register=no",
            "--keep-unit",
            "--capability=all",
            "--system-call-filter=@keyring bpf add_key keyctl @mount",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--console=read-only",
        ]
        words += [f"--bind={self.volumes / path}:/{path}" for path in _VOLUMES]
        if Path("/dev/net/tun").exists():
            words.append("--bind=/dev/net/tun")
        words += ["--", "--show-status=yes"]
        if on_v1:
            # systemd 256 and 257 refuse cgroup v1 without it; older ones ignore the word.
            words.append("SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1")
        return words

    def wait_booted(self, timeout_s: float = 60) -> str:
        """Wait until systemd has no job left; returns `running` or `degraded`."""

        def state() -> str | Waiting:
            self._must_run("boot")
            said = self._try("systemctl", "is-system-running")
            return said if said in ("running", "degraded") else Waiting(said)

        return self._wait(state, timeout_s, "the boot")

    def wait_cloud_init(self, timeout_s: float = 60) -> Mapping[str, object]:
        """Wait until cloud-init is done with this boot; returns its result.json (`v1`).

        Errors it collected are in the result's `errors`: not every test is about their absence.
        """

        def result() -> Mapping[str, object] | Waiting:
            self._must_run("cloud-init")
            text = self._try("cat", "/run/cloud-init/result.json")
            if not text.startswith("{"):
                return Waiting(text)
            seen = json.loads(text)["v1"]
            assert isinstance(seen, dict)
            return seen

        return self._wait(result, timeout_s, "cloud-init's end")

    def reboot(self, timeout_s: float = 60) -> None:
        """A clean reboot; returns when the next boot has begun (then `wait_booted`)."""
        before = self._leader()
        self.run("systemctl", "--no-block", "reboot")

        def again() -> bool | Waiting:
            self._must_run("reboot")
            leader = self._leader()
            return Waiting("shutting down") if leader in (None, before) else True

        self._wait(again, timeout_s, "the reboot")

    def power_off(self, timeout_s: float = 60) -> None:
        """A clean shutdown, as by the power button; the disk stays."""
        self.run("systemctl", "--no-block", "poweroff")
        self._wait(
            lambda: Waiting("still on") if self.running else True, timeout_s, "the power-off"
        )
        self._sweep()

    def kill(self) -> None:
        """Power loss: every process of the machine ends at once, the disk stays as it was.

        What processes had written but not synced is kept, other than on real hardware: the page
        cache is the box's. Does nothing to a machine that is off.
        """
        supervisor = self._supervisor()
        leader = self._leader()
        if supervisor:
            supervisor.kill()  # first, or a machine killed while it reboots would be started anew
        if leader:
            leader.signal(signal.SIGKILL)
        self._sweep()

    def _sweep(self) -> None:
        """Leave no process, network port or cgroup of a machine whose supervisor is gone."""
        if not any((top / self._group).exists() for top, _ in host.cgroup_hierarchies()):
            return
        group = self._group

        def ended() -> bool | Waiting:
            left = host.cgroup_processes(group)
            return Waiting(left) if left else True

        try:
            # nspawn tidies up after its payload by itself.
            wait_until(ended, 5, f"the end of {self.name}'s processes")
        except LabError:
            # Only the lab puts processes into these groups, so what is in them is the lab's.
            for process in host.cgroup_processes(group):
                process.signal(signal.SIGKILL)
            wait_until(ended, 10, f"the end of {self.name}'s killed processes")
        host.remove_cgroups(group)
        # The kernel removes the port some time after the last process of the machine's namespace.
        wait_until(lambda: not self.lab.has_port(self.port), 10, f"{self.port} to go away")
        with contextlib.suppress(OSError):
            # nspawn does not remove it where /run is on disk.
            Path("/run/systemd/nspawn/propagate", self.name).rmdir()
        self._process_file.unlink(missing_ok=True)

    def destroy(self) -> None:
        """Killed, unmounted, its directories removed; the console log stays."""
        self.kill()
        host.unmount_below(self.directory)
        host.remove_tree(self.directory)

    # -- its cable

    def cut(self) -> None:
        """Take the machine off the network: nothing passes, but its link stays up.

        That is what a partition looks like from inside. (Taking the port down instead would take
        the carrier, and with it the address that systemd-networkd manages.)
        """
        self._port_state(0)

    def heal(self) -> None:
        """Undo `cut`."""
        self._port_state(3)

    def _port_state(self, state: int) -> None:
        # bridge(8): 0 is disabled, 3 is forwarding.
        self.lab.run("bridge", "link", "set", "dev", self.port, "state", str(state), timeout_s=10)

    # -- commands and files in it

    def run(
        self,
        *argv: str,
        timeout_s: float = 30,
        check: bool = True,
        input: str | None = None,
    ) -> CompletedProcess[str]:
        """Run a command as root in the machine, in its namespaces and in pid 1's cgroup.

        `LabError` on a bad exit (unless `check` is off) and on a time-out, which ends the command.
        """
        words = ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in _ENVIRONMENT.items())]
        words += ["/usr/bin/timeout", "--kill-after=2", str(timeout_s), *argv]
        began = time.monotonic()
        done = run(
            *self._enter(*words),
            # The command is ended from inside: to end nsenter would leave it running.
            timeout_s=timeout_s + 10,
            check=False,
            input=input,
        )
        # timeout(1): 124, or 137 where it had to kill; a command may say the same by itself.
        late = done.returncode in (124, 137) and time.monotonic() - began >= timeout_s
        if late or (check and done.returncode != 0):
            why = f"no end within {timeout_s:g} s" if late else f"exit {done.returncode}"
            said = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip())))[-3000:]
            raise LabError(f"{self.name}: {shlex.join(argv)[:500]}: {why}\n{said}")
        done.args = list(argv)
        return done

    def sh(self, script: str, *, timeout_s: float = 30, check: bool = True) -> str:
        """Run a shell script (`sh -eu`) in the machine; returns its output without the last \\n."""
        done = self.run("sh", "-euc", script, timeout_s=timeout_s, check=check)
        return done.stdout.rstrip("\n")

    def _enter(self, *words: str) -> list[str]:
        leader = self.leader
        inside = ["nsenter", f"--target={leader}", "--all", "--", *words]
        return host.into_groups(host.cgroups_of(leader), *inside)

    def enter(self) -> list[str]:
        """The words that give a person a root shell in the machine."""
        settings = [f"{key}={value}" for key, value in _ENVIRONMENT.items()]
        # script(1) opens a terminal of the machine's own: the box's is not in its /dev.
        shell = ("/usr/bin/script", "--quiet", "--command", "/bin/bash --login", "/dev/null")
        return self._enter("/usr/bin/env", "-i", *settings, *shell)

    def _on_disk(self, *argv: str, input: str | None = None) -> CompletedProcess[str]:
        """Run a command on the machine's files: in it where it runs, else in its root alone."""
        if self.running:
            return self.run(*argv, input=input)
        if any(path.startswith(f"/{volume}/") for path in argv for volume in _VOLUMES):
            raise LabError(f"{self.name} is off: look into {self.volumes} for {argv[-1]}")
        return run("chroot", self.root, *argv, input=input, timeout_s=30)

    def read(self, path: str) -> str:
        """The text of a file, whether the machine is on or off."""
        return self._on_disk("cat", path).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file whole or not at all, with its directories, on or off."""
        script = (
            'mkdir -p "$(dirname "$1")"; rm -f "$1.part"; (umask 077; cat > "$1.part"); '
            'chmod "$2" "$1.part"; mv "$1.part" "$1"'
        )
        self._on_disk("sh", "-euc", script, "write", path, f"{mode:o}", input=text)

    def journal(self, unit: str = "", since: str = "") -> str:
        """The machine's journal, of one unit and since a time journalctl knows, if given."""
        words = ["journalctl", "--no-pager", "--output=short-precise", "--no-hostname"]
        words += [f"--unit={unit}"] if unit else []
        words += [f"--since={since}"] if since else []
        return self.run(*words).stdout

    # -- inner workings

    def _try(self, *argv: str) -> str:
        """What a command says, or why it could not run: for looks at a machine half up."""
        try:
            done = self.run(*argv, check=False, timeout_s=10)
        except LabError as error:
            return str(error)
        return (done.stdout or done.stderr).strip()

    def _must_run(self, what: str) -> None:
        if not self.running:
            raise LabError(f"{self.name} went off during its {what}{self._console()}")

    def _wait(self, condition: Callable[[], T | Waiting], timeout_s: float, what: str) -> T:
        try:
            return wait_until(condition, timeout_s, f"{what} of {self.name}")
        except LabError as error:
            if str(self.console_log) in str(error):
                raise
            raise LabError(f"{error}{self._console()}") from error

    def _console(self) -> str:
        """The end of the console log, for an error's text."""
        try:
            text = self.console_log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = "(nothing)"
        plain = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x1b\x07]*(\x1b\\|\x07)|.)", "", text)
        lines = [line.rstrip() for line in plain.splitlines() if line.strip()]
        return f"\n{self.console_log} ends:\n" + "\n".join(lines[-20:])

    def _mount(self) -> None:
        if os.path.ismount(self.root):
            return
        lower = [*self.layers, str(images.rootfs(flavour_named(self.flavour)))]
        options = f"lowerdir={':'.join(lower)},upperdir={self.upper},workdir={self.directory}/work"
        run("mount", "-t", "overlay", "-o", options, "overlay", self.root, timeout_s=30)

    def _prepare(self, user_data: str) -> None:
        """Make the machine's directories and write what makes it this machine."""
        for directory in (self.root, self.upper, self.directory / "work"):
            directory.mkdir(parents=True)
        for path in _VOLUMES:
            (self.volumes / path).mkdir(parents=True)
        self._mount()
        network = _NETWORK.format(address=self.address, bits=PREFIX_BITS, gateway=GATEWAY)
        # A new instance each time, or cloud-init would take a clone for the machine it was.
        instance = f"instance-id: {self.name}-{secrets.token_hex(4)}\nlocal-hostname: {self.name}\n"
        seed = "/var/lib/cloud/seed/nocloud"
        self.write("/etc/hostname", f"{self.name}\n")
        self.write("/etc/systemd/network/10-host0.network", network)
        self.write(f"{seed}/meta-data", instance)
        self.write(f"{seed}/user-data", user_data, mode=0o600)


def _status(pid: int, key: str) -> str:
    """A line of /proc/PID/status; empty where there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line.split(":", 1)[1] for line in lines if line.startswith(f"{key}:")), "")


class Lab:
    """The network, its HTTP and DNS servers, and the machines on it.

    `state_dir` (default `NODEAGENT_LAB_DIR`) holds everything about a run; two state directories
    are two labs that know nothing of each other. Built images are shared by all of them.
    """

    def __init__(self, state_dir: Path | None = None) -> None:
        self.state_dir = (state_dir or images.lab_dir()).resolve()
        default = Path("/var/tmp/nodeagent-lab")
        mark = hashlib.sha256(str(self.state_dir).encode()).hexdigest()[:6]
        #: The name of everything the lab makes outside its state directory.
        self.slug = "nodeagent-lab" if self.state_dir == default else f"nodeagent-lab-{mark}"
        self.netns_path = Path("/run/netns") / self.slug
        self.machines_dir = self.state_dir / "machines"
        self.logs_dir = self.state_dir / "logs"
        #: Files in here are served at `url`; emptied by `up` and `down`.
        self.http_root = self.state_dir / "http"
        self.url = f"http://{GATEWAY}:{HTTP_PORT}"
        self._lock: int | None = None

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    # -- up and down

    def up(self) -> None:
        """Make the network and its servers; a second call changes nothing.

        A lab that an earlier process left on purpose (`detach`) is taken over as it is; what one
        left behind that was killed is cleared away first.
        """
        if self._lock is not None:
            return
        host.prepare()
        self._acquire()
        try:
            if self._detached_file.exists() and self._whole():
                self._detached_file.unlink()
                return
            self._clear()
            self.http_root.mkdir(parents=True, exist_ok=True)
            self.logs_dir.mkdir(parents=True, exist_ok=True)
            self._make_network()
            self._start_http()
            self.dns()
        except BaseException:
            self._clear()
            self._release()
            raise

    def down(self) -> None:
        """Stop and remove everything the lab made here; logs and built images stay.

        Also what another process made and left behind. Raises `LabError` where another process
        still works with the lab.
        """
        if self._lock is None:
            self._acquire()
        try:
            self._clear()
        finally:
            self._release()

    def detach(self) -> None:
        """Leave the lab running, for other processes to use, take over or take down."""
        self._detached_file.write_text("")
        self._release()

    @property
    def is_up(self) -> bool:
        """Whether the network is there, whoever made it."""
        return self._whole()

    @property
    def _detached_file(self) -> Path:
        return self.state_dir / "detached"

    def _acquire(self) -> None:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "?"
            os.close(lock)
            raise LabError(
                f"process {holder} works with the lab in {self.state_dir}; "
                "wait for it, or give this one a directory of its own (NODEAGENT_LAB_DIR)"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        for machine in self.machines().values():
            machine.destroy()
        # Directories of machines that were being made when their process was killed.
        host.unmount_below(self.machines_dir)
        host.remove_tree(self.machines_dir)
        host.remove_tree(self.http_root)
        for name in ("http", "dns"):
            self._stop(name)
        for process in host.cgroup_processes(self.slug):
            # Started by the lab, but its process was killed before it wrote that down.
            process.kill()
        host.remove_cgroups(self.slug)
        if self.netns_path.exists():
            run("ip", "netns", "delete", self.slug, timeout_s=20)
        self._detached_file.unlink(missing_ok=True)

    def _whole(self) -> bool:
        services = [Process.load(self._service_file(name)) for name in ("http", "dns")]
        return self.netns_path.exists() and all(s is not None and s.alive for s in services)

    # -- the network

    def run(
        self, *argv: str | Path, timeout_s: float = 30, check: bool = True
    ) -> CompletedProcess[str]:
        """Run a command of the box in the lab's network namespace, beside the machines."""
        words = ["nsenter", f"--net={self.netns_path}", "--", *argv]
        return run(*words, timeout_s=timeout_s, check=check)

    def _make_network(self) -> None:
        run("ip", "netns", "add", self.slug, timeout_s=20)
        steps = (
            ("ip", "link", "set", "lo", "up"),
            # Nothing leads out, and nothing is passed on if something ever does.
            ("sysctl", "-qw", "net.ipv4.ip_forward=0"),
            ("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0"),
            ("ip", "address", "add", f"{GATEWAY}/{PREFIX_BITS}", "dev", BRIDGE),
            ("ip", "address", "add", f"{METADATA_ADDRESS}/32", "dev", BRIDGE),
            ("ip", "link", "set", BRIDGE, "up"),
        )
        for words in steps:
            self.run(*words, timeout_s=20)

    def has_port(self, port: str) -> bool:
        """Whether the bridge has that port now."""
        if not self.netns_path.exists():
            return False
        return self.run("ip", "link", "show", port, check=False, timeout_s=20).returncode == 0

    # -- its servers

    def make_service_groups(self) -> list[Path]:
        """The cgroups of the lab's own processes, by which a lost one is found again."""
        return host.make_cgroups(self.slug, "lab", leaf=True)

    def _service_file(self, name: str) -> Path:
        return self.state_dir / f"{name}.json"

    def _start(self, name: str, *argv: str | Path, listens: Callable[[int], bool]) -> None:
        log = self.logs_dir / f"{name}.log"
        words = ["nsenter", f"--net={self.netns_path}", "--", *argv]
        process = host.spawn(*words, log=log, groups=self.make_service_groups())
        process.save(self._service_file(name))

        def up() -> bool | Waiting:
            if not process.alive:
                text = log.read_text(encoding="utf-8", errors="replace")
                raise LabError(f"the {name} server ended: {text[-500:]}")
            return listens(process.pid) or Waiting(f"see {log}")

        wait_until(up, 10, f"the lab's {name} server")

    def _stop(self, name: str) -> None:
        process = Process.load(self._service_file(name))
        if process:
            process.kill()
        self._service_file(name).unlink(missing_ok=True)

    def serve(self, path: Path, name: str = "") -> str:
        """Serve a file of the box to the machines; returns its URL."""
        link = self.http_root / (name or path.name)
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve(strict=True))
        return f"{self.url}/{link.name}"

    def _start_http(self) -> None:
        serve = ["-m", "http.server", str(HTTP_PORT), "--bind", GATEWAY]
        self._start(
            "http",
            sys.executable,
            *serve,
            "--directory",
            self.http_root,
            listens=lambda pid: _listens(pid, "tcp", HTTP_PORT),
        )

    def dns(
        self,
        *,
        a: Mapping[str, Sequence[str]] | None = None,
        srv: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    ) -> None:
        """Make the lab's DNS server know these records, and no others.

        `a` gives addresses by name, `srv` (target, port) by service name. Any other name does
        not exist (NXDOMAIN). Answers have a time to live of 0.
        """
        hosts = [f"{ip} {name}" for name, ips in (a or {}).items() for ip in ips]
        lines = [
            "keep-in-foreground",
            "user=root",
            "pid-file=",
            f"listen-address={GATEWAY}",
            "bind-interfaces",
            "no-resolv",
            "no-hosts",
            f"addn-hosts={self.state_dir}/dns.hosts",
            "address=/#/",
        ]
        for service, targets in (srv or {}).items():
            lines += [f"srv-host={service},{target},{port},1,1" for target, port in targets]
        host.write_atomically(self.state_dir / "dns.hosts", "\n".join(hosts) + "\n")
        host.write_atomically(self.state_dir / "dns.conf", "\n".join(lines) + "\n")
        self._stop("dns")
        self._start(
            "dns",
            "dnsmasq",
            f"--conf-file={self.state_dir}/dns.conf",
            listens=lambda pid: _listens(pid, "udp", 53),
        )

    # -- its machines

    def machine(
        self,
        name: str,
        *,
        flavour: str = "trixie",
        address: str,
        user_data: str = "#cloud-config\n{}\n",
        layers: Iterable[Path] = (),
    ) -> Machine:
        """A new machine, switched off, with a disk of its own.

        `layers` are directories laid over the flavour's root file system below the machine's own
        disk, the uppermost first: an image baked from a machine's `upper`, for instance.
        """
        if self._lock is None:
            raise LabError("the lab is not up: call up() first")
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", name):
            # The kernel takes 15 characters for an interface, three of them are "vb-".
            raise LabError(f"{name!r} cannot name a machine: 2 to 12 of a-z, 0-9 and -")
        others = self.machines()
        if name in others:
            raise LabError(f"the lab has a machine {name} already; destroy() it first")
        for other in others.values():
            if other.address == address:
                raise LabError(f"{address} belongs to {other.name}")
        images.rootfs(flavour_named(flavour))
        record = _Record(
            name=name,
            flavour=flavour,
            address=address,
            layers=tuple(str(Path(layer).resolve()) for layer in layers),
        )
        machine = Machine(lab=self, record=record)
        machine.directory.mkdir(parents=True, exist_ok=True)
        host.write_atomically(machine.directory / "machine.json", json.dumps(asdict(record)))
        machine.console_log.unlink(missing_ok=True)
        try:
            machine._prepare(user_data)
        except BaseException:
            machine.destroy()
            raise
        return machine

    def machines(self) -> dict[str, Machine]:
        """Every machine of this lab, whoever made it, by name."""
        found = {}
        for path in sorted(self.machines_dir.glob("*/machine.json")):
            seen = json.loads(path.read_text(encoding="utf-8"))
            seen["layers"] = tuple(seen["layers"])
            record = _Record(**seen)
            found[record.name] = Machine(lab=self, record=record)
        return found


def _listens(pid: int, protocol: str, port: int) -> bool:
    """Whether something listens on GATEWAY:port in a process's network namespace (proc(5))."""
    address = "".join(f"{int(part):02X}" for part in reversed(GATEWAY.split(".")))
    try:
        text = Path(f"/proc/{pid}/net/{protocol}").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError, OSError):
        return False
    return f" {address}:{port:04X} " in text
