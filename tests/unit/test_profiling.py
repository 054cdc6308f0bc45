"""The profiling port answers with stacks, and refuses Go's profiles in words."""

import asyncio

import pytest

from weir.proxy.observe.profiling import profiling
from weir.proxy.wire.head import RequestHead


class Client:
    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def answer(self, head: RequestHead, parts: list[bytes]) -> None:
        self.parts = parts


def ask(path: str) -> tuple[int, str]:
    client = Client()
    head = RequestHead(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    profiling()(client, head, b"", True)
    return int(client.parts[0][9:12]), client.parts[-1].decode()


async def test_the_stacks_of_threads_and_tasks() -> None:
    async def waiting_for_godot() -> None:
        await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(waiting_for_godot(), name="godot")
    await asyncio.sleep(0)
    status, text = ask("/debug/pprof/goroutine?debug=2")
    task.cancel()
    assert status == 200
    assert "thread MainThread" in text and "test_profiling.py" in text
    assert "task godot" in text and "waiting_for_godot" in text


@pytest.mark.parametrize(
    ("path", "status"),
    [("/debug/pprof/", 200), ("/debug/pprof/profile", 501), ("/debug/pprof/heap", 501), ("/", 404)],
)
async def test_other_pages(path: str, status: int) -> None:
    assert ask(path)[0] == status
