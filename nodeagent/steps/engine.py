"""The user's Engine runs with the options the spec asks for, beside those its owner put there.

A change of daemon.json is a transaction. The Engine's own program is asked about the new file
before it is written; then the file that works and what is going to be tried are recorded, the file
is written, and the Engine takes it over. Only when it is seen to run so is the new file the one
that works; until then any trouble brings the old one back, and the same attempt is not made again.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nodeagent import options, paths
from nodeagent.changes import (
    KEEP_MODE,
    Change,
    EnableUnit,
    MoveAside,
    ReloadUnit,
    RemoveFile,
    RestartUnit,
    StartUnit,
    WriteFile,
)
from nodeagent.errors import HostError
from nodeagent.host import EngineInfo, Host, LogSettings, Unit
from nodeagent.options import Options, Record
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec
from nodeagent.steps import dns

# The oldest Engine this version is tested with; also the first that knows cgroup v2
# (https://docs.docker.com/engine/release-notes/20.10/).
OLDEST = (20, 10)

# How long an Engine may take with new options before the old ones come back. One with a thousand
# containers needs the better part of a minute; so does one whose logs go to a server that is away.
START_DEADLINE_S = 90.0
RELOAD_DEADLINE_S = 10.0

LINES = 20  # of its journal: it says six and more at each start, and systemd starts it anew

OWN_NETWORKS = {"bridge", "host", "none", "ingress", "docker_gwbridge"}
DATA_ROOT = "/var/lib/docker"


@dataclass(frozen=True)
class Pending:
    """The file has changed, and the Engine does not know yet; on disk, for a kill comes any time.

    `restart` and `reload` are to be done, `reloaded` was; `at_s` by the monotonic clock. A restart
    is noted before the file is written (0) and again after it: an Engine that systemd starts
    between the two has read the old file.
    """

    kind: str
    at_s: float

    @classmethod
    def parse(cls, text: str | None) -> Pending | None:
        match = re.fullmatch(r"(restart|reload|reloaded) ([0-9.]+)\n", text or "")
        return cls(match.group(1), float(match.group(2))) if match else None

    def dump(self) -> str:
        return f"{self.kind} {self.at_s:.3f}\n"


@dataclass(frozen=True)
class Seen:
    unit: Unit
    info: EngineInfo | None
    version: str
    daemon_json: str | None
    record: str | None
    pending: str | None
    now_s: float = 0.0
    wall_s: float = 0.0
    candidate: str | None = None
    verdict: str = ""  # of the Engine's program on the candidate
    has_consul: bool = True
    journal: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()  # in the Engine's own store, if it cannot start with that
    data_root: str = DATA_ROOT
    logs: tuple[tuple[str, LogSettings], ...] = ()
    original: str | None = None  # the owner's file, before we first wrote it
    dns: tuple[str, ...] = ()

    @property
    def is_down(self) -> bool:
        """Whether it does not run and will not by itself: it failed, or does so again and again."""
        return self.unit.active == "failed" or (
            not self.unit.is_active and self.unit.restarts > 0 and bool(self.journal)
        )

    @property
    def is_late(self) -> bool:
        is_on = self.unit.is_active or self.unit.active == "activating"
        return is_on and self.now_s - self.unit.began_s > START_DEADLINE_S


def observe(_spec: Spec, host: Host) -> Seen:
    unit = host.systemd.unit(paths.ENGINE_UNIT)
    daemon_json, candidate = (
        host.files.read(path) for path in (paths.DAEMON_JSON, paths.OPTIONS_CANDIDATE)
    )
    seen = Seen(
        unit=unit,
        info=None,
        version=host.engine_program.version(),
        daemon_json=daemon_json,
        record=host.files.read(paths.ENGINE_RECORD),
        pending=host.files.read(paths.RESTART_PENDING),
        now_s=host.clock.monotonic(),
        wall_s=host.clock.now(),
        candidate=candidate,
        original=host.files.read(paths.ORIGINAL_DAEMON_JSON),
        dns=dns.servers(host),
    )
    if "cluster-store" in (daemon_json or ""):
        seen = replace(seen, has_consul=host.engine_program.has_consul())
    if candidate is not None and unit.exists:
        verdict = host.engine_program.refusal(paths.OPTIONS_CANDIDATE, unit.command)
        seen = replace(seen, verdict=verdict)
    if unit.is_active:
        try:
            seen = replace(seen, info=host.engine.info())
        except HostError:
            if not seen.is_late:  # one that hangs with new options gets its old ones back
                raise
    if seen.info is not None:
        with contextlib.suppress(
            HostError
        ):  # it is told only, and may hang where the rest does not
            return replace(seen, logs=tuple(sorted(host.engine.log_settings().items())))
        return seen
    if unit.active == "failed" or unit.restarts:
        seen = replace(seen, journal=host.systemd.last_lines(paths.ENGINE_UNIT, LINES))
        if _is_stuck(seen):
            root = _data_root(seen)
            found = host.engine_program.networks(root)
            seen = replace(seen, networks=found, data_root=root)
    return seen


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.unit.load == "masked":
        return block("docker.service is masked", fix="systemctl unmask docker.service")
    if not seen.unit.exists:
        return block(
            "no Docker Engine is installed (there is no docker.service)",
            fix="apt-get install docker.io",
        )
    try:
        record = Record.parse(seen.record)
    except (ValueError, TypeError, AttributeError):
        return block(
            f"{paths.ENGINE_RECORD} does not say which options are ours",
            fix=f"rm {paths.ENGINE_RECORD}; the options in {paths.DAEMON_JSON} are then yours",
        )
    if record.fault:
        return _way_back(seen, record)
    try:
        found = options.parse(seen.daemon_json)
    except ValueError as error:
        return block(
            f"{paths.DAEMON_JSON} cannot be read: {error}", fix=f"mend {paths.DAEMON_JSON}"
        )
    running = seen.info.version if seen.info else ""
    for version in filter(None, (seen.version, running)):
        if _version(version) < OLDEST:
            return block(
                f"Docker Engine {version} is too old",
                fix=f"install {OLDEST[0]}.{OLDEST[1]} or newer",
            )
    given = options.flags(seen.unit.command)
    merged = options.merge(spec.engine, seen.dns, found, record, given)
    if merged.conflict:
        return block(merged.conflict, fix=merged.fix)
    why, fix = options.refusal(
        merged.options, _version(seen.version), seen.version, seen.has_consul
    )
    if why:
        return block(why, fix=fix)
    if merged.options != found:
        return _try(seen, record, found, merged.options)
    if seen.candidate is not None:
        return change(RemoveFile(paths.OPTIONS_CANDIDATE))
    return _run(seen, record, found)


def _try(seen: Seen, record: Record, found: Options, wanted: Options) -> Plan:
    """Begin the transaction. Record first, file last: a kill in between leaves the old file."""
    text = options.dump(wanted)
    attempt = options.digest(seen.daemon_json, text, seen.version)
    if attempt == record.refused:
        plan = _run(seen, record, found)  # with the last good file
        if not plan.is_done:
            return plan
        return block(
            f"the Engine is back on its last good options, for it does not run with those of "
            f"{paths.SPEC}: {record.words}",
            fix=f"edit engine in {paths.SPEC} or {paths.DAEMON_JSON}",
        )
    if seen.candidate != text:
        return change(WriteFile(paths.OPTIONS_CANDIDATE, text, 0o600))
    if seen.verdict:
        return block(
            f"the Engine refuses {paths.DAEMON_JSON} with the options of {paths.SPEC}, so nothing "
            f"was changed: {seen.verdict}",
            fix=f"edit engine in {paths.SPEC} or {paths.DAEMON_JSON}",
        )
    pending = Pending.parse(seen.pending)
    # Taken back before the Engine has read it: it runs with that file all the while.
    if _is_on_trial(seen, record) and pending and pending.kind == "restart" and pending.at_s:
        is_unread = not _is_restarted(seen, pending) and seen.unit.is_active
        if is_unread and options.is_same(options.parse(record.good), wanted):
            known = replace(record, options=record.kept, before={}, trial="", attempt="")
            return change(_restore(record), _note(known), RemoveFile(paths.RESTART_PENDING))
    changes: list[Change] = []
    if seen.record is None and seen.daemon_json is not None:
        changes.append(WriteFile(paths.ORIGINAL_DAEMON_JSON, seen.daemon_json, 0o600))
    flat = options.flat(found)
    before = {key: value for key, value in flat.items() if record.is_ours(key, value)}
    trial = Record(
        options=options.ours(wanted, found, record),
        before=before,
        kept=record.kept if _is_on_trial(seen, record) else before,
        good=record.good if _is_on_trial(seen, record) else seen.daemon_json,
        trial=options.digest(text),
        attempt=attempt,
        since=record.since,
    )
    changes.append(_note(trial))
    is_light = options.is_reloadable(found, wanted) and seen.unit.is_active
    is_light &= pending is None or pending.kind != "restart"
    changes.append(_pend("reload", seen) if is_light else _due())
    changes.append(WriteFile(paths.DAEMON_JSON, text, KEEP_MODE))
    return change(*changes, RemoveFile(paths.OPTIONS_CANDIDATE))


def _way_back(seen: Seen, record: Record) -> Plan:
    """The Engine does not run with the file on trial: put the good one back, and remember."""
    if _is_on_trial(seen, record):
        return change(_due(), _restore(record))
    return change(
        _note(
            Record(
                options=record.kept,
                good=record.good,
                refused=record.attempt,
                words=record.fault,
                since=record.since,
            )
        )
    )


def _restore(record: Record) -> Change:
    if record.good is None:
        return RemoveFile(paths.DAEMON_JSON)
    return WriteFile(paths.DAEMON_JSON, record.good, KEEP_MODE)


def _run(seen: Seen, record: Record, found: Options) -> Plan:
    """The file is right; make the Engine run with it, and see that it does."""
    pending = Pending.parse(seen.pending)
    if seen.pending is not None and pending is None:
        return change(RemoveFile(paths.RESTART_PENDING))  # an earlier version's
    if pending is not None and not pending.at_s:
        if record.trial and not _is_on_trial(seen, record):  # the file could never be written
            before = replace(record, options=record.before, trial="", attempt="")
            return change(_note(before), RemoveFile(paths.RESTART_PENDING))
        return change(_pend("restart", seen))
    is_tried = pending is None or pending.kind == "reloaded" or _is_restarted(seen, pending)
    on_trial = is_tried and _is_on_trial(seen, record)
    words = _last_words(seen.journal)
    if _is_stuck(seen):
        return _unstick(seen)
    if not is_tried and (
        seen.is_down
        or (seen.info is None and seen.is_late and (record.refused or not seen.unit.is_active))
    ):
        return change(_restart())
    since = pending.at_s if pending else 0.0
    is_late = seen.is_late and seen.now_s - since > START_DEADLINE_S
    if on_trial and (seen.is_down or (seen.info is None and is_late)):
        fault = words or f"no answer within {START_DEADLINE_S:.0f} s"
        return change(_note(replace(record, fault=fault)))
    if seen.unit.active == "failed":
        words = f": {words}" if words else ""
        return block(
            f"docker.service fails to start{words}",
            fix="journalctl -u docker.service, mend, then systemctl restart docker.service",
        )
    if seen.unit.active == "activating":
        return wait("docker.service to start")  # interrupted in its start, it may break its store
    if not seen.unit.is_active:
        return change(StartUnit(paths.ENGINE_UNIT))
    if seen.unit.enabled == "disabled":
        return change(EnableUnit(paths.ENGINE_UNIT))
    if pending is not None and not is_tried:
        if pending.kind == "reload":
            why = f"{paths.DAEMON_JSON} changed"
            return change(ReloadUnit(paths.ENGINE_UNIT, why), _pend("reloaded", seen))
        if seen.info is None and not record.refused:
            return wait("docker.service to answer on its socket")
        is_member = seen.info is not None and seen.info.swarm.state != "inactive"
        if is_member and not record.refused:  # the way back does not wait
            return done(f"{_summary(seen, record)}; new options wait for a restart")
        return change(_restart())
    if seen.info is None:
        return wait("docker.service to answer on its socket")
    fault, fix = _shown_otherwise(record, seen.info, found)
    if fault:
        if pending and pending.kind == "reloaded" and seen.now_s - pending.at_s < RELOAD_DEADLINE_S:
            return wait("the Engine to show its new options")
        if on_trial:
            return change(_note(replace(record, fault=fault)))
        return block(fault, fix=fix)
    if record.trial or (record.options and not record.since):
        return change(_note(replace(record, trial="", attempt="", since=seen.wall_s)))
    if pending is not None:
        return change(RemoveFile(paths.RESTART_PENDING))
    return done(_summary(seen, record))


def undo(_spec: Spec, seen: Seen) -> Plan:
    """Take our options out of the file; as the owner left it, to the byte, where that is all."""
    if seen.record is None:
        return done("the Engine has no options of ours")
    try:
        record, found = Record.parse(seen.record), options.parse(seen.daemon_json)
    except (ValueError, TypeError, AttributeError) as error:
        return block(
            f"{paths.DAEMON_JSON} or {paths.ENGINE_RECORD} cannot be read: {error}",
            fix=f"mend {paths.DAEMON_JSON}, or rm {paths.ENGINE_RECORD}; then once more",
        )
    rest = options.owners_alone(found, record)
    pending = Pending.parse(seen.pending)
    if rest != found:
        text = options.dump(rest)
        if seen.original is not None and options.is_same(options.parse(seen.original), rest):
            text = seen.original
        is_empty = seen.original is None and options.is_same(rest, {})
        back = RemoveFile(paths.DAEMON_JSON)
        write = WriteFile(paths.DAEMON_JSON, text, KEEP_MODE)
        return change(_pend("restart", seen), back if is_empty else write)
    if pending is not None and not _is_restarted(seen, pending) and seen.unit.is_active:
        return change(_restart())
    gone = (paths.RESTART_PENDING, paths.OPTIONS_CANDIDATE, paths.ORIGINAL_DAEMON_JSON)
    return change(*(RemoveFile(path) for path in (*gone, paths.ENGINE_RECORD)))


def _last_words(journal: tuple[str, ...]) -> str:
    """Why it ended, which it says in plain text; one of its threads may log a line after that."""
    plain = tuple(line for line in journal if not line.startswith(("time=", "docker.service:")))
    return (plain or journal or ("",))[-1]


def _restart() -> Change:
    return RestartUnit(paths.ENGINE_UNIT, f"{paths.DAEMON_JSON} changed")


def _is_restarted(seen: Seen, pending: Pending) -> bool:
    return pending.kind == "restart" and seen.unit.began_s > pending.at_s


def _is_on_trial(seen: Seen, record: Record) -> bool:
    return bool(record.trial) and record.trial == options.digest(seen.daemon_json)


def _note(record: Record) -> Change:
    return WriteFile(paths.ENGINE_RECORD, record.dump(), 0o600)


def _due() -> Change:
    return WriteFile(paths.RESTART_PENDING, Pending("restart", 0).dump(), 0o600)


def _pend(kind: str, seen: Seen) -> Change:
    return WriteFile(paths.RESTART_PENDING, Pending(kind, seen.now_s).dump(), 0o600)


def _shown_otherwise(record: Record, info: EngineInfo, found: Options) -> tuple[str, str]:
    """What the running Engine shows of itself that is not as the file says; and what mends it."""
    cure = "systemctl cat docker.service; look for --{}; then systemctl restart docker.service"
    if info.options.get("live-restore") and not found.get("live-restore"):
        return (
            f"the Engine runs with live-restore although {paths.DAEMON_JSON} does not ask for it; "
            "an Engine in Swarm mode cannot have that",
            cure.format("live-restore"),
        )
    for key, value in record.options.items():
        shown = info.options.get(key, value)
        if _plain(shown) != _plain(value):
            return (
                f"the Engine runs with {key} {json.dumps(shown)} although {paths.DAEMON_JSON} "
                f"asks for {json.dumps(value)}",
                cure.format(key),
            )
    return "", ""


def _plain(value: Any) -> Any:
    """Lists in one order, and addresses without the slash that the Engine puts behind them."""
    if isinstance(value, list):
        return sorted(json.dumps(_plain(each), sort_keys=True) for each in value)
    return value.rstrip("/") if isinstance(value, str) else value


_STUCK = re.compile(r"conflicts with network \w+ \(\w+\): networks have same bridge name")


def _is_stuck(seen: Seen) -> bool:
    """Whether the Engine fails over its own store, as 26.1 does for good.

    If it once cannot set up its bridge at a start, because iptables failed, it keeps two in its
    store and never starts again (moby issue 49291; mended in 27.5.1, and 20.10 gets over it).
    """
    return seen.is_down and any(_STUCK.search(line) for line in seen.journal)


def _unstick(seen: Seen) -> Plan:
    store = Path(seen.data_root) / "network/files/local-kv.db"
    owners = sorted(set(seen.networks) - OWN_NETWORKS)
    if not seen.networks or owners:
        names = f" ({', '.join(owners)})" if owners else ""
        return block(
            "the Engine's store of networks holds its bridge twice, and it cannot start with that "
            "(moby issue 49291); without the store it can, but your own networks are in it, too"
            f"{names}",
            fix=f"mv {store} /root/; systemctl restart docker.service; docker network create …",
        )
    why = "the Engine cannot start with it, and it has no networks of yours"
    return change(
        MoveAside(store, store.with_name("local-kv.db.set-aside"), why),
        RestartUnit(paths.ENGINE_UNIT, "its store of networks made anew"),
    )


def _data_root(seen: Seen) -> str:
    flag = options.flags(seen.unit.command).get("data-root")
    if flag:
        return flag.values[-1]
    try:
        return str(options.parse(seen.daemon_json).get("data-root") or DATA_ROOT)
    except ValueError:
        return DATA_ROOT


def _summary(seen: Seen, record: Record) -> str:
    driver = seen.info.options.get("log-driver", "") if seen.info else ""
    opts = {
        key.split()[1]: value
        for key, value in record.options.items()
        if key.startswith("log-opts ")
    }
    older = [
        name
        for name, log in seen.logs
        if log.made < record.since
        and (log.driver != driver or any(log.opts.get(key) != opts[key] for key in opts))
    ]
    text = f"Docker Engine {seen.version}, logs {driver}"
    if older:
        names = ", ".join(older[:3]) + (", …" if len(older) > 3 else "")
        text += f"; {len(older)} containers are older and keep their own log settings: {names}"
    return text


def _version(text: str) -> tuple[int, ...]:
    """Return (major, minor); a build without a number, such as `dev`, counts as newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return tuple(int(number) for number in numbers.groups()) if numbers else (9999, 0)


STEP = Step("engine", requires=("kernel", "dns"), observe=observe, diff=diff, undo=undo)
