"""Installing again changes nothing; after a kill between any two changes the next run makes up."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent import install, paths
from nodeagent.adapters.pki import LocalPki
from nodeagent.errors import Secret, SpecError, UsageError
from nodeagent.host import Host, Unit
from nodeagent.install import PENDING, Program
from nodeagent.secrets import dump, for_workers, new
from nodeagent.spec import Spec, parse
from tests.unit.fakes import FakeFiles

UNITS = Path(__file__).parents[2] / "systemd"
SPEC = "cluster: demo\nrole: server\nservers: 1\naddress: eth1\nsecurity: off\n"
OTHER_SPEC = SPEC.replace("demo", "other")
WRONG_SPEC = SPEC.replace("server\n", "boss\n")
SECURED = SPEC.replace("security: off", "join: [10.10.0.11]")
PKI = LocalPki()
MADE = new(PKI, 0)
KEY = MADE.cluster_key.reveal()
SERVER = dump(MADE)
NEXT_SERVER = dump(replace(MADE, serial=2))
NEXT_OTHER = dump(replace(new(PKI, 0), serial=2))
WORKER = dump(for_workers(MADE, parse(SECURED, "test", Spec), PKI, 0))
NEXT_WORKER = Secret(WORKER.reveal().replace('"serial": 0', '"serial": 2'))
VENV = Program("/usr/bin/python3", Path("/opt/x"), Path("/opt/x"), False)
NEWER = Program("/usr/bin/python3", Path("/opt/y"), Path("/opt/y"), False)
RELEASE = Program(
    "/usr/bin/python3",
    Path("/root/.shiv/nodeagent_1/site-packages"),
    Path("/opt/nodeagent/lib/9-1/site-packages"),
    True,
)


class Refused(Exception):
    """A call that installing has no reason to make."""


class Disk(FakeFiles):
    """The fake file system, with modes looked at: what may hold a secret is for root alone."""

    def write(self, path: Path, text: str, mode: int | None) -> None:
        secret = path in (paths.SPEC, paths.SECRETS, PENDING) or path.parent == paths.ORIGINALS
        if secret or path == paths.LAUNCHER or path.parent == paths.UNITS:
            assert mode == (0o600 if secret else 0o755 if path == paths.LAUNCHER else 0o644)
        super().write(path, text, mode)


@dataclass
class Node:
    """A node's files and service manager, and nothing else: any other part refuses every call."""

    is_booted: bool = True
    files: Disk = field(default_factory=Disk)
    starts: int = 0
    reloads: int = 0

    def __post_init__(self) -> None:
        for program in (VENV, NEWER, RELEASE):
            self.files.write(program.source / "nodeagent/cli.py", str(program.source), 0o644)

    @property
    def host(self) -> Host:
        parts = {name: cast("Any", Nothing()) for name in Host.__dataclass_fields__}
        parts |= {"files": self.files, "pki": PKI, "systemd": cast("Any", self)}
        return Host(**parts)

    @property
    def content(self) -> tuple[dict[Path, str], dict[Path, Path], set[Path]]:
        return self.files.texts, self.files.links, self.files.directories

    # systemd

    def is_running(self) -> bool:
        return self.is_booted

    def unit(self, name: str) -> Unit:
        self.booted()
        assert name == paths.AGENT_UNIT
        return Unit("loaded", "active" if self.starts else "inactive")

    def enable(self, name: str) -> None:
        assert self.files.exists(paths.UNITS / name), "enabled before it was there"
        self.files.link(install.ENABLED, paths.UNITS / name)

    def reload(self) -> None:
        self.booted()
        self.reloads += 1

    def start_soon(self, name: str) -> None:
        self.booted()
        assert name == paths.AGENT_UNIT
        self.starts += 1

    def booted(self) -> None:
        if not self.is_booted:
            raise Refused("there is no service manager in a chroot")


class Nothing:
    def __getattr__(self, name: str) -> object:
        raise Refused(name)


def run(
    node: Node,
    wanted: str | None = None,
    secrets: Secret | None = None,
    *,
    start: bool = True,
    program: Program = VENV,
    kill_after: int | None = None,
) -> list[str]:
    changes = install.plan(node.host, wanted, secrets, start=start, program=program)
    for change in changes[:kill_after]:
        change.apply(node.host)
    return [str(change) for change in changes]


