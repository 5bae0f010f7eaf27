"""Wrong, foreign, old and missing keys: each is named exactly, and nothing is overwritten."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from nodeagent import secrets, spec
from nodeagent.adapters.pki import LocalPki
from nodeagent.errors import Exit
from tests.lab import cluster
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Lab, Machine
from tests.lab.test_rotation import KEYRING, NODE_PEM, SECRETS, certificate, served, undisturbed

NODE_TOKEN = "/var/lib/nodeagent/node-token.json"
YEAR_S = 365 * 86400.0
PKI = LocalPki()
CONSUL = "docker -H unix:///run/nodeagent-engine/docker.sock"


@pytest.fixture
def worker(four: list[Machine]) -> Iterator[Machine]:
    """The worker; its secrets are put back and it is ready again afterwards."""
    machine = four[-1]
    kept = machine.read(SECRETS)
    yield machine
    machine.write(SECRETS, kept, 0o600)
    cluster.wait_ready(four)


def blocked(machine: Machine, words: str) -> str:
    """The whole sentence of a machine that is blocked with these words in it."""

    def seen() -> bool | Waiting:
        said = cluster.status(machine)
        is_it = said.get("state") == "blocked" and words in said["sentence"]
        return is_it or Waiting(str(said.get("sentence")))

    machine.run("systemctl", "restart", "nodeagent")  # now, and not at its slow timer
    wait_until(seen, 90, f"{machine.name} to be blocked: {words}")
    return str(cluster.status(machine)["sentence"])


def worker_secrets(now: float) -> str:
    """What a worker of another cluster has, made at this time."""
    data = spec.parse(
        "{cluster: demo, servers: 1, address: eth1, datacenter: lab}", "x", spec.Cluster
    )
    made = secrets.for_workers(secrets.new(PKI, now), data, PKI, now)
    return secrets.dump(made).reveal()


def server_file(four: list[Machine]) -> str:
    return four[0].read(SECRETS)


CASES: list[tuple[str, Callable[[list[Machine]], str | None], str, str]] = [
    (
        "the-clusters-key-on-a-worker",
        server_file,
        "cluster_key: is the cluster's key, which no worker may have",
        "give this machine what `nodeagent user-data --role worker` writes",
    ),
    ("no-secrets", lambda _: None, f"{SECRETS}: there is no such file", "nodeagent secrets new"),
    (
        "not-json",
        lambda _: "{",
        f"{SECRETS}:1: is not JSON",
        "it is made by `nodeagent secrets new`",
    ),
    (
        "a-ca-that-has-ended",
        lambda _: worker_secrets(time.time() - 21 * YEAR_S),
        "the cluster's CA certificate in /etc/nodeagent/secrets.json ended 365 days ago",
        "date; if it is right",
    ),
    (
        "a-ca-of-tomorrow",
        lambda _: worker_secrets(time.time() + 86400),
        "the cluster's CA certificate in /etc/nodeagent/secrets.json is valid only in 23.0 hours",
        "timedatectl set-ntp true",
    ),
    (
        "another-clusters-and-a-local-keyring-that-is-not-its",
        lambda _: worker_secrets(time.time()),
        f"Consul keeps another cluster's gossip keys in {KEYRING}",
        f"move {KEYRING} away",
    ),
]


@pytest.mark.parametrize(
    ("given", "words", "fix"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_wrong_secrets_are_named_and_nothing_is_overwritten(
    four: list[Machine],
    worker: Machine,
    given: Callable[[list[Machine]], str | None],
    words: str,
    fix: str,
) -> None:
    text = given(four)
    files = (
        "consul/config/ca.pem",
        "consul/config/node.pem",
        "consul/config/keys.json",
        "consul/tokens.json",
    )
    before = [worker.read(f"/var/lib/nodeagent/{file}") for file in files]
    if text is None:
        worker.sh(f"rm {SECRETS}")
    else:
        worker.write(SECRETS, text, 0o600)
    sentence = blocked(worker, words)
    assert fix in sentence
    said = worker.run("nodeagent", "apply", check=False)
    assert said.returncode == Exit.BLOCKED
    assert words in said.stdout
    assert [worker.read(f"/var/lib/nodeagent/{file}") for file in files] == before
    if text is not None:
        assert worker.read(SECRETS) == text


def test_secrets_that_others_can_read(worker: Machine) -> None:
    worker.sh(f"chmod 644 {SECRETS}")
    sentence = blocked(worker, f"{SECRETS}: others can read or change it")
    assert f"chmod 600 {SECRETS}" in sentence
    assert worker.sh(f"stat -c %a {SECRETS}").strip() == "644"


def test_a_node_with_another_clusters_key(lab: Lab, four: list[Machine]) -> None:
    """It is new, so nothing but its key is wrong; the cluster does not notice it."""
    data = cluster.cluster_file(lab)
    stranger = lab.machine(
        "worker7", address="10.10.0.27", user_data=cluster.user_data(data, "worker")
    )
    try:
        stranger.boot()
        stranger.wait_cloud_init()
        stranger.sh("systemctl stop nodeagent")
        stranger.sh(f"{CONSUL} rm -f consul; rm -f {KEYRING}", check=False)  # as far as it came
        stranger.write(SECRETS, worker_secrets(time.time()), 0o600)
        with undisturbed(four):
            sentence = blocked(stranger, "does not understand this node: the gossip key")
        assert f"of {SECRETS}, is not the cluster's" in sentence
        assert "nodeagent install --secrets FILE" in sentence
    finally:
        stranger.destroy()


def test_a_server_certificate_that_has_ended_is_replaced(four: list[Machine]) -> None:
    """By a server itself: it needs nobody for that."""
    server = four[1]
    found = secrets.parse(server.read(SECRETS), "server", "server", PKI)
    assert isinstance(found, secrets.ServerSecrets)
    names = ("server.lab.consul", f"{server.name}.server.lab.consul")
    past = time.time() - 2 * 86400
    ended = PKI.issue(found.seeds("ca")[0], found.authorities[0], names, 86400, past).reveal()
    with undisturbed(four):
        server.write(NODE_PEM, ended, 0o600)
        server.sh("nodeagent apply")
    new = certificate(server.read(NODE_PEM))
    assert new != certificate(ended)
    assert served(server) == new


def test_a_token_that_was_deleted(four: list[Machine], worker: Machine) -> None:
    """Named, and asked for anew by the one command that the sentence gives."""
    own = worker.read(NODE_TOKEN)
    assert (
        "has no token any more" in four[0].run("nodeagent", "secrets", "forget", worker.name).stdout
    )
    sentence = blocked(worker, "Consul does not know the token that this node shows")
    assert f"rm {NODE_TOKEN}" in sentence
    assert worker.read(NODE_TOKEN) == own
    worker.sh(f"rm {NODE_TOKEN}")
    cluster.wait_ready(four)
    assert json.loads(worker.read(NODE_TOKEN))["tokens"] != json.loads(own)["tokens"]
