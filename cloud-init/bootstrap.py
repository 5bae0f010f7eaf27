"""The nodeagent that user-data asks for is on this machine, and `nodeagent install` has run.

cloud-init runs this as `python3 bootstrap.py CONFIG.json`, with Python 3.9 or newer and nothing
but its standard library. What it prints goes to /var/log/cloud-init-output.log: a sentence per
step, and on failure one with the fix. Running it again is harmless.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess  # noqa: TID251 - it runs alone, before there is a nodeagent with adapters
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

PROGRAM = Path("/opt/nodeagent")
ATTEMPT_TIMEOUT_S = 20
LONGEST_PAUSE_S = 30
WORTH_A_RETRY = (408, 425, 429)  # of the 4xx answers; the others stay what they are


class BootstrapError(Exception):
    """It cannot go on; the message says why, and what to do."""


def say(sentence: str) -> None:
    print(f"nodeagent: {sentence}", flush=True)


def main(argv: list[str]) -> None:
    """Get the program as CONFIG.json says and exit as `nodeagent install` does, or 1 before it."""
    try:
        config = json.loads(Path(argv[1]).read_text("utf-8"))
        program = Path(config.get("program", PROGRAM))
        command = get_program(config, program)
        say("installing")
        sys.exit(install(command, config, program))
    except BootstrapError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error} (mend that, then run this again: python3 {' '.join(argv)})"
    print(f"nodeagent: could not be installed: {problem}", file=sys.stderr, flush=True)
    sys.exit(1)


def install(command: list[str], config: dict[str, str], program: Path) -> int:
    """Run `nodeagent install`; return its exit status. Secrets do not stay where they came in."""
    words = [*command, "install", "--spec", config["spec"]]
    secrets = Path(config["secrets"]) if "secrets" in config else None
    if secrets and secrets.exists():  # else they are installed already
        words += ["--secrets", str(secrets)]
    code = subprocess.run(words, env={**os.environ, "SHIV_ROOT": str(program / "lib")}).returncode
    if secrets and not code:
        secrets.unlink(missing_ok=True)
    return code


def get_program(config: dict[str, str], program: Path) -> list[str]:
    """Return the command that runs nodeagent, after having put it there if it was not."""
    if "url" not in config and "package" not in config:
        launcher = program / "nodeagent"
        if not os.access(launcher, os.X_OK):
            raise BootstrapError(
                f"this image has no {launcher} baked in, and the cluster file names no other "
                "source (set agent.url and agent.sha256, or agent.package, and make new user-data)"
            )
        say(f"found {launcher} in the image")
        return [str(launcher)]
    if sys.version_info < (3, 10):  # noqa: UP036 - this script itself runs on 3.9
        raise BootstrapError(
            f"python3 is {sys.version.split()[0]} here and nodeagent needs 3.10 or newer "
            "(use Debian 12, Ubuntu 22.04 or newer)"
        )
    if "url" in config:
        return [sys.executable, str(get_file(config, program))]
    return [str(get_package(config, program))]


def get_file(config: dict[str, str], program: Path) -> Path:
    """Return the release's file, downloaded and of the right digest."""
    url, sha256 = config["url"], config["sha256"]
    path = program / "release" / f"nodeagent-{sha256[:12]}.pyz"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        say(f"{path} is here already")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if url.startswith("/"):
        url = Path(url).as_uri()
    seconds = float(config.get("download_seconds", 600))
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        say(f"fetching {url}")
        try:
            found = download(url, path.with_suffix(".part"), deadline)
            break
        except urllib.error.HTTPError as error:
            cause = f"the server answers {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in WORTH_A_RETRY:
                raise BootstrapError(
                    f"{url}: {cause} (correct agent.url in the cluster file)"
                ) from error
        except (OSError, EOFError, ValueError) as error:
            cause = str(getattr(error, "reason", error)) or type(error).__name__
        if time.monotonic() + pause > deadline:
            raise BootstrapError(
                f"{url}: {cause}, for {seconds:.0f} seconds "
                "(see that this machine reaches that address, then reboot or run this again)"
            )
        say(f"{cause}; trying again in {pause:.0f} s")
        time.sleep(pause)  # noqa: TID251 - as above
        pause = min(pause * 2, LONGEST_PAUSE_S)
    if found != sha256:
        path.with_suffix(".part").unlink()
        raise BootstrapError(
            f"{url} has the sha256 {found}, not {sha256} as the cluster file says; nothing of it "
            "was run (correct agent.url or agent.sha256 and make new user-data)"
        )
    path.with_suffix(".part").replace(path)
    return path


def download(url: str, path: Path, deadline: float) -> str:
    """Save `url` at `path`; return the SHA-256 of what came. EOFError when it broke off."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=ATTEMPT_TIMEOUT_S) as answer, path.open("wb") as file:
        while chunk := answer.read(1 << 16):
            if time.monotonic() > deadline:
                raise EOFError("the transfer is too slow")
            digest.update(chunk)
            size += file.write(chunk)
        expected = answer.headers.get("Content-Length")
        file.flush()
        os.fsync(file.fileno())
    if expected and size != int(expected):
        raise EOFError(f"the transfer broke off after {size} of {expected} bytes")
    return digest.hexdigest()


def get_package(config: dict[str, str], program: Path) -> Path:
    """Return the command of a virtual environment that the wanted package is installed in."""
    package, venv = config["package"], program / "venv"
    if not importlib.util.find_spec("ensurepip"):
        if not shutil.which("apt-get"):
            raise BootstrapError("python3 has no ensurepip (install your distribution's package)")
        say("installing python3-venv")
        apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
        run("apt-get update", [*apt, "update"])
        run("install python3-venv", [*apt, "install", "--no-install-recommends", "python3-venv"])
    say(f"installing {package} into {venv}")
    run("make a virtual environment", [sys.executable, "-m", "venv", str(venv)])
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    pip += ["install", "--quiet", "--retries", "8", "--timeout", str(ATTEMPT_TIMEOUT_S)]
    if index := config.get("index"):
        pip += ["--index-url", Path(index).as_uri() if index.startswith("/") else index]
        if index.startswith("http://"):  # pip refuses plain HTTP unless the host is named
            pip += ["--trusted-host", urllib.parse.urlsplit(index).netloc.rpartition("@")[2]]
    run(f"install {package}", [*pip, package], "correct agent.package or agent.index")
    return venv / "bin" / "nodeagent"


def run(what: str, argv: list[str], fix: str = "its own words stand above") -> None:
    """Run a command; BootstrapError when it fails."""
    code = subprocess.run(
        argv, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL
    ).returncode
    if code:
        raise BootstrapError(f"could not {what}: exit status {code} ({fix})")


if __name__ == "__main__":
    main(sys.argv)
