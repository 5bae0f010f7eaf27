"""One Swarm for the cluster: every state of the record, against every state of this Engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nodeagent.changes import CLUSTER_LABEL, InitSwarm, JoinSwarm, LeaveSwarm, TakeLock
from nodeagent.host import Entry, SwarmInfo
from nodeagent.plan import Plan
from nodeagent.spec import Spec
from nodeagent.steps import swarm
from nodeagent.steps.swarm import Keys, Seen
from tests.unit.expect import assert_golden, said
from tests.unit.fakes import make_spec

SERVER, WORKER = make_spec("server"), make_spec("worker")
KEYS = Keys.of(SERVER)
ME, OTHER = "server11", "server12"
OURS, ORPHAN, FOREIGN = "swarm-cluster", "swarm-orphan", "swarm-foreign"
LABELS = {CLUSTER_LABEL: "demo"}
TOKENS = {
    KEYS.worker_entry: Entry(
        json.dumps(
            {"phase": "published", "node": "server12", "swarm_id": "swarm-cluster", "token": "T"}
        ),
        5,
    ),
    KEYS.manager_token: Entry("SWMTKN-manager", 5),
}
MANAGERS = {"10.10.0.12:2377": True, "10.10.0.13:2377": False}


def record(phase: str, node: str, swarm_id: str = "", *, held: bool) -> Entry:
    value = {"phase": phase, "node": node} | ({"swarm_id": swarm_id} if swarm_id else {})
    return Entry(json.dumps(value), 7, "session-1" if held else "")


RECORDS: dict[str, Entry | None] = {
    "no record": None,
    "intent, mine, held": record("intent", ME, held=True),
    "intent, mine, lapsed": record("intent", ME, held=False),
    "intent, other's, held": record("intent", OTHER, held=True),
    "intent, other's, lapsed": record("intent", OTHER, held=False),
    "initialised, mine, held": record("initialised", ME, ORPHAN, held=True),
    "initialised, mine, lapsed": record("initialised", ME, ORPHAN, held=False),
    "initialised, other's, held": record("initialised", OTHER, OURS, held=True),
    "initialised, other's, lapsed": record("initialised", OTHER, OURS, held=False),
    "published, mine, held": record("published", ME, OURS, held=True),
    "published, mine": record("published", ME, OURS, held=False),
    "published, other's": record("published", OTHER, OURS, held=False),
}

ENGINES: dict[str, tuple[SwarmInfo | None, bool]] = {
    "silent": (None, False),
    "inactive": (SwarmInfo(), False),
    "pending, never joined": (SwarmInfo("pending"), False),
    "pending, of the cluster": (SwarmInfo("pending", cluster_id=OURS), False),
    "locked": (SwarmInfo("locked"), False),
    "error": (SwarmInfo("error", error="certificate has expired"), False),
    "orphan of ours, bare": (
        SwarmInfo("active", "n", True, ORPHAN, LABELS, nodes=1),
        True,
    ),
    "with our label, in use": (SwarmInfo("active", "n", True, ORPHAN, LABELS, nodes=1), False),
    "another Swarm": (SwarmInfo("active", "n", True, FOREIGN, {}, nodes=1), True),
    "another cluster's": (
        SwarmInfo("active", "n", True, FOREIGN, {CLUSTER_LABEL: "other"}, nodes=1),
        True,
    ),
    "worker of another": (SwarmInfo("active", "n", False, FOREIGN), False),
    "the cluster's, manager": (SwarmInfo("active", "n", True, OURS, LABELS, nodes=3), False),
    "the cluster's, worker": (SwarmInfo("active", "n", False, OURS), False),
}


def seen_with(record_name: str, engine: str) -> Seen:
    found, is_bare = ENGINES[engine]
    entry = RECORDS[record_name]
    entries = {} if entry is None else {KEYS.state: entry}
    tokens = TOKENS if record_name.startswith("published") else {}
    return Seen(ME, "10.10.0.11", found, {**entries, **tokens}, MANAGERS, is_bare)


def every_case() -> Iterator[tuple[str, str, str, Seen, Plan]]:
    for spec, name, engine in itertools.product((SERVER, WORKER), RECORDS, ENGINES):
        seen = seen_with(name, engine)
        yield spec.role, name, engine, seen, swarm.diff(spec, seen)


def test_every_record_against_every_engine() -> None:
    """The whole decision table; `said` asserts that each plan has exactly one kind."""
    lines = []
    for (role, name), cases in itertools.groupby(every_case(), lambda case: case[:2]):
        lines.append(f"{role}; record: {name}")
        lines += [f"  {engine:24}  {said(plan)[0]}" for _, _, engine, _, plan in cases]
    assert_golden("swarm.table.txt", "\n".join(lines) + "\n")


def test_only_the_holder_of_the_intent_initialises_and_only_an_engine_in_no_swarm() -> None:
    found = [
        (role, name, engine)
        for role, name, engine, _, plan in every_case()
        if any(isinstance(change, InitSwarm) for change in plan.changes)
    ]
    assert found == [("server", "intent, mine, held", "inactive")]


def test_no_swarm_is_left_but_an_orphan_of_ours_or_one_that_was_never_joined() -> None:
    left = {
        engine
        for _, _, engine, _, plan in every_case()
        if any(isinstance(change, LeaveSwarm) for change in plan.changes)
    }
    assert left == {"orphan of ours, bare", "pending, never joined"}


def test_nobody_joins_before_it_is_published_or_from_within_a_swarm() -> None:
    joined = {
        (role, name, engine)
        for role, name, engine, _, plan in every_case()
        if any(isinstance(change, JoinSwarm) for change in plan.changes)
    }
    published = {name for name in RECORDS if name.startswith("published")}
    assert joined == {("worker", name, "inactive") for name in published}


def test_a_held_claim_of_another_is_never_taken_over() -> None:
    takers = {
        name
        for _, name, _, _, plan in every_case()
        for change in plan.changes
        if isinstance(change, TakeLock) and change.key == KEYS.state
    }
    assert "intent, other's, held" not in takers
    assert "initialised, other's, held" not in takers
    assert "intent, other's, lapsed" in takers


def test_a_worker_never_writes_the_record() -> None:
    kinds = {
        type(change)
        for role, _, _, _, plan in every_case()
        for change in plan.changes
        if role == "worker"
    }
    assert {kind.__name__ for kind in kinds} <= {"LeaveSwarm", "JoinSwarm", "ReleaseLock"}


NOT_OURS = [
    f"block Consul's key {KEYS.state} does not hold a record of ours",
    f"fix consul kv get {KEYS.state}; if nobody needs it: consul kv delete {KEYS.state}",
]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param("hello", id="words"),
        pytest.param("7", id="number"),
        pytest.param("null", id="null"),
        pytest.param("[]", id="list"),
        pytest.param('"intent"', id="string"),
        pytest.param("{}", id="no-keys"),
        pytest.param('{"phase": "intent"}', id="of-nobody"),
        pytest.param(
            '{"phase": "retired", "node": "server12", "swarm_id": "swarm-cluster"}',
            id="phase-of-a-later-version",
        ),
        pytest.param('{"phase": "published", "node": "server12"}', id="published-without-a-swarm"),
        pytest.param('{"phase": ["intent"], "node": "server12"}', id="phase-a-list"),
    ],
)
@pytest.mark.parametrize("engine", ["inactive", "orphan of ours, bare", "the cluster's, manager"])
def test_a_record_that_is_not_ours_blocks(value: str, engine: str) -> None:
    seen = replace(seen_with("no record", engine), entries={KEYS.state: Entry(value, 3)})
    assert said(swarm.diff(SERVER, seen)) == NOT_OURS


PUBLISHED = seen_with("published, other's", "inactive")
MEMBER = seen_with("published, other's", "the cluster's, manager")


def holding(seen: Seen, holder: str, *, held: bool = True) -> Seen:
    lock = Entry(holder, 9, "session-9" if held else "")
    return replace(seen, entries={**seen.entries, KEYS.join_lock: lock})


def without(seen: Seen, key: str) -> Seen:
    return replace(seen, entries={k: v for k, v in seen.entries.items() if k != key})


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        pytest.param(
            SERVER, PUBLISHED, ["do take the managers' join lock"], id="manager-joins-under-a-lock"
        ),
        pytest.param(
            SERVER, holding(PUBLISHED, ME),
            ["do join the cluster's Swarm as manager through 10.10.0.12:2377"], id="lock-is-mine",
        ),
        pytest.param(
            SERVER, holding(PUBLISHED, "server13"),
            ["wait server13 to finish joining the Swarm as manager"], id="lock-is-another's",
        ),
        pytest.param(
            SERVER, holding(PUBLISHED, "server13", held=False),
            ["do take the managers' join lock"], id="lock-freed-itself",
        ),
        pytest.param(
            SERVER, holding(PUBLISHED, ME, held=False),
            ["do take the managers' join lock"], id="my-own-lock-freed-itself",
        ),
        pytest.param(
            SERVER, holding(MEMBER, ME),
            ["do release nodeagent/demo/swarm/manager-join"], id="joined-and-killed-with-the-lock",
        ),
        pytest.param(
            SERVER, holding(MEMBER, "server13"), ["done manager in Swarm swarm-cluster"],
            id="joined-and-another-joins-now",
        ),
        pytest.param(
            SERVER, seen_with("published, mine, held", "the cluster's, manager"),
            ["do release nodeagent/demo/swarm/state"], id="published-and-still-held",
        ),
        pytest.param(
            WORKER, PUBLISHED, ["do join the cluster's Swarm as worker through 10.10.0.12:2377"],
            id="worker-joins-through-the-healthy-manager",
        ),
        pytest.param(
            WORKER,
            replace(PUBLISHED, managers={"10.10.0.13:2377": False, "10.10.0.12:2377": False}),
            ["do join the cluster's Swarm as worker through 10.10.0.12:2377 or 10.10.0.13:2377"],
            id="no-manager-passes-so-each-is-tried",
        ),
        pytest.param(
            WORKER, replace(PUBLISHED, managers={}),
            ["wait a Swarm manager to be registered in Consul"], id="no-manager-registered",
        ),
        pytest.param(
            SERVER, replace(PUBLISHED, managers={"10.10.0.11:2377": True}),
            ["wait a Swarm manager to be registered in Consul"], id="never-through-itself",
        ),
        pytest.param(
            WORKER, without(PUBLISHED, KEYS.worker_entry),
            ["wait a server to initialise the cluster's Swarm"], id="token-of-workers-missing",
        ),
        pytest.param(
            SERVER, without(PUBLISHED, KEYS.manager_token),
            ["wait the cluster's join token in Consul"], id="token-of-managers-missing",
        ),
        pytest.param(
            SERVER, seen_with("published, other's", "the cluster's, worker"),
            ["block this node is a worker in the Swarm, and /etc/nodeagent/node.yaml says server",
             "fix on a manager: docker node promote server11"],
            id="demoted-by-hand",
        ),
        pytest.param(
            WORKER, MEMBER,
            ["block this node is a manager in the Swarm, and /etc/nodeagent/node.yaml says worker",
             "fix on a manager: docker node demote server11"],
            id="promoted-by-hand",
        ),
        pytest.param(
            SERVER, seen_with("published, other's", "another Swarm"),
            ["block this Engine is in another Swarm (swarm-foreign); this cluster is swarm-cluster",
             "fix if nobody needs that one: docker swarm leave --force"],
            id="in-another-swarm",
        ),
        pytest.param(
            SERVER, seen_with("no record", "another Swarm"),
            ["block this Engine is in another Swarm (swarm-foreign); this cluster has no Swarm yet",
             "fix if nobody needs that one: docker swarm leave --force"],
            id="in-another-swarm-before-there-is-one",
        ),
        pytest.param(
            SERVER, seen_with("published, other's", "orphan of ours, bare"),
            ["do leave this Engine's Swarm: it is left over from an interrupted start, "
             "alone and never published"],
            id="superseded-initialiser-comes-back",
        ),
        pytest.param(
            SERVER, seen_with("published, other's", "with our label, in use"),
            ["block this Engine is in another Swarm (swarm-orphan); this cluster is swarm-cluster",
             "fix if nobody needs that one: docker swarm leave --force"],
            id="orphan-that-somebody-uses-is-not-left",
        ),
        pytest.param(
            SERVER, seen_with("published, other's", "error"),
            ["block the Engine's Swarm state is error: certificate has expired",
             "fix docker info; then docker swarm unlock, "
             "or docker swarm leave --force to join afresh"],
            id="certificate-expired",
        ),
        pytest.param(
            SERVER,
            replace(MEMBER, swarm=replace(
                ENGINES["the cluster's, manager"][0] or SwarmInfo(),
                error="The swarm does not have a leader")),
            ["wait the Swarm: The swarm does not have a leader"], id="managers-without-quorum",
        ),
        pytest.param(
            SERVER, seen_with("no record", "pending, of the cluster"),
            ["wait the Engine to reach its Swarm's managers"],
            id="record-lost-while-the-engine-still-looks-for-its-managers",
        ),
        pytest.param(
            SERVER, seen_with("initialised, mine, held", "pending, of the cluster"),
            ["wait the Engine to reach its Swarm's managers"],
            id="killed-after-init-and-the-engine-starts-again",
        ),
        pytest.param(
            SERVER, seen_with("initialised, mine, lapsed", "orphan of ours, bare"),
            ["do publish the Swarm's join tokens to the cluster"], id="killed-before-publishing",
        ),
        pytest.param(
            SERVER, seen_with("intent, mine, held", "orphan of ours, bare"),
            ["do record the Swarm's id"], id="killed-after-init",
        ),
        pytest.param(
            SERVER, seen_with("intent, mine, lapsed", "inactive"),
            ["do claim the cluster's swarm init again"], id="killed-with-the-claim",
        ),
        pytest.param(
            SERVER, seen_with("initialised, other's, lapsed", "inactive"),
            ["do take over swarm init from server12, which is gone"], id="initialiser-gone",
        ),
    ],
)  # fmt: skip
def test_plan(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(swarm.diff(spec, seen)) == plan
