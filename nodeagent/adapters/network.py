"""This machine's network interfaces and name."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from nodeagent.host import Interface


class LocalNetwork:
    """Interfaces as the kernel has them now."""

    def interfaces(self) -> tuple[Interface, ...]:
        return tuple(
            Interface(name, f"{entry.address}/{_prefix(entry.netmask)}")
            for name, entries in sorted(psutil.net_if_addrs().items())
            for entry in entries
            if entry.family == socket.AF_INET
        )

    def hostname(self) -> str:
        return socket.gethostname().partition(".")[0]


def _prefix(netmask: str | None) -> int:
    return ipaddress.IPv4Network(f"0.0.0.0/{netmask or '255.255.255.255'}").prefixlen
