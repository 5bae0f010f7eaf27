"""The Engine's options: the owner's are kept, ours are set, one restart, whenever it is killed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeagent import paths
from nodeagent.changes import KEEP_MODE, Change, WriteFile
from nodeagent.converge import Apply, Cycle, make, run_cycle
from nodeagent.errors import HostError
from nodeagent.host import EngineInfo, Host, LogSettings, SwarmInfo, Unit, Word
from nodeagent.plan import Plan
from nodeagent.spec import Spec
from nodeagent.steps import STEPS, dns, engine
from nodeagent.steps.engine import Seen
from tests.unit.expect import said
from tests.unit.fakes import NOW, Machine, World, make_spec

OPTS = {"max-size": "10m", "max-file": "10", "compress": "true"}
STOCK = {"log-driver": "json-file", "log-opts": OPTS}
OURS = json.dumps(
    {
        "options": {
            "log-driver": "json-file",
            "log-opts max-size": "10m",
            "log-opts max-file": "10",
            "log-opts compress": "true",
        },
        "before": {},
        "since": 1.0,
    }
)
RUNNING = Unit("loaded", "active", "run-0", "enabled")
INFO = EngineInfo("26.1.5", {"log-driver": "json-file", "live-restore": False}, SwarmInfo())
RIGHT = Seen(RUNNING, INFO, "26.1.5", json.dumps(STOCK), OURS, None, now_s=100.0, wall_s=NOW)
FRESH = replace(RIGHT, daemon_json=None, record=None)
DONE = ["done Docker Engine 26.1.5, logs json-file"]
DEFAULT = make_spec()
TWENTY = make_spec(engine="{log: {max_size: 20m}}")
LOCAL = make_spec(engine="{log: {driver: local}}")


def test_log_options_of_a_spec_that_says_nothing() -> None:
    assert file_after(FRESH, DEFAULT) == STOCK


def shown_to_the_engine(seen: Seen, spec: Spec) -> Seen:
    """The same, once the new file was put where the Engine's program can look at it."""
    for change in engine.diff(spec, seen).changes:
        if isinstance(change, WriteFile) and change.path == paths.OPTIONS_CANDIDATE:
            return replace(seen, candidate=change.text)
    return seen


def file_after(seen: Seen, spec: Spec) -> Any:
    """What daemon.json holds once the step's changes are made; itself if there are none."""
    plan = engine.diff(spec, shown_to_the_engine(seen, spec))
    assert not plan.blocked, plan.blocked
    for change in plan.changes:
        if isinstance(change, WriteFile) and change.path == paths.DAEMON_JSON:
            return json.loads(change.text)
    return json.loads(seen.daemon_json or "null")


