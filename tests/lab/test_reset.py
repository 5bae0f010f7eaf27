"""`nodeagent reset` gives a machine's owner back what was there, to the byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeagent.errors import Exit
from tests.lab import cluster
from tests.lab.lab import Lab, Machine

# As no program would write it: an owner's own hand.
OWNERS = (
    '{"insecure-registries": ["registry.example:5000"],\n\n   "log-opts": {"labels":"team"} }\n'
)
ADDRESS = "10.10.0.61"
# Everything below /etc that is nobody's but the owner's, by what is in it and how it lies there.
TREE = (
    "cd /etc && find . -not -path './nodeagent*' -not -path '*/nodeagent*' "
    "-not -name machine-id -not -name '*.nodeagent-new' -not -path './ssh/*' "
    "-not -path './.pwd.lock' -type f -printf '%p %m %u ' -exec sha256sum {} \\; | sort; "
    "readlink /etc/resolv.conf"
)


@pytest.fixture(scope="module")
def owned(lab: Lab) -> Iterator[Machine]:
    """A machine of an owner who has a daemon.json."""
    data = cluster.cluster_file(lab, servers=1, join=[])
    [machine] = cluster.make(lab, {**data, "cluster": "owned"}, {"server-owned": ADDRESS})
    machine.boot()
    cluster.wait_ready([machine])
    yield machine
    machine.destroy()


def test_the_owners_files_are_as_they_were(owned: Machine) -> None:
    path = "/etc/docker/daemon.json"
    owned.sh("systemctl disable --now nodeagent; nodeagent reset", timeout_s=90)
    assert owned.run("test", "-e", path, check=False).returncode, "there was none at first"
    owned.write(path, OWNERS)
    owned.sh(f"chmod 640 {path}; chown daemon:games {path}; systemctl restart docker")
    before = owned.sh(TREE)
    owned.sh("systemctl enable --now nodeagent")
    cluster.wait_ready([owned])
    assert owned.read(path) != OWNERS
    running = owned.run("nodeagent", "reset", check=False)
    assert running.returncode == Exit.USAGE
    assert "systemctl disable --now nodeagent" in running.stderr
    owned.sh("systemctl disable --now nodeagent")
    said = owned.sh("nodeagent reset", timeout_s=90)
    assert owned.read(path) == OWNERS
    assert owned.sh(TREE) == before, said
    assert owned.sh("docker info -f '{{.LoggingDriver}} {{.RegistryConfig.IndexConfigs}}'")
    again = owned.sh("nodeagent reset")
    assert "the Engine has no options of ours" in again


def test_the_engine_runs_with_them_and_the_agent_comes_back(owned: Machine) -> None:
    owned.sh("systemctl enable --now nodeagent")
    cluster.wait_ready([owned])
    assert '"max-size": "10m"' in owned.read("/etc/docker/daemon.json")
