"""A small ctypes binding over the system's libbpf.so.1: open, load, attach, pin, replace.

Owns handles and their lifetime: whatever was attached here is detached by close(). Knows no
program or map by name. Needs no compiler and no headers. Errors are `BpfError` (an OSError)
with what libbpf and the verifier had to say in `.log`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

TCX_INGRESS = 46  # enum bpf_attach_type
_TC_INGRESS = 1  # enum bpf_tc_attach_point
_TC_REPLACE = 1  # enum: BPF_TC_F_REPLACE
_TC_PRIORITY = 30567
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


class _LinkOptions(ctypes.Structure):  # struct bpf_link_create_opts, its first fields
    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("iter_info", c_void_p))


class _TcHook(ctypes.Structure):  # struct bpf_tc_hook
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
        ("_pad", c_uint32),
    )


class _TcOptions(ctypes.Structure):  # struct bpf_tc_opts
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
        ("_pad", c_uint32),
    )


class _Log:
    """What libbpf prints, kept for the error message instead of going to stderr."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lines: list[str] = []
        self._format = ctypes.CDLL(None).vsnprintf
        self._format.argtypes = (c_void_p, c_size_t, c_char_p, c_void_p)
        self._callback = _PRINT(self._print)  # must live as long as the library may call it
        library.libbpf_set_print(self._callback)

    def _print(self, level: int, template: bytes, arguments: int) -> int:
        buffer = ctypes.create_string_buffer(1 << 16)
        self._format(buffer, len(buffer), template, arguments)
        self.lines += buffer.value.decode(errors="replace").splitlines()
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
        ("bpf_program__attach_cgroup", c_void_p, c_void_p, c_int),
        ("bpf_program__attach_netns", c_void_p, c_void_p, c_int),
        ("bpf_map__fd", c_int, c_void_p),
        ("bpf_link__destroy", c_int, c_void_p),
        ("bpf_link__pin", c_int, c_void_p, c_char_p),
        ("bpf_obj_pin", c_int, c_int, c_char_p),
        ("bpf_obj_get", c_int, c_char_p),
        ("bpf_obj_get_info_by_fd", c_int, c_int, c_void_p, POINTER(c_uint32)),
        ("bpf_btf_get_fd_by_id", c_int, c_uint32),
        ("bpf_map__reuse_fd", c_int, c_void_p, c_int),
        ("bpf_link_update", c_int, c_int, c_int, c_void_p),
        ("bpf_link_create", c_int, c_int, c_int, c_int, POINTER(_LinkOptions)),
        ("bpf_tc_hook_create", c_int, POINTER(_TcHook)),
        ("bpf_tc_hook_destroy", c_int, POINTER(_TcHook)),
        ("bpf_tc_attach", c_int, POINTER(_TcHook), POINTER(_TcOptions)),
        ("bpf_tc_detach", c_int, POINTER(_TcHook), POINTER(_TcOptions)),
        ("bpf_map_lookup_elem_flags", c_int, c_int, c_char_p, c_char_p, c_uint64),
        ("bpf_map_update_elem", c_int, c_int, c_char_p, c_char_p, c_uint64),
        ("bpf_map_delete_elem", c_int, c_int, c_char_p),
        ("bpf_map_get_next_key", c_int, c_int, c_char_p, c_char_p),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def _log() -> _Log:
    return _Log(library())


