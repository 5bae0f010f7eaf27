"""The Engine's options: what its owner has, what the spec asks, and what becomes of the two.

Pure: texts and data in, texts and data out. In a flat mapping each of `log-opts` stands for itself
(`log-opts max-size`), for each of them has an owner of its own.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nodeagent import paths
from nodeagent.host import Word
from nodeagent.spec import Engine, Log

Options = dict[str, Any]

# Flags whose key in daemon.json is not their own name (moby cmd/dockerd/config.go, `New…OptsRef`).
KEYS = {
    "add-runtime": "runtimes",
    "insecure-registry": "insecure-registries",
    **{
        name: f"{name}s"
        for name in (
            *("host", "label", "log-opt", "storage-opt", "exec-opt", "dns-opt", "default-ulimit"),
            *("registry-mirror", "authorization-plugin", "default-address-pool"),
            *("cluster-store-opt", "node-generic-resource", "default-network-opt", "cdi-spec-dir"),
        )
    },
}
SHORT = {
    **{"H": "hosts", "D": "debug", "G": "group", "b": "bridge", "p": "pidfile"},
    **{"s": "storage-driver", "l": "log-level", "g": "data-root"},
}

# What a running Engine takes over on SIGHUP, of all it can be asked to show afterwards
# (moby daemon/reload.go, 20.10 to 28.5).
RELOADABLE = frozenset(("labels", "debug", "registry-mirrors"))

# An Engine cannot have these while it is in a native Swarm: it refuses to join, and with some of
# them to start (moby daemon/config, `verifySwarmCompatible`).
NOT_WITH_SWARM = ("live-restore", "cluster-store", "cluster-advertise")

# Options whose values may be told: sentences go to the journal and to Consul.
SHOWN = frozenset(
    (
        *("log-driver", "log-opts", "dns", "labels", "debug", "live-restore", "bip", "mtu"),
        *("default-address-pools", "default-runtime", "bridge", "max-concurrent-downloads"),
    )
)

DRIVERS = (  # moby daemon/logdrivers_linux.go; a plugin's name has a slash or a colon
    *("json-file", "local", "journald", "syslog", "gelf", "fluentd", "awslogs", "splunk"),
    *("gcplogs", "logentries", "none"),
)
_FILES_OF_OWN = ("mode", "max-buffer-size", "max-size", "max-file", "compress")
LOG_OPTS = {  # moby daemon/logger/{jsonfilelog,local}, `ValidateLogOpt`
    "json-file": (*_FILES_OF_OWN, "labels", "labels-regex", "env", "env-regex", "tag"),
    "local": _FILES_OF_OWN,
}


@dataclass(frozen=True)
class Flag:
    """An option that the Engine's unit gives on the command line, and where that stands."""

    values: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Record:
    """What this program did to daemon.json; kept on disk beside the Engine's own state.

    `options` are ours in the file as it is to be, `before` those in the file before that, `kept`
    those in `good`. While `trial` (a digest) is that of the file, the Engine has not yet been seen
    to run with it, and `good` is the text that it ran with before (None: no file). `fault` says why
    it is to go back.
    `refused` is the digest of an attempt that failed so, and `words` what the Engine said then.
    """

    options: Options = field(default_factory=dict)
    before: Options = field(default_factory=dict)
    kept: Options = field(default_factory=dict)
    good: str | None = None
    trial: str = ""
    attempt: str = ""
    fault: str = ""
    refused: str = ""
    words: str = ""
    since: float = 0.0  # when the options in use were first seen to work, in s since 1970

    @classmethod
    def parse(cls, text: str | None) -> Record:
        """Raises ValueError, TypeError or AttributeError when it is none of ours."""
        found = cls(**json.loads(text)) if text else cls()
        ours = {name: {**getattr(found, name)} for name in ("options", "before", "kept")}
        return cls(**{**asdict(found), **ours})

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def is_ours(self, key: str, value: Any) -> bool:
        return any(key in kept and kept[key] == value for kept in (self.options, self.before))


def digest(*texts: str | None) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def parse(text: str | None) -> Options:
    """Return the file's options; raises ValueError with what is wrong with it."""
    text = (text or "").removeprefix("\ufeff")  # newer Engines take a byte-order mark as well
    if not text.strip():
        return {}
    try:
        options = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    if not isinstance(options, dict):
        raise ValueError("it holds no JSON object")
    opts = options.get("log-opts", {})
    if not isinstance(opts, dict):
        raise ValueError("its log-opts are no JSON object")
    for name, value in opts.items():
        if not isinstance(value, str):
            raise ValueError(f"log-opts {name} is {json.dumps(value)}, which needs quotes")
    return options


