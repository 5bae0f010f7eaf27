"""What tests compare with: a plan in words, and golden files.

`NODEAGENT_GOLDEN=write .venv/bin/pytest tests/unit` writes the golden files again; read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

from nodeagent.plan import Plan

GOLDEN = Path(__file__).parents[1] / "golden"


def said(plan: Plan) -> list[str]:
    """A plan as lines: `do …` for each change, or one of `wait …`, `block …` and `done …`."""
    kinds = [bool(plan.changes), bool(plan.waits_for), bool(plan.blocked), bool(plan.summary)]
    assert sum(kinds) == 1, f"a plan is of exactly one kind: {plan}"
    assert bool(plan.fix) == bool(plan.blocked), f"what blocks needs a fix: {plan}"
    if plan.changes:
        return [f"do {change}" for change in plan.changes]
    if plan.waits_for:
        return [f"wait {plan.waits_for}"]
    if plan.blocked:
        return [f"block {plan.blocked}", f"fix {plan.fix}"]
    return [f"done {plan.summary}"]


def assert_golden(name: str, text: str) -> None:
    """`text` is what tests/golden/`name` holds."""
    path = GOLDEN / name
    if os.environ.get("NODEAGENT_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; NODEAGENT_GOLDEN=write accepts the new text"
