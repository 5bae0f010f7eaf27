"""Consul's quorum: facts in, plan out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeagent.converge import run_cycle
from nodeagent.errors import HostError
from nodeagent.host import Member
from nodeagent.spec import Spec
from nodeagent.steps import STEPS, quorum
from nodeagent.steps.quorum import Seen
from tests.unit.expect import said
from tests.unit.fakes import World, make_spec

SELF = Member("server11", "10.10.0.11", alive=True, server=True)
SECOND = Member("server12", "10.10.0.12", alive=True, server=True)
THIRD = Member("server13", "10.10.0.13", alive=True, server=True)
WORKER = Member("worker21", "10.10.0.21", alive=True, server=False)
JOIN = ("10.10.0.11", "10.10.0.12", "10.10.0.13")
ALONE = Seen("10.10.0.11", "", (SELF,), join_addresses=JOIN)
LED = Seen("10.10.0.11", "10.10.0.12:8300", (SELF, SECOND, THIRD))
BY_NAME = make_spec(join="[servers.example.com]")
TWO_NAMES = make_spec(join="[one.example.com, two.example.com]")
MIXED = make_spec(join="[10.10.0.12, servers.example.com]")
CLOUD = make_spec(join="['provider=digitalocean region=nyc3 tag_name=demo']")


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        pytest.param(
            make_spec(),
            replace(LED, servers_by_srv=("server11", "server12", "server13")),
            ["done 3 of 3 servers, leader 10.10.0.12"],
            id="all-there",
        ),
        pytest.param(
            make_spec(),
            replace(LED, is_known=None),
            ["wait Consul to start its access rules"],
            id="a-leader-that-has-only-just-come",
        ),
        pytest.param(
            make_spec(),
            replace(LED, is_known=False),
            [
                "block Consul does not know the server token that derives from "
                "/etc/nodeagent/secrets.json: it was deleted, or the cluster was made with "
                "another cluster key",
                "fix compare with another server's file; if it is the same, restart Consul on the "
                "leader, which makes the token again",
            ],
            id="a-server-of-another-cluster-key",
        ),
        pytest.param(
            make_spec("worker"),
            replace(LED, is_known=False),
            [
                "block Consul does not know the token that this node shows: it was deleted, the "
                "cluster was made anew, or the tokens were rotated since this node's user-data was "
                "made",
                "fix rm /var/lib/nodeagent/node-token.json, and it asks for another; if that does "
                "not help, bring newer user-data",
            ],
            id="a-worker-whose-token-was-deleted",
        ),
        pytest.param(
            make_spec(),
            replace(ALONE, trouble="10.10.0.12 does not understand this node"),
            [
                "block 10.10.0.12 does not understand this node",
                "fix compare the date here and there; if it is right, bring secrets.json of a "
                "server that is in the cluster (to a worker: newer user-data): nodeagent install "
                "--secrets FILE",
            ],
            id="keys-that-do-not-fit",
        ),
        pytest.param(
            make_spec(),
            replace(
                LED,
                members=(SELF, SECOND, THIRD, replace(WORKER, server=True)),
                servers_by_srv=("server11", "server12", "server13", "worker21"),
                voters=("server11", "server12", "server13"),
            ),
            [
                "done 3 of 3 servers, leader 10.10.0.12; calling themselves servers, without a "
                "vote: worker21"
            ],
            id="a-worker-that-calls-itself-a-server",
        ),
        pytest.param(
            make_spec(),
            replace(LED, servers_by_srv=("server11", "server12")),
            ["done 2 of 3 servers, leader 10.10.0.12"],
            id="majority-is-enough",
        ),
        pytest.param(
            make_spec(),
            replace(LED, servers_by_srv=("server11",)),
            ["wait DNS to name a majority of the servers: consul.service.consul has 1 of 3"],
            id="leader-but-dns-names-one",
        ),
        pytest.param(
            make_spec(domain="example"),
            LED,
            ["wait DNS to name a majority of the servers: consul.service.example has 0 of 3"],
            id="leader-but-dns-names-nobody",
        ),
        pytest.param(
            make_spec(servers=1, join="[]"),
            replace(LED, servers_by_srv=("server11",)),
            ["done 1 of 1 servers, leader 10.10.0.12"],
            id="one-server-cluster",
        ),
        pytest.param(
            make_spec(),
            ALONE,
            ["wait Consul's quorum: 1 of 3 servers are alive; not seen: 10.10.0.12, 10.10.0.13"],
            id="first-of-three-names-who-is-missing",
        ),
        pytest.param(
            make_spec(),
            replace(ALONE, members=(SELF, SECOND)),
            ["wait Consul's quorum: 2 of 3 servers are alive; not seen: 10.10.0.13"],
            id="second-has-come",
        ),
        pytest.param(
            make_spec(),
            replace(ALONE, members=(SELF, SECOND, THIRD)),
            ["wait Consul to elect a leader among 3 servers"],
            id="all-alive-before-the-election",
        ),
        pytest.param(
            make_spec(),
            replace(ALONE, members=(SELF, replace(SECOND, alive=False), THIRD)),
            ["wait Consul's quorum: 2 of 3 servers are alive; not seen: 10.10.0.12"],
            id="one-has-failed",
        ),
        pytest.param(
            make_spec("worker"),
            Seen("10.10.0.21", "", (WORKER, SELF), join_addresses=JOIN),
            ["wait Consul's quorum: 1 of 3 servers are alive; not seen: 10.10.0.12, 10.10.0.13"],
            id="a-worker-does-not-count",
        ),
        pytest.param(
            BY_NAME,
            ALONE,
            ["do join Consul through 10.10.0.12, 10.10.0.13"],
            id="name-resolves-to-servers-not-joined",
        ),
        pytest.param(
            BY_NAME,
            replace(ALONE, members=(SELF, SECOND, THIRD)),
            ["wait Consul to elect a leader among 3 servers"],
            id="name-resolves-to-servers-joined-already",
        ),
        pytest.param(
            BY_NAME,
            replace(ALONE, join_addresses=("10.10.0.11",)),
            ["wait Consul's quorum: 1 of 3 servers are alive"],
            id="name-resolves-to-itself-only",
        ),
        pytest.param(
            BY_NAME,
            replace(ALONE, join_addresses=(), unresolved=("servers.example.com",)),
            ["wait a DNS answer for servers.example.com, given as join in the spec"],
            id="name-does-not-resolve",
        ),
        pytest.param(
            TWO_NAMES,
            replace(ALONE, join_addresses=(), unresolved=("one.example.com", "two.example.com")),
            ["wait a DNS answer for one.example.com, two.example.com, given as join in the spec"],
            id="neither-name-resolves",
        ),
        pytest.param(
            TWO_NAMES,
            replace(ALONE, join_addresses=("10.10.0.12",), unresolved=("two.example.com",)),
            ["do join Consul through 10.10.0.12"],
            id="the-name-that-resolves-is-used",
        ),
        pytest.param(
            BY_NAME,
            replace(
                ALONE,
                members=(SELF, SECOND),
                join_addresses=(),
                unresolved=("servers.example.com",),
            ),
            ["wait Consul's quorum: 2 of 3 servers are alive"],
            id="name-stopped-resolving-but-a-majority-is-there",
        ),
        pytest.param(
            MIXED,
            replace(ALONE, join_addresses=("10.10.0.12", "10.10.0.13")),
            ["do join Consul through 10.10.0.12, 10.10.0.13"],
            id="address-and-name",
        ),
        pytest.param(
            CLOUD,
            replace(ALONE, join_addresses=()),
            ["wait Consul's quorum: 1 of 3 servers are alive"],
            id="cloud-auto-join-is-left-to-consul",
        ),
    ],
)
def test_plan(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(quorum.diff(spec, seen)) == plan


class Refused:
    """Consul's agent on a machine with keys that are not the cluster's."""

    def __init__(self, *others: Member, leader: str | None = "") -> None:
        self.others, self.led, self.asked = others, leader, list[str]()

    def leader(self) -> str:
        if self.led is None:
            raise HostError("ask", "Consul", "500 rpc error making call: EOF")
        return self.led

    def members(self) -> tuple[Member, ...]:
        return (SELF, *self.others)

    def knock(self, address: str) -> str:
        self.asked.append(address)
        return "No installed keys could decrypt the message"

    def greet(self, address: str, name: str) -> str:
        self.asked.append(f"{name} at {address}")
        return "its certificate is refused here: certificate has expired"


def refused(consul: Refused, spec: Spec) -> str:
    machine = World().machine(spec, "10.10.0.11")
    host = replace(machine.host, consul=consul)  # type: ignore[arg-type] # a part of one
    return quorum.observe(spec, host).trouble


def test_a_node_that_is_alone_knocks_at_one_other_in_each_round() -> None:
    consul = Refused()
    assert refused(consul, make_spec()).endswith(
        "does not understand this node: the gossip key that it uses, of "
        "/etc/nodeagent/secrets.json, is not the cluster's"
    )
    assert len(consul.asked) == 1
    assert consul.asked[0] in JOIN[1:]


@pytest.mark.parametrize("leader", ["", None], ids=["no-leader", "no-answer"])
def test_a_node_among_servers_that_elect_nobody_looks_at_their_certificates(
    leader: str | None,
) -> None:
    consul = Refused(SECOND, THIRD, leader=leader)
    assert refused(consul, make_spec()) == (
        "no encrypted connection to the server at 10.10.0.12: its certificate is refused here: "
        "certificate has expired"
    )
    assert consul.asked == ["server.dc1.consul at 10.10.0.12"]


@pytest.mark.parametrize(
    ("spec", "others"),
    [
        pytest.param(make_spec(security="off"), (), id="security-off"),
        pytest.param(make_spec(), (WORKER,), id="too-few-servers-to-elect-one"),
    ],
)
def test_nobody_is_asked_without_need(spec: Spec, others: tuple[Member, ...]) -> None:
    consul = Refused(*others)
    assert refused(consul, spec) == ""
    assert not consul.asked


def test_a_leader_without_a_working_read_is_no_quorum() -> None:
    world = World()
    machines = [world.machine(make_spec(), address) for address in JOIN]
    host = machines[0].host

    class Stale:
        """Consul's agent when its leader has just gone: named still, but nothing answers."""

        def leader(self) -> str:
            return "10.10.0.12:8300"

        def members(self) -> tuple[Member, ...]:
            return (SELF, SECOND, THIRD)

        def knows_token(self) -> bool:
            return True

        def get(self, prefix: str) -> None:
            raise HostError("read", prefix, "500 No cluster leader")

    class Named:
        """DNS, which still answers from what it knew."""

        def consul_servers(self, domain: str) -> tuple[str, ...]:
            return (f"server12.node.dc1.{domain}.", f"server13.node.dc1.{domain}.")

    stale = replace(host, consul=Stale(), resolver=Named())  # type: ignore[arg-type] # parts of them
    with pytest.raises(HostError, match="No cluster leader"):
        quorum.observe(make_spec(security="off"), stale)


def test_names_are_resolved_again_each_time_and_addresses_taken_as_they_are() -> None:
    spec = make_spec(join="[10.10.0.12, servers.example.com, gone.example.com, 'provider=x a=b']")
    machine = World().machine(spec, "10.10.0.11")
    run_cycle(spec, machine.host, STEPS[:5], lambda _: None)
    assert quorum.observe(spec, machine.host).unresolved == (
        "servers.example.com",
        "gone.example.com",
    )
    machine.resolver.names["servers.example.com"] = ("10.10.0.12", "10.10.0.13")
    seen = quorum.observe(spec, machine.host)
    assert seen.join_addresses == ("10.10.0.12", "10.10.0.13")
    assert seen.unresolved == ("gone.example.com",)
