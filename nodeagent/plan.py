"""What a step answers when asked what is to be done: changes, a wait, a block, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nodeagent.changes import Change
from nodeagent.host import Host
from nodeagent.spec import Spec


@dataclass(frozen=True)
class Plan:
    """Exactly one of: changes to make, what is waited for, what blocks; or none: all is right."""

    changes: tuple[Change, ...] = ()
    waits_for: str = ""
    blocked: str = ""
    fix: str = ""  # what the operator can do about `blocked`
    summary: str = ""  # what is true, when nothing is left to do

    @property
    def is_done(self) -> bool:
        return not (self.changes or self.waits_for or self.blocked)


def change(*changes: Change) -> Plan:
    """These changes are to be made, in this order; a kill may come after any of them."""
    return Plan(changes=changes)


def wait(what: str) -> Plan:
    """Somebody or something else has to come first."""
    return Plan(waits_for=what)


def block(why: str, *, fix: str) -> Plan:
    """A human must act."""
    return Plan(blocked=why, fix=fix)


def done(summary: str) -> Plan:
    """Everything is as it should be."""
    return Plan(summary=summary)


@dataclass(frozen=True)
class Step:
    """A thing made right: `observe` only reads; `diff` is pure.

    `undo`, as pure, gives the machine back what its owner had there before.
    """

    name: str
    requires: tuple[str, ...]
    observe: Callable[[Spec, Host], Any]
    diff: Callable[[Spec, Any], Plan]
    undo: Callable[[Spec, Any], Plan] | None = None
