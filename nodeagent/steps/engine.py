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
                fix=f"remove {key} from {paths.DAEMON_JSON}, "
                "then systemctl restart docker.service",
            )
    try:
        ours = _Record.parse(seen.record)
    except (ValueError, AttributeError):
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
        return cls(data.get("options", {}), data.get("before", {}))

    def is_ours(self, key: str, value: Any) -> bool:
        """Whether this program wrote `value`: for a mapping, all that is in it."""
        if isinstance(value, dict):
            return self.part(key, value) == value
        return any(key in kept and kept[key] == value for kept in (self.options, self.before))

    def part(self, key: str, values: dict[str, Any]) -> dict[str, Any]:
        """Those of a mapping's values that this program wrote."""
        pairs = [pair for kept in (self.options, self.before) for pair in kept.get(key, {}).items()]
        return {name: value for name, value in values.items() if (name, value) in pairs}


def _merge(log: Log | None, found: dict[str, Any], ours: _Record) -> tuple[dict[str, Any], str]:
    """Return the options the file is to have, or a sentence about what contradicts."""
    owners_driver = found.get("log-driver")
    if log is None and owners_driver and not ours.is_ours("log-driver", owners_driver):
        return found, ""
    wanted = _log_options(log or Log())
    for key, value in wanted.items():
        if key in found and found[key] != value and not ours.is_ours(key, found[key]):
            if log is None and isinstance(found[key], dict):
                written = ours.part(key, found[key])
                value.update({k: v for k, v in found[key].items() if k not in written})
                continue
            return {}, (
                f"{key} is {json.dumps(found[key])} in {paths.DAEMON_JSON} "
                f"and {json.dumps(value)} by {paths.SPEC}"
            )
    return {**found, **wanted}, ""


def _log_options(log: Log) -> dict[str, Any]:
    opts = {"max-size": log.max_size, "max-file": str(log.max_file), "compress": "true"}
    return {"log-driver": log.driver, "log-opts": opts}


def _write(
    seen: Seen, ours: _Record, found: dict[str, Any], wanted: dict[str, Any]
) -> list[Change]:
    """Record first, file second: a kill in between leaves a record that still knows the old."""
    changes: list[Change] = []
    before: dict[str, Any] = {}
    mine: dict[str, Any] = {}
    for key, value in wanted.items():
        old = found.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            before[key] = ours.part(key, old)
            mine[key] = {k: v for k, v in value.items() if k in before[key] or k not in old}
            continue
        if old is not None and ours.is_ours(key, old):
            before[key] = old
        if old != value or ours.is_ours(key, value):
            mine[key] = value
    if seen.record is None and seen.daemon_json is not None:
        changes.append(WriteFile(paths.ORIGINAL_DAEMON_JSON, seen.daemon_json, 0o600))
    record = {"options": mine, "before": before}
    changes.append(WriteFile(paths.ENGINE_RECORD, json.dumps(record, indent=1) + "\n", 0o600))
    if seen.unit.active not in ("inactive", "failed"):
        changes.append(WriteFile(paths.RESTART_PENDING, seen.unit.invocation + "\n", 0o600))
    changes.append(WriteFile(paths.DAEMON_JSON, json.dumps(wanted, indent=4) + "\n", KEEP_MODE))
    return changes


def _parse(text: str | None) -> dict[str, Any]:
    """Return the file's options; raises ValueError with what is wrong with it."""
    if text is None or not text.strip():
        return {}
    try:
        options = json.loads(text.removeprefix("\ufeff"))  # the Engine takes a BOM as well
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    if not isinstance(options, dict):
        raise ValueError("it holds no JSON object")
    return options


def _version(text: str) -> tuple[int, ...]:
    """Return (major, minor); a build without a number, such as `dev`, counts as newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return tuple(int(number) for number in numbers.groups()) if numbers else (9999, 0)


STEP = Step("engine", requires=("identity",), observe=observe, diff=diff)
