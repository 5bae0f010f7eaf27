"""What the program relies on in a Docker Engine, asked of the fakes and of real Engines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from nodeagent import paths
from nodeagent.adapters.engine import JOIN_TIMEOUT_S, TIMEOUT_S, DockerDaemon
from nodeagent.errors import HostError
from nodeagent.host import Container, ContainerEngine, ContainerState, SwarmEngine, SwarmInfo, Unit
from tests.contract.surroundings import needs_root
from tests.lab import images
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Machine
from tests.unit.fakes import World, make_spec

REAL = pytest.param("real", marks=[pytest.mark.lab, needs_root])
LABELS = {"nodeagent.cluster": "demo", "other": "Zürich"}
SETTLE_S = 20  # for what a Swarm does soon, but not before it answers
DAEMON_TIMEOUT_S = 2 * TIMEOUT_S  # a bound for "does not hang" where the adapter allows TIMEOUT_S


def ignore() -> None:
    """For `alive`, where a test does not ask about it."""


def daemon(machine: Machine) -> DockerDaemon:
    """The Engine of a lab machine; a unix socket can be reached through another root."""
    root = Path(f"/proc/{machine.leader}/root")
    return DockerDaemon(socket=root / "run/docker.sock", name=machine.name, root=root)


@dataclass
class Rig:
    """Two Engines in no Swarm, and a way to put something into the first one's."""

    one: SwarmEngine
    two: SwarmEngine
    address: str
    other_address: str
    use_swarm: Callable[[], object]

    @property
    def manager(self) -> str:
        return f"{self.address}:2377"


def swarm(engine: SwarmEngine) -> SwarmInfo:
    info = engine.info()
    assert info is not None
    return info.swarm


@pytest.fixture(params=["fake", REAL])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "fake":
        world = World()
        one, two = (world.machine(make_spec("server"), f"10.10.0.1{n}") for n in (1, 2))

        def use_swarm() -> None:
            world.swarms[one.engine.swarm_id].services += 1

        yield Rig(one.engine, two.engine, one.address, two.address, use_swarm)
        return
    first, second = request.getfixturevalue("machines")
    engines = daemon(first), daemon(second)

    def make_secret() -> None:
        first.sh("echo x | docker secret create used -")

    yield Rig(*engines, first.address, second.address, make_secret)
    for engine in reversed(engines):
        engine.swarm_leave()


# -- Swarm


def test_an_engine_in_no_swarm(rig: Rig) -> None:
    info = rig.one.info()
    assert info is not None
    assert int(info.version.split(".")[0]) >= 20
    assert info.options["log-driver"] == "json-file"
    assert not info.options["live-restore"]
    assert info.swarm == SwarmInfo()


def test_a_new_swarm_is_ours_and_bare(rig: Rig) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    found = swarm(rig.one)
    assert (found.state, found.is_manager, found.nodes, found.error) == ("active", True, 1, "")
    assert found.labels == LABELS
    assert found.cluster_id
    assert found.node_id
    assert rig.one.swarm_is_bare()
    rig.use_swarm()
    assert not rig.one.swarm_is_bare()


def test_managers_and_whether_they_are_reachable(rig: Rig) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    assert list(rig.one.managers().values()) == [True]
    with pytest.raises(HostError):
        rig.two.managers()


@pytest.mark.parametrize("rig", [REAL], indirect=True)
def test_how_containers_logs_are_kept(rig: Rig, request: pytest.FixtureRequest) -> None:
    machine, _ = request.getfixturevalue("machines")
    machine.sh(
        "tar -c --files-from /dev/null | docker import - empty:1 > /dev/null;"
        "docker create --name plain empty:1 x; docker create --name sized --log-driver local "
        "--log-opt max-size=3m empty:1 x"
    )
    try:
        found = rig.one.log_settings()
        assert set(found) == {"plain", "sized"}
        assert (found["plain"].driver, found["plain"].opts) == ("json-file", {})
        assert (found["sized"].driver, found["sized"].opts) == ("local", {"max-size": "3m"})
        now = float(machine.sh("date +%s"))
        assert all(now - 60 < each.made <= now + 1 for each in found.values())
        machine.sh("docker rm plain")
        assert set(rig.one.log_settings()) == {"sized"}
    finally:
        machine.sh("docker rm -f plain sized 2>/dev/null; docker rmi empty:1", check=False)


