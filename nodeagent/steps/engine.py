"""The user's Engine runs with the options the spec asks for, beside those its owner put there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from nodeagent import paths
from nodeagent.changes import (
    KEEP_MODE,
    Change,
    EnableUnit,
    RemoveFile,
    RestartUnit,
    StartUnit,
    WriteFile,
)
from nodeagent.host import EngineInfo, Host, Unit
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Log, Spec

# The oldest Engine this version is tested with; also the first that knows cgroup v2
# (https://docs.docker.com/engine/release-notes/20.10/).
OLDEST = (20, 10)

# Options an Engine cannot have while it is in a native Swarm: it refuses to join, and with some
# of them to start (moby daemon/config, `verifySwarmCompatible`).
NOT_WITH_SWARM = ("live-restore", "cluster-store", "cluster-advertise")


@dataclass(frozen=True)
class Seen:
    unit: Unit
    info: EngineInfo | None
    daemon_json: str | None
    record: str | None
    restart_pending: str | None
    journal: tuple[str, ...] = ()


def observe(_spec: Spec, host: Host) -> Seen:
    unit = host.systemd.unit(paths.ENGINE_UNIT)
    return Seen(
        unit=unit,
        info=host.engine.info() if unit.is_active else None,
        daemon_json=host.files.read(paths.DAEMON_JSON),
        record=host.files.read(paths.ENGINE_RECORD),
        restart_pending=host.files.read(paths.RESTART_PENDING),
        journal=host.systemd.last_lines(paths.ENGINE_UNIT, 5) if unit.active == "failed" else (),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.unit.load == "masked":
        return block("docker.service is masked", fix="systemctl unmask docker.service")
    if not seen.unit.exists:
        return block(
            "no Docker Engine is installed (there is no docker.service)",
            fix="apt-get install docker.io",
        )
    try:
        found = _parse(seen.daemon_json)
    except ValueError as error:
        return block(
            f"{paths.DAEMON_JSON} cannot be read: {error}", fix=f"mend {paths.DAEMON_JSON}"
        )
    if seen.info is not None and _version(seen.info.version) < OLDEST:
        return block(
            f"Docker Engine {seen.info.version} is too old",
            fix=f"install {OLDEST[0]}.{OLDEST[1]} or newer",
        )
    for key in NOT_WITH_SWARM:
        if found.get(key):
            return block(
                f"{key} in {paths.DAEMON_JSON} is {json.dumps(found[key])}, "
                f"which an Engine in Swarm mode cannot have",
                fix=f"remove {key} from {paths.DAEMON_JSON}, then systemctl restart docker.service",
            )
    try:
        ours = _Record.parse(seen.record)
    except (ValueError, TypeError, AttributeError):
        return block(
            f"{paths.ENGINE_RECORD} does not say which options are ours",
            fix=f"rm {paths.ENGINE_RECORD}; the options in {paths.DAEMON_JSON} are then yours",
        )
    wanted, conflict = _merge(spec.engine.log, found, ours)
    if conflict:
        return block(conflict, fix=f"remove one of the two, in {paths.DAEMON_JSON} or {paths.SPEC}")
    if wanted != found:
        return change(*_write(seen, ours, found, wanted))
    return _run(seen, wanted)


def _run(seen: Seen, wanted: dict[str, Any]) -> Plan:
    """The file is right; make the Engine run with it."""
    if seen.unit.active == "failed":
        words = f": {seen.journal[-1]}" if seen.journal else ""
        return block(
            f"docker.service fails to start{words}",
            fix="journalctl -u docker.service, mend, then systemctl restart docker.service",
        )
    if seen.unit.active not in ("active", "reloading", "activating"):
        return change(StartUnit(paths.ENGINE_UNIT))
    pending = seen.restart_pending
    if pending is not None and pending.strip() == seen.unit.invocation:
        return change(RestartUnit(paths.ENGINE_UNIT, f"{paths.DAEMON_JSON} changed"))
    if pending is not None:
        return change(RemoveFile(paths.RESTART_PENDING))
    if seen.unit.enabled == "disabled":
        return change(EnableUnit(paths.ENGINE_UNIT))
    if seen.info is None:
        return wait("docker.service to answer on its socket")
    if seen.info.live_restore:
        return block(
            f"the Engine runs with live-restore although {paths.DAEMON_JSON} does not ask for it; "
            "an Engine in Swarm mode cannot have that",
            fix="systemctl cat docker.service; look for --live-restore; "
            "then systemctl restart docker.service",
        )
    driver = wanted.get("log-driver")
    if seen.info.log_driver != driver:
        return block(
            f"the Engine logs with {seen.info.log_driver} although {paths.DAEMON_JSON} asks for "
            f"{driver}",
            fix="systemctl cat docker.service; look for --log-driver; "
            "then systemctl restart docker.service",
        )
    return done(f"Docker Engine {seen.info.version}, logs {driver}")


@dataclass(frozen=True)
class _Record:
    """What this program asked for: now, and before the last change."""

    options: dict[str, Any]
    before: dict[str, Any]

    @classmethod
    def parse(cls, text: str | None) -> _Record:
        data = json.loads(text) if text else {}
        return cls({**data.get("options", {})}, {**data.get("before", {})})

    def is_ours(self, key: str, value: Any) -> bool:
        return any(key in kept and kept[key] == value for kept in (self.options, self.before))


def _merge(log: Log | None, found: dict[str, Any], ours: _Record) -> tuple[dict[str, Any], str]:
    """Return the options the file is to have, or a sentence about what contradicts."""
    owners_driver = found.get("log-driver")
    if log is None and owners_driver and not ours.is_ours("log-driver", owners_driver):
        return found, ""
    present, wanted = _flat(found), _log_options(log or Log())
    for key, value in wanted.items():
        there = present.get(key, value)
        if there != value and not ours.is_ours(key, there):
            if log is None:
                wanted[key] = there
                continue
            return {}, (
                f"{key} is {json.dumps(there)} in {paths.DAEMON_JSON} "
                f"and {json.dumps(value)} by {paths.SPEC}"
            )
    opts = {key[len(_OPT) :]: value for key, value in wanted.items() if key.startswith(_OPT)}
    opts = {**found.get("log-opts", {}), **opts}
    return {**found, "log-driver": wanted["log-driver"], "log-opts": opts}, ""


_OPT = "log-opts "  # one of them is "log-opts max-size"


def _log_options(log: Log) -> dict[str, Any]:
    size, files = log.max_size, str(log.max_file)
    opts = {"max-size": size, "max-file": files, "compress": "true"}
    return _flat({"log-driver": log.driver, "log-opts": opts})


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `log-opts` taken apart: each of them has its own owner."""
    opts = options.get("log-opts", {})
    rest = {key: value for key, value in options.items() if key != "log-opts"}
    return {**rest, **{f"{_OPT}{key}": value for key, value in opts.items()}}


