"""Clock, interfaces, routing rules and DNS: what the program relies on, asked of the real ones."""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nodeagent import paths
from nodeagent.adapters.clock import SystemClock
from nodeagent.adapters.network import LocalNetwork
from nodeagent.adapters.resolver import DnsResolver
from nodeagent.errors import HostError
from nodeagent.host import Interface, Rule
from nodeagent.steps import guard
from tests.contract.surroundings import Process, needs_root, own_network
from tests.lab.host import LabError, run, wait_until

LONG_S = 60  # a wait that nothing but a wake ends in time


def test_a_wake_ends_a_wait() -> None:
    clock = SystemClock()
    began = clock.monotonic()
    threading.Timer(0.05, clock.wake).start()
    assert clock.wait(LONG_S)
    assert clock.monotonic() - began < LONG_S / 2


def test_a_wake_before_the_wait_is_not_lost_and_counts_once() -> None:
    clock = SystemClock()
    clock.wake()
    clock.wake()
    assert clock.wait(LONG_S)
    began = clock.monotonic()
    assert not clock.wait(0.01)
    assert clock.monotonic() - began >= 0.01


@pytest.mark.lab
@needs_root
def test_interfaces_with_every_ipv4_address() -> None:
    with own_network():
        run("ip", "link", "add", "eth9", "type", "bridge")
        run("ip", "address", "add", "10.10.0.11/16", "dev", "eth9")
        run("ip", "address", "add", "10.19.0.5/20", "dev", "eth9")
        run("ip", "address", "add", "10.77.0.1/32", "dev", "eth9")
        run("ip", "address", "add", "fd00::1/64", "dev", "eth9")
        run("ip", "link", "set", "eth9", "up")
        run("ip", "link", "add", "eth8", "type", "bridge")
        found = LocalNetwork().interfaces()
    assert set(found) == {
        Interface("lo", "127.0.0.1/8"),
        Interface("eth9", "10.10.0.11/16"),
        Interface("eth9", "10.19.0.5/20"),
        Interface("eth9", "10.77.0.1/32"),
    }


def test_the_host_name_is_short() -> None:
    name = LocalNetwork().hostname()
    assert name
    assert "." not in name


# -- routing rules

GUARD = (Path(__file__).parents[2] / "systemd" / paths.GUARD_UNIT).read_text("utf-8")


def commands(key: str) -> list[list[str]]:
    """What the guard's unit runs, as systemd takes its lines apart (systemd.service(5))."""
    lines = re.findall(rf"^{key}=-?(.*)$", GUARD.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line.replace("$$", "$")) for line in lines]


@pytest.mark.lab
@needs_root
def test_the_guards_unit_puts_up_its_rules_once_and_takes_them_down() -> None:
    network = LocalNetwork()
    with own_network():
        before = network.rules()
        assert before[0] == Rule(0, frozenset(), "lookup local")
        for _ in range(2):
            for words in commands("ExecStart"):
                run(*words)
            found = network.rules()
            assert set(found) - set(before) == set(guard.WANTED)
            assert len(found) == len(before) + len(guard.WANTED), "none of them twice"
        for words in commands("ExecStop"):
            run(*words)
        assert network.rules() == before


@pytest.mark.lab
@needs_root
def test_the_guards_unit_fails_when_the_kernel_refuses() -> None:
    [words] = commands("ExecStart")
    with own_network(), pytest.raises(LabError, match="Operation not permitted"):
        run("setpriv", "--bounding-set=-net_admin", *words)


@pytest.mark.lab
@needs_root
@pytest.mark.parametrize(
    "words",
    [
        "from 10.0.0.0/8 to 169.254.169.254 prohibit",
        "not to 169.254.169.254 prohibit",
        "to 169.254.169.254 fwmark 1 prohibit",
        "to 169.254.169.254 ipproto tcp dport 80 prohibit",
        "to 169.254.169.0/24 prohibit",
        "to 169.254.169.254 unreachable",
        "to 169.254.169.254 lookup 100",
    ],
)
def test_a_rule_that_is_not_quite_the_guards_is_told_apart(words: str) -> None:
    with own_network():
        before = LocalNetwork().rules()
        run("ip", "rule", "add", "pref", "101", *words.split())
        [found] = set(LocalNetwork().rules()) - set(before)
    assert found.priority == 101
    assert found not in guard.WANTED


