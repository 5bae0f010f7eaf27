"""A node's secrets (`secrets.json`): a cluster key on servers, what workers need of it on workers.

Everything a cluster's nodes share derives from seeds, one for each purpose; before anything is
rotated, the cluster key is the seed of all three. While one is rotated it has two seeds: the first
is in use, the other is accepted as well, already or still.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nodeagent.errors import HostError, Problem, Secret, SpecError
from nodeagent.host import Files, Pki
from nodeagent.spec import Cluster, Role

Purpose = Literal["gossip", "tokens", "ca"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
ADMITTED = "admitted"
WORKER_LIFETIME_S = 20 * 365 * 86400.0  # as long as the CA: it only tells members from strangers


@dataclass(frozen=True)
class ServerSecrets:
    """What a server has."""

    cluster_key: Secret
    authorities: tuple[str, ...]  # CA certificates in PEM, in the order of the CA's seeds
    rotated: Mapping[str, tuple[Secret, ...]]  # seeds by purpose, where not the cluster key
    serial: int = 0  # grows with each step of a rotation
    rotating: str = ""  # the purpose that has two seeds
    phase: str = ""  # of its rotation: spread (the second is the new one) | switched

    def seeds(self, purpose: Purpose) -> tuple[Secret, ...]:
        return self.rotated.get(purpose, (self.cluster_key,))


@dataclass(frozen=True)
class WorkerSecrets:
    """What a worker has: enough to be a member, nothing to make other members or rules with."""

    gossip_key: Secret
    authorities: tuple[str, ...]
    certificate: Secret  # a client's, with its key; the same on all workers
    enrolment: Secret  # the token with which a new worker asks for one of its own
    generation: str  # of the tokens: a new one asks for new tokens
    serial: int = 0


Secrets = ServerSecrets | WorkerSecrets


def new(pki: Pki, now: float) -> ServerSecrets:
    """Secrets of a new cluster."""
    key = pki.seed()
    return ServerSecrets(key, (pki.authority(key, now),), {})


def for_workers(server: ServerSecrets, cluster: Cluster, pki: Pki, now: float) -> WorkerSecrets:
    """What workers of the same cluster are given."""
    names = (f"worker.{cluster.datacenter}.{cluster.domain}",)
    newest = newest_seed(server)
    return WorkerSecrets(
        gossip_key=gossip_key(pki, server.seeds("gossip")[0]),
        authorities=server.authorities,
        certificate=pki.issue(
            server.seeds("ca")[0], server.authorities[0], names, WORKER_LIFETIME_S, now
        ),
        enrolment=token(pki, newest, "enrolment token"),
        generation=generation(pki, newest),
        serial=server.serial,
    )


def newest_seed(server: ServerSecrets) -> Secret:
    """The tokens' seed that is or will be in use."""
    seeds = server.seeds("tokens")
    return seeds[-1] if server.phase == "spread" else seeds[0]


def gossip_key(pki: Pki, seed: Secret) -> Secret:
    return Secret(base64.b64encode(pki.derive(seed, "gossip")).decode())


def token(pki: Pki, seed: Secret, kind: str) -> Secret:
    return Secret(str(uuid.UUID(bytes=pki.derive(seed, kind, 16))))


def generation(pki: Pki, seed: Secret) -> str:
    """A public name of the tokens that derive from `seed`."""
    return pki.derive(seed, "generation", 4).hex()


@dataclass(frozen=True)
class Keys:
    """What derives from a node's secrets."""

    gossip: tuple[Secret, ...]  # all that are accepted; the first is in use
    enrolment: Secret
    generation: str
    server_token: Secret | None = None  # a server's, with which it may do everything in Consul


def keys(secrets: Secrets, pki: Pki) -> Keys:
    """Derive what this node uses."""
    if isinstance(secrets, WorkerSecrets):
        return Keys((secrets.gossip_key,), secrets.enrolment, secrets.generation)
    newest = newest_seed(secrets)
    return Keys(
        gossip=tuple(gossip_key(pki, seed) for seed in secrets.seeds("gossip")),
        enrolment=token(pki, newest, "enrolment token"),
        generation=generation(pki, newest),
        server_token=token(pki, secrets.seeds("tokens")[0], "server token"),
    )