def test_a_second_init_is_an_error_and_changes_nothing(rig: Rig) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    before = swarm(rig.one)
    with pytest.raises(HostError, match="already part of a swarm"):
        rig.one.swarm_init(rig.address, {})
    after = swarm(rig.one)
    assert (after.cluster_id, after.node_id, after.labels) == (
        before.cluster_id,
        before.node_id,
        before.labels,
    )


def test_init_on_an_address_of_another_machine_is_an_error(rig: Rig) -> None:
    with pytest.raises(HostError):
        rig.one.swarm_init(rig.other_address, LABELS)
    assert swarm(rig.one) == SwarmInfo()


def test_outside_a_swarm_there_is_nothing_to_manage(rig: Rig) -> None:
    with pytest.raises(HostError):
        rig.one.swarm_tokens()
    with pytest.raises(HostError):
        rig.one.swarm_is_bare()


def joined(rig: Rig, role: int) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    rig.two.swarm_join(rig.other_address, rig.manager, rig.one.swarm_tokens()[role])
    wait_until(lambda: swarm(rig.one).nodes == 2, SETTLE_S, "the manager to list both")


def test_a_worker_knows_its_swarm_and_manages_nothing(rig: Rig) -> None:
    joined(rig, 0)
    found = swarm(rig.two)
    assert (found.state, found.is_manager, found.nodes, found.error) == ("active", False, 0, "")
    assert found.cluster_id == swarm(rig.one).cluster_id
    assert found.node_id not in ("", swarm(rig.one).node_id)
    assert found.labels == {}
    with pytest.raises(HostError):
        rig.two.swarm_tokens()
    with pytest.raises(HostError):
        rig.two.swarm_is_bare()
    assert not rig.one.swarm_is_bare()


def test_a_second_manager_sees_what_the_first_sees(rig: Rig) -> None:
    joined(rig, 1)
    first = swarm(rig.one)

    def same() -> bool | Waiting:
        found = swarm(rig.two)
        return found.nodes == 2 or Waiting(found)

    wait_until(same, SETTLE_S, "the second manager to list both")
    found = swarm(rig.two)
    assert (found.state, found.is_manager, found.error) == ("active", True, "")
    assert (found.cluster_id, found.labels) == (first.cluster_id, LABELS)
    worker, manager = rig.two.swarm_tokens()
    assert (worker, manager) == rig.one.swarm_tokens()
    assert worker != manager


def test_who_left_is_still_listed_and_comes_back_as_another(rig: Rig) -> None:
    joined(rig, 0)
    before = swarm(rig.two)
    rig.two.swarm_leave()
    assert swarm(rig.two) == SwarmInfo()
    assert swarm(rig.one).nodes == 2
    assert not rig.one.swarm_is_bare(), "somebody has been here"
    rig.two.swarm_join(rig.other_address, rig.manager, rig.one.swarm_tokens()[0])
    after = swarm(rig.two)
    assert after.cluster_id == before.cluster_id
    assert after.node_id != before.node_id


def test_the_last_manager_can_leave_and_make_another_swarm(rig: Rig) -> None:
    rig.one.swarm_leave()  # in none: harmless
    rig.one.swarm_init(rig.address, LABELS)
    first = swarm(rig.one).cluster_id
    rig.one.swarm_leave()
    assert swarm(rig.one) == SwarmInfo()
    rig.one.swarm_init(rig.address, {})
    assert swarm(rig.one).cluster_id not in ("", first)


def test_a_join_while_in_a_swarm_is_an_error_and_changes_nothing(rig: Rig) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    rig.two.swarm_init(rig.other_address, {})
    before = swarm(rig.two).cluster_id
    with pytest.raises(HostError):
        rig.two.swarm_join(rig.other_address, rig.manager, rig.one.swarm_tokens()[0])
    assert swarm(rig.two).cluster_id == before
    assert swarm(rig.one).nodes == 1


@pytest.mark.parametrize(
    "kind",
    ["malformed", "wrong secret", pytest.param("another swarm's", marks=pytest.mark.full)],
)
def test_a_join_with_a_bad_token_leaves_nothing(rig: Rig, kind: str) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    token = rig.one.swarm_tokens()[0]
    if kind == "malformed":
        token = "SWMTKN-nonsense"
    elif kind == "wrong secret":
        token = f"{token[:-4]}{token[:-5:-1]}"
    else:
        rig.one.swarm_leave()
        rig.one.swarm_init(rig.address, LABELS)
    with pytest.raises(HostError) as caught:
        rig.two.swarm_join(rig.other_address, rig.manager, token)
    assert token not in str(caught.value), "it is a secret"
    assert swarm(rig.two) == SwarmInfo()
    assert swarm(rig.one).nodes == 1