@pytest.mark.parametrize(
    ("daemon_json", "record", "spec", "wanted"),
    [
        pytest.param(None, None, DEFAULT, STOCK, id="no-file"),
        pytest.param("", None, DEFAULT, STOCK, id="empty-file"),
        pytest.param(" \n", None, DEFAULT, STOCK, id="blank-file"),
        pytest.param("{}", None, DEFAULT, STOCK, id="empty-object"),
        pytest.param("\ufeff{}", None, DEFAULT, STOCK, id="byte-order-mark"),
        pytest.param("\ufeff", None, DEFAULT, STOCK, id="byte-order-mark-alone"),
        pytest.param(
            '\ufeff{"debug": true}', None, DEFAULT, {"debug": True, **STOCK}, id="owner-has-a-bom"
        ),
        pytest.param(
            '{"insecure-registries": ["r:5000"], "dns": ["10.10.0.2"]}',
            None,
            DEFAULT,
            {"insecure-registries": ["r:5000"], "dns": ["10.10.0.2"], **STOCK},
            id="owner-has-registries",
        ),
        pytest.param(
            '{"live-restore": false}', None, DEFAULT, {"live-restore": False, **STOCK},
            id="live-restore-off-is-the-owners-to-say",
        ),
        pytest.param(
            '{"log-driver": "syslog"}', None, DEFAULT, {"log-driver": "syslog"},
            id="owner-has-syslog",
        ),
        pytest.param(
            '{"log-driver": "json-file"}', None, DEFAULT, {"log-driver": "json-file"},
            id="owner-has-json-file-without-rotation",
        ),
        pytest.param(
            '{"log-opts": {"max-size": "50m"}}', None, DEFAULT,
            {"log-driver": "json-file", "log-opts": {**OPTS, "max-size": "50m"}},
            id="owner-has-a-size",
        ),
        pytest.param(
            '{"log-opts": {"labels": "team"}}', None, DEFAULT,
            {"log-driver": "json-file", "log-opts": {**OPTS, "labels": "team"}},
            id="owner-has-another-log-option",
        ),
        pytest.param(
            '{"log-opts": {"labels": "team"}}', None, TWENTY,
            {"log-driver": "json-file", "log-opts": {**OPTS, "max-size": "20m", "labels": "team"}},
            id="owner-has-another-log-option-than-the-spec-names",
        ),
        pytest.param(
            json.dumps(STOCK), OURS, TWENTY, {**STOCK, "log-opts": {**OPTS, "max-size": "20m"}},
            id="ours-from-an-earlier-spec-replaced",
        ),
        pytest.param(
            json.dumps(STOCK), OURS, LOCAL, {**STOCK, "log-driver": "local"},
            id="our-driver-from-an-earlier-spec-replaced",
        ),
        pytest.param(
            json.dumps({**STOCK, "log-driver": "syslog", "log-opts": {}}), OURS, DEFAULT,
            {"log-driver": "syslog", "log-opts": {}},
            id="owner-took-over-with-syslog",
        ),
        pytest.param(
            json.dumps({"log-driver": "json-file", "log-opts": {**OPTS, "max-size": "50m"}}),
            OURS, DEFAULT,
            {"log-driver": "json-file", "log-opts": {**OPTS, "max-size": "50m"}},
            id="owner-changed-our-size",
        ),
    ],
)  # fmt: skip
def test_merge(daemon_json: str | None, record: str | None, spec: Spec, wanted: Any) -> None:
    seen = replace(RIGHT, info=None, daemon_json=daemon_json, record=record)
    assert file_after(seen, spec) == wanted


MEND = "fix mend /etc/docker/daemon.json"
BOTH = "fix remove one of the two, in /etc/docker/daemon.json or /etc/nodeagent/node.yaml"


TRAILING_COMMA = '{\n"debug": true,\n}'


def json_fault(text: str) -> str:
    """Where and how Python says that this is no JSON: in other words from 3.13 on."""
    with pytest.raises(json.JSONDecodeError) as found:
        json.loads(text)
    return f"line {found.value.lineno}: {found.value.msg}"


