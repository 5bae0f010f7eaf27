"""Time, and the only place that sleeps."""

from __future__ import annotations

import threading
import time


class SystemClock:
    """The machine's clock; a wait ends early when another thread calls `wake`."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def wait(self, timeout_s: float) -> bool:
        woken = self._woken.wait(timeout_s)
        self._woken.clear()
        return woken

    def wake(self) -> None:
        self._woken.set()
