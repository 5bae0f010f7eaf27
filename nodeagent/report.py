"""How a node stands, for people and for other programs: written while it moves, shown on demand."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from nodeagent import __version__, paths
from nodeagent.converge import Cycle, Preview, StepResult
from nodeagent.errors import HostError
from nodeagent.host import Clock, Files

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NEVER_RAN = "nodeagent has not run since this machine booted"
Listener = Callable[[Mapping[str, Any], float], None]
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

    files: Files | None  # None: nothing is written; the file is the running agent's alone
    clock: Clock
    pid: int
    node: str
    steps: Iterable[str]
    about: Mapping[str, str] = field(default_factory=dict)
    listener: Listener | None = None
    _steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    _head: dict[str, Any] = field(default_factory=dict)
    _written: str = ""
    _began: float = 0.0
    _began_at: float = 0.0

    def __post_init__(self) -> None:
        self._began = self.clock.monotonic()
        self._began_at = round(self.clock.now(), 3)
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
        head |= {"node": self.node, "pid": self.pid, "about": self.about}
        head |= {"began": self._began_at, "updated": now}
        try:
            if self.files is not None:
                self.files.write(paths.STATUS, json.dumps({**head, **body}) + "\n", 0o644)
        except HostError as error:  # it is written for people: the node goes on without it
            log.warning("%s", error)
            self._written = ""
        if self.listener is not None:
            self.listener(body, self.clock.monotonic() - self._began)


def read_status(files: Files) -> dict[str, Any] | None:
    """Return the last status since boot, with `is_running` added; None if there is none."""
    text = files.read(paths.STATUS)
    if text is None:
        return None
    try:
        status = json.loads(text)
        status["is_running"] = _is_alive(files, status["pid"])
    except (ValueError, TypeError, KeyError):
        return None
    return dict(status)


def _is_alive(files: Files, pid: int) -> bool:
    try:
        return files.is_held(paths.ALIVE)
    except HostError:  # root's lock, looked at by somebody else: one who may not hold it either
        return files.exists(Path("/proc") / str(pid))


def status_text(status: Mapping[str, Any] | None, columns: int) -> str:
    """The status of this node for a terminal `columns` wide."""
    if status is None:
        return "\n".join(_paragraph(f"{NEVER_RAN}; systemctl start nodeagent", columns)) + "\n"
    sentence = _headline(status)
    if not status["is_running"]:
        sentence = f"nodeagent is not running; its last word was: {sentence}"
    lines = _paragraph(f"{status['node']}: {sentence}", columns)
    for name, step in status["steps"].items():
        is_timed = step["state"] == "done" and step["done_s"] is not None
        time = f"{step['done_s']:.1f} s" if is_timed else ""
        head = f"  {MARKS[step['state']]:2}  {name:9} "
        lines += _wrapped(head, step["sentence"], time, columns)
        if step["fix"]:
            lines += _wrapped(" " * len(head), f"fix: {step['fix']}", "", columns)
    about = status.get("about") or {}
    if about.get("security") == "off":
        warning = "SECURITY IS OFF: nothing in this cluster is encrypted or authenticated"
        lines += _paragraph(warning, columns)
    return "\n".join(lines) + "\n"


def _headline(status: Mapping[str, Any]) -> str:
    """The node's sentence, without what the rows below it say in full."""
    short, _, rest = str(status["sentence"]).partition(": ")
    step = status["steps"].get(short.rpartition(" at ")[2])
    return short if step and rest.startswith(step["sentence"]) else str(status["sentence"])


def sentence_of(status: Mapping[str, Any] | None) -> str:
    """The one line of a status."""
    if status is None:
        return NEVER_RAN
    return str(status["sentence"] if status["is_running"] else "nodeagent is not running")


def _wrapped(head: str, sentence: str, tail: str, columns: int) -> list[str]:
    """One row: `head`, the sentence in as many lines as it takes, `tail` at the right edge."""
    width = max(columns - len(head) - (9 if tail else 0), 20)
    parts = _fill(sentence, width)
    first = f"{head}{parts[0]:{width}} {tail:>8}".rstrip()
    return [first, *(" " * len(head) + part for part in parts[1:])]


def _paragraph(sentence: str, columns: int) -> list[str]:
    first, *rest = _fill(sentence, max(columns - 2, 20))
    return [first, *("  " + part for part in rest)]


def _fill(sentence: str, width: int) -> list[str]:
    """Lines of at most `width`; paths and units are not broken at their hyphens, to be copied."""
    return textwrap.wrap(sentence, width, break_on_hyphens=False) or [""]


def plan_text(previews: Iterable[Preview], columns: int) -> str:
    """What a cycle would do, for a terminal `columns` wide."""
    lines: list[str] = []
    for preview in previews:
        head = f"  {preview.name:9} "
        for sentence in plan_sentences(preview):
            lines += _wrapped(head, sentence, "", columns)
            head = " " * len(head)
    return "\n".join(lines) + "\n"


def plan_sentences(preview: Preview) -> list[str]:
    """One sentence for each change of a step; or why there is none, and what to do about it."""
    plan = preview.plan
    if plan is None:
        return [preview.error or "not known before the steps above are done"]
    if plan.blocked:
        return [f"blocked: {plan.blocked}", f"fix: {plan.fix}"]
    if plan.waits_for:
        return [f"waits for {plan.waits_for}"]
    return [str(change) for change in plan.changes] or [f"nothing to do: {plan.summary}"]


def plan_json(previews: Iterable[Preview]) -> dict[str, Any]:
    """What a cycle would do, as data."""
    steps = {}
    for preview in previews:
        plan = preview.plan
        steps[preview.name] = {
            "changes": [str(change) for change in plan.changes] if plan else [],
            "waits_for": plan.waits_for if plan else "",
            "blocked": plan.blocked if plan else "",
            "fix": plan.fix if plan else "",
            "is_known": plan is not None,
            "error": preview.error,
        }
    return {"schema_version": SCHEMA_VERSION, "steps": steps}


class Lines:
    """Live progress: one line whenever a step has something new to say."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: dict[str, tuple[str, str]] = {}

    def __call__(self, body: Mapping[str, Any], elapsed_s: float) -> None:
        for name, step in body["steps"].items():
            news = (step["state"], step["sentence"])
            if step["state"] == "held" or self._shown.get(name) == news:
                continue
            self._shown[name] = news
            print(
                f"{elapsed_s:6.1f} s  {MARKS[step['state']]:2}  {name:9} {step['sentence']}",
                file=self._out,
                flush=True,
            )


def columns() -> int:
    """How wide the terminal is; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80
