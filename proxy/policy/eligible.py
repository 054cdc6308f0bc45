"""Which pods may offer a direct port. Pure: facts in, the reason against it out.

Every doubt ends in the relay, which is always right and only slower (design, section 2).
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class DirectFacts:
    """What is known of one pod when the question is asked.

    `kernel` is the one-line reason why this pod can't be steered ("" when it can): no root, an old
    kernel, no network namespace of its own; `kernel_word` is one of REASONS for it. `listener` is
    false while nothing the kernel can reach listens on the user port.
    """

    container_concurrency: int
    user_port: int
    direct_port: int
    ready: bool
    draining: bool
    listener: bool
    kernel: str = ""
    mesh: str = ""
    kernel_word: str = "kernel"


REASONS = (
    "not_held",  # by this agent
    "kernel",  # of the node
    "no_namespace",
    "no_cgroup",
    "tls",
    "attachment",
    "draining",
    "container_concurrency",
    "port",
    "mesh",
    "not_ready",
    "no_listener",
)
"""In a word each, for counting; what exactly is in the way only a sentence tells."""


class Refusal(NamedTuple):
    """Why the pod offers no direct port: a word of REASONS and a sentence, empty when it does."""

    word: str
    reason: str


def refusal(facts: DirectFacts) -> Refusal:
    """What lasts is named before what passes."""
    if facts.kernel:
        return Refusal(facts.kernel_word, facts.kernel)
    if facts.draining:
        return Refusal("draining", "draining")
    if facts.container_concurrency:
        why = "admission needs the relay's breaker"
        limit = f"containerConcurrency is {facts.container_concurrency}: {why}"
        return Refusal("container_concurrency", limit)
    if facts.user_port == facts.direct_port:
        return Refusal("port", f"the user port is the direct port ({facts.direct_port})")
    if facts.mesh:
        return Refusal("mesh", f"it is in a service mesh ({facts.mesh})")
    if not facts.ready:
        return Refusal("not_ready", "not ready")
    if not facts.listener:
        listener = f"no listener on port {facts.user_port} that the kernel can steer to"
        return Refusal("no_listener", listener)
    return Refusal("", "")
