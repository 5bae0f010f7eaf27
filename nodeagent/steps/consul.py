"""Consul runs here with the rendered configuration, in its container or under systemd."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodeagent import paths
from nodeagent.address import cluster_address
from nodeagent.changes import (
    Change,
    EnableUnit,
    Fetch,
    LoadImage,
    PullImage,
    ReloadConsul,
    RemoveFile,
    RestartUnit,
    RunContainer,
    StartContainer,
    StartUnit,
    UnpackProgram,
    WriteFile,
)
from nodeagent.errors import HostError
from nodeagent.host import ConsulSelf, Container, ContainerState, Host, Unit
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec
from nodeagent.steps import dns

CONTAINER = "consul"
CRASH_LOOP = 3  # starts in a row that the System Engine had to repeat; one may be an accident


@dataclass(frozen=True)
class Seen:
    address: str
    hostname: str
    agent: ConsulSelf | None
    config: str | None = field(repr=False)
    unit: Unit  # of the System Engine, or of Consul itself for runtime binary
    archive_is_here: bool
    journal: tuple[str, ...] = ()
    engine_answers: bool = False
    has_image: bool = False
    container: ContainerState | None = None
    program_of: str | None = None  # runtime binary: what the installed program was made from
    restart_pending: str | None = None
    reload_pending: bool = False
    answers_names: bool = False  # on the machine's own address for DNS
    verdict: str | None = None  # Consul's own on a new configuration; None: not asked


def observe(spec: Spec, host: Host) -> Seen:
    seen = _observe(spec, host)
    wanted = _render(spec, seen)
    if seen.agent is None or seen.config in (None, wanted):
        return seen
    # Something runs that a bad configuration would end.
    if host.files.read(paths.CONSUL_CANDIDATE) != wanted:
        return seen
    directory = _directory(spec)
    names = [f"{directory}/candidate/consul.json"]
    names += [f"{directory}/{paths.CONSUL_KEYS.name}"] if spec.is_secured else []
    try:
        if spec.consul.runtime == "container":
            host.system_engine.execute(CONTAINER, "consul", "validate", *names)
        else:
            host.systemd.execute(str(paths.CONSUL_BINARY), "validate", *names)
    except HostError as error:
        return dataclasses.replace(seen, verdict=error.cause)
    return dataclasses.replace(seen, verdict="")


def _observe(spec: Spec, host: Host) -> Seen:
    in_container = spec.consul.runtime == "container"
    name = paths.SYSTEM_ENGINE_UNIT if in_container else paths.CONSUL_UNIT
    unit = host.systemd.unit(name)
    seen = Seen(
        address=cluster_address(spec.address, host.network.interfaces()),
        hostname=host.network.hostname(),
        agent=host.consul.self(),
        config=host.files.read(paths.CONSUL_CONFIG),
        unit=unit,
        archive_is_here=host.files.exists(archive_path(spec)),
        journal=host.systemd.last_lines(name, 5) if unit.has_failed else (),
        reload_pending=host.files.exists(paths.CONSUL_RELOAD_PENDING),
        answers_names=dns.is_consuls(host),
    )
    if not in_container:
        return dataclasses.replace(
            seen,
            program_of=host.files.read(_PROGRAM_OF),
            restart_pending=host.files.read(paths.CONSUL_RESTART_PENDING),
        )
    if not unit.is_active or host.system_engine.info() is None:
        return seen
    return dataclasses.replace(
        seen,
        engine_answers=True,
        has_image=host.system_engine.has_image(spec.consul.image),
        container=host.system_engine.container(CONTAINER),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    wanted = _render(spec, seen)
    if spec.consul.runtime == "container":
        return _container(spec, seen, wanted)
    return _binary(spec, seen, wanted)


def _container(spec: Spec, seen: Seen, wanted: str) -> Plan:
    definition = container(spec, wanted, answers_names=seen.answers_names)
    is_running = seen.container is not None and seen.container.status == "running"
    # While the System Engine is down (a restart, a crash), our own Consul outlives it.
    may_be_ours = seen.config is not None and not seen.engine_answers
    if seen.agent and not is_running and not may_be_ours:
        return _foreign(seen.agent)
    runtime = _unit_runs(paths.SYSTEM_ENGINE_UNIT, seen)
    if runtime:
        return runtime
    if not seen.engine_answers:
        return wait("the System Engine to answer on its socket")
    if not seen.has_image:
        archive = archive_path(spec)
        if not spec.consul.archive or not spec.consul.sha256:
            return change(PullImage(spec.consul.image))
        if not seen.archive_is_here:
            return change(Fetch(spec.consul.archive, archive, spec.consul.sha256))
        return change(LoadImage(archive, spec.consul.image))
    changes: list[Change] = []
    if seen.config != wanted:
        if asked := _ask_first(seen, wanted):
            return asked
        changes.append(WriteFile(paths.CONSUL_CONFIG, wanted, 0o600))
    if seen.container is None or seen.container.definition != definition.definition:
        changes.append(RunContainer(definition))
    if changes:
        return change(*changes)
    assert seen.container is not None
    if seen.agent is None and seen.container.restarts >= CRASH_LOOP:
        return block(
            f"Consul does not start: {_reason(seen.container.last_lines)}",
            fix=f"docker -H unix://{paths.SYSTEM_ENGINE_SOCKET} logs {CONTAINER}",
        )
    if seen.container.status == "restarting":
        return wait("Consul to start again")
    if not is_running:
        return change(StartContainer(CONTAINER))
    return _answers(spec, seen)


def _reason(lines: tuple[str, ...]) -> str:
    """The line of Consul's log that says why it ended; Consul marks causes with an asterisk."""
    marked = [line for line in lines if re.match(r"\*|==> (Error|error|failed)|panic", line)]
    return (marked or list(lines) or ["its log is empty"])[-1]


