"""The local Consul agent, by its HTTP API."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import consul
import requests

from nodeagent import paths
from nodeagent.errors import HostError, Secret
from nodeagent.host import (
    SERVICE_ID_PREFIX,
    ConsulSelf,
    Entry,
    KeyringAction,
    Member,
    Op,
    Policy,
    Service,
    Token,
)

TIMEOUT_S = 10  # above the 7 s for which Consul itself holds a call that finds no leader
WATCH = "5m"
WATCH_RETRY_S = 0.25  # while Consul does not answer; without a leader it holds the call for 7 s
SERF_ALIVE, SERF_LEFT = 1, 3  # hashicorp/serf: MemberStatus
RPC_PORT, GOSSIP_PORT = 8300, 8301
RPC_TLS = b"\x03"  # consul agent/pool: the first byte says what follows
GREETING_S = 0.3  # it is asked in every round without a leader, which should not wait for it
DEFINITION = "nodeagent-check"  # in a service's meta: Consul does not tell how a check was defined


POLICY = "nodeagent "  # what the descriptions of our policies begin with; then the rules' digest


class LocalConsul:
    """The Consul agent on 127.0.0.1:8500.

    `tokens` is a file with the tokens to show: `recovery` for what concerns the agent itself,
    which works without a leader, and `token` for the rest. Without the file none is shown.
    `config` is the directory with the agent's certificates.
    """

    def __init__(
        self,
        *,
        port: int = 8500,
        tokens: Path = paths.CONSUL_TOKENS,
        config: Path = paths.CONSUL_CONFIG.parent,
    ) -> None:
        self._tokens, self._config = tokens, config
        self._client = _client(port)
        self._watch_client = _client(port)

    @contextlib.contextmanager
    def _call(self, operation: str, token: str = "token") -> Iterator[Any]:
        """The one gate for every call, with the libraries' errors made ours."""
        self._show(self._client, token)
        try:
            yield self._client
        except (consul.ConsulException, requests.RequestException, ValueError) as error:
            raise HostError(operation, "Consul", error) from error

    def _show(self, client: consul.Consul, name: str) -> None:
        """Send this token from now on, as a header: several of py-consul's calls send none."""
        client.http.session.headers.pop("X-Consul-Token", None)
        if token := self._read(name):
            client.http.session.headers["X-Consul-Token"] = token

    def _read(self, name: str) -> str:
        """One of the tokens; "" where there is none."""
        try:
            return str(json.loads(self._tokens.read_text("utf-8"))[name])
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HostError("read", self._tokens, error) from error

    def self(self) -> ConsulSelf | None:
        try:
            with self._call("ask", "recovery") as client:
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
        try:
            with self._call("ask for the leader of") as client:
                return str(client.status.leader() or "")
        except HostError as error:
            if "No known Consul servers" in error.cause:
                return ""
            raise

    def members(self) -> tuple[Member, ...]:
        with self._call("list the members of", "recovery") as client:
            return tuple(
                Member(
                    name=each["Name"],
                    address=each["Addr"],
                    alive=each["Status"] == SERF_ALIVE,
                    server=each["Tags"].get("role") == "consul",
                )
                for each in client.agent.members()
                if each["Status"] != SERF_LEFT
            )

    def join(self, address: str) -> None:
        with self._call(f"join {address} to", "recovery") as client:
            client.agent.join(address)

    def voters(self) -> tuple[str, ...]:
        with self._call("list the servers of") as client:
            found = client.operator.raft_config()["Servers"]
        return tuple(each["Node"] for each in found if each["Voter"])

    def knock(self, address: str) -> str:
        try:
            # Or Consul would try for many seconds, were nobody there.
            with socket.create_connection((address, GOSSIP_PORT), GREETING_S):
                pass
            self.join(address)
        except HostError as error:
            return error.cause if "keys could decrypt" in error.cause else ""
        except OSError:
            pass  # others say that nobody is there
        return ""

    def greet(self, address: str, name: str) -> str:
        try:
            authorities = self._config / paths.CONSUL_AUTHORITIES.name
            context = ssl.create_default_context(cafile=str(authorities))
            # With 1.3 the refusal of a certificate would come after the handshake, some time.
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._config / paths.CONSUL_CERTIFICATE.name)
            with socket.create_connection((address, RPC_PORT), GREETING_S) as plain:
                plain.sendall(RPC_TLS)
                context.wrap_socket(plain, server_hostname=name).close()
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is refused here: {error.verify_message}"
        except ssl.SSLError as error:
            return f"it refuses this node's certificate: {error.reason}"
        except OSError:
            pass
        return ""

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
            # What the token does not allow is a 409 as well.
            is_conflict = error.cause.startswith("409") and "Permission denied" not in error.cause
            if isinstance(error.__cause__, consul.exceptions.ClientError) and is_conflict:
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
        try:
            with self._call(f"deregister {service_id} from") as client:
                client.agent.service.deregister(service_id)
        except HostError as error:
            if "Unknown service" not in error.cause:  # with ACLs on, Consul minds that
                raise

    def vouch(self, service_id: str, passing: bool, note: str) -> None:
        with self._call(f"vouch for {service_id} in") as client:
            check = client.agent.check
            (check.ttl_pass if passing else check.ttl_fail)(f"service:{service_id}", note)

    def reload(self) -> None:
        with self._call("reload", "recovery") as client:
            client.agent.reload()
            # A reload takes a new agent token, yet what was refused with the old one is tried
            # again only after minutes; setting the token by this call has it tried at once (1.8).
            if token := self._read("agent"):
                path, body = "/v1/agent/token/agent", json.dumps({"Token": token})
                client.http.put(consul.callback.CB.boolean(), path, data=body)

    def knows_token(self) -> bool | None:
        try:
            with self._call("ask who this node is to") as client:
                client.acl.token.read_self()
        except HostError as error:
            if isinstance(error.__cause__, consul.exceptions.ACLPermissionDenied):
                return False
            if "legacy mode" in error.cause:  # 1.8, for a moment after the first leader
                return None
            raise
        return True

    def policies(self) -> Mapping[str, str]:
        with self._call("list the access policies of") as client:
            found = client.acl.policy.list()
        return {
            each["Name"]: each["Description"].removeprefix(POLICY)
            for each in found
            if each["Description"].startswith(POLICY)
        }

    def put_policy(self, policy: Policy) -> None:
        rules: dict[str, dict[str, dict[str, str]]] = {}
        for kind, of, level in policy.rules:
            rules.setdefault(kind, {})[of] = {"policy": level}
        values = {"description": f"{POLICY}{policy.digest}", "rules": rules}
        with self._call(f"set the access policy {policy.name} of") as client:
            ids = {each["Name"]: each["ID"] for each in client.acl.policy.list()}
            if policy.name in ids:
                client.acl.policy.update(ids[policy.name], policy.name, **values)
            else:
                client.acl.policy.create(policy.name, **values)

    def tokens(self) -> Mapping[str, Token]:
        with self._call("list the tokens of") as client:
            found = client.acl.token.list()
        return {
            each["AccessorID"]: Token(
                each["AccessorID"],
                tuple(sorted(policy["Name"] for policy in each.get("Policies") or ())),
                each["Description"],
            )
            for each in found
        }

    def put_token(self, token: Token) -> None:
        values = {"policies_name": list(token.policies), "description": token.description}
        with self._call(f"set the token for {token.description} of") as client:
            if any(each["AccessorID"] == token.accessor for each in client.acl.token.list()):
                client.acl.token.update(token.accessor, **values)
            else:
                secret = token.secret.reveal() if token.secret else None
                client.acl.token.create(accessor_id=token.accessor, secret_id=secret, **values)

    def delete_token(self, accessor: str) -> None:
        with self._call(f"delete the token {accessor} of") as client:
            client.acl.token.delete(accessor)

    def change_keyring(self, action: KeyringAction, key: Secret) -> None:
        with self._call(f"{action} a gossip key of") as client:
            getattr(client.operator, f"keyring_{action}")(key.reveal())

    def watch(self, prefix: str, wake: Callable[[], None], stop: threading.Event) -> None:
        """Wake whenever a key below `prefix` changes, by blocking queries.

        Also after an outage, whose end is the first leader of a new cluster too: what changed in
        the meantime cannot be told.
        """
        index, was_lost = None, False
        while not stop.is_set():
            try:
                self._show(self._watch_client, "token")
                found, _ = self._watch_client.kv.get(prefix, recurse=True, index=index, wait=WATCH)
            except (consul.ConsulException, requests.RequestException, ValueError, HostError):
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
    client.token = None  # nor a token of the environment
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
