"""Containers cannot reach the metadata service, where this node's user-data can be read."""

from __future__ import annotations

from dataclasses import dataclass

from nodeagent import paths
from nodeagent.changes import EnableUnit, RestartUnit, StartUnit
from nodeagent.host import Host, Rule, Unit
from nodeagent.plan import Plan, Step, block, change, done, wait
from nodeagent.spec import Spec

# Where every cloud has it (https://docs.digitalocean.com/products/droplets/how-to/access-metadata/).
METADATA_ADDRESS = "169.254.169.254"

# What the unit puts up: what this machine sends itself goes its way, what it would forward is
# refused. Routing, not a firewall: nothing that flushes or reloads a firewall touches it.
WANTED = (
    Rule(100, frozenset({f"dst {METADATA_ADDRESS}", "iif lo"}), "lookup main"),
    Rule(101, frozenset({f"dst {METADATA_ADDRESS}"}), "prohibit"),
)


@dataclass(frozen=True)
class Seen:
    unit: Unit
    rules: tuple[Rule, ...]
    journal: tuple[str, ...] = ()


def observe(spec: Spec, host: Host) -> Seen | None:
    if spec.security == "off":
        return None
    unit = host.systemd.unit(paths.GUARD_UNIT)
    return Seen(
        unit=unit,
        rules=host.network.rules(),
        journal=host.systemd.last_lines(paths.GUARD_UNIT, 5) if unit.has_failed else (),
    )


def diff(spec: Spec, seen: Seen | None) -> Plan:
    if spec.security == "off" or seen is None:
        return done("security is off: containers can reach the metadata service")
    if seen.unit.load == "masked":
        return block(f"{paths.GUARD_UNIT} is masked", fix=f"systemctl unmask {paths.GUARD_UNIT}")
    if not seen.unit.exists:
        return block(f"{paths.GUARD_UNIT} is not installed", fix="nodeagent install")
    if seen.unit.enabled == "disabled":
        return change(EnableUnit(paths.GUARD_UNIT))
    if seen.unit.has_failed:
        words = f": {seen.journal[-1]}" if seen.journal else ""
        return block(f"{paths.GUARD_UNIT} fails{words}", fix=f"journalctl -u {paths.GUARD_UNIT}")
    if seen.unit.active == "inactive":
        return change(StartUnit(paths.GUARD_UNIT))
    if not seen.unit.is_active:
        return wait(f"{paths.GUARD_UNIT} to start")
    if not set(WANTED) <= set(seen.rules):
        return change(RestartUnit(paths.GUARD_UNIT, "a rule of it is gone"))
    return done("containers cannot reach the metadata service")


STEP = Step("guard", requires=("identity",), observe=observe, diff=diff)
