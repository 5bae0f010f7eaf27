"""Who listens for names and where the world is: what the step for DNS relies on, asked of Linux."""

from __future__ import annotations

import getpass
import socket

import pytest

from nodeagent.adapters.network import LocalNetwork
from nodeagent.host import Listener
from tests.contract.surroundings import needs_root, own_network
from tests.lab.host import run


@pytest.fixture
def port() -> int:
    """A UDP port that nobody has."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as free:
        free.bind(("::", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "127.0.0.2"),
        (socket.AF_INET, "0.0.0.0"),
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::"),
    ],
)
def test_who_takes_packets_for_a_port(
    port: int, family: socket.AddressFamily, address: str
) -> None:
    network = LocalNetwork()
    assert network.listeners(port) == ()
    with socket.socket(family, socket.SOCK_DGRAM) as taker:
        taker.bind((address, port))
        assert network.listeners(port) == (Listener(address, getpass.getuser()),)
    assert network.listeners(port) == ()


def test_who_only_asks_from_a_port_is_no_listener(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.bind(("127.0.0.1", port))
        asker.connect(("127.0.0.1", 53))
        assert LocalNetwork().listeners(port) == ()


@pytest.mark.lab
@needs_root
def test_uplinks_are_those_of_default_routes() -> None:
    with own_network():
        assert LocalNetwork().uplinks() == ()
        for number in (7, 8, 9):
            run("ip", "link", "add", f"eth{number}", "type", "bridge")
            run("ip", "address", "add", f"10.{number}.0.2/16", "dev", f"eth{number}")
            run("ip", "link", "set", f"eth{number}", "up")
        run("ip", "route", "add", "default", "via", "10.9.0.1", "dev", "eth9")
        run("ip", "route", "add", "default", "via", "10.8.0.1", "dev", "eth8", "metric", "99")
        run("ip", "route", "add", "0.0.0.0/1", "via", "10.7.0.1", "dev", "eth7")
        assert LocalNetwork().uplinks() == ("eth8", "eth9")
