"""The boot story, in order. Each step is entered again from the top on every cycle."""

from nodeagent.plan import Step
from nodeagent.steps import consul, engine, identity, quorum, services, swarm

STEPS: tuple[Step, ...] = (
    identity.STEP,
    consul.STEP,
    engine.STEP,
    quorum.STEP,
    swarm.STEP,
    services.STEP,
)
