"""Weir's kernel side on other kernels than this machine's: Debian's, booted under qemu.

`python -m tests.machine` fetches kernels, boots each with this machine's files below it, runs tests
inside and prints what came of it. `make test-kernels` does the same.
"""
