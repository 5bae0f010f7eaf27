"""Memory and swap accounting: facts in, plan out; and whatever dies, one reboot at the most."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nodeagent import paths
from nodeagent.changes import Change
from nodeagent.converge import StepResult, run_cycle
from nodeagent.errors import HostError, SpecError
from nodeagent.host import Host, Unit
from nodeagent.spec import Spec, dump, parse
from nodeagent.steps import identity, kernel
from nodeagent.steps.kernel import ASKED, CGROUP, DROP_IN, MEMORY_V1, PROC, SWAP_V1, SWAP_V2, Seen
from tests.unit.expect import said
from tests.unit.fakes import FakeSystemd, Machine, World, make_spec

SPEC = make_spec()
NEVER = make_spec(kernel="{reboot: never}")
OFF = make_spec(kernel="{memory_accounting: false}")

UNIT = Unit("loaded", "inactive", "", "static")
HAS_RUN = replace(UNIT, active="active", result="success")
PLAIN = "\tlinux /boot/vmlinuz root=/dev/vda1 ro quiet\n"
MENU = f"set timeout=0\nmenuentry 'Debian' {{\n{PLAIN}\tinitrd /boot/initrd.img\n}}\n"
MENU_ASKS = MENU.replace("quiet", f"{ASKED} quiet")
DEBIAN_13 = "CONFIG_MEMCG=y\n# CONFIG_MEMCG_V1 is not set\n"
DEBIAN_11 = "CONFIG_MEMCG=y\nCONFIG_MEMCG_SWAP=y\n"

# Debian 13 as it is: on. And with the controller disabled by its command line.
ON = Seen("v2", memory=True, swap=True)
GONE = Seen(
    "v2",
    memory=False,
    swap=False,
    release="6.12.107+deb13-cloud-amd64",
    boot_id="boot-1",
    command_line="root=/dev/vda1 ro cgroup_disable=memory",
    config=DEBIAN_13,
    has_grub=True,
    grub_config=MENU,
    grub_unit=UNIT,
)
WRITTEN = replace(GONE, drop_in=DROP_IN)
READY = replace(WRITTEN, grub_config=MENU_ASKS, grub_unit=HAS_RUN)
RECORDED = replace(READY, rebooted_in="boot-1")
V1 = replace(GONE, cgroup="v1", config=DEBIAN_11, release="5.10.0-30-amd64")
# Ubuntu 18.04 and 20.04: memory is on by default, swap is not.
OLD = replace(V1, memory=True, release="5.4.0-150-generic", command_line="root=/dev/vda1 ro")

WRITE = ["do write /etc/default/grub.d/99-nodeagent.cfg"]
START = ["do start nodeagent-grub.service"]
RECORD = ["do write /var/lib/nodeagent/kernel-reboot"]
REBOOT = ["do reboot this machine: memory accounting is off (cgroup v2), and is on after it"]
CANNOT = "done memory accounting is off (cgroup v2) and cannot be had: "
CANNOT_V1 = CANNOT.replace("v2", "v1")
NO_SWAP = "done swap accounting is off (cgroup v2) and cannot be had: "
TRIED = f"{CANNOT}still off after the one reboot for it (recorded in {paths.KERNEL_REBOOT})"
LEFT_TO_YOU = "done memory accounting is off (cgroup v2) until the next reboot, which the spec "
V2_ALONE = "kernel 6.12.107+deb13-cloud-amd64 has it for cgroup v2 alone"


@pytest.mark.parametrize(
    ("spec", "seen", "plan"),
    [
        # on
        pytest.param(SPEC, ON, ["done memory and swap accounting on (cgroup v2)"], id="v2"),
        pytest.param(
            SPEC,
            replace(ON, cgroup="v1"),
            ["done memory and swap accounting on (cgroup v1)"],
            id="v1",
        ),
        pytest.param(
            NEVER,
            replace(ON, cgroup="hybrid"),
            ["done memory and swap accounting on (cgroup hybrid)"],
            id="hybrid",
        ),
        pytest.param(
            SPEC,
            replace(READY, memory=True, swap=True, rebooted_in="boot-0"),
            ["done memory and swap accounting on (cgroup v2)"],
            id="on-after-our-reboot",
        ),
        # not asked for
        pytest.param(OFF, GONE, ["done memory accounting is as the kernel has it"], id="not-asked"),
        # off, and can be turned on
        pytest.param(SPEC, GONE, WRITE, id="disabled-by-the-command-line"),
        pytest.param(SPEC, replace(GONE, drop_in="GRUB_X=1\n"), WRITE, id="older-drop-in"),
        pytest.param(SPEC, WRITTEN, START, id="killed-before-update-grub"),
        pytest.param(
            SPEC,
            replace(WRITTEN, grub_unit=replace(UNIT, active="activating")),
            ["wait update-grub to end"],
            id="update-grub-still-runs",
        ),
        pytest.param(
            SPEC, replace(WRITTEN, grub_config=""), START, id="power-cut-while-grub-cfg-was-written"
        ),
        pytest.param(SPEC, READY, RECORD, id="killed-before-the-record"),
        pytest.param(
            SPEC, replace(READY, drop_in=None, grub_unit=UNIT), RECORD, id="asked-for-by-the-owner"
        ),
        pytest.param(SPEC, RECORDED, REBOOT, id="killed-before-the-reboot"),
        pytest.param(
            SPEC,
            replace(RECORDED, is_going_down=True),
            ["wait the reboot that turns it on"],
            id="going-down",
        ),
        pytest.param(
            SPEC,
            replace(READY, is_in_cloud_init=True),
            ["wait cloud-init to end, before the reboot that turns it on"],
            id="first-boot-still-runs",
        ),
        pytest.param(
            SPEC, replace(GONE, is_in_cloud_init=True), WRITE, id="grub-need-not-wait-for-that"
        ),
        pytest.param(SPEC, V1, WRITE, id="v1-disabled"),
        pytest.param(SPEC, replace(V1, cgroup="hybrid"), WRITE, id="hybrid-disabled"),
        pytest.param(SPEC, replace(V1, config=""), WRITE, id="v1-build-not-known"),
        pytest.param(
            SPEC,
            replace(GONE, config="", command_line="quiet"),
            WRITE,
            id="off-nobody-knows-why",
        ),
        pytest.param(
            SPEC,
            replace(GONE, command_line=f"cgroup_disable=cpu,memory {ASKED}"),
            WRITE,
            id="asked-and-disabled-in-a-list",
        ),
        pytest.param(
            SPEC,
            replace(WRITTEN, grub_config=MENU_ASKS.replace("quiet", "cgroup_disable=memory")),
            START,
            id="grub-asks-and-disables",
        ),
        pytest.param(
            SPEC,
            replace(WRITTEN, grub_config=MENU + MENU_ASKS),
            START,
            id="asked-in-another-entry-than-the-first",
        ),
        # a reboot is not allowed
        pytest.param(NEVER, GONE, WRITE, id="never-writes-all-the-same"),
        pytest.param(NEVER, WRITTEN, START, id="never-and-update-grub"),
        pytest.param(NEVER, READY, [f"{LEFT_TO_YOU}leaves to you"], id="never-leaves-it-pending"),
        pytest.param(
            NEVER,
            replace(READY, is_in_cloud_init=True),
            [f"{LEFT_TO_YOU}leaves to you"],
            id="never-waits-for-nothing",
        ),
        pytest.param(
            NEVER,
            replace(READY, command_line=f"quiet {ASKED}"),
            [f"{CANNOT}the kernel was started with {ASKED}"],
            id="never-and-the-owner-rebooted-in-vain",
        ),
        # tried
        pytest.param(
            SPEC,
            replace(RECORDED, boot_id="boot-2", command_line=f"quiet {ASKED}"),
            [TRIED],
            id="still-off",
        ),
        pytest.param(
            SPEC, replace(RECORDED, boot_id="boot-2"), [TRIED], id="booted-by-something-else"
        ),
        pytest.param(
            SPEC,
            replace(RECORDED, boot_id="boot-3", release="6.13.0", grub_config=MENU, drop_in=None),
            [TRIED],
            id="another-kernel-later",
        ),
        pytest.param(
            SPEC,
            replace(READY, command_line=f"quiet {ASKED}"),
            [f"{CANNOT}the kernel was started with {ASKED}"],
            id="power-cut-did-the-reboot-and-still-off",
        ),
        # cannot be had
        pytest.param(
            SPEC,
            replace(GONE, cgroup="v1"),
            [f"{CANNOT_V1}{V2_ALONE}"],
            id="v1-on-a-kernel-without-it",
        ),
        pytest.param(
            SPEC,
            replace(GONE, cgroup="hybrid", command_line="systemd.unified_cgroup_hierarchy=0"),
            [f"{CANNOT.replace('v2', 'hybrid')}{V2_ALONE}"],
            id="hybrid-on-a-kernel-without-it",
        ),
        pytest.param(
            SPEC,
            replace(GONE, config="# CONFIG_MEMCG is not set\n"),
            [f"{CANNOT}kernel 6.12.107+deb13-cloud-amd64 is built without it"],
            id="built-without-it",
        ),
        pytest.param(
            SPEC,
            replace(GONE, is_container=True),
            [f"{CANNOT}a container has its host's kernel"],
            id="in-a-container",
        ),
        pytest.param(
            SPEC,
            replace(RECORDED, is_container=True),
            [f"{CANNOT}a container has its host's kernel"],
            id="a-disk-now-in-a-container-does-not-reboot",
        ),
        pytest.param(
            SPEC,
            replace(GONE, has_grub=False, grub_config=""),
            [f"{CANNOT}there is no GRUB here to start the kernel with {ASKED}"],
            id="no-grub",
        ),
        pytest.param(
            SPEC,
            replace(WRITTEN, grub_unit=replace(UNIT, active="failed", result="exit-code")),
            [f"{CANNOT}update-grub fails (systemctl status nodeagent-grub.service)"],
            id="update-grub-fails",
        ),
        pytest.param(
            SPEC,
            replace(GONE, grub_unit=Unit("not-found", "inactive")),
            [f"{CANNOT}update-grub fails (systemctl status nodeagent-grub.service)"],
            id="installed-by-an-older-version",
        ),
        pytest.param(
            SPEC,
            replace(WRITTEN, grub_unit=HAS_RUN),
            [f"{CANNOT}update-grub makes nothing of /etc/default/grub.d/99-nodeagent.cfg"],
            id="a-grub-cfg-of-the-owners-own",
        ),
        pytest.param(
            SPEC,
            replace(GONE, grub_unit=HAS_RUN),
            [f"{CANNOT}update-grub makes nothing of /etc/default/grub.d/99-nodeagent.cfg"],
            id="taken-away-again-in-this-boot",
        ),
        # swap alone
        pytest.param(SPEC, OLD, WRITE, id="old-kernel-without-swap"),
        pytest.param(SPEC, replace(OLD, cgroup="v2"), WRITE, id="old-kernel-without-swap-v2"),
        pytest.param(SPEC, replace(OLD, config=""), WRITE, id="old-kernel-build-not-known"),
        pytest.param(
            SPEC,
            replace(OLD, config="CONFIG_MEMCG=y\n# CONFIG_MEMCG_SWAP is not set\n"),
            [f"{NO_SWAP.replace('v2', 'v1')}kernel 5.4.0-150-generic has no switch for it"],
            id="old-kernel-built-without-swap",
        ),
        pytest.param(
            SPEC,
            replace(OLD, release="5.10.0-30-amd64"),
            [f"{NO_SWAP.replace('v2', 'v1')}kernel 5.10.0-30-amd64 has no switch for it"],
            id="5.10-has-it-on-unless-told-so",
        ),
        pytest.param(
            SPEC,
            replace(OLD, release="5.10.0-30-amd64", command_line="swapaccount=0"),
            WRITE,
            id="5.10-told-so",
        ),
        pytest.param(
            SPEC,
            replace(
                OLD, cgroup="v2", release="6.1.0-50-amd64", command_line="swapaccount=0", config=""
            ),
            [f"{NO_SWAP}kernel 6.1.0-50-amd64 has no switch for it"],
            id="6.1-does-not-listen",
        ),
        pytest.param(
            SPEC,
            replace(GONE, memory=True, release="6.12.107", config="", command_line="swapaccount=0"),
            [f"{NO_SWAP}kernel 6.12.107 has no switch for it"],
            id="6.12-does-not-listen",
        ),
        pytest.param(
            SPEC,
            replace(OLD, boot_id="boot-2", command_line=ASKED, rebooted_in="boot-1"),
            [TRIED.replace("memory accounting", "swap accounting").replace("v2", "v1")],
            id="swap-still-off",
        ),
    ],
)
def test_plan(spec: Spec, seen: Seen, plan: list[str]) -> None:
    assert said(kernel.diff(spec, seen)) == plan


# -- what the spec says


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("{}", (True, "once"), id="nothing"),
        pytest.param("{memory_accounting: true, reboot: once}", (True, "once"), id="the-defaults"),
        pytest.param("{memory_accounting: false}", (False, "once"), id="off"),
        pytest.param("{memory_accounting: off, reboot: never}", (False, "never"), id="yaml-1.1"),
    ],
)
def test_the_spec(text: str, wanted: tuple[bool, str]) -> None:
    found = make_spec(kernel=text)
    assert (found.kernel.memory_accounting, found.kernel.reboot) == wanted
    assert type(found.kernel.memory_accounting) is bool
    assert parse(yaml.safe_dump(dump(found)), "dumped", Spec) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param(
            "{memory_accounting: 'false'}",
            "kernel.memory_accounting: found 'false'; allowed: true or false "
            "(one of the two, without quotes)",
            id="in-quotes",
        ),
        pytest.param(
            "{memory_accounting: 1}",
            "kernel.memory_accounting: found 1; allowed: true or false "
            "(one of the two, without quotes)",
            id="a-number",
        ),
        pytest.param(
            "{reboot: off}", "kernel.reboot: found false; allowed: once or never", id="reboot-off"
        ),
        pytest.param("{reboot: always}", "allowed: once or never", id="reboot-always"),
    ],
)
def test_a_mistake_in_the_spec(text: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=re.escape(sentence)):
        make_spec(kernel=text)


# -- whole machines

Kernel = Callable[[str], tuple[bool, bool]]  # what is on, memory and swap, by the command line


def debian_13(command_line: str) -> tuple[bool, bool]:
    """As booted in QEMU: nothing outdoes cgroup_disable=."""
    is_on = "cgroup_disable=memory" not in command_line
    return is_on, is_on


def ubuntu_20(command_line: str) -> tuple[bool, bool]:
    return True, "swapaccount=1" in command_line


def never_on(_command_line: str) -> tuple[bool, bool]:
    return False, False


class GrubSystemd(FakeSystemd):
    """One whose update-grub does what the real one does with the drop-in."""

    machine: Droplet

    def start(self, name: str) -> None:
        was = self.unit(name).is_active
        super().start(name)
        if name == paths.GRUB_UNIT and not was and self.machine.has_generator:
            self.machine.update_grub()

    def reboot(self) -> None:
        super().reboot()
        self.machine.reboots_asked_in.append(self.machine.boot_number)


class Droplet(Machine):
    """A machine with a kernel, GRUB, and a command line that is the owner's."""

    def __init__(self, kernel: Kernel, cgroup: str = "v2", *, boots_grub: bool = True) -> None:
        super().__init__(World(), SPEC, "server11", "10.10.0.11")
        self.kernel, self.cgroup, self.boots_grub = kernel, cgroup, boots_grub
        self.has_generator = True
        self.boot_number = 0
        self.reboots_asked_in: list[int] = []
        self.own = "quiet cgroup_disable=memory" if kernel is debian_13 else "quiet"
        self.release = "5.4.0-150-generic" if kernel is ubuntu_20 else "6.12.107+deb13"
        self.systemd = GrubSystemd(self)
        self.host = replace(self.host, systemd=self.systemd)
        self.files.texts[paths.UPDATE_GRUB] = "#!/bin/sh\n"
        self.files.texts[Path(f"/boot/config-{self.release}")] = (
            DEBIAN_11 if kernel is ubuntu_20 else DEBIAN_13
        )
        self.update_grub()
        self.boot()

    def update_grub(self) -> None:
        words = self.own
        if paths.GRUB_DROP_IN in self.files.texts:
            words = f"{words.replace('cgroup_disable=memory', '')} {ASKED}"
        self.files.texts[paths.GRUB_CONFIG] = MENU.replace("quiet", words)

    def boot(self) -> None:
        super().boot()
        self.boot_number += 1
        texts = self.files.texts
        entry = texts[paths.GRUB_CONFIG].partition("linux /boot/vmlinuz ")[2].partition("\n")[0]
        command_line = entry if self.boots_grub else f"root=/dev/vda1 ro {self.own}"
        memory, swap = self.kernel(command_line)
        v2 = self.cgroup == "v2"
        controllers = "cpu memory pids\n" if memory else "cpu pids\n"
        for path, text in {
            PROC / "cmdline": f"BOOT_IMAGE=/boot/vmlinuz {command_line}\n",
            PROC / "sys/kernel/osrelease": f"{self.release}\n",
            PROC / "sys/kernel/random/boot_id": f"boot-{self.boot_number}\n",
            CGROUP / "cgroup.controllers": controllers if v2 else None,
            CGROUP / "unified/cgroup.controllers": "" if self.cgroup == "hybrid" else None,
            SWAP_V2: "max\n" if v2 and swap else None,
            MEMORY_V1: "1\n" if not v2 and memory else None,
            SWAP_V1: "1\n" if not v2 and swap else None,
        }.items():
            texts.pop(path, None)
            if text is not None:
                texts[path] = text

    @property
    def is_going_down(self) -> bool:
        return paths.REBOOT_ASKED in self.files.texts

    def reboot(self) -> None:
        self.lose_power()
        self.boot()

    def cycle(
        self, spec: Spec = SPEC, apply: Callable[[Change, Host], None] | None = None
    ) -> StepResult:
        steps = (identity.STEP, kernel.STEP)
        return run_cycle(spec, self.host, steps, lambda _: None, apply).results[1]

    def converge(self, spec: Spec = SPEC) -> StepResult:
        """Until the step is done, through as many reboots as it asks for."""
        for _ in range(8):
            result = self.cycle(spec)
            if result.state == "done":
                return result
            if self.is_going_down:
                self.reboot()
        raise AssertionError(result)


