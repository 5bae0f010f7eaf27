"""Every way this program can fail, and the exit code each one ends in."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path


class Exit(enum.IntEnum):
    """Exit codes, the same for every verb (README, "Exit codes"). 77 and 78 are sysexits.h's."""

    OK = 0
    BUG = 1
    USAGE = 2
    BLOCKED = 3
    WAITING = 6
    NOT_ROOT = 77
    BAD_SPEC = 78


class NodeagentError(Exception):
    """An error with a sentence for the operator and an exit code for the caller."""

    exit_code = Exit.BUG


@dataclass(frozen=True)
class Problem:
    """One thing in a spec that the operator must edit."""

    file: str
    line: int | None
    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        subject = f"{self.path}: " if self.path else ""
        return f"{where}: {subject}{self.message}" + (f" ({self.hint})" if self.hint else "")


class SpecError(NodeagentError):
    """The spec is wrong: only an edit by the operator helps, so nothing is retried."""

    exit_code = Exit.BAD_SPEC

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems

    @property
    def sentence(self) -> str:
        """The first problem, and how many more there are: what fits on one line."""
        more = len(self.problems) - 1
        tail = f" (and {more} more: nodeagent validate)" if more else ""
        return f"{self.problems[0]}{tail}"


class UsageError(NodeagentError):
    """The command line asks for something that makes no sense."""

    exit_code = Exit.USAGE


class NotRootError(NodeagentError):
    """The verb needs root."""

    exit_code = Exit.NOT_ROOT


class HostError(NodeagentError):
    """An outside system failed. Raised by adapters `from` the library's error; the loop retries."""

    exit_code = Exit.WAITING

    def __init__(self, operation: str, target: str | Path, cause: object, hint: str = "") -> None:
        self.operation = operation
        self.target = str(target)
        # Without memory addresses: the same failure reads the same each time, and is one log line.
        words = re.sub(r" at 0x[0-9a-f]+", "", str(cause)).split()
        self.cause = " ".join(words) or type(cause).__name__
        self.hint = hint
        super().__init__(
            f"could not {operation} {self.target}: {self.cause}" + (f" ({hint})" if hint else "")
        )


class Secret:
    """A value that never shows itself: repr and str are `***`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself, at the one place where it leaves the program."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)
