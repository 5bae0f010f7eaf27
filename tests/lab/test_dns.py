"""Names of the cluster and of the world outside resolve on machines and in all their containers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from nodeagent import paths
from nodeagent.steps import dns
from tests.lab import cluster, images
from tests.lab.flavours import FLAVOURS
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import BRIDGE, GATEWAY, Lab, Machine

ADDRESSES = {"server-dns": "10.10.0.61", "worker-dns": "10.10.0.62"}
SERVER = ADDRESSES["server-dns"]
CONSUL, WRONG = "consul.service.consul", "nobody.service.consul"
OUTSIDE, OUTSIDE_ADDRESS, OUTSIDE_WRONG = "outside.example", "203.0.113.80", "nobody.example"

# Networks of containers, with their drivers; "" is the default bridge.
NETWORKS = {"bridge": "", "named-bridge": "bridge", "named-overlay": "overlay --attachable"}
PLACES = ("host", *NETWORKS)

# glibc's resolver, which programs use: busybox has none, and its nslookup asks one server at most.
# The error for "no such name" (-2) is not the one for "nobody answers" (-3).
ASK = """
import json, socket, sys, time
heard = {}
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        said = sorted(each[4][0] for each in found)
    except socket.gaierror as error:
        said = {socket.EAI_NONAME: "no such name", socket.EAI_AGAIN: "no answer"}[error.errno]
    heard[name] = (said, time.monotonic() - began)
print(json.dumps(heard))
"""
KNOWN: Mapping[str, object] = {
    CONSUL: [SERVER],
    WRONG: "no such name",
    OUTSIDE: [OUTSIDE_ADDRESS],
    OUTSIDE_WRONG: "no such name",
}

# What the owner had: bytes that a careless rewriting would lose, and an order that matters.
OWNERS = f"# the owner's\r\n\nsearch example\nnameserver {GATEWAY}\noptions timeout:2 \n# no end"


@dataclass(frozen=True)
class Heard:
    """What a place was told, and how long the slowest answer took."""

    said: Mapping[str, object]
    slowest_s: float


def words_in(place: str) -> str:
    """What puts a command of the machine's into a container's network, with its resolv.conf."""
    if place == "host":
        return ""
    look = f"docker inspect -f '{{{{.State.Pid}}}} {{{{.ResolvConfPath}}}}' box-{place}"
    return (
        f"set -- $({look}); "
        'nsenter --net=/proc/$1/ns/net unshare --mount sh -c "mount --bind $2 /etc/resolv.conf; '
    )


def run_in(machine: Machine, place: str, *command: str) -> str:
    before = words_in(place)
    words = shlex.join(command)
    if before:
        escaped = words.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
        return machine.sh(f'{before}{escaped}"', timeout_s=60)
    return machine.sh(words, timeout_s=60)


def ask(machine: Machine, place: str, *names: str) -> Heard:
    said = json.loads(run_in(machine, place, "python3", "-I", "-c", ASK, *names))
    return Heard(
        {name: what for name, (what, _) in said.items()}, max(took for _, took in said.values())
    )


def srv(machine: Machine, place: str) -> str:
    return run_in(machine, place, "dig", "+short", "+tries=1", "SRV", CONSUL)


def start_containers(machine: Machine) -> None:
    for network in NETWORKS:
        run = ("docker", "run", "-d", "--restart", "always", "--name", f"box-{network}")
        machine.run("docker", "rm", "-f", f"box-{network}", check=False)
        machine.run(*run, "--network", network, cluster.BOX_IMAGE, "sleep", "100000")


def assert_all_resolve(machine: Machine) -> None:
    heard = {place: ask(machine, place, *KNOWN) for place in PLACES}
    assert {place: each.said for place, each in heard.items()} == dict.fromkeys(PLACES, KNOWN)
    records = {place: srv(machine, place) for place in PLACES}
    wanted = "1 1 8300 server-dns.node.lab.consul."
    assert records == dict.fromkeys(PLACES, wanted)
    for network in NETWORKS:  # and with a program of the container's own
        said = machine.run("docker", "exec", f"box-{network}", "nslookup", CONSUL, check=False)
        assert f"Address: {SERVER}" in said.stdout, said
    slowest = {place: f"{each.slowest_s * 1000:.0f} ms" for place, each in heard.items()}
    print(f"slowest answer on {machine.name}: {slowest}")


def assert_outside_resolves_without_consul(machine: Machine) -> None:
    machine.run("systemctl", "stop", "nodeagent")
    try:
        engine = f"unix://{paths.SYSTEM_ENGINE_SOCKET}"
        machine.run("docker", "-H", engine, "stop", "-t", "5", "consul", timeout_s=60)
        for place in PLACES:
            heard = ask(machine, place, OUTSIDE, OUTSIDE_WRONG)
            assert heard.said == {OUTSIDE: [OUTSIDE_ADDRESS], OUTSIDE_WRONG: "no such name"}, place
            assert heard.slowest_s < 1, place
            assert CONSUL not in {
                name for name, said in ask(machine, place, CONSUL).said.items() if said == [SERVER]
            }, "Consul is down, or so it was meant"
    finally:
        machine.run("systemctl", "start", "nodeagent")
    cluster.wait_ready([machine])


def dns_sentence(machine: Machine) -> str:
    return str(cluster.status(machine)["steps"]["dns"]["sentence"])


# A stranger's question, put to the machine's link by hand: no router would bring it there.
STRANGER = """
import sys, dns.exception, dns.message, dns.query
for ask in (dns.query.udp, dns.query.tcp):
    try:
        ask(dns.message.make_query(sys.argv[1], "A"), sys.argv[2], timeout=1)
        print("an answer")
    except dns.exception.Timeout:
        print("nothing")
