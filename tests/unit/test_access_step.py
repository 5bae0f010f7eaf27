"""A token for every node: who asks, who is admitted; and what a token does not allow."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from nodeagent import paths, secrets
from nodeagent.changes import Change
from nodeagent.converge import Cycle, make, run_cycle
from nodeagent.errors import HostError, Secret
from nodeagent.host import ConsulAgent, ContainerState, Entry, Host, Op, Policy, Service, Token
from nodeagent.secrets import ADMITTED, NodeTokens, Request, ServerSecrets, request_id
from nodeagent.steps import STEPS, access, swarm
from tests.unit.expect import said
from tests.unit.fakes import NOW, PKI, Machine, World, make_spec, server_secrets, worker_secrets

SPEC = make_spec(servers=1)
KEYS = access.Keys(SPEC.key_prefix)
GENERATION = worker_secrets().generation
OTHER = secrets.new(PKI, NOW)  # another cluster
TOKEN = Secret("6f1b9f0e-2d1c-4c55-9d64-0d7a3b1f2a11")
ID = request_id(TOKEN)
POLICY = "do set Consul's access policy nodeagent-demo-node-worker22"
DONE = "done servers may do everything in Consul; workers with a token: 1"
TAKEN = "a machine named worker21 has a token already"


def cycle(machine: Machine, apply: Callable[[Change, Host], None] | None = None) -> Cycle:
    return run_cycle(machine.spec, machine.host, STEPS, lambda _: None, apply)


def converge(world: World) -> None:
    for _ in range(8):
        cycles = [cycle(machine) for machine in world.machines.values()]
        if all(each.is_ready for each in cycles):
            return
    raise AssertionError([each.sentence for each in cycles])


def cluster() -> World:
    """A server and a worker that are ready."""
    world = World()
    world.machine(make_spec(servers=1), "10.10.0.11")
    world.machine(make_spec("worker", servers=1), "10.10.0.21")
    converge(world)
    return world


def newcomer(world: World, name: str = "") -> Machine:
    """A worker whose Consul is a member, and that has asked for nothing yet."""
    machine = world.machine(make_spec("worker", servers=1), "10.10.0.22")
    if name:
        world.machines[name] = world.machines.pop(machine.name)
        machine.name = name
    run_cycle(machine.spec, machine.host, STEPS[:5], lambda _: None)
    if not machine.consul_is_up:  # under a name that the agent refuses, somebody runs it by hand
        machine.system_engine.containers["consul"] = ContainerState("", "running")
    return machine


def plan(machine: Machine) -> list[str]:
    return said(access.diff(machine.spec, access.observe(machine.spec, machine.host)))


def server(world: World) -> Machine:
    return world.machines["server11"]


def put(world: World, key: str, value: str) -> None:
    assert server(world).consul.transact(Op("set", key, value))


def request(
    token: Secret = TOKEN,
    *,
    generation: str = GENERATION,
    authority: str = server_secrets().authorities[0],
    answer: str = "",
) -> str:
    return Request(request_id(token), generation, PKI.seal(authority, token), answer).dump()


def ask(world: World, node: str = "worker22", **values: object) -> None:
    put(world, KEYS.first_request(node), request(**values))  # type: ignore[arg-type] # by name


def made_token(node: str = "worker22", of: str = GENERATION, id_: str = ID) -> str:
    return f"do set Consul's token for nodeagent {of} node {node} {id_}"


# -- what a server finds, and what follows


def nobody(world: World) -> None:
    pass


def a_living_member(world: World) -> None:
    newcomer(world)
    ask(world)


def not_a_member(world: World) -> None:
    ask(world)


def a_dead_member(world: World) -> None:
    newcomer(world).lose_power()
    ask(world)


def in_the_name_of_a_worker(world: World) -> None:
    ask(world, "worker21")


def in_the_name_of_a_server(world: World) -> None:
    ask(world, "server11")


def with_older_user_data(world: World) -> None:
    newcomer(world)
    ask(world, generation="00000000")


def of_another_cluster(world: World) -> None:
    newcomer(world)
    ask(world, authority=OTHER.authorities[0])


def refused_before(world: World) -> None:
    ask(world, "worker21", answer=TAKEN)


def refused_before_and_right_now(world: World) -> None:
    newcomer(world)
    ask(world, answer=TAKEN)


def admitted_before(world: World) -> None:
    newcomer(world)
    ask(world, answer=ADMITTED)


def killed_after_the_policy(world: World) -> None:
    a_living_member(world)
    found = access.diff(SPEC, access.observe(SPEC, server(world).host))
    found.changes[0].apply(server(world).host)


def killed_after_the_token(world: World) -> None:
    a_living_member(world)
    found = access.diff(SPEC, access.observe(SPEC, server(world).host))
    for change in found.changes[:2]:
        change.apply(server(world).host)


def junk(world: World) -> None:
    for number, text in enumerate(("", "junk", "{}", "[]", "null", "7", '{"id": 1}')):
        put(world, f"{SPEC.key_prefix}enrol/junk{number}", text)
    put(world, f"{SPEC.key_prefix}enrol/", request())
    put(world, f"{SPEC.key_prefix}enrol/a/b", request())
    put(world, f"{SPEC.key_prefix}nodes/a/b/token", request())


def brackets_without_end(world: World) -> None:
    put(world, f"{SPEC.key_prefix}enrol/junk", "[" * 100_000)


def again_by_itself(world: World) -> None:
    put(world, KEYS.next_request("worker21"), request())


def rotate_tokens(world: World) -> ServerSecrets:
    """The tokens have a second seed now, and the servers know it."""
    kept = replace(
        server_secrets(),
        rotated={"tokens": (server_secrets().cluster_key, OTHER.cluster_key)},
        rotating="tokens",
        phase="spread",
        serial=1,
    )
    machine = server(world)
    machine.files.write(paths.SECRETS, secrets.dump(kept).reveal(), 0o600)
    cycle(machine)
    return kept


NEXT = secrets.generation(PKI, OTHER.cluster_key)


def for_the_next_generation(world: World) -> None:
    rotate_tokens(world)
    put(world, KEYS.next_request("worker21"), request(generation=NEXT))


def for_the_next_generation_in_anothers_name(world: World) -> None:
    rotate_tokens(world)
    ask(world, "worker21", generation=NEXT)


def with_a_new_token_under_way(world: World) -> None:
    """Old user-data is as good as new one until the old tokens are deleted."""
    rotate_tokens(world)
    a_living_member(world)


REFUSED = [
    pytest.param(in_the_name_of_a_worker, f"refuse worker21: {TAKEN}", id="the-name-is-taken"),
    pytest.param(
        in_the_name_of_a_server,
        "refuse server11: server11 is the name of a server",
        id="the-name-of-a-server",
    ),
    pytest.param(
        with_older_user_data,
        "refuse worker22: its user-data is older than the last rotation of the tokens",
        id="older-user-data",
    ),
    pytest.param(
        of_another_cluster,
        "refuse worker22: it asks the servers of another cluster",
        id="sealed-for-another-cluster",
    ),
    pytest.param(again_by_itself, f"refuse worker21: {TAKEN}", id="a-second-one-of-its-own"),
    pytest.param(
        for_the_next_generation_in_anothers_name,
        f"refuse worker21: {TAKEN}",
        id="with-newer-user-data-in-anothers-name",
    ),
]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param(nobody, [DONE], id="nobody-asks"),
        pytest.param(
            a_living_member, [POLICY, made_token(), "do admit worker22"], id="a-living-member-asks"
        ),
        pytest.param(not_a_member, [DONE], id="who-is-no-member-yet-has-no-answer-yet"),
        pytest.param(a_dead_member, [DONE], id="who-is-dead-has-no-answer"),
        *(pytest.param(each.values[0], [f"do {each.values[1]}"], id=each.id) for each in REFUSED),
        pytest.param(refused_before, [DONE], id="it-is-refused-once"),
        pytest.param(
            refused_before_and_right_now,
            [POLICY, made_token(), "do admit worker22"],
            id="what-stood-against-it-has-gone",
        ),
        pytest.param(admitted_before, [DONE], id="admitted-before"),
        pytest.param(
            killed_after_the_policy,
            [POLICY, made_token(), "do admit worker22"],
            id="killed-after-the-policy",
        ),
        pytest.param(
            killed_after_the_token, ["do admit worker22"], id="killed-after-the-token-was-made"
        ),
        pytest.param(junk, [DONE], id="junk"),
        pytest.param(brackets_without_end, [DONE], id="junk-that-ends-pythons-parser"),
        pytest.param(
            for_the_next_generation,
            [
                "do set Consul's access policy nodeagent-demo-node-worker21",
                made_token("worker21", NEXT),
                "do admit worker21",
            ],
            id="a-node-asks-for-its-next-token",
        ),
        pytest.param(
            with_a_new_token_under_way,
            [POLICY, made_token(), "do admit worker22"],
            id="a-new-machine-while-tokens-are-rotated",
        ),
    ],
)
def test_a_server(change: Callable[[World], object], wanted: list[str]) -> None:
    world = cluster()
    change(world)
    assert plan(server(world)) == wanted


@pytest.mark.parametrize("change", [pytest.param(each.values[0], id=each.id) for each in REFUSED])
def test_a_refusal_makes_nothing_and_is_said_once(change: Callable[[World], object]) -> None:
    world = cluster()
    change(world)
    before = dict(world.tokens), dict(world.policies)
    assert cycle(server(world)).is_ready
    assert (world.tokens, world.policies) == before
    assert cycle(server(world)).made_changes == 0


def test_two_that_ask_at_once_are_both_answered() -> None:
    world = cluster()
    in_the_name_of_a_worker(world)
    a_living_member(world)
    assert plan(server(world)) == [
        f"do refuse worker21: {TAKEN}",
        POLICY,
        made_token(),
        "do admit worker22",
    ]


def test_who_is_admitted_is_itself_and_nobody_else() -> None:
    world = cluster()
    a_living_member(world)
    cycle(server(world))
    [made] = [each for each in world.tokens.values() if "worker22" in each.description]
    assert made.policies == ("nodeagent-demo-node-worker22",)
    rules = world.policies["nodeagent-demo-node-worker22"].rules
    assert {rule for rule in rules if rule[2] == "write"} == {
        ("agent", "worker22", "write"),
        ("node", "worker22", "write"),
        ("session", "worker22", "write"),
        ("service", "nodeagent", "write"),
        ("service", "docker-engine", "write"),
        ("key_prefix", "nodeagent/demo/nodes/worker22/", "write"),
        ("key", "nodeagent/demo/engine-restart", "write"),
    }


def test_several_servers_admit_a_node_once() -> None:
    """Each has looked before any of them acts."""
    world = cluster()
    a_living_member(world)
    one, other = (access.diff(SPEC, access.observe(SPEC, server(world).host)) for _ in range(2))
    for found in (one, other):
        for change in found.changes:
            change.apply(server(world).host)
    assert len([each for each in world.tokens.values() if "worker22" in each.description]) == 1
    assert plan(server(world)) == [
        "done servers may do everything in Consul; workers with a token: 2"
    ]


# -- newer secrets


def newer(serial: int = 3) -> ServerSecrets:
    return replace(server_secrets(), rotated={"tokens": (OTHER.cluster_key,)}, serial=serial)


def test_newer_secrets_in_consul_replace_those_here() -> None:
    world = cluster()
    put(world, KEYS.state, secrets.dump(newer()).reveal())
    text = secrets.dump(secrets.for_workers(newer(), SPEC, PKI, NOW)).reveal()
    put(world, KEYS.for_workers, text)
    for machine, wanted in (
        (server(world), secrets.dump(newer()).reveal()),
        (world.machines["worker21"], text),
    ):
        found = access.diff(machine.spec, access.observe(machine.spec, machine.host))
        assert said(found) == ["do write /etc/nodeagent/secrets.json"]
        found.changes[0].apply(machine.host)
        kept = secrets.parse(machine.files.texts[paths.SECRETS], "", machine.spec.role, PKI)
        assert kept == secrets.parse(wanted, "", machine.spec.role, PKI)
        assert machine.files.modes[paths.SECRETS] == 0o600


@pytest.mark.parametrize("serial", [0, 1, 2])
def test_older_secrets_in_consul_are_none_of_ours(serial: int) -> None:
    world = cluster()
    machine = server(world)
    machine.files.write(paths.SECRETS, secrets.dump(newer(2)).reveal(), 0o600)
    put(world, KEYS.state, secrets.dump(newer(serial)).reveal())
    assert access.observe(SPEC, machine.host).newer is None


@pytest.mark.parametrize(
    "text",
    ["", "junk", "{}", secrets.dump(worker_secrets()).reveal()],
    ids=["empty", "junk", "nothing", "a-workers"],
)
def test_secrets_in_consul_that_cannot_be_read_block_and_are_not_shown(text: str) -> None:
    world = cluster()
    put(world, KEYS.state, text)
    found = plan(server(world))
    assert re.match(r"block Consul's nodeagent/demo/secrets/state(:1)?: ", found[0])
    assert found[1] == f"fix consul kv delete {KEYS.state}, on a server: its own file counts"
    assert worker_secrets().gossip_key.reveal() not in str(found)
    world.kv.pop(KEYS.state)  # what the fix does
    assert plan(server(world)) == [DONE]


PUBLISH = "do publish the workers' part of secrets no. 3"
TELL = "do tell the cluster that this node uses its secrets no. 3"


def with_newer(world: World) -> Machine:
    machine = server(world)
    put(world, KEYS.state, secrets.dump(newer()).reveal())
    machine.files.write(paths.SECRETS, secrets.dump(newer()).reveal(), 0o600)
    return machine


def test_what_is_new_is_used_before_it_is_published_and_told() -> None:
    world = cluster()
    machine = with_newer(world)
    assert plan(machine) == ["wait Consul to use this node's new keys"]
    shown = json.loads(machine.files.texts[paths.CONSUL_TOKENS])
    token = secrets.keys(newer(), PKI).server_token
    assert token is not None
    # What the secrets step writes; the reload has still to come.
    machine.files.write(paths.CONSUL_RELOAD_PENDING, "", 0o600)
    world.tokens["new"] = Token("new", (access.MANAGEMENT,), access.MASTER[0], token)
    text = json.dumps(shown | {"serial": 3, "token": token.reveal()})
    machine.files.write(paths.CONSUL_TOKENS, text, 0o600)
    assert plan(machine) == ["wait Consul to use this node's new keys"]
    machine.files.remove(paths.CONSUL_RELOAD_PENDING)
    assert plan(machine) == [PUBLISH, TELL]
    first, second = access.diff(SPEC, access.observe(SPEC, machine.host)).changes
    first.apply(machine.host)
    assert plan(machine) == [TELL], "killed between the two"
    second.apply(machine.host)
    assert plan(machine)[0].startswith("done ")
    published = secrets.parse(world.kv[KEYS.for_workers].value, "", "worker", PKI)
    assert published.serial == 3
    assert world.kv[KEYS.applied("server11")].value == "3"


# -- what a worker finds, and what follows

ASK = "do ask the servers for a token of this node's own"
WAIT = "wait a server to admit this node to Consul"
WRITE = "do write /var/lib/nodeagent/node-token.json"
READMIT = (
    "fix if it was rebuilt under its old name: nodeagent secrets forget NAME, on a server; else "
    "give it a name of its own, or newer user-data"
)


def worker(own: NodeTokens, entries: dict[str, str] | None = None, **changes: object) -> list[str]:
    """What a worker that sees these entries plans."""
    machine = cluster().machines["worker21"]
    seen = access.observe(machine.spec, machine.host)
    found = {key: Entry(value, 5) for key, value in (entries or {}).items()}
    seen = replace(seen, own=own, entries=found, **changes)  # type: ignore[arg-type] # by name
    return said(access.diff(machine.spec, seen))


NEW = NodeTokens(Secret("recovery"), {GENERATION: TOKEN})
ADMITTED_NODE = replace(NEW, in_use=GENERATION)
ROTATING = NodeTokens(Secret("recovery"), {"old": Secret("x"), GENERATION: TOKEN}, "old")
FIRST, FOLLOWING = KEYS.first_request("worker21"), KEYS.next_request("worker21")


@pytest.mark.parametrize(
    ("own", "entries", "wanted"),
    [
        pytest.param(NEW, {}, [ASK], id="first-boot"),
        pytest.param(NEW, {FIRST: "junk"}, [ASK], id="junk-is-in-its-place"),
        pytest.param(NEW, {FIRST: request()}, [WAIT], id="it-has-asked"),
        pytest.param(
            NEW, {FIRST: request(Secret("another"))}, [ASK], id="another-machine-asks-in-its-name"
        ),
        pytest.param(
            NEW,
            {FIRST: request(Secret("another"), answer=ADMITTED)},
            [ASK],
            id="another-machine-was-admitted-in-its-name",
        ),
        pytest.param(NEW, {FIRST: request(answer=ADMITTED)}, [WRITE], id="admitted"),
        pytest.param(
            NEW,
            {FIRST: request(answer=TAKEN)},
            [f"block the servers do not admit this node: {TAKEN}", READMIT],
            id="refused",
        ),
        pytest.param(
            NEW, {FOLLOWING: request(answer=ADMITTED)}, [ASK], id="an-answer-in-another-place"
        ),
        pytest.param(
            ADMITTED_NODE, {}, ["done this node has its own token in Consul"], id="all-is-right"
        ),
        pytest.param(
            ADMITTED_NODE,
            {FIRST: request(answer=TAKEN)},
            ["done this node has its own token in Consul"],
            id="what-others-ask-in-its-name-is-nothing-to-it",
        ),
        pytest.param(ROTATING, {}, [ASK], id="new-tokens"),
        pytest.param(ROTATING, {FIRST: request(answer=ADMITTED)}, [ASK], id="not-where-it-began"),
        pytest.param(ROTATING, {FOLLOWING: request()}, [WAIT], id="it-has-asked-for-the-next"),
        pytest.param(ROTATING, {FOLLOWING: request(answer=ADMITTED)}, [WRITE], id="next-admitted"),
    ],
)
def test_a_worker(own: NodeTokens, entries: dict[str, str], wanted: list[str]) -> None:
    assert worker(own, entries) == wanted


def test_a_worker_waits_until_its_token_is_in_use() -> None:
    assert worker(ADMITTED_NODE, is_applied=False) == ["wait Consul to use this node's new keys"]


def test_a_worker_tells_which_secrets_it_uses() -> None:
    machine = cluster().machines["worker21"]
    seen = access.observe(machine.spec, machine.host)
    assert seen.found is not None
    kept = replace(worker_secrets(), serial=3)
    seen = replace(seen, found=replace(seen.found, secrets=kept))
    assert said(access.diff(machine.spec, seen)) == [TELL]
    for value, wanted in (("2", [TELL]), ("3", ["done this node has its own token in Consul"])):
        entries = {KEYS.applied("worker21"): Entry(value, 5)}
        assert said(access.diff(machine.spec, replace(seen, entries=entries))) == wanted


def test_only_the_token_in_use_is_kept_once_it_is_admitted() -> None:
    machine = cluster().machines["worker21"]
    seen = access.observe(machine.spec, machine.host)
    entries = {FOLLOWING: Entry(request(answer=ADMITTED), 5)}
    found = access.diff(machine.spec, replace(seen, own=ROTATING, entries=entries))
    found.changes[0].apply(machine.host)
    kept = NodeTokens.parse(machine.files.texts[paths.NODE_TOKEN])
    assert kept == NodeTokens(Secret("recovery"), {GENERATION: TOKEN}, GENERATION)


def test_what_is_asked_is_read_by_servers_alone() -> None:
    world = cluster()
    machine = newcomer(world)
    cycle(machine)
    asked = world.kv[KEYS.first_request("worker22")].value
    own = NodeTokens.parse(machine.files.texts[paths.NODE_TOKEN]).tokens[GENERATION]
    assert own.reveal() not in asked
    found = Request.parse(asked)
    assert found is not None
    assert PKI.unseal(server_secrets().cluster_key, found.sealed) == own
    assert PKI.unseal(OTHER.cluster_key, found.sealed) is None


def test_security_off_asks_for_nothing() -> None:
    world = World()
    machine = world.machine(make_spec(servers=1, security="off"), "10.10.0.11")
    assert plan(machine) == ["done security is off: whoever reaches Consul may do everything there"]


# -- attacks: what somebody who has all of one worker's files can do


def denied(call: Callable[[], object]) -> bool:
    with pytest.raises(HostError, match="403 Permission denied"):
        call()
    return True


def showing(machine: Machine, token: Secret) -> ConsulAgent:
    """This machine's Consul, shown any token."""
    shown = json.loads(machine.files.texts[paths.CONSUL_TOKENS]) | {"token": token.reveal()}
    machine.files.write(paths.CONSUL_TOKENS, json.dumps(shown), 0o600)
    return machine.consul


