"""DNS, asked over TCP where more than three answers matter.

dnspython is imported when it is first needed: by then Consul has been started, and the time the
import takes is spent while Consul elects a leader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nodeagent.errors import HostError

if TYPE_CHECKING:
    import dns.resolver

LIFETIME_S = 3.0
CONSUL_DNS_PORT = 8600


class DnsResolver:
    """The host's resolver, and the local Consul's DNS."""

    def __init__(self, *, resolv_conf: str = "/etc/resolv.conf") -> None:
        self._resolv_conf = resolv_conf

    def consul_servers(self, domain: str) -> tuple[str, ...]:
        import dns.resolver

        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = CONSUL_DNS_PORT
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
