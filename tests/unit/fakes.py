"""A cluster in memory: hand-written fakes of everything outside, checked by tests/contract.

They know only what the program asks; anything else is an AttributeError. Time stands still unless
a test moves it, and nothing happens in the background.
"""
# ruff: noqa: ARG002 - a fake takes what the protocol gives it, needed or not

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nodeagent import paths, secrets
from nodeagent.adapters.pki import LocalPki
from nodeagent.errors import HostError, Secret
from nodeagent.host import (
    SERVICE_ID_PREFIX,
    Certificate,
    ConsulSelf,
    Container,
    ContainerState,
    EngineInfo,
    Entry,
    Host,
    Interface,
    KeyringAction,
    Listener,
    LogSettings,
    Member,
    Op,
    Policy,
    Rule,
    Service,
    SwarmInfo,
    Token,
    Unit,
    Word,
)
from nodeagent.secrets import ServerSecrets, WorkerSecrets
from nodeagent.spec import Spec, parse
from nodeagent.steps import dns, guard
from nodeagent.steps.access import ANONYMOUS, MANAGEMENT, MASTER
from nodeagent.steps.kernel import CGROUP, SWAP_V2


def make_spec(role: str = "server", **changes: object) -> Spec:
    """A valid spec of a three-server cluster."""
    lines = {
        "cluster": "demo",
        "role": role,
        "servers": 3,
        "address": "10.10.0.0/16",
        "join": "[10.10.0.11, 10.10.0.12, 10.10.0.13]",
        **changes,
    }
    return parse("".join(f"{key}: {value}\n" for key, value in lines.items()), "test", Spec)


NOW = 1_700_000_000.0

RESOLVED_STUB = "# by systemd-resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\n"


class FakeFiles:
    """A file system that is a dictionary. `/run` is what `forget_run` forgets.

    Directories are there as long as something is in them, or once they were made.
    """

    def __init__(self, texts: Mapping[Path, str] | None = None) -> None:
        self.texts: dict[Path, str] = dict(texts or {})
        self.modes: dict[Path, int] = {}
        self.links: dict[Path, Path] = {}
        self.directories: set[Path] = set()
        self.held: set[Path] = set()

    def _real(self, path: Path) -> Path:
        """Where a link leads to; links of directories are none of this world's."""
        while path in self.links:
            path = path.parent / self.links[path]
        return path

    def _is_directory(self, path: Path) -> bool:
        below = f"{path}/"
        there = itertools.chain(self.directories, self.texts, self.links)
        return path in self.directories or any(str(each).startswith(below) for each in there)

    def _need_no_directory(self, operation: str, path: Path) -> None:
        if self._is_directory(path):
            raise HostError(operation, path, "Is a directory")

    def read(self, path: Path) -> str | None:
        path = self._real(path)
        self._need_no_directory("read", path)
        return self.texts.get(path)

    def write(self, path: Path, text: str, mode: int | None) -> None:
        path = self._real(path)
        self._need_no_directory("write", path)
        self.texts[path] = text
        self.modes[path] = self.modes.get(path, 0o644) if mode is None else mode

    def remove(self, path: Path) -> None:
        self._need_no_directory("remove", path)
        if self.links.pop(path, None) is None:
            self.texts.pop(path, None)
            self.modes.pop(path, None)

    def exists(self, path: Path) -> bool:
        path = self._real(path)
        return path in self.texts or self._is_directory(path)

    def is_private(self, path: Path) -> bool:
        path = self._real(path)
        return path in self.texts and not self.modes.get(path, 0o644) & 0o077

    def make_private_directory(self, path: Path) -> None:
        if self._real(path) in self.texts:
            raise HostError("make the directory", path, "File exists")
        self.directories.add(path)

    def link(self, path: Path, target: Path) -> None:
        self._need_no_directory("link", path)
        self.remove(path)
        self.links[path] = target

    def copy_tree(self, source: Path, target: Path) -> None:
        if not self._is_directory(source):
            raise HostError("copy", source, "No such file or directory")
        if self.exists(target):
            raise HostError("copy", source, "Directory not empty")
        self.directories.add(target)
        for path in [path for path in self.texts if source in path.parents]:
            self.write(target / path.relative_to(source), self.texts[path], self.modes.get(path))

    def compile(self, directory: Path) -> None:
        pass

    @contextlib.contextmanager
    def try_lock(self, path: Path) -> Iterator[bool]:
        if path in self.held:
            yield False
            return
        self.held.add(path)
        try:
            yield True
        finally:
            self.held.discard(path)

    def is_held(self, path: Path) -> bool:
        return path in self.held

    def unpack_program(self, archive: Path, path: Path) -> None:
        if archive not in self.texts:
            raise HostError("unpack", archive, "No such file or directory")
        self.write(path, self.texts[archive], 0o755)

    def forget_run(self) -> None:
        self.texts = {path: text for path, text in self.texts.items() if path.parts[1] != "run"}


