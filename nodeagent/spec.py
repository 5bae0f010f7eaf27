"""The spec (`node.yaml`): read strictly, or refused with every mistake named where it stands."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nodeagent.errors import Problem, SpecError

Role = Literal["server", "worker"]
T = TypeVar("T")

# What a provider takes as user-data, of which the spec is a part. A real one has a few hundred.
LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Kind:
    """What a value may be: in words, and as the JSON Schema that values are checked by.

    `rule` says of texts and lists what a schema cannot: it returns None for one that is right,
    else a hint, "" if there is no more to say than what is expected.
    """

    expected: str
    schema: Mapping[str, Any]
    rule: Callable[[Any], str | None] = lambda _: None
    hint: str = ""

    def fault(self, value: Any) -> str | None:
        """Return what a rule returns, for any value that YAML can bring."""
        schema = self.schema
        if "enum" in schema:
            if any(type(value) is type(word) and value == word for word in schema["enum"]):
                return None
            return self.hint or _meant(str(value), map(str, schema["enum"]))
        if schema["type"] == "integer":
            if isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,3}", value):
                return "leave out the quotes"
            is_number = isinstance(value, int) and not isinstance(value, bool)
            return None if is_number and schema["minimum"] <= value <= schema["maximum"] else ""
        if schema["type"] in ("array", "object"):
            return self.rule(value)
        if isinstance(value, (bool, int, float)):
            return "put it in quotes" if self.fault(_shown(value)) is None else ""
        if not isinstance(value, str) or not re.fullmatch(schema.get("pattern", ".+"), value):
            return ""
        return self.rule(value)


def _text(pattern: str, expected: str) -> Kind:
    return Kind(expected, {"type": "string", "pattern": f"^(?:{pattern})$"})


def _integer(low: int, high: int) -> Kind:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Kind(f"a whole number from {low} to {high}", schema)


def _one_of(*words: str) -> Kind:
    return Kind(" or ".join(words), {"enum": list(words)})


def _address_fault(text: str) -> str | None:
    if not re.fullmatch(r"[0-9./]+", text):
        is_interface = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.@-]{0,14}", text)
        return None if is_interface else ""
    try:
        network = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return "no such IPv4 address or network exists"
    is_nowhere = network.prefixlen == 0 or network.is_unspecified
    if is_nowhere or network.is_loopback or network.is_multicast:
        return "other machines cannot reach that"
    return None


def _join_fault(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"for a single one: [{_shown(value)}]" if isinstance(value, str) else ""
    wrong = [entry for entry in value if ENTRY.fault(entry) is not None]
    return f"{_shown(wrong[0])} is not {ENTRY.expected}" if wrong else None


# What has a place of its own in the spec, or would take the Engine from under our feet.
_NOT_HERE = {
    **dict.fromkeys(("log-driver", "log-opts"), "use engine.log"),
    **dict.fromkeys(
        ("live-restore", "cluster-store", "cluster-advertise", "cluster-store-opts"),
        "it follows from swarm.mode",
    ),
    **dict.fromkeys(("data-root", "storage-driver"), "what the Engine holds would be gone"),
    **dict.fromkeys(("hosts", "pidfile", "exec-root", "containerd"), "docker.service sets it"),
}


def _options_fault(value: Any) -> str | None:
    if not isinstance(value, dict):
        return ""
    for key, each in value.items():
        if not isinstance(key, str):
            return f"{_shown(key)} is no name of an option"
        if key in _NOT_HERE:
            return f"{key} cannot be given here: {_NOT_HERE[key]}"
        if each is None:
            return f"{key} has no value"
    return None


_IPV4 = r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(?!$)|$)){4}"
_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST = rf"(?![0-9.]+$)(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?"
NAME = _text(
    r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", "up to 40 lower-case letters, digits and inner dashes"
)
DOMAIN = _text(r"[a-z0-9-]+(\.[a-z0-9-]+)*", "a DNS domain in lower case, such as consul")
ADDRESS = Kind(
    "an IPv4 address, a network such as 10.10.0.0/16, or an interface name",
    {"type": "string", "minLength": 1},
    _address_fault,
)
ENTRY = _text(rf"provider=.+|{_IPV4}|{_HOST}", "an address, a DNS name or provider=…")
JOIN = Kind(
    "a list of addresses, DNS names, or Consul cloud auto-join strings (provider=…)",
    {"type": "array", "items": ENTRY.schema},
    _join_fault,
)
OPTIONS = Kind("a mapping of daemon.json's keys to values", {"type": "object"}, _options_fault)
BOOLEAN = Kind("true or false", {"enum": [True, False]}, hint="one of the two, without quotes")
SECTION = Kind("a mapping of keys to values", {"enum": []})
# YAML 1.1 reads a bare `off` as false.
OFF = Kind("off", {"enum": ["off", False]}, hint="to have it on, leave the key out")
DURATION = _text(r"[1-9][0-9]{0,4}[mhd]", "a duration such as 30d, 12h or 5m")
IMAGE = _text(r"[a-z0-9][A-Za-z0-9_./:@-]*", "an image reference such as hashicorp/consul:1.21")
LOCATION = _text(r"(https?://\S+|/\S+)", "an absolute path, or an http(s) URL")
SHA256 = _text(r"[0-9a-f]{64}", "64 hexadecimal digits, as sha256sum prints them")
SIZE = _text(r"[1-9][0-9]*[kmg]", "a size such as 10m")
REQUIREMENT = _text(
    r"[A-Za-z0-9][A-Za-z0-9_.\[\]=<>!~, +-]*", "a pip requirement such as nodeagent==1.0"
)


def _key(kind: Kind | type, doc: str, default: Any = dataclasses.MISSING) -> Any:
    """Return a field for a value of this kind, or for a section of keys that is a dataclass."""
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class Consul:
    """Where Consul comes from and how it runs."""

    runtime: Literal["container", "binary"] = _key(
        _one_of("container", "binary"),
        "in a container of the System Engine, or as a program under systemd",
        "container",
    )
    image: str = _key(IMAGE, "the container's image", "hashicorp/consul:1.21")
    archive: str | None = _key(
        LOCATION,
        "instead of the registry: a `docker save` file with the image; for runtime binary, the "
        "program or the .zip that holds it",
        None,
    )
    sha256: str | None = _key(SHA256, "the archive's digest", None)
    certificate_lifetime: str = _key(
        DURATION, "how long a server's certificate is valid; renewed at half of it", "30d"
    )

    @property
    def certificate_lifetime_s(self) -> int:
        units = {"m": 60, "h": 3600, "d": 86400}
        return int(self.certificate_lifetime[:-1]) * units[self.certificate_lifetime[-1]]


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """Which kind of Swarm."""

    mode: Literal["auto", "native"] = _key(
        _one_of("auto", "native"), "which Swarm the Engine is to run", "auto"
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """The log driver of containers that name none themselves."""

    driver: Literal["json-file", "local"] = _key(
        _one_of("json-file", "local"), "the Engine's log-driver", "json-file"
    )
    max_size: str = _key(SIZE, "size at which a log file is rotated", "10m")
    max_file: int = _key(_integer(2, 1000), "how many rotated files are kept", 10)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Options of the Docker Engine."""

    log: Log | None = _key(
        Log,
        "log driver and rotation; left out, 10 files of 10m, unless the Engine's own "
        "configuration names a driver",
        None,
    )
    options: Mapping[str, Any] | None = _key(
        OPTIONS, "further keys of daemon.json, passed on as they are", None
    )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What is asked of the kernel."""

    memory_accounting: bool = _key(
        BOOLEAN, "that it accounts for the memory and swap of containers", True
    )
    reboot: Literal["once", "never"] = _key(
        _one_of("once", "never"), "whether this machine may be rebooted for that, once", "once"
    )


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Where a new machine gets nodeagent from; none of these: it is baked into the image."""

    url: str | None = _key(LOCATION, "the self-contained file of a release", None)
    sha256: str | None = _key(SHA256, "that file's digest", None)
    package: str | None = _key(REQUIREMENT, "a requirement for a package index", None)
    index: str | None = _key(LOCATION, "a package index other than pip's own", None)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What all nodes of a cluster share."""

    cluster: str = _key(NAME, "the cluster's name")
    servers: int = _key(_integer(1, 9), "how many servers the cluster has")
    address: str = _key(ADDRESS, "where this node is in the cluster's network")
    join: tuple[str, ...] = _key(
        JOIN,
        "where the servers are: addresses, DNS names (SRV or A), or Consul cloud auto-join strings",
        (),
    )
    domain: str = _key(DOMAIN, "Consul's DNS domain", "consul")
    datacenter: str = _key(NAME, "Consul's datacenter", "dc1")
    security: Literal["off"] | None = _key(
        OFF,
        "left out, Consul is encrypted and authenticated with the keys of secrets.json; off: it "
        "is neither",
        None,
    )
    consul: Consul = _key(Consul, "Consul", Consul())
    swarm: Swarm = _key(Swarm, "Swarm", Swarm())
    engine: Engine = _key(Engine, "the Docker Engine", Engine())
    kernel: Kernel = _key(Kernel, "the kernel", Kernel())
    agent: Agent = _key(Agent, "how new machines get nodeagent (used by user-data only)", Agent())

    @property
    def is_secured(self) -> bool:
        return self.security is None

    @property
    def majority(self) -> int:
        """How many servers make a quorum."""
        return self.servers // 2 + 1

    @property
    def key_prefix(self) -> str:
        """Where in Consul's KV everything of this cluster stands."""
        return f"nodeagent/{self.cluster}/"


