"""What the program relies on in the Engine's own program, asked of the fake and of four real ones.

The real ones run in their flavour's root file system under an overlay of their own, with no network
and no Engine beside them: what they touch is what is then in the overlay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nodeagent.adapters.dockerd import Dockerd
from nodeagent.host import Word
from tests.contract.surroundings import needs_root
from tests.lab import images
from tests.lab.flavours import FLAVOURS, flavour
from tests.lab.host import run
from tests.unit.fakes import World, make_spec

PROJECT = Path(__file__).parents[2]
OLD = ("classic", "bookworm")  # Engine 20.10, which does not know --validate
UNIT = ("/usr/sbin/dockerd", "-H", "fd://", "--containerd=/run/containerd/containerd.sock")

# Prints what the adapter says inside; the project is at /mnt, and needs no more than Python here.
PROBE = """
import json, sys
from pathlib import Path
sys.dont_write_bytecode = True
sys.path.insert(0, "/mnt")
from nodeagent.adapters.dockerd import Dockerd
from nodeagent.host import Word
program = Dockerd()
words, texts = json.load(sys.stdin)
command = tuple(Word(word, "unit") for word in words)
said = []
for number, text in enumerate(texts):
    file = Path("/run", f"candidate-{number}.json")
    file.write_text(text)
    file.chmod(0o600)
    said.append(program.refusal(file, command))
    file.unlink()
print(json.dumps([program.version(), program.has_consul(), said]))
"""
INSIDE = """
mount --make-rprivate /
mount -t overlay -o lowerdir="$1",upperdir="$2/upper",workdir="$2/work" overlay "$2/root"
for name in dev proc; do mount --rbind "/$name" "$2/root/$name"; done
mount -t tmpfs tmpfs "$2/root/run"
mount --bind "$3" "$2/root/mnt"
chroot "$2/root" python3 -c "$4"
find "$2/root/run" -mindepth 1 -printf 'touched /run/%P\\n'
"""


@dataclass(frozen=True)
class Said:
    version: str
    has_consul: bool
    refusals: tuple[str, ...]
    touched: tuple[str, ...]


Ask = Callable[..., Said]


def real(name: str, directory: Path) -> Ask:
    def ask(*texts: str, flags: Sequence[str] = ()) -> Said:
        for part in ("upper", "work", "root"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        lower = images.rootfs(flavour(name))
        words = ("unshare", "--mount", "--net", "--ipc", "sh", "-euc", INSIDE, "inside")
        given = json.dumps([[*UNIT, *flags], texts])
        done = run(*words, lower, directory, PROJECT, PROBE, input=given, timeout_s=60)
        first, *touched = done.stdout.splitlines()
        version, has_consul, refusals = json.loads(first)
        upper = directory / "upper"
        found = [path.relative_to(upper) for path in upper.rglob("*")]
        # The overlay has the directories as well in which something was for a while.
        touched += [str(path) for path in found if not (lower / path).is_dir()]
        return Said(version, has_consul, tuple(refusals), tuple(touched))

    return ask


def fake(_name: str, _directory: Path) -> Ask:
    machine = World().machine(make_spec("server"), "10.10.0.11")
    path = Path("/run/nodeagent/daemon.json.candidate")

    def ask(*texts: str, flags: Sequence[str] = ()) -> Said:
        before = dict(machine.files.texts)
        refusals = []
        for text in texts:
            machine.files.write(path, text, 0o600)
            command = tuple(Word(word, "unit") for word in (*UNIT, *flags))
            refusals.append(machine.program.refusal(path, command))
            machine.files.remove(path)
        touched = [str(each) for each in machine.files.texts if each not in before]
        program = machine.program
        return Said(program.version(), program.has_consul(), tuple(refusals), tuple(touched))

    return ask


REAL = [
    pytest.param(real, name, id=name, marks=[pytest.mark.lab, needs_root])
    if name == "trixie"
    else pytest.param(real, name, id=name, marks=[pytest.mark.lab, pytest.mark.full, needs_root])
    for name in FLAVOURS
]
BOTH = pytest.mark.parametrize(("make", "name"), [pytest.param(fake, "", id="fake"), *REAL])
REALLY = pytest.mark.parametrize(("make", "name"), REAL)
Make = Callable[[str, Path], Ask]


@BOTH
def test_good_options_are_not_refused_and_nothing_is_touched(
    make: Make, name: str, tmp_path: Path
) -> None:
    stock = {"log-driver": "json-file", "log-opts": {"max-size": "10m"}, "debug": True}
    said = make(name, tmp_path)("{}", json.dumps(stock))
    assert said.refusals == ("", "")
    assert int(said.version.split(".")[0]) >= 20
    assert said.touched == ()


@REALLY
def test_it_is_the_build_that_its_flavour_names(make: Make, name: str, tmp_path: Path) -> None:
    said = make(name, tmp_path)()
    row = flavour(name)
    assert said.version.startswith(row.engine)
    assert said.has_consul == (row.swarm_mode == "classic")


REFUSED: dict[str, tuple[Any, Sequence[str], str]] = {
    "unknown-key": ({"no-such-option": 1}, (), "don't match any configuration option: no-such-"),
    "wrong-type": ({"debug": "yes"}, (), "json: cannot unmarshal string into Go"),
    "text-for-a-list": ({"dns": "10.0.0.1"}, (), "json: cannot unmarshal string into Go"),
    "hosts-in-both-places": (
        {"hosts": ["tcp://127.0.0.1:2375"]},
        (),
        "specified both as a flag and in the configuration file: hosts",
    ),
    "flag-and-file": ({"debug": True}, ("-D",), "specified both as a flag and in"),
    "label-without-value": ({"labels": ["zone"]}, (), "bad attribute format: zone"),
    "negative": ({"max-concurrent-downloads": -1}, (), "invalid max concurrent downloads: -1"),
    "unknown-flag": ({}, ("--no-such-flag",), "unknown flag: --no-such-flag"),
}


@REALLY
def test_what_it_refuses_it_says_and_touches_nothing(make: Make, name: str, tmp_path: Path) -> None:
    for case, (options, flags, words) in REFUSED.items():
        said = make(name, tmp_path / case)(json.dumps(options), flags=flags)
        assert words in said.refusals[0], case
        assert "\n" not in said.refusals[0]
        assert "candidate" not in said.refusals[0], "the file's real name is another"
        assert said.touched == (), case


@REALLY
def test_what_it_finds_only_when_it_starts_it_does_not_say(
    make: Make, name: str, tmp_path: Path
) -> None:
    """Why the options have rules of our own, and the Engine a way back."""
    late = ({"bip": "10.99.0.1/33"}, {"log-driver": "none-such"}, {"bridge": "none-such"})
    said = make(name, tmp_path)(*map(json.dumps, late))
    assert said.refusals == ("", "", "")


def test_without_a_program() -> None:
    program = Dockerd((Path("/none/dockerd"),))
    assert (program.version(), program.has_consul()) == ("", False)
    assert program.refusal(Path("/none/file"), ()) == "there is no dockerd"
    assert program.networks("/none") == ()
