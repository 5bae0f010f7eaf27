"""This machine, as a `Host`."""

from __future__ import annotations

from nodeagent import paths
from nodeagent.adapters.clock import SystemClock
from nodeagent.adapters.consul import LocalConsul
from nodeagent.adapters.dockerd import Dockerd
from nodeagent.adapters.engine import DockerDaemon
from nodeagent.adapters.files import LocalFiles
from nodeagent.adapters.network import LocalNetwork
from nodeagent.adapters.pki import LocalPki
from nodeagent.adapters.resolver import DnsResolver
from nodeagent.adapters.systemd import SystemdManager
from nodeagent.adapters.web import WebFetcher
from nodeagent.host import Host


def this_machine() -> Host:
    """Return the machine this process runs on."""
    return Host(
        files=LocalFiles(),
        web=WebFetcher(),
        systemd=SystemdManager(),
        engine=DockerDaemon(socket=paths.ENGINE_SOCKET, name="the Docker Engine"),
        engine_program=Dockerd(),
        system_engine=DockerDaemon(socket=paths.SYSTEM_ENGINE_SOCKET, name="the System Engine"),
        consul=LocalConsul(),
        resolver=DnsResolver(),
        network=LocalNetwork(),
        pki=LocalPki(),
        clock=SystemClock(),
    )
