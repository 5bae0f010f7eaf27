"""The service manager, by systemctl, journalctl and its notification socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from nodeagent.adapters.program import run
from nodeagent.errors import HostError
from nodeagent.host import Unit

WATCH_PAUSE_S = 5  # before looking again for the main process of a unit that has none
START_TIMEOUT_S = 50  # below the watchdog's 60 s: a unit that takes longer is asked for again
PROPERTIES = ("LoadState", "ActiveState", "InvocationID", "UnitFileState", "Result")


class SystemdManager:
    """systemd as pid 1 of this machine."""

    def is_running(self) -> bool:
        return Path("/run/systemd/system").is_dir()  # as sd_booted(3) does it

    def unit(self, name: str) -> Unit:
        shown = run("systemctl", "show", "--property", ",".join(PROPERTIES), "--", name)
        values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        return Unit(*(values.get(key, "") for key in PROPERTIES))

    def start(self, name: str) -> None:
        run("systemctl", "start", "--", name, timeout_s=START_TIMEOUT_S)

    def start_soon(self, name: str) -> None:
        run("systemctl", "restart", "--no-block", "--", name)

    def restart(self, name: str) -> None:
        # A restart that is asked for is not one of a crash loop, which the unit's StartLimit is
        # against (Debian's docker.service: three starts a minute).
        with contextlib.suppress(HostError):  # refused where there is nothing to reset
            run("systemctl", "reset-failed", "--", name)
        run("systemctl", "restart", "--", name, timeout_s=START_TIMEOUT_S)

    def enable(self, name: str) -> None:
        run("systemctl", "enable", "--", name, timeout_s=START_TIMEOUT_S)

    def reload(self) -> None:
        run("systemctl", "daemon-reload", timeout_s=START_TIMEOUT_S)

    def last_lines(self, name: str, count: int) -> tuple[str, ...]:
        """The last lines a unit's own process wrote, newest last."""
        text = run("journalctl", "-b", "-q", "-o", "cat", "-n", str(count), f"_SYSTEMD_UNIT={name}")
        return tuple(line.strip() for line in text.splitlines() if line.strip())

    def execute(self, *command: str) -> None:
        run(*command)

    def watch(self, name: str, wake: Callable[[], None], stop: threading.Event) -> None:
        """By a pidfd of the main process: an open event stream would hold up the Engine's end.

        (dockerd gives open HTTP requests 5 s before it ends; seen with 26.1.)
        """
        while not stop.is_set():
            with contextlib.suppress(HostError, OSError, ValueError):
                pid = int(run("systemctl", "show", "--value", "--property=MainPID", "--", name))
                if pid:
                    descriptor = os.pidfd_open(pid)
                    try:
                        while not stop.is_set() and not select.select([descriptor], [], [], 60)[0]:
                            pass
                    finally:
                        os.close(descriptor)
                    wake()
            stop.wait(WATCH_PAUSE_S)

    def notify(self, **values: str) -> None:
        """sd_notify(3). UTF-8, which the sdnotify package loses (it encodes latin-1)."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        if not address:
            return
        message = "\n".join(f"{key}={' '.join(value.split())}" for key, value in values.items())
        target = f"\0{address[1:]}" if address.startswith("@") else address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.settimeout(1)
            try:
                end.sendto(message.encode(), target)
            except OSError as error:
                raise HostError("notify", "systemd", error) from error
