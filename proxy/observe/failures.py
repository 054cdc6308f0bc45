"""Requests that did not end like others, in the sidecar's own log (contract section 3.14).

Owns the words, and how many of them: a user container that is down must not flood the log. Of
each kind the first lines of a second are written, the rest is counted and said in one line.
"""

from __future__ import annotations

import logging

from weir.proxy import contract
from weir.proxy.exchange import Client, Exchange, Head
from weir.proxy.policy.deadlines import Cause, Timeouts

_A_SECOND = 20
_SOCKSTAT = "/proc/net/sockstat"

log = logging.getLogger("weir.relay")


class FailureLog:
    """An Observer."""

    def __init__(self, timeouts: Timeouts, user: str) -> None:
        """`user` is the user container's host:port."""
        self._limits = {
            Cause.REQUEST: timeouts.request,
            Cause.RESPONSE_START: timeouts.response_start,
            Cause.IDLE: timeouts.idle,
        }
        self._errors = {
            contract.FAILURE_DIAL: f"the user container can't be reached at {user}",
            contract.FAILURE_LOST: "the user container closed the connection, or spoke no HTTP",
        }
        self._second = 0
        self._written: dict[str, int] = {}
        self._silenced: dict[str, int] = {}

    def begun(self, exchange: Exchange) -> None:
        """Nothing has failed yet."""

    def over(self, exchange: Exchange, now: float) -> None:
        failure = exchange.failure
        if not failure or failure == contract.FAILURE_REFUSED:
            return
        if failure == contract.FAILURE_CLIENT:
            if log.isEnabledFor(logging.DEBUG) and not exchange.upgraded:
                log.debug(
                    "error reverse proxying request", extra={"fields": {"error": "the client left"}}
                )
            return
        if self._silent(failure, now):
            return
        if failure == contract.FAILURE_TIMEOUT:
            cause = exchange.deadlines.fired(now) or Cause.REQUEST
            log.warning("%s: %s", cause.value, duration(self._limits[cause]))
        else:
            log.error(
                "error reverse proxying request; sockstat: %s",
                sockstat(),
                extra={"fields": {"error": self._errors[failure]}},
            )

    def probed(self, client: Client, head: Head, status: int, size: int, seconds: float) -> None:
        """Probes speak for themselves."""

    def _silent(self, kind: str, now: float) -> bool:
        """Were there too many of this kind in this second?"""
        if int(now) != self._second:
            self._second = int(now)
            self._written.clear()
            for kind_before, count in self._silenced.items():
                log.warning(
                    "%d more requests ended like that within a second: %s", count, kind_before
                )
            self._silenced.clear()
        if self._written.get(kind, 0) >= _A_SECOND:
            self._silenced[kind] = self._silenced.get(kind, 0) + 1
            return True
        self._written[kind] = self._written.get(kind, 0) + 1
        return False


def sockstat() -> str:
    """How many sockets there are: a loopback that ran out of ports shows here."""
    try:
        with open(_SOCKSTAT) as file:  # noqa: PTH123 (pathlib costs the start 3 ms)
            return file.read()
    except OSError as error:
        return str(error)


def duration(seconds: float) -> str:
    """As Go prints it: 100ms, 3s, 5m0s, 1h0m0s."""
    if 0 < seconds < 1:
        return f"{seconds * 1e3:g}ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:g}s"
    if minutes:
        text = f"{int(minutes) % 60}m{text}"
    if minutes >= 60:
        text = f"{int(minutes) // 60}h{text}"
    return text