@pytest.mark.parametrize(
    ("daemon_json", "spec", "plan"),
    [
        pytest.param(
            '{"log-driver": "syslog"}', TWENTY,
            ['block log-driver is "syslog" in /etc/docker/daemon.json '
             'and "json-file" by /etc/nodeagent/node.yaml', BOTH],
            id="owner-has-syslog-and-the-spec-another",
        ),
        pytest.param(
            '{"log-driver": "json-file", "log-opts": {"max-size": "50m"}}', TWENTY,
            ['block log-opts max-size is "50m" in /etc/docker/daemon.json '
             'and "20m" by /etc/nodeagent/node.yaml', BOTH],
            id="owner-has-a-size-and-the-spec-another",
        ),
        pytest.param(
            '{"live-restore": true}', DEFAULT,
            ["block live-restore in /etc/docker/daemon.json is true, "
             "which an Engine in Swarm mode cannot have",
             "fix remove live-restore from /etc/docker/daemon.json, "
             "then systemctl restart docker.service"],
            id="live-restore",
        ),
        pytest.param(
            '{"cluster-store": "consul://127.0.0.1:8500"}', DEFAULT,
            ["block cluster-store was removed in Docker Engine 23.0 and this is 26.1.5",
             "fix remove cluster-store and cluster-advertise from /etc/docker/daemon.json, "
             "then systemctl restart docker.service"],
            id="cluster-store",
        ),
        pytest.param(
            '{"cluster-advertise": "eth1:2376"}', DEFAULT,
            ["block cluster-store was removed in Docker Engine 23.0 and this is 26.1.5",
             "fix remove cluster-store and cluster-advertise from /etc/docker/daemon.json, "
             "then systemctl restart docker.service"],
            id="cluster-advertise",
        ),
        pytest.param(
            TRAILING_COMMA, DEFAULT,
            [f"block /etc/docker/daemon.json cannot be read: {json_fault(TRAILING_COMMA)}", MEND],
            id="trailing-comma",
        ),
        pytest.param(
            "[]", DEFAULT,
            ["block /etc/docker/daemon.json cannot be read: it holds no JSON object", MEND],
            id="a-list",
        ),
        pytest.param(
            "null", DEFAULT,
            ["block /etc/docker/daemon.json cannot be read: it holds no JSON object", MEND],
            id="null",
        ),
        pytest.param(
            '{"log-opts": ["max-size=10m"]}', DEFAULT,
            ["block /etc/docker/daemon.json cannot be read: its log-opts are no JSON object", MEND],
            id="log-opts-a-list",
        ),
    ],
)  # fmt: skip
def test_blocked_by_the_owners_file(daemon_json: str, spec: Spec, plan: list[str]) -> None:
    assert said(engine.diff(spec, replace(RIGHT, daemon_json=daemon_json, record=None))) == plan


def unit(active: str, *, load: str = "loaded", enabled: str = "enabled") -> Unit:
    return Unit(load, active, "run-7", enabled)


