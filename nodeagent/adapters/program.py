"""Programs of this machine, run to their end."""

from __future__ import annotations

import subprocess

from nodeagent.errors import HostError

TIMEOUT_S = 10


def run(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run a program to its end; raises HostError with what it said."""
    operation, target = f"run {' '.join(command[:2])} for", command[-1]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(operation, target, f"no answer in {timeout_s:.0f} s") from error
    except OSError as error:
        raise HostError(operation, target, error) from error
    if result.returncode != 0:
        said = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        raise HostError(operation, target, said.splitlines()[0])
    return result.stdout
