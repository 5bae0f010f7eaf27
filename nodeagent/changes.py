"""Changes are data: `str(change)` is the sentence the operator reads, `apply` makes it true.

A kill may come before, after or between any of them. No change relies on another one of the same
run, and each is safe to make again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nodeagent.errors import HostError, Secret
from nodeagent.host import Container, Host, Op, Service

CLUSTER_LABEL = "nodeagent.cluster"  # on a Swarm: which cluster's agents made it


KEEP_MODE = None  # of the file that is replaced; 644 for a new one


class Change(Protocol):
    """One thing to be done to this node or, through Consul, to the cluster's record."""

    def apply(self, host: Host) -> None: ...


@dataclass(frozen=True)
class WriteFile:
    path: Path
    text: str = field(repr=False)
    mode: int | None

    def __str__(self) -> str:
        return f"write {self.path}"

    def apply(self, host: Host) -> None:
        host.files.write(self.path, self.text, self.mode)


@dataclass(frozen=True)
class RemoveFile:
    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def apply(self, host: Host) -> None:
        host.files.remove(self.path)


@dataclass(frozen=True)
class Fetch:
    location: str
    path: Path
    sha256: str

    def __str__(self) -> str:
        return f"fetch {self.location}"

    def apply(self, host: Host) -> None:
        host.web.fetch(self.location, self.path, self.sha256, _feed_watchdog(host))


@dataclass(frozen=True)
class UnpackProgram:
    archive: Path
    path: Path

    def __str__(self) -> str:
        return f"put the program of {self.archive} at {self.path}"

    def apply(self, host: Host) -> None:
        host.files.unpack_program(self.archive, self.path)


@dataclass(frozen=True)
class StartUnit:
    unit: str

    def __str__(self) -> str:
        return f"start {self.unit}"

    def apply(self, host: Host) -> None:
        host.systemd.start(self.unit)


@dataclass(frozen=True)
class RestartUnit:
    unit: str
    why: str

    def __str__(self) -> str:
        return f"restart {self.unit}: {self.why}"

    def apply(self, host: Host) -> None:
        host.systemd.restart(self.unit)


@dataclass(frozen=True)
class EnableUnit:
    unit: str

    def __str__(self) -> str:
        return f"enable {self.unit}"

    def apply(self, host: Host) -> None:
        host.systemd.enable(self.unit)


@dataclass(frozen=True)
class LoadImage:
    archive: Path
    image: str

    def __str__(self) -> str:
        return f"load image {self.image} from {self.archive}"

    def apply(self, host: Host) -> None:
        names = host.system_engine.load_image(self.archive)
        if self.image not in names:
            held = ", ".join(names) or "no named image"
            raise HostError("load", self.archive, f"it holds {held}, not {self.image}")


@dataclass(frozen=True)
class PullImage:
    image: str

    def __str__(self) -> str:
        return f"pull image {self.image}"

    def apply(self, host: Host) -> None:
        host.system_engine.pull_image(self.image, _feed_watchdog(host))


@dataclass(frozen=True)
class RunContainer:
    container: Container

    def __str__(self) -> str:
        return f"run container {self.container.name} ({self.container.image}) in the System Engine"

    def apply(self, host: Host) -> None:
        host.system_engine.run_container(self.container)


@dataclass(frozen=True)
class StartContainer:
    name: str

    def __str__(self) -> str:
        return f"start container {self.name} in the System Engine"

    def apply(self, host: Host) -> None:
        host.system_engine.start_container(self.name)


@dataclass(frozen=True)
class JoinConsul:
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"join Consul through {', '.join(self.addresses)}"

    def apply(self, host: Host) -> None:
        _first_that_works(self.addresses, host.consul.join, host)


@dataclass(frozen=True)
class Register:
    service: Service

    def __str__(self) -> str:
        return f"register service {self.service.name} in Consul"

    def apply(self, host: Host) -> None:
        host.consul.register(self.service)


