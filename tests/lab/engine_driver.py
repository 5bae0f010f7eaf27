"""Runs the step `engine` alone inside a machine, to its end. Not part of the program.

`/run/driver/node.yaml` is the spec. Of the environment, DIE_AFTER says after which change, counted
from 1, to die by SIGKILL, and DEADLINE_S takes the place of how long an Engine may take to start.
With `ask FILE`, only what the Engine's program says of a file of options. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

LAUNCHER = Path("/opt/nodeagent/nodeagent").read_text("utf-8")
sys.path.insert(0, re.findall(r"sys\.path\.insert\(0, '(.*)'\)", LAUNCHER)[0])

from nodeagent import paths, spec  # noqa: E402 - found by the line above
from nodeagent.adapters import systemd  # noqa: E402 - as the line before
from nodeagent.adapters.node import this_machine  # noqa: E402 - as the line before
from nodeagent.changes import Change  # noqa: E402 - as the line before
from nodeagent.converge import make, run_cycle  # noqa: E402 - as the line before
from nodeagent.errors import HostError, SpecError  # noqa: E402 - as the line before
from nodeagent.host import Host  # noqa: E402 - as the line before
from nodeagent.steps import engine  # noqa: E402 - as the line before

SPEC = Path("/run/driver/node.yaml")
PAUSE_S = 0.1
MOST_CYCLES = 1200  # of which each takes a pause: more than a start's deadline
FAILING = 4  # cycles that fail in the same words: it will not get better by itself
STARTING = "7d4958e842da4a758f6c1cdc7b36dcc5"  # systemd: SD_MESSAGE_UNIT_STARTING


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def starts() -> int:
    """How often the Engine has begun to start in this boot, by whomever."""
    said("journalctl", "--sync")
    match = (f"UNIT={paths.ENGINE_UNIT}", f"MESSAGE_ID={STARTING}")
    return len(said("journalctl", "-b", "-q", "-o", "cat", *match).splitlines())


def observe(wanted: spec.Spec, host: Host) -> engine.Seen:
    """Without DNS servers, whose own step does not run here."""
    return replace(engine.observe(wanted, host), dns=())


def converge(
    host: Host, wanted: spec.Spec, apply: Callable[[Change, Host], None]
) -> dict[str, str]:
    """Cycles until the next would end as the last: done, blocked, or failing for good."""
    step = replace(engine.STEP, requires=(), observe=observe)
    words: list[str] = []
    for _ in range(MOST_CYCLES):
        (result,) = run_cycle(wanted, host, (step,), lambda _: None, apply).results
        words = [*words, result.sentence] if result.sentence in words[-1:] else [result.sentence]
        is_failing = result.state == "failing" and len(words) == FAILING
        if result.state in ("done", "blocked") or is_failing:
            return {"state": result.state, "sentence": result.sentence, "fix": result.fix}
        host.clock.wait(PAUSE_S)
    return {"state": "endless", "sentence": words[-1], "fix": ""}


def report(host: Host) -> dict[str, object]:
    """What is on the machine now."""
    unit = host.systemd.unit(paths.ENGINE_UNIT)
    try:
        info = host.engine.info() if unit.is_active else None
    except HostError:
        info = None
    directory = paths.DAEMON_JSON.parent
    return {
        "record": host.files.read(paths.ENGINE_RECORD),
        "original": host.files.read(paths.ORIGINAL_DAEMON_JSON),
        "pending": host.files.read(paths.RESTART_PENDING),
        "beside": sorted(path.name for path in directory.iterdir()) if directory.is_dir() else [],
        "active": unit.active,
        "invocation": unit.invocation,
        "starts": starts(),
        "shown": dict(info.options) if info else None,
    }


def main() -> int:
    host, made = this_machine(), []
    if sys.argv[1:2] == ["ask"]:
        program, unit = host.engine_program, host.systemd.unit(paths.ENGINE_UNIT)
        answer = {"refusal": program.refusal(Path(sys.argv[2]), unit.command)}
        print(json.dumps(answer))
        return 0
    if "DEADLINE_S" in os.environ:
        engine.START_DEADLINE_S = systemd.START_TIMEOUT_S = int(os.environ["DEADLINE_S"])
    left = int(os.environ.get("DIE_AFTER", "-1"))

    def apply(change: Change, host: Host) -> None:
        nonlocal left
        make(change, host)
        made.append(str(change))
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        wanted = spec.load(SPEC, spec.Spec)
    except SpecError as error:
        result = {"state": "refused", "sentence": str(error), "fix": ""}
    else:
        result = converge(host, wanted, apply)
        first = len(made)
        converge(host, wanted, apply)
        result |= {"changes": made[:first], "again": made[first:]}  # type: ignore[dict-item]
    print(json.dumps({**result, **report(host)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
