"""Changes are data: `str(change)` is the sentence the operator reads, `apply` makes it true.

A kill may come before, after or between any of them. No change relies on another one of the same
run, and each is safe to make again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from nodeagent import secrets
from nodeagent.errors import HostError, Secret
from nodeagent.host import Container, Host, Op, Policy, Service, Token
from nodeagent.secrets import NodeTokens, Request, ServerSecrets
from nodeagent.spec import Spec

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
class WriteSecret:
    """Write a file that root alone can read."""

    path: Path
    text: Secret

    def __str__(self) -> str:
        return f"write {self.path}"

    def apply(self, host: Host) -> None:
        host.files.write(self.path, self.text.reveal(), 0o600)


@dataclass(frozen=True)
class IssueCertificate:
    """Make this server a new key and certificate, signed by the cluster's CA."""

    path: Path
    seed: Secret  # of the CA
    authority: str = field(repr=False)
    names: tuple[str, ...]
    lifetime_s: int
    why: str

    def __str__(self) -> str:
        return f"issue a certificate for {self.names[-1]}: {self.why}"

    def apply(self, host: Host) -> None:
        now = host.clock.now()
        made = host.pki.issue(self.seed, self.authority, self.names, self.lifetime_s, now)
        host.files.write(self.path, made.reveal(), 0o600)


@dataclass(frozen=True)
class MakeNodeToken:
    """Make up this node's own tokens, or one more for a new generation of them."""

    path: Path
    seen: NodeTokens | None
    generation: str  # "": the local one alone, as servers need it
    recovery: Secret | None = None  # the local one that Consul knows, where this file was lost

    def __str__(self) -> str:
        return "make a token of this node's own"

    def apply(self, host: Host) -> None:
        def new() -> Secret:
            return secrets.token(host.pki, host.pki.seed(), "node token")

        own = self.seen or NodeTokens(self.recovery or new(), {})
        if self.generation:
            own = replace(own, tokens={**own.tokens, self.generation: new()})
        host.files.write(self.path, own.dump().reveal(), 0o600)


@dataclass(frozen=True)
class AskForToken:
    """Put a request for this node's token where servers see it, readable for them alone."""

    key: str
    request: Request
    token: Secret
    authority: str = field(repr=False)
    seen_index: int

    def __str__(self) -> str:
        return "ask the servers for a token of this node's own"

    def apply(self, host: Host) -> None:
        sealed = replace(self.request, sealed=host.pki.seal(self.authority, self.token))
        host.consul.transact(Op("cas", self.key, sealed.dump(), index=self.seen_index))


@dataclass(frozen=True)
class PublishWorkerSecrets:
    """Put what workers need of the servers' secrets where workers can read it."""

    key: str
    secrets: ServerSecrets = field(repr=False)
    spec: Spec
    seen_index: int

    def __str__(self) -> str:
        return f"publish the workers' part of secrets no. {self.secrets.serial}"

    def apply(self, host: Host) -> None:
        now = host.clock.now()
        text = secrets.dump(secrets.for_workers(self.secrets, self.spec, host.pki, now))
        host.consul.transact(Op("cas", self.key, text.reveal(), index=self.seen_index))


@dataclass(frozen=True)
class ReloadConsul:
    def __str__(self) -> str:
        return "have Consul read its keys and certificates again"

    def apply(self, host: Host) -> None:
        host.consul.reload()


@dataclass(frozen=True)
class PutPolicy:
    policy: Policy

    def __str__(self) -> str:
        return f"set Consul's access policy {self.policy.name}"

    def apply(self, host: Host) -> None:
        host.consul.put_policy(self.policy)


@dataclass(frozen=True)
class PutToken:
    token: Token

    def __str__(self) -> str:
        return f"set Consul's token for {self.token.description}"

    def apply(self, host: Host) -> None:
        host.consul.put_token(self.token)


@dataclass(frozen=True)
class DeleteToken:
    accessor: str
    description: str

    def __str__(self) -> str:
        return f"delete Consul's token for {self.description}"

    def apply(self, host: Host) -> None:
        host.consul.delete_token(self.accessor)


@dataclass(frozen=True)
class RemoveFile:
    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def apply(self, host: Host) -> None:
        host.files.remove(self.path)


@dataclass(frozen=True)
class MoveAside:
    """Take a file out of its program's way and keep it beside: one that the agent may not write.

    The service manager does it, which may. Done before, it has nothing to do.
    """

    path: Path
    to: Path
    why: str

    def __str__(self) -> str:
        return f"rename {self.path.name} to {self.to.name}: {self.why}"

    def apply(self, host: Host) -> None:
        manager = ("systemd-run", "--quiet", "--wait", "--collect", "--")
        host.systemd.execute(*manager, "mv", "-f", str(self.path), str(self.to))


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
class RestartUnderLock:
    """Restart a unit, as long as the session still holds the lock that allows it."""

    unit: str
    session: str
    why: str

    def __str__(self) -> str:
        return f"restart {self.unit}: {self.why}"

    def apply(self, host: Host) -> None:
        _still_held(self.session, host)
        host.systemd.restart(self.unit)


@dataclass(frozen=True)
class ReloadUnit:
    unit: str
    why: str

    def __str__(self) -> str:
        return f"reload {self.unit}: {self.why}"

    def apply(self, host: Host) -> None:
        host.systemd.reload_unit(self.unit)


@dataclass(frozen=True)
class EnableUnit:
    unit: str

    def __str__(self) -> str:
        return f"enable {self.unit}"

    def apply(self, host: Host) -> None:
        host.systemd.enable(self.unit)


@dataclass(frozen=True)
class DisableUnit:
    unit: str

    def __str__(self) -> str:
        return f"stop and disable {self.unit}"

    def apply(self, host: Host) -> None:
        host.systemd.disable(self.unit)


@dataclass(frozen=True)
class Reboot:
    """`marker` says, as long as this boot lasts, that it was asked for."""

    marker: Path
    why: str
    session: str = ""  # the lock that a member of a Swarm needs for it

    def __str__(self) -> str:
        return f"reboot this machine: {self.why}"

    def apply(self, host: Host) -> None:
        if self.session:
            _still_held(self.session, host)
        host.systemd.reboot()
        host.files.write(self.marker, "", 0o600)


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
    worker_entry: str  # the one key of the record that workers can read
    manager_token: str

    def __str__(self) -> str:
        return "publish the Swarm's join tokens to the cluster"

    def apply(self, host: Host) -> None:
        worker, manager = host.engine.swarm_tokens()
        entry = json.dumps({**json.loads(self.value), "token": worker})
        host.consul.transact(
            Op("cas", self.key, self.value, index=self.seen_index),
            Op("set", self.worker_entry, entry),
            Op("set", self.manager_token, manager),
        )


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
