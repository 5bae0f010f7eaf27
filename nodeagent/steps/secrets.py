"""This node has the keys its role needs, and Consul finds those it is to use, with a certificate.

What changes while Consul runs (keys, tokens, certificates) stands in files of its own beside the
rest of its configuration: Consul reads them again on a reload, without a restart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodeagent import paths, secrets
from nodeagent.changes import IssueCertificate, MakeNodeToken, WriteFile, WriteSecret
from nodeagent.errors import HostError, Problem, Secret, SpecError
from nodeagent.host import Certificate, Host
from nodeagent.plan import Plan, Step, block, change, done
from nodeagent.secrets import Keys, NodeTokens, Secrets, ServerSecrets
from nodeagent.spec import Spec

_FILES = (
    paths.CONSUL_AUTHORITIES,
    paths.CONSUL_CERTIFICATE,
    paths.CONSUL_KEYS,
    paths.CONSUL_TOKENS,
)


@dataclass(frozen=True)
class Found:
    """A secured node's secrets, and what derives from them."""

    secrets: Secrets
    keys: Keys
    authorities: tuple[Certificate, ...]
    generations: tuple[str, ...] = ()  # of tokens that servers accept


@dataclass(frozen=True)
class Seen:
    hostname: str
    now: float = 0.0
    problem: Problem | None = None
    found: Found | None = None  # None where security is off
    certificate: Certificate | None = None  # the one that Consul is to show
    is_current: bool = False  # it is signed by the CA that is in use
    own: str | None = field(default=None, repr=False)
    files: Mapping[Path, str | None] = field(default_factory=dict, repr=False)
    keyring: str | None = field(default=None, repr=False)


def observe(spec: Spec, host: Host) -> Seen:
    hostname, now = host.network.hostname(), host.clock.now()
    if not spec.is_secured:
        return Seen(hostname, now)
    try:
        found = _read(spec, host)
    except SpecError as error:
        return Seen(hostname, now, error.problems[0])
    files = {path: host.files.read(path) for path in _FILES}
    pem = files[paths.CONSUL_CERTIFICATE] or ""
    try:
        certificate = host.pki.certificates(pem)[0]
    except HostError:  # there is none, or it is damaged: another one takes its place
        certificate = None
    return Seen(
        hostname,
        now,
        found=found,
        certificate=certificate,
        is_current=certificate is not None
        and host.pki.is_signed(pem, found.secrets.authorities[0]),
        own=host.files.read(paths.NODE_TOKEN),
        files=files,
        keyring=host.files.read(paths.CONSUL_KEYRING),
    )


def read(spec: Spec, host: Host) -> tuple[Found, NodeTokens]:
    """Return this node's secrets, for the steps after this one.

    Raises HostError when they have gone or changed since this step was done: it is tried again.
    """
    try:
        return _read(spec, host), NodeTokens.parse(host.files.read(paths.NODE_TOKEN) or "")
    except SpecError as error:
        raise HostError("read", paths.SECRETS, error.sentence) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HostError("read", paths.NODE_TOKEN, "it is damaged or gone") from error


def _read(spec: Spec, host: Host) -> Found:
    """Raises SpecError when the secrets are missing, open or wrong."""
    found = secrets.load(paths.SECRETS, spec.role, host.files, host.pki)
    authorities = tuple(host.pki.certificates(each)[0] for each in found.authorities)
    generations: tuple[str, ...] = ()
    if isinstance(found, ServerSecrets):
        seeds = found.seeds("tokens")
        generations = tuple(secrets.generation(host.pki, seed) for seed in seeds)
    return Found(found, secrets.keys(found, host.pki), authorities, generations)


def diff(spec: Spec, seen: Seen) -> Plan:
    if seen.problem:
        return block(
            str(seen.problem).removesuffix(f" ({seen.problem.hint})"), fix=seen.problem.hint
        )
    if seen.found is None:
        return done("security is off: nothing in this cluster is encrypted or authenticated")
    keys = seen.found.keys
    for authority in seen.found.authorities:
        if not authority.not_before <= seen.now <= authority.not_after:
            return _out_of_date("the cluster's CA certificate", authority, seen.now)
    try:
        own = NodeTokens.parse(seen.own) if seen.own is not None else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return block(f"{paths.NODE_TOKEN} is damaged", fix=f"rm {paths.NODE_TOKEN}")
    generation = "" if spec.is_server else keys.generation
    if own is None or (generation and generation not in own.tokens):
        known = _recovery(seen.files[paths.CONSUL_KEYS])
        return change(MakeNodeToken(paths.NODE_TOKEN, own, generation, known))
    if seen.keyring is not None and not _accepted(keys, seen.keyring):
        return block(
            f"Consul keeps another cluster's gossip keys in {paths.CONSUL_KEYRING}, and uses them "
            f"before the one in {paths.SECRETS}",
            fix="if this disk was copied or the key rotated while this node was away: systemctl "
            f"stop nodeagent, move {paths.CONSUL_KEYRING} away, restart Consul and nodeagent",
        )
    changes = _certificates(spec, seen, seen.found)
    if isinstance(changes, Plan):
        return changes
    changes += _texts(seen, keys, own, seen.found.secrets.serial)
    if not changes:
        return done(_summary(seen))
    is_first = all(text is None for text in seen.files.values())  # nothing has read any of them
    if not is_first and any(change_.path != paths.CONSUL_TOKENS for change_ in changes):
        # Before the files, so that a kill after any of them leaves the reload to be made.
        return change(WriteFile(paths.CONSUL_RELOAD_PENDING, "", 0o600), *changes)
    return change(*changes)


