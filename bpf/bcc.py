"""The second loader: bcc compiles the sources on the node itself (`--loader bcc`).

For a node where an object that was compiled elsewhere isn't wanted. bcc (Debian package
python3-bpfcc; the `bcc` on PyPI is an unrelated project) gives its compiler: code and types come
out of a process of its own, so that the compiler's memory goes with it. Its maps and its loading
are not used, because it knows no callbacks: maps are made, functions linked and programs loaded
here, by libbpf's calls. No kernel headers are needed.

`python -m weir.bpf.bcc` is that process: it prints what it compiled as JSON.
"""

from __future__ import annotations

import base64
import ctypes
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weir.bpf.btf import Btf
from weir.bpf.libbpf import BpfError, btf_of, library, printed
from weir.bpf.loaded import Loaded

SOURCE = Path(__file__).resolve().with_name("weir.bpf.c")
_PACKAGES = (Path("/usr/lib/python3/dist-packages/bcc"),)
_INCLUDE = Path("/usr/include")
# section -> enum bpf_prog_type, enum bpf_attach_type
_KINDS = {
    "sk_lookup": (30, 36),
    "tc": (3, 0),
    "cgroup/getpeername4": (18, 29),
    "cgroup/getpeername6": (18, 30),
    "cgroup_skb/ingress": (8, 0),
    "cgroup_skb/egress": (8, 1),
    "sockops": (13, 3),
}
_NUMBERS = 0x57000000  # what stands for a map or a callback until it is linked
_LOAD_64, _MAP_FD, _FUNCTION = 0x18, 1, 4  # BPF_LD | BPF_IMM | BPF_DW, BPF_PSEUDO_...
_SOCKHASH = 18  # a map that the kernel takes no types for
_LOG_SIZE = 1 << 24


class BccMissing(Exception):
    """bcc, or what it needs, isn't here, or can't compile the sources; says which."""


class _MapOptions(ctypes.Structure):  # struct bpf_map_create_opts
    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    )


class _ProgramOptions(ctypes.Structure):  # struct bpf_prog_load_opts
    _fields_ = (
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_char_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_void_p),
    )


@dataclass(frozen=True)
class Source:
    """The sources as one text, and the names that are in it."""

    text: str
    programs: Mapping[str, str]  # name -> section
    maps: tuple[str, ...]
    callbacks: tuple[str, ...]

    @classmethod
    def read(cls, path: Path = SOURCE) -> Source:
        text = "".join(_flat(path, set()))
        return cls(
            text,
            {
                name: section
                for section, name in re.findall(r'SEC\("([\w/]+)"\)\nint (\w+)\(', text)
            },
            tuple(re.findall(r"\} (\w+) A_MAP;", text)),
            tuple(re.findall(r"^CALLBACK\((\w+),", text, re.MULTILINE)),
        )

    def number(self, name: str) -> int:
        return _NUMBERS + (*self.maps, *self.callbacks).index(name)


@dataclass(frozen=True)
class Compiled:
    """Functions as they came from the compiler, and the types of everything."""

    source: Source
    code: Mapping[str, bytes]
    types: bytes

    @property
    def btf(self) -> Btf:
        return Btf(self.types, f"{SOURCE}, compiled by bcc")

    def linked(self, program: str, maps: Mapping[str, int]) -> tuple[bytes, bytes]:
        """A program with the callbacks it uses behind it, and their struct bpf_func_info."""
        starts: dict[str, int] = {}
        names, length = [program], 0
        for name in names:  # which grows
            starts[name] = length
            length += len(self.code[name]) // 8
            used = {self._named(number) for _, kind, number in _references(self.code[name])
                    if kind == _FUNCTION}  # fmt: skip
            names += sorted(used - set(names))
        code = bytearray(b"".join(self.code[name] for name in names))
        for at, kind, number in tuple(_references(bytes(code))):
            name = self._named(number)
            value = maps[name] if kind == _MAP_FD else starts[name] - at - 1
            struct.pack_into("<i", code, at * 8 + 4, value)
        btf = self.btf
        functions = (struct.pack("<II", starts[name], btf.function(name)) for name in names)
        return bytes(code), b"".join(functions)

    def _named(self, number: int) -> str:
        return (*self.source.maps, *self.source.callbacks)[number - _NUMBERS]


