"""Names below Consul's domain resolve on this machine and in its containers, others as before.

This machine has an address for DNS of its own, the same on every node, which containers reach
through any network. Where the machine's programs ask systemd-resolved, that listens there too, and
sends the domain to Consul. Elsewhere Consul itself answers there, refuses other names, for which
everybody then asks the next server, and is the first server in resolv.conf.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent import paths
from nodeagent.address import cluster_address
from nodeagent.changes import (
    KEEP_MODE,
    Change,
    DisableUnit,
    EnableUnit,
    RemoveFile,
    RestartUnit,
    StartUnit,
    WriteFile,
)
from nodeagent.host import Host, Listener, Rule, Unit
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec

ADDRESS = "169.254.53.53"  # link-local: nobody's on the network, and no router passes it on
INTERFACE = "nodeagent0"
PORT = 53
RULE = 102  # after the guard's

RESOLV_CONF = Path("/etc/resolv.conf")
NSSWITCH = Path("/etc/nsswitch.conf")
# Here from systemd-resolved's first start since boot, also while it is restarted.
STUB = Path("/run/systemd/resolve/stub-resolv.conf")
DROP_IN = Path("/etc/systemd/resolved.conf.d/nodeagent.conf")
DROP_IN_TEXT = f"""\
# Put here by nodeagent, which overwrites it: containers ask systemd-resolved on this address.
[Resolve]
DNSStubListenerExtra={ADDRESS}
"""
RESOLVED = "systemd-resolved.service"
RESOLVED_USER = "systemd-resolve"
STUBS = ("127.0.0.53", "127.0.0.54")  # systemd-resolved.service(8)

LINE = f"nameserver {ADDRESS}\n"
# What of resolv.conf is read, by glibc and by programs that do as it does (resolv.conf(5), MAXNS).
MOST_SERVERS = 3
# Docker's own, for containers of a machine whose servers are all on its loopback interface
# (moby libnetwork/resolvconf, defaultIPv4Dns).
DOCKERS_OWN = ("8.8.8.8", "8.8.4.4")


@dataclass(frozen=True)
class Seen:
    unit: Unit
    is_resolved: bool  # the machine's programs ask systemd-resolved
    resolv_conf: str | None = field(repr=False)
    homes: tuple[str, ...]  # interfaces that have the address
    listeners: tuple[Listener, ...]  # all on port 53, wherever
    peers: tuple[str, ...] = ()  # networks where other machines are, as NETWORK@INTERFACE
    unfiltered: tuple[str, ...] = ()  # those of their interfaces that take what has no way back
    rules: tuple[Rule, ...] = ()
    environment: str | None = None  # of the unit
    drop_in: str | None = None
    restart_pending: str | None = None
    resolved: Unit = Unit("not-found", "inactive")
    routed: tuple[str, ...] = ()  # domains that systemd-resolved sends to Consul
    journal: tuple[str, ...] = ()


def observe(spec: Spec, host: Host) -> Seen:
    unit = host.systemd.unit(paths.DNS_UNIT)
    is_resolved, drop_in = uses_resolved(host), host.files.read(DROP_IN)
    listeners = host.network.listeners(PORT)
    is_involved = is_resolved or drop_in is not None or _RESOLVED in listeners
    resolved = host.systemd.unit(RESOLVED) if is_involved else Unit("not-found", "inactive")
    return Seen(
        unit=unit,
        is_resolved=is_resolved,
        resolv_conf=host.files.read(RESOLV_CONF),
        homes=_homes(host),
        listeners=listeners,
        peers=(peers := _peers(spec, host)),
        unfiltered=_unfiltered(peers, host),
        rules=host.network.rules(),
        environment=host.files.read(paths.DNS_ENVIRONMENT),
        drop_in=drop_in,
        restart_pending=host.files.read(paths.RESOLVED_RESTART_PENDING),
        resolved=resolved,
        routed=host.resolver.routed(INTERFACE) if is_resolved and resolved.is_active else (),
        journal=host.systemd.last_lines(paths.DNS_UNIT, 5) if unit.has_failed else (),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if trouble := _trouble(seen):
        return trouble
    environment = f'PEERS="{" ".join(seen.peers)}"\n'
    if seen.is_resolved:
        environment += f"DOMAIN={spec.domain}\n"
    if seen.environment != environment:
        return change(WriteFile(paths.DNS_ENVIRONMENT, environment, 0o600))
    if seen.unit.enabled == "disabled":
        return change(EnableUnit(paths.DNS_UNIT))
    if seen.unit.active == "inactive":
        return change(StartUnit(paths.DNS_UNIT))
    if not seen.unit.is_active:
        return wait(f"{paths.DNS_UNIT} to start")
    if INTERFACE not in seen.homes:
        return change(RestartUnit(paths.DNS_UNIT, f"{ADDRESS} is gone"))
    rules = {each for each in seen.rules if each.priority == RULE}
    if rules != _rules(seen.peers) or seen.unfiltered:
        return change(RestartUnit(paths.DNS_UNIT, "other machines could ask there"))
    return _through_resolved(spec, seen) if seen.is_resolved else _through_consul(spec, seen)


def _trouble(seen: Seen) -> Plan | None:
    """What only a human can mend."""
    if others := [name for name in seen.homes if name != INTERFACE]:
        return block(
            f"{ADDRESS} is this machine's address on {others[0]} already",
            fix=f"give {others[0]} another address",
        )
    if strangers := set(_takers(seen.listeners)) - {_CONSUL, _RESOLVED}:
        held = ", ".join(
            sorted(f"{each.address} by a program of {each.user}" for each in strangers)
        )
        return block(
            f"port {PORT} of {ADDRESS} is taken: {held}",
            fix="have it listen on the addresses alone where it is needed; "
            f"ss -lnup 'sport = {PORT}' names it",
        )
    if seen.unit.load == "masked":
        return block(f"{paths.DNS_UNIT} is masked", fix=f"systemctl unmask {paths.DNS_UNIT}")
    if not seen.unit.exists:
        return block(f"{paths.DNS_UNIT} is not installed", fix="nodeagent install")
    if seen.unit.has_failed:
        words = f": {seen.journal[-1]}" if seen.journal else ""
        return block(f"{paths.DNS_UNIT} fails{words}", fix=f"journalctl -u {paths.DNS_UNIT}")
    if not seen.is_resolved and not _servers(seen.resolv_conf):
        what = "is missing or leads nowhere" if seen.resolv_conf is None else "names no server"
        return block(
            f"{RESOLV_CONF} {what}, so there is nobody to ask for names outside the cluster",
            fix=f"a line such as `nameserver 1.1.1.1` in {RESOLV_CONF}, as a plain file",
        )
    return None


def _through_resolved(spec: Spec, seen: Seen) -> Plan:
    if not seen.resolved.is_active:
        if seen.resolved.active == "activating":
            return wait(f"{RESOLVED} to start")
        return block(
            f"{RESOLVED} does not run, although this machine's programs ask it for names",
            fix=f"systemctl restart {RESOLVED}",
        )
    if seen.drop_in != DROP_IN_TEXT:
        return change(
            WriteFile(paths.RESOLVED_RESTART_PENDING, seen.resolved.invocation, 0o600),
            WriteFile(DROP_IN, DROP_IN_TEXT, 0o644),
        )
    if _RESOLVED not in seen.listeners:
        if _CONSUL in seen.listeners:
            return wait(f"Consul to leave port {PORT} of {ADDRESS} to {RESOLVED}")
        if seen.restart_pending == seen.resolved.invocation:
            return change(RestartUnit(RESOLVED, f"{DROP_IN} changed"))
        return block(
            f"{RESOLVED} does not listen on {ADDRESS}, although {DROP_IN} says so",
            fix=f"journalctl -u {RESOLVED}; then systemctl restart {RESOLVED}",
        )
    if seen.restart_pending is not None:
        return change(RemoveFile(paths.RESOLVED_RESTART_PENDING))
    if spec.domain not in seen.routed:
        return change(RestartUnit(paths.DNS_UNIT, f"{RESOLVED} was not told of {spec.domain}"))
    return done(
        f"names under {spec.domain} resolve through systemd-resolved, for containers on {ADDRESS}"
    )


def _through_consul(spec: Spec, seen: Seen) -> Plan:
    if leaving := _leave_resolved(seen):
        return change(*leaving)
    text = seen.resolv_conf or ""
    if text != (wanted := with_line(text)):
        return change(WriteFile(RESOLV_CONF, wanted, KEEP_MODE))
    upstreams = _servers(without_line(text))
    unread = upstreams[MOST_SERVERS - 1 :]
    tail = f"; {', '.join(unread)} is one too many to be asked" if unread else ""
    if not _reachable(upstreams):
        tail += "; containers ask Docker's own for others, as none here is theirs to reach"
    return done(f"names under {spec.domain} resolve through Consul on {ADDRESS}{tail}")


def undo(_spec: Spec, seen: Seen) -> Plan:
    """Leave nothing of this, to the byte."""
    text = seen.resolv_conf
    if text is not None and text != without_line(text):
        return change(WriteFile(RESOLV_CONF, without_line(text), KEEP_MODE))
    if leaving := _leave_resolved(seen):
        return change(*leaving)
    if seen.unit.exists and (seen.unit.enabled == "enabled" or seen.unit.active != "inactive"):
        return change(DisableUnit(paths.DNS_UNIT))
    for path, found in (
        (paths.DNS_ENVIRONMENT, seen.environment),
        (paths.RESOLVED_RESTART_PENDING, seen.restart_pending),
    ):
        if found is not None:
            return change(RemoveFile(path))
    return done("names resolve as without nodeagent")


def _leave_resolved(seen: Seen) -> list[Change]:
    if seen.drop_in is not None:
        return [RemoveFile(DROP_IN)]
    if _RESOLVED in seen.listeners:
        return [RestartUnit(RESOLVED, f"{DROP_IN} is gone")]
    return []


def uses_resolved(host: Host) -> bool:
    """Whether the machine's programs ask systemd-resolved, be it on its way down and up again."""
    if not host.files.exists(STUB):
        return False
    hosts = re.search(r"^hosts:.*", host.files.read(NSSWITCH) or "", re.MULTILINE)
    through_libc = hosts is not None and "resolve" in hosts[0].split()
    return through_libc or any(each in STUBS for each in _servers(host.files.read(RESOLV_CONF)))


