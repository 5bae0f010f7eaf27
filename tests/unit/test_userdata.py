"""User-data is valid, small and readable; what it carries installs nodeagent or says why not."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from nodeagent import secrets, spec, userdata
from nodeagent.adapters.pki import ORDER, LocalPki
from nodeagent.errors import Secret, SpecError, UsageError
from nodeagent.secrets import ServerSecrets
from nodeagent.spec import Agent, Cluster, Role, Spec
from tools import render_examples

PROJECT = Path(__file__).parents[2]
PKI = LocalPki()
NOW = 1.7e9
BOOTSTRAP = PROJECT / "cloud-init/bootstrap.py"
STAGE = "/opt/nodeagent/user-data"
NOWHERE = Agent()


def cluster(
    agent: Agent = NOWHERE,
    *,
    servers: int = 3,
    join: tuple[str, ...] = ("10.10.0.11",),
    security: Literal["off"] | None = "off",
) -> Cluster:
    return Cluster(
        cluster="demo",
        servers=servers,
        address="10.10.0.0/16",
        join=join,
        security=security,
        agent=agent,
    )


def files_of(document: str) -> dict[str, Any]:
    return {entry["path"]: entry for entry in yaml.safe_load(document)["write_files"]}


@pytest.mark.parametrize("role", ["server", "worker"])
def test_it_carries_the_spec_of_its_role_for_root_alone(role: Role) -> None:
    document = userdata.render(
        cluster(Agent(url="https://example.com/x", sha256="0" * 64)), role, None
    )
    assert document.startswith(f"#cloud-config\n# {role} of cluster demo")
    staged = files_of(document)[f"{STAGE}/node.yaml"]
    assert staged["permissions"] == "0600"
    found = spec.parse(staged["content"], "node.yaml", Spec)
    assert (found.role, found.servers, found.agent) == (role, 3, Agent())


def test_it_runs_the_bootstrap_script_as_committed() -> None:
    document = userdata.render(cluster(), "server", None)
    assert files_of(document)[f"{STAGE}/bootstrap.py"]["content"] == BOOTSTRAP.read_text("utf-8")
    assert yaml.safe_load(document)["runcmd"] == [
        ["python3", f"{STAGE}/bootstrap.py", f"{STAGE}/bootstrap.json"]
    ]
    assert "    def main(argv: list[str]) -> None:\n" in document, "no longer readable as it stands"


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param({}, id="baked"),
        pytest.param({"url": "https://example.com/x.pyz", "sha256": "0" * 64}, id="url"),
        pytest.param({"package": "nodeagent==0.1.0"}, id="package"),
        pytest.param(
            {"package": "nodeagent", "index": "https://example.com/simple"},
            id="package-of-an-index",
        ),
    ],
)
def test_the_script_is_told_where_nodeagent_comes_from(agent: dict[str, str]) -> None:
    staged = files_of(userdata.render(cluster(Agent(**agent)), "worker", None))
    assert json.loads(staged[f"{STAGE}/bootstrap.json"]["content"]) == {
        "spec": f"{STAGE}/node.yaml",
        **agent,
    }
    assert f"{STAGE}/secrets.json" not in staged


def test_more_than_a_provider_takes_is_refused() -> None:
    assert len(userdata.render(cluster(join=("10.10.0.11",) * 1000), "server", None)) < 64 * 1024
    with pytest.raises(UsageError, match=r"providers take 65536 at most; .* a DNS name in `join`"):
        userdata.render(cluster(join=("10.10.0.11",) * 4000), "server", None)


def test_a_worker_needs_somebody_to_join_where_a_lone_server_does_not() -> None:
    lone = cluster(servers=1, join=())
    assert "role: server" in userdata.render(lone, "server", None)
    with pytest.raises(SpecError, match=r"node\.yaml of a worker: join: found nothing"):
        userdata.render(lone, "worker", None)


# -- the secrets in it


@pytest.fixture(params=["new", "while-it-rotates", "rotated"])
def made(request: pytest.FixtureRequest) -> ServerSecrets:
    """A cluster's secrets before, while and after all that it has was rotated."""
    found = secrets.new(PKI, NOW)
    if request.param == "new":
        return found
    before = (found.cluster_key,) if request.param == "while-it-rotates" else ()
    seeds = {str(purpose): (*before, PKI.seed()) for purpose in secrets.PURPOSES}
    authorities = tuple(PKI.authority(seed, NOW) for seed in seeds["ca"])
    phase = "spread" if request.param == "while-it-rotates" else ""
    return ServerSecrets(found.cluster_key, authorities, seeds, serial=1, phase=phase)


