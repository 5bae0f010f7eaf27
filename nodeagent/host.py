"""What a node looks like to the program: protocols that adapters fulfil and tests stand in for.

Every method that reaches outside has a time-out and raises HostError when the outside fails; a
thing that is merely absent is None or empty, never an error.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from nodeagent.errors import Secret


@dataclass(frozen=True)
class Word:
    """One word of a command line, and the file it stands in."""

    text: str
    place: str


@dataclass(frozen=True)
class Unit:
    """One systemd unit as `systemctl show` sees it."""

    load: str  # loaded | not-found | masked | …
    active: str  # active | activating | inactive | failed | …
    invocation: str = ""  # changes with every start
    enabled: str = ""  # enabled | disabled | static | …
    result: str = ""
    restarts: int = 0  # by systemd, because it ended by itself
    began_s: float = 0.0  # when it last left inactive, by the monotonic clock
    command: tuple[Word, ...] = ()  # its ExecStart, environment filled in

    @property
    def exists(self) -> bool:
        return self.load == "loaded"

    @property
    def is_active(self) -> bool:
        return self.active in ("active", "reloading")

    @property
    def has_failed(self) -> bool:
        """For good, or between two of the starts that systemd tries without end."""
        return self.active == "failed" or (
            self.active == "activating" and self.result not in ("", "success")
        )


@dataclass(frozen=True)
class SwarmInfo:
    """The Engine's own view of its Swarm membership (`GET /info`, part Swarm)."""

    state: str = "inactive"  # inactive | pending | active | error | locked
    node_id: str = ""
    is_manager: bool = False
    cluster_id: str = ""  # known to managers at once, to workers by their certificate
    labels: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 0
    error: str = ""


@dataclass(frozen=True)
class EngineInfo:
    """What `GET /info` and `/version` tell of a running Engine."""

    version: str
    options: Mapping[str, object]  # those it shows, under their names in daemon.json
    swarm: SwarmInfo


@dataclass(frozen=True)
class LogSettings:
    """How a container's log is kept; decided when it was made, in s since 1970."""

    driver: str
    opts: Mapping[str, str]
    made: float


@dataclass(frozen=True)
class Container:
    """A container of ours: how it is to be made. Two equal definitions need no replacement."""

    name: str
    image: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    binds: tuple[str, ...]
    config_sha256: str  # of the files it reads at start, so that a new one replaces it
    capabilities: tuple[str, ...] = ()  # of the kernel's; it has no others

    @property
    def definition(self) -> str:
        parts = (self.image, self.entrypoint, self.command, self.binds, self.config_sha256)
        return repr((*parts, *self.capabilities))


@dataclass(frozen=True)
class ContainerState:
    """A container as the Engine has it."""

    definition: str
    status: str  # created | running | restarting | exited | dead | …
    restarts: int = 0  # by the Engine, because it ended by itself
    last_lines: tuple[str, ...] = ()  # of its log, when it is not running or has been restarted


@dataclass(frozen=True)
class Entry:
    """One key of Consul's KV."""

    value: str = field(repr=False)  # a join token, it may be
    index: int
    session: str = ""  # the session that holds it as a lock


@dataclass(frozen=True)
class Member:
    """One member of Consul's gossip pool."""

    name: str
    address: str
    alive: bool
    server: bool


@dataclass(frozen=True)
class ConsulSelf:
    """The local Consul agent as it describes itself."""

    node_name: str
    datacenter: str
    server: bool
    address: str
    version: str


def service_id(name: str) -> str:
    """The id under which this node registers a service; the prefix marks it as ours."""
    return f"{SERVICE_ID_PREFIX}{name}"


SERVICE_ID_PREFIX = "nodeagent:"


@dataclass(frozen=True)
class Service:
    """A service of this node in Consul's catalogue. A check is `tcp` or, when 0, a TTL in s."""

    name: str
    port: int
    tags: tuple[str, ...]
    meta: Mapping[str, str]
    tcp: str = ""
    ttl_s: int = 0

    @property
    def id(self) -> str:
        return service_id(self.name)


