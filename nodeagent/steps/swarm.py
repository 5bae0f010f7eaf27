"""This Engine is a member of the cluster's one Swarm, in the role the spec gives it.

The cluster's record in Consul decides which Swarm that is: `intent` (a server says it will
initialise, under a session), `initialised` (with the Swarm's id), `published` (with the join
tokens, in one transaction). Every transition is a compare-and-set, so of any number of servers
that try, one wins. What a loser or an interrupted winner has made by then is a Swarm with our
label, alone and bare; it is left. Once published, the Swarm's id never changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from nodeagent import paths
from nodeagent.address import cluster_address
from nodeagent.changes import (
    CLUSTER_LABEL,
    InitSwarm,
    JoinSwarm,
    LeaveSwarm,
    PublishSwarm,
    ReleaseLock,
    TakeLock,
    UpdateRecord,
)
from nodeagent.errors import Secret
from nodeagent.host import Entry, Host, SwarmInfo
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec

MANAGER_SERVICE = "swarm-manager"
MANAGER_PORT = 2377  # https://docs.docker.com/engine/swarm/swarm-tutorial/#open-protocols-and-ports-between-the-hosts

Phase = Literal["intent", "initialised", "published"]


@dataclass(frozen=True)
class Record:
    """The cluster's record: how far the one `swarm init` of its life has come, and by whom."""

    phase: Phase
    node: str
    swarm_id: str
    entry: Entry
    worker_token: Secret = Secret("")

    @classmethod
    def parse(cls, entry: Entry | None) -> Record | None:
        """Raises ValueError when the record is not one of ours."""
        if entry is None:
            return None
        data = json.loads(entry.value)
        phase, node, swarm_id = data["phase"], data["node"], data.get("swarm_id", "")
        record = cls(phase, node, swarm_id, entry, Secret(str(data.get("token", ""))))
        if record.phase not in get_args(Phase) or (record.phase != "intent") != bool(
            record.swarm_id
        ):
            raise ValueError(entry.value)
        return record


@dataclass(frozen=True)
class Keys:
    """Where the record stands in Consul."""

    state: str
    worker_entry: str  # all that workers can read of it: the state, and their join token
    manager_token: str
    join_lock: str

    @classmethod
    def of(cls, spec: Spec) -> Keys:
        prefix = f"{spec.key_prefix}swarm/"
        return cls(
            f"{prefix}state",
            f"{spec.key_prefix}worker/swarm",
            f"{prefix}manager-token",
            f"{prefix}manager-join",
        )


@dataclass(frozen=True)
class Seen:
    node: str
    address: str
    swarm: SwarmInfo | None  # None: the Engine does not answer
    entries: Mapping[str, Entry]
    managers: Mapping[str, bool]  # ip:port of those in Consul's catalogue, and whether healthy
    is_bare: bool = False  # this Engine's Swarm has nobody and nothing but itself