@pytest.mark.parametrize(
    ("seen", "plan"),
    [
        pytest.param(RIGHT, DONE, id="all-right"),
        pytest.param(
            FRESH,
            ["do write /var/lib/nodeagent/engine-options.json",
             "do write /run/nodeagent/engine-restart-pending",
             "do write /etc/docker/daemon.json",
             "do remove /run/nodeagent/daemon.json.candidate"],
            id="stock-machine",
        ),
        pytest.param(
            replace(FRESH, daemon_json="{}"),
            ["do write /var/lib/nodeagent/originals/daemon.json",
             "do write /var/lib/nodeagent/engine-options.json",
             "do write /run/nodeagent/engine-restart-pending",
             "do write /etc/docker/daemon.json",
             "do remove /run/nodeagent/daemon.json.candidate"],
            id="the-owners-file-is-copied-first",
        ),
        pytest.param(
            replace(RIGHT, daemon_json="{}"),
            ["do write /var/lib/nodeagent/engine-options.json",
             "do write /run/nodeagent/engine-restart-pending",
             "do write /etc/docker/daemon.json",
             "do remove /run/nodeagent/daemon.json.candidate"],
            id="the-copy-is-not-made-again",
        ),
        pytest.param(
            replace(FRESH, unit=unit("inactive"), info=None),
            ["do write /var/lib/nodeagent/engine-options.json",
             "do write /run/nodeagent/engine-restart-pending",
             "do write /etc/docker/daemon.json",
             "do remove /run/nodeagent/daemon.json.candidate"],
            id="stopped-engine-that-may-start-by-itself-meanwhile",
        ),
        pytest.param(
            replace(RIGHT, record=OURS, pending="restart 50.000\n"),
            ["do restart docker.service: /etc/docker/daemon.json changed"],
            id="killed-before-restart",
        ),
        pytest.param(
            replace(
                RIGHT, unit=replace(unit("activating"), began_s=45.0), info=None,
                pending="restart 50.000\n",
            ),
            ["wait docker.service to start"],
            id="killed-before-restart-of-an-engine-still-starting",
        ),
        pytest.param(
            replace(RIGHT, unit=replace(RUNNING, began_s=51.0), pending="restart 50.000\n"),
            ["do remove /run/nodeagent/engine-restart-pending"],
            id="killed-after-restart",
        ),
        pytest.param(
            replace(RIGHT, pending="run-0\n"),
            ["do remove /run/nodeagent/engine-restart-pending"],
            id="a-mark-of-an-earlier-version",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("inactive"), info=None),
            ["do start docker.service"],
            id="stopped",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("inactive"), info=None, pending="restart 50.000\n"),
            ["do start docker.service"],
            id="stopped-before-the-restart",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("active", enabled="disabled")),
            ["do enable docker.service"],
            id="running-but-disabled",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("activating"), info=None),
            ["wait docker.service to start"],
            id="starting",
        ),
        pytest.param(
            replace(RIGHT, info=None),
            ["wait docker.service to answer on its socket"],
            id="running-but-silent",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("inactive", load="masked"), info=None),
            ["block docker.service is masked", "fix systemctl unmask docker.service"],
            id="masked",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("inactive", load="not-found"), info=None),
            ["block no Docker Engine is installed (there is no docker.service)",
             "fix apt-get install docker.io"],
            id="absent",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("failed"), info=None, journal=("one", "fatal: no such log")),
            ["block docker.service fails to start: fatal: no such log",
             "fix journalctl -u docker.service, mend, then systemctl restart docker.service"],
            id="failed",
        ),
        pytest.param(
            replace(RIGHT, unit=unit("failed"), info=None),
            ["block docker.service fails to start",
             "fix journalctl -u docker.service, mend, then systemctl restart docker.service"],
            id="failed-without-a-word",
        ),
        pytest.param(
            replace(FRESH, info=None, version="19.03.15"),
            ["block Docker Engine 19.03.15 is too old", "fix install 20.10 or newer"],
            id="too-old",
        ),
        pytest.param(
            replace(FRESH, info=replace(INFO, version="19.03.15")),
            ["block Docker Engine 19.03.15 is too old", "fix install 20.10 or newer"],
            id="the-one-that-runs-is-too-old",
        ),
        pytest.param(
            replace(RIGHT, version="20.10.24+dfsg1"),
            ["done Docker Engine 20.10.24+dfsg1, logs json-file"],
            id="just-new-enough",
        ),
        pytest.param(
            replace(RIGHT, version="dev"),
            ["done Docker Engine dev, logs json-file"],
            id="a-build-without-a-number",
        ),
        pytest.param(
            replace(RIGHT, info=replace(INFO, options={"log-driver": "syslog"})),
            ['block the Engine runs with log-driver "syslog" although /etc/docker/daemon.json '
             'asks for "json-file"',
             "fix systemctl cat docker.service; look for --log-driver; "
             "then systemctl restart docker.service"],
            id="a-flag-of-the-unit-wins",
        ),
        pytest.param(
            replace(RIGHT, info=replace(INFO, options={"live-restore": True})),
            ["block the Engine runs with live-restore although /etc/docker/daemon.json does not "
             "ask for it; an Engine in Swarm mode cannot have that",
             "fix systemctl cat docker.service; look for --live-restore; "
             "then systemctl restart docker.service"],
            id="live-restore-by-a-flag-of-the-unit",
        ),
        pytest.param(
            replace(RIGHT, record="{"),
            ["block /var/lib/nodeagent/engine-options.json does not say which options are ours",
             "fix rm /var/lib/nodeagent/engine-options.json; "
             "the options in /etc/docker/daemon.json are then yours"],
            id="record-torn",
        ),
        pytest.param(
            replace(RIGHT, record='{"options": ["log-driver"]}'),
            ["block /var/lib/nodeagent/engine-options.json does not say which options are ours",
             "fix rm /var/lib/nodeagent/engine-options.json; "
             "the options in /etc/docker/daemon.json are then yours"],
            id="record-of-another-shape",
        ),
    ],
)  # fmt: skip
def test_plan(seen: Seen, plan: list[str]) -> None:
    assert said(engine.diff(DEFAULT, shown_to_the_engine(seen, DEFAULT))) == plan


