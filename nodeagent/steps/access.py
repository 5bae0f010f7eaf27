"""Every node has a token of its own in Consul, and the cluster's current secrets.

A worker asks for its token: it makes one up, seals it for the servers, and puts it where the
token of its user-data may write. Any server admits a node whose name has no token yet and that is
a living member, with rights to its own node alone; from then on that name is taken. Secrets that
were rotated come the same way for everybody: from Consul, to which each node says how far it is.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from nodeagent import paths, secrets
from nodeagent.changes import (
    AskForToken,
    Change,
    PublishWorkerSecrets,
    PutPolicy,
    PutToken,
    UpdateRecord,
    WriteSecret,
)
from nodeagent.errors import Secret, SpecError
from nodeagent.host import Entry, Host, Member, Pki, Policy, Token
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.secrets import (
    ADMITTED,
    NodeTokens,
    Request,
    ServerSecrets,
    WorkerSecrets,
    request_id,
)
from nodeagent.spec import Spec
from nodeagent.steps.identity import NODE_NAME
from nodeagent.steps.secrets import Found, read

ANONYMOUS = "00000000-0000-0000-0000-000000000002"  # the token of whoever shows none
MANAGEMENT = "global-management"
# Consul's own descriptions of the token that it makes from `acl.tokens.master`, 1.8 and later.
MASTER = ("Master Token", "Initial Management Token")
EVERYBODY = (("node_prefix", "", "read"), ("service_prefix", "", "read"))
OURS = "nodeagent"  # what the descriptions of our tokens begin with
_NAMESPACE = uuid.UUID("6d1e3bd5-0a37-4f0c-9d4f-0d8e8f1c7a52")  # of accessors; means nothing


@dataclass(frozen=True)
class Keys:
    """Where in Consul's KV what stands; who may read and write there is said by the policies."""

    prefix: str

    @property
    def state(self) -> str:
        """The servers' secrets, once anything was rotated."""
        return f"{self.prefix}secrets/state"

    @property
    def for_workers(self) -> str:
        return f"{self.prefix}worker/secrets"

    def applied(self, node: str) -> str:
        """The serial of the secrets that this node uses."""
        return f"{self.prefix}nodes/{node}/secrets"

    def server(self, node: str) -> str:
        """There since this server first was one: gossip forgets who is away, and this does not."""
        return f"{self.prefix}servers/{node}"

    def first_request(self, node: str) -> str:
        return f"{self.prefix}enrol/{node}"

    def next_request(self, node: str) -> str:
        """Where a node asks for its next token: nobody else can write there."""
        return f"{self.prefix}nodes/{node}/token"


def policies(spec: Spec) -> tuple[Policy, ...]:
    """What everybody may read, which DNS needs; and what a new worker may do."""
    enrol = ("key_prefix", f"{spec.key_prefix}enrol/", "write")
    return (
        Policy(f"{OURS}-{spec.cluster}-everybody", EVERYBODY),
        Policy(f"{OURS}-{spec.cluster}-enrolment", (*EVERYBODY, enrol)),
    )


def node_policy(spec: Spec, node: str) -> Policy:
    """What a worker may do: be itself, and read what is there for workers."""
    rules = (
        *EVERYBODY,
        ("agent", node, "write"),
        ("node", node, "write"),
        ("session", node, "write"),
        ("service", "nodeagent", "write"),
        ("service", "docker-engine", "write"),
        ("key_prefix", f"{spec.key_prefix}worker/", "read"),
        ("key_prefix", f"{spec.key_prefix}nodes/{node}/", "write"),
        ("key", f"{spec.key_prefix}engine-restart", "write"),
    )
    return Policy(f"{OURS}-{spec.cluster}-node-{node}", rules)


def shared_tokens(spec: Spec, found: ServerSecrets, pki: Pki) -> tuple[Token, ...]:
    """The tokens that derive from the secrets, but for the one in use: that one Consul makes."""
    enrolment = f"{OURS}-{spec.cluster}-enrolment"
    made = []
    for seed in found.seeds("tokens"):
        generation = secrets.generation(pki, seed)
        kinds = [("enrolment", enrolment)]
        if seed != found.seeds("tokens")[0] and found.phase == "spread":
            kinds.append(("server", MANAGEMENT))
        for kind, policy in kinds:
            secret = secrets.token(pki, seed, f"{kind} token")
            description = f"{OURS} {generation} {kind}"
            made.append(Token(accessor(spec, description), (policy,), description, secret))
    return tuple(made)


