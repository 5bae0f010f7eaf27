"""What root on a worker, a container, and a stranger on the network can do to a cluster.

What is not prevented, and no test here says otherwise: whoever has the gossip key is believed
about who is a member, so a worker can make up members and declare others gone; the networks
between containers (4789/udp) are neither encrypted nor authenticated by the Engine.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import json
import os
import re
import socket
import ssl
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nodeagent import secrets
from nodeagent.adapters.pki import LocalPki
from nodeagent.errors import Secret
from tests.lab import cluster, host, images
from tests.lab.host import LabError, Waiting, wait_until
from tests.lab.intruder import (
    CONFIG,
    MANAGER_TOKEN,
    PREFIX,
    STRANGER,
    SYSTEM_ENGINE,
    TOKENS,
    UUID,
    Answer,
    Call,
    as_server,
    ask,
    disguises,
    disk,
    foreign_consul,
    gather,
    managers_secret,
    members,
    own_token,
    raft_peers,
    raft_state,
    remember,
    search,
    servers_secrets,
    socket_in,
    store,
    stranger,
    wait_forgotten,
)
from tests.lab.lab import METADATA_ADDRESS, Lab, Machine

# -- root on a worker ------------------------------------------------------------------------

# Where our keys could be; `engine` and `images` are what containers are made of.
PLACES = ("etc/nodeagent", "opt/nodeagent/user-data", "var/lib/cloud")
VOLUME = "var/lib/nodeagent"


@dataclass(frozen=True)
class Loot:
    """What the attacker has found on the worker's disk."""

    worker: Machine
    tokens: tuple[str, ...] = field(repr=False)
    own: str = field(repr=False)  # the node's token
    enrolment: str = field(repr=False)
    generation: str
    authority: str = field(repr=False)
    pki: LocalPki = field(repr=False)

    def request(self, token: str, *, text: str = "") -> str:
        """A request to the servers for this token, or for what is none."""
        wanted = Secret(token)
        sealed = self.pki.seal(self.authority, Secret(text or token))
        return secrets.Request(secrets.request_id(wanted), self.generation, sealed).dump()

    def enrol(self, node: str, token: str, *, text: str = "") -> None:
        said = ask(
            self.worker,
            "PUT",
            f"kv/{PREFIX}enrol/{node}",
            self.request(token, text=text),
            token=self.enrolment,
        )
        assert said.text == "true"

    def answer_to(self, server: Machine, node: str, timeout_s: float = 20) -> str:
        """What the servers answer to the request that is there now."""

        def answered() -> str | Waiting:
            _, value = store(server)[f"{PREFIX}enrol/{node}"]
            request = secrets.Request.parse(base64.b64decode(value).decode())
            assert request is not None
            return request.answer or Waiting(cluster.status(server).get("sentence"))

        return wait_until(answered, timeout_s, f"an answer to the request of {node}")


@pytest.fixture(scope="module")
def loot(four: list[Machine]) -> Loot:
    worker = four[-1]
    tops = [worker.upper / place for place in PLACES]
    tops += [cluster.inside(worker, "/run/cloud-init")]
    top = worker.volumes / VOLUME
    tops += [path for path in top.iterdir() if path.name not in ("engine", "images")]
    found: set[str] = set()
    for path in tops:
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        for file in files:
            found |= {each.decode() for each in UUID.findall(file.read_bytes())}
    given = json.loads(worker.read("/etc/nodeagent/secrets.json"))
    shown = json.loads(worker.read(TOKENS))
    enrolment, own = given["enrolment"], shown["token"]
    assert {enrolment, own, shown["recovery"]} <= found, "the search finds what is there"
    authority, tokens = given["authorities"][-1], tuple(sorted(found))
    return Loot(worker, tokens, own, enrolment, given["generation"], authority, LocalPki())


def kv_reads(key: str) -> list[Call]:
    """Every way to read a key in Consul."""
    folder = key.rpartition("/")[0]
    found: list[Call] = [
        ("GET", f"kv/{key}{how}", None)
        for how in ("", "?raw", "?raw&stale", "?consistent", "?recurse", "?raw&dc=lab")
    ]
    for top in (folder, PREFIX, "", "n"):
        found += [("GET", f"kv/{top}?recurse{how}", None) for how in ("", "&stale", "&consistent")]
    for mode in ("", "?stale", "?consistent"):
        found.append(("PUT", f"txn{mode}", [{"KV": {"Verb": "get", "Key": key}}]))
        found.append(("PUT", f"txn{mode}", [{"KV": {"Verb": "get-tree", "Key": folder}}]))
    return found


# What tells more than names, and never those of a worker.
CLOSED: tuple[Call, ...] = (
    ("GET", "snapshot", None),
    ("GET", "snapshot?stale", None),
    ("GET", "acl/tokens", None),
    ("GET", "acl/policies", None),
    ("PUT", "acl/bootstrap", None),
    ("PUT", "acl/token", {"Policies": [{"Name": "global-management"}]}),
    ("PUT", "acl/policy", {"Name": "mine", "Rules": 'key_prefix "" { policy = "write" }'}),
    ("GET", "operator/raft/configuration", None),
    ("GET", "operator/autopilot/configuration", None),
    ("GET", "operator/keyring", None),
    ("PUT", "event/fire/deploy", "x"),
)


def test_no_token_on_a_worker_reads_the_managers_join_token(
    four: list[Machine], loot: Loot
) -> None:
    server, worker = four[0], loot.worker
    looks = disguises(managers_secret(server))

    def shown(said: Answer) -> bool:
        return any(look in said.body for look in looks)

    # The control, by a server's Consul: the worker's must never have seen what is searched below.
    reads, everything = kv_reads(MANAGER_TOKEN), own_token(server)
    leaks = [read for read in reads if shown(ask(server, *read, token=everything))]
    assert leaks == reads, "each shows it to who may see it"
    for known in (None, *loot.tokens):
        leaks = [read for read in reads if shown(ask(worker, *read, token=known))]
        assert leaks == [], known
        opened = [read for read in CLOSED if ask(worker, *read, token=known).status == 200]
        assert opened == [], known


