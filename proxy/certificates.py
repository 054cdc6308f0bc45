"""A pod's certificate, read out of its container for a worker that may read no file (contract 3.9).

Owns the reading, which follows no link out of the container, and the memory file a worker loads a
pair from. When there is a new one is the business of whoever looks.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from weir.proxy.environment import CERTIFICATES

Pair = tuple[str, str]
"""Certificate chain and key, in PEM."""

MAX_BYTES = 8 * 1024
_SYS_OPENAT2 = 437  # the same on every architecture
_NO_MAGICLINKS, _IN_ROOT = 0x02, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def of_container(pid: int) -> Pair | None:
    """None when there is none. Raises OSError, and ValueError for what is no text or too big."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        certificate, key = (
            _read(root, f"{CERTIFICATES}/{name}") for name in ("tls.crt", "tls.key")
        )
    except FileNotFoundError:
        return None
    finally:
        os.close(root)
    return certificate, key


def in_memory(text: str) -> Path:
    """A file of this process only, that can be named as long as it lives."""
    return rewrite(Path(f"/proc/self/fd/{os.memfd_create('pem')}"), text)


def rewrite(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def _read(root: int, path: str) -> str:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    how = _How(flags, 0, _IN_ROOT | _NO_MAGICLINKS)
    descriptor = _libc.syscall(
        _SYS_OPENAT2, root, path.encode(), ctypes.byref(how), ctypes.sizeof(how)
    )
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f"{path} is no file of at most {MAX_BYTES} bytes")
        return file.read(MAX_BYTES).decode("ascii")
