"""The local Consul agent, by its HTTP API."""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import consul
import requests

from nodeagent.errors import HostError
from nodeagent.host import SERVICE_ID_PREFIX, ConsulSelf, Entry, Member, Op, Service

TIMEOUT_S = 10  # above the 7 s for which Consul itself holds a call that finds no leader
WATCH = "5m"
WATCH_RETRY_S = 0.25  # while Consul does not answer; without a leader it holds the call for 7 s
SERF_ALIVE = 1  # hashicorp/serf: MemberStatus
DEFINITION = "nodeagent-check"  # in a service's meta: Consul does not tell how a check was defined


class LocalConsul:
    """The Consul agent on 127.0.0.1:8500."""

    def __init__(self, *, port: int = 8500) -> None:
        self._client = _client(port)
        self._watch_client = _client(port)

    @contextlib.contextmanager
    def _call(self, operation: str) -> Iterator[Any]:
        """The one gate for every call, with the libraries' errors made ours."""
        try:
            yield self._client
        except (consul.ConsulException, requests.RequestException, ValueError) as error:
            raise HostError(operation, "Consul", error) from error

    def self(self) -> ConsulSelf | None:
        try:
            with self._call("ask") as client:
                found = client.agent.self()
        except HostError as error:
            if isinstance(error.__cause__, requests.ConnectionError):
                return None
            raise
        try:
            config, member = found["Config"], found["Member"]
            return ConsulSelf(
                node_name=config["NodeName"],
                datacenter=config["Datacenter"],
                server=config["Server"],
                address=member["Addr"],
                version=config["Version"],
            )
        except (KeyError, TypeError) as error:
            raise HostError("ask", "Consul", "what answers on its port is not Consul") from error

    def leader(self) -> str:
        with self._call("ask for the leader of") as client:
            return str(client.status.leader() or "")

    def members(self) -> tuple[Member, ...]:
        with self._call("list the members of") as client:
            return tuple(
                Member(
                    name=each["Name"],
                    address=each["Addr"],
                    alive=each["Status"] == SERF_ALIVE,
                    server=each["Tags"].get("role") == "consul",
                )
                for each in client.agent.members()
            )

    def join(self, address: str) -> None:
        with self._call(f"join {address} to") as client:
            client.agent.join(address)

    def get(self, prefix: str) -> Mapping[str, Entry]:
        with self._call(f"read {prefix} from") as client:
            _, found = client.kv.get(prefix, recurse=True, consistency="consistent")
        return {
            each["Key"]: Entry(
                value=(each["Value"] or b"").decode("utf-8", "replace"),
                index=each["ModifyIndex"],
                session=each.get("Session", ""),
            )
            for each in found or ()
        }

    def transact(self, *ops: Op) -> bool:
        payload = [{"KV": _operation(op)} for op in ops]
        try:
            with self._call("write to") as client:
                client.txn.put(payload)
        except HostError as error:
            if isinstance(error.__cause__, consul.exceptions.ClientError) and str(
                error.__cause__
            ).startswith("409"):
                return False
            raise
        return True

    def create_session(self, name: str, ttl_s: int) -> str:
        with self._call("open a session in") as client:
            return str(client.session.create(name=name, ttl=ttl_s, lock_delay=0))

    def renew_session(self, session: str) -> bool:
        try:
            with self._call("renew a session in") as client:
                client.session.renew(session)
        except HostError as error:
            if isinstance(error.__cause__, consul.exceptions.NotFound):
                return False
            raise
        return True

    def destroy_session(self, session: str) -> None:
        with self._call("close a session in") as client:
            client.session.destroy(session)

    def instances(self, service: str) -> Mapping[str, bool]:
        with self._call(f"look for {service} in") as client:
            _, found = client.health.service(service)
        healthy: dict[str, bool] = {}
        for each in found:
            service_address = each["Service"]["Address"] or each["Node"]["Address"]
            passes = all(check["Status"] == "passing" for check in each["Checks"])
            healthy[f"{service_address}:{each['Service']['Port']}"] = passes
        return healthy

    def services(self) -> Mapping[str, Service]:
        with self._call("list this node's services in") as client:
            found = client.agent.services()
        return {
            id_: _service(entry)
            for id_, entry in found.items()
            if id_.startswith(SERVICE_ID_PREFIX)
        }

    def register(self, service: Service) -> None:
        check: dict[str, Any]
        if service.tcp:
            # Passing to begin with: the step registers it once the port is in use.
            check = {"tcp": service.tcp, "interval": "10s", "timeout": "5s", "Status": "passing"}
        else:
            check = {"ttl": f"{service.ttl_s}s", "Status": "passing"}
        with self._call(f"register {service.name} in") as client:
            client.agent.service.register(
                service.name,
                service_id=service.id,
                port=service.port,
                tags=list(service.tags),
                meta={**service.meta, DEFINITION: _check(service)},
                check=check,
            )

    def deregister(self, service_id: str) -> None:
        with self._call(f"deregister {service_id} from") as client:
            client.agent.service.deregister(service_id)

    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        with self._call(f"vouch for {service_id} in") as client:
            check = client.agent.check
            (check.ttl_pass if passing else check.ttl_fail)(f"service:{service_id}", note)

    def watch(self, prefix: str, wake: Callable[[], None], stop: threading.Event) -> None:
        """Wake whenever a key below `prefix` changes, by blocking queries.

        Also after an outage, whose end is the first leader of a new cluster too: what changed in
        the meantime cannot be told.
        """
        index, was_lost = None, False
        while not stop.is_set():
            try:
                found, _ = self._watch_client.kv.get(prefix, recurse=True, index=index, wait=WATCH)
            except (consul.ConsulException, requests.RequestException, ValueError):
                index, was_lost = None, True
                stop.wait(WATCH_RETRY_S)
                continue
            if was_lost or (index is not None and found != index):
                wake()
            index, was_lost = found, False


def _client(port: int) -> consul.Consul:
    # The scheme is given, or CONSUL_HTTP_SSL of the environment would choose it.
    client = consul.Consul(
        host="127.0.0.1", port=port, scheme="http", connections_timeout=TIMEOUT_S
    )
    client.http.session.trust_env = False  # a proxy must not come between us and this host
    return client


def _operation(op: Op) -> dict[str, Any]:
    operation: dict[str, Any] = {"Verb": op.verb, "Key": op.key}
    if op.verb in ("set", "cas", "lock"):
        operation["Value"] = base64.b64encode(op.value.encode()).decode()
    if op.verb in ("cas", "check-index"):
        operation["Index"] = op.index
    if op.session:
        operation["Session"] = op.session
    return operation


def _check(service: Service) -> str:
    return f"tcp {service.tcp}" if service.tcp else f"ttl {service.ttl_s}"


def _service(entry: Mapping[str, Any]) -> Service:
    meta = dict(entry.get("Meta") or {})
    kind, _, value = meta.pop(DEFINITION, "").partition(" ")
    return Service(
        name=entry["Service"],
        port=entry["Port"],
        tags=tuple(entry.get("Tags") or ()),
        meta=meta,
        tcp=value if kind == "tcp" else "",
        ttl_s=int(value) if kind == "ttl" else 0,
    )