ALL_ON = "memory and swap accounting on (cgroup v2)"
TRIED_SENTENCE = TRIED.removeprefix("done ")


@pytest.mark.parametrize(
    ("machine", "reboots", "sentence"),
    [
        pytest.param(lambda: Droplet(lambda _: (True, True)), 0, ALL_ON, id="stock"),
        pytest.param(lambda: Droplet(debian_13), 1, ALL_ON, id="disabled"),
        pytest.param(
            lambda: Droplet(ubuntu_20, "hybrid"), 1, ALL_ON.replace("v2", "hybrid"), id="old-hybrid"
        ),
        pytest.param(
            lambda: Droplet(ubuntu_20, "v1"), 1, ALL_ON.replace("v2", "v1"), id="old-kernel-v1"
        ),
        pytest.param(lambda: Droplet(never_on), 1, TRIED_SENTENCE, id="never-on"),
        pytest.param(
            lambda: Droplet(debian_13, boots_grub=False), 1, TRIED_SENTENCE, id="external-kernel"
        ),
        pytest.param(
            lambda: Droplet(never_on, "v1"),
            0,
            "memory accounting is off (cgroup v1) and cannot be had: "
            "kernel 6.12.107+deb13 has it for cgroup v2 alone",
            id="kernel-that-cannot",
        ),
    ],
)
def test_a_machine_ends_right_after_at_most_one_reboot(
    machine: Callable[[], Droplet], reboots: int, sentence: str
) -> None:
    droplet = machine()
    assert droplet.converge().sentence == sentence
    assert len(droplet.reboots_asked_in) == reboots
    for _ in range(3):  # and whoever reboots it later, nothing more is done
        droplet.reboot()
        before = dict(droplet.files.texts)
        assert droplet.cycle().sentence == sentence
        assert droplet.files.texts == before
    assert len(droplet.reboots_asked_in) == reboots


