"""This machine's network interfaces, its routing rules and its name."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from nodeagent.adapters.program import run
from nodeagent.errors import HostError
from nodeagent.host import Interface, Rule

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


_NO_SELECTORS = ("priority", "action", "table", "protocol")


def _tells_of_a_loss(message: bytes) -> bool:
    _length, kind = struct.unpack_from("=IH", message)  # netlink(7), struct nlmsghdr
    return bool(kind == RTM_DELRULE)
