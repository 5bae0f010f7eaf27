"""Names resolve on the machine and in its containers: facts in, plan out, and back to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from nodeagent import paths
from nodeagent.changes import Change
from nodeagent.errors import HostError
from nodeagent.host import Host, Listener, Rule, Unit
from nodeagent.plan import Plan
from nodeagent.steps import consul, dns
from nodeagent.steps.dns import ADDRESS, DROP_IN_TEXT, LINE, Seen
from tests.unit.expect import said
from tests.unit.fakes import RESOLVED_STUB, Machine, World, make_spec

SPEC = make_spec()
UP = Unit("loaded", "active", "run-1", "enabled", "success")
NONE = Unit("not-found", "inactive")
OURS = ("nodeagent0",)
RESOLVED_THERE = Listener(ADDRESS, "systemd-resolve")
CONSUL_THERE = Listener(ADDRESS, "root")
ELSEWHERE = Listener("127.0.0.53", "systemd-resolve")
PEERS = ("10.10.0.0/16@eth1", "203.0.113.0/24@eth0")
PEERS_LINE = f'PEERS="{" ".join(PEERS)}"\n'
RULES = (
    Rule(101, frozenset({"dst 169.254.169.254"}), "prohibit"),
    Rule(102, frozenset({f"src {ADDRESS}", "dst 10.10.0.0", "dstlen 16"}), "prohibit"),
    Rule(102, frozenset({f"src {ADDRESS}", "dst 203.0.113.0", "dstlen 24"}), "prohibit"),
)

RIGHT = Seen(
    unit=UP,
    is_resolved=True,
    resolv_conf=RESOLVED_STUB,
    homes=OURS,
    listeners=(ELSEWHERE, RESOLVED_THERE),
    peers=PEERS,
    rules=RULES,
    environment=f"{PEERS_LINE}DOMAIN=consul\n",
    drop_in=DROP_IN_TEXT,
    resolved=Unit("loaded", "active", "run-7", "enabled"),
    routed=("consul",),
)
FRESH = replace(
    RIGHT,
    unit=Unit("loaded", "inactive", "", "disabled"),
    homes=(),
    listeners=(ELSEWHERE,),
    environment=None,
    drop_in=None,
    routed=(),
)
OWNERS = "# the owner's\nsearch example\nnameserver 10.10.0.1\noptions timeout:2"
PLAIN = Seen(
    unit=UP,
    is_resolved=False,
    resolv_conf=OWNERS.replace("nameserver", f"{LINE}nameserver", 1),
    homes=OURS,
    listeners=(CONSUL_THERE,),
    peers=PEERS,
    rules=RULES,
    environment=PEERS_LINE,
)
DONE = [f"done names under consul resolve through systemd-resolved, for containers on {ADDRESS}"]
DONE_PLAIN = [f"done names under consul resolve through Consul on {ADDRESS}"]
UNIT = "nodeagent-dns.service"
WRITE_LINE = ["do write /etc/resolv.conf"]
NO_SERVER = [
    "block /etc/resolv.conf names no server, so there is nobody to ask for names outside the "
    "cluster",
    "fix a line such as `nameserver 1.1.1.1` in /etc/resolv.conf, as a plain file",
]


def taken(what: str) -> list[str]:
    return [
        f"block port 53 of {ADDRESS} is taken: {what}",
        "fix have it listen on the addresses alone where it is needed; "
        "ss -lnup 'sport = 53' names it",
    ]


@pytest.mark.parametrize(
    ("seen", "plan"),
    [
        pytest.param(RIGHT, DONE, id="all-right"),
        pytest.param(FRESH, ["do write /var/lib/nodeagent/dns.env"], id="first-boot"),
        pytest.param(
            replace(FRESH, environment=f"{PEERS_LINE}DOMAIN=consul\n"),
            [f"do enable {UNIT}"],
            id="unit-disabled",
        ),
        pytest.param(
            replace(
                FRESH,
                environment=f"{PEERS_LINE}DOMAIN=consul\n",
                unit=replace(UP, active="inactive"),
            ),
            [f"do start {UNIT}"],
            id="killed-before-start",
        ),
        pytest.param(
            replace(RIGHT, unit=replace(UP, active="activating")),
            [f"wait {UNIT} to start"],
            id="unit-starting",
        ),
        pytest.param(
            replace(RIGHT, unit=replace(UP, active="failed"), journal=("Unknown device type.",)),
            [f"block {UNIT} fails: Unknown device type.", f"fix journalctl -u {UNIT}"],
            id="kernel-without-veth",
        ),
        pytest.param(
            replace(RIGHT, unit=NONE),
            [f"block {UNIT} is not installed", "fix nodeagent install"],
            id="installed-by-an-older-version",
        ),
        pytest.param(
            replace(RIGHT, unit=replace(UP, load="masked", active="inactive")),
            [f"block {UNIT} is masked", f"fix systemctl unmask {UNIT}"],
            id="unit-masked",
        ),
        pytest.param(
            replace(RIGHT, homes=()),
            [f"do restart {UNIT}: {ADDRESS} is gone"],
            id="interface-deleted",
        ),
        pytest.param(
            replace(RIGHT, rules=RULES[:2]),
            [f"do restart {UNIT}: other machines could ask there"],
            id="open-to-neighbours",
        ),
        pytest.param(
            replace(RIGHT, rules=(*RULES, Rule(102, frozenset({"src 10.0.0.1"}), "prohibit"))),
            [f"do restart {UNIT}: other machines could ask there"],
            id="one-network-too-many",
        ),
        pytest.param(
            replace(RIGHT, unfiltered=("eth1",)),
            [f"do restart {UNIT}: other machines could ask there"],
            id="somebody-switched-the-filter-off",
        ),
        pytest.param(
            replace(RIGHT, peers=PEERS[:1]),
            ["do write /var/lib/nodeagent/dns.env"],
            id="a-network-is-gone",
        ),
        pytest.param(
            replace(RIGHT, homes=("eth7",)),
            [
                f"block {ADDRESS} is this machine's address on eth7 already",
                "fix give eth7 another address",
            ],
            id="the-owner-has-our-address",
        ),
        pytest.param(
            replace(RIGHT, environment=f"{PEERS_LINE}DOMAIN=old\n"),
            ["do write /var/lib/nodeagent/dns.env"],
            id="domain-changed",
        ),
        pytest.param(
            replace(RIGHT, routed=("old",)),
            [f"do restart {UNIT}: systemd-resolved.service was not told of consul"],
            id="killed-after-the-domain-was-written",
        ),
        pytest.param(
            replace(RIGHT, drop_in=None, listeners=(ELSEWHERE,)),
            [
                "do write /run/nodeagent/resolved-restart-pending",
                "do write /etc/systemd/resolved.conf.d/nodeagent.conf",
            ],
            id="nothing-told-to-resolved",
        ),
        pytest.param(
            replace(RIGHT, listeners=(ELSEWHERE,), restart_pending="run-7"),
            [
                "do restart systemd-resolved.service: "
                "/etc/systemd/resolved.conf.d/nodeagent.conf changed"
            ],
            id="killed-before-the-restart",
        ),
        pytest.param(
            replace(RIGHT, restart_pending="run-6"),
            ["do remove /run/nodeagent/resolved-restart-pending"],
            id="killed-after-the-restart",
        ),
        pytest.param(
            replace(RIGHT, listeners=(ELSEWHERE,), restart_pending="run-6"),
            [
                f"block systemd-resolved.service does not listen on {ADDRESS}, although "
                "/etc/systemd/resolved.conf.d/nodeagent.conf says so",
                "fix journalctl -u systemd-resolved.service; "
                "then systemctl restart systemd-resolved.service",
            ],
            id="restarted-in-vain-and-not-again",
        ),
        pytest.param(
            replace(RIGHT, listeners=(ELSEWHERE, CONSUL_THERE), restart_pending="run-7"),
            [f"wait Consul to leave port 53 of {ADDRESS} to systemd-resolved.service"],
            id="resolved-is-new-here-and-consul-answers-still",
        ),
        pytest.param(
            replace(RIGHT, resolved=Unit("loaded", "activating"), listeners=(), routed=()),
            ["wait systemd-resolved.service to start"],
            id="resolved-restarting",
        ),
        pytest.param(
            replace(RIGHT, resolved=Unit("loaded", "inactive"), listeners=(), routed=()),
            [
                "block systemd-resolved.service does not run, although this machine's programs "
                "ask it for names",
                "fix systemctl restart systemd-resolved.service",
            ],
            id="resolved-stopped-under-its-users",
        ),
        pytest.param(
            replace(RIGHT, listeners=(ELSEWHERE, Listener("0.0.0.0", "dnsmasq"))),
            taken("0.0.0.0 by a program of dnsmasq"),
            id="a-dns-server-on-all-addresses",
        ),
        pytest.param(
            replace(PLAIN, listeners=(Listener("::", "unbound"), Listener(ADDRESS, "bind"))),
            taken(f"{ADDRESS} by a program of bind, :: by a program of unbound"),
            id="two-dns-servers",
        ),
        pytest.param(
            replace(PLAIN, listeners=(CONSUL_THERE, Listener("127.0.0.1", "dnsmasq"))),
            DONE_PLAIN,
            id="a-dns-server-on-its-own-address",
        ),
        pytest.param(PLAIN, DONE_PLAIN, id="plain-all-right"),
        pytest.param(replace(PLAIN, listeners=()), DONE_PLAIN, id="plain-before-consul-runs"),
        pytest.param(replace(PLAIN, resolv_conf=OWNERS), WRITE_LINE, id="plain-without-the-line"),
        pytest.param(
            replace(PLAIN, resolv_conf=f"{OWNERS}\n{LINE}"), WRITE_LINE, id="plain-line-is-last"
        ),
        pytest.param(
            replace(PLAIN, resolv_conf=f"{LINE}{LINE}{OWNERS}"), WRITE_LINE, id="plain-line-twice"
        ),
        pytest.param(
            replace(PLAIN, environment=f"{PEERS_LINE}DOMAIN=consul\n"),
            ["do write /var/lib/nodeagent/dns.env"],
            id="plain-since-today",
        ),
        pytest.param(
            replace(PLAIN, drop_in=DROP_IN_TEXT, listeners=(RESOLVED_THERE,)),
            ["do remove /etc/systemd/resolved.conf.d/nodeagent.conf"],
            id="resolved-is-asked-no-more",
        ),
        pytest.param(
            replace(PLAIN, listeners=(RESOLVED_THERE,)),
            [
                "do restart systemd-resolved.service: "
                "/etc/systemd/resolved.conf.d/nodeagent.conf is gone"
            ],
            id="resolved-has-to-leave-the-port",
        ),
        pytest.param(replace(PLAIN, resolv_conf=""), NO_SERVER, id="plain-empty"),
        pytest.param(replace(PLAIN, resolv_conf=LINE), NO_SERVER, id="plain-nobody-else"),
        pytest.param(
            replace(PLAIN, resolv_conf=None),
            [NO_SERVER[0].replace("names no server", "is missing or leads nowhere"), NO_SERVER[1]],
            id="plain-dangling-link",
        ),
        pytest.param(
            replace(PLAIN, resolv_conf=f"{LINE}nameserver 192.0.2.1\nnameserver 192.0.2.2\n"),
            DONE_PLAIN,
            id="plain-two-others",
        ),
        pytest.param(
            replace(
                PLAIN,
                resolv_conf=f"{LINE}nameserver 192.0.2.1\nnameserver 192.0.2.2\n"
                "nameserver 192.0.2.3\n",
            ),
            [f"{DONE_PLAIN[0]}; 192.0.2.3 is one too many to be asked"],
            id="plain-three-others",
        ),
        pytest.param(
            replace(PLAIN, resolv_conf=f"{LINE}nameserver 127.0.0.1\n"),
            [
                f"{DONE_PLAIN[0]}; containers ask Docker's own for others, as none here is theirs "
                "to reach"
            ],
            id="plain-others-on-loopback",
        ),
    ],
)
def test_plan(seen: Seen, plan: list[str]) -> None:
    assert said(dns.diff(SPEC, seen)) == plan


TEXTS = [
    pytest.param("nameserver 192.0.2.1\n", ("192.0.2.1",), id="one"),
    pytest.param("nameserver 192.0.2.1", ("192.0.2.1",), id="no-newline-at-the-end"),
    pytest.param(OWNERS, ("10.10.0.1",), id="in-the-middle"),
    pytest.param("#x\r\n\n nameserver 192.0.2.9\nnameserver\t192.0.2.1 # a\r\n",
                 ("192.0.2.1",), id="tabs-and-carriage-returns"),
    pytest.param("# nameserver 192.0.2.9\n;nameserver 192.0.2.8\nnameserver 192.0.2.1;a\n",
                 ("192.0.2.1",), id="comments"),
    pytest.param("nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n",
                 ("192.0.2.1", "192.0.2.2"), id="three"),
    pytest.param("nameserver 2001:db8::1\nnameserver 192.0.2.1\n", ("192.0.2.1",), id="ipv6"),
    pytest.param("nameserver 127.0.0.1\nnameserver 192.0.2.1\n", ("192.0.2.1",), id="loopback"),
    pytest.param("nameserver 127.0.0.1\n", dns.DOCKERS_OWN, id="loopback-alone"),
    pytest.param("nameserver 0.0.0.0\n", dns.DOCKERS_OWN, id="the-machine-itself"),
    pytest.param("nameserver fe80::1%eth0\n", dns.DOCKERS_OWN, id="with-a-zone"),
    pytest.param("nameserver 192.0.2.1\nsearch \udcff\x0c\x1c\x85\u2028\n",
                 ("192.0.2.1",), id="bytes-that-are-no-text"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "upstreams"), TEXTS)
def test_resolv_conf_gets_one_line_and_loses_it_again(
    text: str, upstreams: tuple[str, ...]
) -> None:
    wanted = dns.with_line(text)
    before, _, after = wanted.partition(LINE)
    assert after.startswith("nameserver")
    assert not any(line.startswith("nameserver") for line in before.split("\n"))
    assert dns.with_line(wanted) == wanted
    assert dns.without_line(wanted) == dns.without_line(text) == text
    for each in (text, wanted):
        assert dns.container_servers(False, each) == (ADDRESS, *upstreams)
        assert dns.container_servers(True, each) == (ADDRESS,)


# -- whole machines


class Killed(BaseException):
    """kill -9: nothing in the program may catch it."""


Diff = Callable[..., Plan]


def converge(machine: Machine, diff: Diff = dns.diff, after: int = 99) -> list[str]:
    """Do what is planned until nothing is, or die after so many changes; return all plans."""
    lines: list[str] = []
    left = itertools.count(after, -1)
    for _ in range(20):
        plan = diff(SPEC, dns.observe(SPEC, machine.host))
        lines += said(plan)
        if not plan.changes:
            return lines
        for change in plan.changes:
            if next(left) <= 0:
                raise Killed
            change.apply(machine.host)
    raise AssertionError(lines)


def with_resolved() -> Machine:
    return World().machine(SPEC, "10.10.0.11")


def plain() -> Machine:
    machine = with_resolved()
    machine.systemd.units[dns.RESOLVED] = Unit("masked", "inactive", "", "masked")
    machine.files.remove(dns.STUB)
    machine.files.remove(dns.RESOLV_CONF)
    machine.files.write(dns.RESOLV_CONF, OWNERS, 0o640)
    return machine


def linked() -> Machine:
    """As NetworkManager and resolvconf have it."""
    machine = plain()
    other = dns.STUB.parents[2] / "NetworkManager" / "resolv.conf"
    machine.files.remove(dns.RESOLV_CONF)
    machine.files.write(other, OWNERS, 0o644)
    machine.files.link(dns.RESOLV_CONF, other)
    return machine


MACHINES = [with_resolved, plain, linked]


def state(machine: Machine) -> tuple[object, ...]:
    units = {name: (unit.active, unit.enabled) for name, unit in machine.systemd.units.items()}
    network = machine.network
    return (
        dict(machine.files.texts),
        dict(machine.files.modes),
        dict(machine.files.links),
        units,
        network.interfaces(),
        network.listeners(53),
        network.rules(),
    )


@pytest.mark.parametrize("make", MACHINES)
def test_what_was_done_is_undone_to_the_byte(make: Callable[[], Machine]) -> None:
    machine = make()
    before = state(machine)
    assert converge(machine)[-1] in (*DONE, *DONE_PLAIN)
    assert state(machine) != before
    assert converge(machine) == converge(machine), "and once is enough"
    assert converge(machine, dns.undo)[-1] == "done names resolve as without nodeagent"
    assert state(machine) == before


@pytest.mark.parametrize("make", MACHINES)
@pytest.mark.parametrize("death", ["agent", "power"])
def test_killed_after_every_change_the_next_run_goes_on(
    make: Callable[[], Machine], death: str
) -> None:
    whole = make()
    converge(whole)
    converge(whole, dns.undo)
    clean = state(whole)
    done = make()
    lines = converge(done)
    total = sum(line.startswith("do ") for line in lines)
    assert total >= 3
    for after in range(total):
        machine = make()
        with pytest.raises(Killed):
            converge(machine, after=after)
        if death == "power" and make is not linked:  # whose file nobody would write again
            machine.lose_power()
            machine.boot()
        assert converge(machine)[-1] == lines[-1], after
        assert machine.files.read(dns.RESOLV_CONF) == done.files.read(dns.RESOLV_CONF)
        for undone in range(total):
            try:
                converge(machine, dns.undo, after=undone)
            except Killed:
                continue
        converge(machine, dns.undo)
        assert machine.files.read(dns.RESOLV_CONF) == whole.files.read(dns.RESOLV_CONF)
        assert state(machine)[-3:] == clean[-3:]


def test_resolved_is_restarted_once_and_only_where_it_is_asked() -> None:
    machine = with_resolved()
    lines = converge(machine)
    assert sum("restart systemd-resolved" in line for line in lines) == 1
    machine.lose_power()
    machine.systemd.units[dns.RESOLVED] = Unit("loaded", "inactive", "", "enabled")
    machine.boot()
    assert converge(machine) == DONE, "both units have what they need on disk"
    assert not any("resolved" in line for line in converge(plain()))


def test_resolved_that_cannot_listen_is_restarted_once_and_then_named() -> None:
    machine = with_resolved()

    def too_old(name: str) -> None:
        type(machine.systemd).restart(machine.systemd, name)
        machine.network.is_resolved_there = False

    machine.systemd.restart = too_old  # type: ignore[method-assign] # a machine with systemd 245
    first = converge(machine)
    assert sum(line.startswith("do restart systemd-resolved") for line in first) == 1
    assert "does not listen" in first[-2]
    assert not any(line.startswith("do ") for line in converge(machine))


def test_a_machine_without_resolved_is_not_asked_about_it() -> None:
    machine = plain()

    def refuse(interface: str) -> tuple[str, ...]:
        raise AssertionError(interface)

    machine.resolver.routed = refuse  # type: ignore[method-assign] # a call that fails
    assert converge(machine)[-1:] == DONE_PLAIN


@pytest.mark.parametrize(
    ("stub", "nsswitch", "resolv_conf", "wanted"),
    [
        pytest.param(True, "hosts: files dns\n", "nameserver 127.0.0.53\n", True, id="stub"),
        pytest.param(True, "hosts: files dns\n", "nameserver 127.0.0.54\n", True, id="other-stub"),
        pytest.param(True, "hosts: files dns\n", "nameserver 192.0.2.1\n", False, id="bypassed"),
        pytest.param(
            True, "hosts: files resolve [!UNAVAIL=return] dns\n", "nameserver 192.0.2.1\n", True,
            id="by-libc",
        ),
        pytest.param(True, "#hosts: resolve\n", "nameserver 192.0.2.1\n", False, id="comment"),
        pytest.param(True, None, None, False, id="no-files"),
        pytest.param(
            False, "hosts: resolve\n", "nameserver 127.0.0.53\n", False, id="never-ran-since-boot"
        ),
    ],
)  # fmt: skip
def test_who_is_asked_for_names(
    stub: bool, nsswitch: str | None, resolv_conf: str | None, wanted: bool
) -> None:
    machine = with_resolved()
    machine.files.remove(dns.RESOLV_CONF)
    for path, text in (
        (dns.STUB, "" if stub else None),
        (dns.NSSWITCH, nsswitch),
        (dns.RESOLV_CONF, resolv_conf),
    ):
        machine.files.remove(path)
        if text is not None:
            machine.files.write(path, text, 0o644)
    machine.systemd.stop(dns.RESOLVED)  # a moment's absence tells nothing
    assert dns.uses_resolved(machine.host) is wanted
    assert (dns.servers(machine.host) == (ADDRESS,)) is wanted


# -- what Consul has to do with it


def config(machine: Machine) -> str:
    seen = consul.observe(SPEC, machine.host)
    answers = seen.answers_names
    text = consul.render(SPEC, machine.address, machine.name, answers_names=answers)
    made = consul.container(SPEC, text, answers_names=answers)
    assert made.capabilities == (("NET_BIND_SERVICE",) if answers else ())
    assert answers == ('"dns": "169.254.53.53"' in text) == ('"dns": 53' in text)
    return "here" if answers else "loopback"


def test_consul_answers_on_our_address_where_nobody_else_does() -> None:
    machine = with_resolved()
    assert config(machine) == "loopback"
    converge(machine)
    assert config(machine) == "loopback"
    machine = plain()
    assert config(machine) == "loopback", "before the address is there it could not start"
    converge(machine)
    assert config(machine) == "here"
    machine.network.taken = (Listener("0.0.0.0", "dnsmasq"),)
    assert config(machine) == "loopback", "a cluster without names is better than none"
    assert "is taken" in converge(machine)[0]


def test_a_unit_that_fails_says_why() -> None:
    machine = with_resolved()
    machine.systemd.failing[paths.DNS_UNIT] = ("RTNETLINK answers: Operation not supported",)
    with pytest.raises(HostError, match=r"nodeagent-dns\.service"):
        converge(machine)
    assert converge(machine)[0].endswith("fails: RTNETLINK answers: Operation not supported")


@pytest.mark.parametrize(
    ("everywhere", "there", "wanted"),
    [("0", "0", ("eth1",)), ("0", "1", ()), ("1", "0", ()), ("2", "2", ()), ("0", None, ())],
)
def test_the_kernels_filter_is_on_where_one_of_its_two_switches_is(
    everywhere: str, there: str | None, wanted: tuple[str, ...]
) -> None:
    machine = plain()
    for name, value in (("all", everywhere), ("eth0", "2"), ("eth1", there)):
        if value is not None:
            path = dns.NSSWITCH.parents[1] / f"proc/sys/net/ipv4/conf/{name}/rp_filter"
            machine.files.write(path, f"{value}\n", 0o644)
    assert dns.observe(SPEC, machine.host).unfiltered == wanted


def test_changes_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Change] = []
    machine = with_resolved()
    host: Host = machine.host
    for diff in (dns.diff, dns.undo):
        while changes := diff(SPEC, dns.observe(SPEC, host)).changes:
            made += changes
            for change in changes:
                change.apply(host)
    assert str(made[-2]) == "stop and disable nodeagent-dns.service"
    assert capsys.readouterr().out == ""