def is_consuls(host: Host) -> bool:
    """Whether Consul is to answer on the address itself.

    Not where it would not start for it: a cluster without names is better than none.
    """
    if uses_resolved(host) or _homes(host) != (INTERFACE,):
        return False
    return set(_takers(host.network.listeners(PORT))) <= {_CONSUL}


def servers(host: Host) -> tuple[str, ...]:
    """The addresses that containers ask, in this order: the Engine's option `dns`."""
    return container_servers(uses_resolved(host), host.files.read(RESOLV_CONF))


def container_servers(is_resolved: bool, resolv_conf: str | None) -> tuple[str, ...]:
    if is_resolved:
        return (ADDRESS,)
    found = _reachable(_servers(without_line(resolv_conf or "")))
    return (ADDRESS, *(found or DOCKERS_OWN)[: MOST_SERVERS - 1])


def with_line(text: str) -> str:
    """resolv.conf with Consul as its first server."""
    return re.sub(_NAMESERVER, lambda first: LINE + first[0], without_line(text), count=1)


def without_line(text: str) -> str:
    """resolv.conf as others have written it, to the byte."""
    return "".join(line for line in text.splitlines(keepends=True) if line != LINE)


# As glibc reads it: the word begins the line.
_NAMESERVER = re.compile(r"^nameserver[ \t]+([^\s;#]+)", re.MULTILINE)


