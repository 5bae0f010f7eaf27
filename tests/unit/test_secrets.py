"""The secrets file: read back as written; what is wrong is one sentence, and shows no secret."""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from nodeagent import secrets
from nodeagent.errors import Exit, Secret, SpecError
from nodeagent.secrets import NodeTokens, Request, ServerSecrets, WorkerSecrets
from nodeagent.spec import Role
from tests.unit.fakes import NOW, PKI, make_spec, server_secrets, worker_secrets

SERVER, WORKER = server_secrets(), worker_secrets()
SPEC = make_spec()
OTHER = secrets.new(PKI, NOW)  # another cluster
NEW = OTHER.cluster_key
NEW_CA = OTHER.authorities[0]
Data = dict[str, Any]
MADE = "it is made by `nodeagent secrets new`, and for machines by `nodeagent user-data`"


def rotating(purpose: secrets.Purpose, phase: str) -> ServerSecrets:
    """The servers' secrets in one phase of a rotation."""
    seeds = (SERVER.cluster_key, NEW) if phase == "spread" else (NEW, SERVER.cluster_key)
    authorities: tuple[str, ...] = (SERVER.authorities[0], NEW_CA)
    if purpose != "ca":
        authorities = SERVER.authorities
    elif phase == "switched":
        authorities = (NEW_CA, SERVER.authorities[0])
    return replace(
        SERVER,
        authorities=authorities,
        rotated={purpose: seeds},
        serial=7,
        rotating=purpose,
        phase=phase,
    )


ROTATED = replace(SERVER, rotated={"gossip": (NEW,), "tokens": (NEW,)}, serial=6)
PHASES = [
    pytest.param(rotating(purpose, phase), id=f"{purpose}-{phase}")
    for purpose in secrets.PURPOSES
    for phase in ("spread", "switched")
]


# -- what is written is read back


@pytest.mark.parametrize(
    "kept", [pytest.param(SERVER, id="new"), pytest.param(ROTATED, id="rotated"), *PHASES]
)
def test_a_servers_file_is_read_back(kept: ServerSecrets) -> None:
    assert secrets.parse(secrets.dump(kept).reveal(), "s.json", "server", PKI) == kept


@pytest.mark.parametrize(
    "kept", [pytest.param(SERVER, id="new"), pytest.param(ROTATED, id="rotated"), *PHASES]
)
def test_a_workers_file_is_read_back_and_holds_no_key_of_the_cluster(kept: ServerSecrets) -> None:
    made = secrets.for_workers(kept, SPEC, PKI, NOW)
    text = secrets.dump(made).reveal()
    assert secrets.parse(text, "s.json", "worker", PKI) == made
    assert made.serial == kept.serial
    keys = secrets.keys(kept, PKI)
    assert keys.server_token is not None
    seeds = [seed for purpose in secrets.PURPOSES for seed in kept.seeds(purpose)]
    for each in (kept.cluster_key, *seeds, keys.server_token):
        assert each.reveal() not in text
    assert made.authorities == kept.authorities


def test_a_new_cluster_has_one_key_for_everything() -> None:
    assert (SERVER.serial, SERVER.rotated, SERVER.phase) == (0, {}, "")
    assert {SERVER.seeds(purpose) for purpose in secrets.PURPOSES} == {(SERVER.cluster_key,)}
    assert secrets.new(PKI, NOW).cluster_key != secrets.new(PKI, NOW).cluster_key


# -- which key is in use when


@pytest.mark.parametrize(
    ("phase", "gossip", "token", "newest"),
    [
        pytest.param("spread", ["old", "new"], "old", "new", id="the-new-one-is-known-not-used"),
        pytest.param("switched", ["new", "old"], "new", "new", id="the-old-one-is-still-accepted"),
    ],
)
def test_keys_in_each_phase(phase: str, gossip: list[str], token: str, newest: str) -> None:
    seeds = {"old": SERVER.cluster_key, "new": NEW}
    found = secrets.keys(rotating("gossip", phase), PKI).gossip
    assert list(found) == [secrets.gossip_key(PKI, seeds[each]) for each in gossip]
    kept = rotating("tokens", phase)
    keys = secrets.keys(kept, PKI)
    assert keys.server_token == secrets.token(PKI, seeds[token], "server token")
    assert keys.enrolment == secrets.token(PKI, seeds[newest], "enrolment token")
    assert keys.generation == secrets.generation(PKI, seeds[newest])
    worker = secrets.for_workers(kept, SPEC, PKI, NOW)
    assert secrets.keys(worker, PKI) == replace(keys, server_token=None)


