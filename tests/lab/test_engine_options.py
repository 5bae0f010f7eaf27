"""Whatever daemon.json holds and the spec asks: a real Engine of every version runs afterwards."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
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
REFUSES = "the Engine refuses /etc/docker/daemon.json .* so nothing was changed: .*"
UNKNOWN = REFUSES + "don't match any configuration option"
BOTH = REFUSES + "specified both as a flag and in the configuration file"


def asked(**given: object) -> str:
    return f"options: {json.dumps({key.replace('_', '-'): value for key, value in given.items()})}"


def kept(text: str) -> Stays:
    return Stays(text)


TABLE = [
    # -- whether there is a file, and what kind of one
    Row(name="no-file", outcome=Done(), core=True),
    Row(name="empty-file", file="", outcome=Done(), core=True),
    Row(name="empty-file-that-the-engine-dies-of", file="", restarted=True,
        outcome=by(Done(restarts=None), Done()), core=True),
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
    Row(name="immutable-directory-missing", before="mv /etc/docker /etc/docker.away",
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
    Row(name="one-file-compressed", file={"log-opts": {"max-file": "1"}},
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
        outcome=Done(shows={"labels": ["zone=a", "city=Zürich"]})),
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
    Row(name="tls-without-its-files", file={"tlsverify": True, "tlscacert": "/none",
        "tlscert": "/none", "tlskey": "/none"}, outcome=Stays(REFUSES)),
    Row(name="bad-mirror", file={"registry-mirrors": ["mirror"]}, outcome=Stays(REFUSES)),
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
]  # fmt: skip
assert len({row.name for row in TABLE}) == len(TABLE) >= 60


# -- machines


COUNT = (
    "journalctl --sync; journalctl -b -q -o cat UNIT=docker.service "
    "MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5 | wc -l"
)
FRESH = f"""
umount -q /etc/docker || :
rm -rf {FILE} /etc/docker/.[!.]* /run/nodeagent /run/driver {paths.ENGINE_RECORD} {paths.ORIGINALS}
: >{FLAGS}
mkdir /run/driver
"""
UP = "systemctl reset-failed docker docker.socket; systemctl {} docker"


def prepare(lab: Lab, machine: Machine) -> None:
    """Install the program, without its service, and the driver."""
    url = lab.serve(cluster.release(), "nodeagent.pyz")
    machine.sh(
        f"curl -sSf -o /root/nodeagent.pyz {url}; cd /root; "
        "python3 nodeagent.pyz install --no-start; rm -r nodeagent.pyz .shiv; "
        "systemctl disable nodeagent",
        timeout_s=60,
    )
    driver = Path(__file__).with_name("engine_driver.py")
    machine.write(DRIVER, driver.read_text("utf-8"))


@dataclass(frozen=True)
class Run:
    """What the driver printed, and the machine around it."""

    said: Mapping[str, Any]
    old: bytes | None
    new: bytes | None
    restarts: int
    undone: str  # what the row's own last commands said against it

    @property
    def state(self) -> str:
        return str(self.said["state"])


def drive(machine: Machine, **environment: object) -> dict[str, Any]:
    """Run the driver to its end; empty when it died."""
    words = [f"{key}={value}" for key, value in environment.items()]
    command = ("env", *words, "python3", DRIVER)
    done = machine.run(*command, check=False, timeout_s=RUN_TIMEOUT_S)
    if done.returncode not in (0, 137, -9):
        raise LabError(f"{machine.name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def bytes_of(machine: Machine) -> bytes | None:
    done = machine.run("base64", "-w0", FILE, check=False)
    import base64

    return base64.b64decode(done.stdout) if done.returncode == 0 else None


def fresh(machine: Machine, row: Row) -> int:
    """Make the machine as the row has it; how often its Engine has been started so far."""
    machine.sh(FRESH)
    if row.text is not None:
        cluster.inside(machine, FILE).write_bytes(row.text)
    cluster.inside(machine, FLAGS).write_text(f'DOCKER_OPTS="{row.flags}"\n', "utf-8")
    spec = SPEC + (f"engine: {{{row.engine}}}\n" if row.engine else "")
    cluster.inside(machine, "/run/driver/node.yaml").write_text(spec, "utf-8")
    if row.restarted:
        machine.sh(f"{UP.format('restart')} || :")
    said = machine.sh(f"{row.before or ':'}; {COUNT}")
    return int(said.split()[-1])


def play(machine: Machine, row: Row) -> Run:
    before = fresh(machine, row)
    old = bytes_of(machine)
    said = drive(machine)
    new = bytes_of(machine)
    undone = machine.run("sh", "-euc", row.after or ":", check=False)
    if said["active"] != "active":
        machine.sh(f"{FRESH}{UP.format('restart')}")
    why = undone.stderr.strip() or f"exit {undone.returncode}" if undone.returncode else ""
    return Run(said, old, new, said["starts"] - before, why)
