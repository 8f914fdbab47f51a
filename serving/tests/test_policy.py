"""The policy alone: levels of scripted loads by hand, and of random ones by the rule read literally."""

import random

import pytest

from emoe_vllm.policy import Policy


def levels(loads, starts, hold, margin):
    policy = Policy(starts, hold, margin)
    return [policy.step(load) for load in loads], policy


def test_down_at_once_and_up_after_a_while():
    # Level 2 is left upwards by loads below 8 - 1, level 1 by loads below 4 - 1, after three such steps.
    script = [
        (1, 0),
        (4, 1),  # at once
        (9, 2),
        (7, 2),  # less than 8, but within the margin
        (6, 2),
        (6, 2),
        (8, 2),  # two calm steps were not enough, and count no more
        (6, 2),
        (6, 2),
        (6, 2),
        (6, 1),  # after three, one level
        (3, 1),  # within the margin
        (2, 1),
        (2, 1),
        (2, 1),
        (2, 0),
        (12, 2),  # two levels at once
        (1, 2),
        (1, 2),
        (1, 2),
        (1, 1),  # calm enough for the next level too: this step is the first of three
        (1, 1),
        (1, 1),
        (1, 0),
    ]
    found, policy = levels([load for load, _ in script], (0, 4, 8), 3, 1)
    assert found == [level for _, level in script]
    assert policy.changes == 7


def naive(loads, starts, hold, margin):
    """The rule as its page has it, from the whole history of loads."""
    found, now, since = [], 0, 0
    for step, load in enumerate(loads):
        wanted = max(level for level, start in enumerate(starts) if start <= load)
        recent = loads[step - hold : step + 1] if step - since >= hold else None
        if wanted > now:
            now, since = wanted, step
        elif recent and all(each < starts[now] - margin for each in recent):
            now, since = now - 1, step
        found.append(now)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_random_loads(seed):
    draw = random.Random(seed)
    starts = (0, *sorted(draw.sample(range(2, 40), draw.randint(1, 4))))
    gap = min(high - low for low, high in zip(starts, starts[1:], strict=False))
    hold, margin = draw.randint(0, 6), draw.randint(0, gap - 1)
    loads, load = [], 1
    for _ in range(400):
        load = max(1, load + draw.randint(-4, 4)) if draw.random() < 0.9 else draw.randint(1, 50)
        loads.append(load)
    found, policy = levels(loads, starts, hold, margin)
    assert found == naive(loads, starts, hold, margin)
    assert policy.changes == sum(before != after for before, after in zip([0, *found], found, strict=False))
    assert levels(loads, starts, hold, margin)[0] == found


def test_a_load_that_swings_around_a_start_changes_nothing():
    fast, slow = [7, 8] * 500, ([7] * 100 + [8] * 100) * 5
    assert levels(fast, (0, 8), 16, 0)[1].changes == 1 and set(levels(fast, (0, 8), 16, 0)[0][1:]) == {1}
    assert levels(slow, (0, 8), 16, 2)[1].changes == 1
    assert levels(slow, (0, 8), 16, 0)[1].changes == 9  # what the margin is for


def test_without_requests_it_is_at_the_first_level():
    policy = Policy((0, 2), 100, 0)
    assert policy.step(5) == 1
    policy.rest()
    policy.rest()
    assert policy.changes == 2 and policy.step(1) == 0 and policy.step(2) == 1