@dataclass(frozen=True)
class NodeTokens:
    """What a node makes for itself: tokens that no other has."""

    recovery: Secret  # for the local agent's own API; the one that works without a leader
    tokens: Mapping[str, Secret]  # a worker's in Consul, by generation
    in_use: str = ""  # the generation of the one that servers have admitted

    @classmethod
    def parse(cls, text: str) -> NodeTokens:
        """Raises ValueError, TypeError, AttributeError or KeyError for any other text."""
        data = json.loads(text)
        tokens = {str(name): Secret(str(value)) for name, value in data["tokens"].items()}
        if data["in_use"] not in ("", *tokens):
            raise ValueError("in_use")
        return cls(Secret(str(data["recovery"])), tokens, str(data["in_use"]))

    def dump(self) -> Secret:
        tokens = {name: token.reveal() for name, token in self.tokens.items()}
        data = {"recovery": self.recovery.reveal(), "tokens": tokens, "in_use": self.in_use}
        return Secret(json.dumps(data) + "\n")


@dataclass(frozen=True)
class Request:
    """A worker's request for a token of its own, and what the servers say to it."""

    id: str  # a digest of the token
    generation: str
    sealed: str
    answer: str = ""  # "admitted", or why not

    @classmethod
    def parse(cls, text: str | None) -> Request | None:
        """None for what is not one: anybody with a token of the user-data can write there."""
        try:
            data = json.loads(text or "")
            values = [data[name] for name in ("id", "generation", "sealed", "answer")]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        right = all(isinstance(each, str) and each.isprintable() for each in values)
        return cls(*values) if right and " " not in values[0] + values[1] else None

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def node_token(made_up: Secret, node: str) -> Secret:
    """A node's token in Consul: what it made up, so that under another name it is another."""
    digest = hashlib.sha256(f"nodeagent 1 {node} {made_up.reveal()}".encode()).digest()
    return Secret(str(uuid.UUID(bytes=digest[:16])))


def own_token(keys: Keys, own: NodeTokens, node: str) -> Secret | None:
    """The token in Consul that is this node's; None on a worker that has none yet."""
    if keys.server_token or not own.in_use:
        return keys.server_token
    return node_token(own.tokens[own.in_use], node)


def request_id(token: Secret) -> str:
    return hashlib.sha256(token.reveal().encode()).hexdigest()[:16]


def dump(secrets: Secrets) -> Secret:
    """Return the file's text, which `parse` reads back to the same secrets."""
    if isinstance(secrets, WorkerSecrets):
        data: dict[str, Any] = {
            "gossip_key": secrets.gossip_key.reveal(),
            "enrolment": secrets.enrolment.reveal(),
            "generation": secrets.generation,
            "certificate": secrets.certificate.reveal(),
        }
    else:
        data = {"cluster_key": secrets.cluster_key.reveal()}
        if secrets.rotated:
            data["rotated"] = {
                purpose: [seed.reveal() for seed in seeds]
                for purpose, seeds in secrets.rotated.items()
            }
        if secrets.rotating:
            data |= {"rotating": secrets.rotating, "phase": secrets.phase}
    data |= {"authorities": list(secrets.authorities), "serial": secrets.serial}
    return Secret(json.dumps(data, indent=1) + "\n")


def load(file: Path, role: Role, files: Files, pki: Pki) -> Secrets:
    """Read a file with the secrets of a server or a worker.

    Raises SpecError when it is not there, open to others, or wrong.
    """
    if files.is_private(file):
        return parse(files.read(file) or "", str(file), role, pki)
    message = "there is no such file"
    hint = "nodeagent secrets new makes a cluster's, user-data --secrets brings it to its machines"
    if files.exists(file):
        message = "others can read or change it; it must be a file of yours or root's with mode 600"
        hint = f"chmod 600 {file}"
    raise SpecError((Problem(str(file), None, "", message, hint),))


def parse(text: str, file: str, role: Role, pki: Pki) -> Secrets:
    """Read the secrets of a server or a worker.

    Raises SpecError, which names what is wrong and never a value.
    """
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise _Wrong("", "holds no JSON object")
        if role == "worker" and ("cluster_key" in data or "rotated" in data):
            raise _Wrong(
                "cluster_key",
                "is the cluster's key, which no worker may have",
                "give this machine what `nodeagent user-data --role worker` writes",
            )
        if role == "server" and "cluster_key" not in data and "gossip_key" in data:
            raise _Wrong("", "holds a worker's secrets", "a server needs the cluster key")
        secrets = _server(data) if role == "server" else _worker(data)
        _check_certificates(secrets, pki)
    except json.JSONDecodeError as error:
        problem = Problem(file, error.lineno, "", f"is not JSON: {error.msg}", _MAKE)
    except RecursionError:
        problem = Problem(file, None, "", "is nested too deeply", _MAKE)
    except _Wrong as wrong:
        problem = Problem(file, None, wrong.path, wrong.message, wrong.hint)
    else:
        return secrets
    raise SpecError((problem,)) from None


