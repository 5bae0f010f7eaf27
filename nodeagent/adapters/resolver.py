"""DNS, asked over TCP where more than three answers matter.

dnspython is imported when it is first needed: by then Consul has been started, and the time the
import takes is spent while Consul elects a leader.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from nodeagent.adapters.program import run
from nodeagent.errors import HostError

if TYPE_CHECKING:
    import dns.resolver

LIFETIME_S = 3.0
CONSUL = ("127.0.0.1", 8600)
# Where there is no systemd-resolved, Consul answers there instead; see steps/dns.py.
CONSUL_IN_PUBLIC = ("169.254.53.53", 53)
_ASKED = ("get-property", "org.freedesktop.resolve1", "/org/freedesktop/resolve1")


class DnsResolver:
    """The host's resolver, and the local Consul's DNS."""

    def __init__(self, *, resolv_conf: str = "/etc/resolv.conf") -> None:
        self._resolv_conf = resolv_conf

    def consul_servers(self, domain: str) -> tuple[str, ...]:
        import dns.resolver

        resolver = dns.resolver.Resolver(configure=False)
        # Who listens is asked; the other one refuses at once.
        places = dict((CONSUL, CONSUL_IN_PUBLIC))
        resolver.nameservers, resolver.nameserver_ports = list(places), places
        # Over TCP: plain UDP gives three answers at most, and does not say that it left some out.
        return self._targets(resolver, f"consul.service.{domain}.")

    def addresses(self, name: str) -> tuple[str, ...]:
        import dns.exception
        import dns.resolver

        try:
            resolver = dns.resolver.Resolver(self._resolv_conf)
        except dns.exception.DNSException as error:
            raise HostError("use", self._resolv_conf, error) from error
        targets = self._targets(resolver, name) or (name,)
        found = [
            str(record) for target in targets for record in self._records(resolver, target, "A")
        ]
        return tuple(dict.fromkeys(found))

    def routed(self, interface: str) -> tuple[str, ...]:
        """By systemd-resolved's interface for programs, org.freedesktop.resolve1(5)."""
        said = run(
            *("busctl", "--json=short", *_ASKED, "org.freedesktop.resolve1.Manager"),
            *("DNSEx", "Domains"),
        )
        try:
            servers, domains = (json.loads(line)["data"] for line in said.splitlines())
            index = socket.if_nametoindex(interface)
            # It counts servers on the machine itself as those of lo, whosesoever they are.
            if not any((_dotted(each[2]), each[3]) == CONSUL for each in servers):
                return ()
            return tuple(name for link, name, only in domains if link == index and only)
        except OSError:
            return ()  # no such interface
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise HostError("ask", "systemd-resolved", f"unclear: {error!r}") from error

    def _targets(self, resolver: dns.resolver.Resolver, name: str) -> tuple[str, ...]:
        return tuple(str(record.target) for record in self._records(resolver, name, "SRV"))

    def _records(self, resolver: dns.resolver.Resolver, name: str, kind: str) -> list[Any]:
        import dns.exception
        import dns.resolver

        try:
            return list(resolver.resolve(name, kind, tcp=True, lifetime=LIFETIME_S))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except (dns.exception.DNSException, OSError) as error:
            raise HostError(f"resolve {kind} of", name, error) from error


def _dotted(address: list[int]) -> str:
    return ".".join(str(byte) for byte in address)