def accessor(spec: Spec, description: str) -> str:
    """The name of a token: the same on every server, so that it is made only once."""
    return str(uuid.uuid5(_NAMESPACE, f"{spec.cluster} {description}"))


def stale(
    spec: Spec, found: ServerSecrets, pki: Pki, tokens: Mapping[str, Token]
) -> Iterator[Token]:
    """Tokens that derive from seeds that are no longer accepted, or that were asked for then."""
    generations = {secrets.generation(pki, seed) for seed in found.seeds("tokens")}
    # The one that Consul made itself is the old one, if ours in use is another.
    ours = {accessor(spec, f"{OURS} {generation} server") for generation in generations}
    was_replaced = len(ours) == 1 and ours <= set(tokens)
    for token in tokens.values():
        words = token.description.split()
        is_ours = len(words) >= 3 and words[0] == OURS
        is_first = token.description in MASTER and token.policies == (MANAGEMENT,)
        if (is_ours and words[1] not in generations) or (is_first and was_replaced):
            yield token


@dataclass(frozen=True)
class Seen:
    node: str
    found: Found | None = None  # None where security is off
    entries: Mapping[str, Entry] = field(default_factory=dict)
    own: NodeTokens | None = None
    is_applied: bool = False  # Consul and this program use the secrets and tokens that are here
    newer: Secret | None = None  # a later text of the secrets, from Consul
    problem: str = ""  # with that text
    members: tuple[Member, ...] = ()
    tokens: Mapping[str, Token] = field(default_factory=dict)
    unsealed: Mapping[str, Secret] = field(default_factory=dict)  # by the request's key


def observe(spec: Spec, host: Host) -> Seen:
    node, keys = host.network.hostname(), Keys(spec.key_prefix)
    if not spec.is_secured:
        return Seen(node)
    found, own = read(spec, host)
    token = secrets.own_token(found.keys, own, node)
    shown = _serial_and_token(host.files.read(paths.CONSUL_TOKENS))
    entries = host.consul.get(spec.key_prefix)
    seen = Seen(
        node,
        found,
        entries,
        own,
        is_applied=shown == (found.secrets.serial, token or found.keys.enrolment)
        and not host.files.exists(paths.CONSUL_RELOAD_PENDING),
    )
    place = keys.state if spec.is_server else keys.for_workers
    if place in entries:
        try:
            later = secrets.parse(entries[place].value, f"Consul's {place}", spec.role, host.pki)
        except SpecError as error:
            return replace(seen, problem=error.sentence)
        if later.serial > found.secrets.serial:
            return replace(seen, newer=secrets.dump(later))
    if not isinstance(found.secrets, ServerSecrets):
        return seen
    unsealed = {}
    for key, _, request in _requests(keys, entries):
        for seed in found.secrets.seeds("ca"):
            if text := host.pki.unseal(seed, request.sealed):
                unsealed[key] = text
    return replace(
        seen, members=host.consul.members(), tokens=host.consul.tokens(), unsealed=unsealed
    )