class _Wrong(Exception):
    def __init__(self, path: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.path, self.message, self.hint = path, message, hint or _MAKE


_MAKE = "it is made by `nodeagent secrets new`, and for machines by `nodeagent user-data`"


def _server(data: Mapping[str, Any]) -> ServerSecrets:
    known = {"cluster_key", "authorities", "serial", "rotated", "rotating", "phase"}
    _no_others(data, known)
    rotated = data.get("rotated", {})
    if not isinstance(rotated, dict) or set(rotated) - set(PURPOSES):
        raise _Wrong("rotated", f"is not a mapping of {', '.join(PURPOSES)} to lists of keys")
    secrets = ServerSecrets(
        cluster_key=_key("cluster_key", data.get("cluster_key")),
        authorities=_texts(data, "authorities"),
        rotated={
            purpose: tuple(_key(path, seed) for seed in _list(seeds, path))
            for purpose, seeds in rotated.items()
            for path in [f"rotated.{purpose}"]
        },
        serial=_serial(data),
        rotating=_text(data, "rotating", ""),
        phase=_text(data, "phase", ""),
    )
    has_two = {purpose for purpose in PURPOSES if len(secrets.seeds(purpose)) == 2}
    if has_two != ({secrets.rotating} - {""}) or (
        secrets.phase not in (("spread", "switched") if secrets.rotating else ("",))
    ):
        raise _Wrong("rotated", "does not fit to rotating and phase")
    return secrets


def _worker(data: Mapping[str, Any]) -> WorkerSecrets:
    known = {"gossip_key", "enrolment", "generation", "certificate", "authorities", "serial"}
    _no_others(data, known)
    return WorkerSecrets(
        gossip_key=_key("gossip_key", data.get("gossip_key")),
        authorities=_texts(data, "authorities"),
        certificate=Secret(_text(data, "certificate")),
        enrolment=Secret(_text(data, "enrolment")),
        generation=_text(data, "generation"),
        serial=_serial(data),
    )


def _check_certificates(secrets: Secrets, pki: Pki) -> None:
    path = "authorities"
    try:
        for each in secrets.authorities:
            pki.certificates(each)
        if isinstance(secrets, ServerSecrets):
            seeds = secrets.seeds("ca")
            if len(seeds) != len(secrets.authorities) or not all(
                map(pki.matches, seeds, secrets.authorities)
            ):
                raise _Wrong("authorities", "are not of this cluster key")
        else:
            own, path = secrets.certificate.reveal(), "certificate"
            pki.certificates(own)
            if not any(pki.is_signed(own, authority) for authority in secrets.authorities):
                raise _Wrong("certificate", "is not signed by one of authorities")
    except HostError as error:
        raise _Wrong(path, f"cannot be read: {error.cause}") from None


def _no_others(data: Mapping[str, Any], known: set[str]) -> None:
    for key in data:
        if key not in known:
            raise _Wrong(key if re.fullmatch(r"\w{1,40}", key) else "", "unknown key")


def _key(path: str, value: Any) -> Secret:
    try:
        if isinstance(value, str) and len(base64.b64decode(value, validate=True)) == 32:
            return Secret(value)
    except (ValueError, binascii.Error):
        pass
    what = "is missing" if value is None else "is not 32 bytes in base64"
    raise _Wrong(path, what)


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise _Wrong(path, "is not a list of one or two")
    return value


def _texts(data: Mapping[str, Any], path: str) -> tuple[str, ...]:
    found = _list(data.get(path), path)
    if not all(isinstance(each, str) for each in found):
        raise _Wrong(path, "is not a list of texts")
    return tuple(found)


def _text(data: Mapping[str, Any], path: str, default: str | None = None) -> str:
    value = data.get(path, default)
    if not isinstance(value, str) or (default is None and not value):
        raise _Wrong(path, "is missing" if value is None else "is not a text")
    return value


def _serial(data: Mapping[str, Any]) -> int:
    value = data.get("serial", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _Wrong("serial", "is not a whole number")
    return value
