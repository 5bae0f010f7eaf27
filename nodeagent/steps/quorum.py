"""The cluster's Consul has a quorum: SRV names a majority, a leader exists, and reads work."""

from __future__ import annotations

from dataclasses import dataclass

from nodeagent.address import cluster_address
from nodeagent.changes import JoinConsul
from nodeagent.host import Host, Member
from nodeagent.plan import Plan, Step, change, done, wait
from nodeagent.spec import Spec
from nodeagent.steps.consul import is_name


@dataclass(frozen=True)
class Seen:
    address: str
    leader: str
    members: tuple[Member, ...]
    servers_by_srv: tuple[str, ...] = ()
    join_addresses: tuple[str, ...] = ()  # where `join` says the servers are
    unresolved: tuple[str, ...] = ()


def observe(spec: Spec, host: Host) -> Seen:
    address = cluster_address(spec.address, host.network.interfaces())
    leader = host.consul.leader()
    members = host.consul.members()
    if leader:
        # SRV records are answered from stale state too, so they count only beside a leader and a
        # read that went through it.
        host.consul.get(spec.key_prefix)
        srv = host.resolver.consul_servers(spec.domain)
        return Seen(address, leader, members, servers_by_srv=srv)
    found: list[str] = []
    unresolved: list[str] = []
    for entry in spec.join:
        if not entry.startswith("provider="):
            addresses = host.resolver.addresses(entry) if is_name(entry) else (entry,)
            found += addresses
            if not addresses:
                unresolved.append(entry)
    distinct = tuple(dict.fromkeys(found))
    return Seen(address, "", members, join_addresses=distinct, unresolved=tuple(unresolved))


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.leader:
        named = len(seen.servers_by_srv)
        if named < spec.majority:
            return wait(
                f"DNS to name a majority of the servers: consul.service.{spec.domain} has "
                f"{named} of {spec.servers}"
            )
        return done(f"{named} of {spec.servers} servers, leader {seen.leader.partition(':')[0]}")
    alive = {member.address for member in seen.members if member.alive and member.server}
    known = alive | {member.address for member in seen.members if member.alive} | {seen.address}
    missing = tuple(address for address in seen.join_addresses if address not in known)
    by_name = [entry for entry in spec.join if is_name(entry)]
    if missing and by_name:
        return change(JoinConsul(missing))
    if seen.unresolved and len(alive) < spec.majority:
        return wait(f"a DNS answer for {', '.join(seen.unresolved)}, given as join in the spec")
    tail = f"; not seen: {', '.join(missing)}" if missing else ""
    if len(alive) >= spec.servers:
        return wait(f"Consul to elect a leader among {len(alive)} servers")
    return wait(f"Consul's quorum: {len(alive)} of {spec.servers} servers are alive{tail}")


STEP = Step("quorum", requires=("consul",), observe=observe, diff=diff)
