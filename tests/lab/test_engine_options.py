"""Whatever daemon.json holds and the spec asks: a real Engine of every version runs afterwards."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent import options, paths
from tests.lab import cluster, images
from tests.lab.flavours import FLAVOURS
from tests.lab.host import LabError, Waiting, wait_until
from tests.lab.lab import Lab, Machine

DRIVER = "/root/engine_driver.py"
FILE = str(paths.DAEMON_JSON)
FLAGS = "/etc/default/docker"
SPEC = "cluster: table\nrole: server\nservers: 1\naddress: 10.10.0.0/16\nsecurity: off\n"
OPTS = {"max-size": "10m", "max-file": "10", "compress": "true"}
STOCK = {"log-driver": "json-file", "log-opts": OPTS}
OLD = ("classic", "bookworm")  # Engine 20.10
NEW = ("trixie", "sid")
RUN_TIMEOUT_S = 150  # for one run of the driver, which counts its cycles itself


@dataclass(frozen=True)
class Done:
    """The file holds what it held and `adds`; the Engine was restarted so often, and shows it."""

    adds: Mapping[str, Any] = field(default_factory=lambda: STOCK)
    restarts: int | None = 1  # None: it fails and is started again by systemd before we come
    shows: Mapping[str, Any] = field(default_factory=dict)
    says: str = "Docker Engine"


@dataclass(frozen=True)
class Stays:
    """Nothing is written and nothing restarted; the sentence has these words."""

    says: str
    state: str = "blocked"
    runs: bool = True  # False: it did not before


Outcome = Done | Stays


@dataclass(frozen=True, kw_only=True)
class Row:
    """A machine as its owner left it, and a spec; what comes of the two, where it differs by kind.

    `file` is daemon.json (data, or text as it is), `flags` what /etc/default/docker gives dockerd.
    With `restarted`, the Engine was restarted with that; else it runs with what was before.
    """

    name: str
    file: object = None
    engine: str = ""
    flags: str = ""
    restarted: bool = False
    before: str = ""  # commands that make the rest of it so
    after: str = ""  # and undo it
    outcome: Outcome | Mapping[str, Outcome]
    core: bool = False

    @property
    def text(self) -> bytes | None:
        if self.file is None or isinstance(self.file, bytes):
            return self.file
        text = self.file if isinstance(self.file, str) else json.dumps(self.file)
        return text.encode()

    def on(self, flavour: str) -> Outcome:
        return self.outcome[flavour] if isinstance(self.outcome, Mapping) else self.outcome


def by(old: Outcome, new: Outcome) -> Mapping[str, Outcome]:
    """By the Engine's version: 20.10, and those that know --validate."""
    return {**dict.fromkeys(OLD, old), **dict.fromkeys(NEW, new)}


OWNERS = {
    "insecure-registries": ["10.0.0.0/8", "registry.example:5000"],
    "max-concurrent-downloads": 2,
    "log-opts": {"max-file": "3", "labels": "team"},
}
MERGED = {
    "log-driver": "json-file",
    "log-opts": {"max-file": "3", "labels": "team", "max-size": "10m", "compress": "true"},
}
TINY = "mount -t tmpfs -o size=8k,mode=755 tiny /etc/docker"
LATER = f"chown 1234:1234 {FILE}; chmod 600 {FILE}"
SWARM = "docker swarm init --advertise-addr 127.0.0.1 >/dev/null"
LEAVE = "docker swarm leave --force >/dev/null"
# Until systemd has given up on an Engine that fails, or it runs.
SETTLED = 'while [ "$(systemctl is-active docker)" = activating ]; do sleep 0.1; done'
REFUSES = "the Engine refuses /etc/docker/daemon.json .* so nothing was changed: .*"
UNKNOWN = REFUSES + "don't match any configuration option"
BOTH = REFUSES + "specified both as a flag and in the configuration file"


def asked(**given: object) -> str:
    return f"options: {json.dumps({key.replace('_', '-'): value for key, value in given.items()})}"