def test_a_workers_certificate_is_by_the_ca_in_use() -> None:
    for phase, authority in (("spread", SERVER.authorities[0]), ("switched", NEW_CA)):
        made = secrets.for_workers(rotating("ca", phase), SPEC, PKI, NOW)
        assert PKI.is_signed(made.certificate.reveal(), authority)
        assert PKI.certificates(made.certificate.reveal())[0].names == ("worker.dc1.consul",)


# -- what is wrong


def server_file(**changes: object) -> str:
    return changed(secrets.dump(SERVER), changes)


def worker_file(**changes: object) -> str:
    return changed(secrets.dump(WORKER), changes)


def changed(good: Secret, changes: dict[str, object]) -> str:
    """The good file with other values; one of None is left out."""
    data = json.loads(good.reveal()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not None})


CANARY = "Q0FOQVJZ"  # what no sentence may show


def values_of(text: str) -> Iterator[str]:
    """Everything in a file that a sentence must not repeat: pieces of its values."""
    for value in re.findall(r'"([^"]{8,})"', text):
        if not re.fullmatch(r"[a-z_]+", value):
            yield from (value[start : start + 8] for start in range(0, len(value) - 7, 4))


def sentence(text: str, role: Role) -> str:
    """The one sentence of what is wrong, which shows nothing of the file."""
    with pytest.raises(SpecError) as caught:
        secrets.parse(text, "s.json", role, PKI)
    assert caught.value.exit_code == Exit.BAD_SPEC
    assert len(caught.value.problems) == 1
    found = str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "or a traceback would show what was being read"
    assert "\n" not in found
    assert CANARY not in found
    assert not [piece for piece in values_of(text) if piece in found]
    return found


