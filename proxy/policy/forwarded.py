"""Construction of the `Forwarded` header and of `X-Forwarded-For` (contract sections 3.3, 3.5)."""

from __future__ import annotations


def forwarded(for_: bytes, host: bytes, proto: bytes) -> bytes:
    """`Forwarded` out of the values of X-Forwarded-For, -Host and -Proto; empty: add no header.

    The caller has made sure that the request brings no `Forwarded` of its own.
    """
    nodes = for_.split(b",") if for_ else []
    if len(nodes) > 1 and not nodes[-1]:
        nodes.pop()  # what follows the last comma is a node only if anything does
    first = []
    if nodes:
        first.append(b"for=" + _node(nodes[0]))
    if host:
        first.append(b"host=" + host)
    if proto:
        first.append(b"proto=" + proto)
    if not first:
        return b""
    return b", ".join([b";".join(first), *(b"for=" + _node(node) for node in nodes[1:])])


def _node(node: bytes) -> bytes:
    node = node.strip(b" \t")
    return b'"[' + node + b']"' if b":" in node else node


def appended(for_: list[bytes], peer: bytes) -> bytes:
    """X-Forwarded-For with the peer behind whatever addresses the request brought."""
    return b", ".join([*for_, peer]) if for_ else peer