class Killed(BaseException):
    """kill -9: nothing in the program may catch it."""


def killer(after: int, *, in_the_middle: bool) -> Callable[[Change, Host], None]:
    """Make `after` changes, then die: before the next one, or when it has worked untold."""
    left = itertools.count(after, -1)

    def apply(change: Change, host: Host) -> None:
        if next(left) > 0:
            change.apply(host)
            return
        if in_the_middle:
            if str(change).startswith("reboot"):
                host.systemd.reboot()  # asked for, and nothing of it on record in /run
            else:
                change.apply(host)
        raise Killed

    return apply


@pytest.mark.parametrize("death", ["agent", "power"])
@pytest.mark.parametrize("in_the_middle", [False, True])
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        pytest.param(lambda: Droplet(debian_13), ALL_ON, id="can"),
        pytest.param(lambda: Droplet(never_on), "", id="cannot"),
        pytest.param(lambda: Droplet(debian_13, boots_grub=False), TRIED_SENTENCE, id="external"),
    ],
)
def test_killed_at_any_change_there_is_one_reboot_at_most(
    machine: Callable[[], Droplet], sentence: str, after: int, in_the_middle: bool, death: str
) -> None:
    droplet = machine()
    droplet.cycle(OFF)  # identity has made its change
    with pytest.raises(Killed):
        droplet.cycle(SPEC, killer(after, in_the_middle=in_the_middle))
    if death == "power":
        droplet.reboot()
    result = droplet.converge()
    # In one boot it may be asked for twice, which is one reboot to systemd.
    assert len(set(droplet.reboots_asked_in)) <= 1
    assert sentence in result.sentence
    assert result.sentence == ALL_ON or "cannot be had" in result.sentence


