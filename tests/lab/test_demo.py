"""`make demo` shows a cluster becoming one, and leaves nothing behind when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cluster, host, images
from tests.lab.demo import STEPS
from tests.lab.host import Waiting, wait_until
from tests.lab.lab import Lab


@pytest.fixture
def place() -> Iterator[Path]:
    place = images.lab_dir() / "demo-test"
    yield place
    Lab(place).down()


def start(place: Path) -> subprocess.Popen[str]:
    # A shell lets what it starts in the background ignore SIGINT, and its children after it.
    interruptible = ("env", "--default-signal=INT")
    return subprocess.Popen(
        [*interruptible, sys.executable, "-m", "tests.lab.demo", str(place)],
        cwd=cluster.PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(place: Path) -> list[str]:
    """Mounts, network namespaces and processes of a lab."""
    lab = Lab(place)
    found = [str(path) for path, *_ in host.mounts() if path.is_relative_to(place)]
    found += [str(lab.netns_path)] if lab.netns_path.exists() else []
    return found + [str(process) for process in host.cgroup_processes(lab.slug)]


def test_the_demo_ends_with_four_ready_nodes(place: Path) -> None:
    demo = start(place)
    said, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, said
    table = said[said.index("done at s") :]
    for name in (*cluster.SERVERS, *cluster.WORKERS):
        times, row = (line.split() for line in table.splitlines() if line.startswith(name))
        assert len(times) == 1 + len(STEPS)
        assert all(float(time) >= 0 for time in times[1:])
        assert row[2] == "Ready"
    assert "make enter NODE=" in table
    assert "make demo-down" in table
    assert "initialise the cluster's Swarm" in said, "no live progress"
    assert max(len(line) for line in table.splitlines()) <= 80
    assert len(Lab(place).machines()) == 4
    Lab(place).down()
    assert left_behind(place) == []


def test_ctrl_c_leaves_nothing(place: Path) -> None:
    demo = start(place)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "power on" in line:
            break
    wait_until(
        lambda: bool(left_behind(place)) or Waiting("nothing"), 30, "machines to be interrupted"
    )
    os.killpg(demo.pid, signal.SIGINT)
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, said
    assert "nothing is left" in said
    assert left_behind(place) == []