TABLE = [
    # -- whether there is a file, and what kind of one
    Row(name="no-file", outcome=Done(), core=True),
    Row(name="empty-file", file="", outcome=Done(), core=True),
    Row(name="empty-file-that-the-engine-dies-of", file="", restarted=True,
        outcome=by(Done(restarts=None), Done()), core=True),
    Row(name="empty-file-that-the-engine-died-of", file="", restarted=True, before=SETTLED,
        outcome=by(Done(restarts=None), Done())),
    Row(name="white-space", file=" \n\t\n", outcome=Done()),
    Row(name="empty-object", file={}, outcome=Done(), core=True),
    Row(name="byte-order-mark", file='\ufeff{"shutdown-timeout": 7}', outcome=Done()),
    Row(name="windows-line-ends", file='{\r\n  "shutdown-timeout": 7\r\n}\r\n', outcome=Done()),
    Row(name="trailing-comma", file='{"debug": true,}', outcome=Stays("cannot be read: line 1"),
        core=True),
    Row(name="trailing-comma-that-the-engine-dies-of", file='{"debug": true,}', restarted=True,
        outcome=Stays("cannot be read: line 1", runs=False)),
    Row(name="comment", file='{\n  // ours\n  "debug": true\n}', outcome=Stays("line 2")),
    Row(name="cut-off", file='{"debug": tr', outcome=Stays("cannot be read: line 1")),
    Row(name="a-list", file=[], outcome=Stays("it holds no JSON object")),
    Row(name="not-utf8", file=b'{"labels": ["city=Z\xfcrich"]}', outcome=Done()),
    Row(name="two-objects", file="{}{}", outcome=Stays("cannot be read: line 1: Extra data")),
    Row(name="not-a-number", file='{"shutdown-timeout": NaN}', outcome=Stays("NaN|invalid")),
    Row(name="a-key-twice", file='{"debug": true, "debug": false}', outcome=Stays("debug .*twice")),
    Row(name="a-log-option-twice", file='{"log-opts": {"tag": "a"}, "log-opts": {"labels": "b"}}',
        outcome=Stays("log-opts .*twice")),
    Row(name="one-megabyte", file={"labels": [f"note={'x' * 1_000_000}"]}, outcome=Done(),
        core=True),
    Row(name="a-directory", before=f"mkdir {FILE}", after=f"rmdir {FILE}",
        outcome=Stays("read /etc/docker/daemon.json", "failing")),
    Row(name="a-symlink", before=f"echo '{{\"debug\": true}}' >/root/real.json; "
        f"ln -s /root/real.json {FILE}", after=f"test -L {FILE}; rm /root/real.json",
        outcome=Done({**STOCK, "debug": True}), core=True),
    Row(name="a-symlink-to-nowhere", before=f"rm -f /root/real.json; ln -s /root/real.json {FILE}",
        after=f"test -L {FILE}; rm /root/real.json", outcome=Done()),
    Row(name="somebody-elses", file={"debug": True}, before=LATER,
        after=f'test "$(stat -c %u:%g:%a {FILE})" = 1234:1234:600', outcome=Done(), core=True),
    Row(name="read-only-file-system", file={"debug": True},
        before="mount --bind /etc/docker /etc/docker; mount -o remount,ro,bind /etc/docker",
        outcome=Stays("write /etc/docker/daemon.json: Read-only file system", "failing"),
        core=True),
    Row(name="full-disk",
        before=f"{TINY}; echo '{{\"debug\": true}}' >{FILE}; cat /dev/zero >/etc/docker/fill || :",
        outcome=Stays("write /etc/docker/daemon.json: No space left on device", "failing"),
        core=True),
    Row(name="no-directory", before="mv /etc/docker /etc/docker.away",
        after="cp -an /etc/docker.away/. /etc/docker/; rm -r /etc/docker.away", outcome=Done()),
    # -- what its owner has in it, good and bad
    Row(name="owners-options", file=OWNERS, outcome=Done(MERGED), core=True),
    Row(name="owners-driver", file={"log-driver": "journald", "debug": True}, restarted=True,
        outcome=Done({}, restarts=0, shows={"log-driver": "journald"}), core=True),
    Row(name="ours-already", file=STOCK, restarted=True, outcome=Done({}, restarts=0), core=True),
    Row(name="ours-already-and-more", file={**STOCK, **{"shutdown-timeout": 9}}, restarted=True,
        outcome=Done({}, restarts=0)),
    Row(name="number-as-log-option", file={"log-opts": {"max-file": 3}},
        outcome=Stays("log-opts max-file is 3, which needs quotes"), core=True),
    Row(name="boolean-as-log-option", file={"log-opts": {"compress": True}},
        outcome=Stays("log-opts compress is true, which needs quotes")),
    Row(name="log-options-as-list", file={"log-opts": ["max-size=1m"]},
        outcome=Stays("log-opts are no JSON object")),
    Row(name="unknown-log-option", file={"log-opts": {"max-sizes": "1m"}},
        outcome=Stays("log-opts max-sizes is unknown to log driver json-file")),
    Row(name="log-size-that-is-none", file={"log-opts": {"max-size": "plenty"}},
        outcome=Stays('log-opts max-size is "plenty", which is no number')),
    Row(name="one-file-of-the-owners", file={"log-opts": {"max-file": "1"}},
        outcome=Done(adds={"log-driver": "json-file",
                           "log-opts": {"max-file": "1", "max-size": "10m"}})),
    Row(name="one-file-compressed", file={"log-opts": {"max-file": "1", "compress": "true"}},
        outcome=Stays("log-opts compress needs max-size and a max-file of 2 or more")),
    Row(name="unknown-log-driver", file={"log-driver": "jsonfile"},
        outcome=Stays('log-driver is "jsonfile", which no Docker Engine has')),
    Row(name="driver-as-number", file={"log-driver": 5}, outcome=Stays("log-driver is 5")),
    Row(name="unknown-key", file={"no-such-option": 1}, outcome=Stays(UNKNOWN), core=True),
    Row(name="key-in-capitals", file={"Debug": True}, outcome=Stays(UNKNOWN)),
    Row(name="hosts-in-both-places", file={"hosts": ["tcp://127.0.0.1:2375"]}, outcome=Stays(BOTH),
        core=True),
    Row(name="live-restore", file={"live-restore": True},
        outcome=Stays("live-restore in /etc/docker/daemon.json is true, which an Engine in Swarm")),
    Row(name="live-restore-in-a-swarm", file={"live-restore": True}, before=SWARM, after=LEAVE,
        outcome=Stays("live-restore in /etc/docker/daemon.json is true, which an Engine in Swarm"),
        core=True),
    Row(name="live-restore-off", file={"live-restore": False}, outcome=Done()),
    Row(name="cluster-store", file={"cluster-store": "consul://127.0.0.1:8500"}, outcome={
        **dict.fromkeys(NEW, Stays("cluster-store was removed in Docker Engine 23.0 and this is")),
        "bookworm": Stays("this build of Docker Engine 20.10.24.* has no Consul in it"),
        "classic": Stays("which an Engine in Swarm mode cannot have"),
    }, core=True),
    Row(name="cluster-store-elsewhere", file={"cluster-store": "etcd://127.0.0.1:2379"},
        outcome=by(Stays("which an Engine in Swarm mode cannot have"),
                   Stays("cluster-store was removed in Docker Engine 23.0"))),
    Row(name="dns-as-text", file={"dns": "10.0.0.1"}, outcome=Stays(REFUSES)),
    Row(name="dns-by-name", file={"dns": ["dns.example"]}, outcome=Stays(REFUSES)),
    Row(name="dns", file={"dns": ["10.0.0.1"], "dns-search": ["example"]}, outcome=Done()),
    Row(name="label-without-value", file={"labels": ["zone"]}, outcome=Stays(REFUSES)),
    Row(name="reserved-label", file={"labels": ["com.docker.zone=a"]}, outcome=Stays(REFUSES)),
    Row(name="label-that-contradicts-itself", file={"labels": ["zone=a", "zone=b"]},
        outcome=Stays(REFUSES)),
    Row(name="labels", file={"labels": ["zone=a", "city=Zürich"]},
        outcome=Done(shows={"labels": ["city=Zürich", "zone=a"]})),
    Row(name="negative-number", file={"max-concurrent-downloads": -1}, outcome=Stays(REFUSES)),
    Row(name="number-as-text", file={"max-concurrent-downloads": "2"}, outcome=Stays(REFUSES)),
    Row(name="bip-that-is-none", file={"bip": "10.99.0.1/33"},
        outcome=Stays('bip is "10.99.0.1/33", which is no network')),
    Row(name="pool-that-is-none",
        file={"default-address-pools": [{"base": "10.99.0.0/16", "size": 8}]},
        outcome=Stays("default-address-pools is .*, which is no network")),
    Row(name="pools", file={"default-address-pools": [{"base": "10.98.0.0/16", "size": 24}]},
        outcome=Done(shows={"default-address-pools": [{"base": "10.98.0.0/16", "size": 24}]})),
    Row(name="proxies", file={"proxies": {"http-proxy": "http://proxy.example:3128"}},
        outcome=by(Stays(UNKNOWN), Done())),
    Row(name="runtimes", file={"runtimes": {"mine": {"path": "/usr/sbin/runc"}}}, outcome=Done()),
    Row(name="features-and-builder", file={"features": {"buildkit": True},
        "builder": {"gc": {"enabled": True}}}, outcome=Done()),
    Row(name="ulimits", file={"default-ulimits": {
        "nofile": {"Name": "nofile", "Hard": 64000, "Soft": 64000}}}, outcome=Done()),
    Row(name="tls-without-its-files-that-the-engine-dies-of", restarted=True,
        file={"tlsverify": True, "tlscacert": "/none", "tlscert": "/none", "tlskey": "/none"},
        outcome=by(Stays("docker.service fails to start: .*Could not load X509", runs=False),
                   Stays(REFUSES + "Could not load X509", runs=False))),
    Row(name="bad-mirror", file={"registry-mirrors": ["mirror"]},
        outcome=Stays('registry-mirrors has "mirror", which is no mirror\'s URL')),
    Row(name="bad-log-level", file={"log-level": "loud"}, outcome=Stays(REFUSES)),
    Row(name="engines-own-places", file={"data-root": "/var/lib/docker", "exec-root":
        "/var/run/docker", "storage-driver": "overlay2"}, outcome=Done()),
    # -- what the spec asks beside it
    Row(name="asked-and-already-there", file={**STOCK, "debug": True}, engine=asked(debug=True),
        restarted=True, outcome=Done({}, restarts=0, shows={"debug": True})),
    Row(name="asked-as-the-owner-has-it", file={"debug": True}, engine=asked(debug=True),
        outcome=Done(shows={"debug": True})),
    Row(name="asked-against-the-owner", file={"shutdown-timeout": 9},
        engine=asked(shutdown_timeout=7), outcome=Stays(
            "shutdown-timeout is 9 in /etc/docker/daemon.json and 7 by /etc/nodeagent/node.yaml")),
    Row(name="asked-driver-against-the-owner", file={"log-driver": "journald"},
        engine="log: {driver: local}", outcome=Stays('log-driver is "journald" in .*"local" by'),
        core=True),
    Row(name="local-driver", engine="log: {driver: local, max_file: 3}", outcome=Done(
        {"log-driver": "local", "log-opts": {**OPTS, "max-file": "3"}},
        shows={"log-driver": "local"}), core=True),
    Row(name="local-driver-with-owners-json-options", file={"log-opts": {"labels": "team"}},
        engine="log: {driver: local}",
        outcome=Stays("log-opts labels is unknown to log driver local")),
    Row(name="reloadable", file=STOCK, restarted=True, engine=asked(labels=["zone=a"], debug=True),
        outcome=Done({"labels": ["zone=a"], "debug": True}, restarts=0,
                     shows={"labels": ["zone=a"], "debug": True}), core=True),
    Row(name="reloadable-mirror", file=STOCK, restarted=True,
        engine=asked(registry_mirrors=["https://mirror.example"]),
        outcome=Done({"registry-mirrors": ["https://mirror.example"]}, restarts=0,
                     shows={"registry-mirrors": ["https://mirror.example/"]})),
    Row(name="not-reloadable", file=STOCK, restarted=True, engine=asked(bip="10.99.0.1/24"),
        outcome=Done({"bip": "10.99.0.1/24"})),
    Row(name="asked-in-a-swarm", file=STOCK, restarted=True, before=SWARM, after=LEAVE,
        engine=asked(bip="10.99.0.1/24"),
        outcome=Done({"bip": "10.99.0.1/24"}, restarts=0, says="new options wait for a restart")),
    Row(name="asked-unknown-key", engine=asked(no_such_option=1), outcome=Stays(UNKNOWN)),
    Row(name="asked-bad-bip", engine=asked(bip="10.99.0.1/33"),
        outcome=Stays('bip is "10.99.0.1/33", which is no network')),
    Row(name="asked-bad-pool", engine=asked(default_address_pools=[{"base": "10.99.0.0/16"}]),
        outcome=Stays("default-address-pools is .*, which is no network")),
    Row(name="asked-wrong-type", engine=asked(debug="yes"), outcome=Stays(REFUSES)),
    Row(name="asked-negative", engine=asked(max_concurrent_uploads=-3), outcome=Stays(REFUSES)),
    Row(name="asked-newer-key", engine=asked(proxies={"http-proxy": "http://proxy.example:3128"}),
        outcome=by(Stays(UNKNOWN),
                   Done({**STOCK, "proxies": {"http-proxy": "http://proxy.example:3128"}}))),
    Row(name="asked-store", engine=asked(data_root="store"),
        outcome=Stays("data-root cannot be given here", "refused")),
    Row(name="asked-hosts", engine=asked(hosts=["tcp://0.0.0.0:2375"]),
        outcome=Stays("hosts cannot be given here: docker.service sets it", "refused")),
    Row(name="asked-live-restore", engine=asked(live_restore=True),
        outcome=Stays("live-restore cannot be given here", "refused")),
    Row(name="asked-number-of-files-in-quotes", engine='log: {max_file: "3"}',
        outcome=Stays("leave out the quotes", "refused")),
    # -- and what the unit says
    Row(name="flag-of-no-interest", flags="--shutdown-timeout=9", outcome=Done()),
    Row(name="driver-by-a-flag", flags="--log-driver=journald", restarted=True,
        outcome=Done({}, restarts=0, shows={"log-driver": "journald"}), core=True),
    Row(name="log-option-by-a-flag", flags="--log-opt max-size=1m", restarted=True,
        outcome=Done({}, restarts=0)),
    Row(name="driver-by-a-flag-against-the-spec", flags="--log-driver=journald",
        engine="log: {driver: local}",
        outcome=Stays("log-driver is --log-driver=journald in /etc/default/docker and \"local\"")),
    Row(name="flag-as-the-spec-has-it", flags="--bip=10.99.0.1/24",
        engine=asked(bip="10.99.0.1/24"), outcome=Done()),
    Row(name="flag-against-the-spec", flags="--bip 10.97.0.1/24", engine=asked(bip="10.99.0.1/24"),
        outcome=Stays("bip is --bip=10.97.0.1/24 in /etc/default/docker"), core=True),
    Row(name="flag-and-file", file={"debug": True}, flags="-D", outcome=Stays(BOTH)),
    Row(name="unknown-flag", flags="--no-such-flag", outcome=Stays(REFUSES + "unknown flag")),
    Row(name="flag-twice-in-the-file", file={"dns": ["10.0.0.1"]}, flags="--dns 10.0.0.2",
        outcome=Stays(BOTH)),
]  # fmt: skip
assert len({row.name for row in TABLE}) == len(TABLE) >= 60