def test_a_join_through_nobody_leaves_nothing(rig: Rig) -> None:
    rig.one.swarm_init(rig.address, LABELS)
    token = rig.one.swarm_tokens()[0]
    with pytest.raises(HostError):
        rig.two.swarm_join(rig.other_address, f"{rig.other_address}:2377", token)
    assert swarm(rig.two) == SwarmInfo()


@pytest.mark.lab
@pytest.mark.full
@needs_root
def test_a_join_through_a_black_hole_ends_and_leaves_nothing(
    machines: tuple[Machine, Machine],
) -> None:
    first, second = machines
    one, two = daemon(first), daemon(second)
    rule = "INPUT -p tcp --dport 2377 -j DROP"
    one.swarm_init(first.address, LABELS)
    first.sh(f"iptables -I {rule}")
    try:
        began = time.monotonic()
        with pytest.raises(HostError):
            two.swarm_join(second.address, f"{first.address}:2377", one.swarm_tokens()[0])
        assert time.monotonic() - began < JOIN_TIMEOUT_S + TIMEOUT_S
        assert swarm(two) == SwarmInfo()
    finally:
        first.sh(f"iptables -D {rule}")
        one.swarm_leave()
    assert swarm(two) == SwarmInfo(), "no join goes on behind our back"


# -- containers


@dataclass
class ContainerRig:
    engine: ContainerEngine
    archive: Path
    halt: Callable[[str], object]  # stop a container without starting it again
    refuse: Callable[[str], object]  # what a command says that fails


TRAP = "trap 'exit 0' TERM; echo started; while :; do sleep 0.1; done"


def container(
    script: str = TRAP, image: str = images.BOX_IMAGE, config_sha256: str = "0" * 64
) -> Container:
    return Container("probe", image, ("sh", "-c"), (script,), ("/tmp:/data:ro",), config_sha256)


@pytest.fixture(params=["fake", REAL])
def containers(request: pytest.FixtureRequest) -> Iterator[ContainerRig]:
    if request.param == "fake":
        # It has not been given the keys without which a secured Consul does not start.
        machine = World().machine(make_spec("server", security="off"), "10.10.0.11")
        machine.systemd.units[paths.SYSTEM_ENGINE_UNIT] = Unit("loaded", "active")
        archive = Path("/var/lib/archive")
        machine.files.write(archive, "", None)
        engine = machine.system_engine
        engine.images.add(images.BOX_IMAGE)

        def halt(name: str) -> None:
            engine.containers[name] = replace(engine.containers[name], status="exited")

        def refuse(words: str) -> None:
            machine.refuses = words

        yield ContainerRig(engine, archive, halt, refuse)
        return
    first, _ = request.getfixturevalue("machines")
    real, archive = daemon(first), images.box_archive()
    assert real.load_image(archive) == (images.BOX_IMAGE,)
    yield ContainerRig(real, archive, lambda name: first.sh(f"docker kill {name}"), str)
    first.sh("docker rm -f probe")


def test_an_image_is_there_once_loaded(containers: ContainerRig) -> None:
    engine = containers.engine
    names = engine.load_image(containers.archive)
    assert len(names) == 1
    assert engine.has_image(names[0])
    assert engine.load_image(containers.archive) == names
    assert not engine.has_image("nodeagent/none:1")


def test_an_archive_that_is_not_there_is_an_error(containers: ContainerRig) -> None:
    with pytest.raises(HostError, match="none"):
        containers.engine.load_image(Path("/var/lib/none"))


def test_an_image_that_cannot_be_had_is_an_error(containers: ContainerRig) -> None:
    for name in ("nodeagent/none", "nodeagent/none:1", f"nodeagent/none@sha256:{'0' * 64}"):
        with pytest.raises(HostError, match="nodeagent/none"):
            containers.engine.pull_image(name, ignore)
        assert not containers.engine.has_image(name)


def test_a_container_runs_as_defined(containers: ContainerRig) -> None:
    engine, wanted = containers.engine, container()
    assert engine.container("probe") is None
    engine.run_container(wanted)
    assert engine.container("probe") == ContainerState(wanted.definition, "running")
    engine.start_container("probe")  # it runs: harmless
    assert engine.container("probe") == ContainerState(wanted.definition, "running")