def test_a_worker_is_no_manager_that_tells_join_tokens(loot: Loot) -> None:
    said = loot.worker.run("docker", "swarm", "join-token", "manager", check=False)
    assert said.returncode == 1
    assert "This node is not a swarm manager" in said.stderr


OTHERS = (
    "nodes/server1/secrets",
    "nodes/server1/token",
    "nodes/other/token",
    "swarm/state",
    "swarm/manager-token",
    "swarm/manager-join",
    "swarm/new",
    "secrets/state",
    "worker/swarm",
    "worker/secrets",
    "new",
)


def kv_writes(key: str, session: str) -> Iterator[Call]:
    """Every way to write or delete a key in Consul."""
    value = base64.b64encode(b"owned").decode()
    folder = key.rpartition("/")[0] + "/"
    yield "PUT", f"kv/{key}", "owned"
    yield "PUT", f"kv/{key}?cas=0", "owned"
    yield "PUT", f"kv/{key}?acquire={session}", "owned"
    yield "DELETE", f"kv/{key}", None
    yield "DELETE", f"kv/{folder}?recurse", None
    for verb in ("set", "cas", "lock", "delete", "delete-cas"):
        operation = {"Verb": verb, "Key": key, "Value": value, "Index": 0, "Session": session}
        yield "PUT", "txn", [{"KV": operation}]
    yield "PUT", "txn", [{"KV": {"Verb": "delete-tree", "Key": folder}}]


def is_done(said: Answer) -> bool:
    return said.status == 200 and said.text != "false"


def test_no_token_on_a_worker_writes_what_is_not_its_own(four: list[Machine], loot: Loot) -> None:
    server, worker = four[0], loot.worker
    before = store(server)
    said = ask(worker, "PUT", "session/create", {"Node": worker.name}, token=loot.own)
    session = said.json()["ID"]
    try:
        done = [
            (token, write)
            for token in (None, *loot.tokens)
            for key in (*(f"{PREFIX}{key}" for key in OTHERS), "nodeagent/other/x", "elsewhere/x")
            for write in kv_writes(key, session)
            if is_done(ask(worker, *write, token=token))
        ]
        assert done == []
        assert store(server) == before
        own = list(kv_writes(f"{PREFIX}nodes/{worker.name}/x", session))
        mine = [write for write in own if is_done(ask(worker, *write, token=loot.own))]
        assert {write[0] for write in mine} == {"PUT", "DELETE"}, "its own it does write"
    finally:
        ask(worker, "PUT", f"session/destroy/{session}", token=loot.own)
        ask(worker, "DELETE", f"kv/{PREFIX}nodes/{worker.name}/x", token=loot.own)
    assert store(server) == before


def catalogued(server: Machine, service: str) -> list[tuple[str, str, int]]:
    found = as_server(server, f"catalog/service/{service}")
    return sorted((each["Node"], each["Address"], each["ServicePort"]) for each in found)


def test_a_worker_registers_no_server_and_no_manager(four: list[Machine], loot: Loot) -> None:
    """Nor moves a node. But Consul's rules for services are the same on all nodes: a worker can
    write instances of `nodeagent` and `docker-engine` on any, so nothing may be built on those.
    """
    server, worker = four[0], loot.worker

    def entry(node: str, address: str, service: str, *, skip: bool) -> dict[str, object]:
        named = {"ID": f"false:{service}", "Service": service, "Port": 666}
        return {"Node": node, "Address": address, "Service": named, "SkipNodeUpdate": skip}

    names = ("swarm-manager", "consul", "anything")
    before = {name: catalogued(server, name) for name in names}
    nodes = [(each["Node"], each["Address"]) for each in as_server(server, "catalog/nodes")]
    where = (("server1", "10.10.0.11"), ("server1", STRANGER), (worker.name, worker.address))
    tries: list[Call] = [
        ("PUT", "catalog/register", entry(node, address, name, skip=skip))
        for name in names
        for node, address in where
        for skip in (False, True)
    ]
    tries += [
        ("PUT", "catalog/register", {"Node": node, "Address": STRANGER})
        for node in ("server1", "server2", "unknown")
    ]
    tries += [("PUT", "catalog/deregister", {"Node": "server1"})]
    tries += [
        ("PUT", "agent/service/register", {"ID": name, "Name": name, "Port": 666}) for name in names
    ]
    tries += [
        (
            "PUT",
            "txn",
            [{"Node": {"Verb": "set", "Node": {"Node": "server1", "Address": STRANGER}}}],
        ),
        ("PUT", "txn", [{"Node": {"Verb": "delete", "Node": {"Node": "server1"}}}]),
    ]
    done = [
        (token, each)
        for token in (None, *loot.tokens)
        for each in tries
        if is_done(ask(worker, *each, token=token))
    ]
    assert done == []
    assert {name: catalogued(server, name) for name in names} == before
    seen = [(each["Node"], each["Address"]) for each in as_server(server, "catalog/nodes")]
    assert seen == nodes

    false = entry("server1", "10.10.0.11", "docker-engine", skip=True)
    try:
        assert ask(worker, "PUT", "catalog/register", false, token=loot.own).text == "true"
        assert ("server1", "10.10.0.11", 666) in catalogued(server, "docker-engine")
    finally:
        gone = {"Node": "server1", "ServiceID": "false:docker-engine"}
        ask(worker, "PUT", "catalog/deregister", gone, token=loot.own)
    assert ("server1", "10.10.0.11", 666) not in catalogued(server, "docker-engine")


# -- certificates ----------------------------------------------------------------------------

