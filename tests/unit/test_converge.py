"""One cycle: steps in order, each as far as it goes, and one sentence for the whole."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest

from nodeagent.changes import Change
from nodeagent.converge import MOST_ROUNDS, Cycle, State, StepResult, preview, run_cycle
from nodeagent.errors import HostError
from nodeagent.host import Host
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec
from tests.unit.fakes import World, make_spec

SPEC = make_spec()


@dataclass(frozen=True)
class Note:
    """A change that leaves its name in a list."""

    name: str
    made: list[str] = field(compare=False, repr=False)
    error: str = ""

    def __str__(self) -> str:
        return f"note {self.name}"

    def apply(self, _host: Host) -> None:
        if self.error:
            raise HostError("note", self.name, self.error)
        self.made.append(self.name)


def host() -> Host:
    return World().machine(SPEC, "10.10.0.11").host


def fixed(name: str, plan: Plan, *requires: str) -> Step:
    return Step(name, requires, lambda _spec, _host: None, lambda _spec, _seen: plan)


def until_noted(name: str, made: list[str], *requires: str, error: str = "") -> Step:
    """A step that is right once its change has been made."""

    def diff(_spec: Spec, seen: bool) -> Plan:
        return done(f"{name} is right") if seen else change(Note(name, made, error))

    return Step(name, requires, lambda _spec, _host: name in made, diff)


def states(cycle: Cycle) -> dict[str, tuple[str, str]]:
    return {result.name: (result.state, result.sentence) for result in cycle.results}


def test_each_step_is_brought_as_far_as_it_goes_in_one_cycle() -> None:
    made: list[str] = []
    steps = (until_noted("first", made), until_noted("second", made, "first"))
    cycle = run_cycle(SPEC, host(), steps, lambda _: None)
    assert made == ["first", "second"]
    assert cycle.is_ready
    assert cycle.made_changes == 2
    again = run_cycle(SPEC, host(), steps, lambda _: None)
    assert again.is_ready
    assert again.made_changes == 0
    assert made == ["first", "second"]


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(wait("the others"), id="waiting"),
        pytest.param(block("no disk", fix="buy one"), id="blocked"),
    ],
)
def test_what_requires_a_step_that_is_not_done_is_held_and_not_even_looked_at(plan: Plan) -> None:
    made: list[str] = []
    steps = (
        fixed("first", plan),
        until_noted("second", made, "first"),
        until_noted("third", made, "second"),
        until_noted("apart", made),
    )
    cycle = run_cycle(SPEC, host(), steps, lambda _: None)
    assert made == ["apart"]
    assert states(cycle)["second"] == ("held", "after first")
    assert states(cycle)["third"] == ("held", "after second")
    assert states(cycle)["apart"] == ("done", "apart is right")
    assert not cycle.is_ready


def test_an_outside_failure_fails_its_step_and_holds_those_after() -> None:
    made: list[str] = []
    steps = (
        until_noted("first", made, error="no route to host"),
        until_noted("second", made, "first"),
        until_noted("apart", made),
    )
    cycle = run_cycle(SPEC, host(), steps, lambda _: None)
    assert states(cycle)["first"] == ("failing", "could not note first: no route to host")
    assert states(cycle)["second"][0] == "held"
    assert made == ["apart"]
    assert not cycle.is_blocked


def test_a_failure_to_look_is_a_failure_of_the_step() -> None:
    def observe(_spec: Spec, _host: Host) -> None:
        raise HostError("ask", "Consul", "connection refused", "start it")

    step = Step("first", (), observe, lambda _spec, _seen: done("never"))
    [result] = run_cycle(SPEC, host(), (step,), lambda _: None).results
    assert (result.state, result.sentence) == (
        "failing",
        "could not ask Consul: connection refused (start it)",
    )


def test_changes_made_before_a_failure_are_counted() -> None:
    made: list[str] = []
    plan = change(Note("one", made), Note("two", made), Note("three", made, "full"))
    [result] = run_cycle(SPEC, host(), (fixed("first", plan),), lambda _: None).results
    assert (result.state, result.changes) == ("failing", 2)


def test_a_bug_is_not_swallowed() -> None:
    def observe(_spec: Spec, _host: Host) -> None:
        raise KeyError("bug")

    step = Step("first", (), observe, lambda _spec, _seen: done("never"))
    with pytest.raises(KeyError):
        run_cycle(SPEC, host(), (step,), lambda _: None)


def test_a_step_that_changes_back_and_forth_is_given_up_for_this_cycle() -> None:
    made: list[str] = []
    steps = (fixed("first", change(Note("again", made))), until_noted("second", made, "first"))
    cycle = run_cycle(SPEC, host(), steps, lambda _: None)
    assert made == ["again"] * MOST_ROUNDS
    assert states(cycle)["first"] == (
        "failing",
        f"still something to change after {MOST_ROUNDS} rounds: note again",
    )
    assert states(cycle)["second"][0] == "held"


def result(name: str, state: State, sentence: str = "so", fix: str = "") -> StepResult:
    return StepResult(name, state, sentence, fix)


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        pytest.param(
            [result("a", "waiting"), result("b", "failing"), result("c", "blocked", "no", "mend")],
            "blocked at c: no; mend",
            id="what-a-human-must-do-comes-first",
        ),
        pytest.param(
            [result("a", "waiting"), result("b", "failing", "full")],
            "failing at b: full",
            id="a-failure-before-a-wait",
        ),
        pytest.param(
            [result("a", "done"), result("b", "waiting", "others"), result("c", "held")],
            "waiting at b: others",
            id="a-wait-before-what-it-holds-up",
        ),
        pytest.param(
            [result("a", "blocked", "one", "x"), result("b", "blocked", "two", "y")],
            "blocked at a: one; x",
            id="the-first-of-two",
        ),
        pytest.param(
            [result("quorum", "done", "3 of 3"), result("swarm", "done", "manager")],
            "ready: manager; 3 of 3",
            id="ready-names-the-role-and-the-quorum",
        ),
        pytest.param([result("a", "done")], "ready", id="ready-without-those-steps"),
    ],
)
def test_the_sentence(results: list[StepResult], sentence: str) -> None:
    assert Cycle(tuple(results)).sentence == sentence


def test_progress_tells_of_every_change_before_it_is_made() -> None:
    made: list[str] = []
    heard: list[tuple[str, str, int]] = []
    run_cycle(
        SPEC,
        host(),
        (until_noted("first", made),),
        lambda result: heard.append((result.state, result.sentence, len(made))),
    )
    assert heard == [("changing", "note first", 0), ("done", "first is right", 1)]


def test_one_log_line_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []
    with caplog.at_level(logging.INFO, "nodeagent.converge"):
        run_cycle(SPEC, host(), (until_noted("first", made),), lambda _: None)
    assert caplog.messages == ["note first"]


def test_a_preview_says_what_a_cycle_would_do_and_does_nothing() -> None:
    made: list[str] = []

    def observe(_spec: Spec, _host: Host) -> None:
        raise HostError("ask", "Consul", "refused")

    steps = (
        fixed("right", done("fine")),
        until_noted("first", made, "right"),
        until_noted("second", made, "first"),
        Step("silent", (), observe, lambda _spec, _seen: done("never")),
        until_noted("third", made, "silent"),
    )
    found = preview(SPEC, host(), steps)
    assert made == []
    assert [
        (each.name, [str(c) for c in each.plan.changes] if each.plan else None, each.error)
        for each in found
    ] == [
        ("right", [], ""),
        ("first", ["note first"], ""),
        ("second", None, ""),
        ("silent", None, "could not ask Consul: refused"),
        ("third", None, ""),
    ]


def test_apply_stands_in_for_making_a_change() -> None:
    made: list[str] = []
    seen: list[str] = []

    def apply(change: Change, host: Host) -> None:
        seen.append(str(change))
        change.apply(host)

    run_cycle(SPEC, host(), (until_noted("first", made),), lambda _: None, apply)
    assert seen == ["note first"]
