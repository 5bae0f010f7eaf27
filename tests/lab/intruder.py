"""The tools of somebody who wants more than is due: sockets anywhere, foreign Consuls, searches."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nodeagent import secrets
from nodeagent.adapters.pki import LocalPki
from tests.lab import cluster, host, images
from tests.lab.host import LabError, Process, Waiting, wait_until
from tests.lab.lab import BRIDGE, PREFIX_BITS, Lab, Machine

PREFIX = "nodeagent/demo/"
MANAGER_TOKEN = f"{PREFIX}swarm/manager-token"
NODE_TOKEN = "/var/lib/nodeagent/node-token.json"
TOKENS = "/var/lib/nodeagent/consul/tokens.json"
CONFIG = "/var/lib/nodeagent/consul/config"
SYSTEM_ENGINE = ("docker", "-H", "unix:///run/nodeagent-engine/docker.sock")
STRANGER = "10.10.0.99"  # an address of the lab's network that no machine has
UUID = re.compile(rb"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b")

_CLONE_NEWNET = 0x40000000


Call = tuple[str, str, object]  # method, path, body

# -- sockets and Consul's HTTP API -----------------------------------------------------------


def socket_in(namespace: Path, family: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket of another network namespace, in which it stays whoever uses it (setns(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise LabError(f"{namespace}: {os.strerror(ctypes.get_errno())}")
        try:
            made = socket.socket(socket.AF_INET, family)
        finally:
            if libc.setns(home, _CLONE_NEWNET):
                os.abort()  # nothing of this process may go on in a machine's network
    finally:
        os.close(home)
        os.close(there)
    made.settimeout(10)
    return made


def network(of: Machine) -> Path:
    return Path(f"/proc/{of.leader}/ns/net")


@dataclass(frozen=True)
class Answer:
    """What Consul said. `body` never stands in a failed assertion by itself: it may be long."""

    status: int
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()

    def json(self) -> Any:
        return json.loads(self.body)


class _Connection(http.client.HTTPConnection):
    def __init__(self, namespace: Path, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.namespace = namespace

    def connect(self) -> None:
        self.sock = socket_in(self.namespace)
        self.sock.connect((self.host, self.port))


def ask(
    where: Machine | Path,
    method: str,
    path: str,
    body: object = None,
    *,
    token: str | None = None,
    port: int = 8500,
) -> Answer:
    """One request to the Consul on 127.0.0.1 of a machine or network namespace."""
    connection = _Connection(where if isinstance(where, Path) else network(where), port)
    sent = body if body is None or isinstance(body, str) else json.dumps(body)
    with contextlib.closing(connection):
        connection.request(method, f"/v1/{path}", sent, {"X-Consul-Token": token} if token else {})
        response = connection.getresponse()
        return Answer(response.status, response.read())


def own_token(machine: Machine) -> str:
    """The token with which the machine's agent works: a server's may do everything."""
    return str(json.loads(machine.read(TOKENS))["token"])


def as_server(server: Machine, path: str, method: str = "GET", body: object = None) -> Any:
    """What a server is told; it is told everything."""
    said = ask(server, method, path, body, token=own_token(server))
    assert said.status == 200, f"{path}: {said.status} {said.text[:300]}"
    return said.json()


def store(server: Machine) -> dict[str, tuple[int, str]]:
    """The whole KV by key: index of the last change, and value."""
    entries = as_server(server, "kv/?recurse&consistent")
    return {each["Key"]: (each["ModifyIndex"], each["Value"]) for each in entries}


def managers_secret(server: Machine) -> bytes:
    """The end of the managers' join token: what the workers' begins with is the same."""
    return base64.b64decode(store(server)[MANAGER_TOKEN][1]).rpartition(b"-")[2]


def members(server: Machine) -> dict[str, dict[str, Any]]:
    return {each["Name"]: each for each in as_server(server, "agent/members")}


def raft_peers(server: Machine) -> dict[str, bool]:
    """Whether each peer votes, by node."""
    peers = as_server(server, "operator/raft/configuration")["Servers"]
    return {peer["Node"]: peer["Voter"] for peer in peers}


def raft_state(server: Machine) -> tuple[str, str]:
    """Leader and term, as this server has them."""
    raft = as_server(server, "agent/self")["Stats"]["raft"]
    return as_server(server, "status/leader"), raft["term"]


# -- foreign Consuls -------------------------------------------------------------------------


@contextlib.contextmanager
def stranger(lab: Lab, address: str = STRANGER) -> Iterator[Path]:
    """Another address on the network, for processes of the box; gives their namespace."""
    lab.run("ip", "address", "add", f"{address}/{PREFIX_BITS}", "dev", BRIDGE)
    try:
        yield lab.netns_path
    finally:
        lab.run("ip", "address", "delete", f"{address}/{PREFIX_BITS}", "dev", BRIDGE)


@dataclass(frozen=True)
class Consul:
    """A real Consul 1.8.7 that no agent of ours takes care of."""

    namespace: Path
    directory: Path
    process: Process
    port: int
    token: str

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text("utf-8", "replace")

    def ask(self, method: str, path: str, body: object = None) -> Answer:
        return ask(self.namespace, method, path, body, token=self.token, port=self.port)

    def wait_log(self, pattern: str, timeout_s: float = 60) -> str:
        """The first line that has `pattern` in it."""

        def line() -> str | Waiting:
            assert self.process.alive, self.log[-2000:]
            found = [each for each in self.log.splitlines() if re.search(pattern, each)]
            return found[0] if found else Waiting(self.log[-500:])

        return wait_until(line, timeout_s, f"Consul to say {pattern}")


RECOVERY = "11111111-2222-3333-4444-555555555555"  # a foreign Consul's own


@contextlib.contextmanager
def foreign_consul(
    lab: Lab,
    name: str,
    *,
    files: Machine | None = None,
    address: str = STRANGER,
    starts: bool = True,
    config: Mapping[str, object] | None = None,
) -> Iterator[Consul]:
    """Run Consul on the network under a name of its own, with what lies on a machine's disk.

    Ends it; that the cluster has forgotten it is for `wait_forgotten` to see.
    """
    with contextlib.ExitStack() as stack:
        # Not below the lab's directory: what an earlier one left is no evidence.
        scratch = tempfile.TemporaryDirectory(prefix=f"consul-{name}-", dir=lab.state_dir)
        directory = Path(stack.enter_context(scratch))
        namespace = stack.enter_context(stranger(lab, address))
        settings: dict[str, Any] = {
            "datacenter": "lab",
            "node_name": name,
            "data_dir": str(directory / "data"),
            "bind_addr": address,
            "client_addr": "127.0.0.1",
            "ports": {"http": 18500, "dns": -1, "server": 8300, "serf_wan": -1},
            "disable_update_check": True,
            "performance": {
                "raft_multiplier": 1,
                "leave_drain_time": "0s",
                "rpc_hold_timeout": "500ms",
            },
            "leave_on_terminate": True,
            "connect": {"enabled": False},
            "acl": {
                "enabled": True,
                "default_policy": "deny",
                "tokens": {"agent_master": RECOVERY},
            },
        }
        if files is not None:
            for file in ("ca.pem", "node.pem"):
                (directory / file).write_text(files.read(f"{CONFIG}/{file}"))
            settings |= {
                "encrypt": json.loads(files.read(f"{CONFIG}/keys.json"))["encrypt"],
                "ca_file": str(directory / "ca.pem"),
                "cert_file": str(directory / "node.pem"),
                "key_file": str(directory / "node.pem"),
                "verify_incoming": True,
                "verify_outgoing": True,
                "verify_server_hostname": True,
                "retry_join": list(cluster.SERVERS.values()),
                "retry_interval": "1s",
            }
        settings |= config or {}
        (directory / "consul.json").write_text(json.dumps(settings))
        words = ("nsenter", f"--net={namespace}", "--", images.consul_binary(), "agent")
        log = directory / "log"
        process = host.spawn(
            *words,
            f"-config-file={directory / 'consul.json'}",
            log=log,
            groups=lab.make_service_groups(),
        )
        stack.callback(_end, process)
        consul = Consul(namespace, directory, process, 18500, RECOVERY)

        def answers() -> bool | Waiting:
            assert process.alive, consul.log[-2000:]
            try:
                said = consul.ask("GET", "agent/self")
            except OSError as error:
                return Waiting(error)
            return said.status == 200 or Waiting(said.text)

        if starts:
            wait_until(answers, 30, f"the Consul of {name}")
        yield consul


def _end(process: Process) -> None:
    """Let it take its leave: a member that is just gone is missed for ten seconds."""
    process.signal(signal.SIGTERM)
    with contextlib.suppress(LabError):
        wait_until(lambda: not process.alive, 10, "its leave")
    process.kill()


def wait_forgotten(server: Machine, name: str) -> None:
    """Make a Consul that has ended a thing of the past: no member alive, no peer, no node."""

    def gone() -> bool | Waiting:
        ask(server, "PUT", f"agent/force-leave/{name}?prune", token=own_token(server))
        known = members(server).get(name, {}).get("Status")
        peers = raft_peers(server)
        nodes = [each["Node"] for each in as_server(server, "catalog/nodes")]
        is_gone = known is None and name not in peers and name not in nodes
        return is_gone or Waiting(f"member {known}, peers {peers}, nodes {nodes}")

    wait_until(gone, 90, f"{name} to be forgotten")


# -- searches --------------------------------------------------------------------------------


def disguises(secret: bytes) -> set[bytes]:
    """What of a secret would stand somewhere, whatever it was written down as.

    Halves, because base64 is broken into lines of 64 characters and more: one half is whole. In
    base64 a text has three looks, by where it begins; the ends, which depend on what stands
    before and after, are left out.
    """
    half = len(secret) // 2
    # grep takes one pattern a line: of raw bytes, the longest piece that is one.
    found = {max(secret.split(b"\n"), key=len)}
    for part in (secret[:half], secret[half:]):
        forms = {part.hex().encode(), part.hex().upper().encode()}
        if part.isascii():  # a text, which may be broken into lines
            forms.add(part)
        for shift in range(3):
            whole = base64.b64encode(b"\0" * shift + part + b"\0" * 3)
            first, last = (8 * shift + 5) // 6, (8 * (shift + len(part))) // 6
            inner = whole[first:last]
            forms.add(inner)
            for again in range(3):  # base64 of base64, as user-data in metadata is
                outer = base64.b64encode(b"\0" * again + inner + b"\0" * 3)
                forms.add(outer[(8 * again + 5) // 6 : (8 * (again + len(inner))) // 6])
        found |= forms
    short = [form for form in found if len(form) < 8]
    assert not short, "too short a piece to be told from chance"
    return found


def search(secrets: Mapping[str, bytes], *places: Path) -> dict[str, set[str]]:
    """Files below `places` that hold one of the secrets in any disguise: names by file."""
    names: dict[bytes, str] = {}
    for name, secret in secrets.items():
        names |= dict.fromkeys(disguises(secret), name)
    with tempfile.NamedTemporaryFile() as patterns:
        patterns.write(b"\n".join(names) + b"\n")
        patterns.flush()
        said = host.run(
            *("env", "LC_ALL=C", "grep", "-rlaFZ", "--devices=skip", "--exclude-dir=netns"),
            *("-f", patterns.name, "--"),
            *places,
            check=False,
            timeout_s=300,
        )
        if said.returncode > 1:
            raise LabError(f"grep: {said.stderr[-500:]}")
    found = {}
    for file in filter(None, said.stdout.split("\0")):
        content = Path(file).read_bytes()
        found[file] = {name for form, name in names.items() if form in content}
    return found


def processes(machine: Machine) -> dict[int, str]:
    """Command lines of a machine's processes, those in containers included, by the box's pid."""
    found = {}
    for process in host.cgroup_processes(f"{machine.lab.slug}/m-{machine.name}"):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            found[process.pid] = words.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return found


def dump_memory(pid: int, to: Path) -> None:
    """Write all that a process of a machine can write to in its memory (proc(5), maps)."""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory, to.open("wb") as out:
        for line in Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines():
            span, rights, *_ = line.split()
            if not rights.startswith("rw") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            with contextlib.suppress(OSError, OverflowError):
                _copy(memory.fileno(), start, end, out.fileno(), pid)


def _copy(memory: int, start: int, end: int, out: int, pid: int) -> None:
    """Copy the pages that are there: runtimes reserve far more than they use."""
    page = os.sysconf("SC_PAGE_SIZE")
    with Path(f"/proc/{pid}/pagemap").open("rb", 0) as file:
        table = os.pread(file.fileno(), 8 * ((end - start) // page), 8 * (start // page))
    for number in range(0, len(table), 8):
        # pagemap: bit 63 is "present", bit 62 "swapped".
        if table[number + 7] & 0xC0:
            os.write(out, os.pread(memory, page, start + number // 8 * page))


def collect(to: Path, texts: Mapping[str, str | bytes]) -> None:
    """Write what was gathered down, one file each, to be searched."""
    to.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        (to / name.replace("/", "_")).write_bytes(data)


def disk(machine: Machine) -> Iterable[Path]:
    """All that a machine has written, and what it keeps in memory as files."""
    return machine.upper, machine.volumes, cluster.inside(machine, "/run")


# -- what there is to find, and where it could be -----------------------------------------------


def servers_secrets(servers: list[Machine]) -> dict[str, bytes]:
    """What only servers may have, by what it is; keys as they are and in base64."""
    pki = LocalPki()
    text = servers[0].read("/etc/nodeagent/secrets.json")
    found = secrets.parse(text, "secrets.json", "server", pki)
    assert isinstance(found, secrets.ServerSecrets)
    named: dict[str, bytes] = {}
    seeds = {seed.reveal() for purpose in secrets.PURPOSES for seed in found.seeds(purpose)}
    for number, seed in enumerate(sorted({found.cluster_key.reveal(), *seeds})):
        named[f"seed {number} in base64"] = seed.rstrip("=").encode()
        named[f"seed {number}"] = base64.b64decode(seed)
    number = pki._authority_key(found.seeds("ca")[0]).private_numbers().private_value
    named["the CA's key"] = number.to_bytes(32, "big")
    token = secrets.keys(found, pki).server_token
    assert token is not None
    named["server token"] = token.reveal().encode()
    named["managers' join token"] = managers_secret(servers[0])
    for server in servers:
        own = json.loads(server.read(NODE_TOKEN))
        named[f"recovery token of {server.name}"] = own["recovery"].encode()
        pem = server.read(f"{CONFIG}/node.pem").encode()
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        value = key.private_numbers().private_value
        named[f"key of {server.name}"] = value.to_bytes(32, "big")
    return named


def workers_secrets(server: Machine, worker: Machine) -> dict[str, bytes]:
    """What workers have too, and nobody else may."""
    given = json.loads(worker.read("/etc/nodeagent/secrets.json"))
    own = json.loads(worker.read(NODE_TOKEN))
    key = serialization.load_pem_private_key(given["certificate"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    record = json.loads(base64.b64decode(store(server)[f"{PREFIX}worker/swarm"][1]))
    named = {
        "gossip key in base64": given["gossip_key"].rstrip("=").encode(),
        "gossip key": base64.b64decode(given["gossip_key"]),
        "enrolment token": given["enrolment"].encode(),
        "key of the workers' certificate": key.private_numbers().private_value.to_bytes(32, "big"),
        "workers' join token": record["token"].rpartition("-")[2].encode(),
        f"recovery token of {worker.name}": own["recovery"].encode(),
        f"token of {worker.name}": own_token(worker).encode(),
    }
    for generation, token in own["tokens"].items():
        named[f"what {worker.name} made up for {generation}"] = token.encode()
    return named


TOLD = (
    "kv/?recurse",
    "agent/self",
    "agent/members",
    "agent/metrics",
    "agent/services",
    "agent/checks",
    "catalog/nodes",
    "catalog/services",
    "health/state/any",
    "internal/ui/nodes",
    "internal/ui/services",
    "session/list",
    "query",
    "acl/token/self",
)


def gather(machine: Machine, tokens: tuple[str, ...], to: Path) -> None:
    """Write down all that can be known on a machine but is not in its files."""
    texts: dict[str, str | bytes] = {
        "journal": machine.run("journalctl", "-o", "export", timeout_s=60).stdout,
        "consul.log": "".join(
            (said.stdout + said.stderr)
            for said in [machine.run(*SYSTEM_ENGINE, "logs", "consul", check=False)]
        ),
        "consul.inspect": machine.run(*SYSTEM_ENGINE, "inspect", "consul").stdout,
    }
    for pid, words in processes(machine).items():
        texts[f"{pid}.cmdline"] = words
        with contextlib.suppress(OSError):
            texts[f"{pid}.environ"] = Path(f"/proc/{pid}/environ").read_bytes()
    for number, token in enumerate((None, *tokens)):
        for path in TOLD:
            texts[f"api.{number}.{path}"] = ask(machine, "GET", path, token=token).body
    collect(to, texts)


def remember(machine: Machine, to: Path) -> None:
    """Write down the memory of the agent and of Consul."""
    to.mkdir(parents=True)
    found = processes(machine)
    for name, mark in (("agent", "nodeagent run"), ("consul", "consul agent -config-dir")):
        (pid,) = (pid for pid, words in found.items() if mark in words)
        dump_memory(pid, to / name)
