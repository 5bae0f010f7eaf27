"""User-data is one `#cloud-config` document that turns a new machine into a node, by itself."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import PurePosixPath

import yaml

from nodeagent import secrets, spec
from nodeagent.errors import Secret, UsageError
from nodeagent.host import Pki
from nodeagent.secrets import ServerSecrets
from nodeagent.spec import Agent, Cluster, Role, Spec

# https://docs.digitalocean.com/reference/api: user_data "may not exceed 64 KiB".
LIMIT_BYTES = 64 * 1024
STAGE = PurePosixPath("/opt/nodeagent/user-data")
HEADER = """\
#cloud-config
# {role} of cluster {cluster}, made by `nodeagent user-data`.
# What happens at boot is told in /var/log/cloud-init-output.log, then by `nodeagent status`.
"""


def secrets_text(
    cluster: Cluster, role: Role, found: ServerSecrets, pki: Pki, now: float
) -> Secret:
    """Return what is secrets.json on a machine of this role; the cluster key is for servers."""
    if role == "server":
        return secrets.dump(found)
    return secrets.dump(secrets.for_workers(found, cluster, pki, now))


def render(cluster: Cluster, role: Role, secrets_json: Secret | None) -> str:
    """Return the user-data of any node of this role; with secrets in it, it is one.

    Raises SpecError when the cluster's file leaves out what the role needs, and UsageError when
    secrets are missing or have no use, or the result is longer than a provider takes.
    """
    if cluster.is_secured and secrets_json is None:
        raise UsageError(
            "machines of a secured cluster need its keys: add --secrets secrets.json, which "
            "`nodeagent secrets new secrets.json` makes once for a cluster (or say `security: "
            "off`, and nothing is encrypted or authenticated)"
        )
    if secrets_json is not None and not cluster.is_secured:
        raise UsageError("the cluster file says `security: off`, so --secrets has no use: drop one")
    text = yaml.safe_dump(spec.dump(_node(cluster, role)), sort_keys=False, allow_unicode=True)
    spec.parse(text, f"node.yaml of a {role}", Spec)
    staged = [_file("node.yaml", text, "0600")]
    config = {"spec": str(STAGE / "node.yaml")}
    if secrets_json is not None:
        staged.append(_file("secrets.json", secrets_json.reveal(), "0600"))
        config["secrets"] = str(STAGE / "secrets.json")
    config |= {key: value for key, value in dataclasses.asdict(cluster.agent).items() if value}
    script = (resources.files("nodeagent") / "data/cloud-init/bootstrap.py").read_text("utf-8")
    document = {
        "write_files": [
            *staged,
            _file("bootstrap.json", json.dumps(config, indent=2) + "\n", "0600"),
            _file("bootstrap.py", script, "0644"),
        ],
        "runcmd": [
            ["python3", *(str(STAGE / name) for name in ("bootstrap.py", "bootstrap.json"))]
        ],
    }
    header = HEADER.format(role=role, cluster=cluster.cluster)
    result = header + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )
    size = len(result.encode())
    if size > LIMIT_BYTES:
        raise UsageError(
            f"the user-data is {size} bytes and providers take {LIMIT_BYTES} at most; make "
            "the cluster file shorter: a DNS name in `join` stands for any number of addresses"
        )
    return result


def _node(cluster: Cluster, role: Role) -> Spec:
    shared = {field.name: getattr(cluster, field.name) for field in dataclasses.fields(Cluster)}
    return Spec(**{**shared, "agent": Agent(), "role": role})


def _file(name: str, content: str, permissions: str) -> dict[str, str]:
    return {"path": str(STAGE / name), "permissions": permissions, "content": content}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as literal blocks, so that a human can read the files."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