@pytest.mark.parametrize("role", ["server", "worker"])
def test_it_carries_the_secrets_of_its_role_for_root_alone(role: Role, made: ServerSecrets) -> None:
    shared = cluster(security=None)
    text = userdata.secrets_text(shared, role, made, PKI, NOW)
    staged = files_of(userdata.render(shared, role, text))
    assert json.loads(staged[f"{STAGE}/bootstrap.json"]["content"]) == {
        "spec": f"{STAGE}/node.yaml",
        "secrets": f"{STAGE}/secrets.json",
    }
    found = staged.pop(f"{STAGE}/secrets.json")
    assert found["permissions"] == "0600"
    assert found["content"] == text.reveal()
    if role == "server":
        assert found["content"] == secrets.dump(made).reveal()
    else:
        secrets.parse(found["content"], "secrets.json", role, PKI)
    for value in strings(json.loads(found["content"])):
        assert value not in str(staged), "in that file alone"


def strings(found: Any) -> Iterator[str]:
    """All long texts in JSON data; the generation is a public name."""
    if isinstance(found, str) and len(found) > 8:
        yield found
    elif isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from strings(value)


def decoded(text: str) -> Iterator[bytes]:
    """The text, and what anything in it is that could be base64."""
    yield text.encode()
    for word in re.findall(r"[A-Za-z0-9+/\n]{16,}={0,2}", text.replace("\\n", "\n")):
        packed = word.replace("\n", "").rstrip("=")
        for start in range(4):
            part = packed[start:]
            yield base64.b64decode(part[: len(part) // 4 * 4])
            yield base64.b64decode(part + "=" * (-len(part) % 4)) if len(part) % 4 != 1 else b""


def only_for_servers(made: ServerSecrets) -> dict[str, bytes]:
    """Everything that makes members, certificates or rules, as bytes."""
    found = {}
    seeds = {made.cluster_key, *(seed for each in made.rotated.values() for seed in each)}
    tokens = [secrets.token(PKI, seed, "server token") for seed in seeds]
    assert secrets.keys(made, PKI).server_token in tokens
    for number, seed in enumerate(seeds):
        raw = base64.b64decode(seed.reveal())
        found[f"seed {number}"] = raw
        found[f"seed {number}, as it is written"] = seed.reveal().encode()
        found[f"seed {number}, in hexadecimal"] = raw.hex().encode()
        token = tokens[number].reveal()
        found[f"server token {number}"] = token.encode()
        found[f"server token {number}, packed"] = uuid.UUID(token).bytes
        found[f"what CA {number} derives from"] = PKI.derive(seed, "ca", 48)
        ca = int.from_bytes(PKI.derive(seed, "ca", 48), "big") % (ORDER - 1) + 1
        found[f"key of CA {number}"] = ca.to_bytes(32, "big")
    return found


def test_a_workers_has_nothing_that_is_only_for_servers(made: ServerSecrets) -> None:
    shared = cluster(security=None)

    def carried(role: Role) -> set[str]:
        text = userdata.render(shared, role, userdata.secrets_text(shared, role, made, PKI, NOW))
        everything = list(decoded(text))
        for wrapped in list(everything):  # base64 of base64
            everything += decoded(wrapped.decode("latin-1"))
        return {
            name
            for name, value in only_for_servers(made).items()
            if any(value in each for each in everything)
        }

    assert carried("worker") == set()
    assert {"seed 0", "seed 0, as it is written"} <= carried("server"), "it would be seen"


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_secured_cluster_needs_secrets_and_another_has_no_use_for_them(role: Role) -> None:
    with pytest.raises(UsageError, match=r"`nodeagent secrets new secrets\.json` .*`security: off"):
        userdata.render(cluster(security=None), role, None)
    with pytest.raises(UsageError, match="`security: off`, so --secrets has no use"):
        userdata.render(cluster(), role, Secret("{}"))


@pytest.mark.parametrize("role", ["server", "worker"])
def test_the_examples_are_what_would_be_made_now(role: Role) -> None:
    committed = (PROJECT / f"cloud-init/{role}.example.yaml").read_text("utf-8")
    assert committed == render_examples.example(role), "run `make examples`"


@pytest.mark.parametrize("role", ["server", "worker"])
def test_the_examples_hold_no_keys_and_no_machine_takes_them(role: Role) -> None:
    staged = files_of((PROJECT / f"cloud-init/{role}.example.yaml").read_text("utf-8"))
    content = staged[f"{STAGE}/secrets.json"]["content"]
    assert content.startswith("NO KEYS HERE")
    with pytest.raises(SpecError, match="is not JSON"):
        secrets.parse(content, "secrets.json", role, PKI)


@pytest.mark.skipif(not shutil.which("cloud-init"), reason="no cloud-init command here")
@pytest.mark.parametrize("role", ["server", "worker"])
def test_cloud_init_itself_finds_it_valid(role: Role, tmp_path: Path) -> None:
    path = tmp_path / "user-data"
    shared = cluster(Agent(package="nodeagent"), security=None)
    text = userdata.secrets_text(shared, role, secrets.new(PKI, NOW), PKI, NOW)
    path.write_text(userdata.render(shared, role, text))
    checked = subprocess.run(
        ["cloud-init", "schema", "--config-file", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


# -- the bootstrap script

# Stands in for a release: says how it was called, and ends as nodeagent would.
PROGRAM = b"""\
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "shiv_root": os.environ.get("SHIV_ROOT")}))
sys.exit(78 if "wrong.yaml" in sys.argv else 0)
"""
DIGEST = hashlib.sha256(PROGRAM).hexdigest()


def bootstrap(tmp_path: Path, **config: object) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "bootstrap.json"
    path.write_text(json.dumps({"program": str(tmp_path / "opt"), "spec": "node.yaml", **config}))
    return subprocess.run(
        [sys.executable, str(BOOTSTRAP), str(path)], capture_output=True, text=True, timeout=120
    )


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`, and the last one for ever."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_port}/nodeagent.pyz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        answer = self.server.answers[min(self.server.asked, len(self.server.answers) - 1)]
        self.server.asked += 1
        self.send_response(200 if answer in ("whole", "half") else int(answer))
        self.send_header("Content-Length", str(len(PROGRAM)))
        self.end_headers()
        self.wfile.write(PROGRAM if answer == "whole" else PROGRAM[: len(PROGRAM) // 2])

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(request.param) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("server", "asked"),
    [
        pytest.param(["whole"], 1, id="at-once"),
        pytest.param(["503", "whole"], 2, id="the-server-is-not-up-yet"),
        pytest.param(["half", "whole"], 2, id="the-transfer-breaks-off"),
    ],
    indirect=["server"],
)
def test_a_release_is_fetched_checked_and_run(server: Server, asked: int, tmp_path: Path) -> None:
    first = bootstrap(tmp_path, url=server.url, sha256=DIGEST)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1]) == {
        "arguments": ["install", "--spec", "node.yaml"],
        "shiv_root": str(tmp_path / "opt/lib"),
    }
    assert server.asked == asked
    again = bootstrap(tmp_path, url=server.url, sha256=DIGEST)
    assert again.returncode == 0
    assert "is here already" in again.stdout
    assert server.asked == asked


@pytest.mark.parametrize(
    ("server", "sha256", "cause"),
    [
        pytest.param(
            ["whole"],
            "0" * 64,
            f"has the sha256 {DIGEST}, not {'0' * 64} as the cluster file says; nothing of it was "
            "run (correct agent.url or agent.sha256 and make new user-data)",
            id="another-file",
        ),
        pytest.param(
            ["404"],
            DIGEST,
            ": the server answers 404 Not Found (correct agent.url in the cluster file)",
            id="not-there",
        ),
        pytest.param(
            ["503"],
            DIGEST,
            ": the server answers 503 Service Unavailable, for 0 seconds (see that this machine "
            "reaches that address, then reboot or run this again)",
            id="never-up",
        ),
        pytest.param(
            ["half"],
            DIGEST,
            f": the transfer broke off after {len(PROGRAM) // 2} of {len(PROGRAM)} bytes, for 0 "
            "seconds (see that this machine reaches that address, then reboot or run this again)",
            id="never-whole",
        ),
    ],
    indirect=["server"],
)
def test_a_release_that_is_not_right_is_never_run(
    server: Server, sha256: str, cause: str, tmp_path: Path
) -> None:
    done = bootstrap(tmp_path, url=server.url, sha256=sha256, download_seconds=0.5)
    assert done.returncode == 1
    start = f"nodeagent: could not be installed: {server.url}"
    separator = "" if cause.startswith(":") else " "
    assert done.stderr == f"{start}{separator}{cause}\n"
    assert "arguments" not in done.stdout
    assert list((tmp_path / "opt/release").glob("*.pyz")) == []


def test_the_exit_code_of_install_is_the_one_cloud_init_sees(tmp_path: Path) -> None:
    (tmp_path / "release.pyz").write_bytes(PROGRAM)
    done = bootstrap(tmp_path, url=str(tmp_path / "release.pyz"), sha256=DIGEST, spec="wrong.yaml")
    assert done.returncode == 78


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """Secrets as cloud-init puts them on the machine."""
    path = tmp_path / "secrets.json"
    path.write_text("a canary")
    path.chmod(0o600)
    (tmp_path / "release.pyz").write_bytes(PROGRAM)
    return path


def test_secrets_are_handed_on_and_do_not_stay(staged: Path) -> None:
    config = {"url": str(staged.parent / "release.pyz"), "sha256": DIGEST, "secrets": str(staged)}
    first = bootstrap(staged.parent, **config)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["arguments"] == [
        *("install", "--spec", "node.yaml"),
        *("--secrets", str(staged)),
    ]
    assert "canary" not in first.stdout + first.stderr
    assert not staged.exists()
    again = bootstrap(staged.parent, **config)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["arguments"] == [
        *("install", "--spec", "node.yaml")
    ]


def test_secrets_stay_for_the_next_try_when_installing_fails(staged: Path) -> None:
    config = {"url": str(staged.parent / "release.pyz"), "sha256": DIGEST, "secrets": str(staged)}
    assert bootstrap(staged.parent, **config, spec="wrong.yaml").returncode == 78
    assert staged.read_text() == "a canary"
    assert staged.stat().st_mode & 0o777 == 0o600
    gone = bootstrap(staged.parent, **{**config, "sha256": "0" * 64})
    assert gone.returncode == 1
    assert staged.exists()


def test_a_baked_program_is_used_as_it_is(tmp_path: Path) -> None:
    launcher = tmp_path / "opt/nodeagent"
    launcher.parent.mkdir()
    launcher.write_bytes(f"#!{sys.executable}\n".encode() + PROGRAM)
    launcher.chmod(0o755)
    done = bootstrap(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["arguments"] == [
        "install",
        "--spec",
        "node.yaml",
    ]


def test_a_program_that_was_never_baked_is_missed_in_words(tmp_path: Path) -> None:
    done = bootstrap(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"nodeagent: could not be installed: this image has no {tmp_path}/opt/nodeagent baked in, "
        "and the cluster file names no other source (set agent.url and agent.sha256, or "
        "agent.package, and make new user-data)\n"
    )


def package_index(path: Path) -> str:
    """A package index with one package, `nodeagent`, whose command is PROGRAM."""
    folder = path / "simple/nodeagent"
    folder.mkdir(parents=True)
    wheel = "nodeagent-9.9-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        info = "nodeagent-9.9.dist-info"
        archive.writestr("program.py", b"def main():\n " + PROGRAM.replace(b"\n", b"\n "))
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: nodeagent\nVersion: 9.9\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/entry_points.txt", "[console_scripts]\nnodeagent = program:main\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    return str(path / "simple")


def test_a_package_is_installed_into_an_environment_of_its_own(tmp_path: Path) -> None:
    index = package_index(tmp_path)
    done = bootstrap(tmp_path, package="nodeagent==9.9", index=index)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["arguments"][0] == "install"
    gone = bootstrap(tmp_path, package="nodeagent==8.8", index=index)
    assert gone.returncode == 1
    assert gone.stderr.endswith(
        "could not install nodeagent==8.8: exit status 1 (correct agent.package or agent.index)\n"
    )
