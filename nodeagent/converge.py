"""One cycle: every step is observed, and what differs from the spec is changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nodeagent.changes import Change
from nodeagent.errors import HostError
from nodeagent.host import Host
from nodeagent.plan import Plan, Step
from nodeagent.spec import Spec

log = logging.getLogger(__name__)

# A step that still finds something to change after so many rounds is changing it back and forth.
MOST_ROUNDS = 25

State = Literal["done", "changing", "waiting", "blocked", "failing", "held"]


@dataclass(frozen=True)
class StepResult:
    """How one step stands. `held`: a step it requires is not done yet."""

    name: str
    state: State
    sentence: str
    fix: str = ""
    changes: int = 0  # made in this cycle


@dataclass(frozen=True)
class Cycle:
    """How all steps stand."""

    results: tuple[StepResult, ...]

    @property
    def is_ready(self) -> bool:
        return all(result.state == "done" for result in self.results)

    @property
    def is_blocked(self) -> bool:
        return any(result.state == "blocked" for result in self.results)

    @property
    def made_changes(self) -> int:
        return sum(result.changes for result in self.results)

    @property
    def sentence(self) -> str:
        """The one line that says how this node stands: what blocks it, or what it waits for."""
        for state in ("blocked", "failing", "waiting", "changing"):
            for result in self.results:
                if result.state == state:
                    fix = f"; {result.fix}" if result.fix else ""
                    return f"{state} at {result.name}: {result.sentence}{fix}"
        last = {result.name: result.sentence for result in self.results}
        return f"ready: {last['swarm']}; {last['quorum']}" if "swarm" in last else "ready"


Progress = Callable[[StepResult], None]
Apply = Callable[[Change, Host], None]


def run_cycle(
    spec: Spec, host: Host, steps: Sequence[Step], progress: Progress, apply: Apply | None = None
) -> Cycle:
    """Bring each step as far as it goes now; a step runs when all it requires are done.

    `progress` is called whenever a step's state or sentence may have changed. Nothing here waits:
    a step that has to wait says so, and the caller decides when to come back.
    """
    results: dict[str, StepResult] = {}
    for step in steps:
        missing = [name for name in step.requires if results[name].state != "done"]
        if missing:
            result = StepResult(step.name, "held", f"after {', '.join(missing)}")
        else:
            result = _bring_right(step, spec, host, progress, apply or make)
        results[step.name] = result
        progress(result)
    return Cycle(tuple(results.values()))


def make(change: Change, host: Host) -> None:
    """Make one change, with one line in the log before it."""
    log.info("%s", change)
    change.apply(host)


def _bring_right(
    step: Step, spec: Spec, host: Host, progress: Progress, apply: Apply
) -> StepResult:
    made = 0
    try:
        for _ in range(MOST_ROUNDS):
            host.systemd.notify(WATCHDOG="1")
            plan = step.diff(spec, step.observe(spec, host))
            if not plan.changes:
                return replace(_judge(step, plan), changes=made)
            for change in plan.changes:
                progress(StepResult(step.name, "changing", str(change)))
                host.systemd.notify(WATCHDOG="1")
                apply(change, host)
                made += 1
    except HostError as error:
        return StepResult(step.name, "failing", str(error), changes=made)
    sentence = f"still something to change after {MOST_ROUNDS} rounds: {plan.changes[0]}"
    return StepResult(step.name, "failing", sentence, changes=made)


def _judge(step: Step, plan: Plan) -> StepResult:
    if plan.blocked:
        return StepResult(step.name, "blocked", plan.blocked, plan.fix)
    if plan.waits_for:
        return StepResult(step.name, "waiting", plan.waits_for)
    return StepResult(step.name, "done", plan.summary)


def take_back(spec: Spec, host: Host, steps: Sequence[Step], progress: Progress) -> Cycle:
    """Give the machine back what its owner had, last step first, as far as each step can."""
    results = []
    for step in reversed(steps):
        if step.undo is not None:
            results.append(_bring_right(replace(step, diff=step.undo), spec, host, progress, make))
            progress(results[-1])
    return Cycle(tuple(results))


@dataclass(frozen=True)
class Preview:
    """What one step would do now."""

    name: str
    plan: Plan | None  # None: a step it requires is not done yet, so nothing can be said
    error: str = ""


def preview(spec: Spec, host: Host, steps: Sequence[Step]) -> tuple[Preview, ...]:
    """Return what a cycle would do here now; changes nothing."""
    previews: dict[str, Preview] = {}
    for step in steps:
        plans = [previews[name].plan for name in step.requires]
        if any(plan is None or not plan.is_done for plan in plans):
            previews[step.name] = Preview(step.name, None)
            continue
        try:
            plan = step.diff(spec, step.observe(spec, host))
            previews[step.name] = Preview(step.name, plan)
        except HostError as error:
            previews[step.name] = Preview(step.name, None, str(error))
    return tuple(previews.values())
