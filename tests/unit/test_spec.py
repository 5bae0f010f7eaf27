"""The spec: what is wrong is named in one exact sentence, and the published schema agrees."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent import spec
from nodeagent.errors import Exit, SpecError
from nodeagent.spec import Agent, Cluster, Consul, Engine, Log, Spec

PROJECT = Path(__file__).parents[2]
GOOD = """\
cluster: demo
role: server
servers: 3
address: 10.10.0.0/16
join: [10.10.0.11, 10.10.0.12]
security: off
"""
AN_ADDRESS = "an IPv4 address, a network such as 10.10.0.0/16, or an interface name"
A_JOIN = "a list of addresses, DNS names, or Consul cloud auto-join strings (provider=…)"
AN_ENTRY = "an address, a DNS name or provider=…"
KEYS = (
    "cluster, servers, address, join, domain, datacenter, security, consul, swarm, engine, "
    "kernel, agent, role"
)


def problems(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        spec.parse(text, "node.yaml", Spec)
    return str(caught.value).split("\n")


def changed(line: str) -> str:
    """The good spec with one line in place of the line of the same key."""
    key = line.partition(":")[0]
    return "".join(
        f"{line}\n" if old.startswith(f"{key}:") else f"{old}\n" for old in GOOD.splitlines()
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param(
            "", "node.yaml: is empty; a mapping of keys to values is needed", id="empty-file"
        ),
        pytest.param(
            "# nothing yet\n",
            "node.yaml: is empty; a mapping of keys to values is needed",
            id="only-a-comment",
        ),
        pytest.param(
            "- server\n",
            "node.yaml: holds a list: ['server']; a mapping of keys to values is needed",
            id="a-list-at-the-top",
        ),
        pytest.param(
            "cluster: a: b\n",
            "node.yaml:1: is not YAML: mapping values are not allowed here",
            id="two-colons",
        ),
        pytest.param(
            "consul:\n\truntime: binary\n",
            "node.yaml:2: is not YAML: while scanning for the next token, found character '\\t' "
            "that cannot start any token (indent with spaces, not tabs)",
            id="indented-with-a-tab",
        ),
        pytest.param(
            "cluster: de\0mo\n",
            "node.yaml:1: is not YAML: '\\x00' is a character it does not allow",
            id="a-nul-byte",
        ),
        pytest.param(
            GOOD + "---\n" + GOOD,
            "node.yaml:7: is not YAML: expected a single document in the stream, "
            "but found another document",
            id="two-documents",
        ),
        pytest.param(
            GOOD + "consul: &c [*c]\n",
            "node.yaml:7: the anchor c has no place in a spec",
            id="an-alias-to-itself",
        ),
        pytest.param(
            GOOD + "datacenter: !!python/object:os.system nyc3\n",
            "node.yaml:7: the tag tag:yaml.org,2002:python/object:os.system has no place in a spec",
            id="a-python-object",
        ),
        pytest.param(
            "[" * 10_000,
            "node.yaml: is nested too deeply; a spec has three levels",
            id="ten-thousand-brackets",
        ),
        pytest.param(
            GOOD + "? [1, 2]\n: 3\n",
            f"node.yaml:7: a list: [1, 2]: unknown key (known: {KEYS})",
            id="a-list-as-a-key",
        ),
        pytest.param(
            GOOD + "<<: {domain: consul}\n",
            f"node.yaml:7: '<<': unknown key (known: {KEYS})",
            id="a-merge-key",
        ),
        pytest.param(
            GOOD + "consl: {}\n",
            "node.yaml:7: consl: unknown key (did you mean consul?)",
            id="a-typing-mistake",
        ),
        pytest.param(
            GOOD + "consul:\n  runtim: binary\n",
            "node.yaml:8: consul.runtim: unknown key (did you mean runtime?)",
            id="a-typing-mistake-inside",
        ),
        pytest.param(
            GOOD + "role: worker\n",
            "node.yaml:7: role: given twice (first on line 2; keep one)",
            id="two-roles",
        ),
        pytest.param(
            changed("role: [server, worker]"),
            "node.yaml:2: role: found a list: ['server', 'worker']; allowed: server or worker",
            id="two-roles-in-a-list",
        ),
        pytest.param(
            changed("role: sever"),
            "node.yaml:2: role: found 'sever'; allowed: server or worker (did you mean server?)",
            id="nearly-a-role",
        ),
        pytest.param(
            GOOD.replace("role: server\n", ""),
            "node.yaml: role: is missing; allowed: server or worker "
            "(what this node is in the cluster)",
            id="no-role",
        ),
        pytest.param(
            changed("security: on"),
            "node.yaml:6: security: found true; allowed: off (to have it on, leave the key out)",
            id="security-on",
        ),
        pytest.param(
            changed("servers: 0"),
            "node.yaml:3: servers: found 0; allowed: a whole number from 1 to 9",
            id="no-servers",
        ),
        pytest.param(
            changed("servers: true"),
            "node.yaml:3: servers: found true; allowed: a whole number from 1 to 9",
            id="yes-servers",
        ),
        pytest.param(
            changed('servers: "3"'),
            "node.yaml:3: servers: found '3'; allowed: a whole number from 1 to 9 "
            "(leave out the quotes)",
            id="a-quoted-number",
        ),
        pytest.param(
            changed("servers: " + "9" * 5000),
            f"node.yaml:3: servers: found '{'9' * 56}...; allowed: a whole number from 1 to 9",
            id="a-number-too-long-for-python",
        ),
        pytest.param(
            changed("cluster: 7"),
            "node.yaml:1: cluster: found 7; allowed: up to 40 lower-case letters, digits and "
            "inner dashes (put it in quotes)",
            id="a-number-for-a-name",
        ),
        pytest.param(
            changed('cluster: "a\\nb"'),
            "node.yaml:1: cluster: found 'a\\nb'; allowed: up to 40 lower-case letters, digits "
            "and inner dashes",
            id="a-name-of-two-lines",
        ),
        pytest.param(
            changed("address: 1.2.3.4.5"),
            f"node.yaml:4: address: found '1.2.3.4.5'; allowed: {AN_ADDRESS} "
            "(no such IPv4 address or network exists)",
            id="five-numbers-for-an-address",
        ),
        pytest.param(
            changed("address: 10.10.0.0/33"),
            f"node.yaml:4: address: found '10.10.0.0/33'; allowed: {AN_ADDRESS} "
            "(no such IPv4 address or network exists)",
            id="a-prefix-of-33",
        ),
        pytest.param(
            changed("address: 127.0.0.1"),
            f"node.yaml:4: address: found '127.0.0.1'; allowed: {AN_ADDRESS} "
            "(other machines cannot reach that)",
            id="loopback",
        ),
        pytest.param(
            changed("address: 0.0.0.0/0"),
            f"node.yaml:4: address: found '0.0.0.0/0'; allowed: {AN_ADDRESS} "
            "(other machines cannot reach that)",
            id="every-address-there-is",
        ),
        pytest.param(
            changed("address: 'fd00::1'"),
            f"node.yaml:4: address: found 'fd00::1'; allowed: {AN_ADDRESS}",
            id="an-ipv6-address",
        ),
        pytest.param(
            changed("join: 10.10.0.11"),
            f"node.yaml:5: join: found '10.10.0.11'; allowed: {A_JOIN} "
            "(for a single one: ['10.10.0.11'])",
            id="join-is-no-list",
        ),
        pytest.param(
            changed("join: [10.10.0.300]"),
            f"node.yaml:5: join: found a list: ['10.10.0.300']; allowed: {A_JOIN} "
            f"('10.10.0.300' is not {AN_ENTRY})",
            id="an-address-with-300-in-it",
        ),
        pytest.param(
            changed("join: []"),
            "node.yaml:5: join: found nothing; the servers cannot be found "
            "(list their addresses or a DNS name)",
            id="nobody-to-join",
        ),
        pytest.param(
            GOOD + "consul: binary\n",
            "node.yaml:7: consul: found 'binary'; allowed: a mapping of keys to values",
            id="a-word-for-a-section",
        ),
        pytest.param(
            GOOD + "consul: {archive: /srv/consul.tar}\n",
            "node.yaml:7: consul.archive: needs consul.sha256 beside it "
            "(sha256sum /srv/consul.tar)",
            id="an-archive-without-its-digest",
        ),
        pytest.param(
            GOOD + f"agent: {{url: 'https://example.com/x', package: x, sha256: {'a' * 64}}}\n",
            "node.yaml:7: agent: both url and package are given (keep one)",
            id="two-sources-of-the-agent",
        ),
    ],
)
def test_each_mistake_has_its_sentence(text: str, sentence: str) -> None:
    assert problems(text) == [sentence]


def test_all_mistakes_are_told_at_once() -> None:
    text = "cluster: Demo\nrole: boss\nservers: 3\naddress: eth1\nsecurity: off\nengin: {}\n"
    assert [line.split(" ")[1] for line in problems(text)] == ["cluster:", "role:", "engin:"]
    with pytest.raises(SpecError) as caught:
        spec.parse(text, "node.yaml", Spec)
    assert caught.value.sentence.endswith("dashes (and 2 more: nodeagent validate)")
    assert caught.value.exit_code == Exit.BAD_SPEC


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(
            lambda path: path.unlink(missing_ok=True),
            "there is no such file (write one; nodeagent schema lists the keys)",
            id="missing",
        ),
        pytest.param(lambda path: path.mkdir(), "is a directory, not a file", id="directory"),
        pytest.param(
            lambda path: path.write_bytes(b"cluster: \xff"),
            "is not UTF-8 text (byte 9)",
            id="latin-1",
        ),
        pytest.param(
            lambda path: path.write_bytes(b"#" * 10_000_000),
            "is larger than 65536 bytes; a spec has a few hundred",
            id="ten-megabytes",
        ),
        pytest.param(
            lambda path: path.symlink_to(path),
            "cannot be read: Too many levels of symbolic links",
            id="link-to-itself",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_a_wrong_spec(
    make: Any, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "node.yaml"
    make(path)
    with pytest.raises(SpecError) as caught:
        spec.load(path, Spec)
    assert str(caught.value) == f"{path}: {sentence}"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("\ufeff" + GOOD, "utf-8")
    assert spec.load(path, Spec).cluster == "demo"


def test_what_is_left_out_has_its_default() -> None:
    found = spec.parse(GOOD, "node.yaml", Spec)
    assert (found.join, found.domain, found.consul) == (
        ("10.10.0.11", "10.10.0.12"),
        "consul",
        Consul(runtime="container", image="hashicorp/consul:1.21", archive=None, sha256=None),
    )
    assert (found.majority, found.is_server, found.key_prefix) == (2, True, "nodeagent/demo/")
    assert found.engine.log is None


def test_a_section_with_everything_commented_out_is_its_default() -> None:
    assert spec.parse(GOOD + "consul:\n#  runtime: binary\n", "", Spec).consul == Consul()


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(
            Spec(cluster="a", role="server", servers=1, address="eth1", security="off"), id="least"
        ),
        pytest.param(
            Spec(
                cluster="a-1",
                role="worker",
                servers=5,
                address="10.1.2.3",
                join=("srv.example.com", "provider=digitalocean tag_name=x"),
                domain="c.example",
                datacenter="nyc3",
                security="off",
                consul=Consul(runtime="binary", archive="/srv/consul.zip", sha256="0" * 64),
                engine=Engine(log=Log(driver="local", max_size="5m", max_file=3)),
                agent=Agent(package="nodeagent==1.0", index="https://example.com/simple"),
            ),
            id="everything",
        ),
    ],
)
def test_what_is_written_is_read_back(wanted: Spec) -> None:
    text = yaml.safe_dump(spec.dump(wanted))
    assert spec.parse(text, "node.yaml", Spec) == wanted


def test_a_cluster_has_no_role() -> None:
    assert spec.parse(GOOD.replace("role: server\n", ""), "c.yaml", Cluster).servers == 3
    with pytest.raises(SpecError, match="role: unknown key"):
        spec.parse(GOOD, "c.yaml", Cluster)


def test_garbage_never_escapes_as_another_error() -> None:
    """Any bytes are a spec, or a SpecError in lines a terminal can show."""
    chance = random.Random(2016)
    bits = [
        *"[]{}:-&*!|>'\"%@`,#? \n\t<=~.0",
        "\0",
        "\x85",
        "\u2028",
        "é",
        "!!int ",
        "? ",
        "2024-13-45",
    ]
    refused = 0
    for _ in range(1500):
        text = list(GOOD + "consul: {runtime: binary}\nengine:\n  log: {max_file: 3}\n")
        for _ in range(chance.randint(1, 6)):
            text[chance.randrange(len(text))] = chance.choice(bits)
        try:
            spec.parse("".join(text), "node.yaml", Spec)
        except SpecError as error:
            refused += 1
            lines = str(error).split("\n")
            assert all(line.isprintable() and len(line) < 500 for line in lines), lines
    assert refused > 500


# -- the published schema

SOUND = [
    GOOD,
    changed("address: eth1"),
    changed("address: 10.10.0.11"),
    changed("security: 'off'"),
    changed("join: [a.example.com, 10.0.0.1, 'provider=aws tag=x', _srv._tcp.x.]"),
    GOOD + "consul:\n",
    GOOD + "engine: {log: }\nconsul: {archive: null}\n",
    GOOD + "engine: {log: {driver: local, max_size: 1g, max_file: 2}}\n",
    GOOD + f"consul: {{runtime: binary, archive: /srv/x, sha256: {'b' * 64}}}\n",
]
WRONG = [
    "[]",
    "cluster: demo\n",
    changed("cluster: Demo"),
    changed("cluster: " + "a" * 41),
    changed("cluster: a-"),
    changed("role: boss"),
    changed("servers: 10"),
    changed("servers: true"),
    changed("servers: '3'"),
    changed("address: ''"),
    changed("address: 3"),
    changed("join: 10.0.0.1"),
    changed("join: [3]"),
    changed("join: [10.0.0.300]"),
    changed("join: [10.0.0]"),
    changed("join: [a..b]"),
    changed("join:"),
    changed("security: on"),
    changed("security: 0"),
    GOOD + "extra: 1\n",
    GOOD + "consul: {image: ''}\n",
    GOOD + "consul: []\n",
    GOOD + "consul: {runtime: pod}\n",
    GOOD + "engine: {log: {max_size: 10}}\n",
    GOOD + "engine: {log: {max_file: 1}}\n",
    GOOD + "agent: {url: ftp://example.com/x}\n",
    GOOD + "domain: Consul\n",
    GOOD + "datacenter:\n",
]
# What JSON Schema cannot say, or says in its own way: it takes these, and the parser does not.
ONLY_OURS = [
    changed("servers: 3.0"),
    changed("address: 127.0.0.1"),
    changed("address: 1.2.3.4.5"),
    changed("address: 'fd00::1'"),
    changed("join: []"),
    GOOD + "consul: {archive: /srv/x}\n",
    GOOD + "agent: {url: /srv/x}\n",
    GOOD + "agent: {index: 'https://example.com/simple'}\n",
]


def schema_takes(text: str) -> bool:
    jsonschema: Any = importlib.import_module("jsonschema")
    jsonschema.Draft202012Validator.check_schema(spec.json_schema())
    return bool(jsonschema.Draft202012Validator(spec.json_schema()).is_valid(yaml.safe_load(text)))


def parser_takes(text: str) -> bool:
    try:
        spec.parse(text, "node.yaml", Spec)
    except SpecError:
        return False
    return True


def test_schema_and_parser_take_the_same() -> None:
    assert [text for text in SOUND if not (parser_takes(text) and schema_takes(text))] == []


def test_schema_and_parser_refuse_the_same() -> None:
    assert [text for text in WRONG if parser_takes(text) or schema_takes(text)] == []


def test_where_the_schema_is_milder_is_known() -> None:
    verdicts = {(parser_takes(text), schema_takes(text)) for text in ONLY_OURS}
    assert verdicts == {(False, True)}


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((PROJECT / "docs/node.schema.json").read_text("utf-8"))
    assert committed == spec.json_schema(), "run `make schema`"
