"""Of the items with one key, only the oldest is on its way."""

from __future__ import annotations

from weir.adaptor.order import Order


def test_the_first_of_each_key_goes_at_once() -> None:
    order: Order[str] = Order()
    assert order.enter("a", "a1")
    assert order.enter("b", "b1")


def test_the_others_go_one_by_one_in_the_order_in_which_they_came() -> None:
    order: Order[str] = Order()
    order.enter("a", "a1")
    assert not order.enter("a", "a2")
    assert not order.enter("a", "a3")
    assert order.leave("a") == "a2"
    assert not order.enter("a", "a4")
    assert [order.leave("a") for _ in range(3)] == ["a3", "a4", None]


def test_a_key_is_free_again_when_the_last_has_left() -> None:
    order: Order[str] = Order()
    order.enter("a", "a1")
    assert not order.is_free("a")
    assert order.leave("a") is None
    assert order.is_free("a")
    assert order.enter("a", "a2")