def _binary(spec: Spec, seen: Seen, wanted: str) -> Plan:
    if seen.agent and not seen.unit.is_active:
        return _foreign(seen.agent)
    if not spec.consul.archive or not spec.consul.sha256:
        return block(
            "runtime binary has no program to run",
            fix=f"give consul.archive and consul.sha256 in {paths.SPEC}",
        )
    if seen.program_of != spec.consul.sha256:
        archive = archive_path(spec)
        if not seen.archive_is_here:
            return change(Fetch(spec.consul.archive, archive, spec.consul.sha256))
        return change(
            *_pending(seen),
            UnpackProgram(archive, paths.CONSUL_BINARY),
            WriteFile(_PROGRAM_OF, spec.consul.sha256, 0o600),
        )
    if seen.config != wanted:
        write = WriteFile(paths.CONSUL_CONFIG, wanted, 0o600)
        return _ask_first(seen, wanted) or change(*_pending(seen), write)
    if seen.unit.is_active and seen.restart_pending == seen.unit.invocation:
        return change(RestartUnit(paths.CONSUL_UNIT, "its program or configuration changed"))
    return _unit_runs(paths.CONSUL_UNIT, seen) or _answers(spec, seen)


def _ask_first(seen: Seen, wanted: str) -> Plan | None:
    """Have a running Consul's program look at a new configuration before it replaces the old one.

    The very first one needs none of that: the start is the test, and there is nothing to lose.
    """
    if seen.agent is None or seen.config is None or seen.verdict == "":
        return None
    if seen.verdict is None:
        return change(WriteFile(paths.CONSUL_CANDIDATE, wanted, 0o600))
    return block(
        f"Consul refuses its new configuration and goes on with the old one: {seen.verdict}",
        fix=f"edit {paths.SPEC}",
    )


def _pending(seen: Seen) -> list[Change]:
    """Remember, before a change, which run of the unit is the one that does not have it yet."""
    if not seen.unit.is_active:
        return []
    return [WriteFile(paths.CONSUL_RESTART_PENDING, seen.unit.invocation, 0o600)]


def _unit_runs(name: str, seen: Seen) -> Plan | None:
    if not seen.unit.exists:
        return block(f"{name} is not installed", fix="nodeagent install")
    if seen.unit.enabled == "disabled":
        return change(EnableUnit(name))
    if seen.unit.has_failed:
        words = f": {seen.journal[-1]}" if seen.journal else ""
        return block(f"{name} fails{words}", fix=f"journalctl -u {name}")
    if seen.unit.active == "inactive":
        return change(StartUnit(name))
    if not seen.unit.is_active:
        return wait(f"{name} to start")
    return None


def _answers(spec: Spec, seen: Seen) -> Plan:
    agent = seen.agent
    if agent is None:
        return wait("Consul to answer on 127.0.0.1:8500")
    ours = (spec.datacenter, seen.hostname, seen.address)
    if (agent.datacenter, agent.node_name, agent.address) != ours:
        return _foreign(agent)
    if seen.reload_pending:
        return change(ReloadConsul(), RemoveFile(paths.CONSUL_RELOAD_PENDING))
    return done(f"Consul {agent.version} at {agent.address}{_weakness(spec, agent.version)}")


def _weakness(spec: Spec, version: str) -> str:
    """CVE-2021-37219, which no setting mends; Consul's changelog names the versions that do."""
    major, minor, patch = (int(number) for number in re.findall(r"\d+", f"{version}.0.0")[:3])
    mended = {8: 15, 9: 9, 10: 2}
    is_newer = (major, minor) > (1, 10)
    if not spec.is_secured or is_newer or patch >= mended.get(minor, 99):
        return ""
    return "; too old: a worker's root can write to the servers' log (CVE-2021-37219)"


