"""One lab and one cluster of four machines for all tests of a session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import cluster, images
from tests.lab.host import LabError
from tests.lab.lab import Lab, Machine

TESTS = images.lab_dir() / "tests"  # beside the demo's lab, so that both can be up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in this directory boot machines; say why they are left out where they cannot."""
    for item in items:
        if "/tests/lab/" in str(item.path):
            item.add_marker(pytest.mark.lab)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="boots machines: needs root (sudo)"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Put what the machines' journals end with beside a failure."""
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    if report.failed and TESTS.is_dir():
        for name, machine in Lab(TESTS).machines().items():
            with contextlib.suppress(LabError):
                units = ("-u", "nodeagent", "-u", "docker", "-u", "nodeagent-engine")
                said = machine.run("journalctl", "-b", "-n", "40", "-o", "short-monotonic", *units)
                report.sections.append((f"journal of {name}", said.stdout))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with Lab(TESTS) as lab:
        yield lab


@pytest.fixture(scope="session")
def four(lab: Lab) -> list[Machine]:
    """Three servers and a worker, booted from user-data alone, ready."""
    machines = cluster.make(lab, cluster.cluster_file(lab), {**cluster.SERVERS, **cluster.WORKERS})
    for machine in machines:
        machine.boot()
    cluster.wait_ready(machines)
    return machines