class FakeWeb:
    def __init__(self, files: FakeFiles, contents: Mapping[str, str]) -> None:
        self.files, self.contents = files, contents

    def fetch(self, location: str, path: Path, sha256: str, alive: Callable[[], None]) -> None:
        if location not in self.contents:
            raise HostError("fetch", location, "404 Not Found")
        found = hashlib.sha256(self.contents[location].encode()).hexdigest()
        if found != sha256:
            raise HostError("fetch", location, f"its sha256 is {found}, not {sha256}")
        alive()
        self.files.write(path, self.contents[location], 0o600)


@dataclass
class Swarm:
    """One Swarm of the world."""

    id: str
    labels: Mapping[str, str]
    managers: set[str] = field(default_factory=set)
    workers: set[str] = field(default_factory=set)
    services: int = 0
    rotations: int = 0  # of the join tokens
    gone: int = 0  # nodes that left; a Swarm lists them as down until somebody removes them

    @property
    def nodes(self) -> int:
        return len(self.managers | self.workers) + self.gone

    @property
    def tokens(self) -> tuple[str, str]:
        name = f"SWMTKN-1-{self.id}-{self.rotations}"
        return f"{name}-worker", f"{name}-manager"


class RememberingPki(LocalPki):
    """The real one, which computes an answer once: tests ask the same thousands of times."""

    @functools.cache  # noqa: B019 - there is one of it
    def derive(self, seed: Secret, purpose: str, size_bytes: int = 32) -> bytes:
        return super().derive(seed, purpose, size_bytes)

    @functools.cache  # noqa: B019 - there is one of it
    def certificates(self, pem: str) -> tuple[Certificate, ...]:
        return super().certificates(pem)

    @functools.cache  # noqa: B019 - there is one of it
    def matches(self, seed: Secret, authority: str) -> bool:
        return super().matches(seed, authority)

    @functools.cache  # noqa: B019 - there is one of it
    def is_signed(self, certificate: str, authority: str) -> bool:
        return super().is_signed(certificate, authority)


PKI = RememberingPki()


@functools.cache
def server_secrets() -> ServerSecrets:
    """The secrets of every cluster of these tests, as it is made."""
    return secrets.new(PKI, NOW)


@functools.cache
def worker_secrets() -> WorkerSecrets:
    return secrets.for_workers(server_secrets(), make_spec(), PKI, NOW)


class World:
    """What nodes share: Consul's store and tokens, and the Swarms there are."""

    def __init__(self) -> None:
        self.policies: dict[str, Policy] = {}
        self.tokens: dict[str, Token] = {ANONYMOUS: Token(ANONYMOUS, (), "Anonymous Token")}
        self.gossip_keys: list[str] = []  # the first is in use
        self.machines: dict[str, Machine] = {}
        self.swarms: dict[str, Swarm] = {}
        self.kv: dict[str, Entry] = {}
        self.sessions: dict[str, str] = {}  # session: node
        self.index = itertools.count(1)
        self.ids = itertools.count(1)
        self.alive: set[str] = set()
        self.bootstrapped = False

    def machine(self, spec: Spec, address: str) -> Machine:
        name = f"{spec.role}{address.rpartition('.')[2]}"
        machine = Machine(self, spec, name, address)
        self.machines[name] = machine
        return machine

    def leader(self) -> str:
        servers = [m for m in self.machines.values() if m.spec.is_server]
        up = [m for m in servers if m.consul_is_up]
        if not servers or not up:
            return ""
        needed = servers[0].spec.majority if self.bootstrapped else servers[0].spec.servers
        if len(up) < needed:
            return ""
        self.bootstrapped = True
        master = up[0].consul.loaded_tokens.get("master", "")
        if master and all(t.secret != Secret(master) for t in self.tokens.values()):
            accessor = str(uuid.uuid5(uuid.NAMESPACE_OID, str(next(self.ids))))
            made = Token(accessor, (MANAGEMENT,), MASTER[0], Secret(master))
            self.tokens[accessor] = made
        return f"{up[0].address}:8300"

    def end_session(self, session: str) -> None:
        self.sessions.pop(session, None)
        for key, entry in self.kv.items():
            if entry.session == session:
                self.kv[key] = replace(entry, session="", index=next(self.index))

    def end_sessions_of(self, node: str) -> None:
        for session, holder in list(self.sessions.items()):
            if holder == node:
                self.end_session(session)


