"""The two lab machines that the contracts of the Engine and of systemd share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.lab import Lab, Machine


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        one = lab.machine("one", address="10.10.0.11")
        two = lab.machine("two", address="10.10.0.12")
        for machine in (one, two):
            machine.boot()
        for machine in (one, two):
            machine.wait_booted()
        yield one, two
