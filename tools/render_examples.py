"""cloud-init/*.example.yaml are user-data of the cluster of cluster.example.yaml, without keys."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from nodeagent import spec, userdata
from nodeagent.errors import Secret

EXAMPLES = Path(__file__).resolve().parent.parent / "cloud-init"
# What everybody can read is no key. A machine that is given this says that it is not JSON.
NO_KEYS = Secret("NO KEYS HERE: nodeagent user-data --secrets secrets.json writes those of yours\n")


def path_of(role: spec.Role) -> Path:
    return EXAMPLES / f"{role}.example.yaml"


def example(role: spec.Role) -> str:
    """Return the user-data of the example's cluster."""
    cluster = spec.load(EXAMPLES / "cluster.example.yaml", spec.Cluster)
    return userdata.render(cluster, role, NO_KEYS)


if __name__ == "__main__":
    for role in get_args(spec.Role):
        path_of(role).write_text(example(role), "utf-8")
