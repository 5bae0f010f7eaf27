"""A network of the lab's own with whole machines on it, all of which can be taken down again.

    with Lab() as lab:
        one = lab.machine("one", address="10.10.0.11", user_data="#cloud-config\\n…")
        one.boot()
        one.wait_booted()
        print(one.sh("docker info"))

What the lab has made is written down under its state directory before it is used, so that any
later process can clear up after one that was killed. Machines are systemd-nspawn containers in
a network namespace with no way out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType

from tests.lab import host, images
from tests.lab.flavours import flavour as flavour_named
from tests.lab.host import LabError, Process, Waiting, run, wait_until

GATEWAY = "10.10.0.1"
PREFIX_BITS = 16
METADATA_ADDRESS = "169.254.169.254"
HTTP_PORT = 8000
BRIDGE = "br-lab"

#: What a command in a machine finds in its environment, as from a root shell.
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "xterm",
    "LANG": "C.UTF-8",
}

#: Directories of a machine that are the box's own file system: the Engine's overlay2 cannot stand
#: on the overlay a machine's root is. Same names below the machine's `volumes`.
_VOLUMES = ("var/lib/docker", "var/lib/nodeagent")

#: Runs a machine until it is powered off or killed. nspawn with --keep-unit does not restart a
#: rebooted machine itself but says so with exit 133 (EXIT_FORCE_RESTART in systemd's
#: src/nspawn/nspawn.c). Each boot gets a cgroup of its own: on cgroup v2 a used one takes no
#: process any more. $1: the enter script; then the machine's cgroups; --; nspawn's words.
_SUPERVISE = """
boot=0
while :; do
    boot=$((boot + 1))
    set -- "$@" --end
    while [ "$1" != -- ]; do mkdir -p "$1/boot$boot"; set -- "$@" "$1"; shift; done
    shift
    nspawn=; while [ "$1" != --end ]; do set -- "$@" "$1"; shift; done
done
"""

_NETWORK = """\
[Match]
Name=host0

[Network]
Address={address}/{bits}
Gateway={gateway}
DNS={gateway}
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is written down about a machine, so that any process can find it again."""

    name: str
    flavour: str
    address: str
    layers: tuple[str, ...]
