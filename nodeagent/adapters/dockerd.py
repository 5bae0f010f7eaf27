"""The Docker Engine's program, asked without touching the daemon."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nodeagent.adapters.program import run
from nodeagent.errors import HostError
from nodeagent.host import Word

PLACES = (Path("/usr/sbin/dockerd"), Path("/usr/bin/dockerd"))  # Debian's, Docker's own
VALIDATE_SINCE = (23, 0)  # moby v23.0.0 cmd/dockerd/options.go
TIMEOUT_S = 10
NOBODY = 2**31 - 7  # a user that no account and no process has
NOT_ROOT = "needs to be started with root"  # moby cmd/dockerd/daemon.go, after the options' check


class Dockerd:
    """The program behind docker.service."""

    def __init__(self, places: Sequence[Path] = PLACES) -> None:
        self._places = places
        self._known: tuple[object, str, bool | None] = (None, "", None)

    def _program(self) -> tuple[Path, object] | None:
        """The program and what changes when it is replaced."""
        for path in self._places:
            with contextlib.suppress(OSError):
                found = path.stat()
                return path, (path, found.st_mtime_ns, found.st_size, found.st_ino)
        return None

    def version(self) -> str:
        program = self._program()
        if program is None:
            return ""
        path, mark = program
        if self._known[0] != mark:
            said = run(str(path), "--version")
            match = re.search(r"version ([^\s,]+)", said)
            self._known = (mark, match.group(1) if match else "", None)
        return self._known[1]

    def has_consul(self) -> bool:
        """Debian's later builds of 20.10 leave the backend out (debian/patches/avoid-consul)."""
        version, program = self.version(), self._program()
        if program is None:
            return False
        mark, _, known = self._known
        if known is None:
            try:
                with (
                    program[0].open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
                ):
                    known = text.find(b"libkv/store/consul") >= 0
            except (OSError, ValueError) as error:
                raise HostError("read", program[0], error) from error
            self._known = (mark, version, known)
        return known

    def refusal(self, options: Path, command: tuple[Word, ...]) -> str:
        """With `--validate` where the Engine knows that.

        An older one is started as a user who is not root: it checks its options, and then refuses
        to go on before it has touched anything.
        """
        program = self._program()
        if program is None:
            return "there is no dockerd"
        flags = [word.text for word in command[1:]]
        numbers = re.match(r"(\d+)\.(\d+)", self.version())
        if numbers and tuple(map(int, numbers.groups())) < VALIDATE_SINCE:
            return self._as_nobody(program[0], flags, options)
        try:
            run(str(program[0]), *flags, "--validate", f"--config-file={options}")
        except HostError as error:
            return _core(str(error.cause), options)
        return ""

    def _as_nobody(self, program: Path, flags: Sequence[str], options: Path) -> str:
        copy = options.with_suffix(".shown")
        try:
            copy.unlink(missing_ok=True)  # of a run that was killed
            with open(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
                file.write(options.read_bytes())
            os.chown(copy, NOBODY, NOBODY)
            try:
                done = subprocess.run(
                    [str(program), *flags, f"--config-file={copy}"],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    stdin=subprocess.DEVNULL,
                    timeout=TIMEOUT_S,
                    check=False,
                    user=NOBODY,
                    group=NOBODY,
                    extra_groups=[],
                    env={"PATH": os.environ.get("PATH", "")},
                )
            finally:
                copy.unlink(missing_ok=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise HostError("check the options of", program, error) from error
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("See 'dockerd --help'")] or lines
        if NOT_ROOT in done.stderr or not lines:
            return ""
        return _core(lines[-1], copy)

    def networks(self, data_root: str) -> tuple[str, ...]:
        """Read out of the bolt file without its format: a name too many does no harm here."""
        try:
            text = Path(data_root, "network/files/local-kv.db").read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise HostError("read the networks of", "the Docker Engine", error) from error
        # One network as the Engine keeps it (moby libnetwork/network.go, `MarshalJSON`).
        found = re.findall(rb'"name":"([^"]*)","networkType":"', text)
        return tuple(sorted({name.decode("utf-8", "replace") for name in found}))


def _core(words: str, options: Path) -> str:
    """The Engine's words without what leads up to them, and with the file's real name."""
    words = re.sub(r"^(unable to configure the Docker daemon with file \S+: )", "", words)
    return words.replace(str(options), "the file").strip()
