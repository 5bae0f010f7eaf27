"""Whatever is wrong on a node: one sentence that says what and how to mend it, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from nodeagent import paths
from nodeagent.errors import Exit
from tests.lab import cluster, images
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Lab, Machine

SYSTEM_DOCKER = "docker -H unix:///run/nodeagent-engine/docker.sock"
GOOD = """\
cluster: alone
role: server
servers: 1
address: 10.10.0.31
datacenter: lab
consul:
  image: {image}
  archive: {archive}
  sha256: {sha256}
"""
SPEC = "/etc/nodeagent/node.yaml"
# Everything of the owner's and of ours that a refused spec or a blocked step must leave alone.
KEPT = (
    "find /etc /opt/nodeagent /var/lib/nodeagent /usr/local -xdev -type f "
    "-not -path /etc/nodeagent/node.yaml -not -path '/var/lib/nodeagent/engine/*' "
    "-not -path '/var/lib/nodeagent/consul/data/*' -printf '%p %i %T@ %s\\n' | sort"
)
# What stands there before Consul is looked at.
FIRST = {
    str(path)
    for path in (
        paths.CONSUL_AUTHORITIES,
        paths.CONSUL_CERTIFICATE,
        paths.CONSUL_KEYS,
        paths.CONSUL_TOKENS,
    )
}


@dataclass(frozen=True)
class Alone:
    """A machine with the agent installed, its Engine running, and nothing made right yet."""

    machine: Machine
    good: str

    def spec(self, text: str | None) -> None:
        """Put this text in place of the spec; None takes the file away."""
        if text is None:
            self.machine.sh(f"rm -f {SPEC}")
        else:
            self.machine.write(SPEC, text, 0o600)

    def apply(self, timeout_s: float = 5) -> tuple[int, str]:
        """Exit code and last line of one convergence in the foreground."""
        said = self.machine.run(
            "nodeagent", "apply", "--timeout", str(timeout_s), check=False, timeout_s=120
        )
        lines = [*said.stdout.splitlines(), *said.stderr.splitlines()]
        return said.returncode, lines[-1] if said.returncode != Exit.BAD_SPEC else lines[0]

    def unit(self) -> tuple[str, str]:
        """Start the unit; its state and status text once it has one."""
        machine = self.machine
        machine.run("systemctl", "restart", "--no-block", "nodeagent")

        def settled() -> tuple[str, str] | Waiting:
            shown = machine.run(
                "systemctl", "show", "-p", "ActiveState,StatusText,ExecMainStatus", "nodeagent"
            ).stdout
            values = dict(line.split("=", 1) for line in shown.splitlines())
            state, text = values["ActiveState"], values["StatusText"]
            if state == "failed" and values["ExecMainStatus"] == str(int(Exit.BAD_SPEC)):
                return state, text
            is_verdict = text.startswith(("blocked", "failing", "waiting at quorum", "ready"))
            return (state, text) if state == "active" and is_verdict else Waiting(shown)

        try:
            return wait_until(settled, 60, "the unit to say how it stands")
        finally:
            machine.run("systemctl", "stop", "nodeagent")


@pytest.fixture(scope="module")
def booted(lab: Lab) -> Iterator[Alone]:
    archive = images.consul_archive()
    good = GOOD.format(
        image=cluster.CONSUL_IMAGE,
        archive=lab.serve(archive, "consul.tar"),
        sha256=cluster.digest(archive),
    )
    program = cluster.release()
    data = cluster.cluster_file(
        lab, cluster="alone", servers=1, address="10.10.0.31", join=["10.10.0.31"]
    )
    assert data["agent"]["sha256"] == cluster.digest(program)
    machine = lab.machine(
        "lonely", address="10.10.0.31", user_data=cluster.user_data(data, "server")
    )
    machine.boot()
    cluster.wait_ready([machine])
    machine.wait_cloud_init()
    yield Alone(machine, good)
    machine.destroy()


@pytest.fixture
def alone(booted: Alone) -> Alone:
    machine = booted.machine
    machine.sh(
        "systemctl stop nodeagent; "
        "systemctl reset-failed nodeagent docker.service docker.socket || true;"
        "docker swarm leave --force >/dev/null 2>&1 || true;"
        f"{SYSTEM_DOCKER} rm -f consul >/dev/null 2>&1 || true;"
        f"{SYSTEM_DOCKER} rmi -f {cluster.CONSUL_IMAGE} >/dev/null 2>&1 || true;"
        "systemctl disable --now nodeagent-engine.service 2>/dev/null;"
        "cd /var/lib/nodeagent && rm -rf identity.json node-token.json engine-options.json "
        "originals images consul; rm -f /etc/docker/daemon.json /run/nodeagent/*;"
        "systemctl start docker.service",
        timeout_s=90,
    )
    booted.spec(booted.good)
    return booted


def test_the_good_spec_is_good(alone: Alone) -> None:
    assert alone.apply(60)[0] == Exit.OK


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(lambda _: None, "there is no such file", id="missing"),
        pytest.param(lambda _: "", "is empty", id="empty"),
        pytest.param(lambda good: good + "\tx: [", "is not YAML", id="not-yaml"),
        pytest.param(
            lambda good: good.replace("servers: 1", "servers: one"),
            "servers: found 'one'; allowed: a whole number from 1 to 9",
            id="wrong-type",
        ),
        pytest.param(
            lambda good: good.replace("datacenter", "datacentre"),
            "did you mean datacenter?",
            id="unknown-key",
        ),
        pytest.param(lambda good: good + "role: worker\n", "role: given twice", id="two-roles"),
        pytest.param(
            lambda good: good.replace("servers: 1", "servers: 3\njoin: []"),
            "join: found nothing; the servers cannot be found",
            id="join-empty",
        ),
    ],
)
def test_a_wrong_spec(alone: Alone, change: Callable[[str], str | None], sentence: str) -> None:
    machine = alone.machine
    alone.spec(change(alone.good))
    before = machine.sh(KEPT)
    code, said = alone.apply()
    assert code == Exit.BAD_SPEC
    assert sentence in said
    assert SPEC in said
    state, text = alone.unit()
    assert state == "failed"
    assert sentence in text
    assert machine.run("nodeagent", "validate", check=False).returncode == Exit.BAD_SPEC
    assert machine.sh(KEPT) == before
    assert cluster.swarm(machine)["LocalNodeState"] == "inactive"


def blocked(alone: Alone, *sentences: str) -> None:
    """Both `apply` and the unit say all this, and `apply` exits with BLOCKED."""
    code, said = alone.apply()
    assert code == Exit.BLOCKED, said
    state, text = alone.unit()
    assert state == "active"
    for sentence in sentences:
        assert sentence in said
        assert sentence in text


def failing(alone: Alone, *sentences: str) -> None:
    """The same for what is tried again: `apply` exits with WAITING."""
    code, said = alone.apply()
    assert code == Exit.WAITING, said
    _, text = alone.unit()
    for sentence in sentences:
        assert sentence in said
        assert sentence in text


def test_an_address_that_matches_nothing(alone: Alone) -> None:
    alone.spec(alone.good.replace("10.10.0.31", "192.0.2.0/24"))
    before = alone.machine.sh(KEPT)
    blocked(
        alone,
        "address 192.0.2.0/24 matches none of this machine's",
        "10.10.0.31 (host0)",
        "edit address in",
    )
    assert alone.machine.sh(KEPT) == before


def test_an_address_that_matches_two(alone: Alone) -> None:
    alone.spec(alone.good.replace("10.10.0.31", "10.10.0.0/16"))
    alone.machine.run("ip", "address", "add", "10.10.9.9/32", "dev", "host0")
    before = alone.machine.sh(KEPT)
    try:
        blocked(alone, "matches 2 addresses here", "10.10.9.9 (host0)")
    finally:
        alone.machine.run("ip", "address", "del", "10.10.9.9/32", "dev", "host0")
    assert alone.machine.sh(KEPT) == before


def test_a_join_name_that_does_not_resolve(alone: Alone) -> None:
    alone.spec(alone.good.replace("servers: 1", "servers: 3\njoin: [nowhere.example]"))
    code, said = alone.apply(30)
    assert code == Exit.WAITING, said
    assert "a DNS answer for nowhere.example" in said
    assert "a DNS answer for nowhere.example" in alone.unit()[1]


def test_an_image_that_is_nowhere(alone: Alone) -> None:
    lines = alone.good.splitlines()
    alone.spec("\n".join(lines[:-3]) + "\n  image: nodeagent-lab/none:1\n")
    failing(alone, "could not pull nodeagent-lab/none:1")


def test_an_archive_with_a_wrong_digest(alone: Alone) -> None:
    right = json.loads(alone.machine.run("nodeagent", "validate", "--json").stdout)["consul"][
        "sha256"
    ]
    wrong = "f" * 64
    alone.spec(alone.good.replace(right, wrong))
    failing(alone, f"its sha256 is {right}, not {wrong}")
    assert alone.machine.sh("ls -A /var/lib/nodeagent/images") == ""


def test_an_archive_of_another_image(alone: Alone) -> None:
    alone.spec(alone.good.replace(cluster.CONSUL_IMAGE, "hashicorp/consul:1.99"))
    failing(alone, f"it holds {cluster.CONSUL_IMAGE}, not hashicorp/consul:1.99")


def test_a_consul_of_another_datacenter_is_here_already(alone: Alone, lab: Lab) -> None:
    machine = alone.machine
    url = lab.serve(images.consul_binary(), "consul")
    machine.sh(f"curl -sf -o /tmp/consul {url} && chmod 755 /tmp/consul")
    machine.sh(
        "systemd-run --unit=theirs /tmp/consul agent -dev -bind 127.0.0.1 -datacenter elsewhere"
    )
    try:
        wait_until(
            lambda: (
                machine.run(
                    "curl", "-sf", "http://127.0.0.1:8500/v1/status/leader", check=False
                ).returncode
                == 0
                or Waiting("no answer")
            ),
            30,
            "the owner's Consul",
        )
        pid = machine.run("systemctl", "show", "-P", "MainPID", "theirs").stdout
        blocked(alone, "another Consul runs here already", "datacenter elsewhere", "disable")
        assert machine.run("systemctl", "show", "-P", "MainPID", "theirs").stdout == pid
        # Keys and certificates come first; of Consul itself there is nothing.
        assert set(machine.sh(f"find {paths.CONSUL} -type f").splitlines()) == FIRST
    finally:
        machine.run("systemctl", "stop", "theirs")


def test_an_engine_that_is_not_installed(alone: Alone) -> None:
    machine = alone.machine
    unit, script = "/usr/lib/systemd/system/docker.service", "/etc/init.d/docker"
    machine.sh(
        f"systemctl stop docker.socket docker; mv {unit} /tmp/; mv {script} /tmp/docker.init;"
        "systemctl daemon-reload"
    )
    try:
        blocked(alone, "no Docker Engine is installed", "apt-get install docker.io")
        assert machine.run("test", "-e", "/etc/docker/daemon.json", check=False).returncode
    finally:
        machine.sh(
            f"mv /tmp/docker.service {unit}; mv /tmp/docker.init {script}; systemctl daemon-reload"
        )
        machine.run("systemctl", "start", "docker", timeout_s=60)


def test_an_engine_that_is_masked(alone: Alone) -> None:
    machine = alone.machine
    machine.sh("systemctl stop docker.socket docker; systemctl mask docker.service")
    try:
        blocked(alone, "docker.service is masked", "systemctl unmask docker.service")
    finally:
        machine.run("systemctl", "unmask", "docker.service")


def test_an_engine_that_is_stopped_is_started(alone: Alone) -> None:
    alone.machine.sh("systemctl stop docker.socket docker.service")
    code, said = alone.apply(60)
    assert code == Exit.OK, said
    assert alone.machine.run("systemctl", "is-active", "docker").stdout.strip() == "active"


# No Engine older than 20.10 can be had here: this stand-in answers with what 19.03.15 answers to
# the two questions the program asks of it (https://docs.docker.com/engine/api/v1.40/).
OLD_ENGINE = """
import http.server, json, os, socketserver
class Old(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"ApiVersion": "1.40", "MinAPIVersion": "1.12", "Version": "19.03.15",
                "ServerVersion": "19.03.15", "LoggingDriver": "json-file",
                "LiveRestoreEnabled": False, "DockerRootDir": "/var/lib/docker",
                "Swarm": {"LocalNodeState": "inactive"}}
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)
    def address_string(self):
        return "local"
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass
os.path.exists("/run/docker.sock") and os.unlink("/run/docker.sock")
Server("/run/docker.sock", Old).serve_forever()
"""


def test_an_engine_that_is_too_old(alone: Alone) -> None:
    machine = alone.machine
    unit = "/run/systemd/system/docker.service"  # comes before the package's own
    machine.write("/opt/old-engine.py", OLD_ENGINE)
    machine.sh("systemctl stop docker.socket docker.service")
    machine.write(unit, "[Service]\nType=exec\nExecStart=/usr/bin/python3 /opt/old-engine.py\n")
    machine.sh("systemctl daemon-reload; systemctl start docker.service", timeout_s=60)
    try:
        blocked(alone, "Docker Engine 19.03.15 is too old", "install 20.10 or newer")
        assert machine.run("test", "-e", "/etc/docker/daemon.json", check=False).returncode
    finally:
        machine.sh(
            f"systemctl stop docker.service; rm -f {unit} /run/docker.sock;"
            "systemctl daemon-reload; systemctl start docker.socket docker.service",
            timeout_s=60,
        )


def test_an_engine_in_another_swarm(alone: Alone) -> None:
    machine = alone.machine
    machine.run("docker", "swarm", "init", "--advertise-addr", "10.10.0.31", timeout_s=60)
    theirs = cluster.swarm(machine)["Cluster"]["ID"]
    code, said = alone.apply(60)
    assert code == Exit.BLOCKED
    assert f"this Engine is in another Swarm ({theirs})" in said
    assert "docker swarm leave --force" in said
    assert cluster.swarm(machine)["Cluster"]["ID"] == theirs
    assert f"another Swarm ({theirs})" in alone.unit()[1]


def test_owners_options_that_contradict(alone: Alone) -> None:
    machine = alone.machine
    theirs = '{"log-driver": "syslog", "labels": ["rack=7"]}'
    machine.sh("mkdir -p /etc/docker")
    machine.write("/etc/docker/daemon.json", theirs)
    alone.spec(alone.good + "engine: {log: {driver: local}}\n")
    blocked(alone, 'log-driver is "syslog" in /etc/docker/daemon.json', '"local" by')
    assert machine.read("/etc/docker/daemon.json") == theirs


def test_owners_options_are_kept_beside_ours(alone: Alone) -> None:
    machine = alone.machine
    machine.sh("mkdir -p /etc/docker")
    machine.write("/etc/docker/daemon.json", '{"labels": ["rack=7"]}')
    assert alone.apply(60)[0] == Exit.OK
    options = json.loads(machine.read("/etc/docker/daemon.json"))
    assert options["labels"] == ["rack=7"]
    assert options["log-driver"] == "json-file"
    assert "rack=7" in machine.run("docker", "info", "--format", "{{.Labels}}").stdout
    assert machine.read("/var/lib/nodeagent/originals/daemon.json") == '{"labels": ["rack=7"]}'