def _recovery(keys: str | None) -> Secret | None:
    """The token for the local agent that a running Consul was given; no other reloads it."""
    try:
        return Secret(str(json.loads(keys or "")["acl"]["tokens"]["agent_master"]))
    except (ValueError, TypeError, KeyError):
        return None


def _certificates(
    spec: Spec, seen: Seen, found: Found
) -> list[WriteSecret | IssueCertificate] | Plan:
    changes: list[WriteSecret | IssueCertificate] = []
    authorities = "".join(found.secrets.authorities)
    if seen.files[paths.CONSUL_AUTHORITIES] != authorities:
        changes.append(WriteSecret(paths.CONSUL_AUTHORITIES, Secret(authorities)))
    if isinstance(found.secrets, ServerSecrets):
        names = server_names(spec, seen.hostname)
        lifetime_s = spec.consul.certificate_lifetime_s
        if why := _why_new(seen, names, lifetime_s, found.authorities[0].not_after):
            seed, authority = found.secrets.seeds("ca")[0], found.secrets.authorities[0]
            changes.append(
                IssueCertificate(paths.CONSUL_CERTIFICATE, seed, authority, names, lifetime_s, why)
            )
    elif seen.files[paths.CONSUL_CERTIFICATE] != found.secrets.certificate.reveal():
        changes.append(WriteSecret(paths.CONSUL_CERTIFICATE, found.secrets.certificate))
    elif seen.certificate is not None:
        certificate = seen.certificate
        if not certificate.not_before <= seen.now <= certificate.not_after:
            return _out_of_date("the workers' certificate", certificate, seen.now)
    return changes


def server_names(spec: Spec, hostname: str) -> tuple[str, ...]:
    """What Consul looks for in a server's certificate (verify_server_hostname)."""
    server = f"server.{spec.datacenter}.{spec.domain}"
    return server, f"{hostname}.{server}"


def _why_new(seen: Seen, names: tuple[str, ...], lifetime_s: int, ca_not_after: float) -> str:
    """Why this server needs another certificate; "" when it does not."""
    found = seen.certificate
    if found is None:
        return "there is none"
    if found.names != names:
        return "the one here names another server"
    if not seen.is_current:
        return "the one here is of another CA"
    if seen.now < found.not_before:
        return "the one here is not valid yet"
    if found.not_after - seen.now < lifetime_s / 2 and found.not_after < ca_not_after:
        return "half of the old one's time is over"
    return ""


def _texts(seen: Seen, keys: Keys, own: NodeTokens, serial: int) -> list[WriteSecret]:
    """The files of keys and tokens, where they are not as they should be."""
    in_use = secrets.own_token(keys, own, seen.hostname)
    tokens: dict[str, Any] = {"agent_master": own.recovery.reveal()}
    if in_use:
        tokens["agent"] = in_use.reveal()
    if keys.server_token:
        tokens["master"] = keys.server_token.reveal()
    to_consul = {"encrypt": keys.gossip[0].reveal(), "acl": {"tokens": tokens}}
    shown = {
        "recovery": own.recovery.reveal(),
        "token": (in_use or keys.enrolment).reveal(),
        "agent": in_use.reveal() if in_use else "",
        "serial": serial,
    }
    wanted = {paths.CONSUL_KEYS: to_consul, paths.CONSUL_TOKENS: shown}
    texts = {path: json.dumps(data, indent=1) + "\n" for path, data in wanted.items()}
    return [
        WriteSecret(path, Secret(text)) for path, text in texts.items() if seen.files[path] != text
    ]


def _accepted(keys: Keys, keyring: str) -> bool:
    try:
        found = json.loads(keyring)
    except ValueError:
        return True  # Consul itself says what is wrong with it
    return any(key.reveal() in found for key in keys.gossip)


def _out_of_date(what: str, certificate: Certificate, now: float) -> Plan:
    days = (now - certificate.not_after) / 86400
    if days > 0:
        return block(
            f"{what} in {paths.SECRETS} ended {days:.0f} days ago, by this machine's clock",
            fix="date; if it is right, bring the secrets of a server that is in the cluster",
        )
    hours = (certificate.not_before - now) / 3600
    return block(
        f"{what} in {paths.SECRETS} is valid only in {hours:.1f} hours, by this machine's clock",
        fix="date; timedatectl set-ntp true",
    )


def _summary(seen: Seen) -> str:
    assert seen.certificate is not None
    left_s = seen.certificate.not_after - seen.now
    for unit, name in ((86400, "days"), (3600, "hours")):
        if left_s >= 2 * unit:
            return f"certificate valid for {left_s // unit:.0f} more {name}"
    return f"certificate valid for {left_s // 60:.0f} more minutes"


STEP = Step("secrets", requires=("identity",), observe=observe, diff=diff)
