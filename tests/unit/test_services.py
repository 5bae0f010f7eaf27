"""Consul's catalogue says what is true of this node: facts in, plan out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodeagent.host import EngineInfo, Service, SwarmInfo
from nodeagent.spec import Spec
from nodeagent.steps import services
from nodeagent.steps.services import Seen, wanted
from tests.unit.expect import said
from tests.unit.fakes import make_spec

SERVER, WORKER = make_spec("server"), make_spec("worker")
ENGINE = EngineInfo(
    "26.1.5", {"log-driver": "json-file"}, SwarmInfo("active", "node-1", True, "swarm-1")
)


def registered(spec: Spec, engine: EngineInfo = ENGINE) -> dict[str, Service]:
    return {each.id: each for each in wanted(spec, "10.10.0.11", engine)}


RIGHT = Seen("10.10.0.11", ENGINE, registered(SERVER))
MANAGER = "do register service swarm-manager in Consul"
NODE = "do register service nodeagent in Consul"
DOCKER = "do register service docker-engine in Consul"


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        pytest.param(
            SERVER, RIGHT, ["done registered: swarm-manager, nodeagent, docker-engine"],
            id="server-registered",
        ),
        pytest.param(
            WORKER, replace(RIGHT, registered=registered(WORKER)),
            ["done registered: nodeagent, docker-engine"], id="worker-registered",
        ),
        pytest.param(
            SERVER, replace(RIGHT, registered={}), [MANAGER, NODE, DOCKER], id="server-first-boot"
        ),
        pytest.param(
            WORKER, replace(RIGHT, registered={}), [NODE, DOCKER], id="worker-first-boot"
        ),
        pytest.param(
            SERVER, replace(RIGHT, engine=replace(ENGINE, version="27.0.1")), [DOCKER],
            id="engine-upgraded",
        ),
        pytest.param(
            SERVER,
            replace(RIGHT, engine=replace(ENGINE, swarm=replace(ENGINE.swarm, node_id="node-2"))),
            [MANAGER, NODE], id="joined-afresh-with-another-node-id",
        ),
        pytest.param(
            SERVER, replace(RIGHT, address="10.10.0.99"), [MANAGER], id="address-changed"
        ),
        pytest.param(
            WORKER, RIGHT, [NODE, "do deregister service nodeagent:swarm-manager from Consul"],
            id="a-server-became-a-worker",
        ),
        pytest.param(
            SERVER,
            replace(RIGHT, registered={**RIGHT.registered, "nodeagent:old": Service(
                "old", 0, (), {})}),
            ["do deregister service nodeagent:old from Consul"], id="left-by-an-earlier-version",
        ),
        pytest.param(
            SERVER, replace(RIGHT, engine=None), ["wait docker.service to answer on its socket"],
            id="engine-silent",
        ),
    ],
)  # fmt: skip
def test_plan(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(services.diff(spec, seen)) == plan


def test_every_service_has_a_check_that_can_fail() -> None:
    for spec in (SERVER, WORKER):
        for service in wanted(spec, "10.10.0.11", ENGINE):
            assert bool(service.tcp) != bool(service.ttl_s), service


def test_the_manager_is_checked_where_it_listens() -> None:
    manager = registered(SERVER)["nodeagent:swarm-manager"]
    assert (manager.port, manager.tcp) == (2377, "10.10.0.11:2377")


def test_the_loop_vouches_for_what_has_no_port() -> None:
    by_ttl = {each.name for each in wanted(SERVER, "10.10.0.11", ENGINE) if each.ttl_s}
    assert by_ttl == set(services.VOUCHED)
