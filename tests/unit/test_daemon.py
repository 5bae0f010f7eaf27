"""The loop: what it tells systemd and when, how long it sleeps, what a wrong spec does to it."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nodeagent import paths
from nodeagent.converge import Cycle
from nodeagent.daemon import LONGEST_S, SETTLED_S, SHARE, SHORTEST_S, Loop
from nodeagent.errors import HostError, SpecError
from nodeagent.host import Host
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.report import StatusFile
from nodeagent.spec import Spec
from nodeagent.steps import STEPS
from tests.unit.fakes import FakeClock, FakeFiles, FakeSystemd, Machine, World, make_spec

SPEC_TEXT = """\
cluster: demo
role: server
servers: 1
address: 10.10.0.0/16
join: []
"""
WATCHDOG_S = 60  # WatchdogSec= of nodeagent.service


class TimedSystemd(FakeSystemd):
    """Remembers when it was told what."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.timed: list[tuple[float, dict[str, str]]] = []

    def notify(self, **values: str) -> None:
        self.timed.append((self.machine.clock.t, values))

    def all(self, key: str) -> list[str]:
        return [values[key] for _, values in self.timed if key in values]

    def fed(self) -> list[float]:
        return [t for t, values in self.timed if "WATCHDOG" in values]


class NotingClock(FakeClock):
    """Remembers each wait; `events` is how many of the next ones an event ends at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.events = 0

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        if self.events:
            self.events -= 1
            self.on_wait()
            return True
        return super().wait(timeout_s)


@dataclass
class Rig:
    """A loop over given steps, on a machine whose time is the test's."""

    machine: Machine
    systemd: TimedSystemd
    clock: NotingClock
    loop: Loop
    spec_path: Path
    cycles: int = 0

    def run(self, cycles: int, deadline_s: float | None = None) -> Cycle:
        def until(_cycle: Cycle) -> bool:
            self.cycles += 1
            return self.cycles >= cycles

        return self.loop.run(until, deadline_s)

    def status(self) -> dict[str, object]:
        return dict(json.loads(self.machine.files.texts[paths.STATUS]))


Build = Callable[..., Rig]


@pytest.fixture
def rig(tmp_path: Path) -> Build:
    def build(*steps: Step) -> Rig:
        machine = World().machine(make_spec(servers=1, join="[]"), "10.10.0.11")
        machine.clock = clock = NotingClock()
        machine.systemd = systemd = TimedSystemd(machine)
        machine.host = replace(machine.host, systemd=systemd, clock=clock)
        spec_path = tmp_path / "node.yaml"
        spec_path.write_text(SPEC_TEXT)
        status = StatusFile(machine.files, clock, 1, machine.name, [step.name for step in steps])
        loop = Loop(machine.host, steps, status, spec_path, jitter=lambda _low, _high: 1.0)
        return Rig(machine, systemd, clock, loop, spec_path)

    return build


def fixed(plan: Plan, name: str = "first") -> Step:
    return Step(name, (), lambda _spec, _host: None, lambda _spec, _seen: plan)


def test_a_node_becomes_ready_and_says_so(rig: Build) -> None:
    found = rig(*STEPS)
    last = found.run(3)
    assert last.is_ready
    assert found.systemd.all("STATUS")[-1] == last.sentence
    assert last.sentence.startswith("ready: manager in Swarm ")
    assert found.status()["state"] == "ready"


def test_ready_is_told_before_the_first_cycle_and_once(rig: Build) -> None:
    told: list[int] = []

    def observe(_spec: Spec, host: Host) -> None:
        systemd = host.systemd
        assert isinstance(systemd, TimedSystemd)
        told.append(len(systemd.all("READY")))

    found = rig(Step("first", (), observe, lambda _spec, _seen: wait("others")))
    found.run(3)
    assert told == [1, 1, 1]
    assert found.systemd.all("READY") == ["1"]


def test_status_names_each_change_while_it_is_made(rig: Build) -> None:
    found = rig(*STEPS)
    found.run(1)
    told = found.systemd.all("STATUS")
    assert "consul: pull image hashicorp/consul:1.21" in told
    assert told.index("consul: pull image hashicorp/consul:1.21") < len(told) - 1


@pytest.mark.parametrize(
    "plan",
    [done("fine"), wait("others"), block("no", fix="mend")],
    ids=["settled", "wait", "block"],
)
def test_the_watchdog_is_fed_all_the_time_the_loop_lives(rig: Build, plan: Plan) -> None:
    found = rig(fixed(plan))
    found.run(20 if plan.summary else 400)
    times = [found.systemd.timed[0][0], *found.systemd.fed(), found.clock.t]
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert max(gaps) <= WATCHDOG_S / 3
    assert found.clock.t - times[0] > 3 * WATCHDOG_S, "too short a time to say anything"


