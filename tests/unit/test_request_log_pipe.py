"""Lines on a pipe whose reader is slow, or gone (contract section 3.13)."""

import asyncio
import os

import pytest

from weir.proxy.observe.lines import Lines


class Pipe:
    def __init__(self, most: int = 1 << 20) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.lines = Lines(self.writing, "request log", most)

    def read(self) -> bytes:
        try:
            return os.read(self.reading, 1 << 20)
        except BlockingIOError:
            return b""

    async def until(self, size: int) -> bytes:
        data = b""
        async with asyncio.timeout(20):
            while len(data) < size:
                data += self.read()
                await asyncio.sleep(0.001)
        return data

    def close(self) -> None:
        os.close(self.writing)
        os.close(self.reading)


async def test_lines_of_one_turn_are_one_write() -> None:
    pipe = Pipe()
    pipe.lines.say(b"one\n")
    pipe.lines.say(b"two\n")
    assert pipe.read() == b""
    await asyncio.sleep(0)
    assert pipe.read() == b"one\ntwo\n"
    pipe.close()


async def test_a_reader_that_is_slow_gets_everything_and_nobody_waits_for_it() -> None:
    pipe = Pipe()
    said = b"".join(b"%06d %s\n" % (number, b"x" * 93) for number in range(5000))
    for line in said.splitlines(keepends=True):
        pipe.lines.say(line)
        await asyncio.sleep(0)  # the loop goes on though the pipe is full
    assert pipe.lines.dropped == 0
    assert await pipe.until(len(said)) == said
    pipe.close()


async def test_a_reader_that_does_not_read_costs_lines_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = Pipe(most=10_000)
    for number in range(2000):
        pipe.lines.say(b"%099d\n" % number)
        await asyncio.sleep(0)
    assert pipe.lines.dropped > 0
    kept = 2000 - pipe.lines.dropped
    data = await pipe.until(kept * 100)
    numbers = [int(line) for line in data.splitlines()]
    assert numbers == list(range(kept))  # whole lines, in order, the first ones
    async with asyncio.timeout(20):
        while not caplog.records:
            await asyncio.sleep(0.001)
    assert f"{pipe.lines.dropped} lines of the request log were dropped" in caplog.text
    pipe.lines.say(b"again\n")
    assert await pipe.until(6) == b"again\n"
    pipe.close()


async def test_a_reader_that_is_gone_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe()
    os.close(pipe.reading)
    for _ in range(3):
        pipe.lines.say(b"line\n")
        await asyncio.sleep(0)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "can't be written any more" in caplog.text
    os.close(pipe.writing)


async def test_what_is_left_is_flushed_but_not_for_ever() -> None:
    pipe = Pipe()
    line = b"x" * 999 + b"\n"
    for _ in range(200):
        pipe.lines.say(line)
    await pipe.lines.flush(0.1)  # the pipe is full, and nobody reads
    first = pipe.read()
    assert 0 < len(first) < 200_000
    flushing = asyncio.get_running_loop().create_task(pipe.lines.flush(20))
    rest = await pipe.until(200_000 - len(first))
    await flushing
    assert first + rest == line * 200
    pipe.close()