def test_a_container_is_replaced_by_a_new_one(containers: ContainerRig) -> None:
    engine, wanted = containers.engine, container(config_sha256="1" * 64)
    engine.run_container(container())
    engine.run_container(wanted)
    assert engine.container("probe") == ContainerState(wanted.definition, "running")
    containers.halt("probe")
    engine.run_container(container())
    assert engine.container("probe") == ContainerState(container().definition, "running")


def test_a_stopped_container_is_started_again(containers: ContainerRig) -> None:
    engine = containers.engine
    engine.run_container(container())
    containers.halt("probe")
    found = engine.container("probe")
    assert found is not None
    assert (found.status, found.restarts) == ("exited", 0)
    engine.start_container("probe")
    found = engine.container("probe")
    assert found is not None
    assert (found.status, found.definition) == ("running", container().definition)


def test_a_container_that_is_not_there_cannot_be_started(containers: ContainerRig) -> None:
    with pytest.raises(HostError):
        containers.engine.start_container("probe")


def test_a_command_in_a_container_that_fails_says_why(containers: ContainerRig) -> None:
    engine, says = containers.engine, "Zürich: no such key"
    engine.run_container(container())
    engine.execute("probe", "sh", "-c", "exit 0", "validate")
    containers.refuse(says)
    with pytest.raises(HostError) as caught:
        engine.execute("probe", "sh", "-c", f"echo '{says}' >&2; exit 3", "validate")
    assert caught.value.cause == says


@pytest.mark.lab
@needs_root
def test_a_command_that_cannot_be_run_is_an_error(machines: tuple[Machine, Machine]) -> None:
    engine = daemon(machines[0])
    engine.load_image(images.box_archive())
    engine.run_container(container())
    try:
        with pytest.raises(HostError, match="no-such-program"):
            engine.execute("probe", "no-such-program", "validate")
        engine.execute("probe", "sh", "-c", "echo said; exit 0")
        machines[0].sh("docker kill probe")
        with pytest.raises(HostError, match="not running"):
            engine.execute("probe", "true", "validate")
        with pytest.raises(HostError, match="none"):
            engine.execute("none", "true", "validate")
    finally:
        machines[0].sh("docker rm -f probe")


def test_a_container_without_its_image_is_an_error(containers: ContainerRig) -> None:
    with pytest.raises(HostError, match="probe"):
        containers.engine.run_container(container(image="nodeagent/none:1"))
    assert containers.engine.container("probe") is None


@pytest.mark.lab
@needs_root
def test_a_container_that_crashes_says_why(machines: tuple[Machine, Machine]) -> None:
    engine = daemon(machines[0])
    engine.load_image(images.box_archive())
    engine.run_container(container("echo first; echo '* Zürich: boom' >&2; exit 3"))

    def crashed() -> ContainerState | Waiting:
        found = engine.container("probe")
        return found if found is not None and found.restarts else Waiting(found)

    found = wait_until(crashed, SETTLE_S, "a restart")
    assert "* Zürich: boom" in found.last_lines
    machines[0].sh("docker rm -f probe")


