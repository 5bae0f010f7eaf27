"""The loop: converge, tell systemd and the status file how it stands, sleep until something moves.

The watchdog is fed only from this loop, between calls that all have time-outs: a loop that hangs
is killed and started again by systemd.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodeagent import paths
from nodeagent import spec as spec_module
from nodeagent.converge import Apply, Cycle, StepResult, run_cycle
from nodeagent.errors import HostError, SpecError
from nodeagent.host import Host, service_id
from nodeagent.plan import Step
from nodeagent.report import StatusFile
from nodeagent.spec import Spec
from nodeagent.steps import services

log = logging.getLogger(__name__)

SETTLED_S = 30.0  # between rounds when everything is right; events come sooner
FEED_S = 10.0  # between feedings of the watchdog, which allows 60 s

# Between rounds while something is waited for: a twentieth of the time it has lasted, so what is
# noticed late is late by 5 %, and a wait of hours costs little; but no shorter than a round takes,
# thrice, because what is waited for may need the same processor.
SHORTEST_S, SHARE, ROUNDS, LONGEST_S = 0.05, 0.05, 3, 5.0


@dataclass
class Loop:
    """Converges this node, again and again. `until` decides when `run` returns."""

    host: Host
    steps: Sequence[Step]
    status: StatusFile
    spec_path: Path
    apply: Apply | None = None
    jitter: Callable[[float, float], float] = random.uniform
    changes_made: int = 0
    _vouched: tuple[float, object] = (0.0, None)

    def run(self, until: Callable[[Cycle], bool], deadline_s: float | None = None) -> Cycle:
        """Cycle until `until` says so, or until `deadline_s` has passed; return the last cycle.

        Raises SpecError if the spec is wrong to begin with. One that becomes wrong later blocks
        the node and changes nothing.
        """
        spec = spec_module.load(self.spec_path, Spec)
        self.status.about = {
            "cluster": spec.cluster,
            "role": spec.role,
            "security": spec.security or "on",
        }
        self.host.systemd.notify(READY="1")
        clock = self.host.clock
        end = None if deadline_s is None else clock.monotonic() + deadline_s
        sentence, since = "", clock.monotonic()
        while True:
            round_began = clock.monotonic()
            cycle = self._cycle()
            self.changes_made += cycle.made_changes
            if cycle.sentence != sentence:
                since = clock.monotonic()
                log.info("%s", cycle.sentence)
                sentence = cycle.sentence
            self.status.settle(cycle)
            self.host.systemd.notify(STATUS=sentence, WATCHDOG="1")
            now = clock.monotonic()
            if until(cycle) or (end is not None and now >= end):
                return cycle
            retry_s = _retry_s(now - since, now - round_began)
            pause_s = SETTLED_S if cycle.is_ready else retry_s
            pause_s *= self.jitter(0.8, 1.2)
            self._sleep(pause_s if end is None else min(pause_s, end - now))

    def _cycle(self) -> Cycle:
        try:
            spec = spec_module.load(self.spec_path, Spec)
        except SpecError as error:
            return Cycle((StepResult("spec", "blocked", error.sentence),))
        try:
            with self.host.files.try_lock(paths.LOCK) as is_ours:
                if not is_ours:
                    sentence = "another nodeagent to finish its round on this machine"
                    return Cycle((StepResult("lock", "waiting", sentence),))
                cycle = run_cycle(spec, self.host, self.steps, self._progress, self.apply)
                self._vouch(cycle)
                return cycle
        except HostError as error:
            return Cycle((StepResult("lock", "failing", str(error)),))

    def _progress(self, result: StepResult) -> None:
        self.status.update(result)
        if result.state == "changing":
            self.host.systemd.notify(STATUS=f"{result.name}: {result.sentence}")

    def _vouch(self, cycle: Cycle) -> None:
        """Pass or fail this node's TTL checks in Consul, as far as Consul can be told."""
        states = {result.name: result.state for result in cycle.results}
        verdict = (cycle.is_ready, states.get("engine") == "done", cycle.sentence)
        now = self.host.clock.monotonic()
        is_news = verdict != self._vouched[1] or now - self._vouched[0] > SETTLED_S / 2
        if states.get("consul") != "done" or not is_news:
            return
        try:
            registered = self.host.consul.services()
            for name, is_right in zip(services.VOUCHED, verdict[:2], strict=True):
                id_ = service_id(name)
                if id_ in registered:
                    self.host.consul.vouch(id_, is_right, cycle.sentence)
            self._vouched = (now, verdict)
        except HostError as error:
            log.debug("%s", error)

    def _sleep(self, pause_s: float) -> None:
        """Sleep until `pause_s` has passed or an event wakes, feeding the watchdog."""
        clock = self.host.clock
        end = clock.monotonic() + pause_s
        while (left := end - clock.monotonic()) > 0:
            self.host.systemd.notify(WATCHDOG="1")
            if clock.wait(min(left, FEED_S)):
                return


def _retry_s(waited_s: float, round_s: float) -> float:
    return min(max(SHORTEST_S, SHARE * waited_s, ROUNDS * round_s), LONGEST_S)


def watch(host: Host, spec: Spec, stop: threading.Event) -> tuple[threading.Thread, ...]:
    """Wake the loop when the Engine ends, the record in Consul changes or a routing rule goes."""

    def on_engine() -> None:
        host.systemd.watch(paths.ENGINE_UNIT, host.clock.wake, stop)

    def on_consul() -> None:
        host.consul.watch(spec.key_prefix, host.clock.wake, stop)

    def on_rules() -> None:
        host.network.watch_rules(host.clock.wake, stop)

    threads = tuple(
        threading.Thread(target=target, name=target.__name__, daemon=True)
        for target in (on_engine, on_consul, on_rules)
    )
    for thread in threads:
        thread.start()
    return threads
