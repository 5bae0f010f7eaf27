"""What the program relies on in systemd, asked of the fake and of a lab machine's systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nodeagent.adapters.systemd import SystemdManager
from nodeagent.errors import HostError
from nodeagent.host import Systemd, Unit
from tests.contract.surroundings import needs_root
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Machine
from tests.unit.fakes import FakeSystemd, World, make_spec

REAL = pytest.param("real", marks=[pytest.mark.lab, needs_root])
SETTLE_S = 15

RUNS = "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
FAILING = ("fails-start.service", "fails-restart.service")
SAYS = ("first line", "Zürich: boom")
FAILS = f"""\
[Service]
Type=oneshot
ExecStart=sh -c 'echo "{SAYS[0]}"; echo "{SAYS[1]}" >&2; exit 3'
[Install]
WantedBy=multi-user.target
"""


@dataclass
class Rig:
    """A service manager with units that run, fail and are masked, none of which has run."""

    systemd: Systemd


def fake_rig() -> Rig:
    systemd = FakeSystemd(World().machine(make_spec("server"), "10.10.0.11"))
    for name in ("runs.service", *FAILING):
        systemd.units[name] = Unit("loaded", "inactive", "", "disabled")
    systemd.units["masked.service"] = Unit("masked", "inactive", "", "masked")
    systemd.failing = dict.fromkeys(FAILING, SAYS)
    return Rig(systemd)


WRAPPER = """\
#!/bin/sh
exec nsenter --target {leader} --all -- {program} "$@"
"""


@pytest.fixture(params=["fake", REAL])
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    if request.param == "fake":
        yield fake_rig()
        return
    machine, _ = request.getfixturevalue("machines")
    for program in ("systemctl", "journalctl"):  # the machine's, run as if they were ours
        path = tmp_path / program
        path.write_text(WRAPPER.format(leader=machine.leader, program=program))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    units = "/etc/systemd/system"
    machine.write(f"{units}/runs.service", RUNS)
    for name in FAILING:
        machine.write(f"{units}/{name}", FAILS)
    machine.sh(f"ln -sf /dev/null {units}/masked.service")
    systemd = SystemdManager()
    systemd.reload()
    yield Rig(systemd)
    machine.sh(
        f"systemctl disable --now --quiet runs {' '.join(FAILING)}; systemctl reset-failed;"
        f"cd {units}; rm runs.service masked.service {' '.join(FAILING)}; systemctl daemon-reload"
    )


def test_a_unit_that_is_not_there(rig: Rig) -> None:
    found = rig.systemd.unit("none.service")
    assert (found.load, found.active) == ("not-found", "inactive")
    assert not found.exists
    assert not found.is_active
    assert rig.systemd.last_lines("none.service", 5) == ()
    for act in (rig.systemd.start, rig.systemd.restart, rig.systemd.enable):
        with pytest.raises(HostError, match=r"none\.service"):
            act("none.service")


def test_a_masked_unit(rig: Rig) -> None:
    found = rig.systemd.unit("masked.service")
    assert (found.load, found.exists, found.is_active) == ("masked", False, False)
    for act in (rig.systemd.start, rig.systemd.restart, rig.systemd.enable):
        with pytest.raises(HostError, match=r"masked\.service"):
            act("masked.service")


def test_every_start_has_an_invocation_of_its_own(rig: Rig) -> None:
    name = "runs.service"
    before = rig.systemd.unit(name)
    assert (before.load, before.active, before.invocation) == ("loaded", "inactive", "")
    rig.systemd.start(name)
    first = rig.systemd.unit(name)
    assert (first.active, first.is_active, first.result) == ("active", True, "success")
    assert first.invocation
    rig.systemd.start(name)
    assert rig.systemd.unit(name) == first, "it ran already"
    rig.systemd.restart(name)
    second = rig.systemd.unit(name)
    assert second.is_active
    assert second.invocation not in ("", first.invocation)


def test_restarts_that_are_asked_for_are_no_crash_loop(rig: Rig) -> None:
    name = "runs.service"
    invocations = set()
    for _ in range(8):  # systemd allows 5 starts in 10 s (systemd-system.conf, DefaultStartLimit…)
        rig.systemd.restart(name)
        assert rig.systemd.unit(name).is_active
        invocations.add(rig.systemd.unit(name).invocation)
    assert len(invocations) == 8


def test_start_soon_is_a_start_anew(rig: Rig) -> None:
    name = "runs.service"
    rig.systemd.start_soon(name)

    def another_than(invocation: str) -> bool | Waiting:
        found = rig.systemd.unit(name)
        return (found.is_active and found.invocation != invocation) or Waiting(found)

    wait_until(lambda: another_than(""), SETTLE_S, "the start")
    first = rig.systemd.unit(name).invocation
    rig.systemd.start_soon(name)
    wait_until(lambda: another_than(first), SETTLE_S, "the restart")


def test_enabling(rig: Rig) -> None:
    name = "runs.service"
    assert rig.systemd.unit(name).enabled == "disabled"
    rig.systemd.enable(name)
    assert rig.systemd.unit(name).enabled == "enabled"
    assert not rig.systemd.unit(name).is_active, "enabled is not started"
    rig.systemd.enable(name)
    rig.systemd.reload()
    assert rig.systemd.unit(name).enabled == "enabled"


@pytest.mark.parametrize("verb", ["start", "restart"])
def test_a_unit_that_fails_is_named_and_says_why(rig: Rig, verb: str) -> None:
    name = f"fails-{verb}.service"
    with pytest.raises(HostError, match=name) as caught:
        getattr(rig.systemd, verb)(name)
    assert caught.value.cause.startswith(f"Job for {name} failed")
    found = rig.systemd.unit(name)
    assert (found.active, found.is_active, found.result) == ("failed", False, "exit-code")
    assert found.invocation
    # The journal may have a line a moment after the unit has failed.
    wait_until(lambda: rig.systemd.last_lines(name, 5) == SAYS, SETTLE_S, "what it said")
    assert rig.systemd.last_lines(name, 1) == SAYS[-1:]
    assert rig.systemd.last_lines("runs.service", 5) == ()


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_a_program_that_fails_says_why(kind: str) -> None:
    machine, says = World().machine(make_spec("server"), "10.10.0.11"), "Zürich: no such key"
    systemd: Systemd = machine.systemd if kind == "fake" else SystemdManager()
    systemd.execute("sh", "-c", "exit 0", "validate")
    machine.refuses = says
    with pytest.raises(HostError, match="sh") as caught:
        systemd.execute("sh", "-c", f"echo '{says}' >&2; exit 3", "validate")
    assert caught.value.cause == says


# -- what needs no fake


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(HostError, match="no-such-program"):
        SystemdManager().execute("no-such-program", "validate")


def test_what_a_program_says_counts_only_when_it_fails(tmp_path: Path) -> None:
    SystemdManager().execute("sh", "-c", 'echo wrong >&2; touch "$0"', str(tmp_path / "done"))
    assert (tmp_path / "done").exists()
    with pytest.raises(HostError) as caught:
        SystemdManager().execute("sh", "-c", "echo said; exit 7")
    assert caught.value.cause == "said"
    with pytest.raises(HostError) as caught:
        SystemdManager().execute("sh", "-c", "exit 7")
    assert caught.value.cause == "exit code 7"


WATCH = """
import sys, threading
sys.path.insert(0, "/root/contract")
from nodeagent.adapters import systemd
systemd.WATCH_PAUSE_S = 0.1
stop = threading.Event()
print("watching", flush=True)
systemd.SystemdManager().watch("runs.service", stop.set, stop)
print("woken", flush=True)
"""


@pytest.mark.lab
@needs_root
def test_a_watch_wakes_when_the_main_process_ends(machines: tuple[Machine, Machine]) -> None:
    machine, _ = machines
    source = Path(__file__).parents[2] / "nodeagent"
    adapters = ("adapters/__init__", "adapters/program", "adapters/systemd")
    for part in ("__init__", "errors", "host", *adapters):
        machine.write(f"/root/contract/nodeagent/{part}.py", (source / f"{part}.py").read_text())
    machine.write("/etc/systemd/system/runs.service", RUNS)
    machine.write("/root/contract/watch.py", WATCH)
    machine.sh("systemctl daemon-reload; systemctl start runs")
    machine.sh("systemd-run --quiet --unit=watch python3 /root/contract/watch.py")

    def said() -> str:
        return machine.sh("journalctl -b -q -o cat _SYSTEMD_UNIT=watch.service")

    wait_until(lambda: "watching" in said(), SETTLE_S, "the watch to begin")
    watch = "$(systemctl show --value --property=MainPID watch)"
    wait_until(
        lambda: "pidfd" in machine.sh(f"ls -l /proc/{watch}/fd"), SETTLE_S, "it to hold the process"
    )
    assert "woken" not in said()
    machine.sh("systemctl kill --signal=KILL runs")
    wait_until(lambda: "woken" in said(), SETTLE_S, "the watch to wake")


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_notify_is_utf8_and_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"\0{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(name)
        end.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        SystemdManager().notify(READY="1", STATUS="waiting at engine: Zürich\n → two  lines")
        assert end.recv(4096).decode() == "READY=1\nSTATUS=waiting at engine: Zürich → two lines"


def test_notify_without_anybody_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    SystemdManager().notify(READY="1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    with pytest.raises(HostError, match="systemd"):
        SystemdManager().notify(READY="1")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Failed: Zürich' >&2; echo more >&2; exit 1", "Failed: Zürich"),
        ("exit 4", "exit code 4"),
        ("printf '\\377' >&2; exit 1", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_systemctl_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"x\.service") as caught:
        SystemdManager().start("x.service")
    assert caught.value.cause == said


def test_a_machine_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"x\.service"):
        SystemdManager().unit("x.service")


@pytest.mark.parametrize("rig", [REAL], indirect=True)
def test_the_words_of_a_command_and_where_each_stands(
    rig: Rig, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As systemd itself fills in the environment: the process's own command line says the same."""
    machine, _ = request.getfixturevalue("machines")
    options = tmp_path / "options"
    options.write_text('# a remark\nMORE="--two --three=4"\nEMPTY=\nFIVE=5\n')
    machine.write(str(options), options.read_text())
    place = "/etc/systemd/system/words.service"
    machine.write(
        place,
        "[Service]\nEnvironment=ONE=1 FIVE=no\n"
        f"EnvironmentFile=-{options}\nEnvironmentFile=-/nowhere\n"
        "ExecStart=/bin/sh -c 'exec sleep infinity' --one=${ONE} $MORE $EMPTY --five=${FIVE}\n",
    )
    rig.systemd.reload()
    rig.systemd.start("words.service")
    found = rig.systemd.unit("words.service")
    words = {word.text: word.place for word in found.command}
    assert list(words)[-4:] == ["--one=1", "--two", "--three=4", "--five=5"]
    assert words["--two"] == words["--three=4"] == words["--five=5"] == str(options)
    assert words["--one=1"] == words["/bin/sh"] == place
    shown = machine.sh("systemctl show --value --property=ExecMainStartTimestampMonotonic words")
    assert abs(found.began_s - int(shown) / 1e6) < 1
    assert found.restarts == 0
    machine.sh(f"systemctl stop words; rm {place}; systemctl daemon-reload")
