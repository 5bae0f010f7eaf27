"""On every Engine that there is, a machine becomes a cluster's node by its user-data alone."""

from __future__ import annotations

import json

import pytest

from tests.lab import cluster
from tests.lab.flavours import FLAVOURS
from tests.lab.lab import Lab
from tests.lab.test_engine_options import STORE, break_store


@pytest.mark.full
@pytest.mark.parametrize("name", FLAVOURS)
def test_a_stock_machine_becomes_a_node_with_one_restart_of_its_engine(lab: Lab, name: str) -> None:
    file = cluster.cluster_file(lab, cluster="single", servers=1, join=[])
    [machine] = cluster.make(lab, file, {"server-one": "10.10.0.91"}, flavour=name)
    try:
        machine.boot()
        cluster.wait_ready([machine])
        options = json.loads(machine.read("/etc/docker/daemon.json"))
        assert options["log-opts"]["max-size"] == "10m"
        assert options["dns"] == ["169.254.53.53"]
        starts = "journalctl -b -u docker.service -o cat | grep -c '^Started docker.service'"
        assert int(machine.sh(starts)) == 2, "at boot, and with its options"
        engine = cluster.status(machine)["steps"]["engine"]["sentence"]
        assert engine.startswith(f"Docker Engine {FLAVOURS[name].engine}")
        machine.reboot()
        cluster.wait_ready([machine])
        assert int(machine.sh(starts)) == 1, "the options are there already"
        if name == "trixie":  # the one Engine of these that its own store can keep from starting
            machine.sh("systemctl stop nodeagent")
            assert break_store(machine) == "failed"
            machine.sh("systemctl start nodeagent", timeout_s=60)
            cluster.wait_ready([machine])
            machine.sh(f"test -s {STORE}.set-aside")
        # What the Engine cannot take is refused by the sandboxed agent itself, and told.
        machine.sh("printf 'engine: {options: {no-such-option: 1}}\\n' >> /etc/nodeagent/node.yaml")
        said = machine.run("nodeagent", "apply", check=False, timeout_s=60).stdout
        assert "so nothing was changed" in said
        assert "no-such-option" in said
        assert json.loads(machine.read("/etc/docker/daemon.json")) == options
    finally:
        machine.destroy()
