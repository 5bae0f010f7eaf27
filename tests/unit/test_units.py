"""The units are ones systemd takes without a word, and the long-running ones are locked down."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="no systemd-analyze here"
)


class Unit(configparser.RawConfigParser):
    """A unit file of which each key stands once, but for lists."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",))
        self.read(UNITS / name)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr + f"exit {done.returncode}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system of the units, and of what they name in the emptiest form there is."""
    shutil.copytree(UNITS, tmp_path / "etc/systemd/system")
    for program in (
        "opt/nodeagent/nodeagent",
        "usr/sbin/dockerd",
        "usr/bin/kill",
        "usr/bin/sh",
        "usr/bin/ip",
        "var/lib/nodeagent/consul/bin/consul",
    ):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    others = tmp_path / "etc/systemd/system"
    (others / "containerd.service").write_text("[Service]\nExecStart=/usr/bin/sh\n")
    for target in ("sysinit", "basic", "shutdown", "network-online"):
        (others / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    return tmp_path


@needs_systemd
@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.iterdir()))
def test_systemd_finds_nothing_to_say(name: str, root: Path) -> None:
    said = analyze("verify", f"--root={root}", str(root / "etc/systemd/system" / name))
    assert said == "exit 0"


@needs_systemd
def test_systemd_would_have_found_a_mistake(root: Path) -> None:
    unit = root / "etc/systemd/system/nodeagent.service"
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=mixd"))
    said = analyze("verify", f"--root={root}", str(unit))
    assert "mixd" in said


@needs_systemd
@pytest.mark.parametrize(
    ("name", "at_most"),
    [
        pytest.param("nodeagent.service", 3.0, id="agent"),
        pytest.param("nodeagent-consul.service", 1.9, id="consul"),
        pytest.param("nodeagent-guard.service", 1.5, id="guard"),
        pytest.param("nodeagent-dns.service", 1.9, id="dns"),
    ],
)
def test_its_exposure_stays_low(name: str, at_most: float) -> None:
    said = analyze("security", "--offline=true", str(UNITS / name))
    found = re.search(r"Overall exposure level for .*: ([0-9.]+)", said)
    assert found, said
    assert float(found[1]) <= at_most, said


def test_a_wrong_spec_stops_the_restarts_and_nothing_else_does() -> None:
    service, unit = Unit("nodeagent.service")["Service"], Unit("nodeagent.service")["Unit"]
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("always", "78")
    assert unit["StartLimitIntervalSec"] == "0"


@pytest.mark.parametrize(
    "name", ["nodeagent.service", "nodeagent-engine.service", "nodeagent-consul.service"]
)
def test_what_starts_at_boot_waits_for_nothing_that_waits_for_it(name: str) -> None:
    """cloud-final comes after multi-user.target, which waits for all that it wants."""
    unit = Unit(name)
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert set(unit["Unit"]["After"].split()) <= {"network-online.target", "containerd.service"}


def test_the_guard_is_up_before_anything_that_runs_containers() -> None:
    unit = Unit("nodeagent-guard.service")
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert set(unit["Unit"]["Before"].split()) == {"docker.service", "nodeagent-engine.service"}
    assert "After" not in unit["Unit"]


def test_the_address_for_dns_is_up_before_anything_that_runs_containers_or_asks_there() -> None:
    unit = Unit("nodeagent-dns.service")
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    wanted = {"docker.service", "nodeagent-engine.service", "nodeagent-consul.service"}
    assert set(unit["Unit"]["Before"].split()) == wanted
    assert set(unit["Unit"]["After"].split()) == {"systemd-resolved.service", "dbus.socket"}


def test_the_guard_alone_can_change_the_network_and_nothing_else() -> None:
    guard, agent = (Unit(f"{name}.service")["Service"] for name in ("nodeagent-guard", "nodeagent"))
    assert guard["CapabilityBoundingSet"] == guard["AmbientCapabilities"] == "CAP_NET_ADMIN"
    assert guard["DynamicUser"] == "yes"
    assert "CAP_NET_ADMIN" not in agent["CapabilityBoundingSet"]


def test_nobody_is_made_to_wait_for_the_cluster_who_did_not_ask() -> None:
    assert not Unit("nodeagent-ready.target").has_section("Install")
    assert not Unit("nodeagent-wait.service").has_section("Install")


def test_an_upgrade_of_the_agent_stops_nobody_who_waited_for_the_cluster() -> None:
    wait = Unit("nodeagent-wait.service")["Unit"]
    assert set(wait) & {"Requires", "BindsTo", "Requisite", "PartOf"} == set()


def test_a_restart_of_the_system_engine_leaves_its_containers_alone() -> None:
    service = Unit("nodeagent-engine.service")["Service"]
    assert (service["KillMode"], service["RuntimeDirectoryPreserve"]) == ("process", "yes")
    assert "--live-restore" in service["ExecStart"]


def test_the_system_engine_never_reads_the_owners_options() -> None:
    words = Unit("nodeagent-engine.service")["Service"]["ExecStart"].split()
    assert "--config-file=" in words
