"""What the program relies on in Consul, asked of the fake and of a real Consul 1.8.7."""
# ruff: noqa: ARG001 - a fixture may be needed for what it does alone

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nodeagent import paths, secrets
from nodeagent.adapters.consul import TIMEOUT_S, LocalConsul
from nodeagent.adapters.resolver import DnsResolver
from nodeagent.errors import HostError, Secret
from nodeagent.host import ConsulAgent, ContainerState, Op, Policy, Resolver, Service, Token
from nodeagent.secrets import node_token
from nodeagent.steps import access
from nodeagent.steps.secrets import server_names
from tests.contract.surroundings import (
    ConsulNode,
    give_token,
    needs_root,
    own_network,
    write_keys,
)
from tests.lab import images
from tests.lab.host import Waiting, wait_until
from tests.unit.fakes import (
    NOW,
    PKI,
    FakeConsul,
    FakeFiles,
    Machine,
    World,
    make_spec,
    server_secrets,
    worker_secrets,
)

REAL = pytest.param("real", marks=[pytest.mark.lab, needs_root])
SETTLE_S = 15  # for what Consul does soon, but not before it answers


SPEC = make_spec("server", servers=1)
OTHER = "worker3"  # the other node's name
# A worker's own token, but with every right: what one with few may do is asked of another one.
OWN = Secret(str(uuid.uuid4()))
SHOWN = node_token(OWN, OTHER)  # what comes of it under this name
EVERYBODY, ENROLMENT = access.policies(SPEC)


@dataclass
class Rig:
    """A secured cluster of two: a server that leads, and another node."""

    agent: ConsulAgent
    other: ConsulAgent
    address: str
    other_address: str
    resolver: Resolver
    # The other node's agent, as asked by a program with other files than that node's.
    other_with: Callable[[dict[Path, str]], ConsulAgent]
    # Changes the server's files, and returns what was in them.
    write: Callable[[dict[Path, str]], dict[Path, str]]

    def showing(self, token: Secret) -> ConsulAgent:
        """The other node's agent, shown this token."""
        shown = {"recovery": "", "token": token.reveal(), "agent": ""}
        return self.other_with({paths.CONSUL_TOKENS: json.dumps(shown)})


def prepare(agent: ConsulAgent) -> None:
    """Make what the servers' program makes first: what everybody may see, and the tokens."""
    for policy in access.policies(SPEC):
        agent.put_policy(policy)
    for token in access.shared_tokens(SPEC, server_secrets(), PKI):
        agent.put_token(token)
    agent.put_token(Token(str(uuid.uuid4()), (access.MANAGEMENT,), "the other node", SHOWN))
    agent.put_token(Token(access.ANONYMOUS, (EVERYBODY.name,), "Anonymous Token"))


def fake_rig() -> Rig:
    world = World()
    one = fake_node(world, "server", "127.0.0.2")
    prepare(one.consul)
    two = fake_node(world, "worker", "127.0.0.3")

    def other_with(files: dict[Path, str]) -> ConsulAgent:
        elsewhere = copy.copy(two)
        elsewhere.files = FakeFiles(two.files.texts | files)
        agent = FakeConsul(elsewhere)
        agent.loaded, agent.registered = two.consul.loaded, two.consul.registered
        return agent

    def write(files: dict[Path, str]) -> dict[Path, str]:
        old = {path: one.files.texts[path] for path in files}
        one.files.texts.update(files)
        return old

    return Rig(one.consul, two.consul, one.address, two.address, one.resolver, other_with, write)


def fake_node(world: World, role: str, address: str, servers: int = 1) -> Machine:
    """One whose Consul runs."""
    machine = world.machine(make_spec(role, servers=servers), address)
    if role == "worker":
        give_token(machine, OWN)
    write_keys(machine)
    machine.system_engine.containers["consul"] = ContainerState("", "running")
    machine.consul.load()
    return machine


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    with own_network():
        yield


