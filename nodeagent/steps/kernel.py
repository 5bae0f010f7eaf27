"""The kernel accounts for memory and swap, or it is known why it cannot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nodeagent import paths
from nodeagent.changes import Reboot, RemoveFile, RestartUnit, StartUnit, WriteFile
from nodeagent.host import Host, Unit
from nodeagent.plan import Plan, Step, change, done, wait
from nodeagent.spec import Spec

CGROUP, PROC = Path("/sys/fs/cgroup"), Path("/proc")

# A file that is there only when it works: cgroup v2 has it in every cgroup but the root, such as
# the one units run in; v1 in every one (Documentation/admin-guide: cgroup-v2, cgroup-v1/memory).
SWAP_V2 = CGROUP / "system.slice/memory.swap.max"
MEMORY_V1 = CGROUP / "memory/memory.limit_in_bytes"
SWAP_V1 = CGROUP / "memory/memory.memsw.limit_in_bytes"

# As systemd-detect-virt(1) finds them (https://systemd.io/CONTAINER_INTERFACE/).
CONTAINER_MARKS = ("/run/systemd/container", "/run/.containerenv", "/.dockerenv")

# There as long as an Engine is a member of a Swarm, which one that is down cannot say.
SWARM_STATE = Path("/var/lib/docker/swarm/docker-state.json")
ASKED = "cgroup_enable=memory swapaccount=1"

# What turns it off is taken out: Debian's kernels of today, like all that nobody patched, do not
# know cgroup_enable=, and a cgroup_disable= is final there (docs/decisions/0010).
DROP_IN = rf"""# Put here by nodeagent, for kernel.memory_accounting in {paths.SPEC}.
nodeagent_allow() {{
    printf ' %s ' "$*" | sed -E 's/( cgroup_disable=[^ ]*)\bmemory\b/\1/g
        s/ (cgroup_disable=,*|swapaccount=0) / /g'
}}
GRUB_CMDLINE_LINUX="$(nodeagent_allow "$GRUB_CMDLINE_LINUX"){ASKED}"
GRUB_CMDLINE_LINUX_DEFAULT="$(nodeagent_allow "$GRUB_CMDLINE_LINUX_DEFAULT")"
"""


@dataclass(frozen=True)
class Seen:
    cgroup: str  # v1 | hybrid | v2: where the Engine looks for memory, v1 in hybrid
    memory: bool
    swap: bool
    drop_in: str | None = None
    # The rest is looked at only where one of them is off.
    is_container: bool = False
    release: str = ""
    boot_id: str = ""  # another one with every boot
    command_line: str = ""
    config: str = ""  # the kernel's build configuration; "": not known
    has_grub: bool = False
    grub_config: str = ""
    grub_unit: Unit = Unit("not-found", "inactive")
    rebooted_in: str = ""  # the boot in which the one reboot was asked for
    is_going_down: bool = False
    is_in_cloud_init: bool = False
    is_member: bool = False  # of a Swarm, whose other members it has to mind


def observe(_spec: Spec, host: Host) -> Seen:
    files = host.files

    def text(path: Path) -> str:
        return (files.read(path) or "").strip()

    # Only a root of cgroup v2 has this file; hybrid has one beside the hierarchies of v1.
    if files.exists(CGROUP / "cgroup.controllers"):
        controllers = text(CGROUP / "cgroup.controllers").split()
        cgroup, memory, swap = "v2", "memory" in controllers, files.exists(SWAP_V2)
    else:
        cgroup = "hybrid" if files.exists(CGROUP / "unified/cgroup.controllers") else "v1"
        memory, swap = files.exists(MEMORY_V1), files.exists(SWAP_V1)
    drop_in = files.read(paths.GRUB_DROP_IN)
    if memory and swap:
        return Seen(cgroup, memory, swap, drop_in)
    engine = host.systemd.unit(paths.ENGINE_UNIT)
    info = host.engine.info() if engine.is_active else None
    release = text(PROC / "sys/kernel/osrelease")
    return Seen(
        *(cgroup, memory, swap, drop_in),
        is_container=any(files.exists(Path(mark)) for mark in CONTAINER_MARKS),
        release=release,
        boot_id=text(paths.BOOT_ID),
        command_line=text(PROC / "cmdline"),
        config=text(Path(f"/boot/config-{release}")),
        has_grub=files.exists(paths.UPDATE_GRUB) and files.exists(paths.GRUB_CONFIG),
        grub_config=text(paths.GRUB_CONFIG),
        grub_unit=host.systemd.unit(paths.GRUB_UNIT),
        rebooted_in=text(paths.KERNEL_REBOOT),
        is_going_down=files.exists(paths.REBOOT_ASKED),
        is_in_cloud_init=files.exists(paths.CLOUD_INIT_ENABLED)
        and not files.exists(paths.CLOUD_INIT_RESULT),
        is_member=info.swarm.state != "inactive" if info else files.exists(SWARM_STATE),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    """What cannot be had is said, and blocks nothing: a cluster works without it."""
    if not spec.kernel.memory_accounting:
        return done("memory accounting is as the kernel has it")
    if seen.memory and seen.swap:
        return done(f"memory and swap accounting on (cgroup {seen.cgroup})")
    off = f"{'swap' if seen.memory else 'memory'} accounting is off (cgroup {seen.cgroup})"
    if why := _why_not(seen):
        return done(f"{off} and cannot be had: {why}")
    if not _is_in_grub(seen):
        if seen.drop_in != DROP_IN:
            return change(WriteFile(paths.GRUB_DROP_IN, DROP_IN, 0o644))
        if seen.grub_unit.active == "activating":
            return wait("update-grub to end")
        return change(StartUnit(paths.GRUB_UNIT))
    if spec.kernel.reboot == "never":
        return done(f"{off} until the next reboot, which the spec leaves to you")
    if seen.is_going_down:
        return wait("the reboot that turns it on")
    if seen.is_in_cloud_init:
        return wait("cloud-init to end, before the reboot that turns it on")
    if not seen.rebooted_in:
        return change(WriteFile(paths.KERNEL_REBOOT, f"{seen.boot_id}\n", 0o600))
    if seen.is_member:  # the step `restart` does it, under its lock
        return done(f"{off} until the reboot that turns it on")
    return change(Reboot(paths.REBOOT_ASKED, f"{off}, and is on after it"))


def undo(_spec: Spec, seen: Seen) -> Plan:
    """Take our words from the kernel's next command line. An empty drop-in: GRUB is to know yet."""
    if seen.drop_in is None:
        return done("nothing of ours is on the kernel's command line")
    if seen.drop_in:
        return change(WriteFile(paths.GRUB_DROP_IN, "", 0o644))
    why = "the kernel's command line as it was"
    gone = (RemoveFile(paths.KERNEL_REBOOT), RemoveFile(paths.GRUB_DROP_IN))
    return change(RestartUnit(paths.GRUB_UNIT, why), *gone)


