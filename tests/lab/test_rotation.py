"""Keys, tokens, certificates and CA change on a running cluster, which nobody notices."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import cluster
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Machine
from tests.lab.test_cluster import consul_pid, wait_listed_ready

KEYRING = "/var/lib/nodeagent/consul/data/serf/local.keyring"
NODE_PEM = "/var/lib/nodeagent/consul/config/node.pem"
TOKENS = "/var/lib/nodeagent/consul/tokens.json"
SECRETS = "/etc/nodeagent/secrets.json"

# Asks who leads, as fast as it is answered, until its file is gone; each answer is a line.
WATCH_LEADER = """
touch /run/watching
while [ -e /run/watching ]; do
    curl -s -m 2 http://127.0.0.1:8500/v1/status/leader || echo none; echo
done > /run/leaders
"""

# What a server's RPC port says to the certificate in a file: Consul's byte for TLS, a handshake,
# and a read, on which a refusal shows with TLS 1.3.
SHOW_CERTIFICATE = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
context.load_cert_chain(sys.argv[2])
plain = socket.create_connection((sys.argv[3], 8300), 5)
plain.sendall(b"\\x03")
try:
    secured = context.wrap_socket(plain, server_hostname="server.lab.consul")
    secured.settimeout(1)
    secured.recv(1)
except TimeoutError:
    print("welcome")
except ssl.SSLError as error:
    print("refused:", error.reason)
"""


def token(machine: Machine, kind: str = "token") -> str:
    return str(json.loads(machine.read(TOKENS))[kind])


def ask(machine: Machine, path: str, shown: str) -> tuple[int, str]:
    """Status and body of an answer of the local Consul to this token."""
    said = machine.run(
        *("curl", "-s", "-w", "\n%{http_code}", "-H", f"X-Consul-Token: {shown}"),
        f"http://127.0.0.1:8500/v1/{path}",
    ).stdout
    body, _, status = said.rpartition("\n")
    return int(status), body


def raft(machine: Machine) -> dict[str, Any]:
    _, body = ask(machine, "agent/self", token(machine, "recovery"))
    return dict(json.loads(body)["Stats"]["raft"])


@contextlib.contextmanager
def undisturbed(four: list[Machine]) -> Iterator[None]:
    """Inside, no election is held, no Consul ends, no read finds no leader, and no node is lost."""
    servers = [machine for machine in four if machine.name.startswith("server")]
    terms = {server.name: raft(server)["term"] for server in servers}
    pids = {machine.name: consul_pid(machine) for machine in four}
    servers[-1].sh(f"nohup sh -c '{WATCH_LEADER}' > /dev/null 2>&1 &")
    try:
        yield
    finally:
        servers[-1].sh("rm -f /run/watching")
    leaders = servers[-1].read("/run/leaders").split()
    assert len(leaders) > 10
    assert len(set(leaders)) == 1, set(leaders)
    assert leaders[0] != '""'
    assert {server.name: raft(server)["term"] for server in servers} == terms
    assert {machine.name: consul_pid(machine) for machine in four} == pids
    cluster.wait_ready(four)
    wait_listed_ready(servers[0], [machine.name for machine in four])


def rotate(machine: Machine, what: str) -> str:
    return machine.run("nodeagent", "secrets", "rotate", what, timeout_s=120).stdout


def secrets_of(machine: Machine) -> dict[str, Any]:
    return dict(json.loads(machine.read(SECRETS)))


def test_gossip_key(four: list[Machine]) -> None:
    old = four[0].read(KEYRING)
    with undisturbed(four):
        rotate(four[0], "gossip")
    rings = {machine.name: json.loads(machine.read(KEYRING)) for machine in four}
    new = rings["server1"]
    assert len(new) == 1
    assert set(map(json.dumps, rings.values())) == {json.dumps(new)}
    assert new[0] not in old
    assert secrets_of(four[-1])["gossip_key"] == new[0]


def test_tokens(four: list[Machine]) -> None:
    place = "kv/nodeagent/demo/worker/swarm"
    old = {machine.name: token(machine) for machine in four}
    assert {ask(machine, place, old[machine.name])[0] for machine in four} == {200}
    with undisturbed(four):
        rotate(four[1], "tokens")
    for machine in four:
        assert token(machine) != old[machine.name]
        assert ask(machine, place, token(machine))[0] == 200
        status, words = ask(machine, place, old[machine.name])
        assert status == 403
        assert words.endswith("ACL not found")
        kept = machine.read("/var/lib/nodeagent/consul/config/keys.json")
        assert old[machine.name] not in kept


def test_certificate_authority_with_both_trusted_on_the_way(four: list[Machine]) -> None:
    server, worker = four[0], four[-1]
    worker.sh("cp /var/lib/nodeagent/consul/config/node.pem /root/old.pem")
    worker.write("/root/show.py", SHOW_CERTIFICATE)
    ca = "/var/lib/nodeagent/consul/config/ca.pem"

    def show(file: str) -> str:
        return worker.run("python3", "/root/show.py", ca, file, server.address).stdout.strip()

    assert show("/root/old.pem") == "welcome"
    with undisturbed(four):
        rotate(four[2], "ca")
    assert show(NODE_PEM) == "welcome"
    assert show("/root/old.pem") == "refused: SSLV3_ALERT_BAD_CERTIFICATE"
    authorities = {tuple(secrets_of(machine)["authorities"]) for machine in four}
    assert len(authorities) == 1
    assert len(next(iter(authorities))) == 1