@pytest.fixture(scope="module")
def real_rig(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    top, binary = tmp_path_factory.mktemp("consul"), images.consul_binary()
    one = ConsulNode(binary, top / "one", 2, expect=1, dns=8600)
    two = ConsulNode(binary, top / "two", 3, expect=0, dns=-1, own=OWN)

    def other_with(files: dict[Path, str]) -> ConsulAgent:
        here = ConsulNode(binary, tmp_path_factory.mktemp("program"), 3, expect=0, dns=-1, own=OWN)
        for path, text in files.items():
            here.write(path, text)
        return here.agent

    def write(files: dict[Path, str]) -> dict[Path, str]:
        return {path: one.write(path, text) for path, text in files.items()}

    with one.running(leader=True):
        # Before the other node asks, which would remember for 30 s that it has no such token.
        wait_until(lambda: known(one.agent), SETTLE_S, "the server's token")
        prepare(one.agent)
        with two.running(leader=False):
            two.agent.join(one.address)
            wait_until(lambda: two.agent.leader(), SETTLE_S, "the other node to know the leader")
            parts = one.agent, two.agent, one.address, two.address, DnsResolver()
            yield Rig(*parts, other_with, write)


def known(agent: ConsulAgent) -> bool | Waiting:
    return agent.knows_token() or Waiting("not known")  # None while the ACL system starts


@pytest.fixture(scope="module", params=["fake", REAL])
def rig(request: pytest.FixtureRequest) -> Rig:
    found = fake_rig() if request.param == "fake" else request.getfixturevalue("real_rig")
    assert isinstance(found, Rig)
    return found


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A part of the KV store that no other test uses."""
    return f"{request.node.name}/"


@pytest.fixture
def session(rig: Rig) -> Iterator[str]:
    made = rig.agent.create_session("contract", 30)
    yield made
    rig.agent.destroy_session(made)


# -- the agent and its cluster


def test_it_describes_itself(rig: Rig) -> None:
    for agent, address, is_server in (
        (rig.agent, rig.address, True),
        (rig.other, rig.other_address, False),
    ):
        found = agent.self()
        assert found is not None
        assert (found.address, found.server) == (address, is_server)
        assert found.node_name
        assert found.datacenter
        assert int(found.version.split(".")[0]) >= 1


def test_everybody_names_the_same_leader(rig: Rig) -> None:
    assert rig.agent.leader() == rig.other.leader() == f"{rig.address}:8300"


def test_members_are_told_apart(rig: Rig) -> None:
    for agent in (rig.agent, rig.other):
        found = {member.address: member for member in agent.members()}
        assert set(found) == {rig.address, rig.other_address}
        assert all(member.alive for member in found.values())
        assert found[rig.address].server
        assert not found[rig.other_address].server


def test_to_join_a_member_again_is_harmless(rig: Rig) -> None:
    rig.other.join(rig.address)
    assert len(rig.other.members()) == 2


def test_to_join_nobody_is_an_error(rig: Rig) -> None:
    with pytest.raises(HostError, match=r"127\.0\.0\.99"):
        rig.agent.join("127.0.0.99")


def test_srv_names_every_server(rig: Rig) -> None:
    assert len(rig.resolver.consul_servers("consul")) == 1


# -- the KV store


def test_what_is_not_there_is_no_error(rig: Rig, prefix: str) -> None:
    assert rig.agent.get(prefix) == {}


@pytest.mark.parametrize("text", ["", "plain", "Zürich → 東京 \0 \n", "x" * 100_000])
def test_text_comes_back_as_it_was(rig: Rig, prefix: str, text: str) -> None:
    key = f"{prefix.partition('[')[0]}{len(text)}/"
    assert rig.agent.transact(Op("set", f"{key}a", text))
    entry = rig.other.get(key)[f"{key}a"]
    assert (entry.value, entry.session) == (text, "")
    assert entry.index > 0


def test_get_returns_the_keys_below_its_prefix_alone(rig: Rig, prefix: str) -> None:
    assert rig.agent.transact(
        *(Op("set", f"{prefix}{key}", key) for key in ("a", "a/b", "ab", "b"))
    )
    assert set(rig.agent.get(f"{prefix}a")) == {f"{prefix}{key}" for key in ("a", "a/b", "ab")}


def test_an_index_moves_with_the_value_only(rig: Rig, prefix: str) -> None:
    key = f"{prefix}a"
    indexes = []
    for value in ("one", "one", "two"):
        assert rig.agent.transact(Op("set", key, value))
        indexes.append(rig.agent.get(prefix)[key].index)
    assert indexes[0] == indexes[1] < indexes[2]


def test_check_not_exists(rig: Rig, prefix: str) -> None:
    create = (Op("check-not-exists", f"{prefix}a"), Op("set", f"{prefix}a", "first"))
    assert rig.agent.transact(*create)
    assert not rig.other.transact(create[0], Op("set", f"{prefix}a", "second"))
    assert rig.agent.get(prefix)[f"{prefix}a"].value == "first"


def test_cas_needs_the_very_index(rig: Rig, prefix: str) -> None:
    key = f"{prefix}a"
    assert not rig.agent.transact(Op("cas", key, "none", index=1))
    assert rig.agent.transact(Op("cas", key, "new", index=0)), "0 stands for: not there"
    assert not rig.agent.transact(Op("cas", key, "again", index=0))
    index = rig.agent.get(prefix)[key].index
    assert not rig.agent.transact(Op("cas", key, "stale", index=index - 1))
    assert rig.agent.transact(Op("cas", key, "next", index=index))
    assert not rig.agent.transact(Op("cas", key, "late", index=index))
    assert rig.agent.get(prefix)[key].value == "next"


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_transaction_is_all_or_nothing(rig: Rig, prefix: str, position: int) -> None:
    prefix = f"all-or-nothing-{position}/"
    assert rig.agent.transact(Op("set", f"{prefix}a", "old"))
    index = rig.agent.get(prefix)[f"{prefix}a"].index
    writes = [Op("set", f"{prefix}b", "b"), Op("set", f"{prefix}c", "c")]
    stale = Op("cas", f"{prefix}a", "new", index=index + 1_000_000)
    assert not rig.agent.transact(*writes[:position], stale, *writes[position:])
    assert {key: entry.value for key, entry in rig.agent.get(prefix).items()} == {
        f"{prefix}a": "old"
    }
    right = Op("cas", f"{prefix}a", "new", index=index)
    assert rig.agent.transact(*writes[:position], right, *writes[position:])
    assert {entry.value for entry in rig.agent.get(prefix).values()} == {"new", "b", "c"}


# -- sessions and locks


def test_a_lock_has_one_holder(rig: Rig, prefix: str, session: str) -> None:
    key, rival = f"{prefix}a", rig.other.create_session("rival", 30)
    assert rig.agent.transact(Op("lock", key, "mine", session=session))
    assert not rig.other.transact(Op("lock", key, "theirs", session=rival))
    entry = rig.other.get(prefix)[key]
    assert (entry.value, entry.session) == ("mine", session)
    assert rig.agent.transact(Op("lock", key, "mine still", session=session))
    assert rig.agent.get(prefix)[key].value == "mine still"
    rig.other.destroy_session(rival)


def test_a_lock_can_require_that_the_key_is_new(rig: Rig, prefix: str, session: str) -> None:
    take = (Op("check-not-exists", f"{prefix}a"), Op("lock", f"{prefix}a", "x", session=session))
    assert rig.agent.transact(*take)
    assert not rig.agent.transact(*take)


def test_a_lock_can_require_that_the_key_is_as_it_was_seen(
    rig: Rig, prefix: str, session: str
) -> None:
    key = f"{prefix}a"
    assert rig.agent.transact(Op("set", key, "seen"))
    index = rig.agent.get(prefix)[key].index
    lock = Op("lock", key, "taken", session=session)
    assert not rig.agent.transact(Op("check-index", key, index=index + 1_000_000), lock)
    assert rig.agent.get(prefix)[key].session == ""
    assert rig.agent.transact(Op("check-index", key, index=index), lock)
    assert rig.agent.get(prefix)[key].session == session


def test_a_write_keeps_the_lock(rig: Rig, prefix: str, session: str) -> None:
    key = f"{prefix}a"
    assert rig.agent.transact(Op("lock", key, "1", session=session))
    assert rig.agent.transact(Op("set", key, "2"))
    index = rig.agent.get(prefix)[key].index
    assert rig.agent.transact(Op("cas", key, "3", index=index))
    entry = rig.agent.get(prefix)[key]
    assert (entry.value, entry.session) == ("3", session)


def test_the_end_of_a_session_frees_its_locks_at_once(rig: Rig, prefix: str) -> None:
    keys = {f"{prefix}a", f"{prefix}b"}
    first, second = (rig.agent.create_session(name, 30) for name in ("first", "second"))
    assert rig.agent.transact(*(Op("lock", key, "kept", session=first) for key in keys))
    before = rig.agent.get(prefix)
    rig.agent.destroy_session(first)
    after = rig.agent.get(prefix)
    assert set(after) == keys
    for key in keys:
        assert (after[key].value, after[key].session) == ("kept", "")
        assert after[key].index > before[key].index
    # Without the 15 s for which Consul keeps a lock from others unless told not to.
    assert rig.agent.transact(*(Op("lock", key, "new", session=second) for key in keys))
    rig.agent.destroy_session(second)


def test_a_session_lives_until_it_is_destroyed(rig: Rig, prefix: str) -> None:
    session = rig.agent.create_session("short", 30)
    assert rig.agent.renew_session(session)
    assert rig.other.renew_session(session)
    rig.agent.destroy_session(session)
    assert not rig.agent.renew_session(session)
    assert not rig.agent.transact(Op("lock", f"{prefix}a", "x", session=session))
    assert rig.agent.get(prefix) == {}
    rig.agent.destroy_session(session)  # again: no error


# -- services

SERVICES = [
    Service("swarm-manager", 2377, (), {"swarm": "abc"}, tcp="127.0.0.1:2377"),
    Service("nodeagent", 0, ("server", "two"), {"cluster": "demo", "note": "Zürich"}, ttl_s=90),
    Service("docker-engine", 0, (), {}, ttl_s=90),
]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_a_service_comes_back_equal(rig: Rig, service: Service) -> None:
    rig.agent.register(service)
    assert rig.agent.services() == {service.id: service}
    assert rig.other.services() == {}, "another node's are not ours"
    moved = Service(service.name, 1234, ("moved",), {"a": "b"}, ttl_s=30)
    rig.agent.register(moved)
    assert rig.agent.services() == {service.id: moved}
    rig.agent.deregister(service.id)
    assert rig.agent.services() == {}


def test_to_deregister_what_is_not_there_is_harmless(rig: Rig) -> None:
    rig.agent.deregister("nodeagent:nothing")


def test_an_instance_is_as_healthy_as_it_is_vouched_for(rig: Rig) -> None:
    service = Service("vouched", 1, (), {}, ttl_s=90)
    rig.agent.register(service)
    rig.other.register(service)
    ours, theirs = f"{rig.address}:1", f"{rig.other_address}:1"

    def until(**wanted: bool) -> None:
        expected = {ours: wanted["us"], theirs: wanted["them"]}
        wait_until(
            lambda: all(each.instances("vouched") == expected for each in (rig.agent, rig.other)),
            SETTLE_S,
            f"the catalogue to say {expected}",
        )

    until(us=True, them=True)
    rig.agent.vouch(service.id, False, "Zürich: failing at engine")
    until(us=False, them=True)
    rig.agent.vouch(service.id, True, "ready")
    until(us=True, them=True)
    rig.agent.vouch(service.id, False, "once more")
    rig.agent.register(Service("vouched", 1, ("changed",), {}, ttl_s=90))
    until(us=False, them=True)
    for agent in (rig.agent, rig.other):
        agent.deregister(service.id)
    wait_until(lambda: rig.agent.instances("vouched") == {}, SETTLE_S, "an empty catalogue")


def test_vouching_needs_a_check_to_vouch_for(rig: Rig) -> None:
    with pytest.raises(HostError, match="nodeagent:nothing"):
        rig.agent.vouch("nodeagent:nothing", True, "")
    service = Service("connects", 1, (), {}, tcp=f"{rig.address}:8300")
    rig.agent.register(service)
    with pytest.raises(HostError, match="nodeagent:connects"):
        rig.agent.vouch(service.id, True, "")
    rig.agent.deregister(service.id)


# -- who may do what


@pytest.fixture
def policy(rig: Rig, request: pytest.FixtureRequest) -> Policy:
    """What a worker named as the other node may do."""
    found = replace(access.node_policy(SPEC, OTHER), name=f"test-{uuid.uuid4()}")
    rig.agent.put_policy(found)
    return found


@pytest.fixture
def restricted(rig: Rig, policy: Policy) -> ConsulAgent:
    """The other node's agent, shown the token that a worker named as that node has."""
    secret = Secret(str(uuid.uuid4()))
    rig.agent.put_token(Token(str(uuid.uuid4()), (policy.name,), "restricted", secret))
    return rig.showing(secret)


KEYS = access.Keys(SPEC.key_prefix)


def denied(call: Callable[[], object]) -> bool:
    with pytest.raises(HostError) as caught:
        call()
    return bool(re.search("denied|ACL not found", caught.value.cause))


def test_the_token_that_is_shown_is_known(rig: Rig) -> None:
    assert rig.agent.knows_token()
    assert rig.other.knows_token()


def test_a_token_that_nobody_made_is_not_known_and_allows_nothing(rig: Rig) -> None:
    stranger = rig.showing(Secret(str(uuid.uuid4())))
    assert not stranger.knows_token()
    assert denied(lambda: stranger.get(SPEC.key_prefix))
    assert denied(lambda: stranger.transact(Op("set", "x", "1")))
    assert denied(stranger.tokens)


def test_a_program_that_shows_nothing_is_nobody(rig: Rig, prefix: str) -> None:
    nobody = rig.showing(Secret(""))
    assert rig.agent.transact(Op("set", f"{prefix}a", "1"))
    assert not nobody.knows_token()
    assert denied(nobody.self)
    assert denied(lambda: nobody.transact(Op("set", f"{prefix}a", "2")))
    assert denied(nobody.reload)


def test_a_policy_is_known_by_its_digest_and_replaced(rig: Rig) -> None:
    first = Policy("test-digest", (("key_prefix", "a/", "read"),))
    assert first.name not in rig.agent.policies()
    for policy in (first, first, replace(first, rules=(("key_prefix", "a/", "write"),))):
        rig.agent.put_policy(policy)
        assert rig.other.policies()[policy.name] == policy.digest
    assert len(set(rig.agent.policies().values())) > 1


def test_a_policy_has_a_name_of_letters_digits_and_dashes(rig: Rig) -> None:
    for name in ("a b", "a.b", "Zürich", "a" * 129, ""):
        with pytest.raises(HostError):
            rig.agent.put_policy(Policy(name, ()))


def test_a_token_is_made_once_and_then_has_its_policies_changed(rig: Rig, policy: Policy) -> None:
    secret, accessor = Secret(str(uuid.uuid4())), str(uuid.uuid4())
    token = Token(accessor, (policy.name,), "nodeagent abc node worker3 123", secret)
    for _ in range(2):
        rig.agent.put_token(token)
        assert rig.other.tokens()[accessor] == replace(token, secret=None)
    agent = rig.showing(secret)
    assert agent.knows_token()
    assert denied(agent.tokens)
    more = replace(token, policies=tuple(sorted((policy.name, access.MANAGEMENT))))
    rig.agent.put_token(replace(more, secret=None))
    assert rig.agent.tokens()[accessor] == replace(more, secret=None)
    assert accessor in agent.tokens()


def test_a_token_of_a_policy_that_is_not_there_is_an_error(rig: Rig) -> None:
    accessor = str(uuid.uuid4())
    with pytest.raises(HostError, match="test"):
        rig.agent.put_token(Token(accessor, ("none",), "test", Secret(str(uuid.uuid4()))))
    assert accessor not in rig.agent.tokens()


@pytest.mark.parametrize("secret", ["not a uuid", "x" * 5000, SHOWN.reveal()])
def test_not_every_text_can_be_a_token(rig: Rig, secret: str) -> None:
    accessor, text = str(uuid.uuid4()), Secret(secret)
    with pytest.raises(HostError, match="test"):
        rig.agent.put_token(Token(accessor, (), "test", text))
    assert accessor not in rig.agent.tokens()


def test_a_deleted_token_is_known_no_more_and_is_not_missed(rig: Rig, policy: Policy) -> None:
    accessor, secret = str(uuid.uuid4()), Secret(str(uuid.uuid4()))
    rig.agent.put_token(Token(accessor, (policy.name,), "test", secret))
    agent = rig.showing(secret)
    rig.agent.delete_token(accessor)
    assert accessor not in rig.agent.tokens()
    assert not agent.knows_token(), "it was never asked about before"
    rig.agent.delete_token(accessor)


def test_the_token_of_whoever_shows_none_can_be_given_policies(rig: Rig) -> None:
    before = rig.agent.tokens()[access.ANONYMOUS]
    assert before == Token(access.ANONYMOUS, (EVERYBODY.name,), "Anonymous Token")
    rig.agent.put_token(replace(before, policies=()))
    assert rig.resolver.consul_servers("consul") == ()
    rig.agent.put_token(before)
    assert rig.agent.tokens()[access.ANONYMOUS] == before
    assert len(rig.resolver.consul_servers("consul")) == 1


def test_the_servers_first_token_is_the_one_that_consul_made(rig: Rig) -> None:
    [first] = [each for each in rig.agent.tokens().values() if each.description in access.MASTER]
    assert first.policies == (access.MANAGEMENT,)


def test_a_worker_reads_what_is_for_workers_and_writes_what_is_its_own(
    rig: Rig, restricted: ConsulAgent
) -> None:
    own, shared = KEYS.applied(OTHER), KEYS.for_workers
    others = (KEYS.applied("worker4"), KEYS.applied(f"{OTHER}0"), KEYS.first_request(OTHER))
    for key in (own, shared, *others, KEYS.state):
        assert rig.agent.transact(Op("set", key, "old"))
    assert set(restricted.get(SPEC.key_prefix)) == {own, shared}, "the rest is not even listed"
    assert restricted.transact(Op("set", own, "new"), Op("check-index", shared, index=_index(rig)))
    for key in (shared, *others, KEYS.state, "x"):
        assert denied(functools.partial(restricted.transact, Op("set", key, "new")))
    both = (Op("set", own, "half"), Op("set", shared, "half"))
    assert denied(lambda: restricted.transact(*both))
    assert {key: rig.agent.get(SPEC.key_prefix)[key].value for key in (own, shared)} == {
        own: "new",
        shared: "old",
    }


def _index(rig: Rig) -> int:
    return rig.agent.get(SPEC.key_prefix)[KEYS.for_workers].index


def test_a_worker_is_no_other_node_and_no_server(rig: Rig, restricted: ConsulAgent) -> None:
    service = Service("nodeagent", 0, (), {}, ttl_s=90)
    restricted.register(service)
    assert restricted.services() == {service.id: service}
    restricted.vouch(service.id, True, "")
    wait_until(
        lambda: rig.agent.instances("nodeagent") == {f"{rig.other_address}:0": True},
        SETTLE_S,
        "the other node's service",
    )
    assert restricted.instances("nodeagent") == {f"{rig.other_address}:0": True}
    restricted.deregister(service.id)
    assert denied(lambda: restricted.register(Service("swarm-manager", 2377, (), {}, ttl_s=90)))
    session = restricted.create_session("own", 30)
    theirs = rig.agent.create_session("theirs", 30)
    assert restricted.renew_session(session)
    assert denied(lambda: restricted.destroy_session(theirs))
    restricted.destroy_session(session)
    rig.agent.destroy_session(theirs)
    assert denied(restricted.tokens)
    assert denied(restricted.policies)
    assert denied(lambda: restricted.put_policy(EVERYBODY))
    assert denied(lambda: restricted.put_token(Token(access.ANONYMOUS, (access.MANAGEMENT,))))
    assert denied(lambda: restricted.delete_token(access.ANONYMOUS))


def test_a_new_worker_can_only_ask(rig: Rig) -> None:
    new = rig.showing(worker_secrets().enrolment)
    assert new.knows_token()
    for key in (KEYS.state, KEYS.for_workers, KEYS.applied(OTHER), KEYS.next_request(OTHER)):
        assert rig.agent.transact(Op("set", key, "old"))
        assert denied(functools.partial(new.transact, Op("set", key, "new")))
    assert new.transact(Op("set", KEYS.first_request("new"), "x"))
    assert all(key.startswith(f"{SPEC.key_prefix}enrol/") for key in new.get(SPEC.key_prefix))
    assert denied(lambda: new.register(Service("nodeagent", 0, (), {}, ttl_s=90)))
    assert denied(lambda: new.create_session("new", 30))


# -- keys and certificates


def test_the_gossip_key_changes_in_three_steps(rig: Rig) -> None:
    old, new = secrets.keys(server_secrets(), PKI).gossip[0], PKI.seed()
    for _ in range(2):  # each may be repeated
        rig.agent.change_keyring("install", new)
    with pytest.raises(HostError, match="key"):
        rig.agent.change_keyring("remove", old)  # it is in use
    for _ in range(2):
        rig.agent.change_keyring("use", new)
    with pytest.raises(HostError, match="key"):
        rig.agent.change_keyring("remove", new)
    for _ in range(2):
        rig.agent.change_keyring("remove", old)
    with pytest.raises(HostError, match="key"):
        rig.agent.change_keyring("use", old)
    assert {member.alive for member in rig.agent.members()} == {True}
    rig.agent.change_keyring("install", old)
    rig.agent.change_keyring("use", old)
    rig.agent.change_keyring("remove", new)


def test_only_a_server_changes_the_gossip_key(rig: Rig) -> None:
    with pytest.raises(HostError, match="server"):
        rig.other.change_keyring("install", PKI.seed())


SERVER_NAME = f"server.{SPEC.datacenter}.{SPEC.domain}"


def test_a_server_and_a_node_of_one_cluster_greet_each_other(rig: Rig) -> None:
    for agent in (rig.agent, rig.other):
        assert agent.greet(rig.address, SERVER_NAME) == ""


def test_where_nobody_is_there_is_nothing_to_complain_about(rig: Rig) -> None:
    assert rig.agent.greet("127.0.0.99", SERVER_NAME) == ""
    assert rig.agent.greet(rig.other_address, SERVER_NAME) == "", "a worker listens to nobody"


def other_ca() -> tuple[str, str]:
    """Another cluster's CA, and a worker's certificate by it."""
    seed = PKI.seed()
    authority = PKI.authority(seed, NOW)
    return authority, PKI.issue(seed, authority, ("worker.x",), 1e9, NOW).reveal()


def test_a_server_of_another_ca_is_refused_here(rig: Rig) -> None:
    said = rig.other_with({paths.CONSUL_AUTHORITIES: other_ca()[0]}).greet(rig.address, SERVER_NAME)
    assert said.startswith("its certificate is refused here: ")


def test_a_server_of_another_name_is_refused_here(rig: Rig) -> None:
    said = rig.other.greet(rig.address, "server.other.consul")
    assert said.startswith("its certificate is refused here: ")
    assert "server.other.consul" in said


def test_a_server_refuses_a_node_of_another_ca(rig: Rig) -> None:
    stranger = rig.other_with({paths.CONSUL_CERTIFICATE: other_ca()[1]})
    assert stranger.greet(rig.address, SERVER_NAME).startswith("it refuses this node's certificate")


def test_both_cas_are_accepted_while_one_replaces_the_other(rig: Rig) -> None:
    both = other_ca()[0] + server_secrets().authorities[0]
    assert rig.other_with({paths.CONSUL_AUTHORITIES: both}).greet(rig.address, SERVER_NAME) == ""


def test_a_reload_takes_keys_and_certificates(rig: Rig) -> None:
    """Of another CA, so that it shows; then those it had."""
    seed = PKI.seed()
    authority = PKI.authority(seed, NOW)
    names = server_names(SPEC, "server2")
    issued = PKI.issue(seed, authority, names, 86400 * 3650, NOW).reveal()
    new = {paths.CONSUL_CERTIFICATE: issued, paths.CONSUL_AUTHORITIES: authority}
    old = rig.write(new)
    assert rig.other.greet(rig.address, SERVER_NAME) == "", "not before the reload"
    rig.agent.reload()
    said = rig.other.greet(rig.address, SERVER_NAME)
    rig.write(old)
    rig.agent.reload()
    assert said.startswith("its certificate is refused here: ")
    assert rig.other.greet(rig.address, SERVER_NAME) == ""


def test_a_reload_takes_the_recovery_token_and_the_one_before_is_worth_nothing(rig: Rig) -> None:
    """So a node never makes itself another while Consul runs: it could not ask for the reload."""
    new = str(uuid.uuid4())
    old = rig.write({paths.CONSUL_KEYS: "", paths.CONSUL_TOKENS: ""})
    keys, shown = (json.loads(old[path]) for path in (paths.CONSUL_KEYS, paths.CONSUL_TOKENS))
    shown["agent"] = ""  # which is another call than the reload itself
    rig.write({paths.CONSUL_TOKENS: json.dumps(shown)})
    keys["acl"]["tokens"]["agent_master"] = new
    rig.write({paths.CONSUL_KEYS: json.dumps(keys)})
    assert rig.agent.self() is not None, "not before the reload"
    rig.agent.reload()
    assert denied(rig.agent.self)
    assert denied(rig.agent.reload)
    rig.write({paths.CONSUL_TOKENS: json.dumps(shown | {"recovery": new})})
    assert rig.agent.self() is not None
    rig.write({paths.CONSUL_KEYS: old[paths.CONSUL_KEYS]})
    rig.agent.reload()
    rig.write(old)
    assert rig.agent.self() is not None


def test_a_reload_of_files_that_are_wrong_is_an_error_and_changes_nothing(rig: Rig) -> None:
    old = rig.write({paths.CONSUL_CERTIFICATE: "damaged"})
    with pytest.raises(HostError, match="reload"):
        rig.agent.reload()
    assert rig.other.greet(rig.address, SERVER_NAME) == ""
    rig.write(old)
    rig.agent.reload()


# -- failures


def failures(agent: Callable[[], ConsulAgent], *names: str) -> dict[str, HostError | None]:
    """What each call of `names` raises; at the same time, for each may take seconds."""
    calls: dict[str, Callable[[ConsulAgent], object]] = {
        "self": lambda a: a.self(),
        "leader": lambda a: a.leader(),
        "members": lambda a: a.members(),
        "join": lambda a: a.join("127.0.0.2"),
        "get": lambda a: a.get("x/"),
        "transact": lambda a: a.transact(Op("set", "x/a", "1")),
        "create_session": lambda a: a.create_session("x", 30),
        "renew_session": lambda a: a.renew_session("5f1b4c1e-0000-4000-8000-000000000000"),
        "destroy_session": lambda a: a.destroy_session("5f1b4c1e-0000-4000-8000-000000000000"),
        "instances": lambda a: a.instances("x"),
        "services": lambda a: a.services(),
        "register": lambda a: a.register(Service("x", 1, (), {}, ttl_s=30)),
        "deregister": lambda a: a.deregister("nodeagent:x"),
        "vouch": lambda a: a.vouch("nodeagent:x", True, ""),
        "reload": lambda a: a.reload(),
        "knows_token": lambda a: a.knows_token(),
        "policies": lambda a: a.policies(),
        "put_policy": lambda a: a.put_policy(EVERYBODY),
        "tokens": lambda a: a.tokens(),
        "put_token": lambda a: a.put_token(Token(access.ANONYMOUS, ())),
        "delete_token": lambda a: a.delete_token("5f1b4c1e-0000-4000-8000-000000000000"),
        "change_keyring": lambda a: a.change_keyring("install", PKI.seed()),
    }

    def attempt(name: str) -> HostError | None:
        try:
            calls[name](agent())
        except HostError as error:
            return error
        return None

    wanted = names or tuple(calls)
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(attempt, wanted), strict=True))