def _serial_and_token(text: str | None) -> tuple[int, Secret] | None:
    """Of secrets that were written down; None for any other text."""
    try:
        data = json.loads(text or "")
        return int(data["serial"]), Secret(str(data.get("token", "")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.found is None:
        return done("security is off: whoever reaches Consul may do everything there")
    assert seen.own is not None
    keys = Keys(spec.key_prefix)
    if seen.problem:
        place = keys.state if spec.is_server else keys.for_workers
        return block(
            seen.problem, fix=f"consul kv delete {place}, on a server: its own file counts"
        )
    if seen.newer is not None:
        return change(WriteSecret(paths.SECRETS, seen.newer))
    found = seen.found.secrets
    if isinstance(found, WorkerSecrets) and found.generation not in seen.own.tokens:
        return wait("a new token of this node's own to be made")
    if isinstance(found, WorkerSecrets) and seen.own.in_use != found.generation:
        return _ask(seen, keys, found, seen.own)
    if not seen.is_applied:
        return wait("Consul to use this node's new keys")
    changes: list[Change] = []
    if isinstance(found, ServerSecrets):
        place = keys.server(seen.node)
        if place not in seen.entries:
            why = "keep this server's name from others"
            changes.append(UpdateRecord(place, seen.node, 0, why))
        changes += _answers(spec, seen, keys)
        entry = seen.entries.get(keys.for_workers)
        published = _serial_and_token(entry.value if entry else None) or (0, None)
        if found.serial > published[0]:
            index = entry.index if entry else 0
            changes.append(PublishWorkerSecrets(keys.for_workers, found, spec, index))
    applied = seen.entries.get(keys.applied(seen.node))
    if found.serial and (applied is None or applied.value != str(found.serial)):
        index = applied.index if applied else 0
        why = f"tell the cluster that this node uses its secrets no. {found.serial}"
        changes.append(UpdateRecord(keys.applied(seen.node), str(found.serial), index, why))
    if changes:
        return change(*changes)
    if not spec.is_server:
        return done("this node has its own token in Consul")
    nodes = sum(token.description.split()[2:3] == ["node"] for token in seen.tokens.values())
    return done(f"servers may do everything in Consul; workers with a token: {nodes}")


def _ask(seen: Seen, keys: Keys, found: WorkerSecrets, own: NodeTokens) -> Plan:
    """Get a token for this node, with that of the user-data or with the one it has had so far."""
    token = own.tokens[found.generation]
    key = keys.next_request(seen.node) if own.in_use else keys.first_request(seen.node)
    entry = seen.entries.get(key)
    request = Request.parse(entry.value if entry else None)
    if request is None or request.id != request_id(token):
        asked = Request(request_id(token), found.generation, "")
        index = entry.index if entry else 0
        return change(AskForToken(key, asked, token, found.authorities[-1], index))
    if request.answer == ADMITTED:
        admitted = NodeTokens(own.recovery, {found.generation: token}, found.generation)
        return change(WriteSecret(paths.NODE_TOKEN, admitted.dump()))
    if request.answer:
        return block(f"the servers do not admit this node: {request.answer}", fix=_READMIT)
    return wait("a server to admit this node to Consul")


_READMIT = (
    "if it was rebuilt under its old name: nodeagent secrets forget NAME, on a server; else give "
    "it a name of its own, or newer user-data"
)


_REQUEST = re.compile(r"enrol/([^/]+)|nodes/([^/]+)/token")


def _requests(keys: Keys, entries: Mapping[str, Entry]) -> Iterator[tuple[str, str, Request]]:
    """Requests that are not granted yet: key, node, request."""
    for key, entry in entries.items():
        match = _REQUEST.fullmatch(key[len(keys.prefix) :])
        request = Request.parse(entry.value)
        if match and request and request.answer != ADMITTED:
            yield key, match[1] or match[2], request


def _answers(spec: Spec, seen: Seen, keys: Keys) -> Iterator[Change]:
    for key, node, request in _requests(keys, seen.entries):
        name = f"{OURS} {request.generation} node {node}"
        description = f"{name} {request.id}"
        answer: str | None = ADMITTED
        changes: list[Change] = []
        held = seen.tokens.get(accessor(spec, name))
        if held is None or held.description != description:
            answer = _refusal(seen, keys, key, node, request, is_taken=held is not None)
            if answer is None:
                continue
            if answer == ADMITTED:
                policy = node_policy(spec, node)
                secret = secrets.node_token(seen.unsealed[key], node)
                token = Token(accessor(spec, name), (policy.name,), description, secret)
                changes = [PutPolicy(policy), PutToken(token)]
        if answer != request.answer:
            value = replace(request, answer=answer or "").dump()
            why = f"admit {node}" if answer == ADMITTED else f"refuse {_name(node)}: {answer}"
            yield from changes
            yield UpdateRecord(key, value, seen.entries[key].index, why)


def _name(node: str) -> str:
    """A node's name as the log can take it: what is asked under others is anybody's text."""
    return node if re.fullmatch(NODE_NAME, node) else "a request"


def _refusal(
    seen: Seen, keys: Keys, key: str, node: str, request: Request, *, is_taken: bool
) -> str | None:
    """Why a request is refused; ADMITTED when it is not; None when that cannot be said yet."""
    assert seen.found is not None
    if not re.fullmatch(NODE_NAME, node):
        return "its name is none that a node can have"
    is_first = key == keys.first_request(node)
    names = (token.description.split() for token in seen.tokens.values())
    has_one = any(words[2:4] == ["node", node] for words in names)
    if is_taken or (is_first and has_one):
        return f"a machine named {node} has a token already"
    if request.generation not in seen.found.generations:
        return "its user-data is older than the last rotation of the tokens"
    member = next((each for each in seen.members if each.name == node and each.alive), None)
    if member is None:
        return None
    if member.server or keys.server(node) in seen.entries:
        return f"{node} is the name of a server"
    if key not in seen.unsealed:
        return "it asks the servers of another cluster"
    return ADMITTED


STEP = Step("access", requires=("quorum",), observe=observe, diff=diff)