def _write(
    seen: Seen, ours: _Record, found: dict[str, Any], wanted: dict[str, Any]
) -> list[Change]:
    """Record first, file second: a kill in between leaves a record that still knows the old."""
    changes: list[Change] = []
    old = _flat(found)
    mine = {
        key: value
        for key, value in _flat(wanted).items()
        if key not in old or old[key] != value or ours.is_ours(key, value)
    }
    if seen.record is None and seen.daemon_json is not None:
        changes.append(WriteFile(paths.ORIGINAL_DAEMON_JSON, seen.daemon_json, 0o600))
    before = {key: value for key, value in old.items() if ours.is_ours(key, value)}
    record = {"options": mine, "before": before}
    changes.append(WriteFile(paths.ENGINE_RECORD, json.dumps(record, indent=1) + "\n", 0o600))
    if seen.unit.active not in ("inactive", "failed"):
        changes.append(WriteFile(paths.RESTART_PENDING, seen.unit.invocation + "\n", 0o600))
    changes.append(WriteFile(paths.DAEMON_JSON, json.dumps(wanted, indent=4) + "\n", KEEP_MODE))
    return changes


def _parse(text: str | None) -> dict[str, Any]:
    """Return the file's options; raises ValueError with what is wrong with it."""
    text = (text or "").removeprefix("\ufeff")  # the Engine takes a byte-order mark as well
    if not text.strip():
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    if not isinstance(options, dict):
        raise ValueError("it holds no JSON object")
    if not isinstance(options.get("log-opts", {}), dict):
        raise ValueError("its log-opts are no JSON object")
    return options


def _version(text: str) -> tuple[int, ...]:
    """Return (major, minor); a build without a number, such as `dev`, counts as newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return tuple(int(number) for number in numbers.groups()) if numbers else (9999, 0)


STEP = Step("engine", requires=("identity",), observe=observe, diff=diff)