NEED_A_LEADER = (
    "get", "transact", "create_session", "renew_session", "destroy_session", "instances",
    "policies", "put_policy", "tokens", "put_token", "delete_token",
)  # fmt: skip
NEED_A_TOKEN = ("services", "register", "deregister", "vouch")


@pytest.fixture(scope="module")
def lonely(network: None, tmp_path_factory: pytest.TempPathFactory) -> ConsulNode:
    """The first of three servers, whose others never come; off."""
    top = tmp_path_factory.mktemp("lonely")
    return ConsulNode(images.consul_binary(), top, 4, expect=3, dns=-1)


def test_without_a_quorum_the_fake_says_so() -> None:
    agent = fake_node(World(), "server", "127.0.0.2", servers=3).consul
    assert agent.leader() == ""
    assert agent.self() is not None
    assert agent.members()
    agent.reload()
    assert all(failures(lambda: agent, *NEED_A_LEADER, *NEED_A_TOKEN).values())


@pytest.mark.lab
@needs_root
def test_without_a_quorum_consul_says_so(lonely: ConsulNode) -> None:
    with lonely.running(leader=False):
        assert lonely.agent.leader() == ""
        assert lonely.agent.self() is not None
        assert lonely.agent.members()
        lonely.agent.reload()
        began = time.monotonic()
        found = failures(lonely.another_agent, *NEED_A_LEADER, *NEED_A_TOKEN)
        assert time.monotonic() - began < 2 * TIMEOUT_S
        for name, error in found.items():
            assert error is not None, name
            # Consul's own answer, not our time-out, which would say less. No token is known yet.
            answers = ("No cluster leader", "ACL not found", "ACL system is currently in legacy")
            assert any(answer in error.cause for answer in answers), (name, error.cause)