def _once(pairs: list[tuple[str, Any]]) -> Options:
    """Of a name given twice the Engine takes the last, or for some options both."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)} is given twice")
    return found


def dump(options: Options) -> str:
    return json.dumps(options, indent=4) + "\n"


def flags(words: Sequence[Word]) -> dict[str, Flag]:
    """Return the options on a command line, under their names in daemon.json."""
    found: dict[str, Flag] = {}
    for position, word in enumerate(words):
        match = re.match(r"--?([A-Za-z][A-Za-z0-9-]*)(?:=(.*))?$", word.text)
        if match is None:
            continue
        name, value = match.groups()
        key = SHORT.get(name, KEYS.get(name, name))
        if value is None:
            following = words[position + 1].text if position + 1 < len(words) else "-"
            value = "true" if following.startswith("-") else following
        earlier = found[key].values if key in found else ()
        found[key] = Flag((*earlier, value), word.place)
    return found


def flat(options: Mapping[str, Any]) -> Options:
    opts = options.get("log-opts", {})
    rest = {key: value for key, value in options.items() if key != "log-opts"}
    return {**rest, **{f"{_OPT}{key}": value for key, value in opts.items()}}


def _deep(options: Mapping[str, Any], old: Mapping[str, Any]) -> Options:
    """Turn a flat mapping back, keys in the order they have in the old file."""
    opts = {key[len(_OPT) :]: value for key, value in options.items() if key.startswith(_OPT)}
    rest = {key: value for key, value in options.items() if not key.startswith(_OPT)}
    if opts or "log-opts" in old:
        rest["log-opts"] = opts
    return {key: rest[key] for key in (*(key for key in old if key in rest), *rest)}


_OPT = "log-opts "


@dataclass(frozen=True)
class Merged:
    """What daemon.json is to hold; or, if `conflict`, what contradicts what and where."""

    options: Options
    conflict: str = ""
    fix: str = ""


def merge(
    asked: Engine,
    servers: Sequence[str],
    found: Mapping[str, Any],
    record: Record,
    given: Mapping[str, Flag],
) -> Merged:
    """Merge three ways: what the spec asks, what the file holds, what of that is ours.

    What the spec names must come true, or the contradiction is reported. What it leaves to us (log
    rotation, DNS servers) gives way to the owner's, in the file or on the command line.
    """
    present = flat(found)
    wanted = _log_options(asked.log or Log())
    is_named = dict.fromkeys(wanted, asked.log is not None)
    owners = present.get("log-driver")
    is_owners = owners is not None and not record.is_ours("log-driver", owners)
    if asked.log is None and (is_owners or {"log-driver", "log-opts"} & set(given)):
        wanted = {}
    if servers:
        wanted["dns"], is_named["dns"] = list(servers), False
    for key, value in flat(asked.options or {}).items():
        wanted[key], is_named[key] = value, True
    result = {key: value for key, value in present.items() if not record.is_ours(key, value)}
    if asked.log is None and result.get(f"{_OPT}max-file") in ("0", "1"):
        wanted.pop(f"{_OPT}compress", None)  # the Engine cannot compress its only file
    for key, value in wanted.items():
        flag = given.get(key.split()[0])
        if flag is not None:
            if is_named[key] and not _same(flag, key, value):
                there = f"--{key.split()[0]}={','.join(flag.values)} in {flag.place}"
                return _conflict(key, there, value, flag.place)
        elif key not in result:
            result[key] = value
        elif result[key] != value and is_named[key]:
            there = f"{json.dumps(result[key])} in {paths.DAEMON_JSON}"
            return _conflict(key, there, value, str(paths.DAEMON_JSON))
    return Merged(_deep(result, found))


def _conflict(key: str, there: str, value: Any, place: str) -> Merged:
    is_number = isinstance(value, (bool, int, float))
    if key.split()[0] not in SHOWN and not is_number:  # proxies, for one, are given with passwords
        return Merged(
            {},
            f"{key} is one thing in {place} and another by {paths.SPEC}",
            f"remove one of the two, in {place} or {paths.SPEC}",
        )
    return Merged(
        {},
        f"{key} is {there} and {json.dumps(value)} by {paths.SPEC}",
        f"remove one of the two, in {place} or {paths.SPEC}",
    )


def _same(flag: Flag, key: str, value: Any) -> bool:
    if key.startswith(_OPT):
        return f"{key[len(_OPT) :]}={value}" in flag.values
    values = value if isinstance(value, list) else [value]
    return flag.values == tuple(str(each).lower() if each is True else str(each) for each in values)


def ours(options: Options, found: Mapping[str, Any], record: Record) -> Options:
    """Which of the options in a file that we write are ours, given the file that was there."""
    old = flat(found)
    return {
        key: value
        for key, value in flat(options).items()
        if key not in old or old[key] != value or record.is_ours(key, value)
    }


def owners_alone(found: Mapping[str, Any], record: Record) -> Options:
    """What the file holds without us."""
    present = flat(found)
    return _deep({k: v for k, v in present.items() if not record.is_ours(k, v)}, found)


def is_same(some: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two files say the same; no `log-opts` and empty ones do."""
    return flat(some) == flat(other)