class FakeConsul:
    """The local Consul agent of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.world = machine, machine.world
        self.registered: dict[str, Service] = {}
        self.vouched: dict[str, bool] = {}
        self.loaded: dict[Path, str] = {}  # the files that a start or a reload reads
        self.reloads = 0
        self.unknown: dict[str, float] = {}  # tokens that a worker remembers as unknown, and since

    def load(self) -> None:
        """Read keys and tokens, as a start or a reload does."""
        if not self.machine.spec.is_secured:
            return
        names = (paths.CONSUL_KEYS, paths.CONSUL_AUTHORITIES, paths.CONSUL_CERTIFICATE)
        self.loaded = {path: self.machine.files.texts[path] for path in names}
        if not self.world.gossip_keys:
            self.world.gossip_keys.append(json.loads(self.loaded[paths.CONSUL_KEYS])["encrypt"])

    @property
    def loaded_tokens(self) -> Mapping[str, str]:
        found = json.loads(self.loaded.get(paths.CONSUL_KEYS, '{"acl": {"tokens": {}}}'))
        tokens: Mapping[str, str] = found["acl"]["tokens"]
        return tokens

    def _shown(self, name: str) -> str:
        return str(json.loads(self.machine.files.texts[paths.CONSUL_TOKENS])[name])

    def _need_recovery(self) -> None:
        self._need_up()
        if self.machine.spec.is_secured and self._shown("recovery") != self.loaded_tokens.get(
            "agent_master"
        ):
            raise HostError("ask", "Consul", "403 Permission denied")

    def _rules(self) -> tuple[tuple[str, str, str], ...] | None:
        """What the token shown allows; None: everything."""
        self._need_leader()
        if not self.machine.spec.is_secured:
            return None
        shown = self._shown("token")
        found = [t for t in self.world.tokens.values() if t.secret == Secret(shown)]
        is_remembered = self.machine.clock.now() - self.unknown.get(shown, float("-inf")) < 30
        if not found or is_remembered:
            if not self.machine.spec.is_server and not is_remembered:
                self.unknown[shown] = self.machine.clock.now()
            raise HostError("ask", "Consul", "403 ACL not found")
        if MANAGEMENT in found[0].policies:
            return None
        policies = (self.world.policies[name] for name in found[0].policies)
        return tuple(rule for policy in policies for rule in policy.rules)

    def _may(self, rules: tuple[tuple[str, str, str], ...] | None, of: str, level: str) -> bool:
        """Whether these rules allow this with `of`, which is `key:NAME` or `service:NAME`."""
        if rules is None:
            return True
        kind, _, name = of.partition(":")
        levels = [
            allowed
            for rule, target, allowed in rules
            if (rule == kind and target == name)
            or (rule == f"{kind}_prefix" and name.startswith(target))
        ]
        return level in levels or (level == "read" and "write" in levels)

    def _need(self, of: str, level: str) -> None:
        if not self._may(self._rules(), of, level):
            raise HostError("ask", "Consul", "403 Permission denied")

    def _need_management(self) -> None:
        if self._rules() is not None:
            raise HostError("ask", "Consul", "403 Permission denied")

    def reload(self) -> None:
        self._need_recovery()
        try:
            PKI.certificates(self.machine.files.texts.get(paths.CONSUL_CERTIFICATE, ""))
        except HostError as error:
            if self.machine.spec.is_secured:
                raise HostError("reload", "Consul", "500 Failed reloading tls") from error
        self.load()
        self.reloads += 1

    def knows_token(self) -> bool:
        try:
            self._rules()
        except HostError as error:
            if "ACL not found" not in str(error):
                raise
            return False
        return True

    def policies(self) -> Mapping[str, str]:
        self._need_management()
        return {name: policy.digest for name, policy in self.world.policies.items()}

    def put_policy(self, policy: Policy) -> None:
        self._need_management()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", policy.name):
            raise HostError("set", "an access policy", "500 Invalid Policy: invalid Name")
        self.world.policies[policy.name] = policy

    def tokens(self) -> Mapping[str, Token]:
        self._need_management()
        return {name: replace(token, secret=None) for name, token in self.world.tokens.items()}

    def put_token(self, token: Token) -> None:
        self._need_management()
        old = self.world.tokens.get(token.accessor)
        others = [t for t in self.world.tokens.values() if t.accessor != token.accessor]
        operation = f"set the token for {token.description} of"
        if set(token.policies) - {*self.world.policies, MANAGEMENT}:
            raise HostError(operation, "Consul", "500 No such ACL policy")
        if any(t.secret == token.secret for t in others if token.secret):
            raise HostError(operation, "Consul", "500 Invalid Token: SecretID is already in use")
        if not all(_is_uuid(each) for each in (token.accessor, token.secret) if each):
            raise HostError(operation, "Consul", "500 Invalid Token: not a valid UUID")
        secret = old.secret if old else token.secret
        self.world.tokens[token.accessor] = replace(token, secret=secret)

    def delete_token(self, accessor: str) -> None:
        self._need_management()
        self.world.tokens.pop(accessor, None)

    def change_keyring(self, action: KeyringAction, key: Secret) -> None:
        self._need_management()
        if not self.machine.spec.is_server:
            raise HostError(action, "a gossip key", "500 must run against a server node")
        keys, value = self.world.gossip_keys, key.reveal()
        if action == "install":
            if value not in keys:
                keys.append(value)
        elif action == "use":
            if value not in keys:
                raise HostError(action, "a gossip key", "500 Requested key is not in the keyring")
            keys.remove(value)
            keys.insert(0, value)
        elif keys[:1] == [value]:
            raise HostError(action, "a gossip key", "500 Removing the primary key is not allowed")
        elif value in keys:  # to remove what is gone is no error
            keys.remove(value)

    def _need_up(self) -> None:
        if not self.machine.consul_is_up:
            raise HostError("ask", "Consul", "connection refused")

    def _need_leader(self) -> None:
        self._need_up()
        if not self.world.leader():
            raise HostError("ask", "Consul", "500 No cluster leader")

    def self(self) -> ConsulSelf | None:
        if not self.machine.consul_is_up:
            return None
        self._need_recovery()
        spec = self.machine.spec
        return ConsulSelf(
            self.machine.name, spec.datacenter, spec.is_server, self.machine.address, "1.21.0"
        )

    def leader(self) -> str:
        self._need_up()
        return self.world.leader()

    def members(self) -> tuple[Member, ...]:
        self._need_recovery()
        return tuple(
            Member(m.name, m.address, m.consul_is_up, m.spec.is_server)
            for m in self.world.machines.values()
        )

    def join(self, address: str) -> None:
        self._need_recovery()
        if not any(m.address == address and m.consul_is_up for m in self.world.machines.values()):
            raise HostError(f"join {address} to", "Consul", "500 connection refused")

    def voters(self) -> tuple[str, ...]:
        self._need_management()
        return tuple(m.name for m in self.world.machines.values() if m.spec.is_server)

    def knock(self, address: str) -> str:
        return ""

    def greet(self, address: str, name: str) -> str:
        servers = {m.address: m for m in self.world.machines.values() if m.spec.is_server}
        there = servers.get(address)
        if there is None or not there.consul_is_up:
            return ""
        files, shown = self.machine.files.texts, there.consul.loaded
        certificate = shown[paths.CONSUL_CERTIFICATE]
        if not _is_trusted(certificate, files[paths.CONSUL_AUTHORITIES]):
            return "its certificate is refused here: unable to get local issuer certificate"
        if name not in PKI.certificates(certificate)[0].names:
            return f"its certificate is refused here: Hostname mismatch, it is not valid for {name}"
        if not _is_trusted(files[paths.CONSUL_CERTIFICATE], shown[paths.CONSUL_AUTHORITIES]):
            return "it refuses this node's certificate: TLSV1_ALERT_UNKNOWN_CA"
        return ""

    def get(self, prefix: str) -> Mapping[str, Entry]:
        rules = self._rules()
        return {
            key: entry
            for key, entry in self.world.kv.items()
            if key.startswith(prefix) and self._may(rules, f"key:{key}", "read")
        }

    def transact(self, *ops: Op) -> bool:
        for op in ops:
            self._need(f"key:{op.key}", "read" if op.verb.startswith("check") else "write")
        kv = self.world.kv
        for op in ops:
            entry = kv.get(op.key)
            if op.verb == "check-not-exists" and entry is not None:
                return False
            if op.verb in ("cas", "check-index") and op.index != (entry.index if entry else 0):
                return False
            if op.verb == "lock" and (
                op.session not in self.world.sessions
                or (entry is not None and entry.session not in ("", op.session))
            ):
                return False
        for op in ops:
            if op.verb == "delete":
                kv.pop(op.key, None)
            if op.verb in ("set", "cas", "lock"):
                old = kv.get(op.key)
                new = Entry(op.value, 0, op.session or (old.session if old else ""))
                if old is None or replace(old, index=0) != new:
                    kv[op.key] = replace(new, index=next(self.world.index))
        return True

    def create_session(self, name: str, ttl_s: int) -> str:
        self._need(f"session:{self.machine.name}", "write")
        assert ttl_s >= 10, "Consul's minimum"
        session = f"session-{next(self.world.ids)}"
        self.world.sessions[session] = self.machine.name
        return session

    def renew_session(self, session: str) -> bool:
        self._need_leader()
        if session not in self.world.sessions:
            return False
        self._need(f"session:{self.world.sessions[session]}", "write")
        return True

    def destroy_session(self, session: str) -> None:
        self._need_leader()
        if session in self.world.sessions:
            self._need(f"session:{self.world.sessions[session]}", "write")
        self.world.end_session(session)

    def instances(self, service: str) -> Mapping[str, bool]:
        rules = self._rules()
        if not self._may(rules, f"service:{service}", "read"):
            return {}
        return {
            f"{m.address}:{found.port}": m.consul_is_up and m.consul._passes(found)
            for m in self.world.machines.values()
            for found in m.consul.registered.values()
            if found.name == service and self._may(rules, f"node:{m.name}", "read")
        }

    def _passes(self, service: Service) -> bool:
        return self.machine.engine_is_up if service.tcp else self.vouched.get(service.id, True)

    def services(self) -> Mapping[str, Service]:
        rules = self._rules()
        return {
            id_: service
            for id_, service in self.registered.items()
            if self._may(rules, f"service:{service.name}", "read")
        }

    def register(self, service: Service) -> None:
        self._need(f"service:{service.name}", "write")
        self.registered[service.id] = service  # its check stays as it was vouched for

    def deregister(self, service_id: str) -> None:
        self._need(f"service:{service_id.removeprefix(SERVICE_ID_PREFIX)}", "write")
        self.registered.pop(service_id, None)
        self.vouched.pop(service_id, None)

    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        self._need(f"service:{service_id.removeprefix(SERVICE_ID_PREFIX)}", "write")
        service = self.registered.get(service_id)
        if service is None or not service.ttl_s:
            raise HostError(f"vouch for {service_id} in", "Consul", "500 has no TTL check")
        self.vouched[service_id] = passing

    def watch(self, prefix: str, wake: Callable[[], None], stop: threading.Event) -> None:
        raise AssertionError("not in this world")


def _is_uuid(value: str | Secret) -> bool:
    text = value.reveal() if isinstance(value, Secret) else value
    return bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))


def _is_trusted(certificate: str, authorities: str) -> bool:
    """Whether one of these CAs has signed it."""
    end = "-----END CERTIFICATE-----\n"
    each = [f"{text}{end}" for text in authorities.split(end)[:-1]]
    return any(PKI.is_signed(certificate, authority) for authority in each)


class FakeEngine:
    """The user's Engine of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.world = machine, machine.world
        self.runs_with: str | None = None  # the text of daemon.json when it last read it
        self.deaf: set[str] = set()  # options that it takes and does not show
        self.logs: dict[str, LogSettings] = {}
        self.swarm_id = ""
        self.state = "inactive"
        self.node_id = ""
        self.inits = 0
        self.joins = 0

    def _need_up(self) -> None:
        if not self.machine.engine_is_up:
            raise HostError("ask", "the Docker Engine", "connection refused")

    def info(self) -> EngineInfo | None:
        if not self.machine.engine_is_up:
            return None
        given = json.loads(self.runs_with or "{}")
        shown = {"log-driver": "json-file", "live-restore": False, "labels": [], "debug": False}
        shown |= {key: value for key, value in given.items() if key in shown.keys() - self.deaf}
        return EngineInfo(self.machine.program.text, shown, self._swarm())

    def log_settings(self) -> Mapping[str, LogSettings]:
        self._need_up()
        return self.logs

    def managers(self) -> Mapping[str, bool]:
        names = self._managed().managers
        return {name: self.world.machines[name].engine_is_up for name in names}

    def _swarm(self) -> SwarmInfo:
        swarm = self.world.swarms.get(self.swarm_id)
        if swarm is None:
            return SwarmInfo(state=self.state)
        name = self.machine.name
        is_manager = name in swarm.managers
        return SwarmInfo(
            state="active",
            node_id=self.node_id,
            is_manager=is_manager,
            cluster_id=swarm.id,
            labels=swarm.labels if is_manager else {},
            nodes=swarm.nodes if is_manager else 0,
        )

    def _managed(self) -> Swarm:
        self._need_up()
        swarm = self.world.swarms.get(self.swarm_id)
        if swarm is None or self.machine.name not in swarm.managers:
            raise HostError("ask", "the Docker Engine", "this node is not a swarm manager")
        return swarm

    def swarm_tokens(self) -> tuple[str, str]:
        return self._managed().tokens

    def swarm_rotate_tokens(self) -> None:
        self._managed().rotations += 1

    def swarm_is_bare(self) -> bool:
        swarm = self._managed()
        return not swarm.services and swarm.nodes == 1

    def swarm_init(self, address: str, labels: Mapping[str, str]) -> None:
        self._need_up()
        if self.swarm_id:
            raise HostError("initialise a Swarm on", "the Docker Engine", "already part of a swarm")
        if address != self.machine.address:
            raise HostError("initialise a Swarm on", "the Docker Engine", "not on this machine")
        swarm = Swarm(f"swarm-{next(self.world.ids)}", dict(labels), {self.machine.name})
        self.world.swarms[swarm.id] = swarm
        self.swarm_id, self.node_id = swarm.id, f"node-{next(self.world.ids)}"
        self.inits += 1

    def swarm_join(self, address: str, manager: str, token: str) -> None:
        self._need_up()
        if self.swarm_id:
            raise HostError("join", "the Docker Engine", "it is in a Swarm already")
        through = {f"{m.address}:2377": m for m in self.world.machines.values()}.get(manager)
        swarm = self.world.swarms.get(through.engine.swarm_id) if through else None
        if (
            through is None
            or swarm is None
            or not through.engine_is_up
            or through.name not in swarm.managers
        ):
            raise HostError("join", "the Docker Engine", "connection refused")
        if token not in swarm.tokens:
            raise HostError("join", "the Docker Engine", "invalid join token")
        as_manager = token == swarm.tokens[1]
        (swarm.managers if as_manager else swarm.workers).add(self.machine.name)
        self.swarm_id, self.node_id = swarm.id, f"node-{next(self.world.ids)}"
        self.joins += 1

    def swarm_leave(self) -> None:
        self._need_up()
        swarm = self.world.swarms.get(self.swarm_id)
        if swarm is not None:
            swarm.managers.discard(self.machine.name)
            swarm.workers.discard(self.machine.name)
            swarm.gone += 1
        self.swarm_id, self.node_id, self.state = "", "", "inactive"