@pytest.mark.parametrize("kind", ["fake", REAL])
def test_nobody_listens(kind: str, request: pytest.FixtureRequest) -> None:
    fake = World().machine(SPEC, "127.0.0.2").consul
    if kind == "real":
        request.getfixturevalue("network")

    def agents() -> ConsulAgent:
        return LocalConsul(port=1) if kind == "real" else fake

    found = failures(agents)
    assert found.pop("self") is None
    assert agents().self() is None
    assert [name for name, error in found.items() if error is None] == []


@pytest.mark.lab
@pytest.mark.full
@needs_root
def test_a_consul_that_hangs_is_an_error_in_bounded_time(lonely: ConsulNode) -> None:
    with lonely.running(leader=False) as process:
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        found = failures(lonely.another_agent)
        assert time.monotonic() - began < 2 * TIMEOUT_S
        assert [name for name, error in found.items() if error is None] == []


class _Other(BaseHTTPRequestHandler):
    """Something that is not Consul, and listens on its port."""

    status, body = 404, b"<html>not here</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.lab
@needs_root
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"<html>"), (200, b"<html>"), (200, b"{}"), (200, b"[]"), (200, b""), (503, b"later")],
)
def test_something_else_on_consuls_port_is_an_error(status: int, body: bytes) -> None:
    handler = type("_This", (_Other,), {"status": status, "body": body})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(HostError, match="Consul"):
            LocalConsul(port=server.server_port).self()
        server.shutdown()


