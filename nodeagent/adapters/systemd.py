"""The service manager, by systemctl, journalctl and its notification socket."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from nodeagent.adapters.program import run
from nodeagent.errors import HostError
from nodeagent.host import Unit, Word

WATCH_PAUSE_S = 5  # before looking again for the main process of a unit that has none
START_TIMEOUT_S = 50  # below the watchdog's 60 s: a unit that takes longer is asked for again
PROPERTIES = (
    *("LoadState", "ActiveState", "InvocationID", "UnitFileState", "Result", "NRestarts"),
    *("InactiveExitTimestampMonotonic", "ExecStart", "Environment", "EnvironmentFiles"),
    "FragmentPath",
)


class SystemdManager:
    """systemd as pid 1 of this machine."""

    def is_running(self) -> bool:
        return Path("/run/systemd/system").is_dir()  # as sd_booted(3) does it

    def unit(self, name: str) -> Unit:
        shown = run("systemctl", "show", "--property", ",".join(PROPERTIES), "--", name)
        values = dict.fromkeys(PROPERTIES, "")
        files: list[str] = []  # one line each
        for key, _, value in (line.partition("=") for line in shown.splitlines()):
            values[key] = value
            if key == "EnvironmentFiles":
                files.append(value.rpartition(" (")[0])
        load, active, invocation, enabled, result = (values[key] for key in PROPERTIES[:5])
        return Unit(
            load,
            active,
            invocation,
            enabled,
            result,
            restarts=int(values["NRestarts"] or 0),
            began_s=int(values["InactiveExitTimestampMonotonic"] or 0) / 1e6,
            command=_command(values, files),
        )

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

    def reload_unit(self, name: str) -> None:
        run("systemctl", "reload", "--", name, timeout_s=START_TIMEOUT_S)

    def enable(self, name: str) -> None:
        run("systemctl", "enable", "--", name, timeout_s=START_TIMEOUT_S)

    def disable(self, name: str) -> None:
        run("systemctl", "disable", "--now", "--", name, timeout_s=START_TIMEOUT_S)

    def reload(self) -> None:
        run("systemctl", "daemon-reload", timeout_s=START_TIMEOUT_S)

    def reboot(self) -> None:
        run("systemctl", "reboot")  # it does not wait

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


def _command(values: Mapping[str, str], files: Sequence[str]) -> tuple[Word, ...]:
    """The words of ExecStart as systemd.service(5) makes them, each with where it stands."""
    match = re.search(r"argv\[\]=(.*?) ; ignore_errors=", values["ExecStart"])
    if match is None:
        return ()
    unit = values["FragmentPath"]
    known = {key: (value, unit) for key, value in _assignments(shlex.split(values["Environment"]))}
    for file in files:
        with contextlib.suppress(OSError):
            lines = Path(file).read_text("utf-8", "replace").splitlines()
            known.update((key, (value, file)) for key, value in _assignments(lines))
    words: list[Word] = []
    for text in match.group(1).split():
        variable = re.fullmatch(r"\$(\w+)", text)  # a word of its own becomes any number of words
        if variable:
            value, place = known.get(variable.group(1), ("", unit))
            words += (Word(part, place) for part in value.split())
            continue
        within = re.search(r"\$\{(\w+)\}", text)
        value, place = known.get(within.group(1), ("", unit)) if within else ("", unit)
        words.append(Word(re.sub(r"\$\{\w+\}", lambda _, value=value: value, text), place))
    return tuple(words)


def _assignments(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Lines of the form KEY=value, with or without quotes around the value."""
    for line in lines:
        match = re.match(r"""\s*(\w+)=(["']?)(.*)\2\s*$""", line)
        if match:
            yield match.group(1), match.group(3)
