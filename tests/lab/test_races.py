"""However the servers start and die, the cluster has one Swarm, and no human is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodeagent import paths
from nodeagent.host import service_id
from tests.lab import cluster
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Machine
from tests.lab.test_cluster import assert_one_swarm

DRIVER = Path(__file__).with_name("driver.py")
SYSTEM_DOCKER = "docker -H unix:///run/nodeagent-engine/docker.sock"


@pytest.fixture(scope="module")
def servers(four: list[Machine]) -> Iterator[list[Machine]]:
    """The three servers, with the agent run by the driver that can kill it; the worker is off."""
    for machine in four[3:]:
        machine.power_off()
    for machine in four[:3]:
        machine.write("/opt/driver.py", DRIVER.read_text("utf-8"))
        machine.write(
            "/etc/systemd/system/nodeagent.service.d/driver.conf",
            "[Service]\nExecStart=\nExecStart=/usr/bin/python3 /opt/driver.py\n"
            "ReadWritePaths=/run/driver\n",
        )
        machine.sh("mkdir -p /run/driver && systemctl daemon-reload")
    yield four[:3]
    on_all(
        four[:3],
        "systemctl stop nodeagent; rm -rf /run/driver "
        "/etc/systemd/system/nodeagent.service.d/driver.conf;"
        "systemctl daemon-reload; systemctl start nodeagent",
    )
    cluster.wait_ready(four[:3])
    for machine in four[3:]:
        cluster.forget_token(four[0], machine.name)
        machine.boot()
        machine.wait_booted()
        # Its Swarm is gone: a later issue lets a worker find that out by itself. Its Consul may be
        # gone too, and its token with it.
        machine.sh(
            f"docker swarm leave --force >/dev/null 2>&1 || true; rm {paths.NODE_TOKEN};"
            "systemctl restart nodeagent"
        )
    cluster.wait_ready(four)


def on_all(machines: list[Machine], script: str) -> None:
    """Run a script on all machines at the same time, and wait for all."""
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda machine: machine.sh(script, timeout_s=90), machines))


def forget_the_swarm(machines: list[Machine]) -> None:
    """Back to a cluster whose Consul works and that has never had a Swarm."""
    on_all(
        machines,
        "systemctl stop nodeagent; docker swarm leave --force >/dev/null 2>&1 || true;"
        "rm -f /run/driver/*",
    )
    for machine in machines:
        for service in ("nodeagent", "docker-engine", "swarm-manager"):
            id_ = service_id(service)
            cluster.ask_consul(machine, f"agent/service/deregister/{id_}", "-X", "PUT")
    cluster.ask_consul(machines[0], "kv/nodeagent/?recurse=true", "-X", "DELETE")


def forget_everything(machines: list[Machine]) -> None:
    """Back to machines as `nodeagent install` leaves them."""
    on_all(
        machines,
        "systemctl stop nodeagent; docker swarm leave --force >/dev/null 2>&1 || true;"
        f"{SYSTEM_DOCKER} rm -f consul >/dev/null 2>&1 || true;"
        f"{SYSTEM_DOCKER} rmi -f {cluster.CONSUL_IMAGE} >/dev/null 2>&1 || true;"
        "systemctl disable --now nodeagent-engine.service 2>/dev/null;"
        "cd /var/lib/nodeagent && rm -rf identity.json node-token.json engine-options.json "
        "originals images consul; rm -f /etc/docker/daemon.json /run/driver/* /run/nodeagent/*;"
        "systemctl reset-failed docker.service docker.socket; systemctl restart docker.service",
    )


@pytest.mark.parametrize("starts", [4, pytest.param(20, marks=pytest.mark.full)])
def test_servers_that_start_in_the_same_instant_make_one_swarm(
    servers: list[Machine], starts: int
) -> None:
    ids = set()
    initialisers = []
    for _ in range(starts):
        forget_the_swarm(servers)
        on_all(servers, "systemctl start nodeagent")
        cluster.wait_ready(servers)
        ids.add(assert_one_swarm(servers))
        initialisers.append(json.loads(cluster.consul_kv(servers[0], "swarm/state"))["node"])
    assert len(ids) == starts, "a start found the Swarm of an earlier one"
    print(f"{starts} starts, each one Swarm; initialised by {sorted(initialisers)}")


def run_of_the_initialiser(victim: Machine, others: list[Machine], die_after: int) -> list[str]:
    """Let `victim` initialise a fresh cluster and die once; returns the changes it made."""
    machines = [victim, *others]
    forget_everything(machines)
    for machine in others:
        machine.sh("touch /run/driver/hold")
    if die_after >= 0:
        victim.write("/run/driver/die_after", str(die_after))
    for machine in machines:
        machine.run("systemctl", "start", "nodeagent", timeout_s=60)

    def victim_died_or_is_ready() -> bool | Waiting:
        if victim.run("test", "-e", "/run/driver/died", check=False).returncode == 0:
            return True
        said = cluster.status(victim)
        return said.get("state") == "ready" or Waiting(str(said.get("sentence")))

    wait_until(victim_died_or_is_ready, 120, "the initialiser to die or be ready")
    for machine in others:
        machine.sh("rm -f /run/driver/hold")
    cluster.wait_ready(machines)
    assert_one_swarm(machines)
    return victim.read("/run/driver/changes").splitlines()


@pytest.mark.parametrize(
    "is_every_change",
    [
        pytest.param(False, id="of-the-swarm-step"),
        pytest.param(True, id="of-its-run", marks=[pytest.mark.full, pytest.mark.long]),
    ],
)
def test_the_initialiser_killed_at_every_change(
    servers: list[Machine], is_every_change: bool
) -> None:
    victim, *others = servers
    whole = run_of_the_initialiser(victim, others, -1)
    claim = whole.index("claim the cluster's one swarm init")
    assert whole[claim + 1].startswith("initialise the cluster's Swarm")
    last = len(whole) if is_every_change else claim + 5
    moments = range(1 if is_every_change else claim + 1, last + 1)
    for die_after in moments:
        run_of_the_initialiser(victim, others, die_after)
        assert victim.run("test", "-e", "/run/driver/died", check=False).returncode == 0
        print(f"killed after change {die_after}, {whole[die_after - 1]!r}: one Swarm")
    print(f"killed at each of {len(moments)} changes")