def _foreign(agent: ConsulSelf) -> Plan:
    return block(
        f"another Consul runs here already: node {agent.node_name}, datacenter "
        f"{agent.datacenter}, at {agent.address}",
        fix="stop and disable it (systemctl disable --now consul), or give this node to it",
    )


def archive_path(spec: Spec) -> Path:
    """Where the archive lies once its digest has been checked."""
    return paths.IMAGES / (spec.consul.sha256 or "none")


def container(spec: Spec, config: str, *, answers_names: bool = False) -> Container:
    """How Consul's container is made; it sees the host's network and its own two directories."""
    return Container(
        name=CONTAINER,
        image=spec.consul.image,
        entrypoint=("consul",),
        command=("agent", f"-config-dir={_CONTAINER_CONFIG}"),
        binds=(
            f"{paths.CONSUL_CONFIG.parent}:{_CONTAINER_CONFIG}:ro",
            f"{paths.CONSUL_DATA}:/consul/data",
        ),
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        capabilities=("NET_BIND_SERVICE",) if answers_names else (),  # for port 53
    )


def _render(spec: Spec, seen: Seen) -> str:
    return render(spec, seen.address, seen.hostname, answers_names=seen.answers_names)


def render(spec: Spec, address: str, hostname: str, *, answers_names: bool = False) -> str:
    """Return Consul's configuration, with keys that 1.8 and current versions both accept.

    A server never lists itself in `retry_join`: a join to itself would count as success, and the
    others would not be tried again. Names are resolved and joined by the quorum step.
    """
    in_container = spec.consul.runtime == "container"
    config: dict[str, Any] = {
        "datacenter": spec.datacenter,
        "domain": spec.domain,
        "node_name": hostname,
        "server": spec.is_server,
        "bind_addr": address,
        "advertise_addr": address,
        "client_addr": "127.0.0.1",
        "ports": {"serf_wan": -1},  # one datacenter; a port that nobody needs
        "data_dir": "/consul/data" if in_container else str(paths.CONSUL_DATA),
        "retry_join": [entry for entry in spec.join if entry != address and not is_name(entry)],
        "retry_interval": "500ms",
        # A reboot is not a departure.
        "leave_on_terminate": False,
        "skip_leave_on_interrupt": True,
        # Production timing: https://developer.hashicorp.com/consul/docs/install/performance
        "performance": {"raft_multiplier": 1},
        "dns_config": {"enable_additional_node_meta_txt": False},
        "disable_update_check": True,
    }
    if answers_names:
        # Without recursors: it refuses other names, and who asked goes on to the next server.
        config["addresses"] = {"dns": dns.ADDRESS}
        config["ports"]["dns"] = dns.PORT
    if spec.is_server:
        config["bootstrap_expect"] = spec.servers
    if spec.is_secured:
        config |= _secured(_directory(spec))
    return json.dumps(config, indent=2) + "\n"


def _directory(spec: Spec) -> str:
    """Where Consul finds its configuration, as it sees it."""
    in_container = spec.consul.runtime == "container"
    return _CONTAINER_CONFIG if in_container else str(paths.CONSUL_CONFIG.parent)


def _secured(directory: str) -> dict[str, Any]:
    """Who is not a member is told nothing, and a member only what its token allows.

    The names are those of 1.8, which newer versions map to their own. Keys and tokens stand in
    keys.json beside it. There is no second CA, Connect's, to have certificates from
    (docs/decisions/0007).
    """
    return {
        "verify_incoming": True,
        "verify_outgoing": True,
        "verify_server_hostname": True,
        "ca_file": f"{directory}/{paths.CONSUL_AUTHORITIES.name}",
        "cert_file": f"{directory}/{paths.CONSUL_CERTIFICATE.name}",
        "key_file": f"{directory}/{paths.CONSUL_CERTIFICATE.name}",
        "connect": {"enabled": False},
        # An outage of the servers is not one of what they had allowed before.
        "acl": {"enabled": True, "default_policy": "deny", "down_policy": "extend-cache"},
    }


def is_name(entry: str) -> bool:
    """Whether an entry of `join` is a DNS name: neither an address nor a cloud auto-join string."""
    if entry.startswith("provider="):
        return False
    try:
        ipaddress.ip_address(entry)
    except ValueError:
        return True
    return False


_CONTAINER_CONFIG = "/consul/config"
_PROGRAM_OF = paths.CONSUL_BINARY.with_suffix(".sha256")

STEP = Step("consul", requires=("kernel", "secrets"), observe=observe, diff=diff)
