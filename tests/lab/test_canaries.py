"""Every secret of a cluster stands where it must, in files of root's alone, and nowhere else."""

from __future__ import annotations

import fnmatch
import json
import secrets as random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodeagent import paths
from nodeagent.errors import Exit
from tests.lab import cluster
from tests.lab.intruder import (
    SYSTEM_ENGINE,
    collect,
    disk,
    gather,
    own_token,
    search,
    servers_secrets,
    workers_secrets,
)
from tests.lab.lab import Machine

#: Where secrets may be, and on which machines each place has some; all are root's, for root alone.
EVERYWHERE = {
    "/etc/nodeagent/secrets.json",
    "/var/lib/nodeagent/node-token.json",
    "/var/lib/nodeagent/consul/tokens.json",
    "/var/lib/nodeagent/consul/config/keys.json",
    "/var/lib/nodeagent/consul/config/node.pem",
    "/var/lib/nodeagent/consul/data/serf/local.keyring",
    "/var/lib/nodeagent/consul/data/services/*",  # Consul keeps the token that registered it
    "/var/lib/nodeagent/consul/data/checks/*",
    # User-data, as cloud-init keeps it.
    "/var/lib/cloud/seed/nocloud/user-data",
    "/var/lib/cloud/instances/*/cloud-config.txt",
    "/var/lib/cloud/instances/*/obj.pkl",
    "/var/lib/cloud/instances/*/user-data.txt",
    "/var/lib/cloud/instances/*/user-data.txt.i",
    "/run/cloud-init/combined-cloud-config.json",
}
ALLOWED = {
    "worker": EVERYWHERE,
    "server": EVERYWHERE
    | {
        "/var/lib/nodeagent/consul/data/raft/raft.db",
    },
}
# It is there in some runs only: what Consul or cloud-init write later, or on some machines.
SOMETIMES = {
    "/var/lib/nodeagent/consul/data/raft/snapshots/*/state.bin",
    "/run/cloud-init/instance-data-sensitive.json",
}


def role(machine: Machine) -> str:
    return machine.name.rstrip("0123456789")


@pytest.fixture(scope="module")
def canaries(four: list[Machine]) -> dict[str, bytes]:
    return servers_secrets(four[:3]) | workers_secrets(four[0], four[-1])


def path_in(machine: Machine, file: str) -> str:
    """The path in the machine of a file that was found from the box."""
    top = next(str(top) for top in disk(machine) if Path(file).is_relative_to(top))
    return ("/run" if top.endswith("/run") else "") + file.removeprefix(top)


@pytest.mark.parametrize("number", [0, 3], ids=["server", "worker"])
def test_secrets_stand_in_files_of_roots_alone(
    four: list[Machine], canaries: dict[str, bytes], number: int
) -> None:
    machine = four[number]
    allowed = ALLOWED[role(machine)]
    used, wrong = set(), []
    for file, names in search(canaries, *disk(machine)).items():
        path, seen = path_in(machine, file), Path(file).stat()
        places = {place for place in allowed | SOMETIMES if fnmatch.fnmatch(path, place)}
        used |= places
        is_private = seen.st_uid == 0 and not seen.st_mode & 0o077
        if not places or not is_private:
            wrong.append((path, stat.filemode(seen.st_mode), sorted(names)))
    assert wrong == []
    assert used - SOMETIMES == allowed, "the search finds what is there"


@pytest.fixture
def nothing_kept(four: list[Machine]) -> Iterator[None]:
    yield
    for machine in (four[0], four[-1]):
        machine.sh("rm -rf /root/canary /run/systemd/system/nodeagent.service.d/verbose.conf")
        machine.sh("systemctl daemon-reload; systemctl restart nodeagent", timeout_s=60)
    cluster.wait_ready(four)


COMMANDS = (
    "--help",
    "--version",
    "status",
    "status --json",
    "plan",
    "plan --json",
    "validate",
    "validate --json",
    "schema",
    "secrets new /etc/nodeagent/secrets.json",
    "user-data --role server --secrets /etc/nodeagent/secrets.json /etc/nodeagent/node.yaml",
    "apply --spec /etc/nodeagent/secrets.json",
    "validate /etc/nodeagent/secrets.json",
    "apply",
    "run",
)
# What `install` is given in their place, each wrong in its own way.
BAD_SECRETS: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 2],
    "no-json": lambda text: text.replace(",", ";"),
    "too-long": lambda text: text.replace('key": "', 'key": "A'),
    "unknown": lambda text: text.replace('{"', '{"x": 1, "').replace("{\n", '{"x": 1,\n'),
    "renamed": lambda text: text.replace('"authorities"', '"authority"'),
    "values-as-keys": lambda text: json.dumps(dict.fromkeys(_texts(json.loads(text)), 1)),
    "list": lambda text: json.dumps(_texts(json.loads(text))),
    "open": lambda text: text,  # with mode 644
    "other-role": lambda text: text,  # of a machine that is one
}