class Killed(BaseException):
    """kill -9."""


OWNERS = {
    "insecure-registries": ["registry.example:5000"],
    "log-opts": {"labels": "team", "max-file": "3"},
    "dns": ["10.10.0.2"],
}
Section = Mapping[str, object]
DEFAULTS: Section = {}


def one_server(section: Section) -> Spec:
    return make_spec("server", **{"servers": 1, "join": "[]", **section})


def alone(file: object | None) -> Machine:
    """A one-server cluster's machine with this daemon.json."""
    machine = World().machine(one_server(DEFAULTS), "10.10.0.11")
    if file is not None:
        machine.files.texts[paths.DAEMON_JSON] = json.dumps(file)
    machine.engine.runs_with = machine.files.read(paths.DAEMON_JSON)
    return machine


def cycle(machine: Machine, section: Section, apply: Apply = make) -> Cycle:
    return run_cycle(one_server(section), machine.host, STEPS, lambda _: None, apply)


def until_ready(machine: Machine, section: Section = DEFAULTS) -> None:
    for _ in range(5):
        last = cycle(machine, section)
        if last.is_ready:
            return
    raise AssertionError(last.sentence)


def killed_after(machine: Machine, made: int, section: Section = DEFAULTS) -> bool:
    """Run cycles that die after `made` changes; whether they had that many to make."""
    left = made

    def apply(change: Change, host: Host) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        make(change, host)

    try:
        for _ in range(5):
            cycle(machine, section, apply)
    except Killed:
        return True
    return False


def file_of(machine: Machine) -> Any:
    return json.loads(machine.files.texts[paths.DAEMON_JSON])


def assert_runs_with_its_file(machine: Machine) -> None:
    assert machine.engine.runs_with == machine.files.texts[paths.DAEMON_JSON]
    assert machine.files.read(paths.RESTART_PENDING) is None


MERGED = {
    **OWNERS,
    "log-driver": "json-file",
    "log-opts": {"labels": "team", "max-file": "3", "max-size": "10m", "compress": "true"},
}


@pytest.mark.parametrize(
    ("owners", "merged"),
    [
        pytest.param(None, {**STOCK, "dns": [dns.ADDRESS]}, id="no-file"),
        pytest.param({}, {**STOCK, "dns": [dns.ADDRESS]}, id="empty-object"),
        pytest.param(OWNERS, MERGED, id="owners-file"),
    ],
)
@pytest.mark.parametrize("death", ["agent", "power"])
def test_killed_after_every_change_it_is_restarted_once(
    owners: object, merged: object, death: str
) -> None:
    made = 0
    while True:
        machine = alone(owners)
        died = killed_after(machine, made)
        if died and death == "power":
            machine.lose_power()
            machine.boot()
        until_ready(machine)
        assert file_of(machine) == merged, made
        assert_runs_with_its_file(machine)
        if death == "agent":
            assert machine.systemd.restarts == 1, made
        else:
            assert machine.systemd.restarts <= 1, made
        if not died:
            break
        made += 1
    assert made > 8, "the run has become so short that this test says nothing"


TO_TWENTY: Section = {"engine": "{log: {max_size: 20m}}"}


@pytest.mark.parametrize(
    ("third", "size"),
    [
        pytest.param(TO_TWENTY, "20m", id="then-on-with-it"),
        pytest.param({"engine": "{log: {max_size: 30m}}"}, "30m", id="then-a-third"),
        pytest.param({}, "10m", id="then-back-to-the-first"),
    ],
)
def test_killed_after_every_change_of_a_second_spec(third: Section, size: str) -> None:
    made = 0
    while True:
        machine = alone({"log-opts": {"labels": "team"}})
        until_ready(machine)
        died = killed_after(machine, made, TO_TWENTY)
        until_ready(machine, third)
        assert file_of(machine)["log-opts"] == {**OPTS, "labels": "team", "max-size": size}, made
        assert_runs_with_its_file(machine)
        if not died:
            break
        made += 1
    assert made == 11, "candidate, record, mark, file, mark, lock, restart, and what is undone"


