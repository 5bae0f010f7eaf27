"""Installing again changes nothing; after a kill between any two changes the next run makes up."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from nodeagent import install, paths
from nodeagent.changes import Change, WriteFile
from nodeagent.errors import SpecError
from nodeagent.host import Host, Unit
from nodeagent.install import PENDING, Program

UNITS = Path(__file__).parents[2] / "systemd"
SPEC = "cluster: demo\nrole: server\nservers: 1\naddress: eth1\nsecurity: off\n"
OTHER_SPEC = SPEC.replace("demo", "other")
VENV = Program("/usr/bin/python3", Path("/opt/x"), Path("/opt/x"), False)
NEWER = Program("/usr/bin/python3", Path("/opt/y"), Path("/opt/y"), False)


class Refused(Exception):
    """A call that installing has no reason to make."""


@dataclass
class Node:
    """A node's files and service manager, and nothing else: any other part refuses every call."""

    is_booted: bool = True
    content: dict[Path, str] = field(default_factory=dict)
    directories: set[Path] = field(default_factory=lambda: {Path("/opt/x"), Path("/opt/y")})
    starts: int = 0
    reloads: int = 0

    @property
    def host(self) -> Host:
        parts = {name: cast("Any", Nothing()) for name in Host.__dataclass_fields__}
        return Host(**{**parts, "files": cast("Any", self), "systemd": cast("Any", self)})

    # files

    def read(self, path: Path) -> str | None:
        if path == paths.COMMAND and self.content.get(path) == "a link":
            return self.content.get(paths.LAUNCHER)
        return self.content.get(path, path.read_text() if path.name == "given.yaml" else None)

    def exists(self, path: Path) -> bool:
        return path in self.content or path in self.directories

    def write(self, path: Path, text: str, mode: int | None) -> None:
        secret = path in (paths.SPEC, PENDING) or path.parent == paths.ORIGINALS
        assert mode == (0o600 if secret else 0o755 if path == paths.LAUNCHER else 0o644)
        self.content[path] = text

    def remove(self, path: Path) -> None:
        del self.content[path]

    # systemd

    def is_running(self) -> bool:
        return self.is_booted

    def unit(self, name: str) -> Unit:
        self.booted()
        assert name == paths.AGENT_UNIT
        return Unit("loaded", "active" if self.starts else "inactive")

    def enable(self, name: str) -> None:
        assert paths.UNITS / name in self.content, "enabled before it was there"
        self.content[install.ENABLED] = "a link"

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


def apply(change: Change, node: Node) -> None:
    """Make a change; those of install.py's own that need a real file system are acted out."""
    if isinstance(change, install.LinkCommand):
        node.content[change.path] = "a link"
    elif isinstance(change, install.CopyProgram | install.MakePrivateDirectory):
        node.directories.add(
            change.target if isinstance(change, install.CopyProgram) else change.path
        )
    else:
        change.apply(node.host)


def run(
    node: Node,
    wanted: str | None = None,
    *,
    start: bool = True,
    program: Program = VENV,
    kill_after: int | None = None,
) -> list[str]:
    changes = install.plan(node.host, wanted, start=start, program=program)
    for change in changes[:kill_after]:
        apply(change, node)
    return [str(change) for change in changes]


def test_a_fresh_machine_gets_everything() -> None:
    node = Node()
    assert run(node, SPEC) == [
        "write /run/nodeagent/install-pending",
        "write /opt/nodeagent/nodeagent",
        "link /usr/local/bin/nodeagent to /opt/nodeagent/nodeagent",
        *(f"write /etc/systemd/system/{name}" for name in sorted(os.listdir(UNITS))),
        "make /etc/nodeagent, for root alone",
        "write /etc/nodeagent/node.yaml",
        "enable nodeagent.service",
        "have systemd read its units again",
        "start nodeagent.service, anew if it runs",
        "remove /run/nodeagent/install-pending",
    ]
    assert node.content[paths.SPEC] == SPEC
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
    kept = {text for path, text in node.content.items() if path.parent == paths.ORIGINALS}
    assert kept == {SPEC, OTHER_SPEC}


def test_an_image_is_made_without_a_service_manager() -> None:
    node = Node(is_booted=False)
    sentences = run(node)
    assert "enable nodeagent.service" in sentences
    assert run(node) == []
    assert PENDING not in node.content
    node.is_booted = True
    assert run(node, SPEC)[-2:] == [
        "start nodeagent.service, anew if it runs",
        "remove /run/nodeagent/install-pending",
    ]


@pytest.mark.parametrize("program", [VENV, NEWER], ids=["first-time", "upgrade"])
def test_killed_after_any_change_the_next_run_makes_up_for_it(program: Program) -> None:
    def prepared() -> Node:
        node = Node()
        if program is NEWER:
            run(node, OTHER_SPEC)
        return node

    whole = prepared()
    count = len(run(whole, SPEC, program=program))
    for kill_after in range(count):
        node = prepared()
        before = (node.starts, node.reloads)
        run(node, SPEC, program=program, kill_after=kill_after)
        run(node, SPEC, program=program)
        assert node.content == whole.content, kill_after
        assert node.starts > before[0], kill_after
        assert node.reloads > before[1], kill_after
        assert run(node, SPEC, program=program) == [], kill_after


def test_a_wrong_spec_changes_nothing(tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(SPEC.replace("server\n", "boss\n"))
    node = Node()
    with pytest.raises(SpecError):
        install.install(node.host, given, program=VENV)
    assert (node.content, node.starts) == ({}, 0)


# -- the parts that touch real files


def test_the_program_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    source = tmp_path / "cache/site-packages"
    (source / "nodeagent").mkdir(parents=True)
    (source / "nodeagent/cli.py").write_text("def main() -> int:\n    return 42\n")
    target = tmp_path / "lib/1.0-abc/site-packages"
    left = tmp_path / "lib/.1.0-abc.part/site-packages"
    left.mkdir(parents=True)
    (left / "half.py").touch()
    install.CopyProgram(source, target).apply(Node().host)
    assert sorted(path.name for path in target.rglob("*")) == ["cli.py", "nodeagent"]
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["1.0-abc"]


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


@pytest.mark.parametrize("before", ["nothing", "a-file", "another-link", "a-dead-link"])
def test_the_command_becomes_a_link(before: str, tmp_path: Path) -> None:
    command, launcher = tmp_path / "bin/nodeagent", tmp_path / "launcher"
    launcher.touch()
    command.parent.mkdir()
    if before == "a-file":
        command.write_text("#!/bin/sh\n")
    elif before != "nothing":
        command.symlink_to("/bin/sh" if before == "another-link" else "/nowhere")
    install.LinkCommand(command, launcher).apply(Node().host)
    assert command.readlink() == launcher
    assert [path.name for path in command.parent.iterdir()] == ["nodeagent"]


def test_the_directory_of_the_spec_is_for_root_alone(tmp_path: Path) -> None:
    install.MakePrivateDirectory(tmp_path / "nodeagent").apply(Node().host)
    assert (tmp_path / "nodeagent").stat().st_mode & 0o777 == 0o700


def test_a_checkout_or_a_venv_is_referred_to_where_it_is() -> None:
    program = install.running_program()
    assert program == Program(
        sys.executable, Path(install.__file__).parents[1], Path(install.__file__).parents[1], False
    )


def test_the_spec_shows_in_no_sentence() -> None:
    assert "demo" not in repr(WriteFile(paths.SPEC, SPEC, 0o600))