@pytest.mark.lab
@needs_root
def test_an_archive_that_is_none_is_an_error(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    (tmp_path / "archive").write_bytes(b"x" * 10_000)
    with pytest.raises(HostError, match="load an image"):
        daemon(machines[0]).load_image(tmp_path / "archive")


# -- failures


CALLS: dict[str, Callable[[Any], object]] = {
    "swarm_tokens": lambda e: e.swarm_tokens(),
    "swarm_is_bare": lambda e: e.swarm_is_bare(),
    "swarm_init": lambda e: e.swarm_init("127.0.0.1", {}),
    "swarm_join": lambda e: e.swarm_join("127.0.0.1", "127.0.0.2:2377", "SWMTKN-1-x-y"),
    "swarm_leave": lambda e: e.swarm_leave(),
    "has_image": lambda e: e.has_image("x"),
    "pull_image": lambda e: e.pull_image("x", ignore),
    "container": lambda e: e.container("probe"),
    "run_container": lambda e: e.run_container(container()),
    "start_container": lambda e: e.start_container("probe"),
    "info": lambda e: e.info(),
}


def failures(engine: object, *names: str) -> dict[str, HostError | None]:
    """What each call raises, one after another through the same object."""
    found: dict[str, HostError | None] = {}
    for name in names or tuple(CALLS):
        found[name] = None
        try:
            CALLS[name](engine)
        except HostError as error:
            found[name] = error
    return found


SWARM_CALLS = ("swarm_tokens", "swarm_is_bare", "swarm_init", "swarm_join", "swarm_leave", "info")
CONTAINER_CALLS = ("has_image", "pull_image", "container", "run_container", "start_container")


@pytest.mark.parametrize("kind", ["fake", "no socket", "nobody listens"])
def test_an_engine_that_is_down(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    found: dict[str, HostError | None]
    if kind == "fake":
        machine = World().machine(make_spec("server"), "10.10.0.11")
        machine.systemd.units[paths.ENGINE_UNIT] = Unit("loaded", "inactive")
        found = failures(machine.system_engine, *CONTAINER_CALLS)
        found |= failures(machine.engine, *SWARM_CALLS)
        assert machine.engine.info() is machine.system_engine.info() is None
    else:
        with socket.socket(socket.AF_UNIX) as end:
            if kind == "nobody listens":
                end.bind(str(path))
            found = failures(DockerDaemon(socket=path, name="it"))
    assert found.pop("info") is None
    assert [name for name, error in found.items() if error is None] == []


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n{"])
def test_something_else_on_its_socket_is_an_error(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor(1) as pool:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            end, _ = server.accept()
            with end:
                end.recv(10_000)
                end.sendall(answer)

        serving = pool.submit(serve)
        with pytest.raises(HostError, match="it"):
            DockerDaemon(socket=path, name="it").info()
        serving.result()


class _Pulling(BaseHTTPRequestHandler):
    """An Engine whose pull goes on for a while and then fails."""

    lines: tuple[bytes, ...] = ()

    def do_GET(self) -> None:
        self.answer(b'{"ApiVersion": "1.41"}')

    def do_POST(self) -> None:
        self.answer(*self.lines)

    def answer(self, *lines: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        for line in lines:
            self.wfile.write(line + b"\r\n")

    def log_message(self, *_: object) -> None:
        pass


PROGRESS = b'{"status": "Downloading", "progressDetail": {"current": 1, "total": 9}}'


@pytest.mark.parametrize(
    ("last", "is_error"),
    [(b'{"status": "Done"}', False), (b'{"error": "unexpected EOF"}', True), (b'{"cut', True)],
)
def test_a_pull_is_over_when_the_engine_says_so(
    tmp_path: Path, last: bytes, is_error: bool
) -> None:
    handler = type("_This", (_Pulling,), {"lines": (PROGRESS, PROGRESS, last)})
    path, told = tmp_path / "docker.sock", [0]

    def alive() -> None:
        told[0] += 1

    with UnixStreamServer(str(path), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        expected: AbstractContextManager[object] = nullcontext()
        if is_error:
            expected = pytest.raises(HostError, match="some/image")
        with expected:
            DockerDaemon(socket=path, name="it").pull_image("some/image", alive)
        server.shutdown()
    assert told == [3]


@pytest.mark.lab
@needs_root
def test_an_engine_that_restarts_is_found_again(machines: tuple[Machine, Machine]) -> None:
    _, second = machines
    engine = daemon(second)
    assert engine.info() is not None
    second.sh("systemctl stop docker.socket docker.service")
    assert engine.info() is None
    assert daemon(second).info() is None
    second.sh("systemctl start docker.service", timeout_s=60)
    assert engine.info() is not None


@pytest.mark.lab
@pytest.mark.full
@needs_root
def test_an_engine_that_hangs_is_an_error_in_bounded_time(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeagent.adapters.engine.IMAGE_TIMEOUT_S", TIMEOUT_S)
    _, second = machines
    calls = ("swarm_is_bare", "has_image", "pull_image", "container", "start_container", "info")
    used = [daemon(second) for _ in calls]
    assert all(engine.info() for engine in used)
    second.sh("systemctl kill --signal=STOP docker.service")
    try:
        began = time.monotonic()
        with ThreadPoolExecutor(2 * len(calls)) as pool:
            engines = [*used, *(daemon(second) for _ in calls)]  # both old and new connections
            results = list(pool.map(failures, engines, calls * 2))
        assert time.monotonic() - began < DAEMON_TIMEOUT_S
    finally:
        second.sh("systemctl kill --signal=CONT docker.service")
    for found in results:
        for name, error in found.items():
            assert error is not None, name
    assert all(engine.info() for engine in used)