SIGNERS: tuple[Call, ...] = (
    ("GET", "connect/ca/roots", None),
    ("GET", "connect/ca/configuration", None),
    ("PUT", "connect/ca/configuration", {"Provider": "consul", "Config": {}}),
    ("GET", "agent/connect/ca/roots", None),
    ("GET", "agent/connect/ca/leaf/consul", None),
)
OFF = "Connect must be enabled in order to use this endpoint"


def packed(value: object) -> bytes:
    """MessagePack of what Consul's RPC takes: short maps, short texts, small numbers, flags."""
    if isinstance(value, dict):
        return bytes([0x80 | len(value)]) + b"".join(
            packed(k) + packed(v) for k, v in value.items()
        )
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value])
    data = str(value).encode()
    head = bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xda" + struct.pack(">H", len(data))
    return head + data


def greet(
    namespace: Path, address: str, port: int, first: bytes = b"", certificate: Path | None = None
) -> ssl.SSLSocket:
    """TLS with whoever is there; `first` is what Consul wants to hear before it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate)
    plain = socket_in(namespace)
    plain.connect((address, port))
    plain.sendall(first)
    return context.wrap_socket(plain)


RPC_TLS, RPC_TLS_ANYBODY = b"\x03", b"\x07"  # consul 1.8 agent/pool/conn.go
RPC_CONSUL, RPC_RAFT = b"\x00", b"\x01"


def call(connection: ssl.SSLSocket, method: str, arguments: dict[str, object]) -> str:
    connection.sendall(packed({"ServiceMethod": method, "Seq": 1}) + packed(arguments))
    return connection.recv(4096).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def certificate(loot: Loot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's certificate with its key."""
    path = tmp_path_factory.mktemp("worker") / "node.pem"
    path.write_text(loot.worker.read(f"{CONFIG}/node.pem"))
    return path


def test_nothing_signs_a_certificate_for_a_worker(
    lab: Lab, loot: Loot, four: list[Machine], certificate: Path
) -> None:
    for token in (None, *loot.tokens):
        for request in SIGNERS:
            answer = ask(loot.worker, *request, token=token)
            assert (answer.status, OFF in answer.text) == (500, True), request
    namespace, server = lab.netns_path, four[0].address
    asked: dict[str, object] = {"CSR": "x", "Datacenter": "lab", "Token": loot.own}
    with greet(namespace, server, 8300, RPC_TLS_ANYBODY) as anybody:
        assert OFF in call(anybody, "AutoEncrypt.Sign", asked)
    said = {"ConnectCA.Sign": OFF, "AutoEncrypt.Sign": "can't find service AutoEncrypt.Sign"}
    for method, words in said.items():
        with greet(namespace, server, 8300, RPC_TLS, certificate) as member:
            member.sendall(RPC_CONSUL)
            assert words in call(member, method, asked)


def test_auto_encrypt_gives_a_worker_no_servers_name(lab: Lab, four: list[Machine]) -> None:
    names = {"auto_encrypt": {"tls": True, "dns_san": ["server.lab.consul"]}}
    worker = four[-1]
    with foreign_consul(lab, "signed", files=worker, starts=False, config=names) as consul:
        refused = consul.wait_log("AutoEncrypt.Sign RPC failed|Connect must be enabled")
        assert OFF in refused
        certificates = list(consul.directory.rglob("*.pem"))
        assert {path.name for path in certificates} == {"ca.pem", "node.pem"}, "what it was given"
        assert (consul.directory / "node.pem").read_text() == worker.read(f"{CONFIG}/node.pem")


def verified(*arguments: str | Path) -> str:
    """What OpenSSL says of a certificate: OK, or why not."""
    said = host.run("openssl", "verify", *arguments, check=False)
    if said.returncode == 0:
        return "OK"
    return next(line for line in said.stderr.splitlines() if line.startswith("error"))


def test_a_workers_certificate_is_no_servers_and_makes_no_other(
    loot: Loot, certificate: Path, tmp_path: Path
) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(loot.authority)
    trust = ("-CAfile", authority)
    assert verified(*trust, "-purpose", "sslclient", certificate) == "OK"
    assert "unsuitable certificate purpose" in verified(
        *trust, "-purpose", "sslserver", certificate
    )
    named = ("-verify_hostname", "server.lab.consul")
    assert "hostname mismatch" in verified(*trust, *named, certificate)

    def signed(issuer: Path) -> Path:
        """A server's certificate, signed by the worker's key in the name of `issuer`."""
        key = serialization.load_pem_private_key(certificate.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.datetime.now(datetime.timezone.utc)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(x509.load_pem_x509_certificate(issuer.read_bytes()).subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("server.lab.consul")]), True)
            .sign(key, hashes.SHA256())
        )
        path = tmp_path / "forged.pem"
        path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return path

    chain = ("-untrusted", certificate)
    assert "invalid CA certificate" in verified(*trust, *chain, signed(certificate))
    assert "signature failure" in verified(*trust, signed(authority))