def test_join_tokens_of_the_swarm(four: list[Machine]) -> None:
    server = four[0]
    before = cluster.consul_kv(server, "swarm/manager-token")
    with undisturbed(four):
        rotate(server, "swarm")
    after = cluster.consul_kv(server, "swarm/manager-token")
    assert after != before
    assert after == server.run("docker", "swarm", "join-token", "-q", "manager").stdout.strip()
    entry = json.loads(cluster.consul_kv(server, "worker/swarm"))
    assert (
        entry["token"] == server.run("docker", "swarm", "join-token", "-q", "worker").stdout.strip()
    )
    # The rest of the Swarm's settings is as it was: docker-py's own update would zero it.
    spec = json.loads(server.run("docker", "system", "info", "-f", "{{json .Swarm}}").stdout)
    assert spec["Cluster"]["Spec"]["Orchestration"]["TaskHistoryRetentionLimit"] == 5


@pytest.mark.parametrize("phase", ["know", "use", "forget"])
def test_a_rotation_killed_in_the_middle_goes_on_when_asked_again(
    four: list[Machine], phase: str
) -> None:
    """Killed as soon as it says that it waits for the nodes in this phase."""
    server = four[0]
    old = secrets_of(server)["authorities"]
    with undisturbed(four):
        server.sh(
            "touch /run/rotation && systemd-run -q --collect --unit=rotation "
            "-p KillSignal=SIGKILL -p StandardOutput=truncate:/run/rotation "
            "nodeagent secrets rotate ca"
        )

        def reached() -> bool | Waiting:
            said = server.read("/run/rotation")
            return f"every node to {phase} the" in said or Waiting(said)

        try:
            wait_until(reached, 120, f"the rotation to wait for every node to {phase} the key")
        finally:
            server.run("systemctl", "stop", "rotation", check=False)
        cluster.wait_ready(four)  # in the middle of it
        if phase != "forget":  # by then everything is written, and the agents do the rest
            assert json.loads(cluster.consul_kv(server, "secrets/state"))["rotating"] == "ca"
            rotate(server, "ca")
    assert secrets_of(server)["authorities"] != old
    assert len(secrets_of(server)["authorities"]) == 1


def test_a_server_replaces_its_certificate_and_consul_takes_it_without_a_restart(
    four: list[Machine],
) -> None:
    server = four[1]
    before = server.read(NODE_PEM)
    with undisturbed(four):
        server.sh(f"rm {NODE_PEM} && nodeagent apply")
    assert server.read(NODE_PEM) != before
    assert served(server) == certificate(server.read(NODE_PEM))


SERVED = """
import socket, ssl, sys
context = ssl._create_unverified_context()
context.load_cert_chain("/var/lib/nodeagent/consul/config/node.pem")
plain = socket.create_connection((sys.argv[1], 8300), 5)
plain.sendall(b"\\x03")
der = context.wrap_socket(plain).getpeercert(binary_form=True)
print(ssl.DER_cert_to_PEM_cert(der))
"""


def served(server: Machine) -> str:
    """The certificate that a server's RPC port shows now."""
    said = server.run("python3", "-c", SERVED, server.address).stdout
    return certificate(said)


def certificate(pem: str) -> str:
    return pem[: pem.index("-----END CERTIFICATE-----")].strip()


@pytest.mark.full
def test_certificates_of_two_minutes_are_renewed_again_and_again(four: list[Machine]) -> None:
    """Again and again on each server; nobody drops a leader for it."""
    servers = four[:3]
    spec = {server.name: server.read("/etc/nodeagent/node.yaml") for server in servers}
    renewals = dict.fromkeys(spec, 0)
    last: dict[str, str] = {}
    for server in servers:
        text = spec[server.name].replace("consul:\n", "consul:\n  certificate_lifetime: 2m\n")
        server.write("/etc/nodeagent/node.yaml", text, 0o600)
        server.sh(f"rm {NODE_PEM} && nodeagent apply")
        last[server.name] = served(server)

    def renewed() -> bool | Waiting:
        for server in servers:
            now = served(server)
            renewals[server.name] += now != last[server.name]
            last[server.name] = now
        return min(renewals.values()) >= 2 or Waiting(str(renewals))

    try:
        with undisturbed(four):
            wait_until(renewed, 600, "each server's certificate to be renewed twice")
            assert "valid for 1 more minutes" in servers[0].run("nodeagent", "status").stdout
    finally:
        for server in servers:
            server.write("/etc/nodeagent/node.yaml", spec[server.name], 0o600)
            server.sh(f"rm {NODE_PEM} && nodeagent apply")
