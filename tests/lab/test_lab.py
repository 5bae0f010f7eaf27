"""The lab keeps its promises: machines boot, break and go as `tests.lab.lab` says they do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import __version__
from tests.lab import cluster, host, images
from tests.lab.flavours import FLAVOURS, debian_mirror, flavour
from tests.lab.host import LabError, Process, wait_until
from tests.lab.lab import GATEWAY, Lab, Machine

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
]

USER_DATA = """\
#cloud-config
write_files:
  - path: /root/written
    content: by write_files
    permissions: "0640"
runcmd:
  - [sh, -c, "echo $(hostname) >> /root/ran"]
"""

CLUSTER_STORE = {"cluster-store": "consul://127.0.0.1:8500", "cluster-advertise": "host0:2375"}
#: What an Engine of 24.0 or newer ends with, and one whose build has no Consul backend.
NO_CLUSTER_STORE = "match any configuration option: .*cluster-store|discovery service not supported"

ENGINE_2 = "unix:///run/engine2.sock"
ENGINE_2_UNIT = f"""\
[Unit]
After=containerd.service
[Service]
Type=notify
ExecStart=/usr/sbin/dockerd --bridge=none --iptables=false --ip-forward=false --ip-masq=false \
    --live-restore --containerd-namespace engine2 --containerd-plugins-namespace engine2-plugins \
    --exec-root /run/engine2 --data-root /var/lib/nodeagent/engine --pidfile /run/engine2.pid \
    -H {ENGINE_2}
KillMode=process
Delegate=yes
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")
def pair(lab: Lab) -> tuple[Machine, Machine]:
    one = lab.machine("one", address="10.10.0.11", user_data=USER_DATA)
    two = lab.machine("two", address="10.10.0.12", user_data=USER_DATA)
    for machine in (one, two):
        machine.boot()
    for machine in (one, two):
        machine.wait_booted()
    return one, two


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "trixie" else pytest.mark.full) for name in FLAVOURS
    ],
)
def each(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Machine]:
    """A machine of every flavour, one after the other."""
    machine = lab.machine("each", address="10.10.0.14", flavour=request.param)
    try:
        machine.boot()
        machine.wait_booted()
        yield machine
    finally:
        machine.destroy()


def pings(machine: Machine, address: str) -> bool:
    done = machine.run("ping", "-c1", "-W1", address, check=False)
    return done.returncode == 0


def load(lab: Lab, machine: Machine, archive: Path, engine: str = "") -> None:
    where = f"-H {engine}" if engine else ""
    machine.sh(f"curl -sSf {lab.serve(archive)} | docker {where} load", timeout_s=60)


def test_machines_are_who_they_should_be(pair: tuple[Machine, Machine]) -> None:
    for machine in pair:
        row = flavour(machine.flavour)
        assert machine.wait_cloud_init()["errors"] == []
        assert machine.sh("systemctl --failed --no-legend") == ""
        assert machine.sh("hostname") == machine.name
        assert machine.sh("docker version -f '{{.Server.Version}}'").startswith(row.engine)
        assert machine.sh("docker info -f '{{.Driver}}'") == "overlay2"
        assert machine.sh("python3 --version").startswith(f"Python {row.python}")
        assert f" {machine.address}/16" in machine.sh("ip -4 address show host0")
    one, two = pair
    assert len(one.sh("cat /etc/machine-id")) == 32
    assert one.sh("cat /etc/machine-id") != two.sh("cat /etc/machine-id")


def test_user_data_is_carried_out(pair: tuple[Machine, Machine]) -> None:
    for machine in pair:
        machine.wait_cloud_init()
        assert machine.read("/root/written") == "by write_files"
        assert machine.sh("stat -c %a /root/written") == "640"
        assert machine.read("/root/ran") == f"{machine.name}\n"


def test_machines_do_not_share_a_cgroup(pair: tuple[Machine, Machine]) -> None:
    one, two = pair
    assert not set(host.cgroups_of(one.leader)) & set(host.cgroups_of(two.leader))
    for machine in pair:
        # The Engine's containers must be counted and limited where the machine is.
        assert machine.sh("docker info -f '{{.MemoryLimit}} {{.PidsLimit}}'") == "true true"


def test_a_cut_machine_keeps_its_link_but_nothing_passes(pair: tuple[Machine, Machine]) -> None:
    one, two = pair
    assert pings(one, two.address)
    two.cut()
    assert not pings(one, two.address)
    assert not pings(two, "10.10.0.1")
    assert "LOWER_UP" in two.sh("ip link show host0")
    two.heal()
    wait_until(lambda: pings(one, two.address), 5, "a ping after the heal")