"""


def stranger_hears(lab: Lab, machine: Machine) -> list[str]:
    route = (f"{dns.ADDRESS}/32", "via", machine.address, "dev", BRIDGE, "onlink")
    lab.run("ip", "route", "replace", *route)
    try:
        return lab.run(sys.executable, "-c", STRANGER, CONSUL, dns.ADDRESS).stdout.splitlines()
    finally:
        lab.run("ip", "route", "delete", *route)


def assert_strangers_hear_nothing(lab: Lab, machine: Machine) -> None:
    assert stranger_hears(lab, machine) == ["nothing"] * 2
    rule = f"pref {dns.RULE} from {dns.ADDRESS} to 10.10.0.0/16 prohibit"
    machine.run("systemctl", "stop", "nodeagent")
    try:
        machine.sh(f"ip rule delete {rule}")
        assert stranger_hears(lab, machine) == ["an answer"] * 2, "it is the rule that does it"
    finally:
        machine.run("systemctl", "start", "nodeagent")
    cluster.wait_ready([machine])
    assert stranger_hears(lab, machine) == ["nothing"] * 2


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "trixie" else [pytest.mark.full, pytest.mark.long])
        for name in FLAVOURS
    ],
)
def two(lab: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Machine, Machine]]:
    """A server and a worker, and networks of both kinds across them."""
    lab.dns(a={OUTSIDE: [OUTSIDE_ADDRESS]})
    file = cluster.cluster_file(lab, cluster="names", servers=1, join=[SERVER])
    machines = cluster.make(lab, file, ADDRESSES, flavour=request.param)
    try:
        for machine in machines:
            machine.boot()
        cluster.wait_ready(machines)
        server, worker = machines
        for machine in machines:
            machine.sh(f"curl -sf {lab.serve(images.box_archive(), 'box.tar')} | docker load")
        server.sh("docker network create -d overlay --attachable named-overlay")
        for machine in machines:
            machine.sh("docker network create -d bridge named-bridge")
            start_containers(machine)
        yield server, worker
    finally:
        for machine in machines:
            machine.destroy()
        lab.dns()


@pytest.fixture
def server(two: tuple[Machine, Machine]) -> Machine:
    return two[0]


@pytest.fixture
def worker(two: tuple[Machine, Machine]) -> Machine:
    return two[1]


def undo(machine: Machine) -> str:
    """Take it back; returns what was said."""
    machine.run("systemctl", "stop", "nodeagent")
    return machine.run("nodeagent", "reset", timeout_s=120).stdout


def assert_nothing_is_left(machine: Machine) -> None:
    assert dns.ADDRESS not in machine.sh("ip address; ss -Hlnu 'sport = 53'; cat /etc/resolv.conf")
    assert "nodeagent" not in machine.sh("ls /etc/systemd/resolved.conf.d /sys/class/net")
    assert dns.ADDRESS not in machine.sh("ip rule")


# -- with systemd-resolved, as the machines come


def test_names_resolve_everywhere(two: tuple[Machine, Machine]) -> None:
    for machine in two:
        assert "through systemd-resolved" in dns_sentence(machine)
        assert_all_resolve(machine)


def test_without_consul_names_outside_do(worker: Machine) -> None:
    assert_outside_resolves_without_consul(worker)


def test_the_owners_servers_for_all_names_are_asked_as_before(worker: Machine) -> None:
    """A server of systemd-resolved's own (DNS=) would be asked for the cluster's names as well."""
    owners = "/etc/systemd/resolved.conf.d/owner.conf"
    worker.write(owners, f"[Resolve]\nDNS={GATEWAY}\nDomains=~.\n")
    try:
        worker.run("systemctl", "restart", "systemd-resolved")
        for _ in range(3):  # it goes on with the server that answered last
            assert_all_resolve(worker)
    finally:
        worker.run("rm", owners)
        worker.run("systemctl", "restart", "systemd-resolved")
    assert_all_resolve(worker)


def test_a_stranger_on_the_network_is_told_no_names(lab: Lab, worker: Machine) -> None:
    assert_strangers_hear_nothing(lab, worker)


@pytest.mark.full
def test_an_interface_that_somebody_removed_comes_back(worker: Machine) -> None:
    worker.run("ip", "link", "delete", dns.INTERFACE)
    worker.run("systemctl", "restart", "nodeagent")
    cluster.wait_ready([worker])
    assert_all_resolve(worker)


@pytest.mark.full
def test_after_a_reboot_names_resolve_as_before(worker: Machine) -> None:
    worker.reboot()
    cluster.wait_ready([worker])
    assert_all_resolve(worker)


@pytest.mark.full
def test_what_was_done_can_be_undone(worker: Machine) -> None:
    link = worker.sh("readlink /etc/resolv.conf")
    assert "names resolve as without nodeagent" in undo(worker)
    assert_nothing_is_left(worker)
    assert worker.sh("readlink /etc/resolv.conf") == link
    heard = ask(worker, "host", OUTSIDE, CONSUL)
    assert heard.said == {OUTSIDE: [OUTSIDE_ADDRESS], CONSUL: "no such name"}
    worker.run("systemctl", "start", "nodeagent")
    cluster.wait_ready([worker])
    assert_all_resolve(worker)


# -- without


@pytest.fixture(scope="module")
def plain(two: tuple[Machine, Machine]) -> Machine:
    """The worker without systemd-resolved, with a resolv.conf of its owner's."""
    machine = two[1]
    machine.run("systemctl", "stop", "nodeagent")
    machine.run("systemctl", "mask", "--now", "systemd-resolved")
    machine.run("rm", "/etc/resolv.conf")
    machine.write("/etc/resolv.conf", OWNERS, 0o640)
    machine.run("chown", "0:33", "/etc/resolv.conf")
    machine.run("systemctl", "start", "nodeagent")

    def through_consul() -> bool | Waiting:
        said = cluster.status(machine).get("steps", {}).get("dns", {}).get("sentence", "")
        return "through Consul" in said or Waiting(said)

    wait_until(through_consul, 60, "Consul to answer names")
    cluster.wait_ready([machine])
    start_containers(machine)
    return machine


