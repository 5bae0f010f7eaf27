"""Docker daemons, by the Engine API over their sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
import docker.auth
import docker.errors
import docker.utils
import requests

from nodeagent.errors import HostError
from nodeagent.host import Container, ContainerState, EngineInfo, LogSettings, SwarmInfo

TIMEOUT_S = 10
JOIN_TIMEOUT_S = 30  # the Engine itself gives up on a manager after 20 s (moby daemon/cluster)
IMAGE_TIMEOUT_S = 50  # per read; an image load or pull that stands still for longer has failed
LOG_LINES = 20
DEFINITION = "nodeagent.definition"


class DockerDaemon:
    """One Docker daemon. Connects anew after any failure.

    `root` is where the daemon's own `/` is from here.
    """

    def __init__(self, *, socket: Path, name: str, root: Path = Path("/")) -> None:
        self._socket = socket
        self._name = name
        self._root = root
        self._client: docker.DockerClient | None = None
        self._logs: dict[str, LogSettings] = {}

    @contextlib.contextmanager
    def _call(self, operation: str, timeout_s: int = TIMEOUT_S) -> Iterator[docker.DockerClient]:
        """The one gate for every call: with a time-out, and the library's errors made ours."""
        try:
            if self._client is None:
                self._client = docker.DockerClient(
                    base_url=f"unix://{self._socket}", timeout=TIMEOUT_S
                )
            self._client.api.timeout = timeout_s
            yield self._client
        except (
            docker.errors.DockerException,
            requests.RequestException,
            OSError,
            ValueError,  # no JSON
            *(KeyError, TypeError, AttributeError),  # JSON of another shape
        ) as error:
            if self._client is not None:
                self._client.close()
            self._client = None
            cause = getattr(error, "explanation", None) or error
            if isinstance(error, (KeyError, TypeError, AttributeError)):
                cause = f"unclear answer: {error!r}"
            raise HostError(operation, self._name, cause) from error

    def info(self) -> EngineInfo | None:
        try:
            with self._call("ask for the state of") as client:
                info = client.info()
        except HostError as error:
            if _nothing_listens(error):
                return None
            raise
        return EngineInfo(
            version=str(info.get("ServerVersion", "")),
            options=_options(info),
            swarm=_swarm(info, self._root),
        )

    def log_settings(self) -> Mapping[str, LogSettings]:
        with self._call("list the containers of") as client:
            api: Any = client.api
            found = {each["Id"]: each for each in api.containers(all=True)}
            for id_ in found.keys() - self._logs.keys():
                with contextlib.suppress(docker.errors.NotFound):
                    config = api.inspect_container(id_)["HostConfig"]["LogConfig"]
                    made = float(found[id_]["Created"])
                    settings = LogSettings(config["Type"], config["Config"] or {}, made)
                    self._logs[id_] = settings  # it never changes
        self._logs = {id_: self._logs[id_] for id_ in found if id_ in self._logs}
        # A dead container may have no name (moby daemon/list.go).
        names = {id_: (found[id_]["Names"] or [id_[:12]])[0].lstrip("/") for id_ in self._logs}
        return {names[id_]: each for id_, each in self._logs.items()}

    def managers(self) -> Mapping[str, bool]:
        with self._call("list the managers of the Swarm of") as client:
            api: Any = client.api
            nodes = api.nodes(filters={"role": "manager"})
        return {
            str(node["Description"]["Hostname"]): status["Reachability"] == "reachable"
            for node in nodes
            if (status := node.get("ManagerStatus"))
        }

    def swarm_tokens(self) -> tuple[str, str]:
        with self._call("read the join tokens of") as client:
            tokens = client.api.inspect_swarm()["JoinTokens"]
            return tokens["Worker"], tokens["Manager"]

    def swarm_rotate_tokens(self) -> None:
        # Not by docker-py's update: that one sends a whole new spec, with zeros for what is not
        # named (task history, raft ticks, …).
        with self._call("make new join tokens on") as client:
            api = client.api
            swarm = api.inspect_swarm()
            answer = api.post(
                f"{api.base_url}/v{api.api_version}/swarm/update",
                params={
                    "version": swarm["Version"]["Index"],
                    "rotateWorkerToken": "true",
                    "rotateManagerToken": "true",
                },
                json=swarm["Spec"],
                timeout=TIMEOUT_S,
            )
            _raise_for_status(answer)

    def swarm_is_bare(self) -> bool:
        with self._call("list what is in the Swarm of") as client:
            api: Any = client.api
            return not (api.services() or api.secrets() or api.configs()) and len(api.nodes()) == 1

    def swarm_init(self, address: str, labels: Mapping[str, str]) -> None:
        with self._call("initialise a Swarm on", JOIN_TIMEOUT_S) as client:
            client.swarm.init(
                advertise_addr=address, listen_addr=f"{address}:2377", labels=dict(labels)
            )

    def swarm_join(self, address: str, manager: str, token: str) -> None:
        before = self.info()
        if before is not None and before.swarm.state != "inactive":
            # Or the clean-up below would leave a Swarm that this call never joined.
            cause = f"it is in a Swarm already ({before.swarm.state})"
            raise HostError("join a Swarm on", self._name, cause)
        try:
            with self._call(f"join the Swarm through {manager} on", JOIN_TIMEOUT_S) as client:
                client.swarm.join(
                    remote_addrs=[manager],
                    join_token=token,
                    advertise_addr=address,
                    listen_addr=f"{address}:2377",
                )
        except HostError as error:
            # A join that the Engine gave up on goes on in the background (FACTS: swarm.go,
            # "Timeout was reached before node joined") and would meet the next one.
            info = self.info()
            if info is None or info.swarm.state != "active":
                self.swarm_leave()
                raise
            if not info.swarm.cluster_id:
                raise HostError("join the Swarm on", self._name, error.cause) from error

    def swarm_leave(self) -> None:
        with self._call("leave the Swarm on", JOIN_TIMEOUT_S) as client:
            client.swarm.leave(force=True)
        info = self.info()  # docker-py calls any 503 a success
        if info is not None and info.swarm.state != "inactive":
            raise HostError("leave the Swarm on", self._name, f"it is still {info.swarm.state}")

    def has_image(self, image: str) -> bool:
        try:
            with self._call("look for an image in") as client:
                api: Any = client.api
                api.inspect_image(image)
        except HostError as error:
            if isinstance(error.__cause__, docker.errors.ImageNotFound):
                return False
            raise
        return True

    def load_image(self, archive: Path) -> tuple[str, ...]:
        with (
            self._call("load an image into", IMAGE_TIMEOUT_S) as client,
            archive.open("rb") as file,
        ):
            return tuple(tag for image in client.images.load(file) for tag in image.tags)

    def pull_image(self, image: str, alive: Callable[[], None]) -> None:
        # Not by docker-py's own pull: that one has no time-out, and takes an error that comes after
        # the Engine's 200 for a success.
        registry, _ = docker.auth.resolve_repository_name(image)
        repository, tag = docker.utils.parse_repository_tag(image)
        with self._call(f"pull {image} into", IMAGE_TIMEOUT_S) as client:
            api = client.api
            account = docker.auth.get_config_header(api, registry)
            answer = api.post(
                f"{api.base_url}/v{api.api_version}/images/create",
                params={"fromImage": repository, "tag": tag or "latest"},
                headers={"X-Registry-Auth": account} if account else {},
                stream=True,
                timeout=IMAGE_TIMEOUT_S,
            )
            with answer:
                _raise_for_status(answer)
                for line in answer.iter_lines():
                    alive()
                    said = json.loads(line)
                    if "error" in said:
                        raise HostError(f"pull {image} into", self._name, said["error"])

    def container(self, name: str) -> ContainerState | None:
        try:
            with self._call("inspect a container of") as client:
                found = client.api.inspect_container(name)
                status, restarts = str(found["State"]["Status"]), int(found["RestartCount"])
                lines: tuple[str, ...] = ()
                if status != "running" or restarts:
                    text = client.api.logs(name, tail=LOG_LINES).decode("utf-8", "replace")
                    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        except HostError as error:
            if isinstance(error.__cause__, docker.errors.NotFound):
                return None
            raise
        return ContainerState(
            definition=str((found["Config"].get("Labels") or {}).get(DEFINITION, "")),
            status=status,
            restarts=restarts,
            last_lines=lines,
        )

    def run_container(self, container: Container) -> None:
        with self._call(f"run container {container.name} in", JOIN_TIMEOUT_S) as client:
            with contextlib.suppress(docker.errors.NotFound):
                client.api.stop(container.name, timeout=TIMEOUT_S)
                client.api.remove_container(container.name, force=True)
            client.containers.run(
                container.image,
                list(container.command),
                name=container.name,
                entrypoint=list(container.entrypoint),
                detach=True,
                network_mode="host",
                volumes=list(container.binds),
                labels={DEFINITION: container.definition},
                restart_policy={"Name": "always"},
                cap_drop=["ALL"],
                cap_add=list(container.capabilities),
                security_opt=["no-new-privileges"],
                read_only=True,
            )

    def start_container(self, name: str) -> None:
        with self._call(f"start container {name} in") as client:
            client.api.start(name)

    def execute(self, container: str, *command: str) -> None:
        what = f"run {' '.join(command[:2])} in container {container} of"
        with self._call(what) as client:
            api: Any = client.api
            made = api.exec_create(container, list(command))["Id"]
            words = api.exec_start(made).decode("utf-8", "replace").strip()
            if api.exec_inspect(made)["ExitCode"]:
                raise HostError(what, self._name, words)