@pytest.mark.lab
@pytest.mark.full
@needs_root
def test_a_check_that_connects_notices_that_nobody_listens(real_rig: Rig) -> None:
    open_, closed = f"{real_rig.address}:8300", f"{real_rig.address}:1"
    real_rig.agent.register(Service("open", 8300, (), {}, tcp=open_))
    real_rig.agent.register(Service("closed", 1, (), {}, tcp=closed))
    wait_until(
        lambda: real_rig.other.instances("closed") == {closed: False},
        2 * SETTLE_S,  # it looks every 10 s
        "the check to fail",
    )
    assert real_rig.other.instances("open") == {open_: True}
    for name in ("open", "closed"):
        real_rig.agent.deregister(f"nodeagent:{name}")


# -- the watch: the fake has none, for nothing happens in the background of its world


class Watching:
    """A watch in a thread of its own."""

    def __init__(self, agent: ConsulAgent, prefix: str) -> None:
        self.woken, self._stop = threading.Event(), threading.Event()
        arguments = (prefix, self.woken.set, self._stop)
        threading.Thread(target=agent.watch, args=arguments, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()


def quiet(woken: threading.Event) -> bool:
    woken.clear()
    return not woken.wait(0.3)


@pytest.mark.lab
@needs_root
def test_a_watch_wakes_on_changes_below_its_prefix(real_rig: Rig, prefix: str) -> None:
    watching = Watching(real_rig.agent, prefix)
    numbers = itertools.count()

    def woken_by(key: str) -> bool:
        real_rig.other.transact(Op("set", key, str(next(numbers))))
        return watching.woken.wait(0.2)

    wait_until(lambda: woken_by(f"{prefix}a"), SETTLE_S, "the watch to begin and wake")
    session = real_rig.agent.create_session("held", 30)
    assert real_rig.agent.transact(Op("lock", f"{prefix}a", "locked", session=session))
    wait_until(lambda: quiet(watching.woken), 5, "the watch to be quiet again")
    assert not woken_by("elsewhere/a")
    real_rig.agent.destroy_session(session)
    assert watching.woken.wait(5), "a lock's end is a change too"
    watching.stop()


@pytest.mark.lab
@needs_root
def test_a_watch_wakes_after_an_outage(network: None, tmp_path: Path) -> None:
    node = ConsulNode(images.consul_binary(), tmp_path, 5, expect=1, dns=-1)
    watching = Watching(node.agent, "x/")
    with node.running(leader=True):
        # Nothing was written: it wakes because something may have been while nobody could tell.
        assert watching.woken.wait(SETTLE_S)
    watching.stop()