class Link:
    """One attachment. close() detaches and is idempotent; a pinned link stays attached."""

    def __init__(
        self,
        close: Callable[[], None],
        pin: Callable[[Path], None] | None = None,
    ) -> None:
        self._close: Callable[[], None] | None = close
        self._pin = pin

    @property
    def pins(self) -> bool:
        """Can it be pinned? All can but the filters of clsact, which stay by themselves."""
        return self._pin is not None

    def pin(self, path: Path) -> None:
        if self._pin is None:
            raise BpfError(errno.EOPNOTSUPP, f"pinning to {path}")
        self._pin(path)

    def close(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close()


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
        size = int.from_bytes(_info(btf, 16)[8:12], "little")
        data = ctypes.create_string_buffer(size)
        _info(btf, 16, ctypes.addressof(data).to_bytes(8, "little") + size.to_bytes(4, "little"))
    finally:
        os.close(btf)
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


def _info(fd: int, size: int, given: bytes = b"") -> bytes:
    data = ctypes.create_string_buffer(given, size)
    result = library().bpf_obj_get_info_by_fd(fd, data, byref(c_uint32(size)))
    if result < 0:
        raise BpfError(-result, "reading about a BPF object")
    return data.raw


class BpfObject:
    """An object file, opened and loaded: its programs and maps are in the kernel until close()."""

    def __init__(self, path: Path, reused: Mapping[str, int] | None = None) -> None:
        """`reused`: maps, by name, that are there already; theirs are the definitions then.

        Raises BpfError (with the verifier's log), LibbpfMissing."""
        self._lib = library()
        _log().take()
        self._handle = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise BpfError(ctypes.get_errno(), f"opening {path}", _log().take())
        for name, fd in (reused or {}).items():
            self._checked(self._lib.bpf_map__reuse_fd(self._find("map", name), fd), f"using {name}")
        result = self._lib.bpf_object__load(self._handle)
        if result < 0:
            log = _log().take()
            self.close()
            raise BpfError(-result, f"loading {path}", log)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            self._lib.bpf_object__close(handle)

    def map_fd(self, name: str) -> int:
        fd: int = self._lib.bpf_map__fd(self._find("map", name))
        return fd

    def program_fd(self, name: str) -> int:
        fd: int = self._lib.bpf_program__fd(self._find("program", name))
        return fd

    def pin_map(self, name: str, path: Path) -> None:
        result = self._lib.bpf_obj_pin(self.map_fd(name), os.fsencode(path))
        if result < 0:
            raise BpfError(-result, f"pinning map {name} to {path}", _log().take())

    def attach_cgroup(self, program: str, cgroup: Path) -> Link:
        return self._attach(self._lib.bpf_program__attach_cgroup, program, cgroup)

    def attach_netns(self, program: str, netns: Path) -> Link:
        return self._attach(self._lib.bpf_program__attach_netns, program, netns)

    def attach_tc_ingress(self, program: str, ifindex: int) -> Link:
        """Call this in the interface's network namespace, and close the link there, too
        (a TCX link, from kernel 6.6 on, may be closed anywhere)."""
        link = self._lib.bpf_link_create(
            self.program_fd(program),
            ifindex,
            TCX_INGRESS,
            byref(_LinkOptions(sz=ctypes.sizeof(_LinkOptions))),
        )
        if link >= 0:
            return Link(
                lambda: os.close(link),
                lambda path: self._checked(
                    self._lib.bpf_obj_pin(link, os.fsencode(path)), f"pinning {program} to {path}"
                ),
            )
        _log().take()
        return self._attach_clsact(program, ifindex)

    def _attach(self, attach: Callable[[int, int], int | None], program: str, target: Path) -> Link:
        _log().take()
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            link = attach(self._find("program", program), fd)
            code = ctypes.get_errno()
        finally:
            os.close(fd)
        if not link:
            raise BpfError(code, f"attaching {program} to {target}", _log().take())
        return Link(
            lambda: self._lib.bpf_link__destroy(link),
            lambda path: self._checked(
                self._lib.bpf_link__pin(link, os.fsencode(path)), f"pinning {program} to {path}"
            ),
        )

    def _attach_clsact(self, program: str, ifindex: int) -> Link:
        hook = _TcHook(sz=ctypes.sizeof(_TcHook), ifindex=ifindex, attach_point=_TC_INGRESS)
        # the place of this filter is fixed, so that whoever comes after a SIGKILL replaces it
        options = _TcOptions(
            sz=ctypes.sizeof(_TcOptions),
            prog_fd=self.program_fd(program),
            flags=_TC_REPLACE,
            handle=1,
            priority=_TC_PRIORITY,
        )
        created = self._lib.bpf_tc_hook_create(byref(hook))
        if created not in (0, -errno.EEXIST):
            raise BpfError(-created, f"adding clsact to interface {ifindex}", _log().take())
        result = self._lib.bpf_tc_attach(byref(hook), byref(options))
        if result < 0:
            if created == 0:
                self._destroy_clsact(hook)
            raise BpfError(-result, f"attaching {program} to interface {ifindex}", _log().take())

        def detach() -> None:
            options.prog_fd = options.prog_id = options.flags = 0
            self._lib.bpf_tc_detach(byref(hook), byref(options))
            if created == 0:
                self._destroy_clsact(hook)

        return Link(detach)

    def _destroy_clsact(self, hook: _TcHook) -> None:
        hook.attach_point = _TC_INGRESS | 2  # both: the qdisc itself goes
        self._lib.bpf_tc_hook_destroy(byref(hook))

    def _find(self, what: str, name: str) -> int:
        find = getattr(self._lib, f"bpf_object__find_{what}_by_name")
        handle: int | None = find(self._handle, name.encode())
        if not handle:
            raise BpfError(errno.ENOENT, f"the object has no {what} {name}")
        return handle

    def _checked(self, result: int, what: str) -> None:
        if result < 0:
            raise BpfError(-result, what, _log().take())
