"""How long the agents take from their start to a ready cluster, beside a hand-tuned script.

The floor is what a person could do who knows everything beforehand: start Consul everywhere,
wait for the election, `swarm init` on a chosen server, and join the others at once with the tokens
handed to them; nothing is encrypted or authenticated. The agents do it twice: secured, and with
`security: off`. All begin at the same state: Engines running, images loaded, options in place,
and no key, certificate or token but those of the user-data.

It comes last in a session: an Engine (26.1) that leaves one Swarm and joins the next without a
restart in between may find its port 7946 still taken, and has no overlay networks from then on.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

from nodeagent import paths, spec
from nodeagent.steps import consul
from tests.lab import cluster
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Machine
from tests.lab.test_cluster import assert_one_swarm

ROUNDS = 3
OFF = "security: off\n"
SOCKET = "unix:///run/nodeagent-engine/docker.sock"
FLOOR_CONFIG = paths.STATE / "floor" / "consul.json"
# Gates against a slip, well above what is measured; the figures themselves are printed.
MOST = 2.5
MOST_FOR_SECURITY = 2.0

FORGET = f"""
systemctl stop nodeagent
docker swarm leave --force >/dev/null 2>&1 || true
docker -H {SOCKET} rm -f consul >/dev/null 2>&1 || true
rm -rf {paths.CONSUL} {paths.IDENTITY} {paths.NODE_TOKEN} {paths.STATUS}
"""

FLOOR = f"""
docker -H {SOCKET} run -d --name consul --network host --restart always --entrypoint consul \\
  -v {FLOOR_CONFIG.parent}:/consul/config:ro \\
  -v /var/lib/nodeagent/consul/data:/consul/data \\
  {cluster.CONSUL_IMAGE} agent -config-file=/consul/config/consul.json >/dev/null
kv=http://127.0.0.1:8500/v1/kv/floor
if [ "$1" = first ]; then
  until [ "$(curl -s http://127.0.0.1:8500/v1/status/leader)" != '""' ] &&
    curl -sf http://127.0.0.1:8500/v1/status/leader >/dev/null; do sleep 0.02; done
  docker swarm init --advertise-addr "$2" >/dev/null
  curl -sf -X PUT -d "$(docker swarm join-token -q worker)" $kv/worker >/dev/null
  curl -sf -X PUT -d "$(docker swarm join-token -q manager)" $kv/manager >/dev/null
else
  until token=$(curl -sf "$kv/$1?raw"); do sleep 0.02; done
  docker swarm join --advertise-addr "$2" --token "$token" 10.10.0.11:2377 >/dev/null
fi
date +%s.%N
"""


def on_all(machines: list[Machine], scripts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(machines)) as pool:
        return list(
            pool.map(
                lambda one: one[0].sh(one[1], timeout_s=120), zip(machines, scripts, strict=True)
            )
        )


def now(machine: Machine) -> float:
    return float(machine.sh("date +%s.%N"))


def floor_s(machines: list[Machine]) -> float:
    """Seconds from the start of the script to its last line on the slowest machine."""
    on_all(machines, [FORGET] * len(machines))
    began = now(machines[0])
    words = ["first", "manager", "manager", "worker"]
    ended = on_all(
        machines,
        [
            f"set -- {word} {machine.address}\n{FLOOR}"
            for word, machine in zip(words, machines, strict=True)
        ],
    )
    return max(float(end.split()[-1]) for end in ended) - began


def agents_s(machines: list[Machine], security: Literal["on", "off"]) -> float:
    """Seconds from `systemctl start` to the last node's state ready."""
    on_all(machines, [FORGET] * len(machines))
    for machine in machines:
        machine.write(str(paths.SPEC), spec_text(machine, security), 0o600)
    began = now(machines[0])
    on_all(machines, ["systemctl start nodeagent"] * len(machines))

    def ready() -> float | Waiting:
        said = [cluster.status(machine) for machine in machines]
        if any(each.get("state") != "ready" for each in said):
            return Waiting(json.dumps([each.get("sentence") for each in said]))
        assert {each["about"]["security"] for each in said} == {security}
        return max(float(each["began"]) + float(each["ready_s"]) for each in said)

    return wait_until(ready, 120, "every agent to be ready") - began


def spec_text(machine: Machine, security: Literal["on", "off"]) -> str:
    """The machine's spec as it was made, with `security: off` where that is wanted."""
    text = machine.read(str(paths.SPEC)).removesuffix(OFF)
    return text + OFF if security == "off" else text


def write_floor_config(machine: Machine) -> None:
    """The configuration that an agent without security would write."""
    node = spec.parse(spec_text(machine, "off"), "node.yaml", spec.Spec)
    machine.write(str(FLOOR_CONFIG), consul.render(node, machine.address, machine.name))


def test_time_to_ready_beside_the_floor(
    four: list[Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    for machine in four:
        write_floor_config(machine)
    times: dict[str, list[float]] = {"floor": [], "agents": [], "agents without security": []}
    for _ in range(ROUNDS):
        times["floor"].append(floor_s(four))
        times["agents without security"].append(agents_s(four, "off"))
        times["agents"].append(agents_s(four, "on"))
    assert_one_swarm(four)
    median = {name: statistics.median(each) for name, each in times.items()}
    ratio = median["agents"] / median["floor"]
    for_security = median["agents"] / median["agents without security"]
    with capsys.disabled():
        print(f"\ntime to ready of 3 servers and a worker, {ROUNDS} rounds each, in turn:")
        for name, each in times.items():
            print(f"  {name} {median[name]:.2f} s ({min(each):.2f} to {max(each):.2f})")
        print(f"  ratio {ratio:.2f}, of security {for_security:.2f}")
    assert ratio < MOST
    assert for_security < MOST_FOR_SECURITY
