"""What people and programs read: golden files, at 80 columns, and schemas that they fit."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nodeagent import __version__, paths
from nodeagent.converge import Cycle, StepResult, preview
from nodeagent.errors import HostError
from nodeagent.host import Host
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.report import (
    Lines,
    StatusFile,
    plan_json,
    plan_text,
    read_status,
    sentence_of,
    status_text,
)
from nodeagent.spec import Spec
from nodeagent.steps import STEPS
from tests.unit.expect import assert_golden
from tests.unit.fakes import FakeClock, FakeFiles, Machine, World, make_spec

jsonschema: Any = importlib.import_module("jsonschema")  # it has no type stubs of its own
DOCS = Path(__file__).parents[2] / "docs"
NAMES = [step.name for step in STEPS]
ABOUT = {"cluster": "demo", "role": "server", "security": "off"}
READY = [
    StepResult("identity", "done", "server11 at 10.10.0.11"),
    StepResult("consul", "done", "Consul 1.21.0 at 10.10.0.11"),
    StepResult("engine", "done", "Docker Engine 26.1.5, logs json-file"),
    StepResult("quorum", "done", "3 of 3 servers, leader 10.10.0.12"),
    StepResult("swarm", "done", "manager in Swarm 1x2y3z4a5b6c7d8e9f0g1h2i3"),
    StepResult("services", "done", "registered: swarm-manager, nodeagent, docker-engine"),
]
LONG = StepResult(
    "engine",
    "blocked",
    'log-opts max-size is "a-very-long-value-that-nobody-would-write" in /etc/docker/daemon.json '
    'and "10m" by /etc/nodeagent/node.yaml; https://docs.example.com/' + "very-long-path/" * 8,
    "remove one of the two, in /etc/docker/daemon.json or /etc/nodeagent/node.yaml, and then "
    "docker -H unix:///run/nodeagent-engine/docker.sock logs consul",
)
SPEC_WRONG = StepResult(
    "spec",
    "blocked",
    "/etc/nodeagent/node.yaml:2: role: found 'boss'; allowed: server or worker (and 1 more: "
    "nodeagent validate)",
)


def held(*names: str) -> list[StepResult]:
    return [StepResult(name, "held", "after engine") for name in names]


STORIES: dict[str, list[StepResult]] = {
    "ready": READY,
    "waiting": [
        *READY[:3],
        StepResult(
            "quorum",
            "waiting",
            "Consul's quorum: 1 of 3 servers are alive; not seen: 10.10.0.12, 10.10.0.13",
        ),
        *held("swarm", "services"),
    ],
    "blocked": [*READY[:2], LONG, READY[3], *held("swarm", "services")],
    "failing": [
        READY[0],
        StepResult(
            "consul",
            "failing",
            "could not pull hashicorp/consul:1.21 into the System Engine: Get "
            '"https://registry.example/v2/": dial tcp: lookup registry.example: no such host',
        ),
        READY[2],
        *held("quorum", "swarm", "services"),
    ],
    "spec-wrong": [SPEC_WRONG],
    "locked": [
        StepResult("lock", "waiting", "another nodeagent to finish its round on this machine")
    ],
}


def status_after(*rounds: Iterable[StepResult], running: bool = True) -> dict[str, Any]:
    """The status file after these rounds, as `nodeagent status` reads it."""
    files, clock = FakeFiles(), FakeClock()
    status = StatusFile(files, clock, 4711, "server11", NAMES, ABOUT)
    for results in rounds:
        cycle = Cycle(tuple(results))
        for result in cycle.results:
            clock.t += 1.25
            if result.name in NAMES:
                status.update(result)
        status.settle(cycle)
    if running:
        files.held.add(paths.ALIVE)
    found = read_status(files)
    assert found is not None
    return found


@pytest.mark.parametrize("story", STORIES)
def test_status_for_people(story: str) -> None:
    before = [READY] if story in ("spec-wrong", "locked", "blocked") else []
    assert_golden(f"status.{story}.txt", status_text(status_after(*before, STORIES[story]), 80))


def test_status_of_an_agent_that_is_not_running() -> None:
    found = status_after(STORIES["waiting"], running=False)
    assert_golden("status.not-running.txt", status_text(found, 80))
    assert sentence_of(found) == "nodeagent is not running"


def test_status_of_an_agent_that_never_ran() -> None:
    assert read_status(FakeFiles()) is None
    assert_golden("status.never-ran.txt", status_text(None, 80))
    assert sentence_of(None) == "nodeagent has not run since this machine booted"


def test_status_while_the_first_change_is_made() -> None:
    files = FakeFiles()
    files.held.add(paths.ALIVE)
    status = StatusFile(files, FakeClock(), 4711, "server11", NAMES, ABOUT)
    status.update(READY[0])
    status.update(StepResult("consul", "changing", "pull image hashicorp/consul:1.21"))
    assert_golden("status.starting.txt", status_text(read_status(files), 80))


@pytest.mark.parametrize("columns", [50, 60, 80, 100, 132])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("story", STORIES)
def test_no_line_is_wider_than_the_terminal(story: str, running: bool, columns: int) -> None:
    text = status_text(status_after(READY, STORIES[story], running=running), columns)
    assert max(map(len, text.splitlines())) <= columns
    assert text.endswith("\n")


def test_a_command_to_be_copied_is_not_broken_at_its_hyphens() -> None:
    text = status_text(status_after(STORIES["blocked"]), 80)
    assert "unix:///run/nodeagent-engine/docker.sock" in text


def test_the_fix_stands_on_lines_of_its_own() -> None:
    lines = status_text(status_after(STORIES["blocked"]), 80).splitlines()
    assert lines[0] == "server11: blocked at engine"
    assert any(line.strip().startswith("fix: remove one of the two") for line in lines)


def test_security_off_is_said_where_everybody_sees_it() -> None:
    text = status_text(status_after(READY), 80)
    assert "SECURITY IS OFF" in text
    secured = {**status_after(READY), "about": {"security": "on"}}
    assert "SECURITY" not in status_text(secured, 80)


def test_the_time_of_a_step_is_shown_only_while_it_is_done() -> None:
    text = status_text(status_after(READY, STORIES["blocked"]), 80)
    engine = next(line for line in text.splitlines() if "engine " in line)
    assert engine.startswith("  XX  engine")
    assert not engine.rstrip().endswith(" s")


@pytest.mark.parametrize("is_there", [True, False])
def test_somebody_who_may_not_open_the_lock_sees_the_process(is_there: bool) -> None:
    class OthersFiles(FakeFiles):
        def is_held(self, path: Path) -> bool:
            raise HostError("look at", path, "Permission denied")

    files = OthersFiles()
    StatusFile(files, FakeClock(), 4711, "server11", NAMES).settle(Cycle(tuple(READY)))
    if is_there:
        files.texts[Path("/proc/4711")] = ""
    found = read_status(files)
    assert found is not None
    assert found["is_running"] == is_there


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "7", "null", '"x"'])
def test_a_torn_status_file_is_none(text: str) -> None:
    assert read_status(FakeFiles({paths.STATUS: text})) is None


def schema(name: str) -> dict[str, Any]:
    found = json.loads((DOCS / name).read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return dict(found)


def assert_fits(value: object, name: str) -> None:
    jsonschema.Draft202012Validator(schema(name)).validate(value)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("story", STORIES)
def test_status_fits_its_schema(story: str, running: bool) -> None:
    assert_fits(status_after(STORIES[story], running=running), "status.schema.json")
    assert_fits(status_after(READY, STORIES[story], running=running), "status.schema.json")


def test_a_status_that_never_was_fits_its_schema() -> None:
    assert_fits(None, "status.schema.json")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param({"state": "fine"}, id="unknown-state"),
        pytest.param({"surprise": 1}, id="unknown-key"),
        pytest.param({"ready_s": "soon"}, id="wrong-type"),
        pytest.param({"steps": {"consul": {"state": "done"}}}, id="step-without-its-keys"),
        pytest.param({"schema_version": 2}, id="another-version"),
    ],
)
def test_the_schema_of_the_status_refuses(spoil: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        assert_fits({**status_after(READY), **spoil}, "status.schema.json")


def test_status_for_programs() -> None:
    found = {**status_after(READY, STORIES["blocked"]), "agent_version": "(the version)"}
    assert_golden("status.blocked.json", json.dumps(found, indent=2) + "\n")


def plans() -> dict[str, Machine]:
    fresh = World().machine(make_spec(servers=1, join="[]"), "10.10.0.11")
    blocked = World().machine(make_spec(servers=1, join="[]"), "10.10.0.11")
    blocked.files.texts[paths.DAEMON_JSON] = '{"live-restore": true}'
    for machine in (fresh, blocked):
        prepare(machine)
    return {"fresh": fresh, "blocked": blocked}


def prepare(machine: Machine) -> None:
    """A machine whose identity is recorded, so that a plan can look further."""
    identity = STEPS[0]
    spec = machine.spec
    for made in identity.diff(spec, identity.observe(spec, machine.host)).changes:
        made.apply(machine.host)


@pytest.mark.parametrize("story", ["fresh", "blocked"])
def test_plan(story: str) -> None:
    machine = plans()[story]
    found = preview(machine.spec, machine.host, STEPS)
    text = plan_text(found, 80)
    assert_golden(f"plan.{story}.txt", text)
    assert max(map(len, text.splitlines())) <= 80
    assert_golden(f"plan.{story}.json", json.dumps(plan_json(found), indent=2) + "\n")
    assert_fits(plan_json(found), "plan.schema.json")


def test_plan_of_steps_that_wait_fail_or_are_long() -> None:
    def fixed(name: str, plan: Plan) -> Step:
        return Step(name, (), lambda _spec, _host: None, lambda _spec, _seen: plan)

    class Longwinded:
        def __str__(self) -> str:
            return "write /etc/nodeagent-has-a/very-long/path/" + "deep-" * 20

        def apply(self, _host: Host) -> None:
            raise AssertionError("a plan changes nothing")

    def observe(_spec: Spec, host: Host) -> None:
        host.consul.get("x")

    steps = (
        fixed("identity", done("server11 at 10.10.0.11")),
        fixed("engine", block(LONG.sentence, fix=LONG.fix)),
        fixed("quorum", wait("Consul's quorum: 1 of 3 servers are alive")),
        fixed("consul", change(Longwinded())),
        Step("swarm", (), observe, lambda _spec, _seen: done("never")),
        Step("services", ("swarm",), lambda _spec, _host: None, lambda _s, _seen: done("never")),
    )
    found = preview(make_spec(), World().machine(make_spec(), "10.10.0.11").host, steps)
    text = plan_text(found, 80)
    assert_golden("plan.mixed.txt", text)
    assert max(map(len, text.splitlines())) <= 80
    assert_fits(plan_json(found), "plan.schema.json")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param({"surprise": 1}, id="unknown-key"),
        pytest.param({"steps": {"consul": {"changes": "none"}}}, id="step-of-another-shape"),
        pytest.param({"schema_version": 2}, id="another-version"),
    ],
)
def test_the_schema_of_the_plan_refuses(spoil: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        assert_fits({**plan_json([]), **spoil}, "plan.schema.json")


def test_live_progress_is_one_line_for_each_news() -> None:
    out = io.StringIO()
    files, clock = FakeFiles(), FakeClock()
    status = StatusFile(files, clock, 1, "server11", NAMES, listener=Lines(out))
    status.update(READY[0])
    status.update(READY[0])
    clock.t += 12.34
    status.update(StepResult("consul", "changing", "pull image hashicorp/consul:1.21"))
    status.update(StepResult("quorum", "held", "after consul"))
    status.update(READY[1])
    assert out.getvalue().splitlines() == [
        "   0.0 s  ok  identity  server11 at 10.10.0.11",
        "  12.3 s  ..  consul    pull image hashicorp/consul:1.21",
        "  12.3 s  ok  consul    Consul 1.21.0 at 10.10.0.11",
    ]


def test_the_file_is_written_only_for_news() -> None:
    class Counting(FakeFiles):
        writes = 0

        def write(self, path: Path, text: str, mode: int | None) -> None:
            self.writes += 1
            assert mode == 0o644, "everybody may read how the node stands"
            super().write(path, text, mode)

    files, clock = Counting(), FakeClock()
    status = StatusFile(files, clock, 1, "server11", NAMES)
    for _ in range(10):
        clock.t += 30
        for result in READY:
            status.update(result)
        status.settle(Cycle(tuple(READY)))
    assert files.writes == len(READY) + 1


def test_it_says_who_wrote_it() -> None:
    found = status_after(READY)
    assert (found["node"], found["pid"], found["agent_version"]) == ("server11", 4711, __version__)
    assert found["ready_s"] == 7.5
    assert found["steps"]["identity"]["done_s"] == 1.25