@pytest.mark.lab
@needs_root
def test_a_watch_wakes_for_each_rule_that_goes_and_for_none_that_comes() -> None:
    wakes: list[None] = []
    stop = threading.Event()

    def watch() -> None:
        LocalNetwork().watch_rules(lambda: wakes.append(None), stop)

    with own_network():  # a thread begins where the one that starts it is
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        wait_until(lambda: len(wakes) == 1, 10, "the watch to begin")
        for number in range(100, 105):
            run("ip", "rule", "add", "pref", str(number), "prohibit")
        run("ip", "rule", "delete", "pref", "100")
        wait_until(lambda: len(wakes) > 1, 10, "the watch to wake")
        stop.set()
        run("ip", "rule", "delete", "pref", "101")
        thread.join(10)
    assert not thread.is_alive()
    assert len(wakes) == 3


@pytest.mark.parametrize(
    "script", ["exit 1", "echo no", "echo '[{}]'", "echo 7", "echo '[7]'", "echo '[[]]'", None]
)
def test_an_ip_that_does_not_do_as_expected_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    if script is not None:
        (tmp_path / "ip").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="routing rules"):
        LocalNetwork().rules()


# -- DNS

NAMES: Mapping[str, Sequence[str]] = {
    "servers.example": ("10.0.0.1", "10.0.0.2"),
    "one.example": ("10.0.0.11",),
    "two.example": ("10.0.0.12", "10.0.0.11"),
}


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnsResolver]:
    """A resolver with a DNS server of its own on 127.0.0.1, in a network of its own."""
    top = tmp_path_factory.mktemp("dns")
    hosts = "".join(f"{each} {name}\n" for name, all_ in NAMES.items() for each in all_)
    (top / "hosts").write_text(hosts)
    words = (
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=",
        "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts",
        f"--addn-hosts={top}/hosts", "--address=/#/",
        "--srv-host=srv.example,one.example,8300", "--srv-host=srv.example,two.example,8300",
        "--srv-host=lost.example,none.example,8300",
    )  # fmt: skip
    conf = top / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\n")
    found = DnsResolver(resolv_conf=str(conf))
    with own_network(), Process(*words, log=top / "log") as process:

        def answers() -> bool:
            process.must_run()
            try:
                return bool(found.addresses("one.example"))
            except HostError:
                return False

        wait_until(answers, 10, "the DNS server")
        yield found


@pytest.mark.lab
@needs_root
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("servers.example", {"10.0.0.1", "10.0.0.2"}),
        ("srv.example", {"10.0.0.11", "10.0.0.12"}),
        ("SRV.example.", {"10.0.0.11", "10.0.0.12"}),
        ("lost.example", set()),
        ("unknown.example", set()),
    ],
)
def test_a_name_stands_for_its_srv_targets_or_itself(
    resolver: DnsResolver, name: str, wanted: set[str]
) -> None:
    found = resolver.addresses(name)
    assert set(found) == wanted
    assert len(found) == len(wanted), "each once"


@pytest.mark.lab
@needs_root
def test_dns_that_does_not_answer_is_an_error(resolver: DnsResolver, tmp_path: Path) -> None:
    # Nothing listens on 127.0.0.2, nor on Consul's port.
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.2\n")
    with pytest.raises(HostError, match=r"one\.example"):
        DnsResolver(resolv_conf=str(tmp_path / "resolv.conf")).addresses("one.example")
    with pytest.raises(HostError, match=r"consul\.service"):
        resolver.consul_servers("consul")
    with pytest.raises(HostError, match=r"resolv\.conf"):
        DnsResolver(resolv_conf=str(tmp_path / "none/resolv.conf")).addresses("one.example")


@pytest.mark.parametrize("name", ["a..b", "x" * 70 + ".example", "." * 3])
def test_a_name_that_is_none_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    with pytest.raises(HostError):
        DnsResolver(resolv_conf=str(tmp_path / "resolv.conf")).addresses(name)


@pytest.mark.lab
@needs_root
def test_the_tests_own_network_leads_nowhere() -> None:
    here = os.readlink("/proc/thread-self/ns/net")
    with own_network():
        assert os.readlink("/proc/thread-self/ns/net") != here
        with pytest.raises(LabError, match="unreachable"):
            run("ip", "route", "get", "203.0.113.1")
    assert os.readlink("/proc/thread-self/ns/net") == here
