"""An option changed in every node's spec at once: one Engine at a time, and the cluster serves."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodeagent import paths
from tests.lab import cluster, images
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Lab, Machine
from tests.lab.test_cluster import wait_listed_ready
from tests.lab.test_rotation import undisturbed

pytestmark = pytest.mark.full

TWENTY = "\nengine: {log: {max_size: 20m}}\n"
PORT = 8080

# Asks as a client at the edge does: of any node, and of the next one if that does not answer.
# An answer that no node gave is a failure; so are requests of the service, not connections.
CLIENT = """
import itertools, json, pathlib, sys, urllib.request
end, addresses = pathlib.Path(sys.argv[1]), sys.argv[2:]
asked = failed = turned = 0
for first in itertools.cycle(range(len(addresses))):
    if end.exists():
        break
    asked += 1
    for address in addresses[first:] + addresses[:first]:
        try:
            urllib.request.urlopen(f"http://{address}:8080/etc/hostname", timeout=2).read()
            break
        except OSError:
            turned += 1
    else:
        failed += 1
print(json.dumps({"asked": asked, "failed": failed, "turned": turned}))
"""


# A cluster in which every Engine is there: 26.1, 20.10.24, 28.5 and 20.10.5.
MIXED = {
    ("server-a", "10.10.0.71"): "trixie",
    ("server-b", "10.10.0.72"): "bookworm",
    ("server-c", "10.10.0.73"): "sid",
    ("worker-a", "10.10.0.81"): "classic",
    ("worker-b", "10.10.0.82"): "bookworm",
}


def mixed(lab: Lab) -> list[Machine]:
    join = [address for name, address in MIXED if name.startswith("server")]
    file = cluster.cluster_file(lab, join=join)
    return [
        machine
        for (name, address), flavour in MIXED.items()
        for machine in cluster.make(lab, file, {name: address}, flavour=flavour)
    ]


@pytest.fixture(
    scope="module",
    params=["one-engine", pytest.param("every-engine", marks=pytest.mark.long)],
)
def five(lab: Lab, request: pytest.FixtureRequest) -> Iterator[list[Machine]]:
    """Three servers and two workers, each with a container of a service that answers."""
    if request.param == "every-engine":
        machines = mixed(lab)
        made = machines
    else:  # the session's four and a second worker
        made = cluster.make(lab, cluster.cluster_file(lab), {"worker2": "10.10.0.22"})
        machines = [*request.getfixturevalue("four"), *made]
    for machine in made:
        machine.boot()
    first, more = machines[0], made[-1]
    cluster.wait_ready(machines)
    wait_listed_ready(first, [machine.name for machine in machines])
    archive = lab.serve(images.box_archive())
    for machine in machines:
        machine.sh(f"curl -sSf {archive} | docker load", timeout_s=60)
    first.sh(
        "docker service create --detach --name edge --mode global --no-resolve-image "
        f"--publish mode=host,target={PORT},published={PORT} {cluster.BOX_IMAGE} "
        f"httpd -f -p {PORT} -h /",
        timeout_s=60,
    )

    def answered() -> bool | Waiting:
        names = [machine.name for machine in machines if not answers(lab, machine)]
        return Waiting(f"not on {names}") if names else True

    wait_until(answered, 60, "the service to answer on every node")
    yield machines
    if request.param == "every-engine":
        for machine in machines:
            machine.destroy()
        return
    first.sh("docker service rm edge")
    more.destroy()
    cluster.forget_token(first, more.name)

    def is_down() -> bool | Waiting:
        status = cluster.swarm_nodes(first)[more.name]["Status"]
        return status == "Down" or Waiting(status)

    wait_until(is_down, 60, "the second worker to be missed")
    first.sh(f"docker node rm --force {more.name}")


def answers(lab: Lab, machine: Machine) -> bool:
    url = f"http://{machine.address}:{PORT}/etc/hostname"
    return lab.run("curl", "-sf", "-m", "1", url, check=False).returncode == 0


def set_spec(machines: list[Machine], text: str) -> None:
    """Give all nodes this spec in the same moment, and have them read it."""

    def one(machine: Machine) -> None:
        old = machine.read(str(paths.SPEC)).replace(TWENTY, "")
        machine.write(str(paths.SPEC), old + text)
        machine.sh("systemctl restart nodeagent", timeout_s=60)

    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(one, machines))


def has_size(machine: Machine, size: str) -> bool:
    options = json.loads(machine.read(str(paths.DAEMON_JSON)))
    return bool(options["log-opts"]["max-size"] == size)


def wait_applied(machines: list[Machine], size: str) -> None:
    def applied() -> bool | Waiting:
        said = {machine.name: cluster.status(machine) for machine in machines}
        late = {
            name: status.get("sentence")
            for name, status in said.items()
            if status.get("state") != "ready"
            or status["steps"]["restart"]["sentence"] != "no restart of the Engine is due"
        }
        wrong = [machine.name for machine in machines if not has_size(machine, size)]
        return Waiting(json.dumps({**late, **dict.fromkeys(wrong)})) if late or wrong else True

    wait_until(applied, 300, "all Engines to have the new option")


def outages(machine: Machine, since: float) -> list[tuple[float, float]]:
    """When its Engine was away, by the clock that all machines share, from the journal."""
    lines = machine.sh("journalctl -b -u docker.service -o short-monotonic --no-pager").splitlines()
    found, stopped = [], None
    for line in lines:
        match = re.match(r"\[ *([0-9.]+)\] \S+ systemd\[1\]: (Stopping|Started) docker", line)
        if not match or float(match.group(1)) < since:
            continue
        if match.group(2) == "Stopping":
            stopped = float(match.group(1))
        elif stopped is not None:
            found.append((stopped, float(match.group(1))))
            stopped = None
    assert stopped is None, f"{machine.name}'s Engine did not come back"
    return found


def assert_one_at_a_time(machines: list[Machine], since: float) -> list[tuple[float, float, str]]:
    found = sorted(
        (begin, end, machine.name) for machine in machines for begin, end in outages(machine, since)
    )
    for (_, end, one), (begin, _, other) in itertools.pairwise(found):
        assert end < begin, f"{one} and {other} were away at the same time: {found}"
    return found


def test_one_engine_at_a_time_and_every_request_is_answered(
    lab: Lab, five: list[Machine], tmp_path: Path
) -> None:
    end = tmp_path / "end"
    addresses = [machine.address for machine in five]
    said: list[str] = []
    client = threading.Thread(
        target=lambda: said.append(
            lab.run(sys.executable, "-c", CLIENT, end, *addresses, timeout_s=400).stdout
        )
    )
    since = time.monotonic()
    with undisturbed(five):
        client.start()
        try:
            set_spec(five, TWENTY)
            wait_applied(five, "20m")
        finally:
            end.touch()
            client.join()
    took_s = time.monotonic() - since
    found = assert_one_at_a_time(five, since)
    assert sorted(name for _, _, name in found) == sorted(machine.name for machine in five)
    counts = json.loads(said[0])
    longest = max(to - begin for begin, to, _ in found)
    print(f"five Engines in {took_s:.1f} s, one at a time, each away {longest:.1f} s at most")
    print(f"a client meanwhile: {counts}")
    assert counts["failed"] == 0
    assert counts["asked"] > 100
    assert counts["turned"] > 0, "nobody was ever away for the client: the test sees nothing"


def test_the_others_go_on_when_the_locks_holder_dies(five: list[Machine]) -> None:
    """Back to the first option; a worker loses power while it holds the lock."""
    set_spec(five, "")
    workers = {machine.name: machine for machine in five if machine.name.startswith("worker")}
    server = five[0]

    def holder() -> Machine | Waiting:
        lock = json.loads(cluster.ask_consul(server, "kv/nodeagent/demo/?recurse=true"))
        held = {each["Key"]: each for each in lock if each.get("Session")}
        found = held.get("nodeagent/demo/engine-restart")
        names = {machine.name for machine in five}
        node = json.loads(cluster.ask_consul(server, "session/list")) if found else []
        owner = next((s["Node"] for s in node if found and s["ID"] == found["Session"]), "")
        assert owner in names | {""}
        return workers.get(owner) or Waiting(owner or "nobody")

    victim = wait_until(holder, 240, "a worker to hold the lock")
    victim.kill()
    others = [machine for machine in five if machine is not victim]
    wait_applied(others, "10m")
    victim.boot()
    wait_applied(five, "10m")
    print(f"{victim.name} lost power while it held the lock; the others went on")
