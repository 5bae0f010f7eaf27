"""What the README tells people to type exists, and CI types the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def commands(name: str) -> set[str]:
    """The targets of `make` that a file says to run, in code or between backquotes."""
    text = (PROJECT / name).read_text("utf-8")
    return set(re.findall(r"(?:^|`|\$ |sudo )make ([a-z][a-z-]*)", text, re.MULTILINE))


@pytest.fixture(scope="module")
def targets() -> dict[str, str]:
    """Each target that `make help` lists, with what it says of it."""
    told = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    words = (line.split(maxsplit=2) for line in told.stdout.splitlines())
    return {name: what for _, name, what in words}


def test_the_readme_names_only_commands_there_are(targets: dict[str, str]) -> None:
    assert {"demo", "test"} <= commands("README.md") <= set(targets)


def test_ci_runs_the_readmes_test_command() -> None:
    assert commands(".ci/run") == {"test"}
    assert "test" in commands("README.md")


def test_help_lists_every_command(targets: dict[str, str]) -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert set(phony.split()) == set(targets)
