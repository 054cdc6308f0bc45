"""A small ctypes binding over the system's libbpf.so.1, and what the kernel tells of its objects.

Knows no program or map by name. Needs no compiler and no headers. Errors are `BpfError` (an
OSError) with what libbpf and the verifier had to say in `.log`. Whole objects: bpf/loaded.py.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from abc import ABC, abstractmethod
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar

_LINK_CGROUP = 3  # enum bpf_link_type
_MAP_INFO_BTF_ID = 64  # struct bpf_map_info
_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)


class BpfError(OSError):
    """A call into libbpf or bpf(2) failed; `log` holds the lines that libbpf printed."""

    def __init__(self, code: int, what: str, log: list[str] | None = None) -> None:
        super().__init__(code, f"{what}: {os.strerror(code)}")
        self.log = log or []


class LibbpfMissing(Exception):
    """libbpf.so.1 can't be loaded here."""


class _Log:
    """What libbpf prints, kept for the error message instead of going to stderr."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lines: list[str] = []
        self._format = ctypes.CDLL(None).vsnprintf
        self._format.argtypes = (c_void_p, c_size_t, c_char_p, c_void_p)
        # as long as a verifier's log may be, whose end says why; memory only once it is used
        self._buffer = (ctypes.c_char * (1 << 24)).from_buffer(mmap.mmap(-1, 1 << 24))
        self._callback = _PRINT(self._print)  # must live as long as the library may call it
        library.libbpf_set_print(self._callback)

    def _print(self, level: int, template: bytes, arguments: int) -> int:
        self._format(self._buffer, len(self._buffer), template, arguments)
        self.lines += self._buffer.value.decode(errors="replace").splitlines()
        return 0

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@cache
def library() -> ctypes.CDLL:
    """libbpf.so.1. Raises LibbpfMissing."""
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LibbpfMissing(str(error)) from error
    for name, result, *arguments in (
        ("bpf_object__open_file", c_void_p, c_char_p, c_void_p),
        ("bpf_object__load", c_int, c_void_p),
        ("bpf_object__close", None, c_void_p),
        ("bpf_object__find_program_by_name", c_void_p, c_void_p, c_char_p),
        ("bpf_object__find_map_by_name", c_void_p, c_void_p, c_char_p),
        ("bpf_program__fd", c_int, c_void_p),
        ("bpf_program__expected_attach_type", c_int, c_void_p),
        ("bpf_map__fd", c_int, c_void_p),
        ("bpf_obj_pin", c_int, c_int, c_char_p),
        ("bpf_obj_get", c_int, c_char_p),
        ("bpf_obj_get_info_by_fd", c_int, c_int, c_void_p, POINTER(c_uint32)),
        ("bpf_btf_get_fd_by_id", c_int, c_uint32),
        ("bpf_btf_load", c_int, c_char_p, c_size_t, c_void_p),
        ("bpf_map_create", c_int, c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
        ("bpf_prog_load", c_int, c_int, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p),
        ("bpf_map__reuse_fd", c_int, c_void_p, c_int),
        ("bpf_link_update", c_int, c_int, c_int, c_void_p),
        ("bpf_link_create", c_int, c_int, c_int, c_int, c_void_p),
        ("bpf_tc_hook_create", c_int, c_void_p),
        ("bpf_tc_hook_destroy", c_int, c_void_p),
        ("bpf_tc_attach", c_int, c_void_p, c_void_p),
        ("bpf_tc_detach", c_int, c_void_p, c_void_p),
        ("bpf_map_lookup_elem_flags", c_int, c_int, c_char_p, c_char_p, c_uint64),
        ("bpf_map_update_elem", c_int, c_int, c_char_p, c_char_p, c_uint64),
        ("bpf_map_delete_elem", c_int, c_int, c_char_p),
        ("bpf_map_get_next_key", c_int, c_int, c_char_p, c_char_p),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def _printed() -> _Log:
    return _Log(library())


class Link(ABC):
    """One attachment. A pod has six of them, so they are kept small."""

    __slots__ = ()
    pins: ClassVar[bool] = True
    """Can it be pinned? All can but the filters of clsact, which stay by themselves."""

    def pin(self, path: Path) -> None:
        raise BpfError(errno.EOPNOTSUPP, f"pinning to {path}")

    @abstractmethod
    def close(self) -> None:
        """Detach; idempotent. What is pinned elsewhere stays attached."""


def pinned(path: Path) -> int:
    """A descriptor of what is pinned there. Raises BpfError."""
    fd: int = library().bpf_obj_get(os.fsencode(path))
    if fd < 0:
        raise BpfError(-fd, f"opening {path}")
    return fd


def map_btf(fd: int) -> bytes:
    """The types that a map was created with; empty if with none."""
    info = _info(fd, _MAP_INFO_BTF_ID + 4)
    number = int.from_bytes(info[_MAP_INFO_BTF_ID:], "little")
    if not number:
        return b""
    btf = library().bpf_btf_get_fd_by_id(number)
    if btf < 0:
        raise BpfError(-btf, f"opening BTF {number}")
    try:
        return btf_of(btf)
    finally:
        os.close(btf)


def btf_of(fd: int) -> bytes:
    """What is behind a descriptor of BTF."""
    size = int.from_bytes(_info(fd, 16)[8:12], "little")
    data = ctypes.create_string_buffer(size)
    _info(fd, 16, ctypes.addressof(data).to_bytes(8, "little") + size.to_bytes(4, "little"))
    return data.raw


def link_target(fd: int) -> int:
    """What a link is attached to: a cgroup's or network namespace's number, an interface's
    index; 0 when that is gone, and the link attached to nothing."""
    info = _info(fd, 24)
    kind = int.from_bytes(info[:4], "little")
    size = 8 if kind == _LINK_CGROUP else 4
    return int.from_bytes(info[16 : 16 + size], "little")


def replace(link: int, program: int) -> None:
    """From now on `link` runs another program; no packet meets none. Raises BpfError."""
    result = library().bpf_link_update(link, program, None)
    if result < 0:
        raise BpfError(-result, "replacing a program")


def printed() -> list[str]:
    """What libbpf printed since the last call."""
    return _printed().take()


def _info(fd: int, size: int, given: bytes = b"") -> bytes:
    data = ctypes.create_string_buffer(given, size)
    result = library().bpf_obj_get_info_by_fd(fd, data, byref(c_uint32(size)))
    if result < 0:
        raise BpfError(-result, "reading about a BPF object")
    return data.raw
