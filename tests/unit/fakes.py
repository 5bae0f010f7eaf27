"""A cluster in memory: hand-written fakes of everything outside, checked by tests/contract.

They know only what the program asks; anything else is an AttributeError. Time stands still unless
a test moves it, and nothing happens in the background.
"""
# ruff: noqa: ARG002 - a fake takes what the protocol gives it, needed or not

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nodeagent import paths
from nodeagent.errors import HostError
from nodeagent.host import (
    ConsulSelf,
    Container,
    ContainerState,
    EngineInfo,
    Entry,
    Host,
    Interface,
    Member,
    Op,
    Service,
    SwarmInfo,
    Unit,
)
from nodeagent.spec import Spec, parse


def make_spec(role: str = "server", **changes: object) -> Spec:
    """A valid spec of a three-server cluster."""
    lines = {
        "cluster": "demo",
        "role": role,
        "servers": 3,
        "address": "10.10.0.0/16",
        "join": "[10.10.0.11, 10.10.0.12, 10.10.0.13]",
        "security": "off",
        **changes,
    }
    return parse("".join(f"{key}: {value}\n" for key, value in lines.items()), "test", Spec)


class FakeFiles:
    """A file system that is a dictionary. `/run` is what `forget_run` forgets.

    Directories are there as long as something is in them.
    """

    def __init__(self, texts: Mapping[Path, str] | None = None) -> None:
        self.texts: dict[Path, str] = dict(texts or {})
        self.modes: dict[Path, int] = {}
        self.held: set[Path] = set()

    def _is_directory(self, path: Path) -> bool:
        return any(path in each.parents for each in self.texts)

    def _need_no_directory(self, operation: str, path: Path) -> None:
        if self._is_directory(path):
            raise HostError(operation, path, "Is a directory")

    def read(self, path: Path) -> str | None:
        self._need_no_directory("read", path)
        return self.texts.get(path)

    def write(self, path: Path, text: str, mode: int | None) -> None:
        self._need_no_directory("write", path)
        self.texts[path] = text
        self.modes[path] = self.modes.get(path, 0o644) if mode is None else mode

    def remove(self, path: Path) -> None:
        self._need_no_directory("remove", path)
        self.texts.pop(path, None)

    def exists(self, path: Path) -> bool:
        return path in self.texts or self._is_directory(path)

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
    gone: int = 0  # nodes that left; a Swarm lists them as down until somebody removes them

    @property
    def nodes(self) -> int:
        return len(self.managers | self.workers) + self.gone

    @property
    def tokens(self) -> tuple[str, str]:
        return f"SWMTKN-1-{self.id}-worker", f"SWMTKN-1-{self.id}-manager"


class World:
    """What nodes share: Consul's store, and the Swarms there are."""

    def __init__(self) -> None:
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
        spec = self.machine.spec
        return ConsulSelf(
            self.machine.name, spec.datacenter, spec.is_server, self.machine.address, "1.21.0"
        )

    def leader(self) -> str:
        self._need_up()
        return self.world.leader()

    def members(self) -> tuple[Member, ...]:
        self._need_up()
        return tuple(
            Member(m.name, m.address, m.consul_is_up, m.spec.is_server)
            for m in self.world.machines.values()
        )

    def join(self, address: str) -> None:
        self._need_up()
        if not any(m.address == address and m.consul_is_up for m in self.world.machines.values()):
            raise HostError(f"join {address} to", "Consul", "500 connection refused")

    def get(self, prefix: str) -> Mapping[str, Entry]:
        self._need_leader()
        return {key: entry for key, entry in self.world.kv.items() if key.startswith(prefix)}

    def transact(self, *ops: Op) -> bool:
        self._need_leader()
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
            if op.verb in ("set", "cas", "lock"):
                old = kv.get(op.key)
                new = Entry(op.value, 0, op.session or (old.session if old else ""))
                if old is None or replace(old, index=0) != new:
                    kv[op.key] = replace(new, index=next(self.world.index))
        return True

    def create_session(self, name: str, ttl_s: int) -> str:
        self._need_leader()
        assert ttl_s >= 10, "Consul's minimum"
        session = f"session-{next(self.world.ids)}"
        self.world.sessions[session] = self.machine.name
        return session

    def renew_session(self, session: str) -> bool:
        self._need_leader()
        return session in self.world.sessions

    def destroy_session(self, session: str) -> None:
        self._need_leader()
        self.world.end_session(session)

    def instances(self, service: str) -> Mapping[str, bool]:
        self._need_leader()
        return {
            f"{m.address}:{found.port}": m.consul_is_up and m.consul._passes(found)
            for m in self.world.machines.values()
            for found in m.consul.registered.values()
            if found.name == service
        }

    def _passes(self, service: Service) -> bool:
        return self.machine.engine_is_up if service.tcp else self.vouched.get(service.id, True)

    def services(self) -> Mapping[str, Service]:
        self._need_up()
        return dict(self.registered)

    def register(self, service: Service) -> None:
        self._need_up()
        self.registered[service.id] = service  # its check stays as it was vouched for

    def deregister(self, service_id: str) -> None:
        self._need_up()
        self.registered.pop(service_id, None)
        self.vouched.pop(service_id, None)

    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        self._need_up()
        service = self.registered.get(service_id)
        if service is None or not service.ttl_s:
            raise HostError(f"vouch for {service_id} in", "Consul", "500 has no TTL check")
        self.vouched[service_id] = passing

    def watch(self, prefix: str, wake: Callable[[], None], stop: threading.Event) -> None:
        raise AssertionError("not in this world")


