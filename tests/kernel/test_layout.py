"""Layouts come from the object's BTF, and mean what the C compiler means by them."""

from __future__ import annotations

import struct
import subprocess
from itertools import pairwise

import pytest

from tests.pods import needs_kernel
from weir.bpf import OBJECT
from weir.bpf.btf import Array, Btf, BtfError, Integer, Struct, elf_section
from weir.bpf.maps import Map
from weir.proxy.counters import PodCounters, bucket_start
from weir.proxy.kernel import Kernel

needs_object = pytest.mark.skipif(
    not OBJECT.exists(), reason="needs bpf/weir.bpf.o: run `make bpf`"
)


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.of_object(OBJECT)


@needs_object
def test_offsets_agree_with_another_reader_of_the_same_btf(btf: Btf) -> None:
    dump = subprocess.run(
        ["bpftool", "btf", "dump", "file", OBJECT], capture_output=True, text=True, check=False
    )
    if dump.returncode:
        pytest.skip("needs bpftool")
    for name in ("meter", "connection", "stream", "pod", "listener_key", "address"):
        assert dump.stdout.count(f"STRUCT '{name}' size=") == 1
        block = dump.stdout.split(f"STRUCT '{name}' size=")[1]
        members = [line.strip() for line in block.splitlines()[1:] if line.startswith("\t")]
        size, fields = int(block.split()[0]), btf.struct(name).fields
        assert btf.struct(name).size == size
        assert len(fields) == int(block.split()[1].removeprefix("vlen="))
        for field, member in zip(fields, members, strict=False):
            assert member.startswith(f"'{field.name}' ")
            assert member.endswith(f"bits_offset={field.offset * 8}")


@needs_object
def test_fields_fit_without_overlap(btf: Btf) -> None:
    for name in ("meter", "connection", "stream", "pod", "listener_key"):
        layout = btf.struct(name)
        ends = [(field.offset, field.offset + field.layout.size) for field in layout.fields]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert ends[-1][1] <= layout.size


@needs_object
def test_nested_structs_and_arrays_are_decoded(btf: Btf) -> None:
    connection = btf.struct("connection")
    encoded = connection.encode(
        {"netns": 7, "in": {"status": 204, "window": (1, 2, 3)}, "out": {"left": 1 << 40}}
    )
    decoded = connection.decode(encoded)
    assert len(encoded) == connection.size
    assert decoded["netns"] == 7
    assert decoded["in"]["status"] == 204
    assert decoded["in"]["window"][:4] == (1, 2, 3, 0)
    assert decoded["out"] == decoded["out"] | {"left": 1 << 40, "status": 0}


def test_a_signed_number_keeps_its_sign() -> None:
    assert Integer(8, signed=True).decode(Integer(8, signed=True).encode(-5)) == -5


def test_a_field_that_does_not_exist_is_named() -> None:
    with pytest.raises(KeyError, match=r"struct empty has no field nothing"):
        Struct("empty", 8, ()).encode({"nothing": 1})


def test_a_short_tuple_fills_an_array_with_zeros() -> None:
    assert Array(Integer(2), 3).encode((1,)) == b"\1\0\0\0\0\0"


@needs_object
def test_what_is_missing_in_the_object_is_named(btf: Btf) -> None:
    with pytest.raises(BtfError, match="no struct nonsense"):
        btf.struct("nonsense")
    with pytest.raises(BtfError, match="no enum nonsense"):
        btf.enum("nonsense")


@needs_object
def test_every_map_that_python_uses_has_types(btf: Btf) -> None:
    assert btf.maps.keys() >= {"pods", "addresses", "listeners", "meters", "connections"}
    assert isinstance(btf.maps["meters"].value, Struct)
    assert btf.maps["pods"].key == Integer(8)


@needs_kernel
def test_a_map_gives_back_what_was_put(kernel: Kernel) -> None:
    pods: Map = kernel.pods
    key, value = 1 << 40, {"user_port": 8080, "direct_port": 8014, "enabled": 1, "layout": 1}
    assert pods.get(key) is None
    pods.put(key, value)
    assert pods.get(key) == value
    assert pods.add(key, value) is False
    assert list(pods.items()) == [(key, value)]
    pods.delete(key)
    pods.delete(key)
    assert list(pods.keys()) == []


@needs_kernel
def test_a_locked_read_leaves_the_lock_out(kernel: Kernel) -> None:
    key = {"netns": 5, "lane": 1}
    kernel.meters.put(key, {"epoch": 9, "wsum": -3})
    try:
        meter = kernel.meters.get(key, locked=True)
        assert meter is not None
        assert (meter["epoch"], meter["wsum"]) == (9, -3)
    finally:
        kernel.meters.delete(key)


def test_latency_buckets_are_four_per_power_of_two_without_gaps() -> None:
    bounds = [(bucket_start(bucket), bucket_start(bucket + 1)) for bucket in range(124)]
    assert bounds[:9] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 10)]
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    assert bounds[-1][1] == 1 << 32


def counters_with(latency: dict[int, int]) -> PodCounters:
    zeros = dict.fromkeys(PodCounters.__dataclass_fields__, 0)
    buckets = tuple(latency.get(bucket, 0) for bucket in range(128))
    return PodCounters(**zeros | {"latency": buckets})  # type: ignore[arg-type]


def test_a_quantile_lies_in_the_bucket_of_the_request_it_names() -> None:
    counters = counters_with({8: 90, 40: 10})  # 90 of 8-10 us, 10 of 2048-2560 us
    assert (bucket_start(40), bucket_start(41)) == (2048, 2560)
    assert 8e-6 <= counters.quantile(0.5) <= 10e-6
    assert 2048e-6 <= counters.quantile(0.99) <= 2560e-6
    assert counters.quantile(1.0) == 2560e-6
    assert counters_with({}).quantile(0.5) == 0.0


@needs_object
def test_the_object_carries_no_relocation_against_a_kernel(btf: Btf) -> None:
    """Only UAPI structs are read, so that one object fits every kernel: no CO-RE records."""
    extension = elf_section(OBJECT, ".BTF.ext")
    header = struct.unpack_from("<HBBIIIIIII", extension)
    core_relocations_size = header[9]
    assert core_relocations_size == 0
