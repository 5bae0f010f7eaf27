"""A cluster of lab machines, made from user-data alone; what the tests and the demo share."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nodeagent import paths, secrets, spec, userdata
from nodeagent.adapters.pki import LocalPki
from tests.lab import images
from tests.lab.host import LabError, Waiting, wait_until
from tests.lab.lab import Lab, Machine

PROJECT = Path(__file__).parents[2]
SERVERS = {f"server{number}": f"10.10.0.{10 + number}" for number in (1, 2, 3)}
WORKERS = {"worker1": "10.10.0.21"}
CONSUL_IMAGE = "nodeagent-lab/consul:1.8.7"
BOX_IMAGE = "nodeagent-lab/box:1"
READY_TIMEOUT_S = 180


@functools.cache
def release() -> Path:
    """Build the self-contained file of this tree; a few seconds when only the program changed."""
    made = subprocess.run(
        [sys.executable, "tools/build_release.py"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(f"make dist failed:\n{made.stdout[-2000:]}{made.stderr[-4000:]}")
    return max((PROJECT / "dist").glob("nodeagent-*.pyz"), key=lambda path: path.stat().st_mtime)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cluster_file(lab: Lab, **changes: object) -> dict[str, Any]:
    """The cluster file of the lab's cluster, as data: agent and Consul come over HTTP."""
    program, consul = release(), images.consul_archive()
    return {
        "cluster": "demo",
        "servers": 3,
        "address": "10.10.0.0/16",
        "join": list(SERVERS.values()),
        "datacenter": "lab",
        "consul": {
            "image": CONSUL_IMAGE,
            "archive": lab.serve(consul, "consul.tar"),
            "sha256": digest(consul),
        },
        "agent": {"url": lab.serve(program, "nodeagent.pyz"), "sha256": digest(program)},
        **changes,
    }


@functools.cache
def server_secrets() -> secrets.ServerSecrets:
    """The keys of all secured clusters of this run."""
    return secrets.new(LocalPki(), time.time())


def user_data(cluster: Mapping[str, Any], role: spec.Role) -> str:
    data = spec.parse(json.dumps(cluster), "cluster.yaml", spec.Cluster)
    text = None
    if data.is_secured:
        text = userdata.secrets_text(data, role, server_secrets(), LocalPki(), time.time())
    return userdata.render(data, role, text)


def make(
    lab: Lab,
    cluster: Mapping[str, Any],
    machines: Mapping[str, str],
    layers: Iterable[Path] = (),
    flavour: str = "trixie",
) -> list[Machine]:
    """Machines that are off, each with the user-data of the role its name begins with."""
    layers = tuple(layers)
    return [
        lab.machine(
            name,
            flavour=flavour,
            address=address,
            user_data=user_data(cluster, "server" if name.startswith("server") else "worker"),
            layers=layers,
        )
        for name, address in machines.items()
    ]


def inside(machine: Machine, path: str) -> Path:
    """A file of a running machine as the box sees it, without a process in the machine.

    What waits looks ten times a second, and must not take the time it measures.
    """
    return Path(f"/proc/{machine.leader}/root{path}")


def status(machine: Machine) -> dict[str, Any]:
    """What the agent last wrote about its machine; empty before it has written anything."""
    try:
        return dict(json.loads(inside(machine, "/run/nodeagent/status.json").read_text("utf-8")))
    except (LabError, OSError):
        return {}  # it is off, its first process is not there yet, or nothing is written


def is_alive(machine: Machine, pid: int) -> bool:
    try:
        return inside(machine, f"/proc/{pid}").is_dir()
    except (LabError, OSError):
        return False


def wait_ready(machines: Iterable[Machine], timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return when every agent says its node is ready, and is alive to say it."""
    machines = list(machines)

    def ready() -> bool | Waiting:
        sentences = {}
        for machine in machines:
            said = status(machine)
            if said.get("state") != "ready" or not is_alive(machine, said["pid"]):
                sentences[machine.name] = said.get("sentence", "no word from the agent")
        return Waiting(json.dumps(sentences, indent=1)) if sentences else True

    wait_until(ready, timeout_s, f"{', '.join(m.name for m in machines)} to be ready")


def swarm(machine: Machine) -> dict[str, Any]:
    """The Engine's own view of its Swarm membership."""
    said = machine.run("docker", "info", "--format", "{{json .Swarm}}").stdout
    return dict(json.loads(said))


def swarm_nodes(manager: Machine) -> dict[str, dict[str, str]]:
    """`docker node ls` by host name."""
    said = manager.run("docker", "node", "ls", "--format", "{{json .}}").stdout
    rows = [json.loads(line) for line in said.splitlines()]
    assert len({row["Hostname"] for row in rows}) == len(rows), f"a node is listed twice: {rows}"
    return {row["Hostname"]: row for row in rows}


def ask_consul(machine: Machine, path: str, *words: str) -> str:
    """What Consul's API answers to the token of this machine's agent; `words` are curl's."""
    token = json.loads(inside(machine, str(paths.CONSUL_TOKENS)).read_text("utf-8"))["token"]
    url = f"http://127.0.0.1:8500/v1/{path}"
    shown = f"X-Consul-Token: {token}\n"
    return machine.run("curl", "-sSf", "-H", "@-", *words, url, input=shown).stdout


def consul_kv(machine: Machine, key: str) -> str:
    return ask_consul(machine, f"kv/nodeagent/demo/{key}?raw")


def forget_token(server: Machine, name: str) -> None:
    """Let a machine of this name ask for a token again, as a new one."""
    for token in json.loads(ask_consul(server, "acl/tokens")):
        if token["Description"].split()[2:4] == ["node", name]:
            ask_consul(server, f"acl/token/{token['AccessorID']}", "-X", "DELETE")


def consul_container(machine: Machine) -> dict[str, Any]:
    said = machine.run(
        "docker", "-H", "unix:///run/nodeagent-engine/docker.sock", "inspect", "consul"
    ).stdout
    return dict(json.loads(said)[0])