def test_names_resolve_as_the_lab_says(lab: Lab, pair: tuple[Machine, Machine]) -> None:
    one, _ = pair
    lab.dns(
        a={"servers.example": ["10.10.0.11", "10.10.0.12"]},
        srv={"_consul._tcp.servers.example": [("one.example", 8300), ("two.example", 8300)]},
    )
    answer = one.sh("dig +short servers.example | sort")
    assert answer.split() == ["10.10.0.11", "10.10.0.12"]
    answer = one.sh("dig +short SRV _consul._tcp.servers.example | sort")
    assert answer.splitlines() == ["1 1 8300 one.example.", "1 1 8300 two.example."]
    assert "status: NXDOMAIN" in one.sh("dig unknown.example")
    lab.dns()
    assert "status: NXDOMAIN" in one.sh("dig servers.example")


def test_files_are_served(lab: Lab, pair: tuple[Machine, Machine]) -> None:
    (lab.http_root / "greeting").write_text("hello", encoding="utf-8")
    assert pair[0].sh(f"curl -sSf {lab.url}/greeting") == "hello"
    assert pings(pair[0], "169.254.169.254")


def test_containers_run_on_bridge_and_host(lab: Lab, pair: tuple[Machine, Machine]) -> None:
    one, two = pair
    load(lab, one, images.box_archive())
    run = f"docker run --rm --network %s {images.BOX_IMAGE} %s"
    assert one.sh(run % ("host", "hostname")) == "one"
    assert "1 packets received" in one.sh(run % ("bridge", f"ping -c1 -W2 {two.address}"))


def test_a_flavour_is_what_its_row_says(each: Machine) -> None:
    row = flavour(each.flavour)
    assert each.wait_cloud_init()["errors"] == []
    assert each.sh("systemctl --failed --no-legend") == ""
    assert each.sh("docker version -f '{{.Server.Version}}'").startswith(row.engine)
    assert each.sh("python3 --version").startswith(f"Python {row.python}.")
    is_on_v1 = host.has_cgroup_v1() and row.boots_on_cgroup_v1
    assert each.sh("docker info -f '{{.CgroupVersion}}'") == ("1" if is_on_v1 else "2")


def test_a_flavour_runs_containers(lab: Lab, each: Machine) -> None:
    load(lab, each, images.box_archive())
    assert each.sh("docker info -f '{{.Driver}}'") == "overlay2"
    each.sh(f"docker run --name said {images.BOX_IMAGE} ping -c1 -W2 {GATEWAY}")
    assert "1 packets received" in each.sh("docker logs said")
    each.sh("docker rm said")


def test_a_flavour_runs_the_release(lab: Lab, each: Machine) -> None:
    each.sh(f"curl -sSf -o /root/nodeagent.pyz {lab.serve(cluster.release())}")
    each.run("python3", "/root/nodeagent.pyz", "install", timeout_s=60)
    assert each.sh("nodeagent --version") == f"nodeagent {__version__}"
    # Modules compiled for this very Python: what makes keys cannot do without one.
    each.run("nodeagent", "secrets", "new", "/root/secrets.json")
    assert json.loads(each.read("/root/secrets.json"))


def test_a_flavours_engine_takes_a_cluster_store_or_not(each: Machine) -> None:
    each.write("/etc/docker/daemon.json", json.dumps(CLUSTER_STORE))
    started = each.run("systemctl", "restart", "docker", check=False, timeout_s=60)
    takes_one = flavour(each.flavour).swarm_mode == "classic"
    assert (started.returncode == 0) == takes_one, each.journal("docker")[-1500:]
    if takes_one:
        assert each.sh("docker info -f '{{.ClusterStore}}'") == CLUSTER_STORE["cluster-store"]
    else:
        assert re.search(NO_CLUSTER_STORE, each.journal("docker"))
    each.sh("rm /etc/docker/daemon.json; systemctl reset-failed docker; systemctl restart docker")


def test_a_second_engine_carries_consul_through_its_restart(
    lab: Lab, pair: tuple[Machine, Machine]
) -> None:
    _, two = pair
    two.write("/etc/systemd/system/engine2.service", ENGINE_2_UNIT)
    two.sh("systemctl daemon-reload; systemctl start engine2")
    load(lab, two, images.consul_archive(), ENGINE_2)
    docker = f"docker -H {ENGINE_2}"
    two.sh(
        f"{docker} run -d --name consul --network host {images.CONSUL_IMAGE} "
        f"agent -server -bootstrap-expect=1 -bind={two.address} "
        "-hcl 'performance { raft_multiplier = 1 }'"
    )
    wait_until(
        lambda: json.loads(two.sh("curl -s http://127.0.0.1:8500/v1/status/leader || echo null")),
        20,
        "a Consul leader",
    )
    assert two.sh("docker ps -q") == ""
    pid = two.sh(f"{docker} inspect -f '{{{{.State.Pid}}}}' consul")
    two.sh("systemctl restart engine2 docker")
    assert two.sh(f"{docker} inspect -f '{{{{.State.Pid}}}}' consul") == pid
    two.sh(f"{docker} rm -f consul; systemctl stop engine2")


