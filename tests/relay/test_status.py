"""The status socket: connect, read one JSON line, EOF."""

import asyncio
from pathlib import Path

import pytest

from weir.proxy.wire.status import read_status, serve_status


async def test_every_reader_gets_the_snapshot_of_its_moment(tmp_path: Path) -> None:
    path = tmp_path / "status"
    count = 0

    def snapshot() -> dict[str, object]:
        nonlocal count
        count += 1
        return {"count": count, "path": path}

    async with await serve_status(path, snapshot):
        for expected in (1, 2):
            status = await asyncio.to_thread(read_status, path)
            assert status == {"count": expected, "path": str(path)}


async def test_what_is_told_one_by_one_is_an_array(tmp_path: Path) -> None:
    path = tmp_path / "status"
    pods = ["a", {"name": "b"}, None]
    async with await serve_status(path, lambda: {"pods": iter(pods), "none": iter(()), "n": 1}):
        status = await asyncio.to_thread(read_status, path)
    assert status == {"pods": pods, "none": [], "n": 1}


async def test_a_socket_that_the_dead_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "status"
    path.touch()
    async with await serve_status(path, lambda: {"up": True}):
        assert await asyncio.to_thread(read_status, path) == {"up": True}


def test_nobody_serves(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_status(tmp_path / "status")