def test_a_fresh_machine_gets_everything() -> None:
    node = Node()
    assert run(node, SPEC, SERVER) == [
        "write /run/nodeagent/install-pending",
        "write /opt/nodeagent/nodeagent",
        "link /usr/local/bin/nodeagent to /opt/nodeagent/nodeagent",
        *(f"write /etc/systemd/system/{name}" for name in sorted(os.listdir(UNITS))),
        "make /etc/nodeagent, for root alone",
        "write /etc/nodeagent/secrets.json",
        "write /etc/nodeagent/node.yaml",
        "enable nodeagent.service",
        "have systemd read its units again",
        "start nodeagent.service, anew if it runs",
        "remove /run/nodeagent/install-pending",
    ]
    assert node.files.texts[paths.SPEC] == SPEC
    assert node.files.texts[paths.SECRETS] == SERVER.reveal()
    assert (node.starts, node.reloads) == (1, 1)


@pytest.mark.parametrize(
    ("before", "again", "wanted"),
    [
        pytest.param([{"wanted": SPEC}], {"wanted": SPEC}, [], id="the-same-again"),
        pytest.param([{"wanted": SPEC}], {}, [], id="the-same-without-naming-the-spec"),
        pytest.param(
            [{"wanted": SPEC}],
            {"wanted": OTHER_SPEC},
            [
                "write /run/nodeagent/install-pending",
                "write /var/lib/nodeagent/originals/node.yaml.e755712c",
                "write /etc/nodeagent/node.yaml",
                "have systemd read its units again",
                "start nodeagent.service, anew if it runs",
                "remove /run/nodeagent/install-pending",
            ],
            id="another-spec-keeps-the-old-one",
        ),
        pytest.param(
            [{"wanted": SPEC, "secrets": SERVER}],
            {"wanted": SPEC, "secrets": SERVER},
            [],
            id="the-same-secrets-again",
        ),
        pytest.param(
            [{"wanted": SPEC, "secrets": Secret("old")}],
            {"secrets": SERVER},
            [
                "write /run/nodeagent/install-pending",
                "write /var/lib/nodeagent/originals/secrets.json.cba06b57",
                "write /etc/nodeagent/secrets.json",
                "have systemd read its units again",
                "start nodeagent.service, anew if it runs",
                "remove /run/nodeagent/install-pending",
            ],
            id="other-secrets-keep-the-old-ones",
        ),
        pytest.param(
            [{"wanted": SPEC}],
            {"program": RELEASE},
            [
                "write /run/nodeagent/install-pending",
                "copy the program to /opt/nodeagent/lib/9-1/site-packages",
                "write /opt/nodeagent/nodeagent",
                "have systemd read its units again",
                "start nodeagent.service, anew if it runs",
                "remove /run/nodeagent/install-pending",
            ],
            id="a-release-in-the-place-of-a-venv",
        ),
        pytest.param(
            [{"wanted": SPEC}],
            {"program": NEWER},
            [
                "write /run/nodeagent/install-pending",
                "write /opt/nodeagent/nodeagent",
                "have systemd read its units again",
                "start nodeagent.service, anew if it runs",
                "remove /run/nodeagent/install-pending",
            ],
            id="an-upgrade",
        ),
        pytest.param([{}], {}, [], id="no-spec-yet-and-nothing-to-start"),
        pytest.param(
            [{"wanted": SPEC, "start": False}],
            {},
            ["start nodeagent.service, anew if it runs"],
            id="installed-but-never-started",
        ),
    ],
)
def test_only_what_is_left_is_done(
    before: list[dict[str, Any]], again: dict[str, Any], wanted: list[str]
) -> None:
    node = Node()
    for step in before:
        run(node, **step)
    assert run(node, **again) == wanted


def test_the_previous_spec_is_never_lost() -> None:
    node = Node()
    for text in (SPEC, OTHER_SPEC, SPEC):
        run(node, text)
    assert kept(node) == {SPEC, OTHER_SPEC}


def kept(node: Node) -> set[str]:
    return {text for path, text in node.files.texts.items() if path.parent == paths.ORIGINALS}


def test_an_image_is_made_without_a_service_manager() -> None:
    node = Node(is_booted=False)
    sentences = run(node)
    assert "enable nodeagent.service" in sentences
    assert run(node) == []
    assert not node.files.exists(PENDING)
    node.is_booted = True
    assert run(node, SPEC)[-2:] == [
        "start nodeagent.service, anew if it runs",
        "remove /run/nodeagent/install-pending",
    ]


