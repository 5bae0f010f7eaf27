"""The spec (`node.yaml`): read strictly, or refused with every mistake named where it stands."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nodeagent.errors import Problem, SpecError

Role = Literal["server", "worker"]
T = TypeVar("T")

_SCALARS = ("bool", "float", "int", "null")

# What a provider takes as user-data, of which the spec is a part. A real one has a few hundred.
LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Kind:
    """How one value is read: `read` returns the typed value or raises ValueError saying why not."""

    read: Callable[[Any], Any]
    expected: str
    schema: Mapping[str, Any]


def _string(pattern: str, expected: str) -> Kind:
    def read(value: Any) -> str:
        if isinstance(value, (bool, int, float)):
            raise ValueError("put it in quotes")
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Kind(read, expected, {"type": "string", "pattern": f"^(?:{pattern})$"})


def _integer(low: int, high: int) -> Kind:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value):
            raise ValueError("leave out the quotes")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Kind(read, f"a whole number from {low} to {high}", schema)


def _one_of(*words: str) -> Kind:
    def read(value: Any) -> str:
        if value not in words:
            close = difflib.get_close_matches(str(value), words, n=1)
            raise ValueError(f"did you mean {close[0]}?" if close else "")
        return str(value)

    return Kind(read, " or ".join(words), {"enum": list(words)})


def _off() -> Kind:
    def read(value: Any) -> str:
        if value is not False and value != "off":  # YAML 1.1 reads a bare `off` as false
            raise ValueError("secured clusters come with a later version")
        return "off"

    return Kind(read, "off", {"enum": ["off", False]})


def _list_of(item: Kind, expected: str) -> Kind:
    def read(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            raise ValueError(f"for a single one: [{_shown(value)}]")
        if not isinstance(value, list):
            raise ValueError
        for entry in value:
            try:
                item.read(entry)
            except ValueError as error:
                raise ValueError(f"{_shown(entry)} is not {item.expected}") from error
        return tuple(value)

    return Kind(read, expected, {"type": "array", "items": dict(item.schema)})


def _address() -> Kind:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        if re.fullmatch(r"[0-9./]+", value):
            try:
                network = ipaddress.IPv4Network(value, strict=False)
            except ValueError:
                raise ValueError("no such IPv4 address or network exists") from None
            if network.prefixlen == 0 or not _is_reachable(network):
                raise ValueError("other machines cannot reach that")
        elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.@-]{0,14}", value):
            raise ValueError
        return value

    expected = "an IPv4 address, a network such as 10.10.0.0/16, or an interface name"
    return Kind(read, expected, {"type": "string", "minLength": 1})


def _is_reachable(network: ipaddress.IPv4Network) -> bool:
    return not (network.is_loopback or network.is_multicast or network.is_unspecified)


_IPV4 = r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(?!$)|$)){4}"
_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST = rf"(?![0-9.]+$)(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?"
NAME = _string(
    r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", "up to 40 lower-case letters, digits and inner dashes"
)
DOMAIN = _string(r"[a-z0-9-]+(\.[a-z0-9-]+)*", "a DNS domain in lower case, such as consul")
JOIN = _list_of(
    _string(rf"provider=.+|{_IPV4}|{_HOST}", "an address, a DNS name or provider=…"),
    "a list of addresses, DNS names, or Consul cloud auto-join strings (provider=…)",
)
IMAGE = _string(r"[a-z0-9][A-Za-z0-9_./:@-]*", "an image reference such as hashicorp/consul:1.21")
LOCATION = _string(r"(https?://\S+|/\S+)", "an absolute path, or an http(s) URL")
SHA256 = _string(r"[0-9a-f]{64}", "64 hexadecimal digits, as sha256sum prints them")
SIZE = _string(r"[1-9][0-9]*[kmg]", "a size such as 10m")
REQUIREMENT = _string(
    r"[A-Za-z0-9][A-Za-z0-9_.\[\]=<>!~, +-]*", "a pip requirement such as nodeagent==1.0"
)


def _key(kind: Kind, doc: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc})


def _section(cls: type, doc: str) -> Any:
    return dataclasses.field(default_factory=cls, metadata={"section": cls, "doc": doc})


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

    log: Log | None = dataclasses.field(
        default=None,
        metadata={
            "section": Log,
            "doc": "log driver and rotation; left out, 10 files of 10m, "
            "unless the Engine's own configuration names a driver",
        },
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
    address: str = _key(
        _address(),
        "where this node is in the cluster's network",
    )
    join: tuple[str, ...] = _key(
        JOIN,
        "where the servers are: addresses, DNS names (SRV or A), or Consul cloud auto-join strings",
        (),
    )
    domain: str = _key(DOMAIN, "Consul's DNS domain", "consul")
    datacenter: str = _key(NAME, "Consul's datacenter", "dc1")
    security: Literal["off"] = _key(
        _off(), "this version neither encrypts nor authenticates inside the cluster"
    )
    consul: Consul = _section(Consul, "Consul")
    swarm: Swarm = _section(Swarm, "Swarm")
    engine: Engine = _section(Engine, "the Docker Engine")
    agent: Agent = _section(Agent, "how new machines get nodeagent (used by user-data only)")

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


def load(path: Path, as_: type[T]) -> T:
    """Read a `Spec` or `Cluster` from a YAML file.

    Raises SpecError with every problem found, each with its line.
    """

    def refuse(message: str, hint: str = "") -> SpecError:
        return SpecError((Problem(str(path), None, "", message, hint),))

    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise refuse(
            "there is no such file", "write one; nodeagent schema lists the keys"
        ) from None
    except IsADirectoryError:
        raise refuse("is a directory, not a file") from None
    except PermissionError:
        raise refuse("cannot be read", "use sudo") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 text (byte {error.start})") from None
    if len(data) > LIMIT_BYTES:
        raise refuse(f"is larger than {LIMIT_BYTES} bytes; a spec has a few hundred")
    return parse(text, str(path), as_)


def parse(text: str, file: str, as_: type[T]) -> T:
    """Read a `Spec` or `Cluster` from YAML text; `file` is the name to complain about."""
    reader = _Reader(file)
    try:
        result = _parse(reader, text, as_)
    except RecursionError:
        reader.problems.clear()
        reader.complain("", None, "is nested too deeply; a spec has three levels")
    if reader.problems:
        raise SpecError(tuple(reader.problems))
    return typing.cast(T, result)


def _parse(reader: _Reader, text: str, as_: type) -> Any:
    tree = reader.compose(text)
    if isinstance(tree, yaml.MappingNode):
        result = reader.mapping(as_, tree, "")
        if not reader.problems:
            _cross_check(result, reader)
        return result
    if not reader.problems:
        found = "is empty" if tree is None else f"holds {_shown(reader.value(tree))}"
        reader.complain("", None, f"{found}; a mapping of keys to values is needed")
    return None


class _NotPlainError(yaml.MarkedYAMLError):
    """It is YAML, of a kind that a spec has no use for."""


class _Loader(yaml.SafeLoader):
    """YAML without what a spec has no use for: anchors, tags, dates and merged mappings."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for what in ("anchor", "tag"):
            name = getattr(event, what, None)
            if name is not None:
                raise _NotPlainError(
                    problem=f"the {what} {name} has no place in a spec",
                    problem_mark=event.start_mark,
                )
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in _SCALARS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Reader:
    """Turns a YAML node tree into dataclasses, gathering problems as it goes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.lines: dict[str, int] = {}

    def complain(self, path: str, line: int | None, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, line, path, message, hint))

    def compose(self, text: str) -> yaml.Node | None:
        try:
            tree: yaml.Node | None = yaml.compose(text, _Loader)
            return tree
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            words = ", ".join(filter(None, (error.context, error.problem)))
            hint = "indent with spaces, not tabs" if "'\\t'" in words else ""
            if not isinstance(error, _NotPlainError):
                words = f"is not YAML: {words}"
            self.complain("", mark.line + 1 if mark else None, words, hint)
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            found = _shown(chr(error.character))
            self.complain("", line, f"is not YAML: {found} is a character it does not allow")
        return None

    def value(self, node: yaml.Node) -> Any:
        """Return what a node means: a scalar, or a list or dict of such values."""
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {_name(self.value(key)): self.value(item) for key, item in node.value}
        try:
            return yaml.constructor.SafeConstructor().construct_document(node)
        except ValueError:  # a number that is too long for Python
            return node.value

    def mapping(self, cls: type, node: yaml.MappingNode, path: str) -> Any:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        found: dict[str, Any] = {}
        wrong = False
        for key_node, value_node in node.value:
            key, line = _name(self.value(key_node)), key_node.start_mark.line + 1
            at = f"{path}.{key}" if path else key
            self.lines.setdefault(at, line)
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
                self.complain(at, line, "unknown key", hint)
            elif key in found:
                first = self.lines[at]
                self.complain(at, line, "given twice", f"first on line {first}; keep one")
            else:
                found[key] = self.field(fields[key], hints[key], value_node, at, line)
        for name, field in fields.items():
            has_default = (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            )
            if name not in found and not has_default:
                kind: Kind = field.metadata["kind"]
                wrong = True
                self.complain(
                    f"{path}.{name}" if path else name,
                    None,
                    f"is missing; allowed: {kind.expected}",
                    field.metadata["doc"],
                )
        if wrong or any(value is dataclasses.MISSING for value in found.values()):
            return None
        return cls(**found)

    def field(
        self, field: dataclasses.Field[Any], hint: Any, node: yaml.Node, at: str, line: int
    ) -> Any:
        section = field.metadata.get("section")
        if section is not None and isinstance(node, yaml.MappingNode):
            result = self.mapping(section, node, at)
            return dataclasses.MISSING if result is None else result
        value = self.value(node)
        if section is not None:
            if value is None:  # `consul:` with everything below it commented out
                return _default(field)
            self.complain(at, line, f"found {_shown(value)}; allowed: a mapping of keys to values")
            return dataclasses.MISSING
        kind: Kind = field.metadata["kind"]
        if value is None and type(None) in typing.get_args(hint):
            return None
        try:
            return kind.read(value)
        except ValueError as error:
            message = f"found {_shown(value)}; allowed: {kind.expected}"
            self.complain(at, line, message, str(error))
            return dataclasses.MISSING


def _cross_check(spec: Any, reader: _Reader) -> None:
    """Rules that need more than one key."""

    def complain(path: str, message: str, hint: str) -> None:
        reader.complain(path, reader.lines.get(path), message, hint)

    if not spec.join and (spec.servers > 1 or getattr(spec, "role", "server") == "worker"):
        complain(
            "join",
            "found nothing; the servers cannot be found",
            "list their addresses or a DNS name",
        )
    consul: Consul = spec.consul
    if consul.archive and not consul.sha256:
        complain("consul.archive", "needs consul.sha256 beside it", f"sha256sum {consul.archive}")
    if consul.sha256 and not consul.archive:
        complain("consul.sha256", "needs consul.archive beside it", "name the file it belongs to")
    agent: Agent = spec.agent
    if bool(agent.url) != bool(agent.sha256):
        complain("agent", "url and sha256 go together", "give both or neither")
    if agent.url and agent.package:
        complain("agent", "both url and package are given", "keep one")
    if agent.index and not agent.package:
        complain("agent.index", "needs agent.package beside it", "name what to install from it")


def _name(key: Any) -> str:
    """A key as the operator would recognise it, on one line."""
    return key if isinstance(key, str) and re.fullmatch(r"[\w.-]{1,60}", key) else _shown(key)


def _shown(value: Any) -> str:
    """A found value as the operator would recognise it: one line of at most 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    kind = (
        "a list: " if isinstance(value, list) else "a mapping: " if isinstance(value, dict) else ""
    )
    text = kind + (ascii(value) if not str(value).isprintable() else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def dump(spec: Cluster) -> dict[str, Any]:
    """Return the spec as plain data that `parse` reads back to the same spec, defaults left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pairs = {
                field.name: getattr(value, field.name)
                for field in dataclasses.fields(value)
                if getattr(value, field.name) != _default(field)
            }
            return {name: plain(item) for name, item in pairs.items()}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast("dict[str, Any]", plain(spec))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `node.yaml`, made from the same table `load` reads by."""

    def of(cls: type) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        required = []
        for field in dataclasses.fields(cls):
            section = field.metadata.get("section")
            entry = of(section) if section else dict(field.metadata["kind"].schema)
            default = _default(field)
            if section:
                entry["type"] = ["object", "null"]
            elif default is None:
                entry = {"anyOf": [entry, {"type": "null"}]}
            if default is dataclasses.MISSING:
                required.append(field.name)
            elif not section and default is not None:
                entry["default"] = list(default) if isinstance(default, tuple) else default
            properties[field.name] = {"description": field.metadata["doc"], **entry}
        result = {"type": "object", "additionalProperties": False, "properties": properties}
        return {**result, "required": required} if required else result

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nodeagent node.yaml",
        **of(Spec),
    }