SECRET_KEYS = (
    swarm.Keys.of(SPEC).manager_token,
    KEYS.state,
    KEYS.first_request("worker21"),
    KEYS.applied("server11"),
    KEYS.next_request("worker22"),
)
NOT_TO_WRITE = (
    *SECRET_KEYS,
    KEYS.for_workers,
    swarm.Keys.of(SPEC).worker_entry,
    swarm.Keys.of(SPEC).state,
    f"{SPEC.key_prefix}nodes/worker210/secrets",
    f"{SPEC.key_prefix}nodes/worker21",
    f"{SPEC.key_prefix}worker/x",
    "elsewhere",
)


def test_a_worker_reads_no_secret_of_others_and_writes_nothing_outside_its_own() -> None:
    world = cluster()
    for key in NOT_TO_WRITE:
        if key not in world.kv:
            put(world, key, "there")
    thief, before = world.machines["worker21"].consul, dict(world.kv)
    seen = thief.get("")
    assert not set(seen) & set(SECRET_KEYS)
    assert {key for key in seen if not key.startswith(f"{SPEC.key_prefix}worker/")} <= {
        key for key in world.kv if key.startswith(f"{SPEC.key_prefix}nodes/worker21/")
    }
    for key in NOT_TO_WRITE:
        index = before[key].index
        for op in (Op("set", key, "x"), Op("cas", key, "x", index=index)):
            assert denied(functools.partial(thief.transact, op)), key
    assert world.kv == before
    assert thief.transact(Op("set", KEYS.applied("worker21"), "x")), "its own it may"


