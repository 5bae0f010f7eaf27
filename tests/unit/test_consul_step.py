"""Consul runs with the rendered configuration: facts in, plan out, for both runtimes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from nodeagent import paths
from nodeagent.converge import Cycle, run_cycle
from nodeagent.host import ConsulSelf, ContainerState, Unit
from nodeagent.spec import Spec
from nodeagent.steps import consul, identity, kernel, secrets
from nodeagent.steps.consul import Seen, render
from tests.unit.expect import assert_golden, said
from tests.unit.fakes import FakeWeb, Machine, World, make_spec

SPEC = make_spec()
ADDRESS, NAME = "10.10.0.11", "server11"
CONFIG = render(SPEC, ADDRESS, NAME)
DEFINITION = consul.container(SPEC, CONFIG).definition
UNIT = Unit("loaded", "active", "run-1", "enabled")
AGENT = ConsulSelf(NAME, "dc1", server=True, address=ADDRESS, version="1.21.0")
FOREIGN = ConsulSelf("old-web1", "nyc3", server=False, address="10.10.0.11", version="1.8.7")
RUNNING = ContainerState(DEFINITION, "running")

RIGHT = Seen(
    address=ADDRESS,
    hostname=NAME,
    agent=AGENT,
    config=CONFIG,
    unit=UNIT,
    archive_is_here=False,
    engine_answers=True,
    has_image=True,
    container=RUNNING,
)
FRESH = replace(
    RIGHT,
    agent=None,
    config=None,
    unit=Unit("loaded", "inactive", "", "disabled"),
    engine_answers=False,
    has_image=False,
    container=None,
)
STARTED = replace(FRESH, unit=UNIT, engine_answers=True)
LOADED = replace(STARTED, has_image=True)
DEAD = replace(RIGHT, agent=None)

DIGEST = "ab" * 32
ARCHIVE = f"/var/lib/nodeagent/images/{DIGEST}"
FROM_ARCHIVE = make_spec(consul=f"{{archive: /media/consul.tar, sha256: {DIGEST}}}")
OTHER_CONSUL = [
    "block another Consul runs here already: node old-web1, datacenter nyc3, at 10.10.0.11",
    "fix stop and disable it (systemctl disable --now consul), or give this node to it",
]
SAME_CONSUL = [
    "block another Consul runs here already: node server11, datacenter dc1, at 10.10.0.11",
    "fix stop and disable it (systemctl disable --now consul), or give this node to it",
]
CREATE = "do run container consul (hashicorp/consul:1.21) in the System Engine"


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        pytest.param(SPEC, RIGHT, ["done Consul 1.21.0 at 10.10.0.11"], id="all-right"),
        pytest.param(SPEC, FRESH, ["do enable nodeagent-engine.service"], id="first-boot"),
        pytest.param(
            SPEC, replace(FRESH, unit=replace(FRESH.unit, enabled="enabled")),
            ["do start nodeagent-engine.service"], id="enabled-and-stopped",
        ),
        pytest.param(
            SPEC, replace(FRESH, unit=replace(UNIT, active="activating", result="success")),
            ["wait nodeagent-engine.service to start"], id="system-engine-starting",
        ),
        pytest.param(
            SPEC, replace(FRESH, unit=Unit("not-found", "inactive")),
            ["block nodeagent-engine.service is not installed", "fix nodeagent install"],
            id="not-installed",
        ),
        pytest.param(
            SPEC,
            replace(FRESH, unit=replace(UNIT, active="failed"), journal=("one", "no space left")),
            ["block nodeagent-engine.service fails: no space left",
             "fix journalctl -u nodeagent-engine.service"],
            id="system-engine-failed",
        ),
        pytest.param(
            SPEC,
            replace(FRESH, unit=replace(UNIT, active="activating", result="exit-code"),
                    journal=("bad flag",)),
            ["block nodeagent-engine.service fails: bad flag",
             "fix journalctl -u nodeagent-engine.service"],
            id="system-engine-between-two-vain-starts",
        ),
        pytest.param(
            SPEC, replace(STARTED, engine_answers=False),
            ["wait the System Engine to answer on its socket"], id="system-engine-silent",
        ),
        pytest.param(
            SPEC, STARTED, ["do pull image hashicorp/consul:1.21"], id="image-from-registry"
        ),
        pytest.param(
            FROM_ARCHIVE, STARTED, ["do fetch /media/consul.tar"], id="image-from-archive-fetched"
        ),
        pytest.param(
            FROM_ARCHIVE, replace(STARTED, archive_is_here=True),
            [f"do load image hashicorp/consul:1.21 from {ARCHIVE}"],
            id="image-from-archive-loaded",
        ),
        pytest.param(
            SPEC, LOADED,
            ["do write /var/lib/nodeagent/consul/config/consul.json", CREATE],
            id="config-and-container",
        ),
        pytest.param(
            SPEC, replace(LOADED, config=CONFIG), [CREATE], id="killed-before-the-container-ran"
        ),
        pytest.param(
            SPEC, replace(RIGHT, config="{}"),
            ["do write /var/lib/nodeagent/consul/config/candidate/consul.json"],
            id="config-edited-by-hand-and-the-right-one-is-asked-about-first",
        ),
        pytest.param(
            SPEC, replace(RIGHT, config="{}", verdict=""),
            ["do write /var/lib/nodeagent/consul/config/consul.json"],
            id="config-edited-by-hand",
        ),
        pytest.param(
            SPEC, replace(RIGHT, config="{}", verdict="invalid config key colour"),
            ["block Consul refuses its new configuration and goes on with the old one: "
             "invalid config key colour",
             "fix edit /etc/nodeagent/node.yaml"],
            id="config-refused",
        ),
        pytest.param(
            SPEC, replace(RIGHT, reload_pending=True),
            ["do have Consul read its keys and certificates again",
             "do remove /run/nodeagent/consul-reload-pending"],
            id="keys-changed",
        ),
        pytest.param(
            SPEC, replace(DEAD, reload_pending=True),
            ["wait Consul to answer on 127.0.0.1:8500"], id="keys-changed-while-it-starts",
        ),
        pytest.param(
            make_spec(join="[10.10.0.11, 10.10.0.12]"), replace(RIGHT, verdict=""),
            ["do write /var/lib/nodeagent/consul/config/consul.json", CREATE],
            id="spec-changed",
        ),
        pytest.param(
            make_spec(datacenter="nyc3"), replace(RIGHT, verdict=""),
            ["do write /var/lib/nodeagent/consul/config/consul.json", CREATE],
            id="datacenter-changed",
        ),
        pytest.param(
            make_spec(consul="{image: 'hashicorp/consul:1.22'}"), RIGHT,
            ["do run container consul (hashicorp/consul:1.22) in the System Engine"],
            id="image-changed",
        ),
        pytest.param(
            SPEC, replace(DEAD, container=replace(RUNNING, status="exited")),
            ["do start container consul in the System Engine"], id="stopped-by-hand",
        ),
        pytest.param(
            SPEC, DEAD, ["wait Consul to answer on 127.0.0.1:8500"], id="started-a-moment-ago"
        ),
        pytest.param(
            SPEC, replace(DEAD, container=replace(RUNNING, restarts=1)),
            ["wait Consul to answer on 127.0.0.1:8500"], id="fell-over-once",
        ),
        pytest.param(
            SPEC, replace(DEAD, container=replace(RUNNING, status="restarting", restarts=1)),
            ["wait Consul to start again"], id="fell-over-and-is-being-restarted",
        ),
        pytest.param(
            SPEC,
            replace(DEAD, container=replace(
                RUNNING, status="restarting", restarts=7,
                last_lines=("==> Starting...", "* invalid key: bogus", "==> Consul agent exited"))),
            ["block Consul does not start: * invalid key: bogus",
             "fix docker -H unix:///run/nodeagent-engine/docker.sock logs consul"],
            id="crash-looping-with-a-marked-cause",
        ),
        pytest.param(
            SPEC,
            replace(DEAD, container=replace(
                RUNNING, restarts=3, last_lines=("exec format error",))),
            ["block Consul does not start: exec format error",
             "fix docker -H unix:///run/nodeagent-engine/docker.sock logs consul"],
            id="crash-looping-with-one-line",
        ),
        pytest.param(
            SPEC, replace(DEAD, container=replace(RUNNING, status="restarting", restarts=9)),
            ["block Consul does not start: its log is empty",
             "fix docker -H unix:///run/nodeagent-engine/docker.sock logs consul"],
            id="crash-looping-in-silence",
        ),
        pytest.param(
            SPEC, replace(FRESH, agent=FOREIGN), OTHER_CONSUL, id="foreign-consul-on-8500"
        ),
        pytest.param(
            SPEC, replace(FRESH, agent=AGENT), SAME_CONSUL, id="foreign-consul-of-the-same-name"
        ),
        pytest.param(
            SPEC, replace(LOADED, agent=FOREIGN), OTHER_CONSUL, id="foreign-consul-came-first"
        ),
        pytest.param(
            SPEC,
            replace(RIGHT, agent=FOREIGN,
                    container=replace(RUNNING, status="restarting", restarts=5)),
            OTHER_CONSUL, id="foreign-consul-holds-our-port",
        ),
        pytest.param(
            SPEC, replace(RIGHT, agent=FOREIGN), OTHER_CONSUL,
            id="foreign-consul-answers-while-ours-starts",
        ),
        pytest.param(
            SPEC,
            replace(RIGHT, unit=replace(UNIT, active="activating"), engine_answers=False,
                    has_image=False, container=None),
            ["wait nodeagent-engine.service to start"],
            id="our-consul-outlives-a-restart-of-the-system-engine",
        ),
        pytest.param(
            SPEC,
            replace(RIGHT, unit=replace(UNIT, active="failed"), engine_answers=False,
                    has_image=False, container=None, journal=("boom",)),
            ["block nodeagent-engine.service fails: boom",
             "fix journalctl -u nodeagent-engine.service"],
            id="our-consul-outlives-the-system-engine",
        ),
    ],
)  # fmt: skip
def test_container(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(consul.diff(spec, seen)) == plan


BINARY = make_spec(consul=f"{{runtime: binary, archive: /media/consul.zip, sha256: {DIGEST}}}")
BINARY_CONFIG = render(BINARY, ADDRESS, NAME)
HAS = Seen(
    address=ADDRESS,
    hostname=NAME,
    agent=AGENT,
    config=BINARY_CONFIG,
    unit=UNIT,
    archive_is_here=True,
    program_of=DIGEST,
)
STOPPED = replace(HAS, agent=None, unit=Unit("loaded", "inactive", "", "enabled"))
MARK = "do write /run/nodeagent/consul-restart-pending"
PUT = f"do put the program of {ARCHIVE} at /var/lib/nodeagent/consul/bin/consul"
NOTE = "do write /var/lib/nodeagent/consul/bin/consul.sha256"


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        pytest.param(BINARY, HAS, ["done Consul 1.21.0 at 10.10.0.11"], id="all-right"),
        pytest.param(
            make_spec(consul="{runtime: binary}"), replace(STOPPED, program_of=None),
            ["block runtime binary has no program to run",
             "fix give consul.archive and consul.sha256 in /etc/nodeagent/node.yaml"],
            id="no-program-given",
        ),
        pytest.param(
            BINARY, replace(STOPPED, program_of=None, archive_is_here=False, config=None),
            ["do fetch /media/consul.zip"], id="first-boot",
        ),
        pytest.param(
            BINARY, replace(STOPPED, program_of=None, config=None), [PUT, NOTE],
            id="archive-fetched",
        ),
        pytest.param(
            BINARY, replace(HAS, program_of="cd" * 32), [MARK, PUT, NOTE],
            id="another-version-while-running",
        ),
        pytest.param(
            BINARY, replace(STOPPED, config=None),
            ["do write /var/lib/nodeagent/consul/config/consul.json"], id="config-missing",
        ),
        pytest.param(
            BINARY, replace(HAS, config="{}", verdict=""),
            [MARK, "do write /var/lib/nodeagent/consul/config/consul.json"],
            id="config-changed-while-running",
        ),
        pytest.param(
            BINARY, replace(HAS, restart_pending="run-1"),
            ["do restart nodeagent-consul.service: its program or configuration changed"],
            id="killed-before-restart",
        ),
        pytest.param(
            BINARY, replace(HAS, restart_pending="run-0"), ["done Consul 1.21.0 at 10.10.0.11"],
            id="killed-after-restart",
        ),
        pytest.param(
            BINARY, replace(STOPPED, unit=replace(STOPPED.unit, enabled="disabled")),
            ["do enable nodeagent-consul.service"], id="disabled",
        ),
        pytest.param(BINARY, STOPPED, ["do start nodeagent-consul.service"], id="stopped"),
        pytest.param(
            BINARY, replace(STOPPED, unit=Unit("not-found", "inactive")),
            ["block nodeagent-consul.service is not installed", "fix nodeagent install"],
            id="not-installed",
        ),
        pytest.param(
            BINARY,
            replace(STOPPED, unit=replace(UNIT, active="activating", result="exit-code"),
                    journal=("==> invalid config key bogus",)),
            ["block nodeagent-consul.service fails: ==> invalid config key bogus",
             "fix journalctl -u nodeagent-consul.service"],
            id="config-that-consul-refuses",
        ),
        pytest.param(
            BINARY, replace(STOPPED, unit=UNIT), ["wait Consul to answer on 127.0.0.1:8500"],
            id="started-a-moment-ago",
        ),
        pytest.param(BINARY, replace(STOPPED, agent=FOREIGN), OTHER_CONSUL,
                     id="foreign-consul-on-8500"),
        pytest.param(BINARY, replace(HAS, agent=FOREIGN), OTHER_CONSUL,
                     id="foreign-consul-answers-while-ours-starts"),
    ],
)  # fmt: skip
def test_binary(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(consul.diff(spec, seen)) == plan


@pytest.mark.parametrize(
    ("name", "spec", "address"),
    [
        ("server", SPEC, ADDRESS),
        ("worker", make_spec("worker", datacenter="nyc3", domain="example"), "10.10.0.21"),
        ("binary", BINARY, ADDRESS),
    ],
)
def test_rendered_configuration(name: str, spec: Spec, address: str) -> None:
    assert_golden(f"consul.{name}.json", render(spec, address, f"{name}1"))


@pytest.mark.parametrize(
    ("join", "retry_join"),
    [
        pytest.param(
            ["10.10.0.11", "10.10.0.12", "10.10.0.13"], ["10.10.0.12", "10.10.0.13"], id="not-self"
        ),
        pytest.param(["10.10.0.11"], [], id="only-self"),
        pytest.param(
            ["servers.example.com", "10.10.0.12", "localhost"], ["10.10.0.12"], id="no-names"
        ),
        pytest.param(
            ["provider=digitalocean region=nyc3 tag_name=demo"],
            ["provider=digitalocean region=nyc3 tag_name=demo"],
            id="cloud-auto-join-is-consuls-own",
        ),
    ],
)
def test_retry_join(join: list[str], retry_join: list[str]) -> None:
    found = json.loads(render(make_spec(join=json.dumps(join)), ADDRESS, NAME))
    assert found["retry_join"] == retry_join


def test_only_servers_are_told_how_many_there_are() -> None:
    assert json.loads(render(make_spec(servers=5), ADDRESS, NAME))["bootstrap_expect"] == 5
    assert "bootstrap_expect" not in json.loads(render(make_spec("worker"), ADDRESS, NAME))


def test_another_configuration_is_another_container() -> None:
    assert consul.container(SPEC, CONFIG).definition == DEFINITION
    assert consul.container(SPEC, CONFIG + " ").definition != DEFINITION


IMAGE_TAR = "an image"
IMAGE_DIGEST = hashlib.sha256(IMAGE_TAR.encode()).hexdigest()


def machine_with(consul_section: str, contents: dict[str, str]) -> Machine:
    machine = World().machine(make_spec(consul=consul_section), ADDRESS)
    machine.host = replace(machine.host, web=FakeWeb(machine.files, contents))
    return machine


def cycle(machine: Machine) -> Cycle:
    steps = (identity.STEP, kernel.STEP, secrets.STEP, consul.STEP)
    return run_cycle(machine.spec, machine.host, steps, lambda _: None)


def test_image_from_an_archive() -> None:
    machine = machine_with(
        f"{{image: 'from/archive:1', archive: /media/consul.tar, sha256: {IMAGE_DIGEST}}}",
        {"/media/consul.tar": IMAGE_TAR},
    )
    assert cycle(machine).is_ready
    assert machine.system_engine.images == {"from/archive:1"}
    assert machine.files.texts[paths.IMAGES / IMAGE_DIGEST] == IMAGE_TAR


def test_archive_with_a_wrong_digest_is_not_kept() -> None:
    machine = machine_with(
        f"{{image: 'from/archive:1', archive: /media/consul.tar, sha256: {DIGEST}}}",
        {"/media/consul.tar": IMAGE_TAR},
    )
    last = cycle(machine)
    assert last.results[-1].state == "failing"
    assert f"could not fetch /media/consul.tar: its sha256 is {IMAGE_DIGEST}, not {DIGEST}" in (
        last.sentence
    )
    assert not machine.files.exists(paths.IMAGES / DIGEST)
    assert not machine.system_engine.images


def test_archive_that_holds_another_image() -> None:
    machine = machine_with(
        f"{{archive: /media/consul.tar, sha256: {IMAGE_DIGEST}}}", {"/media/consul.tar": IMAGE_TAR}
    )
    last = cycle(machine)
    assert "it holds from/archive:1, not hashicorp/consul:1.21" in last.sentence
    assert not machine.system_engine.containers


def test_image_that_no_registry_has() -> None:
    machine = machine_with("{image: 'hashicorp/consul:0.0'}", {})
    assert "could not pull hashicorp/consul:0.0: manifest unknown" in cycle(machine).sentence


def test_consul_is_not_restarted_by_a_second_cycle() -> None:
    machine = machine_with("{}", {})
    assert cycle(machine).is_ready
    again = cycle(machine)
    assert again.is_ready
    assert again.made_changes == 0
    assert machine.system_engine.runs == 1


def test_a_foreign_consul_and_nothing_is_changed() -> None:
    machine = machine_with("{}", {})
    cycle(machine)
    fresh = World().machine(SPEC, ADDRESS)
    before = dict(fresh.files.texts), dict(fresh.systemd.units)
    fresh.host = replace(fresh.host, consul=machine.consul)
    last = run_cycle(SPEC, fresh.host, (replace(consul.STEP, requires=()),), lambda _: None)
    assert last.is_blocked
    assert (dict(fresh.files.texts), dict(fresh.systemd.units)) == before