def test_the_owners_log_options_are_kept_for_good_and_one_restart_is_enough() -> None:
    machine = alone(OWNERS)
    for _ in range(5):
        cycle(machine, DEFAULTS)
    assert file_of(machine) == MERGED
    assert machine.systemd.restarts == 1


def test_a_value_of_the_owner_that_the_spec_comes_to_contradict_is_named() -> None:
    machine = alone(OWNERS)
    until_ready(machine)
    before = dict(machine.files.texts)
    last = cycle(machine, {"engine": "{log: {max_file: 7}}"})
    assert last.is_blocked
    assert 'log-opts max-file is "3" in /etc/docker/daemon.json and "7" by' in last.sentence
    assert machine.files.texts == before


def test_the_owners_file_as_it_was_is_kept_once_and_for_all() -> None:
    machine = alone(OWNERS)
    until_ready(machine)
    until_ready(machine, {"engine": "{log: {max_size: 20m, max_file: 3}}"})
    assert json.loads(machine.files.texts[paths.ORIGINAL_DAEMON_JSON]) == OWNERS


def test_the_files_mode_stays_its_owners() -> None:
    spec, seen = make_spec(), replace(FRESH, daemon_json="{}")
    modes = {
        change.path: change.mode
        for change in engine.diff(spec, shown_to_the_engine(seen, spec)).changes
        if isinstance(change, WriteFile)
    }
    assert modes[paths.DAEMON_JSON] is KEEP_MODE
    assert modes[paths.ENGINE_RECORD] == modes[paths.ORIGINAL_DAEMON_JSON] == 0o600


@pytest.mark.parametrize("file", ['{"live-restore": true}', "{", '{"log-driver": 5}'])
def test_what_blocks_changes_nothing(file: str) -> None:
    machine = alone(None)
    machine.files.texts[paths.DAEMON_JSON] = file
    spec = one_server({"engine": "{log: {driver: local}}"})
    before = dict(machine.files.texts)
    plan: Plan = engine.diff(spec, engine.observe(spec, machine.host))
    assert plan.blocked
    assert machine.files.texts == before


BULKY: Section = {"engine": "{options: {bip: 10.99.0.1/16}}"}
DIES = {"10.99.0.1": "failed to start daemon: no such network"}


def dying(words: Mapping[str, str] = DIES) -> Machine:
    """A machine whose Engine runs with what it has, and dies of these pieces of a file."""
    machine = alone(OWNERS)
    until_ready(machine)
    machine.systemd.deadly = dict(words)
    return machine


def test_options_that_the_engine_dies_of_are_taken_back_and_not_tried_again() -> None:
    machine = dying()
    before = machine.files.texts[paths.DAEMON_JSON]
    restarts = machine.systemd.restarts
    for _ in range(6):
        last = cycle(machine, BULKY)
    assert last.is_blocked
    assert "failed to start daemon: no such network" in last.sentence
    assert machine.files.texts[paths.DAEMON_JSON] == before
    assert machine.engine_is_up
    assert_runs_with_its_file(machine)
    assert machine.systemd.restarts == restarts + 1, "the attempt failed, the way back did not"
    assert machine.program.asked == 2, "the new file of each of two attempts was shown to it first"


@pytest.mark.parametrize("news", ["the-spec", "the-file", "the-version"])
def test_they_are_tried_again_when_something_is_new(news: str) -> None:
    machine, section = dying(), BULKY
    for _ in range(6):
        cycle(machine, section)
    machine.systemd.deadly = {}
    assert cycle(machine, section).is_blocked
    if news == "the-spec":
        section = {"engine": "{options: {bip: 10.99.0.1/16, debug: true}}"}
    elif news == "the-file":
        machine.files.write(paths.DAEMON_JSON, "{}", None)
    else:
        machine.program.text = "28.5.2"
    until_ready(machine, section)
    assert file_of(machine)["bip"] == "10.99.0.1/16"
    assert_runs_with_its_file(machine)


