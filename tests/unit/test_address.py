"""One address of this machine is its cluster address, or a sentence says what there is instead."""

from __future__ import annotations

import pytest

from nodeagent.address import NoAddress, cluster_address
from nodeagent.host import Interface

LO = Interface("lo", "127.0.0.1/8")
PUBLIC = Interface("eth0", "203.0.113.7/24")
PRIVATE = Interface("eth1", "10.10.0.11/16")
BRIDGE = Interface("docker0", "172.17.0.1/16")
ALL = (LO, PUBLIC, PRIVATE, BRIDGE)


@pytest.mark.parametrize(
    ("wanted", "interfaces", "found"),
    [
        pytest.param("10.10.0.11", ALL, "10.10.0.11", id="by-address"),
        pytest.param("10.10.0.0/16", ALL, "10.10.0.11", id="by-network"),
        pytest.param("10.0.0.0/8", ALL, "10.10.0.11", id="by-wider-network"),
        pytest.param("10.10.99.99/16", ALL, "10.10.0.11", id="by-network-with-host-bits"),
        pytest.param("eth1", ALL, "10.10.0.11", id="by-interface"),
        pytest.param(
            "ens3.100", (LO, Interface("ens3.100", "10.10.0.11/16")), "10.10.0.11", id="by-vlan"
        ),
    ],
)
def test_found(wanted: str, interfaces: tuple[Interface, ...], found: str) -> None:
    assert cluster_address(wanted, interfaces) == found


HAS = "203.0.113.7 (eth0), 10.10.0.11 (eth1), 172.17.0.1 (docker0)"
TWICE = (*ALL, Interface("eth1", "10.10.0.12/16"))
ANYCAST = "10.10.0.11 (eth1), 10.10.0.12 (eth1)"


@pytest.mark.parametrize(
    ("wanted", "interfaces", "sentence"),
    [
        pytest.param(
            "10.20.0.0/16",
            ALL,
            f"address 10.20.0.0/16 matches none of this machine's: {HAS}",
            id="network-of-another-datacenter",
        ),
        pytest.param(
            "10.10.0.12",
            ALL,
            f"address 10.10.0.12 matches none of this machine's: {HAS}",
            id="address-of-another-machine",
        ),
        pytest.param(
            "eth9", ALL, f"address eth9 matches none of this machine's: {HAS}", id="no-such-card"
        ),
        pytest.param(
            "lo", ALL, f"address lo matches none of this machine's: {HAS}", id="loopback-is-no-use"
        ),
        pytest.param(
            "eth1", TWICE, f"address eth1 matches 2 addresses here: {ANYCAST}", id="card-with-two"
        ),
        pytest.param(
            "10.10.0.0/16",
            TWICE,
            f"address 10.10.0.0/16 matches 2 addresses here: {ANYCAST}",
            id="network-with-two",
        ),
        pytest.param(
            "10.10.0.0/16",
            (LO,),
            "address 10.10.0.0/16 matches none of this machine's: it has none",
            id="no-network-card-at-all",
        ),
    ],
)
def test_refused(wanted: str, interfaces: tuple[Interface, ...], sentence: str) -> None:
    with pytest.raises(NoAddress) as refused:
        cluster_address(wanted, interfaces)
    assert refused.value.cause == sentence