def test_without_resolved_names_resolve_everywhere(plain: Machine) -> None:
    print(dns_sentence(plain))
    assert_all_resolve(plain)


def test_one_line_is_all_that_changes_in_resolv_conf(plain: Machine) -> None:
    said = plain.run("sh", "-c", "cat /etc/resolv.conf; stat -c ' %u:%g %a' /etc/resolv.conf")
    ours = OWNERS.replace("\nnameserver", f"\n{dns.LINE}nameserver")
    assert said.stdout.replace("\r", "") == ours.replace("\r", "") + " 0:33 640\n"


def test_without_resolved_and_without_consul_names_outside_resolve(plain: Machine) -> None:
    assert_outside_resolves_without_consul(plain)


@pytest.mark.full
def test_without_resolved_a_stranger_is_told_no_names(lab: Lab, plain: Machine) -> None:
    assert_strangers_hear_nothing(lab, plain)


@pytest.mark.full
def test_without_resolved_an_interface_that_somebody_removed_comes_back(plain: Machine) -> None:
    plain.run("ip", "link", "delete", dns.INTERFACE)
    plain.run("systemctl", "restart", "nodeagent")
    cluster.wait_ready([plain])
    assert_all_resolve(plain)


@pytest.mark.full
def test_a_line_that_another_program_overwrote_comes_back(plain: Machine) -> None:
    plain.write("/etc/resolv.conf", f"nameserver {GATEWAY}\n")
    plain.run("systemctl", "restart", "nodeagent")

    def back() -> bool | Waiting:
        said = plain.read("/etc/resolv.conf")
        return said == f"{dns.LINE}nameserver {GATEWAY}\n" or Waiting(said)

    wait_until(back, 60, "the line to be back")
    plain.write("/etc/resolv.conf", OWNERS, 0o640)
    plain.run("chown", "0:33", "/etc/resolv.conf")
    plain.run("systemctl", "restart", "nodeagent")
    wait_until(lambda: dns.LINE in plain.read("/etc/resolv.conf"), 60, "the line in the old file")


@pytest.mark.full
def test_without_resolved_names_resolve_after_a_reboot(plain: Machine) -> None:
    plain.reboot()
    cluster.wait_ready([plain])
    assert_all_resolve(plain)


@pytest.mark.full
def test_without_resolved_it_can_be_undone_to_the_byte(plain: Machine) -> None:
    assert "names resolve as without nodeagent" in undo(plain)
    plain.run("docker", "-H", f"unix://{paths.SYSTEM_ENGINE_SOCKET}", "stop", "consul")
    assert_nothing_is_left(plain)
    hexed = plain.sh("od -An -v -tx1 /etc/resolv.conf | tr -d ' \\n'")
    assert bytes.fromhex(hexed) == OWNERS.encode()
    assert plain.sh("stat -c '%u:%g %a' /etc/resolv.conf") == "0:33 640"
    assert ask(plain, "host", OUTSIDE).said == {OUTSIDE: [OUTSIDE_ADDRESS]}
