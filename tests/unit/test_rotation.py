"""Keys are rotated on a cluster in memory, killed at every instant, and asked for again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nodeagent import paths, secrets
from nodeagent.converge import run_cycle
from nodeagent.errors import HostError, UsageError
from nodeagent.host import Op
from nodeagent.rotation import Rotation
from nodeagent.secrets import PURPOSES, Purpose, ServerSecrets, WorkerSecrets
from nodeagent.steps import STEPS, access, quorum
from tests.unit.fakes import PKI, Machine, World, make_spec

ADDRESSES = ("10.10.0.11", "10.10.0.12", "10.10.0.13")
MOST_ROUNDS = 40


def cluster() -> World:
    world = World()
    for address in ADDRESSES:
        world.machine(make_spec(), address)
    world.machine(make_spec("worker"), "10.10.0.21")
    settle(world)
    return world


def cycles(world: World) -> None:
    for machine in world.machines.values():
        if not machine.is_off:
            run_cycle(machine.spec, machine.host, STEPS, lambda _: None)


def settle(world: World) -> None:
    for _ in range(MOST_ROUNDS):
        found = [
            run_cycle(machine.spec, machine.host, STEPS, lambda _: None)
            for machine in world.machines.values()
        ]
        if all(each.is_ready for each in found):
            return
    raise AssertionError([each.sentence for each in found])


def rotation(world: World, *, without: tuple[str, ...] = ()) -> tuple[Rotation, list[str]]:
    """The command on the first server, while all agents run whenever it waits."""
    machine = world.machines["server11"]
    said: list[str] = []
    waits = iter(range(MOST_ROUNDS))

    def on_wait() -> None:
        assert next(waits, None) is not None, said
        cycles(world)

    machine.clock.on_wait = on_wait
    return Rotation(machine.spec, machine.host, said.append, without), said


def kept(machine: Machine) -> secrets.Secrets:
    text = machine.files.texts[paths.SECRETS]
    return secrets.parse(text, "kept", machine.spec.role, PKI)


def assert_all_use(world: World, purpose: Purpose, old: ServerSecrets) -> None:
    """Every node has one and the same new key of this purpose, and the old one is worth nothing."""
    first = kept(world.machines["server11"])
    assert isinstance(first, ServerSecrets)
    assert len(first.seeds(purpose)) == 1
    assert first.seeds(purpose) != old.seeds(purpose)
    assert not first.rotating
    for machine in world.machines.values():
        found = kept(machine)
        assert found.serial == first.serial
        assert found.authorities == first.authorities
        if isinstance(found, WorkerSecrets):
            assert secrets.keys(found, PKI).gossip == secrets.keys(first, PKI).gossip
            assert found.generation == secrets.keys(first, PKI).generation
        else:
            assert found == first
        pem = machine.files.texts[paths.CONSUL_CERTIFICATE]
        assert PKI.is_signed(pem, first.authorities[0])
    assert world.gossip_keys == [key.reveal() for key in secrets.keys(first, PKI).gossip]
    generation = secrets.keys(first, PKI).generation
    ours = [t.description.split() for t in world.tokens.values() if "nodeagent" in t.description]
    assert {words[1] for words in ours} == {generation}
    assert ["node", "worker21"] in [words[2:4] for words in ours]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_key_is_rotated_without_a_restart(purpose: Purpose) -> None:
    world = cluster()
    old = kept(world.machines["server11"])
    assert isinstance(old, ServerSecrets)
    runs = {name: machine.system_engine.runs for name, machine in world.machines.items()}
    command, said = rotation(world)
    command.rotate(purpose)
    settle(world)
    assert_all_use(world, purpose, old)
    assert runs == {name: machine.system_engine.runs for name, machine in world.machines.items()}
    assert [line for line in said if line.startswith("done")] == [
        f"done: every node to know the new {purpose} key",
        f"done: every node to use the new {purpose} key",
        f"done: every node to forget the old {purpose} key",
    ]


def test_one_after_another_and_again() -> None:
    world = cluster()
    for purpose in (*PURPOSES, "tokens", "ca"):
        old = kept(world.machines["server11"])
        assert isinstance(old, ServerSecrets)
        rotation(world)[0].rotate(purpose)
        settle(world)
    assert kept(world.machines["server11"]).serial == 15


class Killed(BaseException):
    """Not an Exception: nothing in the program may catch it."""


def killed_after(world: World, calls: int) -> Callable[..., bool]:
    """Have the command's own writes to Consul end after so many; agents write as they like."""
    consul = world.machines["server11"].consul
    whole = {"transact": consul.transact, "change_keyring": consul.change_keyring}
    left = [calls]

    def dying(name: str) -> Callable[..., bool]:
        def call(*arguments: object) -> bool:
            is_command = name == "change_keyring" or (
                isinstance(arguments[0], Op) and arguments[0].key.endswith("secrets/state")
            )
            if is_command:
                if not left[0]:
                    raise Killed
                left[0] -= 1
            return bool(whole[name](*arguments))  # type: ignore[operator] # two of a kind

        return call

    for name in whole:
        setattr(consul, name, dying(name))

    def restore() -> bool:
        for name, function in whole.items():
            setattr(consul, name, function)
        return left[0] == 0

    return restore


@pytest.mark.parametrize("purpose", PURPOSES)
def test_killed_after_each_of_its_writes_and_run_again(purpose: Purpose) -> None:
    most = 6 if purpose == "gossip" else 3
    for calls in range(most):
        world = cluster()
        old = kept(world.machines["server11"])
        assert isinstance(old, ServerSecrets)
        restore = killed_after(world, calls)
        with pytest.raises(Killed):
            rotation(world)[0].rotate(purpose)
        assert restore()
        settle(world)  # with two keys, in the middle, everything works
        rotation(world)[0].rotate(purpose)
        settle(world)
        assert_all_use(world, purpose, old)