class FakeSystemEngine:
    """The System Engine of one machine, for one container."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.images: set[str] = set()
        self.registry: set[str] = {"hashicorp/consul:1.21"}
        self.containers: dict[str, ContainerState] = {}
        self.runs = 0

    @property
    def _is_up(self) -> bool:
        return self.machine.systemd.units[paths.SYSTEM_ENGINE_UNIT].is_active

    def _need_up(self) -> None:
        if not self._is_up:
            raise HostError("ask", "the System Engine", "connection refused")

    def info(self) -> EngineInfo | None:
        return (
            EngineInfo("26.1.5", {"log-driver": "json-file"}, SwarmInfo()) if self._is_up else None
        )

    def has_image(self, image: str) -> bool:
        self._need_up()
        return image in self.images

    def load_image(self, archive: Path) -> tuple[str, ...]:
        self._need_up()
        if not self.machine.files.exists(archive):
            raise HostError("load an image into", "the System Engine", f"no file {archive}")
        self.images.add("from/archive:1")
        return ("from/archive:1",)

    def pull_image(self, image: str, alive: Callable[[], None]) -> None:
        self._need_up()
        if image not in self.registry:
            raise HostError("pull", image, "manifest unknown")
        alive()
        self.images.add(image)

    def container(self, name: str) -> ContainerState | None:
        self._need_up()
        return self.containers.get(name)

    def run_container(self, container: Container) -> None:
        self._need_up()
        if container.image not in self.images:
            raise HostError("run", container.name, f"no image {container.image}")
        self.containers[container.name] = ContainerState(container.definition, "running")
        self.machine.consul.load()
        self.runs += 1

    def start_container(self, name: str) -> None:
        self._need_up()
        if name not in self.containers:
            raise HostError("start", name, "no such container")
        self.containers[name] = replace(self.containers[name], status="running")
        self.machine.consul.load()

    def execute(self, container: str, *command: str) -> None:
        self._need_up()
        if self.machine.refuses and "validate" in command:
            raise HostError("run consul validate in", "the System Engine", self.machine.refuses)


class FakeProgram:
    """The Engine's program of one machine: what it says of a file of options."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.text = "26.1.5"
        self.refused: dict[str, str] = {}  # by a piece of the file
        self.stored: tuple[str, ...] = ("bridge", "host", "none")
        self.asked = 0

    def version(self) -> str:
        return self.text

    def has_consul(self) -> bool:
        return True

    def refusal(self, options: Path, command: tuple[Word, ...]) -> str:
        self.asked += 1
        text = self.machine.files.read(options) or ""
        return next((words for piece, words in self.refused.items() if piece in text), "")

    def networks(self, data_root: str) -> tuple[str, ...]:
        return self.stored