def test_the_disk_outlives_a_power_loss(pair: tuple[Machine, Machine]) -> None:
    one, _ = pair
    identity = one.sh("cat /etc/machine-id")
    one.write("/root/kept", "yes", mode=0o600)
    one.write("/var/lib/nodeagent/kept", "yes")
    one.kill()
    assert not one.running
    with pytest.raises(LabError, match="one is not running"):
        one.sh("true")
    assert one.read("/root/kept") == "yes"
    one.boot()
    one.wait_booted()
    assert one.read("/var/lib/nodeagent/kept") == "yes"
    assert one.sh("cat /etc/machine-id") == identity
    assert one.sh(f"docker image inspect -f ok {images.BOX_IMAGE}") == "ok"


def test_a_reboot_from_inside_is_a_new_boot(pair: tuple[Machine, Machine]) -> None:
    one, _ = pair
    before = one.sh("cat /proc/sys/kernel/random/boot_id")
    one.reboot()
    one.wait_booted()
    assert one.sh("cat /proc/sys/kernel/random/boot_id") != before
    assert one.sh("wc -l < /root/ran") == "1"  # cloud-init knew the instance
    assert pings(one, "10.10.0.1")


def test_a_command_that_takes_too_long_is_ended(pair: tuple[Machine, Machine]) -> None:
    one, _ = pair
    with pytest.raises(LabError, match="no end within 1 s"):
        one.run("sleep", "4711", timeout_s=1)
    assert one.run("pgrep", "-f", "sleep 471[1]", check=False).stdout == ""


def test_a_layer_lies_below_the_machine(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/baked").write_text("in", encoding="utf-8")
    machine = lab.machine("baked", address="10.10.0.13", layers=[tmp_path])
    assert machine.read("/etc/baked") == "in"
    machine.write("/etc/baked", "changed")
    assert machine.read("/etc/baked") == "changed"
    assert (tmp_path / "etc/baked").read_text(encoding="utf-8") == "in"
    machine.destroy()
    assert "baked" not in lab.machines()


def test_a_second_lab_on_the_same_directory_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match=f"process {os.getpid()} works with the lab"):
        Lab(lab.state_dir).up()


def test_nothing_is_left_after_a_crash_and_down(tmp_path: Path) -> None:
    """The lab's process is killed with a machine running; another one clears up."""
    child = os.fork()
    if child == 0:
        try:
            crashing = Lab(tmp_path)
            crashing.up()
            crashing.machine("lost", address="10.10.0.11").boot()
            crashing.machines()["lost"].wait_booted()
        finally:
            os._exit(9)
    os.waitpid(child, 0)
    lab = Lab(tmp_path)
    started = host.cgroup_processes(lab.slug)
    assert len(started) > 10
    assert lab.machines()["lost"].running
    assert lab.machines()["lost"].sh("hostname") == "lost"
    lab.down()
    lab.down()
    assert [process for process in started if process.alive] == []
    assert [point for point, _, _ in host.mounts() if tmp_path in point.parents] == []
    assert not lab.netns_path.exists()
    assert [t for t, _ in host.cgroup_hierarchies() if (t / lab.slug).exists()] == []
    assert lab.machines() == {}


def test_a_recycled_pid_is_not_killed() -> None:
    stranger = host.spawn("sleep", "60", log=Path("/dev/null"))
    Process(stranger.pid, stranger.start - 1).kill()
    assert stranger.alive
    stranger.kill()
    assert not stranger.alive


def test_a_time_out_says_what_was_seen() -> None:
    with pytest.raises(LabError, match=r"0\.1 s for rain; last seen: clouds"):
        wait_until(lambda: host.Waiting("clouds"), 0.1, "rain")


def test_what_is_built_is_reused_until_its_recipe_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODEAGENT_LAB_DIR", str(tmp_path))
    built = []

    def build(part: Path) -> None:
        part.mkdir()
        (part / "half").write_text("")
        built.append(part)
        if len(built) == 1:
            raise LabError("killed on the way")

    with pytest.raises(LabError, match="killed on the way"):
        images._stored("thing", ["v1"], build)
    first = images._stored("thing", ["v1"], build)
    assert images._stored("thing", ["v1"], build) == first
    assert len(built) == 2
    second = images._stored("thing", ["v2"], build)
    assert second.is_dir()
    assert not first.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.list",
            "# no\ndeb http://else.invalid/x other main\n"
            "deb [signed-by=/k.gpg] http://mirror.invalid/debian/ trixie main # yes\n",
        ),
        (
            "a.sources",
            "Types: deb\nURIs: http://security.invalid/s\nSuites: trixie-security\n"
            "Components: main\n\n# yes\nTypes: deb deb-src\nURIs: http://mirror.invalid/debian\n"
            "Suites: trixie trixie-updates\nComponents: main contrib\nSigned-By:\n /k.gpg\n",
        ),
    ],
    ids=["one-line", "deb822"],
)
def test_the_mirror_is_the_boxs_own(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / name).write_text(text, encoding="utf-8")
    release = tmp_path / "os-release"
    release.write_text('ID=debian\nVERSION_CODENAME="trixie"\n', encoding="utf-8")
    assert debian_mirror(tmp_path, release).url == "http://mirror.invalid/debian"