def test_a_step_that_hangs_is_not_fed(rig: Build) -> None:
    during: list[tuple[int, int]] = []

    def observe(_spec: Spec, host: Host) -> None:
        assert isinstance(host.systemd, TimedSystemd)
        assert isinstance(host.clock, NotingClock)
        before = len(host.systemd.fed())
        host.clock.t += 10 * WATCHDOG_S
        during.append((before, len(host.systemd.fed())))

    found = rig(Step("first", (), observe, lambda _spec, _seen: done("at last")))
    found.run(1)
    [(before, after)] = during
    assert before == after
    times = [t for t, _ in found.systemd.timed]
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert max(gaps) > WATCHDOG_S, "systemd would have noticed"


def test_a_change_that_hangs_is_not_fed(rig: Build) -> None:
    class Hang:
        def __str__(self) -> str:
            return "hang"

        def apply(self, host: Host) -> None:
            assert isinstance(host.systemd, TimedSystemd)
            fed = len(host.systemd.fed())
            assert isinstance(host.clock, NotingClock)
            host.clock.t += 10 * WATCHDOG_S
            assert len(host.systemd.fed()) == fed
            raise HostError("hang", "for", "ever")

    last = rig(fixed(change(Hang()))).run(1)
    assert last.sentence == "failing at first: could not hang for: ever"


def test_a_spec_wrong_at_the_start_is_raised_before_ready(rig: Build) -> None:
    found = rig(fixed(done("fine")))
    found.spec_path.write_text(SPEC_TEXT.replace("role: server", "role: boss"))
    with pytest.raises(SpecError, match="role"):
        found.run(1)
    assert found.systemd.all("READY") == []
    assert found.cycles == 0


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda path: path.write_text("cluster: [\n"), id="not-yaml"),
        pytest.param(lambda path: path.write_text("role: server\n"), id="keys-missing"),
        pytest.param(lambda path: path.unlink(), id="removed"),
    ],
)
def test_a_spec_turning_wrong_blocks_changes_nothing_and_ends_when_mended(
    rig: Build, break_it: Callable[[Path], object]
) -> None:
    found = rig(*STEPS)
    assert found.run(2).is_ready
    before = dict(found.machine.files.texts)
    before.pop(paths.STATUS)
    units = dict(found.machine.systemd.units)
    found.systemd.timed.clear()
    break_later(found, break_it)
    last = found.run(found.cycles + 3)
    assert last.is_blocked
    assert last.sentence.startswith(f"blocked at spec: {found.spec_path}")
    assert found.systemd.all("STATUS")[-1] == last.sentence
    assert found.status()["state"] == "blocked"
    after = dict(found.machine.files.texts)
    after.pop(paths.STATUS)
    assert after == before
    assert found.machine.systemd.units == units
    found.spec_path.write_text(SPEC_TEXT)
    found.clock.on_wait = lambda: None
    assert found.run(found.cycles + 1).is_ready
    assert "spec" not in str(found.status()["steps"])


def break_later(found: Rig, break_it: Callable[[Path], object]) -> None:
    """Break the spec during the next pause."""

    def once() -> None:
        found.clock.on_wait = lambda: None
        break_it(found.spec_path)

    found.clock.on_wait = once


def test_a_changed_spec_is_taken_up_without_a_restart(rig: Build) -> None:
    found = rig(*STEPS)
    found.run(2)
    break_later(found, lambda path: path.write_text(SPEC_TEXT + "engine: {log: {max_file: 3}}\n"))
    assert found.run(found.cycles + 3).is_ready
    assert '"max-file": "3"' in found.machine.files.texts[paths.DAEMON_JSON]


def test_the_round_of_another_process_is_waited_for(rig: Build) -> None:
    found = rig(*STEPS)
    found.machine.files.held.add(paths.LOCK)
    last = found.run(3)
    assert last.sentence == (
        "waiting at lock: another nodeagent to finish its round on this machine"
    )
    assert not found.machine.files.exists(paths.IDENTITY)
    found.machine.files.held.clear()
    assert found.run(found.cycles + 2).is_ready


def test_the_lock_is_free_between_rounds(rig: Build) -> None:
    found = rig(fixed(wait("others")))
    held: list[bool] = []
    found.clock.on_wait = lambda: held.append(found.machine.files.is_held(paths.LOCK))
    found.run(3)
    assert held == [False, False]


class FullDisk(FakeFiles):
    """Nothing can be written any more."""

    def write(self, path: Path, _text: str, _mode: int | None) -> None:
        raise HostError("write", path, "No space left on device")


def test_a_status_file_that_cannot_be_written_stops_nothing(
    rig: Build, caplog: pytest.LogCaptureFixture
) -> None:
    found = rig(fixed(done("fine")))
    found.loop.status.files = FullDisk()
    with caplog.at_level(logging.WARNING, "nodeagent.report"):
        assert found.run(2).is_ready
    found.loop.status.files = found.machine.files
    found.run(found.cycles + 1)
    assert found.status()["state"] == "ready", "written once it can be, without further news"
    assert "could not write /run/nodeagent/status.json: No space left on device" in caplog.text


