"""This machine's network interfaces, its routing rules and its name."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import pwd
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from nodeagent.adapters.program import run
from nodeagent.errors import HostError
from nodeagent.host import Interface, Listener, Rule

WATCH_PAUSE_S = 5  # before listening again after an error

RTMGRP_IPV4_RULE, RTM_DELRULE = 0x80, 33  # linux/rtnetlink.h


class LocalNetwork:
    """Interfaces and rules as the kernel has them now."""

    def interfaces(self) -> tuple[Interface, ...]:
        return tuple(
            Interface(name, f"{entry.address}/{_prefix(entry.netmask)}")
            for name, entries in sorted(psutil.net_if_addrs().items())
            for entry in entries
            if entry.family == socket.AF_INET
        )

    def hostname(self) -> str:
        # Consul's catalogue takes names that differ in case for the same, its rules do not.
        return socket.gethostname().partition(".")[0].lower()

    def rules(self) -> tuple[Rule, ...]:
        try:
            listed = json.loads(run("ip", "-json", "-4", "rule", "show"))
            return tuple(_rule(entry) for entry in listed)
        except HostError as error:
            raise HostError("read", "the routing rules", error.cause) from error
        except (ValueError, TypeError, KeyError) as error:
            raise HostError("read", "the routing rules", f"unclear: {error!r}") from error

    def listeners(self, port: int) -> tuple[Listener, ...]:
        try:
            found = {
                each
                for name, family in _UDP_TABLES
                for each in _bound(Path(name).read_text("ascii"), family, port)
            }
        except (OSError, ValueError, IndexError) as error:
            raise HostError("read", "the UDP sockets", f"unclear: {error!r}") from error
        return tuple(sorted(found, key=str))

    def uplinks(self) -> tuple[str, ...]:
        """Of the kernel's main table, proc_pid_net(5): Iface Destination Gateway … Mask …."""
        try:
            lines = Path("/proc/net/route").read_text("ascii").splitlines()[1:]
        except OSError as error:
            raise HostError("read", "the routes", error) from error
        fields = (line.split() for line in lines)
        return tuple(sorted({each[0] for each in fields if each[1] == each[7] == "00000000"}))

    def watch_rules(self, wake: Callable[[], None], stop: threading.Event) -> None:
        """By the kernel's own word, rtnetlink(7); to listen needs no privilege."""
        while not stop.is_set():
            with (
                contextlib.suppress(OSError),
                socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
                ) as end,
            ):
                end.bind((0, RTMGRP_IPV4_RULE))
                wake()  # a rule may have gone before anybody listened
                while not stop.is_set():
                    if select.select([end], [], [], 60)[0] and _tells_of_a_loss(end.recv(65536)):
                        wake()
            stop.wait(WATCH_PAUSE_S)


def _prefix(netmask: str | None) -> int:
    return ipaddress.IPv4Network(f"0.0.0.0/{netmask or '255.255.255.255'}").prefixlen


def _rule(entry: Mapping[str, Any]) -> Rule:
    """One of `ip -json rule`. Every word narrows it, known here or not, but for `src all`."""
    priority, action = entry["priority"], entry.get("action") or f"lookup {entry['table']}"
    takes = {f"{key} {value}" for key, value in entry.items() if key not in _NO_SELECTORS}
    return Rule(priority, frozenset(takes - {"src all"}), action)


def _bound(table: str, family: socket.AddressFamily, port: int) -> Iterator[Listener]:
    """Of /proc/net/udp (proc_pid_net(5)): addresses are words of this machine's."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, local_port = fields[1].partition(":")
        if int(local_port, 16) != port or not fields[2].endswith(":0000"):
            continue
        words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
        packed = struct.pack(f"={len(words)}I", *words)
        yield Listener(socket.inet_ntop(family, packed), _user(int(fields[7])))


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


_UDP_TABLES = (("/proc/net/udp", socket.AF_INET), ("/proc/net/udp6", socket.AF_INET6))

_NO_SELECTORS = ("priority", "action", "table", "protocol")


def _tells_of_a_loss(message: bytes) -> bool:
    _length, kind = struct.unpack_from("=IH", message)  # netlink(7), struct nlmsghdr
    return bool(kind == RTM_DELRULE)