def test_four_changes_lead_to_the_reboot() -> None:
    """What the test above kills between."""
    made: list[str] = []

    def apply(change: Change, host: Host) -> None:
        made.append(type(change).__name__)
        change.apply(host)

    droplet = Droplet(debian_13)
    droplet.cycle(OFF)
    assert droplet.cycle(SPEC, apply).state == "waiting"
    assert made == ["WriteFile", "StartUnit", "WriteFile", "Reboot"]


def test_power_lost_while_update_grub_writes() -> None:
    droplet = Droplet(debian_13)
    droplet.files.texts[paths.GRUB_DROP_IN] = DROP_IN
    droplet.files.texts[paths.GRUB_CONFIG] = ""  # whatever else boots it then
    droplet.boots_grub = False
    droplet.reboot()
    droplet.boots_grub = True
    assert droplet.converge().sentence == ALL_ON
    assert len(droplet.reboots_asked_in) == 1


def test_a_refused_reboot_fails_the_step_and_is_asked_for_again() -> None:
    droplet = Droplet(debian_13)

    def refuse() -> None:
        raise HostError("run systemctl reboot for", "reboot", "Operation inhibited by apt")

    allowed, droplet.systemd.reboot = droplet.systemd.reboot, refuse  # type: ignore[method-assign]
    assert droplet.cycle().state == "failing"
    assert not droplet.is_going_down
    droplet.systemd.reboot = allowed  # type: ignore[method-assign]
    assert droplet.converge().sentence == ALL_ON


