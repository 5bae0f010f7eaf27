"""This machine is who its state says it is, and it has one cluster address."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from nodeagent import paths
from nodeagent.address import NoAddress, cluster_address
from nodeagent.changes import WriteFile
from nodeagent.host import Host
from nodeagent.plan import Plan, Step, block, change, done
from nodeagent.spec import Spec

NODE_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123; Network.hostname() is lower case


@dataclass(frozen=True)
class Seen:
    machine_id: str
    hostname: str
    address: str
    address_problem: str
    recorded: str | None


def observe(spec: Spec, host: Host) -> Seen:
    address, problem = "", ""
    try:
        address = cluster_address(spec.address, host.network.interfaces())
    except NoAddress as error:
        problem = error.cause
    return Seen(
        machine_id=(host.files.read(paths.MACHINE_ID) or "").strip(),
        hostname=host.network.hostname(),
        address=address,
        address_problem=problem,
        recorded=host.files.read(paths.IDENTITY),
    )


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.address_problem:
        return block(seen.address_problem, fix=f"edit address in {paths.SPEC}")
    if not re.fullmatch(NODE_NAME, seen.hostname):
        return block(
            f"the host name {seen.hostname!r} cannot name a node: letters, digits and dashes can",
            fix="hostnamectl set-hostname NAME",
        )
    if not seen.machine_id or seen.machine_id == "uninitialized":
        return block(f"{paths.MACHINE_ID} is empty", fix="systemd-machine-id-setup, then reboot")
    security = "on" if spec.is_secured else "off"
    wanted = {"cluster": spec.cluster, "machine_id": seen.machine_id, "security": security}
    if seen.recorded is None:
        return change(WriteFile(paths.IDENTITY, json.dumps(wanted) + "\n", 0o600))
    try:
        recorded = json.loads(seen.recorded)
        cluster, machine_id = recorded["cluster"], recorded["machine_id"]
        was = recorded.get("security", "off")  # it was the only value before there was a choice
    except (ValueError, TypeError, KeyError):
        return block(
            f"{paths.IDENTITY} does not say whose state this is",
            fix=f"if this machine has always been in cluster {spec.cluster}: rm {paths.IDENTITY}",
        )
    if machine_id != seen.machine_id:
        return block(
            f"the state in {paths.STATE} belongs to another machine "
            f"(machine-id {machine_id[:8]}…, here {seen.machine_id[:8]}…): a copied disk",
            fix=f"move {paths.STATE} away, then systemctl restart nodeagent",
        )
    if cluster != spec.cluster:
        return block(
            f"this node is in cluster {cluster}, and the spec says {spec.cluster}",
            fix=f"put cluster: {cluster} back into {paths.SPEC}",
        )
    if was != security:
        return block(
            f"security was {was} when this node was made, and the spec says {security}: a running "
            "cluster cannot be switched",
            fix=f"put it back in {paths.SPEC}, or make a new cluster",
        )
    return done(f"{seen.hostname} at {seen.address}")


STEP = Step("identity", requires=(), observe=observe, diff=diff)
