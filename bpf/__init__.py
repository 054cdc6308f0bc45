"""The kernel side of Weir and its Python binding.

Owns where the compiled object is; what its programs mean is `weir.proxy.kernel`'s business.
"""

from pathlib import Path

#: compiled by `make bpf`, shipped in the wheel
OBJECT = Path(__file__).resolve().with_name("weir.bpf.o")
