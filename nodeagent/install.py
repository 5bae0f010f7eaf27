"""The program, its units and the spec are in place, and systemd starts the agent at every boot."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import nodeagent
from nodeagent import paths, secrets, spec
from nodeagent.changes import Change, EnableUnit, RemoveFile, WriteFile, WriteSecret
from nodeagent.errors import Secret, SpecError, UsageError
from nodeagent.host import Host
from nodeagent.secrets import Secrets, ServerSecrets
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
    secrets_source: Path | None = None,
    *,
    start: bool = True,
    program: Program | None = None,
) -> tuple[Change, ...]:
    """Make the changes that are left to make, and return them.

    Raises SpecError, with nothing changed, when the spec or the secrets are wrong, and UsageError
    when nothing says whose secrets they are. Without a service manager (an image being made in a
    chroot) nothing is started; without a spec neither.
    """
    node = wanted = wanted_secrets = None
    if spec_source is not None:
        node = spec.load(spec_source, Spec)
        wanted = host.files.read(spec_source)
    if secrets_source is not None:
        wanted_secrets = _given(host, secrets_source, node or _installed_spec(host))
    program = program or running_program()
    if program.is_self_contained:
        # The agent cannot write to /opt, and would compile all it imports at every start.
        host.files.compile(program.source)
    changes = plan(host, wanted, wanted_secrets, start=start, program=program)
    for change in changes:
        log.info("%s", change)
        change.apply(host)
    return changes


def _installed_spec(host: Host) -> Spec:
    text = host.files.read(paths.SPEC)
    if text is None:
        raise UsageError(
            f"--secrets needs --spec beside it: there is no {paths.SPEC} yet to say whether this "
            "machine is a server or a worker"
        )
    return spec.parse(text, str(paths.SPEC), Spec)


def _given(host: Host, source: Path, node: Spec) -> Secret | None:
    """Return what secrets.json is to hold; None when what is installed is newer."""
    if not node.is_secured:
        raise UsageError("the spec says `security: off`, so --secrets has no use: drop one")
    given = secrets.load(source, node.role, host.files, host.pki)
    old = host.files.read(paths.SECRETS)
    with contextlib.suppress(SpecError):  # what is of no use is replaced
        installed = secrets.parse(old or "", str(paths.SECRETS), node.role, host.pki)
        if _is_newer(installed, given):
            log.warning(
                "keep %s: its keys have been rotated since %s was made (serial %d, there %d)",
                *(paths.SECRETS, source, installed.serial, given.serial),
            )
            return None
    return secrets.dump(given)


def _is_newer(installed: Secrets, given: Secrets) -> bool:
    """Whether a rotation has come in between; another cluster's serials tell nothing."""
    if isinstance(installed, ServerSecrets) and isinstance(given, ServerSecrets):
        return installed.cluster_key == given.cluster_key and installed.serial > given.serial
    return installed.serial > given.serial


def plan(
    host: Host,
    wanted_spec: str | None,
    wanted_secrets: Secret | None,
    *,
    start: bool,
    program: Program,
) -> tuple[Change, ...]:
    """Return what is left to be done. The texts are those of a valid spec and its secrets."""
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
    if wanted_spec is not None and not host.files.exists(paths.SPEC.parent):
        changes.append(MakePrivateDirectory(paths.SPEC.parent))
    # The spec last: only with it the agent has something to do.
    for path, wanted in (
        (paths.SECRETS, wanted_secrets),
        (paths.SPEC, Secret(wanted_spec) if wanted_spec is not None else None),
    ):
        changes += _replace(path, host.files.read(path), wanted)
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


def _replace(path: Path, old: str | None, wanted: Secret | None) -> list[Change]:
    """The file holds what is wanted, and what it held before is kept."""
    if wanted is None or wanted.reveal() == old:
        return []
    if old is None:
        return [WriteSecret(path, wanted)]
    digest = hashlib.sha256(old.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    kept = paths.ORIGINALS / f"{path.name}.{digest}"
    return [WriteSecret(kept, Secret(old)), WriteSecret(path, wanted)]


@dataclass(frozen=True)
class CopyProgram:
    source: Path
    target: Path

    def __str__(self) -> str:
        return f"copy the program to {self.target}"

    def apply(self, host: Host) -> None:
        host.files.copy_tree(self.source, self.target)


@dataclass(frozen=True)
class LinkCommand:
    path: Path
    target: Path

    def __str__(self) -> str:
        return f"link {self.path} to {self.target}"

    def apply(self, host: Host) -> None:
        host.files.link(self.path, self.target)


@dataclass(frozen=True)
class MakePrivateDirectory:
    path: Path

    def __str__(self) -> str:
        return f"make {self.path}, for root alone"

    def apply(self, host: Host) -> None:
        host.files.make_private_directory(self.path)


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