def test_a_workers_certificate_shows_no_server_to_a_node(
    lab: Lab, loot: Loot, four: list[Machine], certificate: Path, tmp_path: Path
) -> None:
    """As every node's Consul looks at a server; the real server passes."""
    (tmp_path / "ca.pem").write_text(loot.authority)
    looks = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with socket_in(lab.netns_path) as plain:
        plain.connect((four[0].address, 8300))
        plain.sendall(RPC_TLS)
        with looks.wrap_socket(plain, server_hostname="server.lab.consul") as secured:
            assert secured.version() == "TLSv1.3"

    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shows.load_cert_chain(certificate)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(ssl.SSLError, OSError):
            shows.wrap_socket(theirs, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            looks.wrap_socket(ours, server_hostname="server.lab.consul")
    finally:
        ours.close()
        thread.join()
        theirs.close()
    assert "unsuitable certificate purpose" in caught.value.verify_message


@pytest.mark.xfail(
    strict=True,
    reason="CVE-2021-37219: fixed in Consul 1.8.15, 1.9.9 and 1.10.2; the lab has 1.8.7",
)
def test_a_workers_certificate_opens_no_raft_stream(
    lab: Lab, four: list[Machine], certificate: Path
) -> None:
    """A vote request of term 0, which is always refused; that it is answered is the hole."""
    vote = {"ProtocolVersion": 3, "Term": 0, "Candidate": "x", "LastLogIndex": 0, "LastLogTerm": 0}
    with greet(lab.netns_path, four[0].address, 8300, RPC_TLS, certificate) as member:
        member.sendall(RPC_RAFT + b"\x01" + packed(vote))
        assert b"Granted" not in member.recv(4096)


# -- names -----------------------------------------------------------------------------------


def drop(server: Machine, node: str) -> None:
    """Take back what a request under a name that a test has made up has brought."""
    root = own_token(server)
    ask(server, "DELETE", f"kv/{PREFIX}enrol/{node}", token=root)
    for each in as_server(server, "acl/tokens"):
        if f" node {node} " in each["Description"]:
            ask(server, "DELETE", f"acl/token/{each['AccessorID']}", token=root)
    for each in as_server(server, "acl/policies"):
        if each["Name"].endswith(f"-node-{node}"):
            ask(server, "DELETE", f"acl/policy/{each['ID']}", token=root)


def forget(server: Machine, node: str) -> None:
    """Leave nothing of a node that a test has made up."""
    drop(server, node)
    wait_forgotten(server, node)


def is_known(asked: Machine, token: str) -> bool:
    return ask(asked, "GET", "acl/token/self", token=token).status == 200


def granted(node: str, made_up: str) -> str:
    """The token that a node has once its request is granted."""
    return secrets.node_token(Secret(made_up), node).reveal()


def wait_member(server: Machine, name: str, address: str = STRANGER) -> None:
    def joined() -> bool | Waiting:
        found = members(server).get(name, {})
        return (found.get("Addr"), found.get("Status")) == (address, 1) or Waiting(found)

    wait_until(joined, 90, f"{name} at {address} to be a member")


def test_a_worker_gets_no_token_in_anothers_name(four: list[Machine], loot: Loot) -> None:
    server, worker = four[0], loot.worker
    kept = base64.b64decode(store(server)[f"{PREFIX}enrol/{worker.name}"][1]).decode()
    wanted = {
        "server1": "server1 is the name of a server",
        worker.name: f"a machine named {worker.name} has a token already",
    }
    try:
        for node, why in wanted.items():
            token = str(uuid.uuid4())
            loot.enrol(node, token)
            assert loot.answer_to(server, node) == why
            assert not is_known(worker, granted(node, token))
    finally:
        as_server(server, f"kv/{PREFIX}enrol/server1", "DELETE")
        as_server(server, f"kv/{PREFIX}enrol/{worker.name}", "PUT", kept)
    for node in ("server1", "other"):
        place = f"kv/{PREFIX}nodes/{node}/token"
        said = ask(worker, "PUT", place, loot.request(str(uuid.uuid4())), token=loot.own)
        assert said.status == 403
    assert is_known(worker, loot.own)


NONSENSE: dict[str, Callable[[Loot], str]] = {
    "no UUID": lambda _: "not-a-uuid",
    "the token of whoever shows none": lambda _: "anonymous",
    "a token that exists": lambda loot: loot.enrolment,
}


def test_a_worker_that_asks_for_nonsense_stops_no_server(
    lab: Lab, four: list[Machine], loot: Loot
) -> None:
    """Under a name that is still free: that one whoever has a worker's user-data can have."""
    server, node = four[0], "worker9"
    before = ask(server, "GET", "acl/token/self", token=loot.enrolment).json()["Policies"]
    try:
        with foreign_consul(lab, node, files=loot.worker):
            wait_member(server, node)
            for text in NONSENSE.values():
                loot.enrol(node, str(uuid.uuid4()), text=text(loot))
                loot.answer_to(server, node)
                cluster.wait_ready(four, 20)
                drop(server, node)
            token, second = str(uuid.uuid4()), str(uuid.uuid4())
            loot.enrol(node, token)
            assert loot.answer_to(server, node) == secrets.ADMITTED
            loot.enrol(node, second)
            why = f"a machine named {node} has a token already"
            assert loot.answer_to(server, node) == why
            assert not is_known(server, granted(node, second))
            token = granted(node, token)
            own, others = (f"kv/{PREFIX}nodes/{name}/x" for name in (node, loot.worker.name))
            assert ask(loot.worker, "PUT", own, "x", token=token).text == "true"
            assert ask(loot.worker, "PUT", others, "x", token=token).status == 403
            assert ask(loot.worker, "DELETE", own, token=token).text == "true"
    finally:
        forget(server, node)
    after = ask(server, "GET", "acl/token/self", token=loot.enrolment).json()["Policies"]
    assert after == before
    cluster.wait_ready(four, 60)


def test_a_name_that_no_rule_can_have_stops_no_server(
    lab: Lab, four: list[Machine], loot: Loot
) -> None:
    server, node = four[0], "db.example"
    try:
        with foreign_consul(lab, node, files=loot.worker):
            wait_member(server, node)
            loot.enrol(node, str(uuid.uuid4()))
            loot.enrol("server1", str(uuid.uuid4()))
            assert loot.answer_to(server, "server1"), "the servers go on to the next"
            tokens = [each["Description"] for each in as_server(server, "acl/tokens")]
            assert [each for each in tokens if node in each] == []
            cluster.wait_ready(four, 20)
    finally:
        drop(server, "server1")
        forget(server, node)
    cluster.wait_ready(four, 60)


@pytest.mark.full
def test_a_name_in_other_letters_is_the_same_name(
    lab: Lab, four: list[Machine], loot: Loot
) -> None:
    """Consul's catalogue makes no difference between SERVER1 and server1; its rules do."""
    server, node = four[1], "SERVER1"
    token = str(uuid.uuid4())
    try:
        with foreign_consul(lab, node, files=loot.worker):
            wait_member(server, node)
            loot.enrol(node, token)
            assert loot.answer_to(server, node) != secrets.ADMITTED
            moved = {"Node": node, "Address": STRANGER}
            token = granted(node, token)
            assert ask(loot.worker, "PUT", "catalog/register", moved, token=token).status == 403
    finally:
        forget(server, node)
        wait_catalogued(server, four[0])


@pytest.mark.full
def test_the_name_of_a_server_that_is_down_is_taken(
    lab: Lab, four: list[Machine], loot: Loot
) -> None:
    """Gossip gives the name of a dead member to another address after half a minute."""
    server, down = four[0], four[2]
    token = str(uuid.uuid4())
    down.kill()
    try:
        failed = 4  # hashicorp/serf: MemberStatus
        wait_until(lambda: members(server)[down.name]["Status"] == failed, 60, "its death to show")
        with foreign_consul(lab, down.name, files=loot.worker):
            wait_member(server, down.name)
            loot.enrol(down.name, token)
            assert loot.answer_to(server, down.name) != secrets.ADMITTED
            moved = {"Node": down.name, "Address": STRANGER}
            token = granted(down.name, token)
            assert ask(loot.worker, "PUT", "catalog/register", moved, token=token).status == 403
    finally:
        forget(server, down.name)
        down.boot()
        cluster.wait_ready(four)
        wait_catalogued(server, down)
        wait_until(lambda: all(raft_peers(server).values()), 60, "its vote")


def wait_catalogued(server: Machine, machine: Machine) -> None:
    """What was forgotten in a node's name comes back: its Consul looks once a minute."""

    def back() -> bool | Waiting:
        found = catalogued(server, "swarm-manager")
        return (machine.name, machine.address, 2377) in found or Waiting(found)

    wait_until(back, 180, f"{machine.name} to be in the catalogue")


# -- a server that is none -------------------------------------------------------------------


@contextlib.contextmanager
def reading(machine: Machine) -> Iterator[list[int]]:
    """Read through the leader without end; gives the statuses."""
    statuses: list[int] = []
    stop = threading.Event()
    token = own_token(machine)

    def read() -> None:
        while not stop.wait(0.05):
            try:
                said = ask(machine, "GET", f"kv/{PREFIX}swarm/state?consistent", token=token)
                statuses.append(said.status)
            except OSError:
                statuses.append(0)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()


def test_a_worker_that_says_it_is_a_server_gets_nothing(
    lab: Lab, four: list[Machine], loot: Loot
) -> None:
    """Gossip believes it, so it is listed while it runs: as a member, as a peer without a vote
    and among the servers in DNS. No server sends it anything, for its certificate is none's.
    """
    servers = four[:3]
    token = managers_secret(servers[0])
    before = [raft_state(server) for server in servers]
    leader = next(server for server in servers if before[0][0] == f"{server.address}:8300")
    peers = raft_peers(servers[0])
    assert peers == dict.fromkeys((server.name for server in servers), True)
    # A new name each time: of one that was there before, the leader takes note once a minute.
    name = f"intruder-{uuid.uuid4().hex[:4]}"
    try:
        with (
            reading(servers[1]) as statuses,
            foreign_consul(
                lab, name, files=loot.worker, config={"server": True, "bootstrap_expect": 3}
            ) as intruder,
        ):

            def listed() -> bool | Waiting:
                found = raft_peers(servers[0])
                return name in found or Waiting(found)

            wait_until(listed, 30, "the servers to list it")
            peer = intruder.ask("GET", "agent/self").json()["Config"]["NodeID"]
            why = "certificate is valid for worker.lab.consul, not server.lab.consul"
            wait_said(
                functools.partial(consuls_words, leader),
                f"failed to appendEntries to: peer=.*{peer}.*{why}",
            )
            reads_by_then = len(statuses)
            wait_until(lambda: len(statuses) >= reads_by_then + 40, 60, "forty more reads")
            assert raft_peers(servers[0]) == {**peers, name: False}
            assert (name, STRANGER, 8300) in catalogued(servers[0], "consul")
            raft = intruder.ask("GET", "agent/self").json()["Stats"]["raft"]
            assert raft["last_contact"] == "never"
            assert {raft[key] for key in ("applied_index", "last_log_index", "term")} == {"0"}
            for key in (f"{PREFIX}swarm/state", MANAGER_TOKEN):
                said = intruder.ask("GET", f"kv/{key}?stale")
                assert (said.status, said.text) == (500, "No cluster leader")
            written = {path.name for path in intruder.data.rglob("*") if path.is_file()}
            assert "raft.db" in written
            assert search({"join token": token}, intruder.data) == {}
            states = {machine.name: cluster.status(machine)["state"] for machine in four}
            assert set(states.values()) == {"ready"}, states
        assert set(statuses) == {200}
    finally:
        wait_forgotten(servers[0], name)
    assert raft_peers(servers[0]) == peers
    assert [raft_state(server) for server in servers] == before
    # The control: the same search finds it where a server's Consul keeps it.
    kept = servers[0].volumes / VOLUME / "consul/data"
    assert {Path(file).name for file in search({"join token": token}, kept)} >= {"raft.db"}


# -- what is nowhere on a worker -------------------------------------------------------------


def test_a_worker_has_nothing_of_what_is_the_servers(
    four: list[Machine], loot: Loot, tmp_path: Path
) -> None:
    server, worker = four[0], loot.worker
    named = servers_secrets(four[:3])
    for machine, tokens in ((server, (own_token(server),)), (worker, loot.tokens)):
        gather(machine, tokens, tmp_path / machine.name / "told")
        remember(machine, tmp_path / machine.name / "memory")

    def found(machine: Machine) -> dict[str, set[str]]:
        return search(named, tmp_path / machine.name, *disk(machine))

    assert found(worker) == {}

    # The control: on a server the same search finds what is there, in every kind of place.
    places = {Path(file).name: names for file, names in found(server).items()}
    key = "seed 0 in base64"
    assert key in places["secrets.json"]
    assert key in places["user-data.txt"]
    assert key in places["agent"], "in the agent's memory"
    assert "server token" in places["consul"], "in Consul's memory"
    assert "key of server1" in places["node.pem"], "base64 in lines"
    assert "managers' join token" in places["api.1.kv_?recurse"], "base64 in Consul's answer"
    assert "managers' join token" in places["raft.db"]


def test_the_search_sees_through_disguises(tmp_path: Path) -> None:
    secret = os.urandom(32)
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + secret + b"y" * 30)
        (tmp_path / f"base64.{shift}").write_bytes(text)
        (tmp_path / f"twice.{shift}").write_bytes(base64.b64encode(b"user-data: " + text))
        lines = base64.encodebytes(b"x" * (30 + shift) + secret + b"y" * 50)
        (tmp_path / f"lines.{shift}").write_bytes(lines)
    (tmp_path / "hex").write_text(secret.hex())
    (tmp_path / "raw").write_bytes(b"\0" + secret + b"\n")
    (tmp_path / "another").write_bytes(os.urandom(10_000))
    found = search({"it": secret}, tmp_path)
    assert {Path(file).name for file in found} == {
        *(f"{kind}.{shift}" for kind in ("base64", "twice", "lines") for shift in range(3)),
        "hex",
        "raw",
    }


