"""Huffman decoding of header strings (RFC 7541, 5.2 and appendix B).

The code is canonical: the length of each symbol's code says everything. Nothing is ever encoded
with it, because on loopback bytes are cheaper than shifts.
"""

from __future__ import annotations

# the lengths of the codes of the 256 bytes and of EOS, as letters: A is 5 bits, Z is 30
_LENGTHS = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCC"
    "CCDCDIOIJBKABABABBBACCBBBABCBAABCCCCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRT"
    "QRSSQQRQSRSSPRRRSRRSVVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWVZ"
)
_SHORTEST = 5
_EOS = 256
_MAX_PADDING = 7


class HuffmanError(Exception):
    """Not the code of any string."""


def _tree() -> tuple[list[tuple[int, int]], set[int]]:
    """Pairs of children, by node: another node, or ~symbol. And the nodes padding may end at."""
    lengths = [ord(letter) - ord("A") + _SHORTEST for letter in _LENGTHS]
    nodes: list[list[int]] = [[0, 0]]
    code, before = 0, _SHORTEST
    for symbol in sorted(range(len(lengths)), key=lambda symbol: (lengths[symbol], symbol)):
        length = lengths[symbol]
        code <<= length - before
        before = length
        node = 0
        for bit in range(length - 1, 0, -1):
            side = code >> bit & 1
            if not nodes[node][side]:
                nodes.append([0, 0])
                nodes[node][side] = len(nodes) - 1
            node = nodes[node][side]
        nodes[node][code & 1] = ~symbol
        code += 1
    final, node = {0}, 0
    for _ in range(_MAX_PADDING):
        node = nodes[node][1]
        final.add(node)
    return [(zero, one) for zero, one in nodes], final


class _Steps(dict[int, tuple[int, bytes]]):
    """By node * 16 + four bits: the next node, times 16, and what was completed on the way.

    Filled as it is used: texts use little of it, and making all of it would delay a start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nodes, final = _tree()
        self.final = {node * 16 for node in final}

    def __missing__(self, key: int) -> tuple[int, bytes]:
        node, bits = divmod(key, 16)
        done = b""
        for shift in (3, 2, 1, 0):
            node = self._nodes[node][bits >> shift & 1]
            if node < 0:
                if ~node == _EOS:
                    raise HuffmanError("EOS within a string")
                done += bytes([~node])
                node = 0
        self[key] = step = (node * 16, done)
        return step


_steps: _Steps | None = None


def decode(data: bytes) -> bytes:
    """Raises HuffmanError."""
    global _steps
    if _steps is None:
        _steps = _Steps()
    steps = _steps
    node = 0
    pieces = []
    for byte in data:
        node, done = steps[node + (byte >> 4)]
        if done:
            pieces.append(done)
        node, done = steps[node + (byte & 15)]
        if done:
            pieces.append(done)
    if node not in steps.final:
        raise HuffmanError("the padding is no padding")
    return b"".join(pieces)