SHORT = "QUFB"
WRONG_SERVER = [
    pytest.param(f'["{CANARY}"]', f"s.json: holds no JSON object ({MADE})", id="a-list"),
    pytest.param(f'"{CANARY}"', f"s.json: holds no JSON object ({MADE})", id="the-key-alone"),
    pytest.param("null", f"s.json: holds no JSON object ({MADE})", id="null"),
    pytest.param("NaN", f"s.json: holds no JSON object ({MADE})", id="not-a-number"),
    pytest.param("{}", f"s.json: cluster_key: is missing ({MADE})", id="an-empty-object"),
    pytest.param(
        secrets.dump(WORKER).reveal(),
        "s.json: holds a worker's secrets (a server needs the cluster key)",
        id="a-workers-file",
    ),
    pytest.param(
        server_file(cluster_key=SHORT),
        f"s.json: cluster_key: is not 32 bytes in base64 ({MADE})",
        id="a-key-too-short",
    ),
    pytest.param(
        server_file(cluster_key=SERVER.cluster_key.reveal()[:-4] + "AAAAAAAA"),
        f"s.json: cluster_key: is not 32 bytes in base64 ({MADE})",
        id="a-key-too-long",
    ),
    pytest.param(
        server_file(cluster_key=SERVER.cluster_key.reveal()[:-1]),
        f"s.json: cluster_key: is not 32 bytes in base64 ({MADE})",
        id="a-key-without-its-last-letter",
    ),
    pytest.param(
        server_file(cluster_key="Zürich" + CANARY),
        f"s.json: cluster_key: is not 32 bytes in base64 ({MADE})",
        id="a-key-that-is-not-base64",
    ),
    pytest.param(
        server_file(cluster_key=7),
        f"s.json: cluster_key: is not 32 bytes in base64 ({MADE})",
        id="a-number-for-a-key",
    ),
    pytest.param(
        server_file(cluster_key=NEW.reveal()),
        f"s.json: authorities: are not of this cluster key ({MADE})",
        id="the-key-of-another-cluster",
    ),
    pytest.param(
        server_file(authorities=[NEW_CA]),
        f"s.json: authorities: are not of this cluster key ({MADE})",
        id="the-ca-of-another-cluster",
    ),
    pytest.param(
        server_file(authorities=[SERVER.authorities[0], NEW_CA]),
        f"s.json: authorities: are not of this cluster key ({MADE})",
        id="one-ca-too-many",
    ),
    pytest.param(
        server_file(authorities=None),
        f"s.json: authorities: is not a list of one or two ({MADE})",
        id="no-ca",
    ),
    pytest.param(
        server_file(authorities=[]),
        f"s.json: authorities: is not a list of one or two ({MADE})",
        id="no-ca-in-the-list",
    ),
    pytest.param(
        server_file(authorities=SERVER.authorities[0]),
        f"s.json: authorities: is not a list of one or two ({MADE})",
        id="a-ca-without-a-list",
    ),
    pytest.param(
        server_file(authorities=[7]),
        f"s.json: authorities: is not a list of texts ({MADE})",
        id="a-number-for-a-ca",
    ),
    pytest.param(
        server_file(authorities=[CANARY]),
        f"s.json: authorities: cannot be read: it is not one in PEM form ({MADE})",
        id="junk-for-a-ca",
    ),
    pytest.param(
        server_file(serial=-1), f"s.json: serial: is not a whole number ({MADE})", id="below-zero"
    ),
    pytest.param(
        server_file(serial=True), f"s.json: serial: is not a whole number ({MADE})", id="yes"
    ),
    pytest.param(
        server_file(serial=CANARY), f"s.json: serial: is not a whole number ({MADE})", id="a-word"
    ),
    pytest.param(
        server_file(clusterkey=CANARY),
        f"s.json: clusterkey: unknown key ({MADE})",
        id="a-typing-mistake",
    ),
    pytest.param(
        server_file(**{NEW.reveal(): 1}),
        f"s.json: unknown key ({MADE})",
        id="a-key-where-a-name-should-be",
    ),
    pytest.param(
        server_file(**{str(uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF)): 1}),
        f"s.json: unknown key ({MADE})",
        id="a-token-where-a-name-should-be",
    ),
    pytest.param(
        server_file(rotated=[CANARY]),
        f"s.json: rotated: is not a mapping of gossip, tokens, ca to lists of keys ({MADE})",
        id="rotated-is-no-mapping",
    ),
    pytest.param(
        server_file(rotated={CANARY: []}),
        f"s.json: rotated: is not a mapping of gossip, tokens, ca to lists of keys ({MADE})",
        id="rotated-for-something-else",
    ),
    pytest.param(
        server_file(rotated={"gossip": [SHORT]}),
        f"s.json: rotated.gossip: is not 32 bytes in base64 ({MADE})",
        id="a-rotated-key-too-short",
    ),
    pytest.param(
        server_file(rotated={"gossip": []}),
        f"s.json: rotated.gossip: is not a list of one or two ({MADE})",
        id="rotated-away",
    ),
    pytest.param(
        server_file(rotated={"gossip": [NEW.reveal()] * 3}),
        f"s.json: rotated.gossip: is not a list of one or two ({MADE})",
        id="three-keys",
    ),
    pytest.param(
        server_file(rotated={"gossip": [SERVER.cluster_key.reveal(), NEW.reveal()]}),
        f"s.json: rotated: does not fit to rotating and phase ({MADE})",
        id="two-keys-and-no-rotation",
    ),
    pytest.param(
        server_file(rotating="gossip", phase="spread"),
        f"s.json: rotated: does not fit to rotating and phase ({MADE})",
        id="a-rotation-without-its-keys",
    ),
    pytest.param(
        changed(secrets.dump(rotating("tokens", "spread")), {"rotating": "gossip"}),
        f"s.json: rotated: does not fit to rotating and phase ({MADE})",
        id="the-rotation-of-something-else",
    ),
    pytest.param(
        changed(secrets.dump(rotating("tokens", "spread")), {"phase": CANARY}),
        f"s.json: rotated: does not fit to rotating and phase ({MADE})",
        id="no-such-phase",
    ),
    pytest.param(
        changed(secrets.dump(rotating("tokens", "spread")), {"phase": None}),
        f"s.json: rotated: does not fit to rotating and phase ({MADE})",
        id="a-rotation-in-no-phase",
    ),
    pytest.param(
        changed(secrets.dump(rotating("tokens", "spread")), {"phase": 7}),
        f"s.json: phase: is not a text ({MADE})",
        id="a-number-for-a-phase",
    ),
    pytest.param(
        changed(
            secrets.dump(rotating("ca", "spread")), {"authorities": [NEW_CA, *SERVER.authorities]}
        ),
        f"s.json: authorities: are not of this cluster key ({MADE})",
        id="cas-in-the-wrong-order",
    ),
    pytest.param(
        changed(secrets.dump(rotating("ca", "spread")), {"authorities": list(SERVER.authorities)}),
        f"s.json: authorities: are not of this cluster key ({MADE})",
        id="one-ca-while-two-are-accepted",
    ),
]
FORBIDDEN = (
    "s.json: cluster_key: is the cluster's key, which no worker may have (give this machine what "
    "`nodeagent user-data --role worker` writes)"
)
WRONG_WORKER = [
    pytest.param(secrets.dump(SERVER).reveal(), FORBIDDEN, id="a-servers-file"),
    pytest.param(
        worker_file(cluster_key=SERVER.cluster_key.reveal()), FORBIDDEN, id="the-cluster-key-too"
    ),
    pytest.param(worker_file(cluster_key=""), FORBIDDEN, id="an-empty-cluster-key"),
    pytest.param(
        worker_file(rotated={"gossip": [NEW.reveal()]}), FORBIDDEN, id="rotated-keys-of-servers"
    ),
    pytest.param("{}", f"s.json: gossip_key: is missing ({MADE})", id="an-empty-object"),
    pytest.param(
        worker_file(gossip_key=SHORT),
        f"s.json: gossip_key: is not 32 bytes in base64 ({MADE})",
        id="a-gossip-key-too-short",
    ),
    *(
        pytest.param(
            worker_file(**{key: None}), f"s.json: {key}: is missing ({MADE})", id=f"no-{key}"
        )
        for key in ("gossip_key", "certificate", "enrolment", "generation")
    ),
    *(
        pytest.param(
            worker_file(**{key: [CANARY]}),
            f"s.json: {key}: is not a text ({MADE})",
            id=f"a-list-for-{key}",
        )
        for key in ("certificate", "enrolment", "generation")
    ),
    *(
        pytest.param(
            worker_file(**{key: ""}), f"s.json: {key}: is not a text ({MADE})", id=f"empty-{key}"
        )
        for key in ("certificate", "enrolment", "generation")
    ),
    pytest.param(
        worker_file(certificate=CANARY),
        f"s.json: certificate: cannot be read: it is not one in PEM form ({MADE})",
        id="junk-for-a-certificate",
    ),
    pytest.param(
        worker_file(authorities=[CANARY]),
        f"s.json: authorities: cannot be read: it is not one in PEM form ({MADE})",
        id="junk-for-a-ca",
    ),
    pytest.param(
        worker_file(authorities=[NEW_CA]),
        f"s.json: certificate: is not signed by one of authorities ({MADE})",
        id="a-certificate-of-another-ca",
    ),
    pytest.param(
        worker_file(certificate=secrets.for_workers(OTHER, SPEC, PKI, NOW).certificate.reveal()),
        f"s.json: certificate: is not signed by one of authorities ({MADE})",
        id="the-certificate-of-another-cluster",
    ),
    pytest.param(
        worker_file(servers=3), f"s.json: servers: unknown key ({MADE})", id="a-key-of-the-spec"
    ),
    pytest.param(
        worker_file(serial="1"), f"s.json: serial: is not a whole number ({MADE})", id="a-text"
    ),
]


