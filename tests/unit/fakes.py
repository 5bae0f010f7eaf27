"""A cluster in memory: hand-written fakes of everything outside, checked by tests/contract.

They know only what the program asks; anything else is an AttributeError. Time stands still unless
a test moves it, and nothing happens in the background.
"""

from __future__ import annotations

import contextlib
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
    """A file system that is a dictionary. `/run` is what `forget_run` forgets."""

    def __init__(self, texts: Mapping[Path, str] | None = None) -> None:
        self.texts: dict[Path, str] = dict(texts or {})
        self.modes: dict[Path, int | None] = {}
        self.held: set[Path] = set()

    def read(self, path: Path) -> str | None:
        return self.texts.get(path)

    def write(self, path: Path, text: str, mode: int | None) -> None:
        self.texts[path] = text
        self.modes[path] = mode

    def remove(self, path: Path) -> None:
        self.texts.pop(path, None)

    def exists(self, path: Path) -> bool:
        return path in self.texts

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
        self.texts[path] = self.texts[archive]

    def forget_run(self) -> None:
        self.texts = {path: text for path, text in self.texts.items() if path.parts[1] != "run"}


class FakeWeb:
    def __init__(self, files: FakeFiles, contents: Mapping[str, str]) -> None:
        self.files, self.contents = files, contents

    def fetch(self, location: str, path: Path, sha256: str) -> None:
        if location not in self.contents:
            raise HostError("fetch", location, "404 Not Found")
        if self.contents[location] != sha256:
            raise HostError("fetch", location, f"its sha256 is not {sha256}")
        self.files.write(path, self.contents[location], 0o600)


@dataclass
class Swarm:
    """One Swarm of the world."""

    id: str
    labels: Mapping[str, str]
    managers: set[str] = field(default_factory=set)
    workers: set[str] = field(default_factory=set)
    services: int = 0

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

    def _need_leader(self) -> None:
        if not self.machine.consul_is_up:
            raise HostError("ask", "Consul", "connection refused")
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
        return self.world.leader()

    def members(self) -> tuple[Member, ...]:
        return tuple(
            Member(m.name, m.address, m.consul_is_up, m.spec.is_server)
            for m in self.world.machines.values()
        )

    def join(self, address: str) -> None:
        raise HostError("join", address, "not in this world")

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
            if op.verb in ("cas", "check-index") and (entry is None or entry.index != op.index):
                return False
            if op.verb == "lock" and (
                op.session not in self.world.sessions
                or (entry is not None and entry.session not in ("", op.session))
            ):
                return False
        for op in ops:
            if op.verb in ("set", "cas", "lock"):
                held = kv[op.key].session if op.key in kv else ""
                kv[op.key] = Entry(op.value, next(self.world.index), op.session or held)
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
            f"{m.address}:{found.port}": m.consul_is_up and m.engine_is_up
            for m in self.world.machines.values()
            for found in m.consul.registered.values()
            if found.name == service
        }

    def services(self) -> Mapping[str, Service]:
        return dict(self.registered)

    def register(self, service: Service) -> None:
        self.registered[service.id] = service

    def deregister(self, service_id: str) -> None:
        del self.registered[service_id]

    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        assert service_id in self.registered
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
            node_id=f"node-{name}",
            is_manager=is_manager,
            cluster_id=swarm.id,
            labels=swarm.labels if is_manager else {},
            nodes=len(swarm.managers | swarm.workers) if is_manager else 0,
        )

    def swarm_tokens(self) -> tuple[str, str]:
        self._need_up()
        return self.world.swarms[self.swarm_id].tokens

    def swarm_is_bare(self) -> bool:
        swarm = self.world.swarms[self.swarm_id]
        return not swarm.services and len(swarm.managers | swarm.workers) == 1

    def swarm_init(self, address: str, labels: Mapping[str, str]) -> None:
        self._need_up()
        if self.swarm_id:
            raise HostError("initialise a Swarm on", "the Docker Engine", "already part of a swarm")
        swarm = Swarm(f"swarm-{next(self.world.ids)}", dict(labels), {self.machine.name})
        self.world.swarms[swarm.id] = swarm
        self.swarm_id = swarm.id
        self.inits += 1

    def swarm_join(self, address: str, manager: str, token: str) -> None:
        self._need_up()
        through = next(m for m in self.world.machines.values() if manager.startswith(m.address))
        swarm = self.world.swarms.get(through.engine.swarm_id)
        if swarm is None or not through.engine_is_up or through.name not in swarm.managers:
            raise HostError("join", "the Docker Engine", "connection refused")
        if token not in swarm.tokens:
            raise HostError("join", "the Docker Engine", "invalid join token")
        as_manager = token == swarm.tokens[1]
        (swarm.managers if as_manager else swarm.workers).add(self.machine.name)
        self.swarm_id = swarm.id
        self.joins += 1

    def swarm_leave(self) -> None:
        self._need_up()
        swarm = self.world.swarms.get(self.swarm_id)
        if swarm is not None:
            swarm.managers.discard(self.machine.name)
            swarm.workers.discard(self.machine.name)
        self.swarm_id, self.state = "", "inactive"


class FakeSystemEngine:
    """The System Engine of one machine, for one container."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.images: set[str] = set()
        self.registry: set[str] = {"hashicorp/consul:1.21"}
        self.containers: dict[str, ContainerState] = {}
        self.runs = 0

    def info(self) -> EngineInfo | None:
        if not self.machine.systemd.units[paths.SYSTEM_ENGINE_UNIT].is_active:
            return None
        return EngineInfo("26.1.5", "json-file", True, SwarmInfo())

    def has_image(self, image: str) -> bool:
        return image in self.images

    def load_image(self, archive: Path) -> tuple[str, ...]:
        self.images.add("from/archive:1")
        return ("from/archive:1",)

    def pull_image(self, image: str) -> None:
        if image not in self.registry:
            raise HostError("pull", image, "manifest unknown")
        self.images.add(image)

    def container(self, name: str) -> ContainerState | None:
        return self.containers.get(name)

    def run_container(self, container: Container) -> None:
        assert container.image in self.images
        self.containers[container.name] = ContainerState(container.definition, "running")
        self.runs += 1

    def start_container(self, name: str) -> None:
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
        self.told: list[dict[str, str]] = []
        self.restarts = 0

    def is_running(self) -> bool:
        return True

    def unit(self, name: str) -> Unit:
        return self.units.get(name, Unit("not-found", "inactive"))

    def start(self, name: str) -> None:
        if not self.units[name].is_active:
            invocation = f"run-{next(self.machine.world.ids)}"
            self.units[name] = replace(self.units[name], active="active", invocation=invocation)

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)
        self.restarts += 1

    def stop(self, name: str) -> None:
        self.units[name] = replace(self.units[name], active="inactive")

    def enable(self, name: str) -> None:
        self.units[name] = replace(self.units[name], enabled="enabled")

    def last_lines(self, name: str, count: int) -> tuple[str, ...]:
        return ("level=fatal msg=boom",)

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
