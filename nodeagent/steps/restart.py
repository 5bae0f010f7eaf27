"""The cluster's Engines are restarted one at a time, each while it can be spared.

The step `engine` has written new options, or `kernel` a new command line; a member of the Swarm
waits here until it holds the cluster's lock, restarts its Engine or reboots, and lets go when it is
a healthy member again. The lock hangs on a session of Consul: a holder that dies loses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nodeagent import paths
from nodeagent.changes import Reboot, ReleaseLock, RestartUnderLock, TakeLock
from nodeagent.host import Entry, Host
from nodeagent.plan import Plan, Step, change, done, wait
from nodeagent.spec import Spec
from nodeagent.steps.engine import Pending

# Longer than an Engine may take with options that it hangs over, and its restart with the old ones.
# A machine that dies loses its sessions at once, with its health check.
LOCK_TTL_S = 180


def lock_key(spec: Spec) -> str:
    return f"{spec.key_prefix}engine-restart"


@dataclass(frozen=True)
class Seen:
    node: str
    pending: Pending | None
    began_s: float
    lock: Entry | None
    managers: Mapping[str, bool]  # of the Swarm, by name, and whether reachable; as servers see it
    voters: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()  # Consul's servers that answer
    reboot: bool = False  # is due
    is_going_down: bool = False


def observe(spec: Spec, host: Host) -> Seen:
    pending = Pending.parse(host.files.read(paths.RESTART_PENDING))
    asked_in = host.files.read(paths.KERNEL_REBOOT)
    seen = Seen(
        node=host.network.hostname(),
        pending=pending,
        began_s=host.systemd.unit(paths.ENGINE_UNIT).began_s,
        lock=host.consul.get(lock_key(spec)).get(lock_key(spec)),
        managers={},
        reboot=spec.kernel.memory_accounting
        and spec.kernel.reboot == "once"
        and asked_in is not None
        and asked_in == host.files.read(paths.BOOT_ID),
        is_going_down=host.files.exists(paths.REBOOT_ASKED),
    )
    if not (spec.is_server and (seen.reboot or pending is not None)):
        return seen
    servers = [member for member in host.consul.members() if member.server]
    return replace(
        seen,
        managers=host.engine.managers(),
        voters=host.consul.voters(),
        alive=tuple(each.name for each in servers if each.alive),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    key, lock = lock_key(spec), seen.lock
    is_mine = lock is not None and lock.session and lock.value == seen.node
    is_pending = seen.pending is not None and seen.pending.kind == "restart"
    if seen.is_going_down:
        return wait("the reboot")
    if not (is_pending or seen.reboot):
        if lock is not None and is_mine:
            return change(ReleaseLock(key, lock.session))
        return done("no restart of the Engine is due")
    if is_pending and seen.pending is not None and seen.began_s > seen.pending.at_s:
        return wait("the Engine to be a healthy member again")
    if lock is not None and lock.session and not is_mine:
        return wait(f"{lock.value} to restart its Engine")
    missing = _who_is_missing(spec, seen)
    if missing:
        return wait(f"{missing} before the Engine is restarted")
    if lock is None or not is_mine:
        index = lock.index if lock else 0
        why = "take the lock for restarting the Engine"
        return change(TakeLock(key, seen.node, index, why, LOCK_TTL_S))
    if seen.reboot:
        return change(Reboot(paths.REBOOT_ASKED, "for its new command line", lock.session))
    why = f"{paths.DAEMON_JSON} changed"
    return change(RestartUnderLock(paths.ENGINE_UNIT, lock.session, why))


def _who_is_missing(spec: Spec, seen: Seen) -> str:
    """Whose absence forbids that this server's Engine goes, too. Two servers can spare none."""
    if spec.servers < 3:
        return ""
    silent = sorted(name for name, is_reachable in seen.managers.items() if not is_reachable)
    if seen.managers and len(seen.managers) - len(silent) - 1 < len(seen.managers) // 2 + 1:
        return f"Swarm manager {' and '.join(silent) or 'no. 3'}"
    dead = sorted(set(seen.voters) - set(seen.alive))
    if seen.voters and len(seen.voters) - len(dead) - 1 < len(seen.voters) // 2 + 1:
        return f"Consul server {' and '.join(dead) or 'no. 3'}"
    return ""


STEP = Step("restart", requires=("engine", "swarm", "services"), observe=observe, diff=diff)
