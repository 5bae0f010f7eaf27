"""The boot story, in order. Each step is entered again from the top on every cycle."""

from nodeagent.plan import Step
from nodeagent.steps import (
    access,
    consul,
    dns,
    engine,
    guard,
    identity,
    kernel,
    quorum,
    restart,
    secrets,
    services,
    swarm,
)

STEPS: tuple[Step, ...] = (
    identity.STEP,
    kernel.STEP,
    secrets.STEP,
    dns.STEP,
    consul.STEP,
    engine.STEP,
    quorum.STEP,
    guard.STEP,
    access.STEP,
    swarm.STEP,
    services.STEP,
    restart.STEP,
)