@dataclass(frozen=True, kw_only=True)
class Spec(Cluster):
    """What one node is to be: the cluster's part, and its role."""

    role: Role = _key(_one_of("server", "worker"), "what this node is in the cluster")

    @property
    def is_server(self) -> bool:
        return self.role == "server"


_UNREADABLE = {
    FileNotFoundError: ("there is no such file", "write one; nodeagent schema lists the keys"),
    IsADirectoryError: ("is a directory, not a file", ""),
    PermissionError: ("cannot be read", "use sudo"),
}


def load(path: Path, as_: type[T]) -> T:
    """Read a `Spec` or `Cluster` from a YAML file.

    Raises SpecError with every problem found, each with its line.
    """
    hint = ""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
        if len(data) <= LIMIT_BYTES:
            return parse(data.decode("utf-8-sig"), str(path), as_)
        message = f"is larger than {LIMIT_BYTES} bytes; a spec has a few hundred"
    except OSError as error:
        other = (f"cannot be read: {error.strerror}", "")
        message, hint = _UNREADABLE.get(type(error), other)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start})"
    raise SpecError((Problem(str(path), None, "", message, hint),))


def parse(text: str, file: str, as_: type[T]) -> T:
    """Read a `Spec` or `Cluster` from YAML text; `file` is the name to complain about."""
    reader = _Reader(file)
    try:
        result = reader.document(text, as_)
    except RecursionError:
        reader.problems.clear()
        reader.complain("", "is nested too deeply; a spec has three levels")
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        found = _shown(chr(error.character))
        reader.complain("", f"is not YAML: {found} is a character it does not allow", line=line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(filter(None, (error.context, error.problem)))
        hint = "indent with spaces, not tabs" if "'\\t'" in words else ""
        reader.complain("", f"is not YAML: {words}", hint, mark.line + 1 if mark else None)
    if reader.problems:
        raise SpecError(tuple(reader.problems))
    return typing.cast(T, result)


class _Loader(yaml.SafeLoader):
    """YAML in which dates are texts, as is a number with a zero before it or one without end."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] in ("bool", "float", "null")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{0,17})$"), list("-+0123456789")
)


def _value(node: yaml.Node) -> Any:
    return yaml.constructor.SafeConstructor().construct_document(node)


class _Reader:
    """Turns YAML into dataclasses, gathering problems as it goes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.lines: dict[str, int] = {}

    def complain(self, path: str, message: str, hint: str = "", line: int | None = None) -> None:
        line = line or self.lines.get(path)
        self.problems.append(Problem(self.file, line, path, message, hint))

    def document(self, text: str, cls: type) -> Any:
        """Return a `cls`, or None after a complaint. Raises what yaml raises."""
        tree = yaml.compose(text, _Loader)
        events: Any = yaml.parse(text, _Loader)
        for event in events:
            for what in ("anchor", "tag"):
                if name := getattr(event, what, None):
                    words = f"the {what} {name} has no place in a spec"
                    return self.complain("", words, line=event.start_mark.line + 1)
        if not isinstance(tree, yaml.MappingNode):
            found = "is empty" if tree is None else f"holds {_shown(_value(tree))}"
            return self.complain("", f"{found}; a mapping of keys to values is needed")
        result = self.mapping(cls, tree, "")
        if result is not None:
            _cross_check(result, self.complain)
        return result

    def mapping(self, cls: type, node: yaml.MappingNode, path: str) -> Any:
        """Return a `cls`, or None if anything was wrong so far."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = _name(_value(key_node)), key_node.start_mark.line + 1
            first = self.lines.setdefault(path + key, line)
            if key not in fields:
                hint = _meant(key, fields) or f"known: {', '.join(fields)}"
                self.complain(path + key, "unknown key", hint, line)
            elif key in found:
                hint = f"first on line {first}; keep one"
                self.complain(path + key, "given twice", hint, line)
            else:
                found[key] = self.field(fields[key], value_node, path + key)
        for name, field in fields.items():
            if name not in found and field.default is dataclasses.MISSING:
                message = f"is missing; allowed: {field.metadata['kind'].expected}"
                self.complain(path + name, message, field.metadata["doc"])
        return None if self.problems else cls(**found)

    def field(self, field: dataclasses.Field[Any], node: yaml.Node, at: str) -> Any:
        kind = field.metadata["kind"]
        if not isinstance(kind, Kind):
            if isinstance(node, yaml.MappingNode):
                return self.mapping(kind, node, f"{at}.")
            kind = SECTION
        value = _value(node)
        if value is None and (kind is SECTION or field.default is None):
            return field.default  # `consul:` with everything below it commented out
        hint = kind.fault(value)
        if hint is not None:
            self.complain(at, f"found {_shown(value)}; allowed: {kind.expected}", hint)
        if value is False and kind is OFF:  # a bare `off`
            return "off"
        return tuple(value) if isinstance(value, list) else value


def _cross_check(spec: Any, complain: Callable[[str, str, str], None]) -> None:
    """Rules that need more than one key."""
    consul: Consul = spec.consul
    agent: Agent = spec.agent
    if not spec.join and (spec.servers > 1 or getattr(spec, "role", "server") == "worker"):
        hint = "list their addresses or a DNS name"
        complain("join", "found nothing; the servers cannot be found", hint)
    if consul.archive and not consul.sha256:
        complain("consul.archive", "needs consul.sha256 beside it", f"sha256sum {consul.archive}")
    if consul.sha256 and not consul.archive:
        complain("consul.sha256", "needs consul.archive beside it", "name the file it belongs to")
    if bool(agent.url) != bool(agent.sha256):
        complain("agent", "url and sha256 go together", "give both or neither")
    if agent.url and agent.package:
        complain("agent", "both url and package are given", "keep one")
    if agent.index and not agent.package:
        complain("agent.index", "needs agent.package beside it", "name what to install from it")


def _meant(text: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, list(words), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _name(key: Any) -> str:
    """A key as the operator would recognise it, on one line."""
    return key if isinstance(key, str) and re.fullmatch(r"[\w.-]{1,60}", key) else _shown(key)


def _shown(value: Any) -> str:
    """A found value as the operator would recognise it: one line of at most 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if str(value).isprintable() else ascii(value)
    for cls, name in ((list, "a list"), (dict, "a mapping")):
        text = f"{name}: {text}" if isinstance(value, cls) else text
    return text if len(text) <= 60 else text[:57] + "..."


def dump(spec: Any) -> dict[str, Any]:
    """Return the spec as plain data that `parse` reads back to the same spec, defaults left out."""
    found = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value != field.default:
            plain = list(value) if isinstance(value, tuple) else value
            found[field.name] = dump(value) if dataclasses.is_dataclass(value) else plain
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `node.yaml`, made from the same table `load` reads by."""

    def of(cls: type) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            kind, default = field.metadata["kind"], field.default
            if not isinstance(kind, Kind):
                entry = {**of(kind), "type": ["object", "null"]}
            elif default is None:
                entry = {"anyOf": [kind.schema, {"type": "null"}]}
            elif default is dataclasses.MISSING:
                entry = {**kind.schema}
            else:
                plain = list(default) if isinstance(default, tuple) else default
                entry = {**kind.schema, "default": plain}
            properties[field.name] = {"description": field.metadata["doc"], **entry}
        result = {"type": "object", "additionalProperties": False, "properties": properties}
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        return {**result, "required": needed} if needed else result

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nodeagent node.yaml",
        **of(Spec),
    }