# -- machines


COUNT = (
    "journalctl --sync; journalctl -b -q -o cat UNIT=docker.service "
    "MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5 | wc -l"
)
FRESH = f"""
umount -q /etc/docker || :
rm -rf {FILE} /etc/docker/.daemon* /run/nodeagent /run/driver {paths.ENGINE_RECORD} \\
    {paths.ORIGINALS}
: >{FLAGS}
mkdir /run/driver
"""
ANEW = "systemctl reset-failed docker docker.socket; systemctl restart docker"


def prepare(lab: Lab, machine: Machine) -> None:
    """Install the program, without its service, and the driver."""
    url = lab.serve(cluster.release(), "nodeagent.pyz")
    machine.sh(
        f"curl -sSf -o /root/nodeagent.pyz {url}; cd /root; "
        "python3 nodeagent.pyz install --no-start; rm -r nodeagent.pyz .shiv; "
        "systemctl disable nodeagent",
        timeout_s=60,
    )
    machine.write(DRIVER, Path(__file__).with_name("engine_driver.py").read_text("utf-8"))


class Engines:
    """A machine of each flavour, switched on when it is first asked for."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._machines: dict[str, Machine] = {}

    def on(self, *flavours: str) -> list[Machine]:
        new = [name for name in flavours if name not in self._machines]
        for name in new:
            address = f"10.10.0.{71 + list(FLAVOURS).index(name)}"
            machine = self._lab.machine(f"eng-{name}"[:12], flavour=name, address=address)
            self._machines[name] = machine
            machine.boot()
        for name in new:
            self._machines[name].wait_booted()
            prepare(self._lab, self._machines[name])
        return [self._machines[name] for name in flavours]

    def destroy(self) -> None:
        for machine in self._machines.values():
            machine.destroy()


@pytest.fixture(scope="module")
def engines(lab: Lab) -> Iterator[Engines]:
    found = Engines(lab)
    try:
        yield found
    finally:
        found.destroy()


EACH = pytest.mark.parametrize(
    "flavour",
    [pytest.param(name, marks=[] if name == "trixie" else pytest.mark.full) for name in FLAVOURS],
)


@dataclass(frozen=True)
class Run:
    """What the driver printed, and the machine around it."""

    said: Mapping[str, Any]
    old: bytes | None
    new: bytes | None
    starts: int
    undone: str  # what the row's own last commands said against it


def drive(machine: Machine, *words: str, **environment: object) -> dict[str, Any]:
    """Run the driver to its end, by way of a command that ends it early; empty when it died."""
    settings = [f"{key}={value}" for key, value in environment.items()]
    command = ("env", *settings, *words, "python3", DRIVER)
    done = machine.run(*command, check=False, timeout_s=RUN_TIMEOUT_S)
    if done.returncode not in (0, 137, -9):
        raise LabError(f"{machine.name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def file_of(machine: Machine) -> bytes | None:
    done = machine.run("base64", "-w0", FILE, check=False)
    return base64.b64decode(done.stdout) if done.returncode == 0 else None


def write_spec(machine: Machine, section: str) -> None:
    spec = SPEC + (f"engine: {{{section}}}\n" if section else "")
    machine.write("/run/driver/node.yaml", spec)


def starts(machine: Machine) -> int:
    """How often the Engine has begun to start in this boot."""
    return int(machine.sh(COUNT))


def fresh(machine: Machine, row: Row) -> int:
    """Make the machine as the row has it; returns how often its Engine has been started so far."""
    machine.sh(FRESH)
    if row.text is not None:
        cluster.inside(machine, FILE).write_bytes(row.text)
    if row.flags:
        cluster.inside(machine, FLAGS).write_text(f'DOCKER_OPTS="{row.flags}"\n', "utf-8")
    write_spec(machine, row.engine)
    again = f"{ANEW} || :;" if row.restarted else ""
    return int(machine.sh(f"{again} {row.before or ':'}; {COUNT}").split()[-1])


def play(machine: Machine, row: Row) -> Run:
    before = fresh(machine, row)
    old = file_of(machine)
    said = drive(machine)
    new = file_of(machine)
    undone = machine.run("sh", "-euc", row.after or ":", check=False)
    why = undone.stderr.strip() or f"exit {undone.returncode}" if undone.returncode else ""
    if said["active"] != "active":
        machine.sh(f"{FRESH}{ANEW}")
    return Run(said, old, new, said["starts"] - before, why)


# -- the table


def judge(row: Row, flavour: str, run: Run) -> None:
    outcome, said = row.on(flavour), run.said
    sentence = f"{said['state']}: {said['sentence']}"
    assert re.search(outcome.says, said["sentence"], re.DOTALL), sentence
    assert not run.undone
    assert not [name for name in said["beside"] if "nodeagent" in name]
    if isinstance(outcome, Stays):
        assert said["state"] == outcome.state, sentence
        assert said["fix"] or outcome.state != "blocked"
        assert run.new == run.old
        if outcome.runs:
            assert (said["active"], run.starts) == ("active", 0)
        return
    assert (said["state"], said["active"], said["again"]) == ("done", "active", []), sentence
    if outcome.restarts is not None:
        assert run.starts == outcome.restarts, said["changes"]
    old, new = (
        options.parse((text or b"").decode("utf-8", "surrogateescape"))
        for text in (run.old, run.new)
    )
    assert new == {**old, **outcome.adds}
    if run.old is not None and run.old != run.new:
        assert said["original"].encode("utf-8", "surrogateescape") == run.old
    for key, value in outcome.shows.items():
        shown = said["shown"][key]
        # Engine 20.10 tells its labels in any order.
        assert (sorted(shown) if key == "labels" else shown) == value
    assert bool(said["pending"]) == ("wait for a restart" in outcome.says)


Key = tuple[str, str]
CELLS = [
    pytest.param(
        flavour,
        row,
        marks=[] if row.core and flavour == "trixie" else pytest.mark.full,
        id=f"{row.name}-{flavour}",
    )
    for flavour in FLAVOURS
    for row in TABLE
]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, engines: Engines) -> dict[Key, Run | LabError]:
    """Every row that is asked for, played on its machine; the machines work side by side."""
    cells: list[Any] = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_a_row_of_the_table"
    ]
    names = [name for name in FLAVOURS if any(cell["flavour"] == name for cell in cells)]
    runs: dict[Key, Run | LabError] = {}

    def play_all(name: str, machine: Machine) -> None:
        for row in (cell["row"] for cell in cells if cell["flavour"] == name):
            try:
                runs[name, row.name] = play(machine, row)
            except LabError as error:
                runs[name, row.name] = error

    with ThreadPoolExecutor() as pool:
        list(pool.map(play_all, names, engines.on(*names)))
    for row in TABLE:
        for name in names:
            run = runs.get((name, row.name))
            if isinstance(run, Run):
                said = f"{run.said['state']}, {run.starts} starts: {run.said['sentence']}"
                print(f"{row.name:45} {name:9} {said[:150]}")
    return runs


@pytest.mark.parametrize(("flavour", "row"), CELLS)
def test_a_row_of_the_table(played: dict[Key, Run | LabError], flavour: str, row: Row) -> None:
    run = played[flavour, row.name]
    if isinstance(run, LabError):
        raise run
    judge(row, flavour, run)


# -- death in the middle


OLD_FILE = {"shutdown-timeout": 7}
CHANGING = Row(name="changing", file=OLD_FILE, outcome=Done())


def assert_whole(machine: Machine, made: object) -> None:
    text = file_of(machine)
    assert text is not None
    assert json.loads(text) in (OLD_FILE, {**OLD_FILE, **STOCK}), made
    assert machine.sh("docker info -f '{{.ServerVersion}}'"), made


def assert_goes_on(machine: Machine, before: int, made: object) -> None:
    said = drive(machine)
    assert said["state"] == "done", (made, said)
    assert json.loads(file_of(machine) or b"") == {**OLD_FILE, **STOCK}
    assert not [name for name in said["beside"] if "nodeagent" in name]
    assert (said["active"], said["pending"]) == ("active", None)
    assert said["starts"] - before == 1, (made, said["changes"])


@pytest.mark.full
@EACH
def test_killed_after_every_change(engines: Engines, flavour: str) -> None:
    (machine,) = engines.on(flavour)
    for made in itertools.count(1):
        before = fresh(machine, CHANGING)
        said = drive(machine, DIE_AFTER=made)
        if said:
            assert said["state"] == "done"
            break
        assert_whole(machine, made)
        assert_goes_on(machine, before, made)
    assert made > 8, "candidate, record, the owner's file, mark, file, restart, what is undone then"


@pytest.mark.full
@pytest.mark.parametrize("flavour", ["trixie", pytest.param("classic", marks=pytest.mark.long)])
def test_killed_at_any_time(engines: Engines, flavour: str) -> None:
    (machine,) = engines.on(flavour)
    fresh(machine, CHANGING)
    began = time.monotonic()
    assert drive(machine)["state"] == "done"
    took_s = time.monotonic() - began
    chance, deaths = random.Random(4), 0
    for _ in range(20):
        after_s = chance.uniform(0.2, 1) * took_s
        before = fresh(machine, CHANGING)
        deaths += not drive(machine, "timeout", "-s", "KILL", f"{after_s:.3f}")
        assert_whole(machine, after_s)
        assert_goes_on(machine, before, after_s)
    assert deaths >= 10, "most of them are to come before its end"


@pytest.mark.full
def test_power_lost_after_every_change(engines: Engines) -> None:
    """Of what was not synced nothing is lost here: the page cache is the box's."""
    (machine,) = engines.on("trixie")
    for made in itertools.count(1):
        fresh(machine, CHANGING)
        if drive(machine, DIE_AFTER=made):
            break
        machine.kill()
        machine.boot()
        machine.wait_booted()
        assert_whole(machine, made)
        write_spec(machine, "")
        is_new = STOCK.items() <= json.loads(file_of(machine) or b"").items()
        # It has started at the boot, and that was with the file as it was by then.
        assert_goes_on(machine, starts(machine) - (1 if is_new else 0), made)
    assert made > 8