def test_a_failing_update_grub_does_not_hold_up_the_node() -> None:
    droplet = Droplet(debian_13)
    droplet.systemd.failing[paths.GRUB_UNIT] = ("no device",)
    assert droplet.cycle().state == "failing"
    result = droplet.cycle()
    assert (result.state, result.sentence) == (
        "done",
        "memory accounting is off (cgroup v2) and cannot be had: "
        "update-grub fails (systemctl status nodeagent-grub.service)",
    )
    assert droplet.reboots_asked_in == []


def test_a_grub_cfg_that_nothing_is_made_of_is_made_once() -> None:
    droplet = Droplet(debian_13)
    droplet.has_generator = False
    result = droplet.cycle()
    assert result.state == "done"
    assert "makes nothing of" in result.sentence
    assert droplet.reboots_asked_in == []


def test_cloud_init_is_not_cut_off() -> None:
    droplet = Droplet(debian_13)
    droplet.files.texts[paths.CLOUD_INIT_ENABLED] = ""
    assert droplet.cycle().sentence == "cloud-init to end, before the reboot that turns it on"
    assert droplet.files.read(paths.KERNEL_REBOOT) is None
    droplet.files.texts[paths.CLOUD_INIT_RESULT] = "{}"
    assert droplet.converge().sentence == ALL_ON