def _raise_for_status(answer: requests.Response) -> None:
    """Raise docker-py's error, with the Engine's explanation, for a bad answer."""
    try:
        answer.raise_for_status()
    except requests.HTTPError as error:
        docker.errors.create_api_error_from_http_exception(error)


def _nothing_listens(error: BaseException) -> bool:
    """Whether an error goes back to a socket that is not there or that nobody listens on.

    docker-py and urllib3 wrap it differently on the first call of a client and on later ones, as
    cause, context or argument.
    """
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return True
    behind = (error.__cause__, error.__context__, *error.args)
    return any(_nothing_listens(each) for each in behind if isinstance(each, BaseException))


def _options(info: Mapping[str, Any]) -> dict[str, object]:
    """The options that `GET /info` shows, under their names in daemon.json."""
    registry = info.get("RegistryConfig") or {}
    pools = info.get("DefaultAddressPools") or []
    return {
        "log-driver": info.get("LoggingDriver", ""),
        "live-restore": bool(info.get("LiveRestoreEnabled")),
        "labels": info.get("Labels") or [],
        "debug": bool(info.get("Debug")),
        "registry-mirrors": registry.get("Mirrors") or [],
        "default-runtime": info.get("DefaultRuntime", ""),
        "default-address-pools": [{"base": p["Base"], "size": p["Size"]} for p in pools],
    }


