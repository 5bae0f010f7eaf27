"""Engines take over new options one at a time, each while it can be spared."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from nodeagent import paths
from nodeagent.changes import Change
from nodeagent.converge import make, run_cycle
from nodeagent.host import Entry, Host
from nodeagent.steps import STEPS, restart
from nodeagent.steps.engine import Pending
from nodeagent.steps.restart import Seen
from tests.unit.expect import said
from tests.unit.fakes import Machine, World, make_spec
from tests.unit.test_cluster import Killed, cluster, converge, killer

SERVER, WORKER = make_spec("server"), make_spec("worker")
DUE = Pending("restart", 50.0)
THREE = {"server11": True, "server12": True, "server13": True}
NAMES = tuple(THREE)
FREE = Seen("server11", DUE, 10.0, None, THREE, NAMES, NAMES)
MINE = replace(FREE, lock=Entry("server11", 7, "session-1"))
NONE = ["done no restart of the Engine is due"]
TAKE = ["do take the lock for restarting the Engine"]
DO = ["do restart docker.service: /etc/docker/daemon.json changed"]


@pytest.mark.parametrize(
    ("seen", "plan"),
    [
        pytest.param(replace(FREE, pending=None), NONE, id="nothing-due"),
        pytest.param(replace(FREE, pending=Pending("reload", 50.0)), NONE, id="a-reload"),
        pytest.param(FREE, TAKE, id="free"),
        pytest.param(
            replace(FREE, lock=Entry("server12", 7, "")), TAKE, id="its-holder-let-go-or-died"
        ),
        pytest.param(
            replace(FREE, lock=Entry("server12", 7, "session-2")),
            ["wait server12 to restart its Engine"],
            id="another-holds-it",
        ),
        pytest.param(MINE, DO, id="mine"),
        pytest.param(
            replace(MINE, began_s=51.0),
            ["wait the Engine to be a healthy member again"],
            id="restarted-and-not-yet-proved",
        ),
        pytest.param(
            replace(MINE, pending=None),
            ["do release nodeagent/demo/engine-restart"],
            id="proved",
        ),
        pytest.param(
            replace(FREE, managers={**THREE, "server13": False}),
            ["wait Swarm manager server13 before the Engine is restarted"],
            id="a-manager-is-away",
        ),
        pytest.param(
            replace(FREE, managers={"server11": True, "server12": True}),
            ["wait Swarm manager no. 3 before the Engine is restarted"],
            id="a-manager-has-not-joined-yet",
        ),
        pytest.param(
            replace(FREE, alive=NAMES[:2]),
            ["wait Consul server server13 before the Engine is restarted"],
            id="a-consul-server-is-away",
        ),
        pytest.param(
            replace(MINE, alive=NAMES[:2]),
            ["wait Consul server server13 before the Engine is restarted"],
            id="away-only-after-the-lock-was-taken",
        ),
        pytest.param(
            replace(FREE, managers=dict.fromkeys("abcde", True), voters=tuple("abcde"),
                    alive=tuple("abcd")),
            TAKE,
            id="one-of-five-away",
        ),
        pytest.param(replace(FREE, pending=None, reboot=True), TAKE, id="a-reboot"),
        pytest.param(
            replace(MINE, pending=None, reboot=True),
            ["do reboot this machine: for its new command line"],
            id="a-reboot-when-it-is-mine",
        ),
        pytest.param(
            replace(MINE, pending=None, reboot=True, is_going_down=True),
            ["wait the reboot"],
            id="a-reboot-that-was-asked-for",
        ),
        pytest.param(
            replace(FREE, managers={}, voters=(), alive=()), TAKE, id="a-worker-asks-nobody",
        ),
    ],
)  # fmt: skip
def test_plan(seen: Seen, plan: list[str]) -> None:
    assert said(restart.diff(SERVER, seen)) == plan


def test_two_servers_can_spare_none_and_do_not_wait_for_ever() -> None:
    spec = make_spec("server", servers=2, join="[10.10.0.11, 10.10.0.12]")
    seen = replace(FREE, managers={"a": True, "b": True}, voters=("a", "b"), alive=("a", "b"))
    assert said(restart.diff(spec, seen)) == TAKE


def changed(world: World) -> list[Machine]:
    """All nodes, whose spec now asks for another log size."""
    for machine in world.machines.values():
        role = "server" if machine.spec.is_server else "worker"
        machine.spec = make_spec(role, engine="{log: {max_size: 20m}}")
    return list(world.machines.values())


def test_an_option_changed_everywhere_restarts_one_engine_at_a_time() -> None:
    world = cluster(workers=2)
    converge(world)
    before = {name: machine.systemd.restarts for name, machine in world.machines.items()}
    order: list[str] = []

    def watch(machine: Machine) -> None:
        def apply(change: Change, host: Host) -> None:
            made = machine.systemd.restarts
            make(change, host)
            if machine.systemd.restarts > made:
                order.append(machine.name)
                holders = {e.value for k, e in world.kv.items() if k.endswith("engine-restart")}
                assert holders == {machine.name}

        run_cycle(machine.spec, machine.host, STEPS, lambda _: None, apply)

    nodes = changed(world)
    for _ in range(30):
        for machine in nodes:
            watch(machine)
            waiting = [each for each in nodes if each.files.exists(paths.RESTART_PENDING)]
            new = [each for each in nodes if each.systemd.restarts > before[each.name]]
            half_way = [each for each in waiting if each in new]
            assert len(half_way) <= 1, "the next goes only when the last is proved"
    assert sorted(order) == sorted(world.machines), "each exactly once"
    converge(world)


@pytest.mark.parametrize("after", range(1, 9))
def test_a_holder_killed_in_the_middle_holds_up_nobody_for_good(after: int) -> None:
    world = cluster(workers=1)
    converge(world)
    nodes = changed(world)
    victim, *others = nodes
    with contextlib.suppress(Killed):
        for _ in range(4):
            run_cycle(victim.spec, victim.host, STEPS, lambda _: None, killer(after))
    world.end_sessions_of(victim.name)  # what Consul does for an agent that stays away
    for _ in range(12):
        for machine in others:
            run_cycle(machine.spec, machine.host, STEPS, lambda _: None)
    done = [each.name for each in others if "20m" in (each.engine.runs_with or "")]
    if victim.engine_is_up:
        assert done == [each.name for each in others]
    converge(world)
    assert all("20m" in (each.engine.runs_with or "") for each in nodes)