def test_another_rotation_waits_until_the_first_is_finished() -> None:
    world = cluster()
    restore = killed_after(world, 1)
    with pytest.raises(Killed):
        rotation(world)[0].rotate("ca")
    restore()
    with pytest.raises(UsageError, match="the rotation of ca is not finished"):
        rotation(world)[0].rotate("tokens")


def test_a_node_that_is_away_is_waited_for_and_named() -> None:
    world = cluster()
    world.machines["worker21"].lose_power()
    command, said = rotation(world)
    with pytest.raises(AssertionError):
        command.rotate("ca")
    assert said[-1] == "waiting for every node to know the new ca key: worker21 (which is away)"
    rotation(world, without=("worker21",))[0].rotate("ca")


def test_a_node_that_goes_away_after_its_word_is_waited_for_before_the_next_step() -> None:
    """Or a gossip key would be installed without it, and used."""
    world = cluster()
    worker, applied = world.machines["worker21"], "nodeagent/demo/nodes/worker21/secrets"
    command, said = rotation(world)
    consul = world.machines["server11"].consul
    clock = world.machines["server11"].clock
    whole = clock.on_wait

    def on_wait() -> None:
        whole()
        if applied in world.kv and not worker.is_off:
            worker.lose_power()

    clock.on_wait = on_wait
    with pytest.raises(AssertionError):
        command.rotate("gossip")
    assert said[-1] == "waiting for every node to know the new gossip key: worker21 (which is away)"
    assert len(consul.world.gossip_keys) == 1, "nothing is installed yet"
    worker.boot()
    clock.on_wait = whole
    old = secrets.keys(kept(world.machines["server11"]), PKI).gossip[0].reveal()
    rotation(world)[0].rotate("gossip")
    assert old not in world.gossip_keys


def test_a_worker_made_from_old_user_data_is_told_why_it_is_not_admitted() -> None:
    world = cluster()
    rotation(world)[0].rotate("tokens")
    late = world.machine(make_spec("worker"), "10.10.0.29")
    for _ in range(10):
        cycle = run_cycle(late.spec, late.host, STEPS, lambda _: None)
    assert cycle.is_blocked
    assert "the tokens were rotated since this node's user-data was made" in cycle.sentence


def test_servers_whose_consul_was_wiped_after_a_rotation_do_not_lock_themselves_out() -> None:
    """Consul then makes the token that is in use itself, as on the first day."""
    world = cluster()
    rotation(world)[0].rotate("tokens")
    settle(world)
    world.kv.clear()
    world.policies.clear()
    world.tokens = {access.ANONYMOUS: World().tokens[access.ANONYMOUS]}
    servers = [machine for machine in world.machines.values() if machine.spec.is_server]
    for machine in servers:
        machine.consul.load()  # it is started again
    for _ in range(5):
        cycles(world)
    assert [machine.consul.knows_token() for machine in servers] == [True, True, True]


def test_secrets_that_go_away_in_the_middle_of_a_round_are_missed_and_not_died_of() -> None:
    world = cluster()
    machine = world.machines["server11"]
    for path in (paths.SECRETS, paths.NODE_TOKEN):
        text = machine.files.texts.pop(path)
        for step in (quorum.STEP, access.STEP):
            with pytest.raises(HostError, match=path.name):
                step.observe(machine.spec, machine.host)
        machine.files.write(path, text, 0o600)


def test_join_tokens_are_rotated_and_published() -> None:
    world = cluster()
    before = dict(world.kv)
    command, said = rotation(world)
    command.rotate_swarm()
    settle(world)
    changed = {key for key in world.kv if world.kv[key] != before.get(key)}
    keys = {"nodeagent/demo/swarm/manager-token", "nodeagent/demo/worker/swarm"}
    assert changed == keys
    assert said[-1] == "they are published to the cluster"
    late = world.machine(make_spec("worker"), "10.10.0.29")
    settle(world)
    assert late.engine.swarm_id


def test_a_node_that_was_forgotten_is_admitted_anew() -> None:
    world = cluster()
    world.machines.pop("worker21")
    again = world.machine(make_spec("worker"), "10.10.0.21")
    for _ in range(5):
        cycles(world)
    cycle = run_cycle(again.spec, again.host, STEPS, lambda _: None)
    assert "a machine named worker21 has a token already" in cycle.sentence
    command, said = rotation(world)
    command.forget("worker21")
    assert said == ["worker21 has no token any more"]
    settle(world)
    with pytest.raises(UsageError, match="no machine named nobody"):
        command.forget("nobody")


def test_secrets_that_no_server_knows_are_not_written_over_others() -> None:
    """Two who rotate at the same instant: one wins, the other is told."""
    world = cluster()
    command, _ = rotation(world)
    host = world.machines["server12"].host
    found = kept(world.machines["server12"])
    place = access.Keys(make_spec().key_prefix).state
    consul = world.machines["server11"].consul
    whole = consul.transact

    def late(*ops: Op) -> bool:
        consul.transact = whole  # type: ignore[method-assign] # back to what it was
        host.consul.transact(Op("cas", place, secrets.dump(found).reveal()))
        return whole(*ops)

    consul.transact = late  # type: ignore[method-assign] # the other one is faster
    with pytest.raises(HostError, match="somebody else rotates keys"):
        command.rotate("ca")
