"""Clusters in memory: whatever dies whenever, there is one Swarm and everybody is in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from nodeagent import paths
from nodeagent.changes import Change
from nodeagent.converge import Cycle, make, run_cycle
from nodeagent.host import Host
from nodeagent.steps import STEPS
from tests.unit.fakes import Machine, World, make_spec

ADDRESSES = ("10.10.0.11", "10.10.0.12", "10.10.0.13")
# How many rounds of everybody it may take: each round brings every node as far as it goes.
MOST_ROUNDS = 12


class Killed(BaseException):
    """kill -9: nothing in the program may catch it."""


def killer(after: int) -> Callable[[Change, Host], None]:
    """Make `after` changes, then die."""
    left = itertools.count(after, -1)

    def apply(change: Change, host: Host) -> None:
        if next(left) <= 0:
            raise Killed
        make(change, host)

    return apply


def cycle(machine: Machine, apply: Callable[[Change, Host], None] | None = None) -> Cycle:
    return run_cycle(machine.spec, machine.host, STEPS, lambda _: None, apply)


def cluster(workers: int = 1) -> World:
    world = World()
    for address in ADDRESSES:
        world.machine(make_spec("server"), address)
    for number in range(workers):
        world.machine(make_spec("worker"), f"10.10.0.{21 + number}")
    return world


def converge(world: World, *machines: Machine) -> None:
    """Run rounds until everybody is ready."""
    nodes = machines or tuple(world.machines.values())
    for _ in range(MOST_ROUNDS):
        cycles = [cycle(machine) for machine in nodes]
        if all(each.is_ready for each in cycles):
            return
    raise AssertionError([each.sentence for each in cycles])


def assert_one_swarm(world: World) -> None:
    """Everybody is in one and the same Swarm, in the right role, and no other has anybody."""
    peopled = [swarm for swarm in world.swarms.values() if swarm.managers | swarm.workers]
    assert len(peopled) == 1
    servers = {m.name for m in world.machines.values() if m.spec.is_server}
    assert peopled[0].managers == servers
    assert peopled[0].workers == set(world.machines) - servers
    for machine in world.machines.values():
        assert machine.engine.swarm_id == peopled[0].id


def test_a_fresh_cluster_becomes_one_swarm() -> None:
    world = cluster(workers=2)
    converge(world)
    assert_one_swarm(world)
    assert len(world.swarms) == 1


def test_a_second_apply_is_an_empty_plan() -> None:
    world = cluster()
    converge(world)
    before = {name: dict(machine.files.texts) for name, machine in world.machines.items()}
    for machine in world.machines.values():
        again = cycle(machine, killer(0))
        assert again.is_ready
        assert again.made_changes == 0
    assert before == {name: machine.files.texts for name, machine in world.machines.items()}


def changes_of(name: str) -> int:
    """How many changes a node makes until a fresh cluster is ready."""
    world = cluster()
    made = 0

    def count(change: Change, host: Host) -> None:
        nonlocal made
        make(change, host)
        made += host is world.machines[name].host

    for _ in range(MOST_ROUNDS):
        for machine in world.machines.values():
            cycle(machine, count)
    return made


@pytest.mark.parametrize("name", ["server11", "server12", "worker21"])
@pytest.mark.parametrize("death", ["agent", "power"])
def test_killed_after_every_change_the_next_run_goes_on(name: str, death: str) -> None:
    total = changes_of(name)
    assert total > 8, "the run has become so short that this test says nothing"
    for after in range(total + 1):
        world = cluster()
        victim = world.machines[name]
        apply = killer(after)
        died = False
        for _ in range(MOST_ROUNDS):
            for machine in world.machines.values():
                if machine is not victim:
                    cycle(machine)
                elif not died:
                    try:
                        cycle(victim, apply)
                    except Killed:
                        died = True
                        if death == "power":
                            victim.lose_power()
                            victim.boot()
                else:
                    cycle(victim)
        converge(world)
        assert_one_swarm(world)
        assert sum(machine.engine.joins for machine in world.machines.values()) == 3, after
        assert died == (after < total)


def test_initialiser_dead_for_good_is_superseded_at_every_change() -> None:
    total = changes_of("server11")
    for after in range(total + 1):
        world = cluster()
        victim, *others = world.machines.values()
        apply = killer(after)
        try:
            for _ in range(MOST_ROUNDS):
                cycle(victim, apply)
                for machine in others:
                    cycle(machine)
                    if machine.consul_is_up:
                        continue
        except Killed:
            pass
        # Quorum has to have been there once for the other two to go on without the dead one.
        formed = world.bootstrapped
        victim.lose_power()
        if not formed:
            continue
        converge(world, *others)
        alive = {machine.engine.swarm_id for machine in others}
        assert len(alive) == 1
        # And when it comes back after all, it is one of them.
        victim.boot()
        converge(world)
        assert_one_swarm(world)


def after_the_others(others: list[Machine], first: int) -> Callable[[Change, Host], None]:
    """From change number `first` on, let the others run whole cycles before each change."""
    number = itertools.count()

    def apply(change: Change, host: Host) -> None:
        if next(number) >= first:
            for machine in others:
                cycle(machine)
        make(change, host)

    return apply


def test_everybody_runs_between_any_two_changes_of_a_server() -> None:
    """The others run whole cycles after a server has looked and before it acts."""
    for first in range(changes_of("server11")):
        world = cluster(workers=1)
        slow, *others = world.machines.values()
        apply = after_the_others(others, first)
        for _ in range(MOST_ROUNDS):
            cycle(slow, apply)
            for machine in others:
                cycle(machine)
        converge(world)
        assert_one_swarm(world)


def test_a_session_that_ends_between_look_and_init_leaves_one_swarm() -> None:
    world = cluster()
    slow, *others = world.machines.values()

    def apply(change: Change, host: Host) -> None:
        if str(change).startswith("initialise"):
            world.end_sessions_of(slow.name)
            for machine in others:
                cycle(machine)
        make(change, host)

    for _ in range(MOST_ROUNDS):
        cycle(slow, apply)
        for machine in others:
            cycle(machine)
    converge(world)
    assert_one_swarm(world)


def test_all_nodes_lose_power_and_come_back() -> None:
    world = cluster()
    converge(world)
    swarm = next(iter(world.swarms))
    for machine in world.machines.values():
        machine.lose_power()
    for machine in world.machines.values():
        machine.boot()
    converge(world)
    assert_one_swarm(world)
    assert set(world.swarms) == {swarm}


def test_a_late_worker_joins_although_the_first_server_is_gone() -> None:
    world = cluster()
    converge(world)
    first = world.machines["server11"]
    first.lose_power()
    late = world.machine(make_spec("worker"), "10.10.0.29")
    converge(world, *(m for m in world.machines.values() if m is not first))
    assert late.engine.swarm_id == world.machines["server12"].engine.swarm_id


def test_the_engines_restart_count_is_one_on_a_stock_machine() -> None:
    world = cluster()
    converge(world)
    assert [machine.systemd.restarts for machine in world.machines.values()] == [1, 1, 1, 1]


def test_no_engine_restart_where_the_options_are_there_already() -> None:
    world = cluster()
    for machine in world.machines.values():
        machine.files.texts[paths.DAEMON_JSON] = (
            '{"dns": ["169.254.53.53"], "log-driver": "json-file",'
            ' "log-opts": {"max-size": "10m", "max-file": "10", "compress": "true"}}'
        )
    converge(world)
    assert [machine.systemd.restarts for machine in world.machines.values()] == [0, 0, 0, 0]
