"""What the kernel step reads, on this box and in a lab machine, against the same seen another way.

What update-grub makes of the drop-in and a reboot need a whole machine: with the images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nodeagent.adapters.files import LocalFiles
from nodeagent.host import Host
from nodeagent.steps import kernel
from nodeagent.steps.kernel import Seen
from tests.contract.surroundings import needs_root
from tests.unit.fakes import World, make_spec

SPEC = make_spec()


class Except(LocalFiles):
    """This box's files, of which some are not there."""

    def __init__(self, *missing: Path) -> None:
        self.missing = missing

    def exists(self, path: Path) -> bool:
        return path not in self.missing and super().exists(path)


def this_box(files: LocalFiles) -> Host:
    return replace(World().machine(SPEC, "10.10.0.11").host, files=files)


def seen(files: LocalFiles) -> Seen:
    found = kernel.observe(SPEC, this_box(files))
    assert found is not None
    return found


# Whatever accounting there is here, the step now finds none and looks at everything.
ALL_OFF = Except(kernel.SWAP_V1, kernel.SWAP_V2)


def type_of(path: Path) -> str:
    """The type of file system, as the kernel says it to statfs(2)."""
    told = subprocess.run(
        ["stat", "--file-system", "--format=%T", path], capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


def test_the_cgroup_version_is_the_one_of_the_file_system() -> None:
    is_v2 = type_of(kernel.CGROUP) == "cgroup2fs"
    unified = kernel.CGROUP / "unified"
    is_hybrid = not is_v2 and unified.is_dir() and type_of(unified) == "cgroup2fs"
    assert seen(LocalFiles()).cgroup == ("v2" if is_v2 else "hybrid" if is_hybrid else "v1")


@needs_root
def test_what_is_said_to_be_on_limits_a_cgroup() -> None:
    """A limit that is set is read back; where it cannot be set, it was said to be off."""
    found = seen(LocalFiles())
    if found.cgroup == "v2":
        top, names = Path("/sys/fs/cgroup/system.slice"), ("memory.max", "memory.swap.max")
    else:
        top = Path("/sys/fs/cgroup/memory")
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    probe = top / f"nodeagent-contract-{os.getpid()}"
    limits = []
    if top.is_dir():
        probe.mkdir()
    try:
        for name in names:
            try:
                (probe / name).write_text("67108864")
                limits.append((probe / name).read_text().strip() == "67108864")
            except OSError:
                limits.append(False)
    finally:
        if probe.is_dir():
            probe.rmdir()
    assert [found.memory, found.swap] == limits


def test_the_kernel_is_this_one() -> None:
    found = seen(ALL_OFF)
    with open("/proc/cmdline", encoding="utf-8") as file:
        assert found.command_line == file.read().strip()
    assert found.release == os.uname().release
    assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(found.boot_id) == 36
    config = Path(f"/boot/config-{found.release}")
    assert bool(found.config) == config.exists()


@pytest.mark.skipif(not shutil.which("systemd-detect-virt"), reason="no systemd-detect-virt here")
def test_a_container_is_what_systemd_calls_one() -> None:
    told = subprocess.run(
        ["systemd-detect-virt", "--container"], capture_output=True, text=True, check=False
    )
    # It finds others by what only their own kernel or first process tells.
    by_mark = {"docker", "podman", "systemd-nspawn", "lxc"}
    assert seen(ALL_OFF).is_container == (told.stdout.strip() in by_mark)


def test_grub_is_here_or_not() -> None:
    needed = (Path("/usr/sbin/update-grub"), Path("/boot/grub/grub.cfg"))
    found = seen(ALL_OFF)
    assert found.has_grub == all(path.exists() for path in needed)
    assert bool(found.grub_config) == found.has_grub
