"""Where things are on a node. `/var/lib` lasts; `/run` does not outlive a boot."""

from pathlib import Path

SPEC = Path("/etc/nodeagent/node.yaml")
SECRETS = Path("/etc/nodeagent/secrets.json")
DAEMON_JSON = Path("/etc/docker/daemon.json")
MACHINE_ID = Path("/etc/machine-id")
UNITS = Path("/etc/systemd/system")
GRUB_DROP_IN = Path("/etc/default/grub.d/99-nodeagent.cfg")  # the last one is read last
GRUB_CONFIG = Path("/boot/grub/grub.cfg")
UPDATE_GRUB = Path("/usr/sbin/update-grub")
CLOUD_INIT_ENABLED = Path("/run/cloud-init/enabled")
CLOUD_INIT_RESULT = Path("/run/cloud-init/result.json")  # written when it is through

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

PROGRAM = Path("/opt/nodeagent")
LAUNCHER = PROGRAM / "nodeagent"
COMMAND = Path("/usr/local/bin/nodeagent")

STATE = Path("/var/lib/nodeagent")
IDENTITY = STATE / "identity.json"
ENGINE_RECORD = STATE / "engine-options.json"
ORIGINALS = STATE / "originals"
ORIGINAL_DAEMON_JSON = ORIGINALS / "daemon.json"
NODE_TOKEN = STATE / "node-token.json"
KERNEL_REBOOT = STATE / "kernel-reboot"  # in which boot this node asked for its one reboot
DNS_ENVIRONMENT = STATE / "dns.env"
IMAGES = STATE / "images"
CONSUL = STATE / "consul"
CONSUL_CONFIG = CONSUL / "config" / "consul.json"
CONSUL_KEYS = CONSUL / "config" / "keys.json"  # the part of it that changes without a restart
CONSUL_AUTHORITIES = CONSUL / "config" / "ca.pem"
CONSUL_CERTIFICATE = CONSUL / "config" / "node.pem"  # with its key
CONSUL_CANDIDATE = CONSUL / "config" / "candidate" / "consul.json"
CONSUL_DATA = CONSUL / "data"
CONSUL_KEYRING = CONSUL_DATA / "serf" / "local.keyring"
CONSUL_TOKENS = CONSUL / "tokens.json"  # those this program shows to Consul
CONSUL_BINARY = CONSUL / "bin" / "consul"

RUN = Path("/run/nodeagent")
STATUS = RUN / "status.json"
LOCK = RUN / "lock"  # held during a cycle
ALIVE = RUN / "alive"  # held by the loop as long as it lives
REBOOT_ASKED = RUN / "reboot-asked"
RESTART_PENDING = RUN / "engine-restart-pending"
OPTIONS_CANDIDATE = RUN / "daemon.json.candidate"
CONSUL_RELOAD_PENDING = RUN / "consul-reload-pending"
CONSUL_RESTART_PENDING = RUN / "consul-restart-pending"
RESOLVED_RESTART_PENDING = RUN / "resolved-restart-pending"

ENGINE_SOCKET = Path("/run/docker.sock")
SYSTEM_ENGINE_SOCKET = Path("/run/nodeagent-engine/docker.sock")

ENGINE_UNIT = "docker.service"
SYSTEM_ENGINE_UNIT = "nodeagent-engine.service"
CONSUL_UNIT = "nodeagent-consul.service"
GRUB_UNIT = "nodeagent-grub.service"
GUARD_UNIT = "nodeagent-guard.service"
DNS_UNIT = "nodeagent-dns.service"
AGENT_UNIT = "nodeagent.service"