@pytest.mark.parametrize("death", ["agent", "power"])
def test_killed_after_every_change_on_the_way_back(death: str) -> None:
    made = 0
    while True:
        machine = dying()
        before = machine.files.texts[paths.DAEMON_JSON]
        died = killed_after(machine, made, BULKY)
        if died and death == "power":
            machine.lose_power()
            machine.boot()
        for _ in range(8):
            last = cycle(machine, BULKY)
        assert last.is_blocked, (made, last.sentence)
        assert machine.files.texts[paths.DAEMON_JSON] == before, (made, last.sentence)
        assert machine.engine_is_up, made
        assert_runs_with_its_file(machine)
        if not died:
            break
        made += 1
    assert made >= 10


def test_what_the_engine_says_against_it_is_told_before_anything_is_written() -> None:
    machine = alone(OWNERS)
    machine.program.refused = {"10.99.0.1": "invalid CIDR address"}
    before = dict(machine.files.texts)
    for _ in range(3):
        last = cycle(machine, BULKY)
    assert last.is_blocked
    assert "so nothing was changed: invalid CIDR address" in last.sentence
    assert machine.files.texts[paths.DAEMON_JSON] == before[paths.DAEMON_JSON]
    assert machine.systemd.restarts == 0


def test_an_engine_that_takes_the_options_and_does_not_show_them() -> None:
    machine = alone(OWNERS)
    until_ready(machine)
    before = machine.files.texts[paths.DAEMON_JSON]
    machine.engine.deaf = {"debug"}
    for _ in range(6):
        last = cycle(machine, {"engine": "{options: {debug: true, bip: 10.99.0.1/16}}"})
    assert last.is_blocked
    assert "the Engine runs with debug false although" in last.sentence
    assert machine.files.texts[paths.DAEMON_JSON] == before
    assert_runs_with_its_file(machine)


def test_what_can_be_reloaded_needs_no_restart() -> None:
    machine = alone(OWNERS)
    until_ready(machine)
    restarts = machine.systemd.restarts
    until_ready(machine, {"engine": "{options: {debug: true, labels: [zone=a]}}"})
    assert (machine.systemd.restarts, machine.systemd.reloads) == (restarts, 1)
    assert file_of(machine)["labels"] == ["zone=a"]
    assert_runs_with_its_file(machine)
    until_ready(machine)
    assert file_of(machine) == MERGED, "what is asked no more is taken out again"
    # The Engine keeps what a reload does not name any more.
    assert (machine.systemd.restarts, machine.systemd.reloads) == (restarts + 1, 1)


STUCK = (
    "failed to start daemon: Error initializing network controller: error creating default "
    '"bridge" network: cannot create network 30fe (docker0): conflicts with network 5a03 '
    "(docker0): networks have same bridge name"
)
STORE = Path("/var/lib/docker/network/files/local-kv.db")


def test_an_engine_that_cannot_start_over_its_own_store_gets_a_new_one() -> None:
    machine = alone(None)
    until_ready(machine)
    machine.files.texts[STORE] = "bolt"
    machine.systemd.stop(paths.ENGINE_UNIT)
    machine.systemd.failing[paths.ENGINE_UNIT] = (STUCK, "Main process exited")
    with contextlib.suppress(HostError):
        machine.systemd.start(paths.ENGINE_UNIT)
    run_cycle(one_server(DEFAULTS), machine.host, STEPS, lambda _: None, without_store(machine))
    until_ready(machine)
    assert machine.files.texts[STORE.with_name("local-kv.db.set-aside")] == "bolt"
    assert STORE not in machine.files.texts


def without_store(machine: Machine) -> Apply:
    """Let the Engine start again once its store is away."""

    def apply(change: Change, host: Host) -> None:
        make(change, host)
        if STORE not in machine.files.texts:
            machine.systemd.failing.clear()

    return apply