class FakeSystemd:
    """The service manager of one machine. An Engine started runs with the file as it is now."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.units = {
            paths.ENGINE_UNIT: Unit("loaded", "active", "run-0", "enabled"),
            paths.SYSTEM_ENGINE_UNIT: Unit("loaded", "inactive", "", "disabled"),
            paths.CONSUL_UNIT: Unit("loaded", "inactive", "", "disabled"),
            paths.GUARD_UNIT: Unit("loaded", "inactive", "", "disabled"),
            paths.GRUB_UNIT: Unit("loaded", "inactive", "", "static"),
            paths.DNS_UNIT: Unit("loaded", "inactive", "", "disabled"),
            dns.RESOLVED: Unit("loaded", "active", "run-0", "enabled"),
        }
        self.failing: dict[str, tuple[str, ...]] = {}  # units that fail, and what they say then
        self.deadly: dict[str, str] = {}  # pieces of daemon.json the Engine dies of, and its words
        self.failing_words: tuple[str, ...] = ()
        self.told: list[dict[str, str]] = []
        self.restarts = 0
        self.reboots = 0
        self.reloads = 0

    def is_running(self) -> bool:
        return True

    def unit(self, name: str) -> Unit:
        return self.units.get(name, Unit("not-found", "inactive"))

    def _known(self, operation: str, name: str) -> Unit:
        unit = self.unit(name)
        if not unit.exists:
            raise HostError(f"run systemctl {operation} for", name, f"Unit {name} is {unit.load}.")
        return unit

    def start(self, name: str) -> None:
        unit = self._known("start", name)
        if unit.is_active:
            return
        invocation = f"run-{next(self.machine.world.ids)}"
        self.machine.clock.t += 0.01
        unit = replace(unit, began_s=self.machine.clock.t)
        if name in self.failing or (name == paths.ENGINE_UNIT and self._dies()):
            self.units[name] = replace(
                unit, active="failed", invocation=invocation, result="exit-code"
            )
            raise HostError("run systemctl start for", name, f"Job for {name} failed")
        self.units[name] = replace(unit, active="active", invocation=invocation, result="success")
        if name == paths.GUARD_UNIT:
            self.machine.network.present = guard.WANTED
        if name == paths.ENGINE_UNIT:
            self.machine.engine.runs_with = self.machine.files.read(paths.DAEMON_JSON)
        if name == paths.DNS_UNIT:
            self.machine.network.has_dns_address = True
            lines = (self.machine.files.read(paths.DNS_ENVIRONMENT) or "").splitlines()
            given = dict(line.split("=", 1) for line in lines)
            self.machine.resolver.domains = (given["DOMAIN"],) if "DOMAIN" in given else ()
            self.machine.network.dns_rules = tuple(
                Rule(
                    102,
                    frozenset({f"src {dns.ADDRESS}", f"dst {to}", f"dstlen {bits}"}),
                    "prohibit",
                )
                for to, bits in (
                    each.partition("@")[0].split("/") for each in given["PEERS"].strip('"').split()
                )
            )
        if name == dns.RESOLVED:
            self.machine.network.is_resolved_there = self.machine.files.exists(dns.DROP_IN) and (
                not self.machine.network.taken
            )

    def _dies(self) -> bool:
        """Whether the Engine ends at its start over what its file says."""
        text = self.machine.files.read(paths.DAEMON_JSON) or ""
        words = [said for piece, said in self.deadly.items() if piece in text]
        self.failing_words = tuple(words)
        return bool(words)

    def start_soon(self, name: str) -> None:
        with contextlib.suppress(HostError):
            self.restart(name)

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)
        self.restarts += name != dns.RESOLVED

    def reload_unit(self, name: str) -> None:
        self._known("reload", name)
        self.machine.engine.runs_with = self.machine.files.read(paths.DAEMON_JSON)
        self.reloads += 1

    def stop(self, name: str) -> None:
        unit = self._known("stop", name)
        self.units[name] = replace(unit, active="inactive")
        if name == paths.GUARD_UNIT:
            self.machine.network.present = ()
        if name == paths.DNS_UNIT:
            self.machine.network.has_dns_address = False
            self.machine.resolver.domains = ()
            self.machine.network.dns_rules = ()
        if name == dns.RESOLVED:
            self.machine.network.is_resolved_there = False

    def disable(self, name: str) -> None:
        self.stop(name)
        self.units[name] = replace(self.units[name], enabled="disabled")

    def enable(self, name: str) -> None:
        self.units[name] = replace(self._known("enable", name), enabled="enabled")

    def reload(self) -> None:
        pass

    def reboot(self) -> None:
        self.reboots += 1

    def execute(self, *command: str) -> None:
        if self.machine.refuses and "validate" in command:
            raise HostError("run", command[0], self.machine.refuses)
        if "mv" in command:
            path, to = map(Path, command[-2:])
            self.machine.files.texts[to] = self.machine.files.texts.pop(path)

    def last_lines(self, name: str, count: int) -> tuple[str, ...]:
        words = self.failing_words if name == paths.ENGINE_UNIT else ()
        return self.failing.get(name, words)[-count:]

    def watch(self, name: str, wake: Callable[[], None], stop: threading.Event) -> None:
        raise AssertionError("not in this world")

    def notify(self, **values: str) -> None:
        self.told.append(values)


class FakeResolver:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.names: dict[str, tuple[str, ...]] = {}
        self.domains: tuple[str, ...] = ()  # told to systemd-resolved by the unit for DNS

    def consul_servers(self, domain: str) -> tuple[str, ...]:
        machines = self.machine.world.machines.values()
        anonymous = self.machine.world.tokens[ANONYMOUS]
        if self.machine.spec.is_secured and not anonymous.policies:
            return ()  # NXDOMAIN is what Consul says to whom it may tell nothing
        return tuple(m.name for m in machines if m.spec.is_server and m.consul_is_up)

    def addresses(self, name: str) -> tuple[str, ...]:
        return self.names.get(name, ())

    def routed(self, interface: str) -> tuple[str, ...]:
        if not self.machine.systemd.units[dns.RESOLVED].is_active:
            raise HostError("ask", "systemd-resolved", "it is not running")
        return self.domains if interface == dns.INTERFACE else ()


class FakeNetwork:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.present: tuple[Rule, ...] = ()  # what the guard's unit puts up
        self.dns_rules: tuple[Rule, ...] = ()
        self.has_dns_address = False
        self.is_resolved_there = False
        self.taken: tuple[Listener, ...] = ()  # port 53, by others than ours

    def interfaces(self) -> tuple[Interface, ...]:
        own = Interface("eth1", f"{self.machine.address}/16")
        ours = (Interface(dns.INTERFACE, f"{dns.ADDRESS}/32"),) if self.has_dns_address else ()
        return (Interface("lo", "127.0.0.1/8"), Interface("eth0", "203.0.113.7/24"), own, *ours)

    def listeners(self, port: int) -> tuple[Listener, ...]:
        assert port == dns.PORT
        found = [*self.taken, Listener("127.0.0.53", dns.RESOLVED_USER)]
        if self.is_resolved_there:
            found.append(Listener(dns.ADDRESS, dns.RESOLVED_USER))
        config = json.loads(self.machine.files.read(paths.CONSUL_CONFIG) or "{}")
        if self.machine.consul_is_up and config.get("ports", {}).get("dns") == port:
            found.append(Listener(dns.ADDRESS, "root"))
        return tuple(found)

    def hostname(self) -> str:
        return self.machine.name

    def rules(self) -> tuple[Rule, ...]:
        return (*self.present, *self.dns_rules)

    def uplinks(self) -> tuple[str, ...]:
        return ("eth0",)

    def watch_rules(self, wake: Callable[[], None], stop: threading.Event) -> None:
        raise AssertionError("not in this world")


class FakeClock:
    """Time that moves only when somebody waits."""

    def __init__(self) -> None:
        self.t = 1000.0
        self.on_wait: Callable[[], None] = lambda: None

    def now(self) -> float:
        return NOW + self.t

    def monotonic(self) -> float:
        return self.t

    def wait(self, timeout_s: float) -> bool:
        self.t += timeout_s
        self.on_wait()
        return False

    def wake(self) -> None:
        raise AssertionError("nothing wakes in this world")


class Machine:
    """One machine of the world: what is on its disk, and what runs."""

    def __init__(self, world: World, spec: Spec, name: str, address: str) -> None:
        self.world, self.spec, self.name, self.address = world, spec, name, address
        self.files = FakeFiles(
            {
                paths.MACHINE_ID: f"machine-id-of-{name}\n",
                dns.STUB: RESOLVED_STUB,
                dns.NSSWITCH: "passwd: files\nhosts: files dns\n",
            }
        )
        self.files.link(dns.RESOLV_CONF, dns.STUB)
        self.files.texts |= {CGROUP / "cgroup.controllers": "cpu memory pids\n", SWAP_V2: "max\n"}
        self.is_off = False
        self.refuses = ""  # what Consul says of every configuration it is shown
        if spec.is_secured:
            own = server_secrets() if spec.is_server else worker_secrets()
            self.files.write(paths.SECRETS, secrets.dump(own).reveal(), 0o600)
        self.clock = FakeClock()
        self.program = FakeProgram(self)
        self.systemd = FakeSystemd(self)
        self.engine = FakeEngine(self)
        self.system_engine = FakeSystemEngine(self)
        self.consul = FakeConsul(self)
        self.resolver = FakeResolver(self)
        self.network = FakeNetwork(self)
        self.host = Host(
            files=self.files,
            web=FakeWeb(self.files, {}),
            systemd=self.systemd,
            engine=self.engine,
            engine_program=self.program,
            system_engine=self.system_engine,
            consul=self.consul,
            resolver=self.resolver,
            network=self.network,
            pki=PKI,
            clock=self.clock,
        )

    @property
    def consul_is_up(self) -> bool:
        found = self.system_engine.containers.get("consul")
        return found is not None and found.status == "running"

    @property
    def engine_is_up(self) -> bool:
        return self.systemd.units[paths.ENGINE_UNIT].is_active

    def lose_power(self) -> None:
        """Everything that is not on disk is gone; the machine is off."""
        self.is_off = True
        self.files.forget_run()
        self.network.present = ()
        self.network.dns_rules = ()
        self.network.has_dns_address = self.network.is_resolved_there = False
        self.world.end_sessions_of(self.name)
        for name, unit in self.systemd.units.items():
            self.systemd.units[name] = replace(unit, active="inactive")
        for name, state in self.system_engine.containers.items():
            self.system_engine.containers[name] = replace(state, status="exited")

    def boot(self) -> None:
        """Units that are enabled start, and with the System Engine its containers."""
        self.is_off = False
        if self.systemd.units[dns.RESOLVED].load == "loaded":
            self.files.texts[dns.STUB] = RESOLVED_STUB
        for name, unit in list(self.systemd.units.items()):
            if unit.enabled == "enabled":
                with contextlib.suppress(HostError):  # one that fails keeps no other from starting
                    self.systemd.start(name)
        if self.systemd.units[paths.SYSTEM_ENGINE_UNIT].is_active:
            for name in self.system_engine.containers:
                self.system_engine.start_container(name)
