"""What a loader has put into the kernel: programs and maps by name, and their attachment.

Owns handles and their lifetime: what was attached here and not pinned is detached by Link.close().
Knows no program or map by name. `BpfObject` is the default loader; another one is bpf/bcc.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from ctypes import byref, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path

from weir.bpf.libbpf import BpfError, Link, library, printed

TCX_INGRESS = 46  # enum bpf_attach_type
_TC_INGRESS = 1  # enum bpf_tc_attach_point
_TC_REPLACE = 1  # enum: BPF_TC_F_REPLACE
_TC_PRIORITY = 30567


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


class Loaded(ABC):
    """In the kernel until close()."""

    @abstractmethod
    def map_fd(self, name: str) -> int: ...

    @abstractmethod
    def program_fd(self, name: str) -> int: ...

    @abstractmethod
    def attach_type(self, program: str) -> int: ...

    @abstractmethod
    def close(self) -> None: ...

    def pin_map(self, name: str, path: Path) -> None:
        _pin(self.map_fd(name), name, path)

    def attach_cgroup(self, program: str, cgroup: Path) -> Link:
        return self._attach_at(program, cgroup)

    def attach_netns(self, program: str, netns: Path) -> Link:
        return self._attach_at(program, netns)

    def attach_tc_ingress(self, program: str, ifindex: int) -> Link:
        """Call this in the interface's network namespace, and close the link there, too
        (a TCX link, from kernel 6.6 on, may be closed anywhere)."""
        link = self._link(program, ifindex, TCX_INGRESS)
        return self._attach_clsact(program, ifindex) if link is None else link

    def _attach_at(self, program: str, target: Path) -> Link:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            link = self._link(program, fd, self.attach_type(program))
            code = ctypes.get_errno()
        finally:
            os.close(fd)
        if link is None:
            raise BpfError(code, f"attaching {program} to {target}")
        return link

    def _link(self, program: str, target: int, kind: int) -> Link | None:
        """None, and errno, when the kernel refuses."""
        options = _LinkOptions(sz=ctypes.sizeof(_LinkOptions))
        link = library().bpf_link_create(self.program_fd(program), target, kind, byref(options))
        if link < 0:
            ctypes.set_errno(-link)
            return None
        return _KernelLink(link, program)

    def _attach_clsact(self, program: str, ifindex: int) -> Link:
        lib = library()
        hook = _TcHook(sz=ctypes.sizeof(_TcHook), ifindex=ifindex, attach_point=_TC_INGRESS)
        # the place of this filter is fixed, so that whoever comes after a SIGKILL replaces it
        options = _TcOptions(
            sz=ctypes.sizeof(_TcOptions),
            prog_fd=self.program_fd(program),
            flags=_TC_REPLACE,
            handle=1,
            priority=_TC_PRIORITY,
        )
        printed()
        created = lib.bpf_tc_hook_create(byref(hook))
        if created not in (0, -errno.EEXIST):
            raise BpfError(-created, f"adding clsact to interface {ifindex}", printed())
        result = lib.bpf_tc_attach(byref(hook), byref(options))
        if result < 0:
            if created == 0:
                _destroy_clsact(hook)
            raise BpfError(-result, f"attaching {program} to interface {ifindex}", printed())
        return _Clsact(hook, options, created == 0)


class BpfObject(Loaded):
    """An object file, opened and loaded by libbpf."""

    def __init__(self, path: Path, reused: Mapping[str, int] | None = None) -> None:
        """`reused`: maps, by name, that are there already; theirs are the definitions then.

        Raises BpfError (with the verifier's log), LibbpfMissing."""
        self._lib = library()
        printed()
        self._handle = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise BpfError(ctypes.get_errno(), f"opening {path}", printed())
        for name, fd in (reused or {}).items():
            result = self._lib.bpf_map__reuse_fd(self._find("map", name), fd)
            if result < 0:
                raise BpfError(-result, f"using the pinned map {name}", printed())
        result = self._lib.bpf_object__load(self._handle)
        if result < 0:
            log = printed()
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

    def attach_type(self, program: str) -> int:
        kind: int = self._lib.bpf_program__expected_attach_type(self._find("program", program))
        return kind

    def _find(self, what: str, name: str) -> int:
        find = getattr(self._lib, f"bpf_object__find_{what}_by_name")
        handle: int | None = find(self._handle, name.encode())
        if not handle:
            raise BpfError(errno.ENOENT, f"the object has no {what} {name}")
        return handle


class _KernelLink(Link):
    __slots__ = ("_fd", "_program")

    def __init__(self, fd: int, program: str) -> None:
        self._fd = fd
        self._program = program

    def pin(self, path: Path) -> None:
        _pin(self._fd, self._program, path)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Clsact(Link):
    __slots__ = ("_created", "_hook", "_options")
    pins = False

    def __init__(self, hook: _TcHook, options: _TcOptions, created: bool) -> None:
        """`created`: the qdisc is ours."""
        self._hook = hook
        self._options: _TcOptions | None = options
        self._created = created

    def close(self) -> None:
        options, self._options = self._options, None
        if options is None:
            return
        options.prog_fd = options.prog_id = options.flags = 0
        library().bpf_tc_detach(byref(self._hook), byref(options))
        if self._created:
            _destroy_clsact(self._hook)


def _destroy_clsact(hook: _TcHook) -> None:
    hook.attach_point = _TC_INGRESS | 2  # both: the qdisc itself goes
    library().bpf_tc_hook_destroy(byref(hook))


def _pin(fd: int, what: str, path: Path) -> None:
    result = library().bpf_obj_pin(fd, os.fsencode(path))
    if result < 0:
        raise BpfError(-result, f"pinning {what} to {path}", printed())