def _servers(text: str | None) -> tuple[str, ...]:
    """The servers that resolv.conf names beside ours."""
    return tuple(each for each in _NAMESERVER.findall(text or "") if each != ADDRESS)


def _reachable(found: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the servers that a container reaches, which has no IPv6 by default."""
    return tuple(each for each in found if _is_address(each) and not each.startswith("127."))


def _is_address(text: str) -> bool:
    try:
        return int(ipaddress.IPv4Address(text)) != 0  # which stands for the machine itself
    except ValueError:
        return False


def _peers(spec: Spec, host: Host) -> tuple[str, ...]:
    interfaces = host.network.interfaces()
    own, uplinks = cluster_address(spec.address, interfaces), host.network.uplinks()
    networks = {
        # Without the label of a second address, such as eth0:1.
        (ipaddress.IPv4Interface(each.address).network, each.name.partition(":")[0])
        for each in interfaces
        if each.name.partition(":")[0] in uplinks or each.address.partition("/")[0] == own
    }
    return tuple(f"{each}@{name}" for each, name in sorted(networks) if each.prefixlen < 32)


def _unfiltered(peers: tuple[str, ...], host: Host) -> tuple[str, ...]:
    def is_off(name: str) -> bool:
        return (host.files.read(_SETTINGS / name / "rp_filter") or "").strip() == "0"

    names = dict.fromkeys(each.partition("@")[2] for each in peers)
    return tuple(name for name in names if is_off(name) and is_off("all"))


_SETTINGS = Path("/proc/sys/net/ipv4/conf")


def _rules(peers: tuple[str, ...]) -> set[Rule]:
    """What the unit puts up, as the kernel tells of it."""
    ends = {tuple(each.partition("@")[0].split("/")) for each in peers}
    return {
        Rule(RULE, frozenset({f"src {ADDRESS}", f"dst {to}", f"dstlen {bits}"}), "prohibit")
        for to, bits in ends
    }


def _homes(host: Host) -> tuple[str, ...]:
    return tuple(
        each.name for each in host.network.interfaces() if each.address.partition("/")[0] == ADDRESS
    )


def _takers(listeners: tuple[Listener, ...]) -> tuple[Listener, ...]:
    """Who has the port on our address, by itself or with all others."""
    return tuple(each for each in listeners if each.address in (ADDRESS, "0.0.0.0", "::"))


# In its container or not; what else is root's has not asked for this very address.
_CONSUL = Listener(ADDRESS, "root")
_RESOLVED = Listener(ADDRESS, RESOLVED_USER)

STEP = Step("dns", requires=("identity",), observe=observe, diff=diff, undo=undo)
