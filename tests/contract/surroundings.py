"""What the real half of a contract runs in: a network of its own, processes that end with it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pytest

from nodeagent import paths
from nodeagent.adapters.consul import LocalConsul
from nodeagent.converge import run_cycle
from nodeagent.errors import Secret
from nodeagent.secrets import NodeTokens
from nodeagent.steps import consul, secrets
from tests.lab.host import Waiting, run, wait_until
from tests.unit.fakes import NOW, Machine, World, make_spec, worker_secrets

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="the real half needs root: it makes a network namespace"
)

CLONE_NEWNET = 0x40000000  # unshare(2); os.unshare came with Python 3.12


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Put this thread, and what it starts, into a network namespace with nothing but loopback.

    It has no name and no way out, and goes with the last process in it, however that ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: Callable[..., int], *arguments: int) -> None:
        if function(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    with open("/proc/thread-self/ns/net") as before:
        call(libc.unshare, CLONE_NEWNET)
        try:
            run("ip", "link", "set", "lo", "up")
            yield
        finally:
            call(libc.setns, before.fileno(), CLONE_NEWNET)


class Process:
    """A process that is killed at the end of the block, or when the tests are killed."""

    def __init__(self, *words: str | Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def must_run(self) -> None:
        """Fail with the end of its log if it has ended."""
        if self._process.poll() is not None:
            raise AssertionError(f"it ended: {self.log.read_text('utf-8', 'replace')[-1500:]}")


def give_token(machine: Machine, own: Secret) -> None:
    """Leave this worker as one that the servers have admitted with this token."""
    generation = worker_secrets().generation
    tokens = NodeTokens(Secret(str(uuid.uuid4())), {generation: own}, generation)
    machine.files.write(paths.NODE_TOKEN, tokens.dump().reveal(), 0o600)


def write_keys(machine: Machine) -> None:
    """Have the program write the files with which Consul is to start."""
    step = replace(secrets.STEP, requires=())
    cycle = run_cycle(machine.spec, machine.host, (step,), lambda _: None)
    assert cycle.is_ready, cycle.sentence


class ConsulNode:
    """One real Consul on a loopback address of its own; its HTTP port is on 127.0.0.1.

    It runs secured, with the files that the program writes for it; with `own`, a worker's own
    token, it shows that instead of its user-data's.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        number: int,
        *,
        expect: int,
        join: str = "",
        dns: int,
        own: Secret | None = None,
    ) -> None:
        self.binary, self.directory = binary, directory
        self.address, self.port = f"127.0.0.{number}", 18500 + number
        spec = make_spec("server" if expect else "worker", servers=expect or 1)
        self.machine = machine = World().machine(spec, self.address)
        self.name, machine.clock.t = machine.name, time.time() - NOW
        if own is not None:
            give_token(machine, own)
        write_keys(machine)
        self.config_directory = directory / "config"
        for path, text in machine.files.texts.items():
            if paths.CONSUL in path.parents:
                self.write(path, text)
        self.agent = self.another_agent()
        rendered = consul.render(spec, self.address, self.name)
        config = json.loads(rendered.replace("/consul/config", str(self.config_directory)))
        config |= {
            "client_addr": "127.0.0.1",
            "data_dir": str(directory / "data"),
            "ports": {"http": self.port, "dns": dns, "serf_wan": -1},
            "retry_join": [join] if join else [],
            "retry_interval": "200ms",
            "log_level": "WARN",
        }
        self.write(paths.CONSUL_CONFIG, json.dumps(config))

    def another_agent(self) -> LocalConsul:
        """Another client of this Consul: one is for one thread."""
        tokens = self.directory / paths.CONSUL_TOKENS.relative_to(paths.CONSUL)
        return LocalConsul(port=self.port, tokens=tokens, config=self.config_directory)

    def write(self, path: Path, text: str) -> str:
        """Write one of a node's files where this Consul has it; return what was in it."""
        here = self.directory / path.relative_to(paths.CONSUL)
        here.parent.mkdir(parents=True, exist_ok=True)
        old = here.read_text("utf-8") if here.exists() else ""
        here.write_text(text, "utf-8")
        return old

    @contextlib.contextmanager
    def running(self, *, leader: bool) -> Iterator[Process]:
        """Run it, and wait until it answers; with `leader`, until it can read and write."""
        words = (self.binary, "agent", f"-config-dir={self.config_directory}")
        with Process(*words, log=self.directory / "log") as process:

            def answers() -> bool | Waiting:
                process.must_run()
                if self.agent.self() is None:
                    return Waiting("it does not answer")
                return not leader or bool(self.agent.leader()) or Waiting("no leader")

            wait_until(answers, 30, f"Consul {self.name}")
            yield process
