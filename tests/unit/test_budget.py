"""Many pods share one process: nobody takes it all, and who takes little is never turned away."""

import random

from weir.proxy.policy.budget import Budget, Pace, Share, connections, fair_level


def fill(share: Share) -> int:
    while share.room:
        share.take()
    return share.used


def test_a_single_hungry_pod_leaves_a_quarter_and_what_the_others_are_guaranteed() -> None:
    budget = Budget(1000)
    hungry, others = budget.share(), [budget.share() for _ in range(9)]
    assert fill(hungry) == 50 + 250
    for other in others:
        assert fill(other) >= 50
    assert budget.used <= 1000


def test_alone_a_pod_has_three_quarters() -> None:
    assert fill(Budget(1000).share()) == 750


def test_however_many_are_hungry_all_of_them_get_what_is_guaranteed_and_no_more_is_used() -> None:
    chance = random.Random(1)
    for _ in range(50):
        total, count = chance.randint(100, 5000), chance.randint(1, 50)
        budget = Budget(total)
        shares = [budget.share() for _ in range(count)]
        hungry = list(shares)
        while hungry:
            share = chance.choice(hungry)
            if share.room:
                share.take()
            else:
                hungry.remove(share)
        assert all(share.used >= total // (2 * count) for share in shares)
        assert budget.used <= total


def test_what_is_given_back_is_free_for_others() -> None:
    budget = Budget(100)
    one, other = budget.share(), budget.share()
    fill(one)
    while one.used:
        one.give()
    assert budget.free == 50
    assert fill(other) == 25 + 25


def test_comings_and_goings_of_pods_keep_the_account() -> None:
    chance = random.Random(2)
    budget = Budget(1000)
    shares = [budget.share()]
    for _ in range(5000):
        share = chance.choice(shares)
        what = chance.random()
        if what < 0.6:
            if share.room:
                share.take()
        elif what < 0.9:
            if share.used:
                share.give()
        elif what < 0.95 and len(shares) < 20:
            shares.append(budget.share())
        elif len(shares) > 1:
            shares.remove(share)
            share.close()
        lent = sum(max(share.used - budget.guaranteed, 0) for share in shares)
        assert budget.free == 1000 - budget.guaranteed * len(shares) - lent
        assert budget.used <= 1250


def test_a_pod_that_comes_late_has_room_though_another_took_all_there_was() -> None:
    budget = Budget(100)
    fill(budget.share())
    assert fill(budget.share()) == 25


def test_a_budget_of_nothing_still_lets_each_have_one() -> None:
    budget = Budget(-50)
    assert [fill(budget.share()), fill(budget.share())] == [1, 1]


def test_who_has_little_keeps_it_and_the_rest_is_cut_to_one_level() -> None:
    assert fair_level([10, 20, 500, 700], 430) == 200
    assert fair_level([10, 20, 30], 1000) >= 30
    assert fair_level([100, 100], 50) == 25
    assert fair_level([], 50) == 50
    chance = random.Random(3)
    for _ in range(200):
        amounts = [chance.randint(0, 1000) for _ in range(chance.randint(1, 20))]
        capacity = chance.randint(0, 10_000)
        level = fair_level(amounts, capacity)
        assert sum(min(amount, level) for amount in amounts) <= capacity
        if sum(amounts) > capacity:  # and it could not be higher
            assert sum(min(amount, level + 1) for amount in amounts) > capacity


def test_a_pace_allows_a_burst_and_then_so_much_a_second() -> None:
    pace = Pace(10.0, 5.0)
    assert [pace.spend(1.0, 100.0) for _ in range(6)] == [True] * 5 + [False]
    pace = Pace(10.0, 5.0)
    assert all(pace.spend(1.0, 100.0 + number / 10) for number in range(100))


def test_what_a_closed_share_still_gives_back_is_not_given_to_the_others_twice() -> None:
    budget = Budget(100)
    gone, other = budget.share(), budget.share()
    fill(gone)
    gone.close()
    free = budget.free
    while gone.used:
        gone.give()
    assert budget.free == free
    assert fill(other) == 75


def test_connections_fit_into_descriptors_and_memory_of_the_process() -> None:
    for descriptors in (1 << 12, 20_000, 1 << 20):
        for pods in (1, 10, 30):
            most = connections(descriptors, 1 << 30, pods)
            assert most > 0 or descriptors == 1 << 12
            # 5/4: all guarantees taken after one pod had taken all there was
            assert 2 * most * 5 // 4 + 128 * (pods + 1) <= descriptors
            assert most * 8192 <= 1 << 29
