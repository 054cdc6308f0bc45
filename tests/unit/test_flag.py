"""A flag is waited for as an event of asyncio's is."""

import asyncio

from weir.proxy.flag import Flag


async def test_who_comes_after_it_was_set_does_not_wait() -> None:
    flag = Flag()
    flag.set()
    flag.set()
    assert flag.is_set()
    await flag.wait()


async def test_all_who_wait_go_on_even_if_it_is_cleared_at_once() -> None:
    flag = Flag()
    waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    flag.set()
    flag.clear()
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    assert not flag.is_set()


async def test_who_comes_after_it_was_cleared_waits_for_the_next_time() -> None:
    flag = Flag()
    flag.set()
    flag.clear()
    waiting = asyncio.create_task(flag.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    flag.set()
    async with asyncio.timeout(5):
        await waiting


async def test_one_who_gives_up_takes_nothing_from_the_others() -> None:
    flag = Flag()
    waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    waiting[1].cancel()
    flag.set()  # the second has not noticed yet that it was cancelled
    async with asyncio.timeout(5):
        await waiting[2]
    assert waiting[0].cancelled()
    await asyncio.wait(waiting[:2])
    assert waiting[1].cancelled()