def test_a_lock_that_cannot_be_made_is_tried_again(rig: Build) -> None:
    class NoLock(FakeFiles):
        def try_lock(self, path: Path) -> object:  # type: ignore[override]  # it fails before it returns anything
            raise HostError("lock", path, "Read-only file system")

    found = rig(fixed(done("fine")))
    found.loop.host = replace(found.loop.host, files=NoLock())  # type: ignore[arg-type]  # a part of them
    last = found.run(2)
    assert last.sentence == (
        "failing at lock: could not lock /run/nodeagent/lock: Read-only file system"
    )
    found.loop.host = found.machine.host
    assert found.run(found.cycles + 1).is_ready


def pauses(found: Rig) -> list[tuple[float, float]]:
    """Each pause, with how long the wait had lasted by then."""
    lasted, pairs = 0.0, []
    for wait_s in found.clock.waits:
        pairs.append((lasted, wait_s))
        lasted += wait_s
    return pairs


def test_the_pause_is_a_twentieth_of_the_wait_between_its_bounds(rig: Build) -> None:
    found = rig(fixed(wait("others")))
    found.run(300)
    for lasted, pause in pauses(found):
        assert pause == pytest.approx(min(max(SHORTEST_S, SHARE * lasted), LONGEST_S)), lasted
    assert found.clock.waits[0] == pytest.approx(SHORTEST_S)
    assert found.clock.waits[-1] == LONGEST_S


def test_news_make_the_pause_short_again(rig: Build) -> None:
    news = iter(["old"] * 150 + ["new"] * 50)
    step = Step("first", (), lambda _spec, _host: next(news), lambda _spec, seen: wait(seen))
    found = rig(step)
    found.run(160)
    assert found.clock.waits[148] > 1
    assert found.clock.waits[150] == pytest.approx(SHORTEST_S)


def test_changes_that_never_help_do_not_keep_the_pause_short(rig: Build) -> None:
    class InVain:
        def __str__(self) -> str:
            return "start what falls over at once"

        def apply(self, host: Host) -> None:
            pass

    found = rig(fixed(change(InVain())))
    found.run(300)
    assert found.clock.waits[-1] == LONGEST_S


def test_the_same_failure_is_one_log_line_and_one_wait(
    rig: Build, caplog: pytest.LogCaptureFixture
) -> None:
    def observe(_spec: Spec, _host: Host) -> None:
        raise HostError("ask", "Consul", f"<Connection object at {id(object()):#x}>: refused")

    found = rig(Step("first", (), observe, lambda _spec, _seen: done("never")))
    with caplog.at_level(logging.INFO, "nodeagent.daemon"):
        found.run(100)
    assert caplog.messages == [
        "failing at first: could not ask Consul: <Connection object>: refused"
    ]
    assert found.clock.waits[-1] > SHORTEST_S


def test_a_settled_node_sleeps_long(rig: Build) -> None:
    found = rig(fixed(done("fine")))
    found.run(3)
    assert sum(found.clock.waits) == pytest.approx(2 * SETTLED_S)


def test_an_event_ends_the_sleep(rig: Build) -> None:
    found = rig(fixed(done("fine")))
    found.clock.events = 3
    began = found.clock.t
    found.run(4)
    assert found.clock.t == began
    assert len(found.clock.waits) == 3


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_jitter_spreads_the_pause_by_a_fifth(rig: Build, factor: float) -> None:
    asked: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return factor

    found = rig(fixed(done("fine")))
    found.loop.jitter = jitter
    found.run(2)
    assert asked == [(0.8, 1.2)]
    assert sum(found.clock.waits) == pytest.approx(SETTLED_S * factor)


def test_a_deadline_ends_the_run(rig: Build) -> None:
    found = rig(fixed(wait("others")))
    began = found.clock.t
    last = found.run(10**9, deadline_s=60)
    assert found.clock.t - began == pytest.approx(60)
    assert last.sentence == "waiting at first: others"


def test_one_log_line_for_each_new_sentence(rig: Build, caplog: pytest.LogCaptureFixture) -> None:
    news = iter(["one", "one", "two", "two", "two"])
    step = Step("first", (), lambda _spec, _host: next(news), lambda _spec, seen: wait(seen))
    with caplog.at_level(logging.INFO, "nodeagent.daemon"):
        rig(step).run(5)
    assert caplog.messages == ["waiting at first: one", "waiting at first: two"]


def test_the_nodes_checks_in_consul_follow_the_truth(rig: Build) -> None:
    found = rig(*STEPS)
    found.run(2)
    vouched = found.machine.consul.vouched
    assert vouched == {"nodeagent:nodeagent": True, "nodeagent:docker-engine": True}
    found.machine.files.texts[paths.DAEMON_JSON] = "{"
    assert found.run(found.cycles + 1).is_blocked
    assert vouched == {"nodeagent:nodeagent": False, "nodeagent:docker-engine": False}


def test_a_settled_node_is_vouched_for_before_its_checks_expire(rig: Build) -> None:
    found = rig(*STEPS)
    found.run(2)
    found.machine.consul.vouched.clear()
    began = found.clock.t
    found.run(found.cycles + 2)
    assert found.clock.t - began < 90
    assert found.machine.consul.vouched["nodeagent:nodeagent"]
