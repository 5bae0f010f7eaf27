"""This machine is who its state says: facts in, plan out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeagent import paths
from nodeagent.host import Interface
from nodeagent.steps import identity
from nodeagent.steps.identity import Seen
from tests.unit.expect import said
from tests.unit.fakes import World, make_spec

OURS = '{"cluster": "demo", "machine_id": "0123456789abcdef", "security": "on"}'
BASE = Seen(
    machine_id="0123456789abcdef",
    hostname="server11",
    address="10.10.0.11",
    address_problem="",
    recorded=OURS,
)
UNREADABLE = [
    "block /var/lib/nodeagent/identity.json does not say whose state this is",
    "fix if this machine has always been in cluster demo: rm /var/lib/nodeagent/identity.json",
]


@pytest.mark.parametrize(
    ("seen", "plan"),
    [
        pytest.param(BASE, ["done server11 at 10.10.0.11"], id="recorded-before"),
        pytest.param(
            replace(BASE, recorded=None),
            ["do write /var/lib/nodeagent/identity.json"],
            id="first-boot",
        ),
        pytest.param(
            replace(BASE, hostname="renamed"), ["done renamed at 10.10.0.11"], id="host-renamed"
        ),
        pytest.param(
            replace(BASE, machine_id="fedcba9876543210"),
            [
                "block the state in /var/lib/nodeagent belongs to another machine "
                "(machine-id 01234567…, here fedcba98…): a copied disk",
                "fix move /var/lib/nodeagent away, then systemctl restart nodeagent",
            ],
            id="copied-disk",
        ),
        pytest.param(
            replace(BASE, recorded=OURS.replace("demo", "other")),
            [
                "block this node is in cluster other, and the spec says demo",
                "fix put cluster: other back into /etc/nodeagent/node.yaml",
            ],
            id="spec-of-another-cluster",
        ),
        pytest.param(
            replace(BASE, recorded=OURS.replace('"on"', '"off"')),
            [
                "block security was off when this node was made, and the spec says on: a running "
                "cluster cannot be switched",
                "fix put it back in /etc/nodeagent/node.yaml, or make a new cluster",
            ],
            id="security-switched-on",
        ),
        pytest.param(
            replace(BASE, recorded=OURS.replace(', "security": "on"', "")),
            [
                "block security was off when this node was made, and the spec says on: a running "
                "cluster cannot be switched",
                "fix put it back in /etc/nodeagent/node.yaml, or make a new cluster",
            ],
            id="made-before-there-was-a-choice",
        ),
        pytest.param(
            replace(BASE, address="", address_problem="address eth9 matches none"),
            ["block address eth9 matches none", "fix edit address in /etc/nodeagent/node.yaml"],
            id="no-such-address",
        ),
        pytest.param(
            replace(BASE, machine_id="", recorded=None),
            [
                "block /etc/machine-id is empty",
                "fix systemd-machine-id-setup, then reboot",
            ],
            id="image-without-machine-id",
        ),
        pytest.param(
            replace(BASE, machine_id="uninitialized", recorded=None),
            [
                "block /etc/machine-id is empty",
                "fix systemd-machine-id-setup, then reboot",
            ],
            id="first-boot-of-an-image-not-yet-through",
        ),
        pytest.param(replace(BASE, recorded=""), UNREADABLE, id="record-empty"),
        pytest.param(replace(BASE, recorded="{"), UNREADABLE, id="record-torn"),
        pytest.param(replace(BASE, recorded="[]"), UNREADABLE, id="record-a-list"),
        pytest.param(replace(BASE, recorded="{}"), UNREADABLE, id="record-without-keys"),
    ],
)
def test_plan(seen: Seen, plan: list[str]) -> None:
    assert said(identity.diff(make_spec(), seen)) == plan


def test_what_is_recorded_is_accepted_the_next_time() -> None:
    host = World().machine(make_spec(), "10.10.0.11").host
    spec = make_spec()
    [write] = identity.diff(spec, identity.observe(spec, host)).changes
    write.apply(host)
    assert said(identity.diff(spec, identity.observe(spec, host))) == [
        "done server11 at 10.10.0.11"
    ]


def test_an_address_that_is_not_here_blocks_and_names_what_is() -> None:
    spec = make_spec(address="eth9")
    host = World().machine(spec, "10.10.0.11").host
    assert said(identity.diff(spec, identity.observe(spec, host))) == [
        "block address eth9 matches none of this machine's: 203.0.113.7 (eth0), 10.10.0.11 (eth1)",
        "fix edit address in /etc/nodeagent/node.yaml",
    ]


def test_nothing_is_recorded_on_a_node_without_its_address() -> None:
    machine = World().machine(make_spec(), "10.10.0.11")
    spec = make_spec(address="10.99.0.0/16")
    assert not identity.diff(spec, identity.observe(spec, machine.host)).changes
    assert machine.files.read(paths.IDENTITY) is None


def test_the_loopback_is_never_taken() -> None:
    seen = identity.observe(make_spec(address="lo"), World().machine(make_spec(), "10.9.9.9").host)
    assert seen.address == ""
    assert Interface("lo", "127.0.0.1/8").name in seen.address_problem