def test_a_reboot_left_to_the_owner_turns_it_on() -> None:
    droplet = Droplet(debian_13)
    assert droplet.converge(NEVER).sentence.endswith("which the spec leaves to you")
    assert not droplet.files.exists(paths.KERNEL_REBOOT)
    droplet.reboot()
    assert droplet.converge(NEVER).sentence == ALL_ON
    assert droplet.reboots_asked_in == []


def test_a_member_of_a_swarm_reboots_when_it_is_its_turn() -> None:
    assert said(kernel.diff(SPEC, replace(RECORDED, is_member=True))) == [
        "done memory accounting is off (cgroup v2) until the reboot that turns it on"
    ]


def test_what_was_put_into_grub_is_taken_out_again_whenever_it_dies() -> None:
    for made in range(5):
        droplet = Droplet(debian_13)
        droplet.converge()
        droplet.reboot()
        before = droplet.files.texts[paths.GRUB_CONFIG]
        assert ASKED in before
        with contextlib.suppress(Killed):
            undone(droplet, made)
        droplet.lose_power()
        droplet.boot()
        assert undone(droplet).sentence == "nothing of ours is on the kernel's command line"
        assert not droplet.files.exists(paths.GRUB_DROP_IN)
        assert not droplet.files.exists(paths.KERNEL_REBOOT)