# -- a container -----------------------------------------------------------------------------

NETWORKS = {"bridge": "", "attacked": "bridge", "attacked-wide": "overlay --attachable"}
REFUSED = "Connection refused"
UNREACHABLE = "No route to host"  # in the kernel's words to the sender, not a time-out

# A line for each target: the address, and what trying it comes to. Consul's HTTP would answer a
# GET, and its RPC port a client with TLS; whoever says something else is not talked to.
PROBE = """
for target in {targets}; do
    said=$(printf 'GET /v1/status/leader HTTP/1.0\\r\\n\\r\\n' \
        | nc -w 5 ${{target%:*}} ${{target#*:}} 2>&1 | tail -n 1)
    echo "$target ${{said##*: }}"
done
"""


@pytest.fixture(scope="module")
def with_networks(lab: Lab, four: list[Machine]) -> Iterator[tuple[Machine, Machine]]:
    """A server and a worker with containers on every kind of network."""
    server, worker = four[0], four[-1]
    url = lab.serve(images.box_archive(), "box.tar")
    for machine in (server, worker):
        machine.sh(f"curl -sf {url} | docker load")
        machine.run("docker", "network", "create", "attacked")
    server.sh(f"docker network create -d {NETWORKS['attacked-wide']} attacked-wide")
    yield server, worker
    for machine in (server, worker):
        machine.run("docker", "network", "rm", "attacked")

    def removed() -> bool | Waiting:
        said = server.run("docker", "network", "rm", "attacked-wide", check=False)
        return said.returncode == 0 or Waiting(said.stderr)

    wait_until(removed, 30, "the network to go")


