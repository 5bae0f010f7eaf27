"""The command line. Heavy imports wait until a verb needs them, so `status` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from nodeagent import __version__, paths
from nodeagent.errors import Exit, HostError, NodeagentError, NotRootError, SpecError, UsageError

if TYPE_CHECKING:
    from nodeagent import daemon, report, rotation

POLL_S = 0.1  # of the status file, by `status --wait` and `--watch`

EXIT_CODES = """\
exit codes:
   0  done, or ready
   1  a bug in nodeagent
   2  the command line is wrong
   3  blocked: a human must act
   6  not ready yet, or something outside failed; trying again may help
  77  needs root
  78  the spec or the secrets are wrong

nodeagent VERB --help shows an example of each verb."""

EXAMPLES = {
    "run": "systemctl start nodeagent",
    "apply": "sudo nodeagent apply --timeout 120",
    "plan": "sudo nodeagent plan",
    "status": "nodeagent status --wait --timeout 120",
    "reset": "sudo systemctl disable --now nodeagent; sudo nodeagent reset",
    "install": "sudo nodeagent install --spec node.yaml --secrets secrets.json",
    "secrets": "nodeagent secrets new secrets.json",
    "secrets new": "nodeagent secrets new secrets.json",
    "secrets rotate": "sudo nodeagent secrets rotate gossip",
    "secrets forget": "sudo nodeagent secrets forget worker1",
    "user-data": "umask 077; nodeagent user-data --role server \\\n"
    "  --secrets secrets.json cluster.yaml > server.yaml",
    "validate": "nodeagent validate node.yaml",
    "schema": "nodeagent schema > node.schema.json",
}

log = logging.getLogger("nodeagent")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit code."""
    arguments = _parser().parse_args(argv)
    # `apply` shows each change as progress; the log would say it twice.
    level = logging.WARNING if arguments.verb == "apply" else logging.INFO
    _log_to(
        sys.stdout if arguments.verb == "run" else sys.stderr,
        logging.DEBUG if arguments.verbose else level,
    )
    try:
        code = int(arguments.act(arguments))
        sys.stdout.flush()  # here, where a reader that has gone away is no error
        return code
    except NodeagentError as error:
        print(f"nodeagent: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except KeyboardInterrupt:
        return 130  # as shells report SIGINT


def _run(arguments: argparse.Namespace) -> int:
    _need_root("run")
    from nodeagent import daemon, spec

    loop = _loop(arguments)
    host = loop.host
    with host.files.try_lock(paths.ALIVE) as is_ours:
        if not is_ours:
            raise HostError("run beside", "another nodeagent", f"it holds {paths.ALIVE}")
        try:
            wanted = spec.load(arguments.spec, spec.Spec)
        except SpecError as error:
            host.systemd.notify(STATUS=f"blocked: {error.sentence}")
            raise
        daemon.watch(host, wanted, threading.Event())
        loop.run(until=lambda _: False)
    return Exit.OK


def _apply(arguments: argparse.Namespace) -> int:
    _need_root("apply")
    from nodeagent import report

    loop = _loop(arguments, report.Lines(sys.stdout))
    cycle = loop.run(
        until=lambda cycle: cycle.is_ready or cycle.is_blocked, deadline_s=arguments.timeout
    )
    made = loop.changes_made
    print(f"{cycle.sentence} ({made} change{'' if made == 1 else 's'} made)")
    return _exit_of(is_ready=cycle.is_ready, is_blocked=cycle.is_blocked)


def _plan(arguments: argparse.Namespace) -> int:
    _need_root("plan")
    from nodeagent import converge, report, spec
    from nodeagent.adapters.node import this_machine
    from nodeagent.steps import STEPS

    previews = converge.preview(spec.load(arguments.spec, spec.Spec), this_machine(), STEPS)
    if arguments.json:
        print(json.dumps(report.plan_json(previews), indent=2))
    else:
        sys.stdout.write(report.plan_text(previews, report.columns()))
    if any(preview.plan is not None and preview.plan.blocked for preview in previews):
        return Exit.BLOCKED
    return Exit.WAITING if any(preview.error for preview in previews) else Exit.OK


def _status(arguments: argparse.Namespace) -> int:
    from nodeagent import report
    from nodeagent.adapters.clock import SystemClock
    from nodeagent.adapters.files import LocalFiles

    clock, files = SystemClock(), LocalFiles()
    end = clock.monotonic() + (arguments.timeout or float("inf"))
    shown = ""
    while True:
        status = report.read_status(files)
        is_ready = status is not None and status["is_running"] and status["state"] == "ready"
        is_last = clock.monotonic() >= end or not (arguments.watch or arguments.wait)
        is_last = is_last or (arguments.wait and is_ready)
        if arguments.json:
            text = json.dumps(status, indent=None if arguments.watch else 2) + "\n"
        else:
            text = report.status_text(status, report.columns())
        if arguments.watch or is_last:
            if text != shown:
                clear = "\x1b[H\x1b[2J" if arguments.watch and sys.stdout.isatty() else ""
                print(clear + text, end="", flush=True)
                shown = text
        elif (sentence := report.sentence_of(status)) != shown:
            print(sentence, file=sys.stderr)
            shown = sentence
        if is_last:
            is_blocked = status is not None and status["state"] == "blocked"
            return _exit_of(is_ready=is_ready, is_blocked=is_blocked)
        clock.wait(POLL_S)


def _reset(arguments: argparse.Namespace) -> int:
    _need_root("reset")
    from nodeagent import converge, spec
    from nodeagent.adapters.node import this_machine
    from nodeagent.steps import STEPS

    host, wanted = this_machine(), spec.load(arguments.spec, spec.Spec)
    with host.files.try_lock(paths.ALIVE) as is_ours:
        if not is_ours:
            hint = "systemctl disable --now nodeagent"
            raise UsageError(f"the agent is running and would make it all again: {hint}")
        cycle = converge.take_back(wanted, host, STEPS, lambda _: None)
    for result in cycle.results:
        print(f"{result.name}: {result.sentence}")
    return _exit_of(is_ready=cycle.is_ready, is_blocked=cycle.is_blocked)


def _install(arguments: argparse.Namespace) -> int:
    _need_root("install")
    from nodeagent import install
    from nodeagent.adapters.node import this_machine

    install.install(
        this_machine(),
        arguments.spec_file,
        arguments.secrets_file,
        start=not arguments.no_start,
    )
    return Exit.OK


def _secrets_new(arguments: argparse.Namespace) -> int:
    from nodeagent import secrets
    from nodeagent.adapters.clock import SystemClock
    from nodeagent.adapters.files import LocalFiles
    from nodeagent.adapters.pki import LocalPki

    files, file = LocalFiles(), arguments.file
    if files.exists(file):
        raise UsageError(
            f"{file} is there already, and a lost cluster key is a lost cluster: name another file"
        )
    made = secrets.new(LocalPki(), SystemClock().now())
    files.write(file, secrets.dump(made).reveal(), 0o600)
    print(
        f"{file}: the keys of a new cluster. Keep it safe, there is no other copy; "
        f"nodeagent user-data --secrets {file} gives machines what they need of it"
    )
    return Exit.OK


def _secrets_rotate(arguments: argparse.Namespace) -> int:
    rotation = _rotation(arguments)
    if arguments.what == "swarm":
        rotation.rotate_swarm()
        return Exit.OK
    rotation.rotate(arguments.what)
    print(
        f"{paths.SECRETS} of every server holds the new keys: copy it to where user-data is made; "
        "user-data made before is of no use for new machines"
    )
    return Exit.OK


def _secrets_forget(arguments: argparse.Namespace) -> int:
    _rotation(arguments).forget(arguments.node)
    return Exit.OK


def _rotation(arguments: argparse.Namespace) -> rotation.Rotation:
    _need_root(arguments.verb)
    from nodeagent import rotation, spec
    from nodeagent.adapters.node import this_machine

    node = spec.load(paths.SPEC, spec.Spec)
    if not (node.is_server and node.is_secured):
        raise UsageError("only a server of a secured cluster can do that: run it on one")

    def say(line: str) -> None:
        print(line, flush=True)

    without = getattr(arguments, "without", ())
    return rotation.Rotation(node, this_machine(), say, without)


def _user_data(arguments: argparse.Namespace) -> int:
    from nodeagent import spec, userdata

    cluster = spec.load(arguments.cluster, spec.Cluster)
    text = None
    if arguments.secrets_file is not None:
        from nodeagent import secrets
        from nodeagent.adapters.clock import SystemClock
        from nodeagent.adapters.files import LocalFiles
        from nodeagent.adapters.pki import LocalPki

        pki, now = LocalPki(), SystemClock().now()
        found = secrets.load(arguments.secrets_file, "server", LocalFiles(), pki)
        assert isinstance(found, secrets.ServerSecrets)
        text = userdata.secrets_text(cluster, arguments.role, found, pki, now)
    sys.stdout.write(userdata.render(cluster, arguments.role, text))
    out = os.fstat(sys.stdout.fileno())
    if text is not None and stat.S_ISREG(out.st_mode) and out.st_mode & 0o077:
        log.warning(
            "what was written holds keys, and others can read that file (mode %o): chmod 600 it, "
            "and say umask 077 first the next time",
            stat.S_IMODE(out.st_mode),
        )
    return Exit.OK


def _validate(arguments: argparse.Namespace) -> int:
    from nodeagent import spec

    found = spec.load(arguments.file, spec.Cluster if arguments.cluster else spec.Spec)
    if arguments.json:
        print(json.dumps(spec.dump(found), indent=2))
    else:
        print(f"{arguments.file}: valid")
    return Exit.OK


def _schema(_arguments: argparse.Namespace) -> int:
    from nodeagent import spec

    print(json.dumps(spec.json_schema(), indent=2))
    return Exit.OK


def _loop(arguments: argparse.Namespace, listener: report.Listener | None = None) -> daemon.Loop:
    from nodeagent import daemon, report
    from nodeagent.adapters.node import this_machine
    from nodeagent.steps import STEPS

    host = this_machine()
    status = report.StatusFile(
        files=host.files if arguments.verb == "run" else None,
        clock=host.clock,
        pid=os.getpid(),
        node=host.network.hostname(),
        steps=[step.name for step in STEPS],
        listener=listener,
    )
    return daemon.Loop(host=host, steps=STEPS, status=status, spec_path=arguments.spec)


def _exit_of(*, is_ready: bool, is_blocked: bool) -> Exit:
    if is_ready:
        return Exit.OK
    return Exit.BLOCKED if is_blocked else Exit.WAITING


def _need_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise NotRootError(f"{verb} needs root: sudo nodeagent {verb}")


def _log_to(stream: TextIO, level: int) -> None:
    """Log with the priorities of sd-daemon(3) under systemd, and plainly elsewhere."""
    handler = logging.StreamHandler(stream)
    at = os.fstat(stream.fileno())
    if os.environ.get("JOURNAL_STREAM") == f"{at.st_dev}:{at.st_ino}":
        handler.setFormatter(_JournalFormatter())
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


class _JournalFormatter(logging.Formatter):
    PRIORITIES: ClassVar = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

    def format(self, record: logging.LogRecord) -> str:
        return f"<{self.PRIORITIES.get(record.levelname, 6)}>{super().format(record)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nodeagent",
        description="Makes this machine a working member of its Docker Swarm cluster.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"nodeagent {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, act: Callable[[argparse.Namespace], int] | None, about: str, among: Any = verbs
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = among.add_parser(
            name.split()[-1],
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example: {EXAMPLES[name]}",
        )
        added.set_defaults(act=act)
        return added

    flag: dict[str, Any] = {"action": "store_true"}
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    seconds: dict[str, Any] = {"type": _seconds, "metavar": "S"}

    run = verb("run", _run, "converge this node for ever; what the systemd unit starts")
    apply = verb("apply", _apply, "converge this node once, showing progress")
    plan = verb("plan", _plan, "show what apply would change here; change nothing")
    about = "give this machine its own files back, as far as nodeagent changed them"
    reset = verb("reset", _reset, about)
    for added in (run, apply, plan, reset):
        added.add_argument(
            "--spec", **file, default=paths.SPEC, help=f"the spec; default {paths.SPEC}"
        )
    until = "give up waiting for others after S seconds; default 300"
    apply.add_argument("--timeout", **seconds, default=300.0, help=until)
    plan.add_argument("--json", **flag, help="as JSON")

    status = verb("status", _status, "show how this node stands")
    status.add_argument("--wait", **flag, help="return when the node is ready")
    status.add_argument("--watch", **flag, help="show every change until interrupted")
    status.add_argument("--timeout", **seconds, help="give up after S seconds")
    status.add_argument("--json", **flag, help="as JSON; with --watch, one line for each change")

    install = verb("install", _install, "put the program, its units and a spec in place")
    install.add_argument("--spec", **file, dest="spec_file", help=f"becomes {paths.SPEC}")
    install.add_argument("--secrets", **file, dest="secrets_file", help=f"becomes {paths.SECRETS}")
    install.add_argument("--no-start", **flag, help="only enable the unit, as for an image")

    secrets = verb("secrets", None, "make the keys that a cluster's nodes share")
    of_secrets = secrets.add_subparsers(dest="of_secrets", required=True, metavar="VERB")
    new = verb("secrets new", _secrets_new, "write a new cluster's keys to a file", of_secrets)
    new.add_argument("file", **file, help="which must not be there yet, and gets mode 600")

    about = "change keys of the running cluster, on a server; asked for again, it goes on"
    rotate = verb("secrets rotate", _secrets_rotate, about, of_secrets)
    rotate.add_argument(
        "what",
        choices=("gossip", "tokens", "ca", "swarm"),
        help="Consul's gossip key, its access tokens, the CA, or the Swarm's join tokens",
    )
    rotate.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NODE",
        help="do not wait for this node, which is gone: it needs new keys if it comes back",
    )
    about = "on a server: take a node's token, so that a machine of its name is let in"
    forget = verb("secrets forget", _secrets_forget, about, of_secrets)
    forget.add_argument("node", metavar="NODE", help="its host name")

    user_data = verb("user-data", _user_data, "write cloud-init user-data for one role to stdout")
    user_data.add_argument(
        "--role", choices=("server", "worker"), required=True, help="what these machines are to be"
    )
    user_data.add_argument(
        "--secrets",
        **file,
        dest="secrets_file",
        help="what nodeagent secrets new wrote; servers get all of it, workers no cluster key",
    )
    user_data.add_argument(
        "cluster",
        type=Path,
        metavar="CLUSTER.yaml",
        help="a spec without role; its agent key says where machines get nodeagent",
    )

    validate = verb("validate", _validate, "check a spec; no node and no root needed")
    validate.add_argument(
        "file", **file, nargs="?", default=paths.SPEC, help=f"default {paths.SPEC}"
    )
    validate.add_argument("--cluster", **flag, help="a cluster file: it has no role")
    validate.add_argument("--json", **flag, help="print the spec as read")

    verb("schema", _schema, "write the JSON Schema of node.yaml to stdout")
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds above 0 is needed")
