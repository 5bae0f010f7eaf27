"""A node's keys and certificate: facts in, plan out; and Consul finds what it is to use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nodeagent import paths
from nodeagent.errors import Secret
from nodeagent.secrets import (
    Keys,
    NodeTokens,
    ServerSecrets,
    WorkerSecrets,
    dump,
    for_workers,
    gossip_key,
    new,
)
from nodeagent.steps import secrets
from nodeagent.steps.secrets import Seen
from tests.unit.expect import said
from tests.unit.fakes import NOW, PKI, Machine, World, make_spec, server_secrets, worker_secrets

DAY, HOUR = 86400.0, 3600.0
DIRECTORY = "/var/lib/nodeagent/consul"
CA, CERTIFICATE, KEYS, TOKENS = (
    f"do write {DIRECTORY}/{name}"
    for name in ("config/ca.pem", "config/node.pem", "config/keys.json", "tokens.json")
)
PENDING = "do write /run/nodeagent/consul-reload-pending"
MAKE = "do make a token of this node's own"
NEW = new(PKI, NOW)  # another cluster's, or what comes by a rotation
OTHER_CA = replace(
    server_secrets(),
    rotated={"ca": (NEW.cluster_key, server_secrets().cluster_key)},
    authorities=(*NEW.authorities, *server_secrets().authorities),
    rotating="ca",
    phase="switched",
    serial=2,
)


def issue(why: str, name: str = "server11") -> str:
    return f"do issue a certificate for {name}.server.dc1.consul: {why}"


def node(role: str = "server", **spec: object) -> Machine:
    number = 11 if role == "server" else 21
    machine = World().machine(make_spec(role, **spec), f"10.10.0.{number}")
    machine.clock.t = 0.0
    return machine


def plan(machine: Machine) -> list[str]:
    return said(secrets.diff(machine.spec, secrets.observe(machine.spec, machine.host)))


def settle(machine: Machine) -> list[str]:
    """Make every change there is to make; return what was said in the end."""
    for _ in range(10):
        found = secrets.diff(machine.spec, secrets.observe(machine.spec, machine.host))
        if not found.changes:
            return said(found)
        for change in found.changes:
            change.apply(machine.host)
    raise AssertionError(said(found))


def settled(role: str = "server", **spec: object) -> Machine:
    machine = node(role, **spec)
    assert settle(machine)[0].startswith("done ")
    return machine


def keep(machine: Machine, kept: ServerSecrets | WorkerSecrets) -> None:
    machine.files.write(paths.SECRETS, dump(kept).reveal(), 0o600)


def file(machine: Machine, path: Path) -> dict[str, object]:
    found = json.loads(machine.files.texts[path])
    assert isinstance(found, dict)
    return found


# -- the first boot


def test_a_servers_first_boot() -> None:
    machine = node()
    assert plan(machine) == [MAKE]
    secrets.diff(machine.spec, secrets.observe(machine.spec, machine.host)).changes[0].apply(
        machine.host
    )
    assert plan(machine) == [CA, issue("there is none"), KEYS, TOKENS]
    assert settle(machine) == ["done certificate valid for 30 more days"]


def test_a_workers_first_boot() -> None:
    machine = node("worker")
    assert plan(machine) == [MAKE]
    machine.files.write(paths.NODE_TOKEN, own_tokens(machine).dump().reveal(), 0o600)
    assert plan(machine) == [CA, CERTIFICATE, KEYS, TOKENS]
    assert settle(machine) == ["done certificate valid for 7300 more days"]


def derived(machine: Machine) -> Keys:
    """What derives from the secrets of this machine."""
    found = secrets.observe(machine.spec, machine.host).found
    assert found is not None
    return found.keys


def own_tokens(machine: Machine, in_use: str = "") -> NodeTokens:
    """As a worker makes them; `in_use` once servers have admitted it."""
    generation = derived(machine).generation
    return NodeTokens(Secret("recovery"), {generation: Secret("own")}, in_use and generation)


def test_a_server_shows_the_servers_token_and_a_new_worker_the_user_datas() -> None:
    server, worker = settled(), settled("worker")
    keys = derived(server)
    assert keys.server_token is not None
    own = NodeTokens.parse(server.files.texts[paths.NODE_TOKEN])
    assert file(server, paths.CONSUL_TOKENS) == {
        "recovery": own.recovery.reveal(),
        "token": keys.server_token.reveal(),
        "agent": keys.server_token.reveal(),
        "serial": 0,
    }
    assert file(server, paths.CONSUL_KEYS) == {
        "encrypt": keys.gossip[0].reveal(),
        "acl": {
            "tokens": {
                "agent_master": own.recovery.reveal(),
                "agent": keys.server_token.reveal(),
                "master": keys.server_token.reveal(),
            }
        },
    }
    own = NodeTokens.parse(worker.files.texts[paths.NODE_TOKEN])
    assert file(worker, paths.CONSUL_TOKENS) == {
        "recovery": own.recovery.reveal(),
        "token": keys.enrolment.reveal(),
        "agent": "",
        "serial": 0,
    }
    assert file(worker, paths.CONSUL_KEYS) == {
        "encrypt": keys.gossip[0].reveal(),
        "acl": {"tokens": {"agent_master": own.recovery.reveal()}},
    }


def test_a_worker_shows_its_own_token_once_it_is_admitted() -> None:
    machine = settled("worker")
    machine.files.write(paths.NODE_TOKEN, own_tokens(machine, "yes").dump().reveal(), 0o600)
    settle(machine)
    shown = file(machine, paths.CONSUL_TOKENS)
    assert shown["token"] == shown["agent"] != worker_secrets().enrolment.reveal()
    assert file(machine, paths.CONSUL_KEYS)["acl"] == {
        "tokens": {"agent_master": "recovery", "agent": shown["token"]}
    }


def test_no_two_nodes_make_the_same_token() -> None:
    texts = [settled(role).files.texts[paths.NODE_TOKEN] for role in ("server", "worker") * 2]
    recoveries = [NodeTokens.parse(text).recovery for text in texts]
    assert len(set(recoveries)) == 4
    assert [len(NodeTokens.parse(text).tokens) for text in texts] == [0, 1, 0, 1]


def test_every_file_with_a_key_in_it_is_for_root_alone() -> None:
    for role in ("server", "worker"):
        machine = settled(role)
        ours = [path for path in machine.files.texts if paths.STATE in path.parents]
        assert len(ours) == 5
        assert {machine.files.modes[path] for path in ours} == {0o600}


def test_nothing_that_is_seen_shows_a_secret() -> None:
    for role in ("server", "worker"):
        machine = settled(role)
        shown = repr(secrets.observe(machine.spec, machine.host))
        texts = "".join(machine.files.texts.values())
        assert "PRIVATE KEY" in texts
        assert "PRIVATE KEY" not in shown
        own = NodeTokens.parse(machine.files.texts[paths.NODE_TOKEN])
        for each in (server_secrets().cluster_key, worker_secrets().enrolment, own.recovery):
            assert each.reveal() not in shown


# -- what is found, and what follows


Alteration = Callable[[Machine], object]


def altered(change: Alteration, role: str = "server") -> list[str]:
    """What a node that was all right plans after this."""
    machine = settled(role)
    change(machine)
    return plan(machine)


def at(when: float) -> Alteration:
    def move(machine: Machine) -> None:
        machine.clock.t += when

    return move


def without(gone: Path) -> Alteration:
    return lambda machine: machine.files.remove(gone)


def renamed(machine: Machine) -> None:
    machine.name = "server12"


def with_secrets(kept: ServerSecrets | WorkerSecrets) -> Alteration:
    return lambda machine: keep(machine, kept)


def with_keyring(*keys: Secret) -> Alteration:
    text = json.dumps([key.reveal() for key in keys])
    return lambda machine: machine.files.write(paths.CONSUL_KEYRING, text, 0o600)


def gossip(kept: ServerSecrets) -> Secret:
    return gossip_key(PKI, kept.seeds("gossip")[0])


def write(path: Path, text: str, mode: int = 0o600) -> Alteration:
    return lambda machine: machine.files.write(path, text, mode)


GOSSIP_SPREAD = replace(
    server_secrets(),
    rotated={"gossip": (server_secrets().cluster_key, NEW.cluster_key)},
    rotating="gossip",
    phase="spread",
    serial=1,
)
GOSSIP_SWITCHED = replace(
    GOSSIP_SPREAD,
    rotated={"gossip": (NEW.cluster_key, server_secrets().cluster_key)},
    phase="switched",
    serial=2,
)
TOKENS_SPREAD = replace(
    GOSSIP_SPREAD,
    rotated={"tokens": (server_secrets().cluster_key, NEW.cluster_key)},
    rotating="tokens",
)
TOKENS_SWITCHED = replace(
    TOKENS_SPREAD,
    rotated={"tokens": (NEW.cluster_key, server_secrets().cluster_key)},
    phase="switched",
    serial=2,
)
FIX_FILE = "nodeagent secrets new makes a cluster's, user-data --secrets brings it to its machines"
OPEN = [
    "block /etc/nodeagent/secrets.json: others can read or change it; it must be a file of yours "
    "or root's with mode 600",
    "fix chmod 600 /etc/nodeagent/secrets.json",
]
KEYRING = (
    "block Consul keeps another cluster's gossip keys in "
    "/var/lib/nodeagent/consul/data/serf/local.keyring, and uses them before the one in "
    "/etc/nodeagent/secrets.json"
)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param(at(0), ["done certificate valid for 30 more days"], id="nothing-happened"),
        pytest.param(
            at(14.9 * DAY), ["done certificate valid for 15 more days"], id="not-yet-half-its-time"
        ),
        pytest.param(
            at(15.1 * DAY),
            [PENDING, issue("half of the old one's time is over")],
            id="half-of-its-time-is-over",
        ),
        pytest.param(
            at(300 * DAY),
            [PENDING, issue("half of the old one's time is over")],
            id="it-ended-while-the-machine-was-off",
        ),
        pytest.param(
            at(-2 * HOUR),
            [
                "block the cluster's CA certificate in /etc/nodeagent/secrets.json is valid only "
                "in 1.0 hours, by this machine's clock",
                "fix date; timedatectl set-ntp true",
            ],
            id="the-clock-is-before-the-ca",
        ),
        pytest.param(
            at(20 * 365 * DAY + 3 * DAY),
            [
                "block the cluster's CA certificate in /etc/nodeagent/secrets.json ended 3 days "
                "ago, by this machine's clock",
                "fix date; if it is right, bring the secrets of a server that is in the cluster",
            ],
            id="the-ca-has-ended",
        ),
        pytest.param(
            renamed,
            [PENDING, issue("the one here names another server", "server12")],
            id="the-machine-has-another-name-now",
        ),
        pytest.param(
            with_secrets(OTHER_CA),
            [PENDING, CA, issue("the one here is of another CA"), TOKENS],
            id="another-ca-is-in-use",
        ),
        pytest.param(
            with_secrets(GOSSIP_SPREAD), [TOKENS], id="a-new-gossip-key-is-known-and-not-used"
        ),
        pytest.param(
            with_secrets(GOSSIP_SWITCHED), [PENDING, KEYS, TOKENS], id="a-new-gossip-key-is-used"
        ),
        pytest.param(with_secrets(TOKENS_SPREAD), [TOKENS], id="new-tokens-are-known-and-not-used"),
        pytest.param(
            with_secrets(TOKENS_SWITCHED), [PENDING, KEYS, TOKENS], id="new-tokens-are-used"
        ),
        pytest.param(
            without(paths.CONSUL_AUTHORITIES), [PENDING, CA], id="somebody-removed-the-ca"
        ),
        pytest.param(
            without(paths.CONSUL_CERTIFICATE),
            [PENDING, issue("there is none")],
            id="no-certificate",
        ),
        pytest.param(
            write(paths.CONSUL_CERTIFICATE, ""), [PENDING, issue("there is none")], id="it-is-empty"
        ),
        pytest.param(
            write(paths.CONSUL_CERTIFICATE, "junk"),
            [PENDING, issue("there is none")],
            id="it-is-damaged",
        ),
        pytest.param(without(paths.CONSUL_KEYS), [PENDING, KEYS], id="somebody-removed-the-keys"),
        pytest.param(
            write(paths.CONSUL_KEYS, "{}"), [PENDING, KEYS], id="somebody-edited-the-keys"
        ),
        pytest.param(without(paths.CONSUL_TOKENS), [TOKENS], id="killed-before-the-last-file"),
        pytest.param(without(paths.NODE_TOKEN), [MAKE], id="somebody-removed-the-nodes-token"),
        pytest.param(
            write(paths.NODE_TOKEN, '{"recovery'),
            [
                "block /var/lib/nodeagent/node-token.json is damaged",
                "fix rm /var/lib/nodeagent/node-token.json",
            ],
            id="the-nodes-token-is-cut-in-half",
        ),
        pytest.param(
            with_keyring(gossip(server_secrets())),
            ["done certificate valid for 30 more days"],
            id="the-keyring-has-our-key",
        ),
        pytest.param(
            with_keyring(gossip(NEW), gossip(server_secrets())),
            ["done certificate valid for 30 more days"],
            id="the-keyring-has-ours-beside-another",
        ),
        pytest.param(
            with_keyring(gossip(NEW)),
            [
                KEYRING,
                "fix if this disk was copied or the key rotated while this node was away: "
                "systemctl stop nodeagent, move "
                "/var/lib/nodeagent/consul/data/serf/local.keyring away, restart Consul and "
                "nodeagent",
            ],
            id="the-keyring-is-anothers",
        ),
        pytest.param(
            write(paths.CONSUL_KEYRING, "junk"),
            ["done certificate valid for 30 more days"],
            id="the-keyring-is-damaged-which-consul-says-itself",
        ),
        pytest.param(
            without(paths.SECRETS),
            ["block /etc/nodeagent/secrets.json: there is no such file", f"fix {FIX_FILE}"],
            id="no-secrets",
        ),
        pytest.param(
            lambda machine: machine.files.modes.update({paths.SECRETS: 0o640}),
            OPEN,
            id="its-secrets-are-open-to-a-group",
        ),
        pytest.param(
            lambda machine: machine.files.modes.update({paths.SECRETS: 0o602}),
            OPEN,
            id="its-secrets-can-be-written-by-others",
        ),
        pytest.param(
            with_secrets(worker_secrets()),
            [
                "block /etc/nodeagent/secrets.json: holds a worker's secrets",
                "fix a server needs the cluster key",
            ],
            id="a-workers-secrets-on-a-server",
        ),
    ],
)
def test_a_server_that_was_all_right(change: Alteration, wanted: list[str]) -> None:
    assert altered(change) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param(at(0), ["done certificate valid for 7300 more days"], id="nothing-happened"),
        pytest.param(at(15 * 365 * DAY), ["done certificate valid for 1825 more days"], id="later"),
        pytest.param(
            with_secrets(for_workers(OTHER_CA, make_spec(), PKI, NOW)),
            [PENDING, CA, CERTIFICATE, TOKENS],
            id="another-ca-is-in-use",
        ),
        pytest.param(
            with_secrets(for_workers(GOSSIP_SPREAD, make_spec(), PKI, NOW)),
            [PENDING, CERTIFICATE, TOKENS],
            id="a-new-gossip-key-is-not-for-workers-yet",
        ),
        pytest.param(
            with_secrets(replace(worker_secrets(), gossip_key=gossip(NEW), serial=2)),
            [PENDING, KEYS, TOKENS],
            id="a-new-gossip-key",
        ),
        pytest.param(
            with_secrets(replace(worker_secrets(), generation="ffff", enrolment=Secret("next"))),
            [MAKE],
            id="new-tokens-ask-for-one-of-its-own-first",
        ),
        pytest.param(
            without(paths.CONSUL_CERTIFICATE),
            [PENDING, CERTIFICATE],
            id="somebody-removed-the-certificate",
        ),
        pytest.param(
            write(paths.CONSUL_CERTIFICATE, "junk"),
            [PENDING, CERTIFICATE],
            id="somebody-damaged-the-certificate",
        ),
        pytest.param(
            with_secrets(server_secrets()),
            [
                "block /etc/nodeagent/secrets.json: cluster_key: is the cluster's key, which no "
                "worker may have",
                "fix give this machine what `nodeagent user-data --role worker` writes",
            ],
            id="the-cluster-key-on-a-worker",
        ),
    ],
)
def test_a_worker_that_was_all_right(change: Alteration, wanted: list[str]) -> None:
    assert altered(change, "worker") == wanted


def test_security_off_needs_nothing() -> None:
    machine = node(security="off")
    before = dict(machine.files.texts)
    assert plan(machine) == [
        "done security is off: nothing in this cluster is encrypted or authenticated"
    ]
    assert machine.files.texts == before
    assert secrets.observe(machine.spec, machine.host) == Seen("server11", machine.clock.now())


@pytest.mark.parametrize(
    ("lifetime", "after", "words"),
    [
        ("30d", 0.0, "30 more days"),
        ("2d", 0.0, "2 more days"),
        ("2d", 1.0, "47 more hours"),
        ("2h", 0.0, "2 more hours"),
        ("2h", 1.0, "119 more minutes"),
        ("5m", 0.0, "5 more minutes"),
    ],
)
def test_how_long_a_certificate_is_valid(lifetime: str, after: float, words: str) -> None:
    machine = settled(consul=f"{{certificate_lifetime: {lifetime}}}")
    machine.clock.t += after
    assert plan(machine) == [f"done certificate valid for {words}"]


def test_a_shorter_lifetime_in_the_spec_waits_and_a_longer_one_does_not() -> None:
    machine = settled(consul="{certificate_lifetime: 30d}")
    machine.spec = make_spec(consul="{certificate_lifetime: 10d}")
    assert plan(machine) == ["done certificate valid for 30 more days"]
    machine.spec = make_spec(consul="{certificate_lifetime: 90d}")
    assert plan(machine) == [PENDING, issue("half of the old one's time is over")]


def test_near_the_end_of_its_ca_a_server_does_not_issue_again_and_again() -> None:
    """No certificate outlives its CA, so half of the lifetime may be more than there is."""
    machine = node()
    machine.clock.t += 20 * 365 * DAY - 5 * DAY
    assert settle(machine) == ["done certificate valid for 5 more days"]
    machine.clock.t += DAY
    assert settle(machine) == ["done certificate valid for 4 more days"]


def test_a_clock_that_was_ahead_is_set_right() -> None:
    """The certificate of a machine whose clock was three days ahead is not valid yet."""
    machine = node()
    machine.clock.t += 3 * DAY
    settle(machine)
    machine.clock.t -= 3 * DAY
    assert plan(machine) == [PENDING, issue("the one here is not valid yet")]
    assert settle(machine) == ["done certificate valid for 30 more days"]


# -- kills


@pytest.mark.parametrize("role", ["server", "worker"])
@pytest.mark.parametrize("start", ["fresh", "other-ca"])
def test_killed_after_any_change_the_next_run_goes_on(role: str, start: str) -> None:
    """And Consul reads its files again afterwards, unless they are its first."""
    kept = OTHER_CA if role == "server" else for_workers(OTHER_CA, make_spec(), PKI, NOW)
    for after in range(12):
        machine = node(role) if start == "fresh" else settled(role)
        if start == "other-ca":
            keep(machine, kept)
        made = 0
        while made < after:
            found = secrets.diff(machine.spec, secrets.observe(machine.spec, machine.host))
            if not found.changes:
                break
            for change in found.changes[: after - made]:
                change.apply(machine.host)
                made += 1
        assert settle(machine)[0].startswith("done certificate valid")
        if start == "other-ca":
            assert machine.files.exists(paths.CONSUL_RELOAD_PENDING), after
        own = NodeTokens.parse(machine.files.texts[paths.NODE_TOKEN])
        assert file(machine, paths.CONSUL_TOKENS)["recovery"] == own.recovery.reveal()


def test_a_node_whose_token_was_removed_still_reaches_its_running_consul() -> None:
    """Consul knows the recovery token with which it was started: another one would be refused."""
    machine = settled("worker")
    before = file(machine, paths.CONSUL_TOKENS)["recovery"]
    machine.files.remove(paths.NODE_TOKEN)
    settle(machine)
    assert file(machine, paths.CONSUL_TOKENS)["recovery"] == before