@pytest.mark.parametrize("is_upgrade", [False, True], ids=["first-time", "upgrade"])
def test_killed_after_any_change_the_next_run_makes_up_for_it(is_upgrade: bool) -> None:
    def prepared() -> Node:
        node = Node()
        if is_upgrade:
            run(node, OTHER_SPEC, Secret("old"))
        return node

    wanted: dict[str, Any] = {"wanted": SPEC, "secrets": SERVER, "program": RELEASE}
    whole = prepared()
    count = len(run(whole, **wanted))
    for kill_after in range(count):
        node = prepared()
        before = (node.starts, node.reloads)
        run(node, **wanted, kill_after=kill_after)
        run(node, **wanted)
        assert node.content == whole.content, kill_after
        assert node.starts > before[0], kill_after
        assert node.reloads > before[1], kill_after
        assert run(node, **wanted) == [], kill_after


def test_where_there_are_secrets_a_spec_comes_after_them() -> None:
    """A run that was killed, and then a reboot: the agent starts with all it needs, or nothing."""
    for kill_after in range(len(run(Node(), SPEC, SERVER))):
        node = Node()
        run(node, SPEC, SERVER, kill_after=kill_after)
        assert node.files.exists(paths.SECRETS) or not node.files.exists(paths.SPEC)


# -- what is given


@dataclass
class Given:
    """A node, and files that are given to `install`."""

    node: Node
    top: Path

    def install(
        self, spec: str | None = None, secrets: Secret | str | None = None, mode: int = 0o600
    ) -> list[str]:
        sources: list[Path | None] = []
        for name, text in (("node.yaml", spec), ("secrets.json", secrets)):
            path = self.top / name
            sources.append(path if text is not None else None)
            if text is not None:
                plain = text if isinstance(text, str) else text.reveal()
                path.write_text(plain)  # `spec.load` reads it itself
                self.node.files.write(path, plain, mode)
        return [str(made) for made in install.install(self.node.host, *sources, program=VENV)]

    @property
    def installed(self) -> str | None:
        return self.node.files.read(paths.SECRETS)


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(Node(), tmp_path)


@pytest.mark.parametrize(
    ("role", "secrets", "other"), [("server", SERVER, WORKER), ("worker", WORKER, SERVER)]
)
def test_secrets_are_of_the_role(role: str, secrets: Secret, other: Secret, given: Given) -> None:
    spec = SECURED.replace("server\n", f"{role}\n")
    with pytest.raises(SpecError, match=r"secrets\.json: .*worker"):
        given.install(spec, other)
    assert given.installed is None
    given.install(spec, secrets)
    assert given.installed == secrets.reveal()
    assert given.install(spec, secrets) == []
    assert given.install(None, secrets) == [], "the installed spec says the role"
    with pytest.raises(SpecError, match=r"secrets\.json: .*worker"):
        given.install(None, other)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        pytest.param({"spec": WRONG_SPEC}, "role: found 'boss'", id="wrong-spec"),
        pytest.param(
            {"spec": WRONG_SPEC, "secrets": SERVER}, "role: found 'boss'", id="wrong-spec-of-two"
        ),
        pytest.param(
            {"spec": SECURED, "secrets": "NO KEYS HERE"},
            r"secrets\.json:1: is not JSON",
            id="no-secrets-at-all",
        ),
        pytest.param(
            {"spec": SECURED, "secrets": SERVER.reveal().replace("cluster_key", "cluster-key")},
            r"secrets\.json: .*unknown key",
            id="wrong-secrets",
        ),
        pytest.param(
            {"spec": SECURED, "secrets": SERVER, "mode": 0o644},
            r"secrets\.json: others can read or change it; .* mode 600 \(chmod 600 /.*json\)",
            id="secrets-that-others-can-read",
        ),
    ],
)
def test_what_is_wrong_changes_nothing(what: dict[str, Any], says: str, given: Given) -> None:
    for is_installed in (False, True):
        if is_installed:
            given.install(SECURED, NEXT_SERVER)
        fresh = copy.deepcopy(given.node.content)
        starts = given.node.starts
        with pytest.raises(SpecError, match=says) as raised:
            given.install(**what)
        for path in given.top.iterdir():
            given.node.files.remove(path)
            fresh[0].pop(path, None)
        assert (given.node.content, given.node.starts) == (fresh, starts)
        assert KEY not in str(raised.value)


def test_secrets_that_are_not_there_are_missed(given: Given) -> None:
    given.install(SECURED)
    with pytest.raises(SpecError, match=r"/none: there is no such file \(nodeagent secrets new"):
        install.install(given.node.host, None, Path("/none"), program=VENV)