def _log_options(log: Log) -> Options:
    opts = {"max-size": log.max_size, "max-file": str(log.max_file), "compress": "true"}
    return flat({"log-driver": log.driver, "log-opts": opts})


def is_reloadable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a running Engine can go from one file to the other without a restart."""
    before, after = flat(old), flat(new)
    changed = {k for k in (*before, *after) if before.get(k) != after.get(k)}
    return changed <= RELOADABLE & after.keys()


def refusal(
    options: Mapping[str, Any], version: tuple[int, ...], build: str, has_consul: bool
) -> tuple[str, str]:
    """Return why an Engine in a native Swarm cannot have these options and what mends it; or "".

    These are the rules that the Engine itself would tell only by not starting.
    """
    store = options.get("cluster-store") or options.get("cluster-advertise")
    if store and version >= (23, 0):
        return (
            f"cluster-store was removed in Docker Engine 23.0 and this is {build}",
            _removal("cluster-store and cluster-advertise"),
        )
    if str(options.get("cluster-store", "")).startswith("consul:") and not has_consul:
        return (
            f"cluster-store is {json.dumps(options['cluster-store'])}, and this build of Docker "
            f"Engine {build} has no Consul in it",
            _removal("cluster-store and cluster-advertise"),
        )
    for key in NOT_WITH_SWARM:
        if options.get(key):
            return (
                f"{key} in {paths.DAEMON_JSON} is {json.dumps(options[key])}, "
                "which an Engine in Swarm mode cannot have",
                _removal(key),
            )
    fault = _log_fault(options) or _network_fault(options)
    return (fault, f"mend it in {paths.DAEMON_JSON} or {paths.SPEC}") if fault else ("", "")


def _removal(keys: str) -> str:
    return f"remove {keys} from {paths.DAEMON_JSON}, then systemctl restart docker.service"


def _log_fault(options: Mapping[str, Any]) -> str:
    driver, opts = options.get("log-driver", "json-file"), options.get("log-opts", {})
    if not isinstance(driver, str) or (driver not in DRIVERS and not re.search("[/:]", driver)):
        return f"log-driver is {json.dumps(driver)}, which no Docker Engine has"
    known = LOG_OPTS.get(driver, ())
    for name in opts if known else ():
        if name not in known and not name.startswith("cache-"):
            return f"log-opts {name} is unknown to log driver {driver}"
    if known and opts.get("compress") == "true":
        files = opts.get("max-file", "1" if driver == "json-file" else "5")
        if not (opts.get("max-size") or driver == "local") or files in ("0", "1"):
            return "log-opts compress needs max-size and a max-file of 2 or more"
    for name in ("max-size", "max-file"):
        pattern = r"-?[0-9.]+ ?([kmgtp]i?)?b?" if name == "max-size" else r"-?[0-9]+"
        if known and name in opts and not re.fullmatch(pattern, opts[name], re.IGNORECASE):
            return f"log-opts {name} is {json.dumps(opts[name])}, which is no number"
    return ""


def _network_fault(options: Mapping[str, Any]) -> str:
    try:
        what, value = "bip", options.get("bip")
        if value:
            ipaddress.ip_interface(value)
        for pool in options.get("default-address-pools") or ():
            what, value = "default-address-pools", pool
            base = ipaddress.ip_network(pool["base"], strict=False)
            if not base.prefixlen <= pool["size"] <= base.max_prefixlen:
                raise ValueError
    except (ValueError, KeyError, TypeError):
        return f"{what} is {json.dumps(value)}, which is no network"
    mirrors = options.get("registry-mirrors")
    for mirror in mirrors if isinstance(mirrors, list) else ():
        # moby registry/config.go, `ValidateMirror`; --validate does not ask it.
        if isinstance(mirror, str) and not re.fullmatch(r"(?i)https?://[^/?#@]+(/[^?#]*)?", mirror):
            return f"registry-mirrors has {json.dumps(mirror)}, which is no mirror's URL"
    return ""
