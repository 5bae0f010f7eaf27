"""Consul's catalogue names this node, its Engine and, on servers, its Swarm manager; honestly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nodeagent import __version__
from nodeagent.address import cluster_address
from nodeagent.changes import Deregister, Register
from nodeagent.host import EngineInfo, Host, Service
from nodeagent.plan import Plan, Step, change, done, wait
from nodeagent.spec import Spec
from nodeagent.steps.swarm import MANAGER_PORT, MANAGER_SERVICE

NODE_SERVICE = "nodeagent"
ENGINE_SERVICE = "docker-engine"
VOUCHED = (NODE_SERVICE, ENGINE_SERVICE)  # whose checks the loop passes or fails
TTL_S = 90  # the loop vouches every 30 s or so; one late round is no alarm, three are


@dataclass(frozen=True)
class Seen:
    address: str
    engine: EngineInfo | None
    registered: Mapping[str, Service]


def observe(spec: Spec, host: Host) -> Seen:
    return Seen(
        address=cluster_address(spec.address, host.network.interfaces()),
        engine=host.engine.info(),
        registered=host.consul.services(),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.engine is None:
        return wait("docker.service to answer on its socket")
    services = wanted(spec, seen.address, seen.engine)
    missing = [Register(each) for each in services if seen.registered.get(each.id) != each]
    ids = {each.id for each in services}
    stale = [Deregister(id_) for id_ in sorted(seen.registered) if id_ not in ids]
    if missing or stale:
        return change(*missing, *stale)
    return done(f"registered: {', '.join(each.name for each in services)}")


def wanted(spec: Spec, address: str, engine: EngineInfo) -> tuple[Service, ...]:
    """The services of this node: of one whose process listens, the check connects to it."""
    node_id = engine.swarm.node_id
    node = Service(
        name=NODE_SERVICE,
        port=0,
        tags=(spec.role,),
        meta={"cluster": spec.cluster, "version": __version__, "swarm_node": node_id},
        ttl_s=TTL_S,
    )
    docker = Service(
        name=ENGINE_SERVICE,
        port=0,
        tags=(),
        meta={"version": engine.version},
        ttl_s=TTL_S,
    )
    if not spec.is_server:
        return node, docker
    manager = Service(
        name=MANAGER_SERVICE,
        port=MANAGER_PORT,
        tags=(),
        meta={"swarm": engine.swarm.cluster_id, "swarm_node": node_id},
        tcp=f"{address}:{MANAGER_PORT}",
    )
    return manager, node, docker


STEP = Step("services", requires=("swarm",), observe=observe, diff=diff)