def test_nothing_says_whose_secrets_they_are(given: Given) -> None:
    with pytest.raises(UsageError, match="--secrets needs --spec beside it: there is no /etc/node"):
        given.install(None, SERVER)
    with pytest.raises(UsageError, match="`security: off`, so --secrets has no use"):
        given.install(SPEC, SERVER)
    assert given.installed is None


def test_a_secured_spec_goes_without_secrets_that_come_later(given: Given) -> None:
    assert "start nodeagent.service, anew if it runs" in given.install(SECURED)
    assert "start nodeagent.service, anew if it runs" in given.install(None, SERVER)
    assert given.install(SECURED) == []
    assert given.installed == SERVER.reveal()


def test_a_damaged_installed_spec_is_named(given: Given) -> None:
    given.node.files.write(paths.SPEC, WRONG_SPEC, 0o600)
    with pytest.raises(SpecError, match=r"^/etc/nodeagent/node\.yaml:2: role"):
        given.install(None, SERVER)


@pytest.mark.parametrize(
    ("role", "old", "new", "is_kept"),
    [
        pytest.param("server", "old", SERVER, False, id="damaged"),
        pytest.param("server", SERVER, NEXT_SERVER, False, id="older"),
        pytest.param("server", NEXT_SERVER, SERVER, True, id="newer"),
        pytest.param("server", NEXT_OTHER, SERVER, False, id="another-clusters-newer"),
        pytest.param("server", NEXT_WORKER, SERVER, False, id="of-a-worker-it-was"),
        pytest.param("worker", NEXT_SERVER, WORKER, False, id="of-a-server-it-was"),
        pytest.param("worker", WORKER, NEXT_WORKER, False, id="a-workers-older"),
        pytest.param("worker", NEXT_WORKER, WORKER, True, id="a-workers-newer"),
    ],
)
def test_installing_again_does_not_undo_a_rotation(
    role: str,
    old: Secret | str,
    new: Secret,
    is_kept: bool,
    given: Given,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = old if isinstance(old, str) else old.reveal()
    given.node.files.write(paths.SECRETS, text, 0o600)
    given.install(SECURED.replace("server\n", f"{role}\n"), new)
    assert given.installed == (text if is_kept else new.reveal())
    assert kept(given.node) == (set() if is_kept else {text})
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("keep")] == [
        f"keep /etc/nodeagent/secrets.json: its keys have been rotated since {given.top}/secrets"
        ".json was made (serial 2, there 0)"
    ] * is_kept
    assert KEY not in caplog.text


def test_a_release_is_compiled_before_it_is_copied() -> None:
    """The agent cannot write to /opt, and would compile all it imports at every start."""
    compiled = []

    class Compiling(Disk):
        def compile(self, directory: Path) -> None:
            assert not self.exists(RELEASE.target)
            compiled.append(directory)

    node = Node(files=Compiling())
    install.install(node.host, None, program=RELEASE)
    assert compiled == [RELEASE.source]
    assert node.files.read(RELEASE.target / "nodeagent/cli.py") == str(RELEASE.source)
    install.install(node.host, None, program=VENV)
    assert compiled == [RELEASE.source], "a venv or a checkout is its owner's"


# -- the parts that touch real files


@pytest.mark.parametrize("self_contained", [True, False], ids=["own-packages", "of-a-venv"])
def test_the_launcher_runs_the_program_it_names(self_contained: bool, tmp_path: Path) -> None:
    (tmp_path / "nodeagent").mkdir()
    (tmp_path / "nodeagent/__init__.py").touch()
    (tmp_path / "nodeagent/cli.py").write_text("def main() -> int:\n    return 42\n")
    program = Program(sys.executable, tmp_path, tmp_path, self_contained)
    launcher = tmp_path / "launcher"
    launcher.write_text(program.launcher)
    launcher.chmod(0o755)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([launcher], env=environment, timeout=30)
    assert done.returncode == 42


def test_a_checkout_or_a_venv_is_referred_to_where_it_is() -> None:
    program = install.running_program()
    assert program == Program(
        sys.executable, Path(install.__file__).parents[1], Path(install.__file__).parents[1], False
    )


def test_neither_spec_nor_secrets_show_in_any_sentence() -> None:
    for change in install.plan(Node().host, SECURED, SERVER, start=True, program=VENV):
        assert "demo" not in f"{change} {change!r}"
        assert KEY not in f"{change} {change!r}"