def in_container(machine: Machine, network: str, script: str) -> str:
    run = ("docker", "run", "--rm", "--network", network, cluster.BOX_IMAGE, "sh", "-c", script)
    return machine.run(*run, check=False, timeout_s=120).stdout.strip()


def gateways(machine: Machine) -> list[str]:
    """The machine's addresses towards its containers."""
    said = machine.run("ip", "-json", "-4", "address").stdout
    links = [each for each in json.loads(said) if each["ifname"].startswith(("docker", "br-"))]
    return [address["local"] for link in links for address in link["addr_info"]]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_container_reaches_neither_metadata_nor_consul(
    with_networks: tuple[Machine, Machine], four: list[Machine], role: str, network: str
) -> None:
    """Its Engine forwards to the other nodes' Consul, where without a certificate it is sent off.

    The ports are the same for a stranger, of whom more below.
    """
    machine = with_networks[("server", "worker").index(role)]
    own = ["127.0.0.1", *gateways(machine), *(each.address for each in four)]
    assert len(own) > 5, "there is a gateway"
    wanted = dict.fromkeys((f"{address}:8500" for address in own), REFUSED)
    wanted |= dict.fromkeys((f"{each.address}:8600" for each in four), REFUSED)
    wanted[f"{METADATA_ADDRESS}:80"] = UNREACHABLE
    wanted |= dict.fromkeys((f"{each.address}:8300" for each in four[:3]), "")  # hung up on
    said = in_container(machine, network, PROBE.format(targets=" ".join(wanted)))
    assert dict(line.partition(" ")[::2] for line in said.splitlines()) == wanted