@dataclass(frozen=True)
class Policy:
    """A policy of Consul's ACL system. Rules: kind (such as key_prefix), of what, read or write."""

    name: str
    rules: tuple[tuple[str, str, str], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.rules).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Token:
    """A token of Consul's ACL system: the accessor names it, the secret is it."""

    accessor: str
    policies: tuple[str, ...]
    description: str = ""
    secret: Secret | None = None  # Consul does not tell it


@dataclass(frozen=True)
class Certificate:
    """What a certificate says; times in s since 1970."""

    names: tuple[str, ...]
    not_before: float
    not_after: float


@dataclass(frozen=True)
class Op:
    """One operation of a KV transaction; `verb` is Consul's (set, cas, lock, check-index, …)."""

    verb: str
    key: str
    value: str = field(default="", repr=False)
    index: int = 0
    session: str = ""


@dataclass(frozen=True)
class Interface:
    """One IPv4 address of one network interface, as `10.10.0.11/16`."""

    name: str
    address: str


@dataclass(frozen=True)
class Rule:
    """One IPv4 routing rule: which packets it takes, as `dst 10.0.0.1`, and what is done then."""

    priority: int
    takes: frozenset[str]
    action: str  # lookup TABLE | prohibit | …


@dataclass(frozen=True)
class Listener:
    """Who takes packets for a UDP port: on which of this machine's addresses, and whose it is."""

    address: str  # 0.0.0.0 or :: for all
    user: str


KeyringAction = Literal["install", "use", "remove"]


class Files(Protocol):
    """Local files."""

    def read(self, path: Path) -> str | None: ...
    def write(self, path: Path, text: str, mode: int | None) -> None:
        """Write atomically and durably: afterwards the file is the old or the new one, whole.

        Without a mode it keeps the old file's owner and mode, or is root's with 644.
        """

    def remove(self, path: Path) -> None: ...
    def exists(self, path: Path) -> bool: ...
    def is_private(self, path: Path) -> bool:
        """Whether it is a file that nobody but root or this process's user can read or write."""

    def make_private_directory(self, path: Path) -> None:
        """Make a directory for root alone; one that is there stays as it is."""

    def link(self, path: Path, target: Path) -> None:
        """Make `path` a symbolic link, in place of any file or other link."""

    def copy_tree(self, source: Path, target: Path) -> None:
        """Copy a directory to where nothing is yet, so that it is there whole or not at all."""

    def compile(self, directory: Path) -> None:
        """Put Python's compiled form beside each module below, where it can be and is missing."""

    def try_lock(self, path: Path) -> AbstractContextManager[bool]:
        """Hold `path` as this process's lock; False when another process has it."""

    def is_held(self, path: Path) -> bool:
        """Whether some living process has `path` as its lock."""

    def unpack_program(self, archive: Path, path: Path) -> None:
        """Put the program in `archive` (itself, or the one file in a .zip) at `path`, mode 755."""


class Web(Protocol):
    """Files from elsewhere."""

    def fetch(self, location: str, path: Path, sha256: str, alive: Callable[[], None]) -> None:
        """Fetch a URL or copy a path to `path`; nothing stays there unless the digest is right.

        Calls `alive` again and again as long as something arrives: it may take minutes.
        """


class Systemd(Protocol):
    """The service manager."""

    def is_running(self) -> bool:
        """False in a chroot or an image build, where units can only be enabled."""

    def unit(self, name: str) -> Unit: ...
    def start(self, name: str) -> None: ...
    def start_soon(self, name: str) -> None:
        """Ask for a start, anew if it runs, and return at once: jobs may wait for the caller."""

    def restart(self, name: str) -> None: ...
    def reload_unit(self, name: str) -> None:
        """Have the unit's process read its configuration again."""

    def enable(self, name: str) -> None: ...
    def disable(self, name: str) -> None:
        """Stop it, and start it no more at boot."""

    def reload(self) -> None: ...
    def reboot(self) -> None:
        """Ask for a reboot and return at once."""

    def last_lines(self, name: str, count: int) -> tuple[str, ...]: ...
    def execute(self, *command: str) -> None:
        """Run a program to its end; raises HostError with its words if it fails."""

    def watch(self, name: str, wake: Callable[[], None], stop: threading.Event) -> None:
        """Call `wake` whenever the unit's main process has ended, until `stop`; blocks."""

    def notify(self, **values: str) -> None:
        """Tell the service manager that started us READY=1, STATUS=…, WATCHDOG=1."""