def observe(spec: Spec, host: Host) -> Seen:
    info = host.engine.info()
    swarm = info.swarm if info else None
    alone = swarm is not None and swarm.state == "active" and swarm.nodes == 1
    part = "swarm/" if spec.is_server else "worker/"
    entries = host.consul.get(f"{spec.key_prefix}{part}")
    return Seen(
        node=host.network.hostname(),
        address=cluster_address(spec.address, host.network.interfaces()),
        swarm=swarm,
        entries=entries,
        managers=host.consul.instances(MANAGER_SERVICE),
        is_bare=alone and host.engine.swarm_is_bare(),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.swarm is None:
        return wait("docker.service to answer on its socket")
    keys = Keys.of(spec)
    place = keys.state if spec.is_server else keys.worker_entry
    try:
        record = Record.parse(seen.entries.get(place))
    except (ValueError, KeyError, TypeError):
        return block(
            f"Consul's key {place} does not hold a record of ours",
            fix=f"consul kv get {place}; if nobody needs it: consul kv delete {place}",
        )
    if seen.swarm.state in ("locked", "error"):
        words = f": {seen.swarm.error}" if seen.swarm.error else ""
        return block(f"the Engine's Swarm state is {seen.swarm.state}{words}", fix=_CURE_STATE)
    if seen.swarm.state == "pending" and not seen.swarm.cluster_id:
        return change(LeaveSwarm("an earlier join to it never ended"))
    if record is not None and record.phase == "published":
        return _member(spec, seen, seen.swarm, record, keys)
    if seen.swarm.state == "pending":
        return wait("the Engine to reach its Swarm's managers")
    if seen.swarm.state == "active" and not _is_ours(spec, seen):
        return _other_swarm(seen.swarm, "has no Swarm yet")
    if not spec.is_server:
        if seen.swarm.state == "active":
            return change(LeaveSwarm(_ORPHAN))
        return wait("a server to initialise the cluster's Swarm")
    return _initialise(spec, seen, seen.swarm, record, keys)


def _initialise(
    spec: Spec, seen: Seen, swarm: SwarmInfo, record: Record | None, keys: Keys
) -> Plan:
    """Bring the record forward by one transition, if it is this server's turn."""
    claim = json.dumps({"phase": "intent", "node": seen.node})
    if record is None:
        return change(TakeLock(keys.state, claim, 0, "claim the cluster's one swarm init"))
    index, held = record.entry.index, bool(record.entry.session)
    if record.node != seen.node:
        if held:
            return wait(f"{record.node} to initialise the cluster's Swarm")
        why = f"take over swarm init from {record.node}, which is gone"
        return change(TakeLock(keys.state, claim, index, why))
    if swarm.state != "active":
        if record.phase == "intent" and held:
            return change(InitSwarm(seen.address, spec.cluster, record.entry.session))
        return change(TakeLock(keys.state, claim, index, "claim the cluster's swarm init again"))
    found = {"node": seen.node, "swarm_id": swarm.cluster_id}
    if record.swarm_id != swarm.cluster_id:
        value = json.dumps({"phase": "initialised", **found})
        return change(UpdateRecord(keys.state, value, index, "record the Swarm's id"))
    value = json.dumps({"phase": "published", **found})
    return change(PublishSwarm(keys.state, value, index, keys.worker_entry, keys.manager_token))


def _member(spec: Spec, seen: Seen, swarm: SwarmInfo, record: Record, keys: Keys) -> Plan:
    """The Swarm is known: be in it, and in no other."""
    if swarm.state == "inactive":
        return _join(spec, seen, keys, record)
    if swarm.cluster_id and swarm.cluster_id != record.swarm_id:
        if _is_ours(spec, seen):
            return change(LeaveSwarm(_ORPHAN))
        return _other_swarm(swarm, f"is {record.swarm_id}")
    if swarm.state != "active":
        return wait("the Engine to reach its Swarm's managers")
    if swarm.is_manager != spec.is_server:
        verb = "promote" if spec.is_server else "demote"
        return block(
            f"this node is a {'manager' if swarm.is_manager else 'worker'} in the Swarm, "
            f"and {paths.SPEC} says {spec.role}",
            fix=f"on a manager: docker node {verb} {seen.node}",
        )
    if swarm.error:
        return wait(f"the Swarm: {swarm.error}")
    lock = _own_lock(seen, keys.join_lock)
    if lock:
        return change(ReleaseLock(keys.join_lock, lock))
    if record.node == seen.node and record.entry.session:
        return change(ReleaseLock(keys.state, record.entry.session))
    return done(f"{'manager' if swarm.is_manager else 'worker'} in Swarm {record.swarm_id}")


def _join(spec: Spec, seen: Seen, keys: Keys, record: Record) -> Plan:
    token = seen.entries.get(keys.manager_token)
    if spec.is_server and token is None:
        return wait("the cluster's join token in Consul")
    managers = _candidates(seen)
    if not managers:
        return wait("a Swarm manager to be registered in Consul")
    if not spec.is_server:
        return change(JoinSwarm(seen.address, managers, "worker", record.worker_token))
    # Managers join one at a time: each join changes the size of the managers' quorum.
    lock = _own_lock(seen, keys.join_lock)
    if not lock:
        entry = seen.entries.get(keys.join_lock)
        if entry is not None and entry.session:
            return wait(f"{entry.value} to finish joining the Swarm as manager")
        index = entry.index if entry else 0
        return change(TakeLock(keys.join_lock, seen.node, index, "take the managers' join lock"))
    assert token is not None
    return change(JoinSwarm(seen.address, managers, "manager", Secret(token.value), lock))


def _candidates(seen: Seen) -> tuple[str, ...]:
    """Managers to join through: those whose checks pass, or else all that are catalogued."""
    others = [each for each in sorted(seen.managers) if each != f"{seen.address}:{MANAGER_PORT}"]
    return tuple(each for each in others if seen.managers[each]) or tuple(others)


def _own_lock(seen: Seen, key: str) -> str:
    """The session under which this node holds `key`, in this or an earlier life; or nothing."""
    entry = seen.entries.get(key)
    return entry.session if entry is not None and entry.value == seen.node else ""


def _is_ours(spec: Spec, seen: Seen) -> bool:
    """Whether this Engine's Swarm is one that an agent of this cluster made and nobody uses."""
    return (
        seen.swarm is not None
        and seen.swarm.labels.get(CLUSTER_LABEL) == spec.cluster
        and seen.is_bare
    )


def _other_swarm(swarm: SwarmInfo, ours: str) -> Plan:
    return block(
        f"this Engine is in another Swarm ({swarm.cluster_id or 'id unknown'}); "
        f"this cluster {ours}",
        fix="if nobody needs that one: docker swarm leave --force",
    )


_ORPHAN = "it is left over from an interrupted start, alone and never published"
_CURE_STATE = "docker info; then docker swarm unlock, or docker swarm leave --force to join afresh"

STEP = Step("swarm", requires=("engine", "access", "guard"), observe=observe, diff=diff)
