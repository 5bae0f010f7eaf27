"""The program, its units and the spec are in place, and systemd starts the agent at every boot."""

from __future__ import annotations

import compileall
import hashlib
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import nodeagent
from nodeagent import paths, spec
from nodeagent.changes import Change, EnableUnit, RemoveFile, WriteFile
from nodeagent.host import Host
from nodeagent.spec import Spec

log = logging.getLogger(__name__)

# Here from the first change to the last: a run that was killed in between is made up for by the
# next one. A reboot takes it away, and loads the new units and the new program anyway.
PENDING = paths.RUN / "install-pending"
ENABLED = paths.UNITS / "multi-user.target.wants" / paths.AGENT_UNIT


@dataclass(frozen=True)
class Program:
    """Where the running nodeagent comes from, and the directory it is to run from."""

    python: str
    source: Path
    target: Path
    is_self_contained: bool  # brings all it imports, so it needs no site-packages but its own

    @property
    def launcher(self) -> str:
        # -I: neither the environment nor the current directory says what is imported.
        # -S: nor, where everything needed comes along, this machine's site-packages.
        flags = "-IS" if self.is_self_contained else "-I"
        return (
            f"#!{self.python} {flags}\n"
            "import sys\n\n"
            f"sys.path.insert(0, {str(self.target)!r})\n"
            "from nodeagent.cli import main\n\n"
            "sys.exit(main())\n"
        )


def running_program() -> Program:
    """Return what is running now: a release's file (unpacked by shiv), a venv, or a checkout."""
    source = Path(nodeagent.__file__).resolve().parent.parent
    library = paths.PROGRAM / "lib"
    # `_bootstrap` is shiv's own module, in every run of its file.
    if "_bootstrap" not in sys.modules and not source.is_relative_to(library):
        return Program(sys.executable, source, source, False)
    in_venv = sys.prefix != sys.base_prefix
    python = os.path.realpath(sys.executable) if in_venv else sys.executable
    target = source
    if not source.is_relative_to(library):
        build = source.parent.name.rpartition("_")[2][:8]  # shiv: NAME_BUILD/site-packages
        target = library / f"{nodeagent.__version__}-{build}" / "site-packages"
    return Program(python, source, target, True)


def install(
    host: Host,
    spec_source: Path | None,
    *,
    start: bool = True,
    program: Program | None = None,
) -> tuple[Change, ...]:
    """Make the changes that are left to make, and return them.

    Raises SpecError, with nothing changed, when the spec is wrong. Without a service manager (an
    image being made in a chroot) nothing is started; without a spec neither.
    """
    wanted = None
    if spec_source is not None:
        spec.load(spec_source, Spec)
        wanted = host.files.read(spec_source)
    program = program or running_program()
    if program.is_self_contained:
        # The agent cannot write to /opt, and would compile all it imports at every start.
        compileall.compile_dir(program.source, quiet=2)
    changes = plan(host, wanted, start=start, program=program)
    for change in changes:
        log.info("%s", change)
        change.apply(host)
    return changes


def plan(
    host: Host, wanted_spec: str | None, *, start: bool, program: Program
) -> tuple[Change, ...]:
    """Return what is left to be done. `wanted_spec` is the text of a valid spec, or None."""
    changes: list[Change] = []
    if not host.files.exists(program.target):
        changes.append(CopyProgram(program.source, program.target))
    old_launcher = host.files.read(paths.LAUNCHER)
    if old_launcher != program.launcher:
        changes.append(WriteFile(paths.LAUNCHER, program.launcher, 0o755))
    # Through a link that is right, the old launcher is read, or by now the new one.
    if host.files.read(paths.COMMAND) not in (old_launcher or program.launcher, program.launcher):
        changes.append(LinkCommand(paths.COMMAND, paths.LAUNCHER))
    for unit in sorted(
        (resources.files("nodeagent") / "data/systemd").iterdir(), key=lambda file: file.name
    ):
        path, text = paths.UNITS / unit.name, unit.read_text("utf-8")
        if host.files.read(path) != text:
            changes.append(WriteFile(path, text, 0o644))
    old_spec = host.files.read(paths.SPEC)
    if wanted_spec is not None and wanted_spec != old_spec:
        if old_spec is not None:
            digest = hashlib.sha256(old_spec.encode()).hexdigest()[:8]
            changes.append(WriteFile(paths.ORIGINALS / f"node.yaml.{digest}", old_spec, 0o600))
        elif not host.files.exists(paths.SPEC.parent):
            changes.append(MakePrivateDirectory(paths.SPEC.parent))
        changes.append(WriteFile(paths.SPEC, wanted_spec, 0o600))
    is_new = bool(changes) or host.files.exists(PENDING)
    if not host.files.exists(ENABLED):
        changes.append(EnableUnit(paths.AGENT_UNIT))
    if not host.systemd.is_running():
        return tuple(changes)
    if is_new:
        changes = [WriteFile(PENDING, "", 0o600), *changes, ReloadUnits()]
    has_spec = wanted_spec is not None or old_spec is not None
    if start and has_spec and (is_new or not host.systemd.unit(paths.AGENT_UNIT).is_active):
        changes.append(StartAgent())
    return (*changes, RemoveFile(PENDING)) if is_new else tuple(changes)


@dataclass(frozen=True)
class CopyProgram:
    source: Path
    target: Path

    def __str__(self) -> str:
        return f"copy the program to {self.target}"

    def apply(self, host: Host) -> None:  # noqa: ARG002 - it copies what runs right now
        whole = self.target.parent
        part = whole.with_name(f".{whole.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.source, part / self.target.name)
        part.replace(whole)


@dataclass(frozen=True)
class LinkCommand:
    path: Path
    target: Path

    def __str__(self) -> str:
        return f"link {self.path} to {self.target}"

    def apply(self, host: Host) -> None:  # noqa: ARG002 - Files knows no links
        new = self.path.with_name(f".{self.path.name}.nodeagent-new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        new.symlink_to(self.target)
        new.replace(self.path)


@dataclass(frozen=True)
class MakePrivateDirectory:
    path: Path

    def __str__(self) -> str:
        return f"make {self.path}, for root alone"

    def apply(self, host: Host) -> None:  # noqa: ARG002 - Files makes directories on the way only
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)


@dataclass(frozen=True)
class ReloadUnits:
    def __str__(self) -> str:
        return "have systemd read its units again"

    def apply(self, host: Host) -> None:
        host.systemd.reload()


@dataclass(frozen=True)
class StartAgent:
    def __str__(self) -> str:
        return f"start {paths.AGENT_UNIT}, anew if it runs"

    def apply(self, host: Host) -> None:
        host.systemd.start_soon(paths.AGENT_UNIT)