class EngineProgram(Protocol):
    """The program behind docker.service, whether it runs or not."""

    def version(self) -> str:
        """As `20.10.24+dfsg1`; "" when there is no such program."""

    def has_consul(self) -> bool:
        """Whether this build can keep its networks in Consul: some distributions' cannot."""

    def refusal(self, options: Path, command: tuple[Word, ...]) -> str:
        """What it says against this file of options beside its unit's flags; "" for nothing."""

    def networks(self, data_root: str) -> tuple[str, ...]:
        """Names of the networks in its own store, which is there while it is stopped, too."""


class SwarmEngine(Protocol):
    """The user's Engine, which is a member of the Swarm."""

    def info(self) -> EngineInfo | None:
        """None when nothing answers on the socket."""

    def log_settings(self) -> Mapping[str, LogSettings]:
        """How each container's log is kept, by the container's name."""

    def managers(self) -> Mapping[str, bool]:
        """Each manager of the Swarm, by host name, and whether it is reachable; managers only."""

    def swarm_tokens(self) -> tuple[str, str]:
        """Join tokens (worker, manager); managers only."""

    def swarm_rotate_tokens(self) -> None:
        """Make new join tokens of both kinds; managers only."""

    def swarm_is_bare(self) -> bool:
        """Whether the Swarm has nobody and nothing in it but this one manager."""

    def swarm_init(self, address: str, labels: Mapping[str, str]) -> None: ...
    def swarm_join(self, address: str, manager: str, token: str) -> None: ...
    def swarm_leave(self) -> None: ...


class ContainerEngine(Protocol):
    """The System Engine, which runs the cluster's own containers."""

    def info(self) -> EngineInfo | None:
        """None when nothing answers on the socket."""

    def has_image(self, image: str) -> bool: ...
    def load_image(self, archive: Path) -> tuple[str, ...]: ...
    def pull_image(self, image: str, alive: Callable[[], None]) -> None:
        """Calls `alive` again and again as long as it makes progress: it may take minutes."""

    def container(self, name: str) -> ContainerState | None: ...
    def run_container(self, container: Container) -> None:
        """Replace any container of that name by a new running one."""

    def start_container(self, name: str) -> None: ...
    def execute(self, container: str, *command: str) -> None:
        """Run a command in a running container; raises HostError with its words if it fails."""


class ConsulAgent(Protocol):
    """The local Consul agent's HTTP API."""

    def self(self) -> ConsulSelf | None:
        """None when nothing answers."""

    def leader(self) -> str: ...
    def members(self) -> tuple[Member, ...]: ...
    def join(self, address: str) -> None: ...
    def voters(self) -> tuple[str, ...]:
        """Names of the servers that have a vote: what gossip calls a server may be none."""

    def knock(self, address: str) -> str:
        """How the gossip of a node there refuses this node's key; "" if it does not."""

    def greet(self, address: str, name: str) -> str:
        """What is wrong with certificates between this node and a server there; "" if nothing."""

    def get(self, prefix: str) -> Mapping[str, Entry]:
        """All keys below `prefix`, read consistently: an answer proves a working leader."""

    def transact(self, *ops: Op) -> bool:
        """True when all were done; False, with nothing done, when a check or lock failed."""

    def create_session(self, name: str, ttl_s: int) -> str: ...
    def renew_session(self, session: str) -> bool: ...
    def destroy_session(self, session: str) -> None: ...
    def instances(self, service: str) -> Mapping[str, bool]:
        """Each instance's `ip:port`, and whether all its checks and its node's pass."""

    def services(self) -> Mapping[str, Service]:
        """Services that this program registered on this node, by id."""

    def register(self, service: Service) -> None: ...
    def deregister(self, service_id: str) -> None: ...
    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        """Pass or fail a TTL check; `note` is what Consul's own pages show beside it."""

    def reload(self) -> None:
        """Have Consul read its keys and certificates again."""

    def knows_token(self) -> bool | None:
        """Whether Consul has the token that this program shows; None: it cannot say yet."""

    def policies(self) -> Mapping[str, str]:
        """The digest of each policy that this program made, by its name."""

    def put_policy(self, policy: Policy) -> None: ...
    def tokens(self) -> Mapping[str, Token]:
        """All tokens by accessor, without their secrets."""

    def put_token(self, token: Token) -> None:
        """Make a token, or give the one with this accessor these policies."""

    def delete_token(self, accessor: str) -> None: ...
    def change_keyring(self, action: KeyringAction, key: Secret) -> None:
        """Install, use or remove a gossip key on every living member."""

    def watch(self, prefix: str, wake: Callable[[], None], stop: threading.Event) -> None:
        """Call `wake` whenever a key below `prefix` has changed, until `stop`; blocks."""