class FakeEngine:
    """The user's Engine of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.world = machine, machine.world
        self.version = "26.1.5"
        self.log_driver = "json-file"
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
        return EngineInfo(self.version, self.log_driver, False, self._swarm())

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
        return EngineInfo("26.1.5", "json-file", True, SwarmInfo()) if self._is_up else None

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
        self.runs += 1

    def start_container(self, name: str) -> None:
        self._need_up()
        if name not in self.containers:
            raise HostError("start", name, "no such container")
        self.containers[name] = replace(self.containers[name], status="running")


class FakeSystemd:
    """The service manager of one machine. An Engine started runs with the file as it is now."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.units = {
            paths.ENGINE_UNIT: Unit("loaded", "active", "run-0", "enabled"),
            paths.SYSTEM_ENGINE_UNIT: Unit("loaded", "inactive", "", "disabled"),
            paths.CONSUL_UNIT: Unit("loaded", "inactive", "", "disabled"),
        }
        self.failing: dict[str, tuple[str, ...]] = {}  # units that fail, and what they say then
        self.told: list[dict[str, str]] = []
        self.restarts = 0

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
        if name in self.failing:
            self.units[name] = replace(
                unit, active="failed", invocation=invocation, result="exit-code"
            )
            raise HostError("run systemctl start for", name, f"Job for {name} failed")
        self.units[name] = replace(unit, active="active", invocation=invocation, result="success")

    def start_soon(self, name: str) -> None:
        with contextlib.suppress(HostError):
            self.restart(name)

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)
        self.restarts += 1

    def stop(self, name: str) -> None:
        unit = self._known("stop", name)
        self.units[name] = replace(unit, active="inactive")

    def enable(self, name: str) -> None:
        self.units[name] = replace(self._known("enable", name), enabled="enabled")

    def reload(self) -> None:
        pass

    def last_lines(self, name: str, count: int) -> tuple[str, ...]:
        return self.failing.get(name, ())[-count:]

    def watch(self, name: str, wake: Callable[[], None], stop: threading.Event) -> None:
        raise AssertionError("not in this world")

    def notify(self, **values: str) -> None:
        self.told.append(values)


class FakeResolver:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.names: dict[str, tuple[str, ...]] = {}

    def consul_servers(self, domain: str) -> tuple[str, ...]:
        machines = self.machine.world.machines.values()
        return tuple(m.name for m in machines if m.spec.is_server and m.consul_is_up)

    def addresses(self, name: str) -> tuple[str, ...]:
        return self.names.get(name, ())


class FakeNetwork:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def interfaces(self) -> tuple[Interface, ...]:
        own = Interface("eth1", f"{self.machine.address}/16")
        return (Interface("lo", "127.0.0.1/8"), Interface("eth0", "203.0.113.7/24"), own)

    def hostname(self) -> str:
        return self.machine.name


class FakeClock:
    """Time that moves only when somebody waits."""

    def __init__(self) -> None:
        self.t = 1000.0
        self.on_wait: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.t

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
        self.files = FakeFiles({paths.MACHINE_ID: f"machine-id-of-{name}\n"})
        self.systemd = FakeSystemd(self)
        self.engine = FakeEngine(self)
        self.system_engine = FakeSystemEngine(self)
        self.consul = FakeConsul(self)
        self.resolver = FakeResolver(self)
        self.clock = FakeClock()
        self.host = Host(
            files=self.files,
            web=FakeWeb(self.files, {}),
            systemd=self.systemd,
            engine=self.engine,
            system_engine=self.system_engine,
            consul=self.consul,
            resolver=self.resolver,
            network=FakeNetwork(self),
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
        self.files.forget_run()
        self.world.end_sessions_of(self.name)
        for name, unit in self.systemd.units.items():
            self.systemd.units[name] = replace(unit, active="inactive")
        for name, state in self.system_engine.containers.items():
            self.system_engine.containers[name] = replace(state, status="exited")

    def boot(self) -> None:
        """Units that are enabled start, and with the System Engine its containers."""
        for name, unit in list(self.systemd.units.items()):
            if unit.enabled == "enabled":
                self.systemd.start(name)
        if self.systemd.units[paths.SYSTEM_ENGINE_UNIT].is_active:
            for name in self.system_engine.containers:
                self.system_engine.start_container(name)
