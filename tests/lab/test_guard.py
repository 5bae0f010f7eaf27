"""No container reaches the metadata service, whatever is restarted or flushed; the machine does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from nodeagent.daemon import SETTLED_S
from nodeagent.paths import GUARD_UNIT
from tests.lab import cluster, host, images
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import METADATA_ADDRESS, Lab, Machine

URL = f"http://{METADATA_ADDRESS}/"
ANSWER = "this machine's user-data"
# At once, by the kernel's word to the sender (EHOSTUNREACH); after a drop it would be a time-out.
REFUSED = f"nc: can't connect to remote host ({METADATA_ADDRESS}): No route to host"
# Not wget: a static busybox cannot use glibc's resolver, which wget asks about addresses too.
ASK = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {METADATA_ADDRESS} 80 2>&1 | tail -n 1"

NETWORKS = {"bridge": "", "guarded": "bridge", "guarded-wide": "overlay --attachable"}  # drivers


@pytest.fixture(scope="module")
def metadata(lab: Lab) -> Iterator[None]:
    """The box plays the metadata service."""
    files = lab.state_dir / "metadata"
    files.mkdir(exist_ok=True)
    (files / "index.html").write_text(ANSWER + "\n")
    serve = ("-m", "http.server", "80", "--bind", METADATA_ADDRESS, "--directory", files)
    inside = ("nsenter", f"--net={lab.netns_path}", "--", sys.executable, *serve)
    log, groups = lab.logs_dir / "metadata.log", lab.make_service_groups()
    process = host.spawn(*inside, log=log, groups=groups)
    try:

        def answers() -> bool | Waiting:
            assert process.alive, log.read_text("utf-8", "replace")[-500:]
            return lab.run("curl", "-sf", URL, check=False).returncode == 0 or Waiting(log)

        wait_until(answers, 30, "the metadata service")
        yield
    finally:
        process.kill()
        host.remove_tree(files)


@pytest.fixture(scope="module")
def machine(lab: Lab, four: list[Machine], metadata: None) -> Iterator[Machine]:  # noqa: ARG001 - the service has to be there
    """A server with containers on every kind of network that its Engine forwards for."""
    server = four[0]
    server.sh(f"curl -sf {lab.serve(images.box_archive(), 'box.tar')} | docker load")
    made = [(name, driver) for name, driver in NETWORKS.items() if driver]
    for name, driver in made:
        server.sh(f"docker network create -d {driver} {name}")
    yield server
    server.sh("docker rm -f witness >/dev/null 2>&1 || true")
    for name, _ in made:
        server.sh(f"docker network rm {name}")


def container_hears(machine: Machine, network: str) -> str:
    run = ("docker", "run", "--rm", "--network", network, cluster.BOX_IMAGE, "sh", "-c", ASK)
    return machine.run(*run, check=False, timeout_s=60).stdout.strip()


def host_hears(machine: Machine) -> str:
    return machine.run("curl", "-sf", "-m", "10", URL, check=False).stdout.strip()


def assert_guarded(machine: Machine) -> None:
    assert host_hears(machine) == ANSWER
    heard = {network: container_hears(machine, network) for network in NETWORKS}
    assert heard == dict.fromkeys(NETWORKS, REFUSED)


def remove_rules(machine: Machine) -> None:
    machine.sh("ip rule delete pref 101; ip rule delete pref 100")


def wait_rules(machine: Machine) -> None:
    def both() -> bool | Waiting:
        said = machine.sh("ip -4 rule show")
        return all(f"\n{pref}:" in said for pref in (100, 101)) or Waiting(said)

    wait_until(both, 90, "the rules to be back")


def repairs(machine: Machine) -> int:
    """How often the agent has put the rules back since boot."""
    return machine.journal("nodeagent").count(f"restart {GUARD_UNIT}: a rule of it is gone")


def test_the_machine_reaches_it_and_no_container_does(machine: Machine) -> None:
    assert_guarded(machine)


def test_it_is_the_rules_that_keep_containers_away(machine: Machine) -> None:
    machine.run("systemctl", "stop", "nodeagent")
    try:
        remove_rules(machine)
        heard = {network: container_hears(machine, network) for network in NETWORKS}
        assert heard == dict.fromkeys(NETWORKS, ANSWER)
        assert host_hears(machine) == ANSWER
    finally:
        machine.run("systemctl", "start", "nodeagent")
    wait_rules(machine)
    assert_guarded(machine)


def test_an_engine_restart_leaves_the_guard_up(machine: Machine) -> None:
    machine.run("systemctl", "restart", "docker", timeout_s=90)
    assert_guarded(machine)
    cluster.wait_ready([machine])


def test_a_firewall_flushed_empty_leaves_the_guard_up(machine: Machine) -> None:
    try:
        machine.sh("iptables -F; iptables -t nat -F; iptables -t mangle -F; iptables -t raw -F")
        assert "DOCKER" not in machine.sh("iptables -S FORWARD")
        assert_guarded(machine)
    finally:
        machine.run("systemctl", "restart", "docker", timeout_s=90)  # gives it its rules again
    assert "DOCKER" in machine.sh("iptables -S FORWARD")
    assert_guarded(machine)
    cluster.wait_ready([machine])


def test_a_restart_of_networkd_leaves_the_guard_up(machine: Machine) -> None:
    before = repairs(machine)
    machine.sh("ip rule add pref 102 to 203.0.113.9 prohibit")
    machine.run("systemctl", "restart", "systemd-networkd", timeout_s=60)

    def swept() -> bool | Waiting:
        said = machine.sh("ip -4 rule show")
        return "203.0.113.9" not in said or Waiting(said)

    wait_until(swept, 60, "networkd to remove the rules that are not its own")
    assert_guarded(machine)
    assert repairs(machine) == before, "they never went"


def test_removed_rules_are_back_without_waiting_for_the_slow_timer(machine: Machine) -> None:
    times, before, began = 8, repairs(machine), time.monotonic()
    for _ in range(times):
        remove_rules(machine)
        wait_rules(machine)
    by_the_timer = 1 + (time.monotonic() - began) / (0.8 * SETTLED_S)
    print(f"{times} repairs; the slow timer alone would have made {by_the_timer:.1f} at most")
    assert by_the_timer < times
    assert repairs(machine) > before
    assert_guarded(machine)


def test_after_a_reboot_the_guard_is_up_before_any_container(machine: Machine) -> None:
    witness = ("docker", "run", "-d", "--name", "witness", "--restart", "always")
    machine.run(*witness, cluster.BOX_IMAGE, "sh", "-c", f"{ASK}; exec sleep 100000")

    def heard() -> list[str]:
        return machine.sh("docker logs witness 2>&1").splitlines()

    wait_until(lambda: len(heard()) == 1, 30, "the first word of a container that always runs")
    machine.reboot()
    cluster.wait_ready([machine])
    wait_until(lambda: len(heard()) == 2, 60, "its word after the reboot")
    assert heard() == [REFUSED] * 2

    def shown(unit: str, value: str) -> str:
        return machine.run("systemctl", "show", "-P", value, unit).stdout

    up = int(shown(GUARD_UNIT, "ActiveEnterTimestampMonotonic"))
    assert 0 < up <= int(shown("docker.service", "InactiveExitTimestampMonotonic"))
    assert GUARD_UNIT in shown("docker.service", "After").split(), "by chance, then"
    assert_guarded(machine)