def undone(droplet: Droplet, die_after: int = 99) -> StepResult:
    def apply(change: Change, host: Host) -> None:
        nonlocal die_after
        if die_after == 0:
            raise Killed
        die_after -= 1
        change.apply(host)

    steps = (replace(kernel.STEP, requires=(), diff=kernel.undo),)
    return run_cycle(SPEC, droplet.host, steps, lambda _: None, apply).results[0]


@pytest.mark.parametrize("mark", kernel.CONTAINER_MARKS)
def test_a_container_is_known_by_its_mark(mark: str) -> None:
    droplet = Droplet(debian_13)
    droplet.files.texts[Path(mark)] = ""
    assert droplet.cycle().sentence.endswith("a container has its host's kernel")
    assert not droplet.files.exists(paths.GRUB_DROP_IN)


@pytest.mark.parametrize("missing", [paths.UPDATE_GRUB, paths.GRUB_CONFIG])
def test_a_machine_that_grub_does_not_boot_is_left_alone(missing: Path) -> None:
    droplet = Droplet(debian_13)
    del droplet.files.texts[missing]
    assert "there is no GRUB here" in droplet.cycle().sentence
    assert not droplet.files.exists(paths.GRUB_DROP_IN)


# -- the drop-in, as grub-mkconfig reads it


@pytest.mark.parametrize(
    ("linux", "default", "booted"),
    [
        pytest.param("", "quiet", f"{ASKED} quiet", id="debian"),
        pytest.param("", "", ASKED, id="empty"),
        pytest.param("console=ttyS0", "quiet", f"console=ttyS0 {ASKED} quiet", id="cloud-image"),
        pytest.param("cgroup_disable=memory", "", ASKED, id="disabled"),
        pytest.param("", "a cgroup_disable=memory b", f"{ASKED} a b", id="disabled-in-default"),
        pytest.param(
            "cgroup_disable=cpu,memory", "", f"cgroup_disable=cpu, {ASKED}", id="in-a-list"
        ),
        pytest.param(
            "cgroup_disable=memory,cpu", "", f"cgroup_disable=,cpu {ASKED}", id="first-in-a-list"
        ),
        pytest.param(
            "cgroup_disable=memory x cgroup_disable=memory", "", f"x {ASKED}", id="disabled-twice"
        ),
        pytest.param("swapaccount=0 x=1", "swapaccount=0", f"x=1 {ASKED}", id="swap-off"),
        pytest.param("swapaccount=1", "", f"swapaccount=1 {ASKED}", id="asked-before"),
        pytest.param("cgroup_disable=pressure", "", f"cgroup_disable=pressure {ASKED}", id="other"),
        pytest.param('a="b c" $x \\d', "", f'a="b c" $x \\d {ASKED}', id="quotes-stay"),
    ],
)
def test_the_drop_in(linux: str, default: str, booted: str, tmp_path: Path) -> None:
    (tmp_path / "99-nodeagent.cfg").write_text(DROP_IN)
    read = subprocess.run(
        # As grub-mkconfig does (its lines 1 and 163), and 10_linux then.
        [
            *("sh", "-e", "-c"),
            '. "$0"; printf "%s\\n" "$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"',
            str(tmp_path / "99-nodeagent.cfg"),
        ],
        env={"GRUB_CMDLINE_LINUX": linux, "GRUB_CMDLINE_LINUX_DEFAULT": default, "PATH": "/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert read.stdout.split() == booted.split()
    assert kernel._asks(read.stdout)
