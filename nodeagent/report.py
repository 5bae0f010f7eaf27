"""How a node stands, for people and for other programs: written while it moves, shown on demand."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from nodeagent import __version__, paths
from nodeagent.converge import Cycle, Preview, StepResult
from nodeagent.host import Clock, Files

SCHEMA_VERSION = 1
MARKS = {
    "done": "ok",
    "changing": "..",
    "waiting": "..",
    "failing": "!!",
    "blocked": "XX",
    "held": "  ",
    "unknown": "??",
}


@dataclass
class StatusFile:
    """`/run/nodeagent/status.json`: for people and `nodeagent status`, never read to decide."""

    files: Files
    clock: Clock
    pid: int
    node: str
    steps: Iterable[str]
    listener: Any = None
    _steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    _head: dict[str, Any] = field(default_factory=dict)
    _written: str = ""

    def __post_init__(self) -> None:
        self._began = self.clock.monotonic()
        self._steps = {
            name: {"state": "held", "sentence": "", "fix": "", "began_s": None, "done_s": None}
            for name in self.steps
        }
        self._head = {"state": "starting", "sentence": "starting", "ready_s": None}

    def update(self, result: StepResult) -> None:
        """Take note of how one step stands, and write it down if that is news."""
        entry = self._steps.setdefault(result.name, {"began_s": None, "done_s": None})
        now_s = round(self.clock.monotonic() - self._began, 3)
        if result.state != "held" and entry["began_s"] is None:
            entry["began_s"] = now_s
        if result.state == "done" and entry["done_s"] is None:
            entry["done_s"] = now_s
        entry |= {"state": result.state, "sentence": result.sentence, "fix": result.fix}
        self._write()

    def settle(self, cycle: Cycle) -> None:
        """Take note of how the whole node stands."""
        state = "ready" if cycle.is_ready else "blocked" if cycle.is_blocked else "waiting"
        if state == "ready" and self._head["ready_s"] is None:
            self._head["ready_s"] = round(self.clock.monotonic() - self._began, 3)
        if cycle.results and cycle.results[0].name == "spec":
            self.update(cycle.results[0])
        else:
            self._steps.pop("spec", None)
        self._head |= {"state": state, "sentence": cycle.sentence}
        self._write()

    def _write(self) -> None:
        body = {**self._head, "steps": self._steps}
        text = json.dumps(body)
        if text == self._written:
            return
        self._written = text
        now = round(self.clock.now(), 3)
        head = {"schema_version": SCHEMA_VERSION, "agent_version": __version__}
        head |= {"node": self.node, "pid": self.pid, "updated": now}
        self.files.write(paths.STATUS, json.dumps({**head, **body}) + "\n", 0o644)
        if self.listener is not None:
            self.listener(body)
