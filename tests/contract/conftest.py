"""What the contracts share: a prepared box, and two lab machines for the Engine and systemd."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab import host, images
from tests.lab.lab import Lab, Machine


@pytest.fixture(scope="session", autouse=True)
def prepared() -> None:
    """Fetch what the tests need before any of them enters a network that leads nowhere."""
    if os.geteuid() == 0:
        host.prepare()
        images.consul_binary()


@pytest.fixture(scope="package")  # they would take the lab's tests their processor time
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        one = lab.machine("one", address="10.10.0.11")
        two = lab.machine("two", address="10.10.0.12")
        for machine in (one, two):
            machine.boot()
        for machine in (one, two):
            machine.wait_booted()
        yield one, two
