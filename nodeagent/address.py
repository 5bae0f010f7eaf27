"""Which of this machine's addresses is its cluster address."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from nodeagent.errors import HostError
from nodeagent.host import Interface


class NoAddress(HostError):
    """The spec's `address` names none of this machine's addresses, or more than one.

    The identity step blocks on it; where it goes away during a cycle, that step is tried again.
    """

    def __init__(self, cause: str) -> None:
        super().__init__("find", "this node's cluster address", cause)


def cluster_address(wanted: str, interfaces: Sequence[Interface]) -> str:
    """Return the one IPv4 address that `wanted` (an address, a network, an interface) means.

    Raises NoAddress with a sentence that lists what the machine has.
    """
    usable = [entry for entry in interfaces if not _ip(entry).is_loopback]
    if any(entry.name == wanted for entry in interfaces):
        found = [entry for entry in usable if entry.name == wanted]
    elif wanted[0].isdigit():
        network = ipaddress.IPv4Network(wanted, strict=False)
        found = [entry for entry in usable if _ip(entry) in network]
    else:
        found = []
    if len(found) == 1:
        return str(_ip(found[0]))
    listed = ", ".join(f"{_ip(entry)} ({entry.name})" for entry in found or usable)
    if found:
        raise NoAddress(f"address {wanted} matches {len(found)} addresses here: {listed}")
    raise NoAddress(f"address {wanted} matches none of this machine's: {listed or 'it has none'}")


def _ip(interface: Interface) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Interface(interface.address).ip
