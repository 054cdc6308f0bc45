"""Which pods may offer a direct port. Pure: facts in, the reason against it out.

Every doubt ends in the relay, which is always right and only slower (design, section 2).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DirectFacts:
    """What is known of one pod when the question is asked.

    `kernel` is the one-line reason why this pod can't be steered ("" when it can): no root, an old
    kernel, no network namespace of its own. `listener` is false while nothing the kernel can
    reach listens on the user port.
    """

    container_concurrency: int
    user_port: int
    direct_port: int
    ready: bool
    draining: bool
    listener: bool
    kernel: str = ""
    mesh: str = ""


def refusal(facts: DirectFacts) -> str:
    """The reason why the pod offers no direct port, or "" when it does."""
    if facts.kernel:
        return facts.kernel
    if facts.draining:
        return "draining"
    if facts.container_concurrency:
        return (
            f"containerConcurrency is {facts.container_concurrency}: "
            "admission needs the relay's breaker"
        )
    if facts.user_port == facts.direct_port:
        return f"the user port is the direct port ({facts.direct_port})"
    if facts.mesh:
        return f"it is in a service mesh ({facts.mesh})"
    if not facts.ready:
        return "not ready"
    if not facts.listener:
        return f"no listener on port {facts.user_port} that the kernel can steer to"
    return ""
