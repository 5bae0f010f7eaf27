"""Keys of a running cluster are changed: the new one is spread, then used, then the old one goes.

Each of these steps is one compare-and-set of the servers' secrets in Consul. The nodes' agents take
up what they see there and say so; the next step comes when every node has. So a rotation may be
killed at any instant, leaves a cluster that works with both keys, and goes on when it is asked for
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from nodeagent import paths, secrets
from nodeagent.changes import PublishSwarm
from nodeagent.errors import HostError, UsageError
from nodeagent.host import Host, KeyringAction, Op
from nodeagent.secrets import Purpose, ServerSecrets
from nodeagent.spec import Spec
from nodeagent.steps import access, swarm

POLL_S = 0.2  # of what the nodes say; a foreground command, and each answer is one read
PUBLISH_TRIES = 5  # against another server's agent that writes the same record


@dataclass(frozen=True)
class Rotation:
    """One run of the command: `say` gets a line for each step, `without` is not waited for."""

    spec: Spec
    host: Host
    say: Callable[[str], None]
    without: Collection[str] = ()

    def rotate(self, purpose: Purpose) -> None:
        """Bring a new key of this purpose into use everywhere; the old one is worthless then."""
        found = self._current()
        if found.rotating not in ("", purpose):
            raise UsageError(
                f"the rotation of {found.rotating} is not finished yet: nodeagent secrets rotate "
                f"{found.rotating}"
            )
        if not found.rotating:
            found = self._write(found, self._with_new_key(found, purpose))
        if found.phase == "spread":
            self._wait_applied(found, f"every node to know the new {purpose} key")
            # Only now: a node that is away when a gossip key is installed does not get it later.
            self._keyring("install", found, -1)
            found = self._write(found, _switched(found))
        self._keyring("use", found, 0)
        self._wait_applied(found, f"every node to use the new {purpose} key")
        self._keyring("remove", found, 1)
        found = self._write(found, _retired(found))
        self._wait_applied(found, f"every node to forget the old {purpose} key")

    def rotate_swarm(self) -> None:
        """Have the Swarm make new join tokens, and publish them: the old ones open nothing now."""
        self.host.engine.swarm_rotate_tokens()
        self.say("the Swarm has new join tokens")
        keys = swarm.Keys.of(self.spec)
        for _ in range(PUBLISH_TRIES):
            entries = self.host.consul.get(self.spec.key_prefix)
            state, known = entries.get(keys.state), entries.get(keys.manager_token)
            if state is None:
                raise HostError("publish", "the join tokens", "this cluster has no Swarm yet")
            if known is not None and known.value == self.host.engine.swarm_tokens()[1]:
                self.say("they are published to the cluster")
                return
            PublishSwarm(
                keys.state, state.value, state.index, keys.worker_entry, keys.manager_token
            ).apply(self.host)
        raise HostError("publish", "the join tokens", "others write the record all the time")

    def forget(self, node: str) -> None:
        """Take a node's token from it, so that a machine of this name can ask for another."""
        place = access.Keys(self.spec.key_prefix).server(node)
        was_server = place in self.host.consul.get(place)
        if was_server:  # one that is alive writes it again
            self.host.consul.transact(Op("delete", place))
            self.say(f"{node} is no server's name any more")
        tokens = self.host.consul.tokens().values()
        found = [token for token in tokens if token.description.split()[2:4] == ["node", node]]
        if not found and not was_server:
            raise UsageError(f"no machine named {node} has a token")
        for token in found:
            self.host.consul.delete_token(token.accessor)
            self.say(f"{node} has no token any more")

    def _current(self) -> ServerSecrets:
        """The servers' secrets: this node's, or Consul's when they are newer."""
        pki, place = self.host.pki, access.Keys(self.spec.key_prefix).state
        found = secrets.load(paths.SECRETS, self.spec.role, self.host.files, pki)
        entry = self.host.consul.get(place).get(place)
        if entry is not None:
            later = secrets.parse(entry.value, f"Consul's {place}", self.spec.role, pki)
            found = later if later.serial > found.serial else found
        assert isinstance(found, ServerSecrets)
        return found

    def _with_new_key(self, found: ServerSecrets, purpose: Purpose) -> ServerSecrets:
        seed = self.host.pki.seed()
        seeds = (found.seeds(purpose)[0], seed)
        authorities = found.authorities
        if purpose == "ca":
            authorities += (self.host.pki.authority(seed, self.host.clock.now()),)
        return replace(
            found,
            rotated={**found.rotated, purpose: seeds},
            authorities=authorities,
            rotating=purpose,
            phase="spread",
        )

    def _write(self, old: ServerSecrets, new: ServerSecrets) -> ServerSecrets:
        new = replace(new, serial=old.serial + 1)
        place = access.Keys(self.spec.key_prefix).state
        entry = self.host.consul.get(place).get(place)
        op = Op("cas", place, secrets.dump(new).reveal(), index=entry.index if entry else 0)
        if not self.host.consul.transact(op):
            raise HostError("write", place, "somebody else rotates keys at this moment")
        return new

    def _keyring(self, action: KeyringAction, found: ServerSecrets, which: int) -> None:
        if found.rotating == "gossip":
            seed = found.seeds("gossip")[which]
            self.host.consul.change_keyring(action, secrets.gossip_key(self.host.pki, seed))

    def _wait_applied(self, found: ServerSecrets, what: str) -> None:
        """Return when every member of the cluster is there and says that it uses these secrets."""
        keys, said = access.Keys(self.spec.key_prefix), ""
        while True:
            entries = self.host.consul.get(self.spec.key_prefix)
            late = []
            for member in sorted(self.host.consul.members(), key=lambda each: each.name):
                entry = entries.get(keys.applied(member.name))
                if not member.alive or entry is None or entry.value != str(found.serial):
                    late.append(member.name + ("" if member.alive else " (which is away)"))
            late = [each for each in late if each.partition(" ")[0] not in self.without]
            sentence = f"waiting for {what}: {', '.join(late)}" if late else f"done: {what}"
            if sentence != said:
                self.say(sentence)
                said = sentence
            if not late:
                return
            self.host.clock.wait(POLL_S)


def _switched(found: ServerSecrets) -> ServerSecrets:
    """The same with the new key in use and the old one accepted."""
    purpose = found.rotating
    return replace(
        found,
        rotated={**found.rotated, purpose: found.rotated[purpose][::-1]},
        authorities=found.authorities[::-1],
        phase="switched",
    )


def _retired(found: ServerSecrets) -> ServerSecrets:
    """The same with the new key alone."""
    purpose = found.rotating
    return replace(
        found,
        rotated={**found.rotated, purpose: found.rotated[purpose][:1]},
        authorities=found.authorities[:1],
        rotating="",
        phase="",
    )