class BccObject(Loaded):
    """What was compiled, linked and loaded."""

    def __init__(self, compiled: Compiled, reused: Mapping[str, int] | None = None) -> None:
        """`reused`: maps, by name, that are there already; their descriptors are copied.

        Raises BpfError (with the verifier's log), LibbpfMissing."""
        self._lib = library()
        self._source = compiled.source
        self._maps: dict[str, int] = {}
        self._programs: dict[str, int] = {}
        self._types = -1
        try:
            self._types = self._lib.bpf_btf_load(compiled.types, len(compiled.types), None)
            if self._types < 0:
                raise BpfError(-self._types, "loading the types", printed())
            for name in compiled.source.maps:
                fd = (reused or {}).get(name)
                made = self._map(name, compiled.btf) if fd is None else os.dup(fd)
                self._maps[name] = made
            for name in compiled.source.programs:
                self._programs[name] = self._program(name, compiled)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for fd in (*self._maps.values(), *self._programs.values(), self._types):
            with suppress(OSError):
                os.close(fd)
        self._maps, self._programs, self._types = {}, {}, -1

    def map_fd(self, name: str) -> int:
        return self._maps[name]

    def program_fd(self, name: str) -> int:
        return self._programs[name]

    def attach_type(self, program: str) -> int:
        return _KINDS[self._source.programs[program]][1]

    def _map(self, name: str, btf: Btf) -> int:
        settings, types = btf.map_settings(name), btf.maps.get(name)
        options = _MapOptions(sz=ctypes.sizeof(_MapOptions))
        options.map_flags = settings.get("map_flags", 0)
        if types is not None and settings["type"] != _SOCKHASH:
            options.btf_fd = self._types
            options.btf_key_type_id, options.btf_value_type_id = btf.map_types(name)
        fd: int = self._lib.bpf_map_create(
            settings["type"],
            name[:15].encode(),
            types.key.size if types is not None else 0,
            types.value.size if types is not None else 0,
            settings.get("max_entries", 0),
            byref(options),
        )
        if fd < 0:
            raise BpfError(-fd, f"making map {name}", printed())
        return fd

    def _program(self, name: str, compiled: Compiled) -> int:
        code, functions = compiled.linked(name, self._maps)
        kind, attach = _KINDS[compiled.source.programs[name]]
        options = _ProgramOptions(
            sz=ctypes.sizeof(_ProgramOptions),
            expected_attach_type=attach,
            prog_btf_fd=self._types,
            func_info=functions,
            func_info_cnt=len(functions) // 8,
            func_info_rec_size=8,
        )
        arguments = (kind, name[:15].encode(), b"GPL", code, len(code) // 8)
        fd: int = self._lib.bpf_prog_load(*arguments, byref(options))
        if fd < 0:
            log = ctypes.create_string_buffer(_LOG_SIZE)
            options.log_level, options.log_size = 1, _LOG_SIZE
            options.log_buf = ctypes.addressof(log)
            self._lib.bpf_prog_load(*arguments, byref(options))
            said = log.value.decode(errors="replace").splitlines()
            raise BpfError(-fd, f"loading {name} as bcc compiled it", said)
        return fd


def compile_here() -> Compiled:
    """In a process of its own. Raises BccMissing."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "weir.bpf.bcc"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        errors = [line for line in lines if "error" in line]
        raise BccMissing((errors or lines[-1:])[0].strip())
    made = json.loads(done.stdout)
    code = {name: base64.b64decode(text) for name, text in made["code"].items()}
    return Compiled(Source.read(), code, base64.b64decode(made["types"]))


def _references(code: bytes) -> Iterator[tuple[int, int, int]]:
    """(instruction, kind, number) of what stands for a map or a callback."""
    at = 0
    while at < len(code) // 8:
        operation, registers, _, number = struct.unpack_from("<BBhi", code, at * 8)
        if operation == _LOAD_64:
            if registers >> 4 in (_MAP_FD, _FUNCTION):
                yield at, registers >> 4, number
            at += 1
        at += 1


def _flat(path: Path, seen: set[Path]) -> Iterator[str]:
    """bcc rewrites, and gives sections to, functions of the main file only."""
    for line in path.read_text().splitlines(keepends=True):
        match = re.match(r'\s*#include "(.+)"', line)
        if match is None:
            yield line
        elif path.with_name(match[1]) not in seen:
            seen.add(path.with_name(match[1]))
            yield from _flat(path.with_name(match[1]), seen)


# ---- the process that compiles -----------------------------------------------------------------


def _bcc() -> Any:
    """Debian's package, which a virtual environment doesn't see."""
    for folder in _PACKAGES:
        spec = importlib.util.spec_from_file_location(
            "bcc", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if (folder / "__init__.py").exists() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules["bcc"] = module
            spec.loader.exec_module(module)
            return module
    raise BccMissing("error: bcc is not installed: apt-get install python3-bpfcc")


def _headers(root: Path) -> None:
    """A tree that bcc takes for the kernel's: our sources read the UAPI only, and bcc's own headers
    but a few names of the kernel's."""
    include, uapi = root / "include", root / "include/uapi"
    for folder in ("linux", "asm", "generated/uapi"):
        (include / folder).mkdir(parents=True)
    uapi.mkdir()
    if not (_INCLUDE / "linux/tcp.h").exists():
        raise BccMissing("error: no kernel UAPI headers: apt-get install linux-libc-dev")
    (uapi / "linux").mkdir()
    for header in (_INCLUDE / "linux").iterdir():
        if header.name not in ("bpf.h", "version.h"):  # bcc brings a bpf.h
            (uapi / "linux" / header.name).symlink_to(header)
    (uapi / "linux/bpf.h").touch()
    (uapi / "asm-generic").symlink_to(_INCLUDE / "asm-generic")
    for machine in ("x86", "arm64"):
        generated = root / "arch" / machine / "include/generated/uapi"
        generated.mkdir(parents=True)
        (generated / "asm").symlink_to(_INCLUDE / f"{os.uname().machine}-linux-gnu/asm")
    for name in ("linux/log2.h", "asm/page.h"):
        (include / name).touch()
    (include / "linux/version.h").write_text(
        "#define LINUX_VERSION_CODE 0\n#define KERNEL_VERSION(a, b, c) 0\n"
    )
    (include / "stddef.h").write_text("#define NULL ((void *)0)\n")
    widths = {8: "char", 16: "short", 32: "int", 64: "long long"}
    kinds = ((letter, sign) for letter, sign in (("u", "unsigned"), ("s", "signed")))
    (include / "linux/kconfig.h").write_text(
        "#define CONFIG_BPF_SYSCALL 1\n#define PAGE_SIZE 4096\n"
        "typedef unsigned long uintptr_t;\ntypedef unsigned long size_t;\ntypedef _Bool bool;\n"
        + "".join(
            f"typedef {sign} {name} {letter}{bits};\n"
            for letter, sign in kinds
            for bits, name in widths.items()
        )
    )


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def _compile(source: Source) -> dict[str, Any]:
    bcc = _bcc()
    numbered = (*source.maps, *source.callbacks)
    flags = ["-g", "-DWEIR_BCC=1", "-Wno-incompatible-pointer-types-discards-qualifiers"]
    flags += [f"-DNUMBER_{name}={source.number(name)}" for name in numbered]
    with tempfile.TemporaryDirectory() as folder:
        _headers(Path(folder))
        os.environ["BCC_KERNEL_SOURCE"] = folder
        module = bcc.BPF(text=source.text, cflags=flags)
    code = {}
    for name in (*source.programs, *source.callbacks):
        start = bcc.lib.bpf_function_start(module.module, name.encode())
        size = bcc.lib.bpf_function_size(module.module, name.encode())
        if not start:
            raise BccMissing(f"error: bcc compiled no function {name}")
        code[name] = base64.b64encode(ctypes.string_at(start, size)).decode()
    types = next((fd for fd, kind in _descriptors().items() if "btf" in kind), None)
    if types is None:
        raise BccMissing("error: the kernel took no types from bcc")
    return {"code": code, "types": base64.b64encode(btf_of(types)).decode()}


def main() -> int:
    try:
        print(json.dumps(_compile(Source.read())))
    except BccMissing as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
