"""The cluster's Consul has a quorum: SRV names a majority, a leader exists, and reads work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nodeagent import paths
from nodeagent.address import cluster_address
from nodeagent.changes import Change, DeleteToken, JoinConsul, PutPolicy, PutToken
from nodeagent.errors import HostError
from nodeagent.host import Host, Member, Token
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.secrets import ServerSecrets
from nodeagent.spec import Spec
from nodeagent.steps import access
from nodeagent.steps.consul import is_name
from nodeagent.steps.secrets import read, server_names


@dataclass(frozen=True)
class Access:
    """A server's view of Consul's ACL system, and what it should be."""

    policies: Mapping[str, str]  # the digest by name
    tokens: Mapping[str, Token]
    wanted: tuple[Token, ...]
    stale: tuple[Token, ...]


@dataclass(frozen=True)
class Seen:
    address: str
    leader: str
    members: tuple[Member, ...]
    servers_by_srv: tuple[str, ...] = ()
    join_addresses: tuple[str, ...] = ()  # where `join` says the servers are
    unresolved: tuple[str, ...] = ()
    is_known: bool | None = True  # Consul has the token that this node shows; None: not yet said
    access: Access | None = None  # on a secured cluster's servers, once there is a leader
    voters: tuple[str, ...] | None = None  # asked for when more call themselves servers
    trouble: str = ""  # of this node's keys with those of the others


def observe(spec: Spec, host: Host) -> Seen:
    address = cluster_address(spec.address, host.network.interfaces())
    members = host.consul.members()
    try:
        leader = host.consul.leader()
    except HostError:
        if trouble := _refusal(spec, host, address, members, ()):
            return Seen(address, "", members, trouble=trouble)
        raise
    if leader:
        return _led(spec, host, Seen(address, leader, members))
    found: list[str] = []
    unresolved: list[str] = []
    for entry in spec.join:
        if not entry.startswith("provider="):
            addresses = host.resolver.addresses(entry) if is_name(entry) else (entry,)
            found += addresses
            if not addresses:
                unresolved.append(entry)
    joins = tuple(dict.fromkeys(found))
    trouble = _refusal(spec, host, address, members, joins)
    return Seen(
        address,
        "",
        members,
        join_addresses=joins,
        unresolved=tuple(unresolved),
        trouble=trouble,
    )


def _led(spec: Spec, host: Host, seen: Seen) -> Seen:
    """What there is to see once there is a leader."""
    if spec.is_secured and spec.is_server:
        if not (known := host.consul.knows_token()):
            return replace(seen, is_known=known)
        servers = sum(member.server and member.alive for member in seen.members)
        voters = host.consul.voters() if servers > spec.servers else None
        seen = replace(seen, access=_access(spec, host), voters=voters)
    # In this order: the servers make the token that new workers show before they let everybody
    # see these records, and a token shown too early is remembered as unknown for half a minute
    # (Consul's acl.token_ttl).
    seen = replace(seen, servers_by_srv=host.resolver.consul_servers(spec.domain))
    if len(seen.servers_by_srv) < spec.majority:
        return seen
    if spec.is_secured and not spec.is_server and not (known := host.consul.knows_token()):
        return replace(seen, is_known=known)
    # SRV records are answered from stale state too, so they count only beside a leader and a
    # read that went through it.
    host.consul.get(spec.key_prefix)
    return seen


def _refusal(
    spec: Spec, host: Host, address: str, members: tuple[Member, ...], joins: tuple[str, ...]
) -> str:
    """Why this node and another cannot talk, where that is a matter of keys; else ""."""
    if not spec.is_secured:
        return ""
    others = [each for each in members if each.alive and each.address != address]
    if not others:
        places = [place for place in joins if place != address]
        # One in each round, in turn: who is not there takes a while to find out.
        place = places[int(host.clock.monotonic()) % len(places)] if places else ""
        if place and host.consul.knock(place):
            return (
                f"{place} does not understand this node: the gossip key that it uses, of "
                f"{paths.SECRETS}, is not the cluster's"
            )
        return ""
    servers = [each.address for each in others if each.server]
    if len(servers) + spec.is_server < spec.majority:
        return ""
    name = server_names(spec, "")[0]
    for place in servers:
        if words := host.consul.greet(place, name):
            return f"no encrypted connection to the server at {place}: {words}"
    return ""


def _access(spec: Spec, host: Host) -> Access:
    found = read(spec, host)[0].secrets
    assert isinstance(found, ServerSecrets)
    tokens = host.consul.tokens()
    return Access(
        host.consul.policies(),
        tokens,
        access.shared_tokens(spec, found, host.pki),
        tuple(access.stale(spec, found, host.pki, tokens)),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.trouble:
        return block(seen.trouble, fix=_BRING)
    if seen.leader:
        if seen.is_known is None:
            return wait("Consul to start its access rules")
        if not seen.is_known:
            return _unknown(spec)
        if seen.access is not None and (changes := _rules(spec, seen.access)):
            return change(*changes)
        named = sum(
            seen.voters is None or name.partition(".")[0] in seen.voters
            for name in seen.servers_by_srv
        )
        if named < spec.majority:
            return wait(
                f"DNS to name a majority of the servers: consul.service.{spec.domain} has "
                f"{named} of {spec.servers}"
            )
        return done(
            f"{named} of {spec.servers} servers, leader {seen.leader.partition(':')[0]}"
            f"{_pretenders(seen)}"
        )
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


def _pretenders(seen: Seen) -> str:
    """Members that call themselves servers; whoever has the gossip key can do that."""
    if seen.voters is None:
        return ""
    names = [each.name for each in seen.members if each.server and each.alive]
    false = [name for name in names if name not in seen.voters]
    return f"; calling themselves servers, without a vote: {', '.join(false)}" if false else ""


def _rules(spec: Spec, seen: Access) -> list[Change]:
    """What is missing of the cluster's access rules. What everybody may see comes last."""
    changes: list[Change] = [
        PutPolicy(policy)
        for policy in access.policies(spec)
        if seen.policies.get(policy.name) != policy.digest
    ]
    changes += [PutToken(token) for token in seen.wanted if token.accessor not in seen.tokens]
    changes += [DeleteToken(token.accessor, token.description) for token in seen.stale]
    anonymous = seen.tokens.get(access.ANONYMOUS)
    everybody = access.policies(spec)[0].name
    if anonymous is not None and everybody not in anonymous.policies:
        wanted = tuple(sorted({*anonymous.policies, everybody}))
        changes.append(PutToken(replace(anonymous, policies=wanted)))
    return changes


def _unknown(spec: Spec) -> Plan:
    if spec.is_server:
        return block(
            f"Consul does not know the server token that derives from {paths.SECRETS}: it was "
            "deleted, or the cluster was made with another cluster key",
            fix="compare with another server's file; if it is the same, restart Consul on the "
            "leader, which makes the token again",
        )
    return block(
        "Consul does not know the token that this node shows: it was deleted, the cluster was made "
        "anew, or the tokens were rotated since this node's user-data was made",
        fix=f"rm {paths.NODE_TOKEN}, and it asks for another; if that does not help, bring newer "
        "user-data",
    )


_BRING = (
    "compare the date here and there; if it is right, bring secrets.json of a server that is in "
    "the cluster (to a worker: newer user-data): nodeagent install --secrets FILE"
)

STEP = Step("quorum", requires=("consul",), observe=observe, diff=diff)
