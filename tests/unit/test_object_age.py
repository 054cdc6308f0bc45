"""The compiled object asks for nothing that Linux 5.17 does not have.

That its verifier takes the object is another question, which only a kernel answers
(tests/machine).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from weir.bpf import OBJECT
from weir.bpf.btf import elf_section

pytestmark = pytest.mark.skipif(not OBJECT.exists(), reason="needs bpf/weir.bpf.o: run `make bpf`")
CODE = (
    *(".text", "sk_lookup", "tc", "sockops", "cgroup_skb/ingress", "cgroup_skb/egress"),
    *("cgroup/getpeername4", "cgroup/getpeername6"),
)
_CALL, _LOAD_64, _ATOMIC = 0x85, 0x18, (0xC3, 0xDB)
HELPER, OURS = 0, 1  # whom a call calls; 2 would be a kfunc, which differ from kernel to kernel
BPF_LOOP = 181  # numbers of helpers grow: this one came with Linux 5.17
# of Linux 6.6: long jumps, byte swaps, loads that extend the sign; in arithmetic any offset
FOURTH_SET, ARITHMETIC = {0x06, 0x81, 0x89, 0x91, 0xD7}, (4, 7)
ATOMICS = {0x00, 0x01, 0x40, 0x41, 0x50, 0x51, 0xA0, 0xA1, 0xE1, 0xF1}  # Linux 5.12


def instructions() -> Iterator[tuple[int, int, int, int]]:
    """Opcode, source register, offset and immediate of all that is in the object."""
    for section in CODE:
        code, at = elf_section(OBJECT, section), 0
        assert code
        while at < len(code):
            opcode, registers, offset, immediate = struct.unpack_from("<BBhi", code, at)
            yield opcode, registers >> 4, offset, immediate
            at += 16 if opcode == _LOAD_64 else 8


def test_no_helper_is_younger_than_bpf_loop_and_none_is_a_kfunc() -> None:
    calls = [(kind, number) for opcode, kind, _, number in instructions() if opcode == _CALL]
    assert {kind for kind, _ in calls} <= {HELPER, OURS}
    assert max(number for kind, number in calls if kind == HELPER) == BPF_LOOP


def test_no_instruction_is_younger() -> None:
    for opcode, _register, offset, immediate in instructions():
        assert opcode not in FOURTH_SET
        assert opcode & 7 not in ARITHMETIC or offset == 0
        assert opcode not in _ATOMIC or immediate in ATOMICS