class Resolver(Protocol):
    """DNS."""

    def consul_servers(self, domain: str) -> tuple[str, ...]:
        """Targets of the consul service's SRV records, asked of the local Consul."""

    def addresses(self, name: str) -> tuple[str, ...]:
        """IPv4 addresses of a name: those of its SRV targets where it has any, else its own."""

    def routed(self, interface: str) -> tuple[str, ...]:
        """Domains of this interface that systemd-resolved, which runs, sends to Consul."""


class Network(Protocol):
    """Network interfaces and routing rules."""

    def interfaces(self) -> tuple[Interface, ...]: ...
    def hostname(self) -> str: ...
    def rules(self) -> tuple[Rule, ...]: ...
    def listeners(self, port: int) -> tuple[Listener, ...]:
        """Who takes packets for this UDP port."""

    def uplinks(self) -> tuple[str, ...]:
        """Interfaces that lead to the rest of the world: those of default routes."""

    def watch_rules(self, wake: Callable[[], None], stop: threading.Event) -> None:
        """Call `wake` at first and whenever a routing rule has gone, until `stop`; blocks."""


class Pki(Protocol):
    """Keys and certificates. A seed is 32 bytes in base64, from which all else derives."""

    def seed(self) -> Secret:
        """A new seed."""

    def derive(self, seed: Secret, purpose: str, size_bytes: int = 32) -> bytes:
        """HKDF-SHA256."""

    def authority(self, seed: Secret, now: float) -> str:
        """A certificate, in PEM, of the CA whose key derives from `seed`: good for 20 years."""

    def issue(
        self, seed: Secret, authority: str, names: tuple[str, ...], lifetime_s: float, now: float
    ) -> Secret:
        """A new key and its certificate by this CA, in PEM; a server's if it names a server."""

    def certificates(self, pem: str) -> tuple[Certificate, ...]: ...
    def matches(self, seed: Secret, authority: str) -> bool:
        """Whether the CA's key derives from `seed`."""

    def is_signed(self, certificate: str, authority: str) -> bool: ...
    def seal(self, authority: str, text: Secret) -> str:
        """Encrypt for whoever has the CA's seed."""

    def unseal(self, seed: Secret, sealed: str) -> Secret | None:
        """None when it was not sealed for this CA."""


class Clock(Protocol):
    """Time."""

    def now(self) -> float: ...
    def monotonic(self) -> float: ...
    def wait(self, timeout_s: float) -> bool:
        """Return False after `timeout_s`, or True as soon as `wake` has been called."""

    def wake(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Host:
    """Everything outside the program, one protocol each."""

    files: Files
    web: Web
    systemd: Systemd
    engine: SwarmEngine
    engine_program: EngineProgram
    system_engine: ContainerEngine
    consul: ConsulAgent
    resolver: Resolver
    network: Network
    pki: Pki
    clock: Clock
