"""Containers cannot reach the metadata service: facts in, plan out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeagent import paths
from nodeagent.errors import HostError
from nodeagent.host import Rule, Unit
from nodeagent.steps import guard
from nodeagent.steps.guard import WANTED, Seen
from tests.unit.expect import said
from tests.unit.fakes import FakeNetwork, Machine, World, make_spec

SPEC = make_spec()
FOR_THE_HOST, FOR_CONTAINERS = WANTED
LOCAL = Rule(0, frozenset(), "lookup local")
MAIN = Rule(32766, frozenset(), "lookup main")

UP = Unit("loaded", "active", "run-1", "enabled", "success")
BASE = Seen(unit=UP, rules=(LOCAL, *WANTED, MAIN))
DONE = ["done containers cannot reach the metadata service"]
AGAIN = ["do restart nodeagent-guard.service: a rule of it is gone"]
WHY = ("RTNETLINK answers: Operation not supported",)
FAILS = [
    "block nodeagent-guard.service fails: RTNETLINK answers: Operation not supported",
    "fix journalctl -u nodeagent-guard.service",
]


@pytest.mark.parametrize(
    ("seen", "plan"),
    [
        pytest.param(BASE, DONE, id="up"),
        pytest.param(
            replace(BASE, rules=(LOCAL, *WANTED, Rule(5210, frozenset(), "lookup 52"), MAIN)),
            DONE,
            id="rules-of-others-beside-it",
        ),
        pytest.param(
            replace(BASE, unit=Unit("not-found", "inactive")),
            ["block nodeagent-guard.service is not installed", "fix nodeagent install"],
            id="installed-by-an-older-version",
        ),
        pytest.param(
            replace(BASE, unit=Unit("masked", "inactive", "", "masked")),
            [
                "block nodeagent-guard.service is masked",
                "fix systemctl unmask nodeagent-guard.service",
            ],
            id="masked",
        ),
        pytest.param(
            Seen(unit=Unit("loaded", "inactive", "", "disabled"), rules=(LOCAL, MAIN)),
            ["do enable nodeagent-guard.service"],
            id="first-boot",
        ),
        pytest.param(
            Seen(unit=Unit("loaded", "inactive", "", "enabled"), rules=(LOCAL, MAIN)),
            ["do start nodeagent-guard.service"],
            id="killed-before-start",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, active="inactive")),
            ["do start nodeagent-guard.service"],
            id="rules-without-the-unit",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, enabled="disabled")),
            ["do enable nodeagent-guard.service"],
            id="up-but-not-after-a-reboot",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, active="activating")),
            ["wait nodeagent-guard.service to start"],
            id="starting",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, active="failed", result="exit-code"), journal=WHY),
            FAILS,
            id="kernel-without-routing-rules",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, active="activating", result="exit-code"), journal=WHY),
            FAILS,
            id="between-two-failing-starts",
        ),
        pytest.param(
            replace(BASE, unit=replace(UP, active="failed")),
            ["block nodeagent-guard.service fails", "fix journalctl -u nodeagent-guard.service"],
            id="failed-without-a-word",
        ),
        pytest.param(replace(BASE, rules=(LOCAL, MAIN)), AGAIN, id="both-rules-removed"),
        pytest.param(replace(BASE, rules=(LOCAL, FOR_THE_HOST, MAIN)), AGAIN, id="open-again"),
        pytest.param(
            replace(BASE, rules=(LOCAL, FOR_CONTAINERS, MAIN)), AGAIN, id="host-shut-out-too"
        ),
        pytest.param(
            replace(BASE, rules=(LOCAL, FOR_THE_HOST, replace(FOR_CONTAINERS, priority=99), MAIN)),
            AGAIN,
            id="in-the-wrong-order",
        ),
        pytest.param(
            replace(
                BASE,
                rules=(
                    FOR_THE_HOST,
                    replace(FOR_CONTAINERS, takes=FOR_CONTAINERS.takes | {"src 10.0.0.1"}),
                ),
            ),
            AGAIN,
            id="narrowed-to-one-container",
        ),
    ],
)
def test_plan(seen: Seen, plan: list[str]) -> None:
    assert said(guard.diff(SPEC, seen)) == plan


def converge(machine: Machine) -> list[str]:
    """Do what is planned until nothing is; return all that was said."""
    lines: list[str] = []
    while True:
        plan = guard.diff(SPEC, guard.observe(SPEC, machine.host))
        lines += said(plan)
        if not plan.changes:
            return lines
        for change in plan.changes:
            change.apply(machine.host)


ENABLED, STARTED = (f"do {verb} nodeagent-guard.service" for verb in ("enable", "start"))


def test_a_fresh_machine_is_guarded_for_good() -> None:
    machine = World().machine(make_spec(), "10.10.0.11")
    assert converge(machine) == [ENABLED, STARTED, *DONE]
    machine.lose_power()
    assert machine.network.rules() == ()
    machine.boot()
    assert converge(machine) == DONE


@pytest.mark.parametrize("left", [(), (FOR_THE_HOST,), (FOR_CONTAINERS,)])
def test_what_somebody_removed_is_put_back(left: tuple[Rule, ...]) -> None:
    machine = World().machine(make_spec(), "10.10.0.11")
    converge(machine)
    machine.network.present = left
    assert converge(machine) == [*AGAIN, *DONE]
    assert set(WANTED) <= set(machine.network.rules())


def test_a_unit_that_fails_says_why() -> None:
    machine = World().machine(make_spec(), "10.10.0.11")
    machine.systemd.failing[paths.GUARD_UNIT] = WHY
    with pytest.raises(HostError, match=r"nodeagent-guard\.service"):
        converge(machine)
    assert converge(machine) == FAILS


class NoNetwork(FakeNetwork):
    def rules(self) -> tuple[Rule, ...]:
        raise AssertionError("nobody asked for the guard")


def test_without_security_nothing_is_even_looked_at() -> None:
    machine = World().machine(make_spec(), "10.10.0.11")
    host = replace(machine.host, network=NoNetwork(machine))
    spec = make_spec(security="off")
    assert said(guard.diff(spec, guard.observe(spec, host))) == [
        "done security is off: containers can reach the metadata service"
    ]