def _swarm(info: Mapping[str, Any], root: Path) -> SwarmInfo:
    swarm = info.get("Swarm") or {}
    cluster = swarm.get("Cluster") or {}
    state = str(swarm.get("LocalNodeState") or "inactive")
    cluster_id = str(cluster.get("ID") or "")
    if not cluster_id and state != "inactive":
        data_root = str(info.get("DockerRootDir", "")).lstrip("/")
        cluster_id = _cluster_of_certificate(root / data_root)
    return SwarmInfo(
        state=state,
        node_id=str(swarm.get("NodeID") or ""),
        is_manager=bool(swarm.get("ControlAvailable")),
        cluster_id=cluster_id,
        labels=(cluster.get("Spec") or {}).get("Labels") or {},
        nodes=int(swarm.get("Nodes") or 0),
        error=str(swarm.get("Error") or ""),
    )


def _cluster_of_certificate(data_root: Path) -> str:
    """Return the Swarm's id, which workers have only in their certificate's organization.

    Source: swarmkit ca/certificates.go, `GenerateNewCSR`: O is the cluster, OU the role.
    """
    from cryptography import x509  # workers alone need it, and it takes a while to import
    from cryptography.x509.oid import NameOID

    try:
        pem = (data_root / "swarm/certificates/swarm-node.crt").read_bytes()
        names = x509.load_pem_x509_certificate(pem).subject
        found = names.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    except (OSError, ValueError):
        return ""
    return str(found[0].value) if found else ""
