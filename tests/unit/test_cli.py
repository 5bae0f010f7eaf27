"""The command line: help, exit codes, and what each verb prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent import __version__, cli, install, paths, secrets
from nodeagent.adapters import node
from nodeagent.adapters.files import LocalFiles
from nodeagent.adapters.pki import LocalPki
from nodeagent.cli import main
from nodeagent.converge import Cycle, StepResult
from nodeagent.errors import Exit, HostError
from nodeagent.host import Host
from nodeagent.report import StatusFile
from nodeagent.steps import STEPS
from tests.unit.expect import assert_golden
from tests.unit.fakes import FakeClock, Machine, World, make_spec
from tests.unit.test_report import READY, STORIES, assert_fits

SPEC = """\
cluster: demo
role: server
servers: 1
address: 10.10.0.0/16
join: []
security: off
"""
SECURED = SPEC.replace("role: server\n", "").replace("[]\nsecurity: off", "[10.10.0.11]")
VERBS = [
    *("run", "apply", "plan", "reset", "status", "install", "secrets", "secrets new"),
    *("secrets rotate", "secrets forget", "user-data", "validate", "schema"),
]
HEAVY = ("docker", "consul", "requests", "dns", "psutil", "cryptography")
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """`main` sets up logging for its process, which here is that of all tests."""
    log = logging.getLogger("nodeagent")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "node.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of the fakes' world, as the one the command runs on, by root."""
    found = World().machine(make_spec(servers=1, join="[]", security="off"), "10.10.0.11")

    def this_machine() -> Host:
        return found.host

    monkeypatch.setattr(node, "this_machine", this_machine)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return found


@pytest.fixture
def run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(paths, "STATUS", tmp_path / "status.json")
    monkeypatch.setattr(paths, "ALIVE", tmp_path / "alive")
    return tmp_path


def write_status(results: list[StepResult]) -> None:
    files = LocalFiles()
    names = [step.name for step in STEPS]
    status = StatusFile(files, FakeClock(), 1, "server11", names, {"security": "off"})
    for result in results:
        status.update(result)
    status.settle(Cycle(tuple(results)))


def alive() -> Any:
    return LocalFiles().try_lock(paths.ALIVE)


def shown(capfd: Out, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    return capfd.readouterr().out


def parsers() -> dict[str, argparse.ArgumentParser]:
    def below(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, Any]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, added in action.choices.items():
                    yield words + name, added
                    yield from below(added, f"{words}{name} ")

    return dict(below(cli._parser(), ""))


def test_the_verbs() -> None:
    assert list(parsers()) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_is_right(
    verb: str, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capfd, *verb.split(), "--help")
    assert_golden(f"help.{verb.replace(' ', '-')}.txt", text)
    assert max(map(len, text.splitlines())) <= 80
    shell = text.rpartition("example: ")[2].replace("\\\n", "")
    example = shell.rpartition(";")[2].partition(">")[0].split()
    if example[0] == "systemctl":
        return
    words = example[2:] if example[0] == "sudo" else example[1:]
    assert " ".join(words).startswith(verb)
    cli._parser().parse_args(words)


def test_help_lists_exit_codes_one_a_line(capfd: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capfd, "--help")
    assert_golden("help.txt", text)
    assert max(map(len, text.splitlines())) <= 80
    for code in Exit:
        assert any(line.split()[:1] == [str(int(code))] for line in text.splitlines()), code


def test_every_option_has_help() -> None:
    for verb, parser in parsers().items():
        for action in parser._actions:
            has_own = isinstance(action, argparse._SubParsersAction)  # each verb below it has
            assert action.help or has_own, f"{verb} {action.option_strings or action.dest}"


def test_version(capfd: Out) -> None:
    assert shown(capfd, "--version") == f"nodeagent {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param([], id="nothing"),
        pytest.param(["conquer"], id="unknown-verb"),
        pytest.param(["status", "--wiat"], id="unknown-option"),
        pytest.param(["user-data", "cluster.yaml"], id="no-role"),
        pytest.param(["user-data", "--role", "boss", "cluster.yaml"], id="unknown-role"),
        pytest.param(["secrets"], id="secrets-without-a-verb"),
        pytest.param(["secrets", "new"], id="secrets-for-nowhere"),
        pytest.param(["apply", "--timeout", "soon"], id="time-out-of-words"),
        pytest.param(["apply", "--timeout", "0"], id="time-out-of-nothing"),
        pytest.param(["apply", "--timeout", "nan"], id="time-out-of-no-number"),
        pytest.param(["status", "--timeout", "inf"], id="time-out-without-end"),
    ],
)
def test_wrong_usage_is_2(argv: list[str], capfd: Out) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == Exit.USAGE
    said = capfd.readouterr()
    assert said.out == ""
    assert "usage: nodeagent" in said.err
    assert "_seconds" not in said.err