# -- an option the Engine dies of


DEADLY = {
    "no-such-bridge": (asked(bridge="nosuchbr0"), "nosuchbr0 must be created manually"),
    "no-such-storage-option": (asked(storage_opts=["overlay2.bogus=1"]), "overlay2.bogus"),
    "no-such-range": (asked(fixed_cidr="10.1.0.0/33"), "invalid CIDR address: 10.1.0.0/33"),
}
KEEP = "docker rm -f keep >/dev/null 2>&1 || :"
TRAP = "trap 'exit 0' TERM; while :; do sleep 0.1; done"


def load(lab: Lab, machine: Machine) -> None:
    machine.sh(f"curl -sSf {lab.serve(images.box_archive())} | docker load", timeout_s=60)


def runs_again(machine: Machine, name: str) -> None:
    def status() -> bool | Waiting:
        found = machine.sh(f"docker inspect -f '{{{{.State.Status}}}}' {name}", check=False)
        return found == "running" or Waiting(found)

    wait_until(status, 20, f"container {name} to run again")


@pytest.mark.parametrize(
    ("flavour", "option"),
    [
        pytest.param("trixie", "no-such-bridge"),
        *(
            pytest.param(flavour, option, marks=pytest.mark.full)
            for flavour, option in (
                *(("trixie", "no-such-storage-option"), ("bookworm", "no-such-range")),
                *((name, "no-such-bridge") for name in ("classic", "bookworm", "sid")),
            )
        ),
    ],
)
def test_an_option_the_engine_dies_of(
    lab: Lab, engines: Engines, flavour: str, option: str
) -> None:
    section, words = DEADLY[option]
    (machine,) = engines.on(flavour)
    before = fresh(machine, Row(name="deadly", file=OLD_FILE, engine=section, outcome=Done()))
    load(lab, machine)
    machine.run("docker", "run", "-d", "--restart=always", "--name=keep",
                images.BOX_IMAGE, "sh", "-c", TRAP)  # fmt: skip
    try:
        said = drive(machine)
        assert (said["state"], said["active"], said["again"]) == ("blocked", "active", [])
        assert re.search(f"back on its last good options.*{words}", said["sentence"])
        assert json.loads(file_of(machine) or b"") == OLD_FILE
        # The one that failed, systemd's attempts of its own at it, and the way back.
        assert 2 <= said["starts"] - before <= 4
        runs_again(machine, "keep")
        for _ in range(3):
            later = drive(machine)
            assert later["changes"] == later["again"] == []
            assert (later["state"], later["invocation"]) == ("blocked", said["invocation"])
        write_spec(machine, "")
        assert drive(machine)["state"] == "done"
        assert json.loads(file_of(machine) or b"") == {**OLD_FILE, **STOCK}
        write_spec(machine, section)
        again = drive(machine)
        assert again["state"] == "blocked"
        assert again["starts"] > later["starts"] + 2, "it was tried again, for the file is another"
        assert json.loads(file_of(machine) or b"") == {**OLD_FILE, **STOCK}
        runs_again(machine, "keep")
    finally:
        machine.sh(f"{KEEP}; {FRESH}{ANEW}")