def _why_not(seen: Seen) -> str:
    """Why nothing done here can turn it on, or what has been done already; "" where one can."""
    if seen.is_container:
        return "a container has its host's kernel"
    if seen.rebooted_in not in ("", seen.boot_id):
        return f"still off after the one reboot for it (recorded in {paths.KERNEL_REBOOT})"
    if _asks(seen.command_line):
        return f"the kernel was started with {ASKED}"
    if seen.memory and not _heeds_swapaccount(seen):
        return f"kernel {seen.release} has no switch for it"
    lines = seen.config.splitlines()
    if lines and "CONFIG_MEMCG=y" not in lines:
        return f"kernel {seen.release} is built without it"
    if seen.cgroup != "v2" and "# CONFIG_MEMCG_V1 is not set" in lines:
        return f"kernel {seen.release} has it for cgroup v2 alone"
    if not seen.has_grub:
        return f"there is no GRUB here to start the kernel with {ASKED}"
    if not seen.grub_unit.exists or seen.grub_unit.active == "failed":
        return f"update-grub fails (systemctl status {paths.GRUB_UNIT})"
    if seen.grub_unit.is_active and not _is_in_grub(seen):  # it has run in this boot
        return f"update-grub makes nothing of {paths.GRUB_DROP_IN}"
    return ""


def _heeds_swapaccount(seen: Seen) -> bool:
    """Whether swapaccount=1 turns on what is off here."""
    # It can be off by default before Linux 5.8 (commit 2d1c498072de), and by swapaccount=0 before
    # 6.1 (b25806dcd3d5).
    if seen.config and "CONFIG_MEMCG_SWAP=y" not in seen.config.splitlines():
        return False
    version = tuple(map(int, re.findall(r"\d+", seen.release)[:2]))
    return version < ((6, 1) if "swapaccount=0" in seen.command_line.split() else (5, 8))


def _asks(command_line: str) -> bool:
    words = command_line.split()
    refusal = re.compile(r"cgroup_disable=(.*,)?memory(,|$)|swapaccount=0$")
    return set(ASKED.split()) <= set(words) and not any(map(refusal.match, words))


def _is_in_grub(seen: Seen) -> bool:
    """Whether it is in the first entry, which is the one that GRUB boots."""
    first = re.search(r"^\s*linux(16|efi)?\s(.*)", seen.grub_config, re.MULTILINE)
    return first is not None and _asks(first[2])


STEP = Step("kernel", requires=("identity",), observe=observe, diff=diff, undo=undo)