@pytest.mark.parametrize("role", ["server", "worker"])
def test_containers_find_each_other_by_name(
    with_networks: tuple[Machine, Machine], role: str
) -> None:
    machine = with_networks[("server", "worker").index(role)]
    run = ("docker", "run", "-d", "--name", "named", "--network", "attacked", cluster.BOX_IMAGE)
    machine.run(*run, "sleep", "1000")
    try:
        address = machine.run(
            *("docker", "inspect", "-f", "{{.NetworkSettings.Networks.attacked.IPAddress}}"),
            "named",
        ).stdout.strip()
        assert f"Address: {address}" in in_container(machine, "attacked", "nslookup named")
    finally:
        machine.run("docker", "rm", "-f", "named")


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_container_with_the_hosts_network_is_told_names_only(
    with_networks: tuple[Machine, Machine], role: str
) -> None:
    """It is on the machine itself as far as networks go, so Consul answers; it has no token."""
    machine = with_networks[("server", "worker").index(role)]
    paths = {
        "catalog/nodes": "200",
        "catalog/services": "200",
        "status/leader": "200",
        "kv/?recurse": "404",
        f"kv/{MANAGER_TOKEN}": "403",
        f"kv/{PREFIX}worker/swarm": "403",
        "agent/self": "403",
        "acl/tokens": "403",
    }
    script = "".join(
        f"printf 'GET /v1/{path} HTTP/1.0\\r\\n\\r\\n' | nc -w 5 127.0.0.1 8500 | head -n 1;"
        for path in paths
    )
    said = in_container(machine, "host", script)
    assert [line.split()[1] for line in said.splitlines()] == list(paths.values())
    written = ask(machine, "PUT", f"kv/{PREFIX}nodes/{machine.name}/x", "x")
    assert written.status == 403


# -- a stranger on the network ---------------------------------------------------------------

# All that listens, and on which address: "*" is any, "-" none but the machine itself.
EVERYWHERE = {
    ("tcp", "-", 53, "systemd-resolve"),
    ("udp", "-", 53, "systemd-resolve"),
    ("tcp", "*", 5355, "systemd-resolve"),  # LLMNR; the distribution's
    ("udp", "*", 5355, "systemd-resolve"),
    ("tcp", "-", 0, "containerd"),  # a port of the kernel's choice
    ("tcp", "-", 8500, "consul"),
    ("tcp", "-", 8600, "consul"),
    ("udp", "-", 8600, "consul"),
    ("tcp", "cluster", 8301, "consul"),
    ("udp", "cluster", 8301, "consul"),
    ("tcp", "cluster", 7946, "dockerd"),
    ("udp", "cluster", 7946, "dockerd"),
    ("udp", "*", 4789, ""),  # the kernel's VXLAN
}
LISTENERS = {
    "worker": EVERYWHERE,
    "server": EVERYWHERE
    | {
        ("tcp", "cluster", 8300, "consul"),
        ("tcp", "cluster", 2377, "dockerd"),
    },
}


def listeners(machine: Machine) -> set[tuple[str, str, int, str]]:
    found = set()
    for line in machine.run("ss", "-H", "-tulnp").stdout.splitlines():
        kind, _, _, _, local, _, *process = line.split()
        address, _, port = local.rpartition(":")
        address = address.split("%")[0]
        where = {machine.address: "cluster", "0.0.0.0": "*", "[::]": "*"}.get(address, "-")
        assert where != "-" or address.startswith("127.") or address == "169.254.53.53", line
        name = process[0].split('"')[1] if process else ""
        found.add((kind, where, 0 if name == "containerd" else int(port), name))
    return found


def test_nothing_listens_but_what_is_in_this_table(four: list[Machine]) -> None:
    for machine in four:
        assert listeners(machine) == LISTENERS[machine.name.rstrip("123")], machine.name


CLOSED_PORTS = (22, 53, 2375, 2376, 4243, 8500, 8501, 8502, 8600)


def test_a_stranger_is_refused_by_every_port_that_nodes_alone_use(
    lab: Lab, four: list[Machine]
) -> None:
    """Consul's HTTP and DNS and the Engine's API among them."""
    for machine, ports in ((four[0], CLOSED_PORTS), (four[-1], (*CLOSED_PORTS, 2377, 8300))):
        for port in ports:
            with socket_in(lab.netns_path) as plain, pytest.raises(ConnectionRefusedError):
                plain.connect((machine.address, port))
        for port in (8500, 8600):
            with socket_in(lab.netns_path, socket.SOCK_DGRAM) as plain:
                plain.connect((machine.address, port))
                plain.send(b"\0" * 12)
                with pytest.raises(ConnectionRefusedError):  # by ICMP: nobody listens
                    plain.recv(512)


NO_KEY = {
    "without a key": "Remote state is encrypted and encryption is not configured",
    "with another key": "No installed keys could decrypt the message",
}


@pytest.mark.parametrize("how", NO_KEY)
def test_gossip_takes_no_stranger_in(lab: Lab, four: list[Machine], how: str) -> None:
    key = {"encrypt": base64.b64encode(os.urandom(32)).decode()} if "another" in how else {}
    with foreign_consul(lab, "stranger", config=key) as consul:
        for machine in (four[0], four[-1]):
            said = consul.ask("PUT", f"agent/join/{machine.address}")
            assert said.status == 500
            assert NO_KEY[how] in said.text
            assert [each["Name"] for each in consul.ask("GET", "agent/members").json()] == [
                "stranger"
            ]
    assert set(members(four[0])) == {machine.name for machine in four}


def consuls_words(machine: Machine) -> str:
    said = machine.run(*SYSTEM_ENGINE, "logs", "--tail", "100", "consul")
    return said.stdout + said.stderr


def engines_words(machine: Machine) -> str:
    return machine.journal("docker", since="-2min")


# memberlist/net.go: message types. Consul 1.8.7 and Engine 26.1 have the same library.
PING, PUSH_PULL, ENCRYPTED = b"\0", b"\6", b"\n"
GOSSIP: dict[str, tuple[int, Callable[[Machine], str], str]] = {
    "consul": (8301, consuls_words, "Decrypt packet failed"),
    "swarm": (7946, engines_words, "Decrypt packet failed"),
}