HANG = "/root/a-pipe-that-nobody-writes-to"
QUICK = "/run/systemd/system/docker.service.d/quick.conf"  # or it is killed after 90 s only


@pytest.mark.full
@pytest.mark.parametrize(
    "flavour",
    [pytest.param(name, marks=[pytest.mark.long] if name != "trixie" else []) for name in FLAVOURS],
)
def test_an_option_the_engine_hangs_over(engines: Engines, flavour: str) -> None:
    """It reads the profile at its start, before it answers on its socket."""
    (machine,) = engines.on(flavour)
    section = asked(seccomp_profile=HANG)
    fresh(machine, Row(name="hangs", file=OLD_FILE, engine=section, outcome=Done()))
    machine.write(QUICK, "[Service]\nTimeoutStopSec=2\n")
    machine.sh(f"mkfifo {HANG}; systemctl daemon-reload")
    try:
        said = drive(machine, DEADLINE_S=8)
        assert (said["state"], said["active"], said["again"]) == ("blocked", "active", [])
        assert "back on its last good options" in said["sentence"]
        assert json.loads(file_of(machine) or b"") == OLD_FILE
    finally:
        machine.sh(f"rm -f {HANG} {QUICK}; systemctl daemon-reload; {FRESH}{ANEW}", timeout_s=60)