def test_a_worker_has_no_way_to_the_managers_token_in_anything_it_can_read() -> None:
    world = cluster()
    manager = next(iter(world.swarms.values())).tokens[1]
    machine = world.machines["worker21"]
    assert world.kv[swarm.Keys.of(SPEC).manager_token].value == manager
    readable = [entry.value for entry in machine.consul.get("").values()]
    assert manager not in "".join((*readable, *machine.files.texts.values()))


def test_a_worker_makes_no_tokens_and_no_rules() -> None:
    thief = cluster().machines["worker21"].consul
    mine = Policy("mine", (("key_prefix", "", "write"),))
    assert denied(thief.tokens)
    assert denied(thief.policies)
    assert denied(lambda: thief.put_policy(mine))
    assert denied(lambda: thief.put_token(Token(access.ANONYMOUS, (access.MANAGEMENT,))))
    assert denied(lambda: thief.delete_token(access.ANONYMOUS))
    assert denied(lambda: thief.change_keyring("install", PKI.seed()))


def test_a_worker_is_no_manager_of_the_swarm_to_others() -> None:
    thief = cluster().machines["worker21"].consul
    assert denied(lambda: thief.register(Service("swarm-manager", 2377, (), {}, ttl_s=90)))
    assert denied(lambda: thief.register(Service("consul", 8300, (), {}, ttl_s=90)))