@pytest.mark.parametrize(("text", "wanted"), WRONG_SERVER)
def test_each_mistake_in_a_servers_file_has_its_sentence(text: str, wanted: str) -> None:
    assert sentence(text, "server") == wanted


@pytest.mark.parametrize(("text", "wanted"), WRONG_WORKER)
def test_each_mistake_in_a_workers_file_has_its_sentence(text: str, wanted: str) -> None:
    assert sentence(text, "worker") == wanted


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("", 1, id="empty"),
        pytest.param(CANARY, 1, id="no-json"),
        pytest.param(server_file()[:-2], 1, id="cut-at-the-end"),
        pytest.param(f'{{\n "cluster_key": "{CANARY}', 2, id="cut-in-the-key"),
        pytest.param(f'{{\n "cluster_key": {CANARY}}}', 2, id="a-key-without-quotes"),
        pytest.param(f"{{\n\n {CANARY}: 1}}", 3, id="a-name-without-quotes"),
    ],
)
def test_what_is_no_json_is_named_with_its_line(text: str, line: int) -> None:
    found = sentence(text, "server")  # in whatever words this Python has for it
    assert found.startswith(f"s.json:{line}: is not JSON: ")
    assert found.endswith(f" ({MADE})")


def test_a_file_of_brackets_alone_is_a_mistake_like_any_other() -> None:
    """Python's parser gives up on it with another error than on other texts."""
    assert "s.json" in sentence("[" * 100_000, "server")