@pytest.mark.parametrize("whose", GOSSIP)
@pytest.mark.parametrize("role", ["server", "worker"])
def test_gossip_that_is_not_encrypted_is_not_understood(
    lab: Lab, four: list[Machine], role: str, whose: str
) -> None:
    """A stream is answered, but with what only members can read; a packet is not at all."""
    machine = four[0] if role == "server" else four[-1]
    port, words, complaint = GOSSIP[whose]
    with socket_in(lab.netns_path) as stream:
        stream.connect((machine.address, port))
        state = {"Nodes": 0, "UserStateLen": 0, "Join": True}
        stream.sendall(PUSH_PULL + packed(state))
        answer = stream.recv(4096)
        assert answer[:1] == ENCRYPTED
        assert machine.name.encode() not in answer
        asker = f"from={':'.join(map(str, stream.getsockname()))}"
        refused = "Encryption is configured but remote state is not encrypted"
        wait_said(functools.partial(words, machine), f"{refused} {asker}")
    with stranger(lab), socket_in(lab.netns_path, socket.SOCK_DGRAM) as packets:
        packets.bind((STRANGER, 0))
        packets.sendto(PING + packed({"SeqNo": 1, "Node": ""}), (machine.address, port))
        asker = f"from={':'.join(map(str, packets.getsockname()))}"
        wait_said(functools.partial(words, machine), f"{complaint}: .*{asker}")
        packets.setblocking(False)
        with pytest.raises(BlockingIOError):
            packets.recv(4096)


def wait_said(words: Callable[[], str], pattern: str) -> None:
    def said() -> bool | Waiting:
        text = words()
        return re.search(pattern, text) is not None or Waiting(text[-400:])

    wait_until(said, 20, f"the words {pattern}")


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that names a server, by a CA of the stranger's own."""
    pki, path = LocalPki(), tmp_path_factory.mktemp("stranger") / "own.pem"
    seed = pki.seed()
    authority = pki.authority(seed, time.time())
    names = ("server.lab.consul", "server1.server.lab.consul")
    path.write_text(pki.issue(seed, authority, names, 86400, time.time()).reveal())
    return path


def test_consuls_rpc_wants_a_certificate_of_this_cluster(
    lab: Lab, four: list[Machine], self_signed: Path
) -> None:
    """The one call that it takes from anybody would be for a certificate, and is turned off."""
    namespace, address = lab.netns_path, four[0].address
    for first in (RPC_CONSUL, RPC_RAFT, b"\x04", b"GET / HTTP/1.0\r\n\r\n"):
        with socket_in(namespace) as plain:
            plain.connect((address, 8300))
            plain.sendall(first)
            assert plain.recv(100) == b"", "hung up on"
    for certificate in (None, self_signed):
        with (
            pytest.raises(ssl.SSLError, match="BAD_CERTIFICATE"),
            greet(namespace, address, 8300, RPC_TLS, certificate) as secured,
        ):
            secured.recv(100)  # with TLS 1.3 a refusal shows on a read
    calls = ("KVS.Get", "KVS.Apply", "ACL.TokenRead", "Status.Leader", "Catalog.Register")
    for method in calls:
        with greet(namespace, address, 8300, RPC_TLS_ANYBODY) as secured:
            said = call(secured, method, {"Datacenter": "lab"})
            assert f"can't find service {method}" in said
    with greet(namespace, address, 8300, RPC_TLS_ANYBODY) as secured:
        assert OFF in call(secured, "AutoEncrypt.Sign", {"CSR": "x", "Datacenter": "lab"})


def test_swarms_managers_want_a_certificate_or_a_join_token(
    lab: Lab, four: list[Machine], self_signed: Path
) -> None:
    """Anybody may open TLS there, as a node that joins must; a certificate has to be theirs."""
    with greet(lab.netns_path, four[0].address, 2377) as secured:
        assert secured.version() == "TLSv1.3"
        # RFC 9113, 6.5: a SETTINGS frame is the first word of a server.
        assert secured.recv(100)[3:5] == b"\x04\x00"
    with (
        pytest.raises(ssl.SSLError, match="UNKNOWN_CA"),
        greet(lab.netns_path, four[0].address, 2377, b"", self_signed) as secured,
    ):
        secured.recv(100)
    with socket_in(lab.netns_path) as plain:
        plain.connect((four[0].address, 2377))
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert plain.recv(200) == b"", "hung up on"


def test_swarm_takes_no_made_up_join_token(four: list[Machine]) -> None:
    """A real Engine asks, on the worker but with nothing of its own."""
    worker = four[-1]
    entry = json.loads(base64.b64decode(store(four[0])[f"{PREFIX}worker/swarm"][1]))
    *digest, _ = entry["token"].split("-")
    made_up = "-".join([*digest, "0" * 25])
    unit, home = "stranger-engine", "/run/stranger-engine"
    engine = ("docker", "-H", f"unix://{home}/docker.sock")
    worker.run(
        *("systemd-run", "--quiet", "--collect", f"--unit={unit}", "dockerd", "--config-file="),
        *(f"--host=unix://{home}/docker.sock", f"--pidfile={home}/pid", "--bridge=none"),
        *(f"--data-root={home}/data", f"--exec-root={home}/exec", "--iptables=false"),
        *("--ip-forward=false", "--ip6tables=false", "--storage-driver=vfs"),
        *("--containerd=/run/containerd/containerd.sock", "--containerd-namespace=stranger"),
    )
    try:

        def answers() -> bool | Waiting:
            said = worker.run(*engine, "info", check=False)
            return said.returncode == 0 or Waiting(said.stderr)

        wait_until(answers, 30, "the stranger's Engine")
        said = worker.run(
            *engine, "swarm", "join", "--token", made_up, f"{four[0].address}:2377", check=False
        )
        assert said.returncode == 1
        assert "A valid join token is necessary to join this cluster" in said.stderr
        listed = cluster.swarm_nodes(four[0])
        assert set(listed) == {machine.name for machine in four}
    finally:
        worker.run("systemctl", "stop", unit, timeout_s=60)
        worker.sh(f"rm -rf {home}")
    with contextlib.suppress(LabError):
        worker.run("systemctl", "reset-failed", unit)