def test_a_workers_files_hold_no_key_with_which_more_could_be_had() -> None:
    machine = cluster().machines["worker21"]
    texts = "".join(machine.files.texts.values())
    keys = secrets.keys(server_secrets(), PKI)
    assert keys.server_token is not None
    for each in (server_secrets().cluster_key, keys.server_token):
        assert each.reveal() not in texts


def test_user_data_alone_only_asks() -> None:
    world = cluster()
    for key in NOT_TO_WRITE:
        put(world, key, "there")
    stranger = showing(world.machines["worker21"], worker_secrets().enrolment)
    assert set(stranger.get("")) == {KEYS.first_request("worker21")}
    for key in {*NOT_TO_WRITE, KEYS.applied("worker21")} - {KEYS.first_request("worker21")}:
        assert denied(functools.partial(stranger.transact, Op("set", key, "x"))), key
    assert stranger.transact(Op("set", KEYS.first_request("new"), "x"))
    assert denied(lambda: stranger.create_session("x", 30))
    assert denied(lambda: stranger.register(Service("nodeagent", 0, (), {}, ttl_s=90)))


def test_a_second_machine_of_a_name_is_refused_and_the_first_goes_on() -> None:
    world = cluster()
    first = world.machines["worker21"]
    second = newcomer(world, name="worker21")
    world.machines["worker21"] = second
    for _ in range(3):
        for machine in (second, server(world)):
            last = cycle(machine)
    last = cycle(second)
    assert last.is_blocked
    assert last.sentence == (
        f"blocked at access: the servers do not admit this node: {TAKEN}; "
        f"{READMIT.removeprefix('fix ')}"
    )
    world.machines["worker21"] = first
    assert cycle(first).is_ready
    assert first.consul.knows_token()


