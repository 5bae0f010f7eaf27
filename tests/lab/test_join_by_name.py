"""Servers that know each other only by a DNS name find each other."""

from __future__ import annotations

import pytest

from tests.lab import cluster
from tests.lab.lab import Lab
from tests.lab.test_cluster import assert_one_swarm

ADDRESSES = {"server-a": "10.10.0.51", "server-b": "10.10.0.52", "server-c": "10.10.0.53"}
SRV = "_consul._tcp.names.example"


@pytest.mark.parametrize(
    "name", [SRV, pytest.param("servers.example", marks=pytest.mark.full)], ids=["srv", "a"]
)
def test_servers_join_by_a_name(lab: Lab, name: str) -> None:
    hosts = {f"{machine}.example": [address] for machine, address in ADDRESSES.items()}
    lab.dns(
        a={**hosts, "servers.example": list(ADDRESSES.values())},
        srv={SRV: [(host, 8301) for host in hosts]},
    )
    machines = cluster.make(lab, cluster.cluster_file(lab, join=[name]), ADDRESSES)
    try:
        for machine in machines:
            machine.boot()
        cluster.wait_ready(machines)
        assert_one_swarm(machines)
        assert "join Consul through" in "".join(m.journal("nodeagent") for m in machines)
    finally:
        for machine in machines:
            machine.destroy()
        lab.dns()
