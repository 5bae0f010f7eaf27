"""What the real half of a contract runs in: a network of its own, processes that end with it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

from nodeagent.adapters.consul import LocalConsul
from tests.lab.host import Waiting, run, wait_until

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


class ConsulNode:
    """One real Consul on a loopback address of its own; its HTTP port is on 127.0.0.1."""

    def __init__(
        self, binary: Path, directory: Path, number: int, *, expect: int, join: str = "", dns: int
    ) -> None:
        self.binary, self.directory = binary, directory
        self.name, self.address = f"node{number}", f"127.0.0.{number}"
        self.port = 18500 + number
        self.agent = LocalConsul(port=self.port)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, object] = {
            "datacenter": "lab",
            "node_name": self.name,
            "server": bool(expect),
            "bind_addr": self.address,
            "client_addr": "127.0.0.1",
            "data_dir": str(directory / "data"),
            "ports": {"http": self.port, "dns": dns, "serf_wan": -1},
            "performance": {"raft_multiplier": 1},
            "retry_join": [join] if join else [],
            "retry_interval": "200ms",
            "disable_update_check": True,
            "log_level": "WARN",
        }
        if expect:
            config["bootstrap_expect"] = expect
        self.config = directory / "consul.json"
        self.config.write_text(json.dumps(config), "utf-8")

    @contextlib.contextmanager
    def running(self, *, leader: bool) -> Iterator[Process]:
        """Run it, and wait until it answers; with `leader`, until it can read and write."""
        words = (self.binary, "agent", f"-config-file={self.config}")
        with Process(*words, log=self.directory / "log") as process:

            def answers() -> bool | Waiting:
                process.must_run()
                if self.agent.self() is None:
                    return Waiting("it does not answer")
                return not leader or bool(self.agent.leader()) or Waiting("no leader")

            wait_until(answers, 30, f"Consul {self.name}")
            yield process