def test_any_damage_is_a_mistake_or_no_change_of_what_is_secret() -> None:
    """Whatever bytes are altered: the same secrets, or one sentence that shows nothing of them."""
    chance = random.Random(2016)
    refused = 0
    for _ in range(400):
        good = chance.choice((SERVER, WORKER))
        role: Role = "server" if good is SERVER else "worker"
        text = list(secrets.dump(good).reveal())
        for _ in range(chance.randint(1, 3)):
            text[chance.randrange(len(text))] = chance.choice('{}[]":,\\ \nA7\0é')
        fault = fault_of("".join(text), role)
        refused += bool(fault)
        assert fault.isprintable()
        assert not [piece for piece in values_of(secrets.dump(good).reveal()) if piece in fault]
    assert refused > 100


def fault_of(text: str, role: Role) -> str:
    try:
        secrets.parse(text, "s.json", role, PKI)
    except SpecError as error:
        return str(error)
    return ""


# -- a node's own tokens

OWN = NodeTokens(Secret("recovery-1"), {"aaaa": Secret("token-1"), "bbbb": Secret("token-2")})


@pytest.mark.parametrize("in_use", ["", "aaaa", "bbbb"])
def test_a_nodes_own_tokens_are_read_back(in_use: str) -> None:
    own = replace(OWN, in_use=in_use)
    assert NodeTokens.parse(own.dump().reveal()) == own
    assert "token-1" not in repr(own)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "null",
        "7",
        "[]",
        "{}",
        '{"recovery": "r", "tokens": {}, "in_use": "aaaa"}',
        '{"recovery": "r", "tokens": [], "in_use": ""}',
        '{"recovery": "r", "tokens": {}}',
        '{"tokens": {}, "in_use": ""}',
    ],
)
def test_damaged_tokens_of_a_node_are_one_of_four_errors(text: str) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError, KeyError)):
        NodeTokens.parse(text)


# -- a request for a token

REQUEST = Request("0123456789abcdef", "aaaa", "c2VhbGVk")


@pytest.mark.parametrize("answer", ["", secrets.ADMITTED, "a machine named Zürich has a token"])
def test_a_request_is_read_back(answer: str) -> None:
    request = replace(REQUEST, answer=answer)
    assert Request.parse(request.dump()) == request


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data.pop("sealed"), id="nothing-sealed"),
        pytest.param(lambda data: data.update(id=7), id="a-number"),
        pytest.param(lambda data: data.update(id="a b"), id="two-words-for-an-id"),
        pytest.param(lambda data: data.update(generation="a b"), id="two-words-for-a-generation"),
        pytest.param(lambda data: data.update(generation="a\u00a0b"), id="a-space-of-another-kind"),
        pytest.param(lambda data: data.update(answer="a\nb"), id="an-answer-of-two-lines"),
        pytest.param(lambda data: data.update(answer="\033[2J"), id="an-answer-to-the-terminal"),
        pytest.param(lambda data: data.update(sealed=["x"]), id="a-list"),
    ],
)
def test_what_is_no_request_is_ignored(damage: Callable[[Data], object]) -> None:
    data = json.loads(REQUEST.dump())
    damage(data)
    assert Request.parse(json.dumps(data)) is None


@pytest.mark.parametrize("text", [None, "", "junk", "null", "[]", "7", '"x"', "{}", "\0"])
def test_junk_is_no_request(text: str | None) -> None:
    assert Request.parse(text) is None


def test_brackets_without_end_are_no_request_and_no_end_of_the_program() -> None:
    """Anybody with a token of the user-data can write that where every server reads."""
    assert Request.parse("[" * 100_000) is None


def test_an_id_names_a_token_and_does_not_tell_it() -> None:
    one, other = secrets.request_id(Secret("one")), secrets.request_id(Secret("other"))
    assert one == secrets.request_id(Secret("one")) != other
    assert re.fullmatch("[0-9a-f]{16}", one)


def test_secrets_show_themselves_nowhere() -> None:
    for kept in (SERVER, WORKER, rotating("ca", "spread"), secrets.keys(SERVER, PKI)):
        shown = repr(kept)
        for piece in (SERVER.cluster_key, WORKER.gossip_key, WORKER.enrolment, NEW):
            assert piece.reveal() not in shown
        assert "PRIVATE KEY" not in shown


def test_the_types_are_told_apart() -> None:
    assert isinstance(SERVER, ServerSecrets)
    assert isinstance(WORKER, WorkerSecrets)