@dataclass(frozen=True)
class Deregister:
    service_id: str

    def __str__(self) -> str:
        return f"deregister service {self.service_id} from Consul"

    def apply(self, host: Host) -> None:
        host.consul.deregister(self.service_id)


@dataclass(frozen=True)
class TakeLock:
    """Write `value` to `key` under a new session, if the key is still as it was seen."""

    key: str
    value: str
    seen_index: int  # 0: the key must not exist
    why: str
    ttl_s: int = 30

    def __str__(self) -> str:
        return self.why

    def apply(self, host: Host) -> None:
        session = host.consul.create_session(self.key, self.ttl_s)
        same = Op("check-index", self.key, index=self.seen_index)
        unseen = Op("check-not-exists", self.key)
        lock = Op("lock", self.key, self.value, session=session)
        if not host.consul.transact(same if self.seen_index else unseen, lock):
            host.consul.destroy_session(session)  # another node was first


@dataclass(frozen=True)
class ReleaseLock:
    key: str
    session: str

    def __str__(self) -> str:
        return f"release {self.key}"

    def apply(self, host: Host) -> None:
        host.consul.destroy_session(self.session)


@dataclass(frozen=True)
class InitSwarm:
    address: str
    cluster: str
    session: str  # the lock under which this node may do it

    def __str__(self) -> str:
        return f"initialise the cluster's Swarm on {self.address}"

    def apply(self, host: Host) -> None:
        _still_held(self.session, host)
        host.engine.swarm_init(self.address, {CLUSTER_LABEL: self.cluster})


@dataclass(frozen=True)
class UpdateRecord:
    """Compare-and-set of one key of the cluster's record."""

    key: str
    value: str
    seen_index: int
    why: str

    def __str__(self) -> str:
        return self.why

    def apply(self, host: Host) -> None:
        host.consul.transact(Op("cas", self.key, self.value, index=self.seen_index))


@dataclass(frozen=True)
class PublishSwarm:
    """Put the join tokens and the final state into the record, in one transaction."""

    key: str
    value: str
    seen_index: int
    token_keys: tuple[str, str]  # worker, manager

    def __str__(self) -> str:
        return "publish the Swarm's join tokens to the cluster"

    def apply(self, host: Host) -> None:
        tokens = host.engine.swarm_tokens()
        writes = [Op("set", key, token) for key, token in zip(self.token_keys, tokens, strict=True)]
        host.consul.transact(Op("cas", self.key, self.value, index=self.seen_index), *writes)


@dataclass(frozen=True)
class JoinSwarm:
    address: str
    managers: tuple[str, ...]  # tried in turn
    role: str
    token: Secret
    session: str = ""  # the lock that serialises managers; workers need none

    def __str__(self) -> str:
        return f"join the cluster's Swarm as {self.role} through {' or '.join(self.managers)}"

    def apply(self, host: Host) -> None:
        if self.session:
            _still_held(self.session, host)

        def join(manager: str) -> None:
            host.engine.swarm_join(self.address, manager, self.token.reveal())

        _first_that_works(self.managers, join, host)


@dataclass(frozen=True)
class LeaveSwarm:
    why: str

    def __str__(self) -> str:
        return f"leave this Engine's Swarm: {self.why}"

    def apply(self, host: Host) -> None:
        host.engine.swarm_leave()


def _still_held(session: str, host: Host) -> None:
    if not host.consul.renew_session(session):
        raise HostError("keep", f"session {session}", "it has expired; another node may go on")


def _feed_watchdog(host: Host) -> Callable[[], None]:
    """For changes that rightly take longer than the watchdog's 60 s while data keeps coming."""
    return lambda: host.systemd.notify(WATCHDOG="1")


def _first_that_works(targets: Sequence[str], act: Callable[[str], None], host: Host) -> None:
    """Do `act` on each target in turn until one works; the last error when none does."""
    for position, target in enumerate(targets, start=1):
        host.systemd.notify(WATCHDOG="1")
        try:
            act(target)
            return
        except HostError:
            if position == len(targets):
                raise
