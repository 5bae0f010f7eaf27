"""`make demo`: three servers and a worker become a Swarm cluster before your eyes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nodeagent import steps
from nodeagent.report import MARKS
from tests.lab import cluster, host, images
from tests.lab.flavours import FLAVOURS
from tests.lab.host import LabError, Waiting, wait_until
from tests.lab.lab import Lab, Machine

STEPS = tuple(step.name for step in steps.STEPS)
LABELS = {step: f"{step[:5]:4}" for step in STEPS}  # a column each, in 80 columns
TIMEOUT_S = 300


def main(state_dir: Path | None = None) -> int:
    """Make the cluster and leave it running; clear everything away when interrupted."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        host.prepare(say)
        say("the root file system of the machines (a minute the first time)")
        images.rootfs(FLAVOURS["trixie"])
        say("Consul's image and nodeagent's release")
        images.consul_archive()
        cluster.release()
        lab = Lab(state_dir)
        lab.down()
        lab.up()
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    try:
        say("four machines, switched off, each with nothing but its user-data")
        machines = cluster.make(
            lab, cluster.cluster_file(lab), {**cluster.SERVERS, **cluster.WORKERS}
        )
        for machine in machines:
            machine.boot()
        say("power on\n")
        screen = Screen(sys.stdout)

        def all_ready() -> bool | Waiting:
            seen = {machine.name: cluster.status(machine) for machine in machines}
            screen.show(seen, time.monotonic() - began)
            states = {name: status.get("state", "booting") for name, status in seen.items()}
            return Waiting(str(states)) if set(states.values()) != {"ready"} else True

        wait_until(all_ready, TIMEOUT_S, "four ready nodes")
        print(f"\n{summary(machines)}")
        lab.detach()
    except BaseException as error:
        lab.down()
        if isinstance(error, KeyboardInterrupt):
            print("\ninterrupted: all machines are gone, nothing is left mounted or running")
            return 130
        if isinstance(error, LabError):
            print(f"demo: {error}", file=sys.stderr)
            return 1
        raise
    return 0


class Screen:
    """Live progress of all nodes: a table drawn over on a terminal, lines of news elsewhere."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._drawn = 0
        self._said: dict[tuple[str, str], tuple[str, str]] = {}

    def show(self, nodes: Mapping[str, Mapping[str, Any]], elapsed_s: float) -> None:
        if self._is_terminal:
            self._draw(nodes, elapsed_s)
        else:
            self._tell(nodes, elapsed_s)

    def _draw(self, nodes: Mapping[str, Mapping[str, Any]], elapsed_s: float) -> None:
        lines = [f"{elapsed_s:6.1f} s  {' '.join(LABELS.values())}"]
        for name, status in nodes.items():
            seen = status.get("steps", {})
            marks = {step: MARKS[seen.get(step, {}).get("state", "held")] for step in STEPS}
            columns = " ".join(f"{mark:{len(LABELS[step])}}" for step, mark in marks.items())
            lines.append(f"{name:9} {columns}".rstrip())
            lines.append(f"          {_now(status)}"[:79])
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}A")
        self._out.write("".join(f"\x1b[2K{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)

    def _tell(self, nodes: Mapping[str, Mapping[str, Any]], elapsed_s: float) -> None:
        for name, status in nodes.items():
            for step, entry in status.get("steps", {}).items():
                news = (entry["state"], entry["sentence"])
                if entry["state"] != "held" and self._said.get((name, step)) != news:
                    self._said[name, step] = news
                    print(
                        f"{elapsed_s:6.1f} s  {name:8} {step:9} {MARKS[entry['state']]:2} "
                        f"{entry['sentence']}",
                        file=self._out,
                        flush=True,
                    )


def _now(status: Mapping[str, Any]) -> str:
    """What a node is at: its first step that is not done."""
    if not status:
        return "booting"
    for step, entry in status["steps"].items():
        if entry["state"] in ("changing", "waiting", "failing", "blocked"):
            return f"{step}: {entry['sentence']}"
    if status["state"] == "ready":
        return f"ready, {status['ready_s']:.1f} s after its agent's start"
    return str(status["sentence"])


def _times(machine: Machine) -> str:
    seen = cluster.status(machine)["steps"]
    return " ".join(f"{seen[step]['done_s']:{len(label)}.1f}" for step, label in LABELS.items())


def summary(machines: list[Machine]) -> str:
    """The nodes as the Swarm lists them, and when each step was done after the agent's start."""
    listed = cluster.swarm_nodes(machines[0])
    lines = [
        f"{'done at s':9} {' '.join(LABELS.values())}",
        *(f"{machine.name:9} {_times(machine)}" for machine in machines),
        "",
        f"{'node':13} {'node id':27} {'status':8} manager",
        *(
            f"{name:13} {row['ID']:27} {row['Status']:8} {row['ManagerStatus'] or '-'}"
            for name, row in sorted(listed.items())
        ),
        "",
        "a shell in one:   sudo make enter NODE=server1   (try: nodeagent status)",
        "tear it down:     sudo make demo-down",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
