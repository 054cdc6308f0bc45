"""What an exchange came to, in the words of metrics, logs and traces (contract 3.12, 3.13, 7.1).

Owns which status is recorded for a request that did not end like others. Upstream records a client
that leaves before its response as a 200; here it is 499 (appendix C advises to fix it).
"""

from __future__ import annotations

from weir.proxy import contract
from weir.proxy.exchange import Exchange
from weir.proxy.policy.breaker import RUNNING

CLIENT_LEFT = 499
ERROR_DIAL = "net.OpError"
ERROR_LOST = "errors.errorString"
"""Go's names of the errors, which dashboards know as `error_type`."""


def server_status(exchange: Exchange) -> int:
    """For http.server.*, revision_request_* and the request log."""
    if exchange.upgraded:
        return 200
    failure = exchange.failure
    if not failure or failure in (contract.FAILURE_DIAL, contract.FAILURE_REFUSED):
        return exchange.status
    if failure == contract.FAILURE_TIMEOUT:
        return exchange.status or 504
    if failure == contract.FAILURE_LOST:
        return 500 if exchange.user_status else exchange.status
    return 500 if exchange.user_status else CLIENT_LEFT


def server_size(exchange: Exchange) -> int:
    """Body bytes of the response; a response that was cut off counts none, as upstream."""
    if exchange.upgraded or (exchange.user_status and _cut_off(exchange)):
        return 0
    return exchange.sent


def app_status(exchange: Exchange, timeout: int = 200) -> int:
    """For the invocation of the user container; 0 if its turn never came.

    `timeout` is what a timeout before the first byte is recorded as: 200 now, 502 before v1.19.
    """
    if not had_its_turn(exchange):
        return 0
    failure = exchange.failure
    if exchange.upgraded:
        return 200
    if not failure:
        return exchange.user_status or exchange.status
    if exchange.user_status:
        return 500
    if failure == contract.FAILURE_TIMEOUT:
        return timeout
    return CLIENT_LEFT if failure == contract.FAILURE_CLIENT else 502


def transport_error(exchange: Exchange) -> str:
    """Why the user container gave no response, as `error_type`; empty if it did."""
    if exchange.user_status or not exchange.failure:
        return ""
    return ERROR_DIAL if exchange.failure == contract.FAILURE_DIAL else ERROR_LOST


def had_its_turn(exchange: Exchange) -> bool:
    admission = exchange.admission
    if admission is None:
        return exchange.failure != contract.FAILURE_REFUSED
    return admission.place is RUNNING


def probe_like(seen: dict[bytes, bytes]) -> bool:
    """Proxied, and still no traffic for metrics and traces (contract section 3.1, step 1)."""
    return bool(seen.get(contract.NETWORK_PROBE) or seen.get(contract.KUBELET_PROBE))


def _cut_off(exchange: Exchange) -> bool:
    return exchange.failure in (contract.FAILURE_LOST, contract.FAILURE_CLIENT)