def test_a_store_with_the_owners_networks_is_left_alone() -> None:
    seen = replace(
        RIGHT,
        unit=unit("failed"),
        info=None,
        journal=(STUCK,),
        networks=("bridge", "host", "none", "shop_front"),
    )
    [why, fix] = said(engine.diff(DEFAULT, seen))
    assert why.startswith("block the Engine's store of networks holds its bridge twice")
    assert "shop_front" in why
    assert fix.startswith("fix mv /var/lib/docker/network/files/local-kv.db /root/")


FLAGS = (
    Word("/usr/sbin/dockerd", "/lib/systemd/system/docker.service"),
    Word("-H", "/lib/systemd/system/docker.service"),
    Word("fd://", "/lib/systemd/system/docker.service"),
)


def flagged(*words: str) -> Seen:
    given = tuple(Word(word, "/etc/default/docker") for word in words)
    return replace(FRESH, unit=replace(RUNNING, command=(*FLAGS, *given)))


BIP = make_spec(engine="{options: {bip: 10.99.0.1/16}}")


@pytest.mark.parametrize(
    ("words", "spec", "wanted"),
    [
        pytest.param(("--debug",), DEFAULT, STOCK, id="a-flag-of-no-interest"),
        pytest.param(("--log-driver=syslog",), DEFAULT, None, id="the-driver-by-a-flag"),
        pytest.param(("--log-driver", "syslog"), DEFAULT, None, id="the-driver-in-two-words"),
        pytest.param(("--log-opt", "max-size=1m"), DEFAULT, None, id="a-log-option-by-a-flag"),
        pytest.param(("--bip=10.99.0.1/16",), BIP, STOCK, id="the-same-value"),
    ],
)
def test_what_a_flag_says_is_not_said_again(
    words: tuple[str, ...], spec: Spec, wanted: object
) -> None:
    assert file_after(flagged(*words), spec) == wanted


@pytest.mark.parametrize(
    ("words", "spec", "why"),
    [
        pytest.param(
            ("--bip=10.1.0.1/16",), BIP,
            'block bip is --bip=10.1.0.1/16 in /etc/default/docker and "10.99.0.1/16" by '
            "/etc/nodeagent/node.yaml",
            id="another-value",
        ),
        pytest.param(
            ("--log-driver=syslog",), TWENTY,
            'block log-driver is --log-driver=syslog in /etc/default/docker and "json-file" by '
            "/etc/nodeagent/node.yaml",
            id="another-driver",
        ),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_is_named_with_both_places(
    words: tuple[str, ...], spec: Spec, why: str
) -> None:
    assert said(engine.diff(spec, flagged(*words)))[0] == why


def test_containers_older_than_the_option_are_counted_and_named() -> None:
    other = LogSettings("json-file", {}, made=0.5)
    logs = (
        ("api", other),
        ("db", other),
        ("late", replace(other, made=2.0)),
        ("same", LogSettings("json-file", OPTS, made=0.5)),
    )
    assert said(engine.diff(DEFAULT, replace(RIGHT, logs=logs))) == [
        "done Docker Engine 26.1.5, logs json-file; 2 containers are older and keep their own log "
        "settings: api, db"
    ]


def test_a_file_that_could_not_be_written_leaves_nothing_to_be_done_when_it_is_asked_no_more() -> (
    None
):
    machine = alone(OWNERS)
    until_ready(machine)
    restarts = machine.systemd.restarts

    def on_a_full_disk(change: Change, host: Host) -> None:
        if isinstance(change, WriteFile) and change.path == paths.DAEMON_JSON:
            raise HostError("write", change.path, "No space left on device")
        make(change, host)

    for _ in range(2):
        last = cycle(machine, BULKY, on_a_full_disk)
    assert "No space left on device" in last.sentence
    until_ready(machine)
    assert machine.systemd.restarts == restarts
    assert machine.files.read(paths.RESTART_PENDING) is None
    assert file_of(machine) == MERGED
