"""Runs `nodeagent run` inside a machine, and dies at a chosen change. Not part of the program.

`/run/driver/die_after` holds after which change of this process, counted from 1, to die by
SIGKILL; it dies once. While `/run/driver/hold` exists, the quorum step waits, and what follows it:
what only one server has to do for the cluster, another one does.
`/run/driver/changes` gets one line for every change that was made.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

LAUNCHER = Path("/opt/nodeagent/nodeagent").read_text("utf-8")
sys.path.insert(0, re.findall(r"sys\.path\.insert\(0, '(.*)'\)", LAUNCHER)[0])

from nodeagent import cli, converge, steps  # noqa: E402 - found by the line above
from nodeagent.changes import Change  # noqa: E402 - as the line before
from nodeagent.host import Host  # noqa: E402 - as the line before
from nodeagent.plan import Plan, Step, wait  # noqa: E402 - as the line before
from nodeagent.spec import Spec  # noqa: E402 - as the line before

HERE = Path("/run/driver")
DIED, DIE_AFTER, HOLD, CHANGES = (HERE / name for name in ("died", "die_after", "hold", "changes"))


def held(step: Step) -> Step:
    def diff(spec: Spec, seen: Any) -> Plan:
        return wait("the test") if HOLD.exists() else step.diff(spec, seen)

    return dataclasses.replace(step, diff=diff)


def main() -> int:
    left = int(DIE_AFTER.read_text()) if DIE_AFTER.exists() and not DIED.exists() else -1
    make = converge.make

    def apply(change: Change, host: Host) -> None:
        nonlocal left
        make(change, host)
        with CHANGES.open("a") as file:
            print(change, file=file)
        left -= 1
        if left == 0:
            DIED.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    converge.make = apply
    steps.STEPS = tuple(held(step) if step.name == "quorum" else step for step in steps.STEPS)
    return cli.main(["run"])


if __name__ == "__main__":
    sys.exit(main())
