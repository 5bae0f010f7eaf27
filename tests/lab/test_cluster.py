"""Four machines with nothing but user-data are one Swarm cluster, and stay one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from nodeagent import paths
from nodeagent.steps import STEPS
from tests.lab import cluster, images
from tests.lab.host import LabError, Waiting, wait_until
from tests.lab.lab import Lab, Machine

OWNED = "/etc/nodeagent /var/lib/nodeagent /etc/docker /opt/nodeagent /etc/systemd/system"
# Files that containers and daemons write by themselves.
NOT_OURS = "/var/lib/nodeagent/engine/*", "/var/lib/nodeagent/consul/data/*"

# A static busybox cannot use glibc's resolver; its nslookup has one of its own.
FETCH_BY_NAME = """
address=$(nslookup web | awk '/^Address: /{print $2}' | tail -n 1)
printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 "$address" 80 | tail -n 1
"""


def owned_files(machine: Machine) -> str:
    """Path, inode, modification time and size of every file of ours."""
    prune = " ".join(f"-not -path '{pattern}'" for pattern in NOT_OURS)
    return machine.sh(f"find {OWNED} {prune} -printf '%p %i %T@ %s\\n' | sort")


def engine_pid(machine: Machine) -> str:
    return machine.run("systemctl", "show", "-P", "MainPID", "docker.service").stdout.strip()


def consul_pid(machine: Machine) -> int:
    return int(cluster.consul_container(machine)["State"]["Pid"])


def restarts_of(machine: Machine, unit: str = "docker.service") -> int:
    """How often a unit was stopped since boot, by the journal."""
    return machine.run("journalctl", "-b", "-u", unit).stdout.count(f"Stopping {unit}")


def assert_one_swarm(machines: Iterable[Machine], nodes: set[str] | None = None) -> str:
    """All machines are in one Swarm in their roles, which is also the record's; returns its id.

    Once its managers agree: one that has just come back may elect with the others for a moment.
    """
    machines = list(machines)

    def found() -> str | Waiting:
        try:
            return the_one_swarm(machines, nodes)
        except (AssertionError, LabError) as error:
            return Waiting(str(error)[:500])

    return wait_until(found, 30, "one Swarm")


def the_one_swarm(machines: list[Machine], nodes: set[str] | None) -> str:
    servers = [machine for machine in machines if machine.name.startswith("server")]
    seen = {machine.name: cluster.swarm(machine) for machine in machines}
    assert {info["LocalNodeState"] for info in seen.values()} == {"active"}
    ids = {seen[server.name]["Cluster"]["ID"] for server in servers}
    record = json.loads(cluster.consul_kv(servers[0], "swarm/state"))
    assert ids == {record["swarm_id"]}
    for name, info in seen.items():
        assert info["ControlAvailable"] == name.startswith("server"), name
    listed = cluster.swarm_nodes(servers[0])
    assert set(listed) == (nodes or {machine.name for machine in machines})
    for machine in machines:
        assert listed[machine.name]["ID"] == seen[machine.name]["NodeID"]
    return str(record["swarm_id"])


def wait_listed_ready(manager: Machine, names: Iterable[str]) -> None:
    def ready() -> bool | Waiting:
        listed = cluster.swarm_nodes(manager)
        states = {name: listed.get(name, {}).get("Status") for name in names}
        return Waiting(str(states)) if set(states.values()) != {"Ready"} else True

    wait_until(ready, 60, "every node to be Ready in the Swarm")


def test_four_machines_form_one_swarm(four: list[Machine]) -> None:
    assert_one_swarm(four)
    for machine in four:
        said = machine.run("nodeagent", "status")
        assert said.stdout.startswith(f"{machine.name}: ready")
        assert machine.wait_cloud_init()["errors"] == []


def test_the_engine_was_restarted_once_on_a_stock_image(four: list[Machine]) -> None:
    assert {machine.name: restarts_of(machine) for machine in four} == dict.fromkeys(
        (machine.name for machine in four), 1
    )


def test_consul_names_nodes_engines_and_managers(four: list[Machine]) -> None:
    asked = four[-1]

    def passing(service: str) -> set[str]:
        url = f"http://127.0.0.1:8500/v1/health/service/{service}?passing"
        return {each["Node"]["Node"] for each in json.loads(asked.run("curl", "-sf", url).stdout)}

    everybody = {machine.name for machine in four}
    assert passing("nodeagent") == everybody
    assert passing("docker-engine") == everybody
    assert passing("swarm-manager") == set(cluster.SERVERS)


def test_an_overlay_network_spans_the_nodes(lab: Lab, four: list[Machine]) -> None:
    url = lab.serve(images.box_archive(), "box.tar")
    server, worker = four[0], four[-1]
    for machine in (server, worker):
        machine.sh(f"curl -sf {url} | docker load")
    server.run("docker", "network", "create", "-d", "overlay", "--attachable", "spanning")
    try:
        run = ("docker", "run", "-d", "--name", "web", "--network", "spanning", cluster.BOX_IMAGE)
        server.run(*run, "sh", "-c", "echo found > index.html && httpd -f -p 80")
        ask = ("docker", "run", "--rm", "--network", "spanning", cluster.BOX_IMAGE)

        def answer() -> bool | Waiting:
            said = worker.run(*ask, "sh", "-c", FETCH_BY_NAME, check=False)
            return True if said.stdout == "found\n" else Waiting(said.stdout + said.stderr)

        wait_until(answer, 60, "a container on worker1 to reach one on server1 by name")
    finally:
        server.run("docker", "rm", "-f", "web", check=False)
        wait_until(
            lambda: (
                (server.run("docker", "network", "rm", "spanning", check=False).returncode == 0)
                or Waiting("in use")
            ),
            30,
            "the network to go",
        )


def test_apply_again_changes_nothing(four: list[Machine]) -> None:
    for machine in four:
        before = owned_files(machine), engine_pid(machine), consul_pid(machine)
        said = machine.run("nodeagent", "apply", timeout_s=60)
        assert said.stdout.strip().endswith("(0 changes made)")
        planned = json.loads(machine.run("nodeagent", "plan", "--json").stdout)
        assert [step["changes"] for step in planned["steps"].values()] == [[]] * len(STEPS)
        assert (owned_files(machine), engine_pid(machine), consul_pid(machine)) == before


def test_an_engine_restart_leaves_consul_alone(four: list[Machine]) -> None:
    machine = four[1]
    before = engine_pid(machine), consul_pid(machine)
    machine.run("systemctl", "restart", "docker.service", timeout_s=60)
    assert engine_pid(machine) != before[0]
    assert consul_pid(machine) == before[1]
    cluster.wait_ready(four)
    wait_listed_ready(four[0], [each.name for each in four])


def test_the_ready_target_is_reached_after_the_cluster(four: list[Machine]) -> None:
    machine = four[-1]
    machine.run("systemctl", "start", "nodeagent-ready.target", timeout_s=60)
    state = machine.run("systemctl", "is-active", "nodeagent-ready.target").stdout.strip()
    assert state == "active"


def test_a_loop_that_hangs_is_killed_by_the_watchdog(four: list[Machine]) -> None:
    """The spec becomes a pipe nobody writes to: the read hangs as a call to a dead disk would."""
    machine = four[-1]
    drop_in = "/run/systemd/system/nodeagent.service.d/watchdog.conf"
    machine.write(drop_in, "[Service]\nWatchdogSec=3\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "nodeagent.service")
    cluster.wait_ready([machine])
    spec = machine.read("/etc/nodeagent/node.yaml")
    try:
        machine.sh("mv /etc/nodeagent/node.yaml /tmp/kept && mkfifo /etc/nodeagent/node.yaml")

        def barked() -> bool | Waiting:
            said = machine.journal("nodeagent.service")
            return "Watchdog timeout" in said or Waiting(said[-300:])

        wait_until(barked, 90, "the watchdog")
    finally:
        machine.sh("rm -f /etc/nodeagent/node.yaml && mv /tmp/kept /etc/nodeagent/node.yaml")
        machine.sh(f"rm -rf {drop_in} && systemctl daemon-reload")
        machine.run("systemctl", "restart", "nodeagent.service")
    assert machine.read("/etc/nodeagent/node.yaml") == spec
    cluster.wait_ready([machine])


def test_a_rebooted_server_returns_by_itself(four: list[Machine]) -> None:
    before = assert_one_swarm(four)
    four[0].reboot()
    cluster.wait_ready(four)
    wait_listed_ready(four[1], [each.name for each in four])
    assert assert_one_swarm(four) == before
    assert restarts_of(four[0]) == 0


def test_all_machines_lose_power_at_once_and_come_back(four: list[Machine]) -> None:
    before = assert_one_swarm(four)
    for machine in four:
        machine.kill()
    for machine in four:
        machine.boot()
    cluster.wait_ready(four)
    wait_listed_ready(four[0], [each.name for each in four])
    assert assert_one_swarm(four) == before


def test_a_worker_whose_token_was_deleted_gets_another_as_its_sentence_says(
    four: list[Machine],
) -> None:
    worker = four[-1]
    cluster.forget_token(four[0], worker.name)

    def sentence() -> str | Waiting:
        said = cluster.status(worker)
        is_blocked = said.get("state") == "blocked"
        return str(said["sentence"]) if is_blocked else Waiting(str(said.get("sentence")))

    worker.run("systemctl", "restart", "nodeagent")  # or it would look only half a minute later
    cure = f"rm {paths.NODE_TOKEN}"
    assert f"; {cure}" in wait_until(sentence, 60, "the agent to miss its token")
    worker.sh(f"{cure}; systemctl restart nodeagent")
    cluster.wait_ready([worker])


def an_hour_later(lab: Lab, name: str, address: str) -> Machine:
    """A new worker whose agent lives an hour later than everything else; off."""
    (machine,) = cluster.make(lab, cluster.cluster_file(lab), {name: address})
    machine.write("/opt/later.py", Path(__file__).with_name("later.py").read_text("utf-8"))
    machine.write(
        "/etc/systemd/system/nodeagent.service.d/later.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/python3 /opt/later.py\n",
    )
    return machine


def test_a_machine_that_comes_an_hour_later_joins(lab: Lab, four: list[Machine]) -> None:
    machine = an_hour_later(lab, "worker2", "10.10.0.22")
    machine.boot()
    cluster.wait_ready([machine])
    hours = (cluster.status(machine)["updated"] - cluster.status(four[0])["updated"]) / 3600
    assert 0.9 < hours < 1.1, "the clock was not faked"
    assert_one_swarm([*four, machine])
    machine.destroy()


def test_it_joins_when_the_first_server_is_gone_too(lab: Lab, four: list[Machine]) -> None:
    record = json.loads(cluster.consul_kv(four[0], "swarm/state"))
    first = next(machine for machine in four if machine.name == record["node"])
    first.kill()
    machine = an_hour_later(lab, "worker3", "10.10.0.23")
    machine.boot()
    try:
        cluster.wait_ready([machine])
        others = [each for each in four if each is not first and each.name.startswith("server")]
        assert cluster.swarm(machine)["LocalNodeState"] == "active"
        wait_listed_ready(others[0], [machine.name])
    finally:
        machine.destroy()
        first.boot()
    cluster.wait_ready(four)