def _texts(data: dict[str, object]) -> list[str]:
    return [value for value in data.values() if isinstance(value, str)]


def say_everything(machine: Machine, other: Machine) -> dict[str, str]:
    """What every command says to root, with -v, and to nobody, by the command."""
    said: dict[str, str] = {}
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")

    def run(*words: str, who: tuple[str, ...] = ()) -> int:
        done = machine.run(*who, "nodeagent", *words, check=False, timeout_s=120)
        assert done.returncode != Exit.BUG, f"{words}: {done.stderr[-500:]}"
        said[" ".join([*who[:1], *words])] = f"{done.stdout}\n{done.stderr}"
        return done.returncode

    text = machine.read(str(paths.SECRETS))
    for name, spoil in BAD_SECRETS.items():
        bad = other.read(str(paths.SECRETS)) if name == "other-role" else spoil(text)
        file = f"/root/canary/{name}"
        machine.write(file, bad, 0o644 if name == "open" else 0o600)
        words = ("-v", "install", "--spec", str(paths.SPEC), "--secrets", file)
        assert run(*words) == Exit.BAD_SPEC, name
    for command in COMMANDS:
        run("-v", *command.split())
        run(*command.split(), who=nobody)
    return said


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    "number",
    [pytest.param(0, id="server"), pytest.param(3, id="worker", marks=pytest.mark.full)],
)
def test_no_command_no_log_and_no_process_shows_a_secret(
    four: list[Machine], canaries: dict[str, bytes], number: int, tmp_path: Path
) -> None:
    """The agent writes its keys anew meanwhile, with -v, and the machine has booted with them."""
    machine, other = four[number], four[3 - number]
    said = say_everything(machine, other)

    machine.run("systemctl", "stop", "nodeagent")
    machine.sh(f"rm {paths.CONSUL_TOKENS} {paths.CONSUL_KEYS} {paths.CONSUL_AUTHORITIES}")
    for words in ("plan", "-v plan", "plan --json"):
        done = machine.run("nodeagent", *words.split(), check=False)
        said[f"{words}, with files to write"] = done.stdout + done.stderr
        assert "keys.json" in done.stdout
    drop_in = "/run/systemd/system/nodeagent.service.d/verbose.conf"
    command = "ExecStart=\nExecStart=/opt/nodeagent/nodeagent -v run\n"
    machine.write(drop_in, f"[Service]\n{command}")
    planted = random.token_hex(20)
    machine.sh(f"logger -t planted {planted}; systemctl daemon-reload; systemctl start nodeagent")
    cluster.wait_ready([machine])
    machine.run("test", "-e", str(paths.CONSUL_KEYS))

    hidden = ("systemd-run", "--quiet", "--collect", "--unit=planted", f"--setenv=X={planted}")
    machine.run(*hidden, "sleep", "1000")
    try:
        gather(machine, (), tmp_path)
    finally:
        machine.run("systemctl", "stop", "planted")
    said["units"] = machine.sh(
        "systemctl cat 'nodeagent*' docker.service; systemctl show '*'", timeout_s=60
    )
    said["engine"] = machine.sh("docker info; docker version; docker network ls; docker ps -a")
    said["system engine"] = machine.run(*SYSTEM_ENGINE, "info").stdout
    said["console"] = machine.console_log.read_text("utf-8", "replace")
    said["/run/nodeagent"] = machine.sh("cat /run/nodeagent/*")
    said["cloud-init"] = machine.sh("cat /var/log/cloud-init*.log /run/cloud-init/*.log")
    collect(tmp_path, said)

    shown = {Path(file).name: names for file, names in search(canaries, tmp_path).items()}
    assert shown == {}
    found = [Path(file).name for file in search({"planted": planted.encode()}, tmp_path)]
    assert "journal" in found, "the search finds what is there"
    assert any(name.endswith(".environ") for name in found)
    (tmp_path / "control").write_text(f"token={own_token(machine)}")
    assert [Path(file).name for file in search(canaries, tmp_path)] == ["control"]