def test_a_wrong_time_out_is_named(capfd: Out) -> None:
    with pytest.raises(SystemExit):
        main(["apply", "--timeout", "soon"])
    assert "argument --timeout: 'soon': a number of seconds above 0 is needed" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize("verb", ["run", "apply", "plan", "install"])
def test_without_root_is_77(
    verb: str, machine: Machine, spec: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    machine.clock.on_wait = interrupt  # or `run` without its check would go on for ever
    before = dict(machine.files.texts)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([verb, "--spec", str(spec)]) == Exit.NOT_ROOT
    assert capfd.readouterr().err == f"nodeagent: {verb} needs root: sudo nodeagent {verb}\n"
    assert machine.files.texts == before


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["apply", "--spec"], id="apply"),
        pytest.param(["plan", "--spec"], id="plan"),
        pytest.param(["run", "--spec"], id="run"),
        pytest.param(["validate"], id="validate"),
        pytest.param(["user-data", "--role", "server"], id="user-data"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_wrong_spec_is_78_and_names_its_line(argv: list[str], spec: Path, capfd: Out) -> None:
    spec.write_text(SPEC.replace("servers: 1", "servers: many"))
    assert main([*argv, str(spec)]) == Exit.BAD_SPEC
    said = capfd.readouterr()
    assert said.out == ""
    assert f"{spec}:3: servers: found 'many'" in said.err


def test_run_tells_systemd_that_the_spec_is_wrong(machine: Machine, spec: Path) -> None:
    spec.write_text("")
    assert main(["run", "--spec", str(spec)]) == Exit.BAD_SPEC
    [told] = [values["STATUS"] for values in machine.systemd.told if "STATUS" in values]
    assert told.startswith(f"blocked: {spec}")
    assert not any("READY" in values for values in machine.systemd.told)


def test_a_second_run_beside_the_first_is_refused(machine: Machine, spec: Path, capfd: Out) -> None:
    machine.files.held.add(paths.ALIVE)
    assert main(["run", "--spec", str(spec)]) == Exit.WAITING
    assert "could not run beside another nodeagent" in capfd.readouterr().err


def test_apply_until_ready_is_0(machine: Machine, spec: Path, capfd: Out) -> None:
    assert main(["apply", "--spec", str(spec)]) == Exit.OK
    said = capfd.readouterr().out
    assert "ok  consul    Consul 1.21.0 at 10.10.0.11" in said
    last = said.splitlines()[-1]
    assert last.startswith("ready: manager in Swarm ")
    assert last.endswith("changes made)")
    assert machine.engine.inits == 1


@pytest.mark.usefixtures("machine")
def test_apply_again_makes_no_change(spec: Path, capfd: Out) -> None:
    main(["apply", "--spec", str(spec)])
    capfd.readouterr()
    assert main(["apply", "--spec", str(spec)]) == Exit.OK
    assert capfd.readouterr().out.splitlines()[-1].endswith("(0 changes made)")


def test_apply_that_is_blocked_is_3(machine: Machine, spec: Path, capfd: Out) -> None:
    machine.files.texts[paths.DAEMON_JSON] = "{"
    assert main(["apply", "--spec", str(spec)]) == Exit.BLOCKED
    assert "blocked at engine: /etc/docker/daemon.json cannot be read" in capfd.readouterr().out


@pytest.mark.usefixtures("machine")
def test_apply_that_waits_too_long_is_6(spec: Path, capfd: Out) -> None:
    spec.write_text(
        SPEC.replace("servers: 1", "servers: 3").replace("[]", "[10.10.0.12, 10.10.0.13]")
    )
    assert main(["apply", "--spec", str(spec), "--timeout", "30"]) == Exit.WAITING
    assert "waiting at quorum" in capfd.readouterr().out.splitlines()[-1]


def test_plan_is_0_and_changes_nothing(machine: Machine, spec: Path, capfd: Out) -> None:
    before = dict(machine.files.texts)
    assert main(["plan", "--spec", str(spec)]) == Exit.OK
    assert "write /var/lib/nodeagent/identity.json" in capfd.readouterr().out
    assert machine.files.texts == before


@pytest.mark.usefixtures("machine")
def test_plan_as_json(spec: Path, capfd: Out) -> None:
    assert main(["plan", "--json", "--spec", str(spec)]) == Exit.OK
    found = json.loads(capfd.readouterr().out)
    assert_fits(found, "plan.schema.json")
    assert list(found["steps"]) == [step.name for step in STEPS]


def test_plan_that_is_blocked_is_3(machine: Machine, spec: Path) -> None:
    main(["apply", "--spec", str(spec)])
    machine.files.texts[paths.DAEMON_JSON] = "{"
    assert main(["plan", "--spec", str(spec)]) == Exit.BLOCKED


def test_plan_that_could_not_look_is_6(
    machine: Machine, spec: Path, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise HostError("read", path, "Input/output error")

    monkeypatch.setattr(machine.files, "read", refuse)
    assert main(["plan", "--spec", str(spec)]) == Exit.WAITING
    assert "Input/output error" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("story", "code"),
    [("ready", Exit.OK), ("waiting", Exit.WAITING), ("failing", Exit.WAITING),
     ("blocked", Exit.BLOCKED)],
)  # fmt: skip
@pytest.mark.usefixtures("run_directory")
def test_status_of_a_running_agent(story: str, code: Exit, capfd: Out) -> None:
    write_status(STORIES[story])
    with alive():
        assert main(["status"]) == code
        assert capfd.readouterr().out.startswith(f"server11: {story}")
        assert main(["status", "--json"]) == code
    assert_fits(json.loads(capfd.readouterr().out), "status.schema.json")


@pytest.mark.usefixtures("run_directory")
def test_status_of_an_agent_that_has_ended_is_never_0(capfd: Out) -> None:
    write_status(READY)
    with alive():
        assert main(["status"]) == Exit.OK
    assert main(["status"]) == Exit.WAITING
    assert "nodeagent is not running" in capfd.readouterr().out


@pytest.mark.usefixtures("run_directory")
def test_status_before_the_first_run(capfd: Out) -> None:
    assert main(["status"]) == Exit.WAITING
    assert capfd.readouterr().out.startswith("nodeagent has not run since this machine booted")
    assert main(["status", "--json"]) == Exit.WAITING
    assert json.loads(capfd.readouterr().out) is None


@pytest.mark.usefixtures("run_directory")
def test_status_wait_gives_up_and_says_what_it_waited_for(capfd: Out) -> None:
    write_status(STORIES["waiting"])
    with alive():
        assert main(["status", "--wait", "--timeout", "0.15"]) == Exit.WAITING
    said = capfd.readouterr()
    assert said.err.startswith("waiting at quorum: Consul's quorum: 1 of 3 servers are alive")
    assert said.err.count("\n") == 1, "one line for each news, not for each look"
    assert said.out.startswith("server11: waiting at quorum")


@pytest.mark.usefixtures("run_directory")
def test_status_wait_returns_when_ready(capfd: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    from nodeagent.adapters.clock import SystemClock

    write_status(STORIES["waiting"])

    def wait(_self: SystemClock, _timeout_s: float) -> bool:
        write_status(READY)
        return False

    monkeypatch.setattr(SystemClock, "wait", wait)
    with alive():
        assert main(["status", "--wait"]) == Exit.OK
    assert capfd.readouterr().out.startswith("server11: ready")


@pytest.mark.usefixtures("run_directory")
def test_status_watch_as_json_is_a_line_for_each_change(
    capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nodeagent.adapters.clock import SystemClock

    looks = iter([STORIES["waiting"], READY])

    def wait(_self: SystemClock, _timeout_s: float) -> bool:
        results = next(looks, None)
        if results is None:
            raise KeyboardInterrupt
        write_status(results)
        return False

    monkeypatch.setattr(SystemClock, "wait", wait)
    with alive():
        assert main(["status", "--watch", "--json"]) == 130
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line and line["state"] for line in lines] == [None, "waiting", "ready"]


def test_validate(spec: Path, capfd: Out) -> None:
    assert main(["validate", str(spec)]) == Exit.OK
    assert capfd.readouterr().out == f"{spec}: valid\n"
    assert main(["validate", "--json", str(spec)]) == Exit.OK
    assert json.loads(capfd.readouterr().out)["cluster"] == "demo"


def test_schema_is_json(capfd: Out) -> None:
    assert main(["schema"]) == Exit.OK
    assert json.loads(capfd.readouterr().out)["title"] == "nodeagent node.yaml"


@pytest.mark.parametrize("role", ["server", "worker"])
def test_user_data(role: str, spec: Path, capfd: Out) -> None:
    spec.write_text(SPEC.replace("role: server\n", "").replace("[]", "[10.10.0.11]"))
    assert main(["user-data", "--role", role, str(spec)]) == Exit.OK
    assert f"role: {role}" in capfd.readouterr().out


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.json"
    LocalFiles().write(path, secrets.dump(secrets.new(LocalPki(), time.time())).reveal(), 0o600)
    return path


def test_new_secrets_are_for_their_owner_alone(tmp_path: Path, capfd: Out) -> None:
    path = tmp_path / "secrets.json"
    assert main(["secrets", "new", str(path)]) == Exit.OK
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.count("\n") == 1
    assert said.out.startswith(f"{path}: the keys of a new cluster. Keep it safe")
    assert f"nodeagent user-data --secrets {path} " in said.out
    assert path.stat().st_mode & 0o777 == 0o600
    secrets.parse(path.read_text(), "secrets.json", "server", LocalPki())
    assert json.loads(path.read_text())["cluster_key"] not in said.out


@pytest.mark.parametrize("there", ["keys", "a-directory"])
def test_secrets_are_never_written_over(there: str, keys: Path, capfd: Out) -> None:
    path = keys if there == "keys" else keys.parent
    before = keys.read_text()
    assert main(["secrets", "new", str(path)]) == Exit.USAGE
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"nodeagent: {path} is there already, and a lost cluster key is a ")
    assert keys.read_text() == before


def test_two_clusters_have_different_keys(keys: Path) -> None:
    assert main(["secrets", "new", str(keys.with_name("other.json"))]) == Exit.OK
    assert keys.read_text() != keys.with_name("other.json").read_text()


@pytest.mark.parametrize("role", ["server", "worker"])
def test_user_data_of_a_secured_cluster(role: str, spec: Path, keys: Path, capfd: Out) -> None:
    spec.write_text(SECURED)
    assert main(["user-data", "--role", role, "--secrets", str(keys), str(spec)]) == Exit.OK
    said = capfd.readouterr()
    assert (json.loads(keys.read_text())["cluster_key"] in said.out) == (role == "server")
    assert "gossip_key" in said.out or role == "server"


@pytest.mark.parametrize(
    ("cluster", "argv", "code", "says"),
    [
        pytest.param(SECURED, [], Exit.USAGE, "add --secrets secrets.json", id="no-secrets"),
        pytest.param(
            f"{SECURED}security: off\n",
            ["--secrets", "{keys}"],
            Exit.USAGE,
            "--secrets has no use",
            id="security-off",
        ),
        pytest.param(
            SECURED,
            ["--secrets", "{keys}.none"],
            Exit.BAD_SPEC,
            "{keys}.none: there is no such file (nodeagent secrets new makes",
            id="no-such-file",
        ),
        pytest.param(
            SECURED, ["--secrets", "{top}"], Exit.BAD_SPEC, "it must be a file", id="a-directory"
        ),
        pytest.param(
            SECURED,
            ["--secrets", "{keys}/none"],
            Exit.BAD_SPEC,
            "{keys}/none: there is no such file",
            id="below-a-file",
        ),
        pytest.param(
            SECURED,
            ["--secrets", "{spec}"],
            Exit.BAD_SPEC,
            "{spec}: others can read or change it; it must be a file of yours or root's with mode "
            "600 (chmod 600 {spec})",
            id="open-to-others",
        ),
        pytest.param(
            SECURED, ["--secrets", "{bad}"], Exit.BAD_SPEC, "{bad}:1: is not JSON", id="not-json"
        ),
    ],
)
def test_user_data_that_cannot_be_made_says_how(
    cluster: str, argv: list[str], code: Exit, says: str, spec: Path, keys: Path, capfd: Out
) -> None:
    bad = keys.with_name("bad.json")
    bad.write_text("…")
    bad.chmod(0o600)
    spec.write_text(cluster)
    spec.chmod(0o644)
    places = {"keys": keys, "spec": spec, "bad": bad, "top": keys.parent}
    words = [word.format(**places) for word in argv]
    assert main(["user-data", "--role", "server", *words, str(spec)]) == code
    said = capfd.readouterr()
    assert said.out == ""
    assert says.format(**places) in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "cluster", "warns"),
    [
        pytest.param(0o600, SECURED, False, id="for-its-owner"),
        pytest.param(0o640, SECURED, True, id="for-its-group-too"),
        pytest.param(0o644, SECURED, True, id="for-everybody"),
        pytest.param(0o644, f"{SECURED}security: off\n", False, id="without-keys-in-it"),
    ],
)
def test_keys_in_a_file_that_others_can_read_are_no_secret(
    mode: int, cluster: str, warns: bool, spec: Path, keys: Path
) -> None:
    spec.write_text(cluster)
    out = keys.with_name("server.yaml")
    out.touch()
    out.chmod(mode)
    given = [] if "security" in cluster else ["--secrets", str(keys)]
    with out.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "nodeagent", "user-data", "--role", "server", *given, str(spec)],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == Exit.OK
    assert out.read_text().startswith("#cloud-config")
    wanted = f"what was written holds keys, and others can read that file (mode {mode:o}): chmod "
    assert done.stderr.startswith(wanted) == warns
    assert done.stderr.count("\n") == warns


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], (None, None, True)),
        (["--spec", "a", "--no-start"], (Path("a"), None, False)),
        (["--secrets", "b"], (None, Path("b"), True)),
        (["--spec", "a", "--secrets", "b"], (Path("a"), Path("b"), True)),
    ],
    ids=["nothing", "a-spec", "secrets", "both"],
)
def test_install_is_given_what_is_said(
    argv: list[str], given: object, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(host: Host, spec: Path | None, secrets: Path | None, *, start: bool) -> None:
        assert host is machine.host
        seen.append((spec, secrets, start))

    seen: list[object] = []
    monkeypatch.setattr(install, "install", record)
    assert main(["install", *argv]) == Exit.OK
    assert seen == [given]


def command(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, **options
    )


def test_status_imports_nothing_heavy() -> None:
    """It has to answer at once, on machines that have little."""
    script = (
        "import sys; from nodeagent.cli import main; main(['status']); main(['status', '--json'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    assert command("-c", script).stderr.splitlines()[-1] == "[]"


def test_the_test_of_imports_can_see_them() -> None:
    script = (
        "import sys; import nodeagent.adapters.node\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    assert "'docker', 'consul', 'requests'" in command("-c", script).stderr.splitlines()[-1]


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = (
        "import os, sys; from nodeagent.cli import main\n"
        "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(writer); os.close(reader)\n"
        "code = main(['schema']); sys.exit(code)"
    )
    found = command("-c", script)
    assert (found.returncode, found.stderr) == (0, "")


def test_python_dash_m(spec: Path) -> None:
    found = command("-m", "nodeagent", "validate", str(spec))
    assert (found.returncode, found.stdout) == (0, f"{spec}: valid\n")


def test_a_bug_shows_its_traceback_and_is_1() -> None:
    script = (
        "from nodeagent import cli, spec\n"
        "spec.json_schema = lambda: 1 / 0\n"
        "raise SystemExit(cli.main(['schema']))"
    )
    found = command("-c", script)
    assert found.returncode == Exit.BUG
    assert "ZeroDivisionError" in found.stderr


@pytest.mark.parametrize(("level", "priority"), [("info", "<6>"), ("warning", "<4>")])
def test_the_journal_is_told_priorities(
    level: str, priority: str, capfd: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = os.fstat(sys.stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{at.st_dev}:{at.st_ino}")
    tell = {"info": logging.Logger.info, "warning": logging.Logger.warning}[level]

    def act() -> dict[str, Any]:
        tell(logging.getLogger("nodeagent.test"), "hello")
        return {}

    call_within_schema(monkeypatch, act)
    assert main(["schema"]) == Exit.OK
    assert capfd.readouterr().err == f"{priority}hello\n"


def call_within_schema(monkeypatch: pytest.MonkeyPatch, act: Callable[[], dict[str, Any]]) -> None:
    from nodeagent import spec

    monkeypatch.setattr(spec, "json_schema", act)