Attack = Callable[[World], object]


def a_name_that_is_no_policys(world: World) -> None:
    newcomer(world, name="x y")
    ask(world, "x y")


def a_name_with_dots(world: World) -> None:
    newcomer(world, name="x.y")
    ask(world, "x.y")


def a_token_that_is_none(world: World) -> None:
    newcomer(world, name="evil")
    ask(world, "evil", token=Secret("not a uuid"))


def a_token_that_is_in_use(world: World) -> None:
    newcomer(world, name="evil")
    ask(world, "evil", token=worker_secrets().enrolment)


def what_another_has_sealed(world: World) -> None:
    """Whoever has user-data reads all requests there are, and can repeat one as its own."""
    newcomer(world, name="evil")
    ask(world)
    asked = world.kv.pop(KEYS.first_request("worker22"))
    put(world, KEYS.first_request("evil"), asked.value)
    cycle(server(world))


@pytest.mark.parametrize(
    "attack",
    [
        junk,
        brackets_without_end,
        a_name_that_is_no_policys,
        a_name_with_dots,
        a_token_that_is_none,
        a_token_that_is_in_use,
        what_another_has_sealed,
    ],
)
def test_nothing_that_is_asked_keeps_servers_from_their_work(attack: Attack) -> None:
    """User-data is enough to write any request: the servers stay ready, and admit others."""
    world = cluster()
    attack(world)
    world.machine(make_spec("worker", servers=1), "10.10.0.22")
    ask(world)
    for _ in range(4):
        last = cycle(server(world))
        run_cycle(
            world.machines["worker22"].spec,
            world.machines["worker22"].host,
            STEPS[:5],
            lambda _: None,
        )
    assert last.is_ready, last.sentence
    assert [each for each in world.tokens.values() if " node worker22 " in each.description]


def test_killed_after_every_change_of_an_admission() -> None:
    """The server dies after each of the changes with which it admits a node."""
    for after in range(4):
        world = cluster()
        machine, made = newcomer(world), 0
        cycle(machine)

        def dying(change: Change, host: Host, after: int = after) -> None:
            nonlocal made
            if made == after:
                raise HostError("go on", "here", "killed")
            make(change, host)
            made += 1

        cycle(server(world), dying)
        assert made == min(after, 3)
        converge(world)
        names = [token for token in world.tokens.values() if "worker22" in token.description]
        assert len(names) == 1