# -- the Engine's own store (moby issue 49291)


BREAKING = """\
#!/bin/sh
case "$*" in *"-I POSTROUTING"*docker0*MASQUERADE* | *"-A POSTROUTING"*docker0*MASQUERADE*)
    if [ -e /run/break ]; then rm /run/break; echo broken >&2; exit 4; fi ;;
esac
exec /usr/sbin/iptables "$@"
"""
STORE = "/var/lib/docker/network/files/local-kv.db"


def break_store(machine: Machine) -> str:
    """Let iptables fail once while the Engine sets up its bridge; the Engine's state after it.

    Which of its two bridges the Engine finds first in its store is chance: with one of the two
    orders it gets over it.
    """
    for _ in range(10):
        machine.write("/usr/local/sbin/iptables", BREAKING, 0o755)
        try:
            machine.sh(f"iptables -t nat -F; touch /run/break; {ANEW} || :; test ! -e /run/break")
            machine.sh(f"{SETTLED}; {ANEW} || :; {SETTLED}")
        finally:
            machine.sh("rm /usr/local/sbin/iptables")
        state = machine.sh("systemctl is-active docker || :")
        if state != "active":
            break
    return state


@pytest.mark.full
def test_an_engine_that_its_own_store_keeps_from_starting(engines: Engines) -> None:
    (machine,) = engines.on("trixie")
    fresh(machine, Row(name="stuck", file=STOCK, restarted=True, outcome=Done()))
    assert drive(machine)["state"] == "done"
    try:
        assert break_store(machine) == "failed"
        assert "networks have same bridge name" in machine.journal("docker")[-4000:]
        said = drive(machine)
        assert (said["state"], said["active"], said["again"]) == ("done", "active", [])
        assert any(change.startswith("rename local-kv.db to") for change in said["changes"])
        machine.sh(f"test -s {STORE}.set-aside; docker network create shop")
        assert break_store(machine) == "failed"
        before = machine.sh(f"sha256sum {STORE}")
        said = drive(machine)
        assert (said["state"], said["again"]) == ("blocked", [])
        assert "your own networks are in it, too (shop)" in said["sentence"]
        assert machine.sh(f"sha256sum {STORE}") == before
    finally:
        machine.sh(f"rm -f {STORE}; {FRESH}{ANEW}", timeout_s=60)


@pytest.mark.full
@pytest.mark.parametrize("flavour", ["classic", "bookworm", "sid"])
def test_the_other_engines_get_over_it(engines: Engines, flavour: str) -> None:
    (machine,) = engines.on(flavour)
    fresh(machine, Row(name="stuck", file=STOCK, restarted=True, outcome=Done()))
    assert break_store(machine) == "active"
