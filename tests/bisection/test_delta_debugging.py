"""Delta debugging finds what fails, all of it, and nothing else, in few tests."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.bisection.delta_debugging import every_minimal, first_bad, minimal, without


class Fails:
    """Fails when all of one of some sets are there; counts the tests."""

    def __init__(self, *sets: set[int]) -> None:
        self.sets, self.tests = sets, 0

    def __call__(self, parts: tuple[int, ...]) -> bool:
        self.tests += 1
        return any(needed <= set(parts) for needed in self.sets)


@pytest.mark.parametrize("culprit", range(0, 64, 7))
def test_one_culprit_takes_about_two_tests_per_halving(culprit: int) -> None:
    fails = Fails({culprit})
    assert minimal(range(64), fails) == (culprit,)
    assert fails.tests <= 2 * 6


def test_a_pair_that_only_fails_together() -> None:
    assert minimal(range(50), Fails({3, 41})) == (3, 41)


def test_independent_culprits_are_all_found() -> None:
    found = every_minimal(range(40), Fails({5}, {6}, {20, 30}))
    assert sorted(found) == [(5,), (6,), (20, 30)]


@pytest.mark.parametrize("parts", [(), (1, 2, 3)])
def test_nothing_fails(parts: tuple[int, ...]) -> None:
    assert every_minimal(parts, lambda _: False) == []


def test_everything_is_needed() -> None:
    assert minimal(range(9), Fails(set(range(9)))) == tuple(range(9))


@given(st.integers(1, 30), st.sets(st.integers(0, 29), min_size=1, max_size=5))
def test_the_result_is_1_minimal(extra: int, needed: set[int]) -> None:
    fails = Fails(needed)
    found = minimal(range(29 + extra), fails)
    assert fails(found)
    assert not any(fails(without(found, (one,))) for one in found)


@given(st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_the_first_bad_step_takes_logarithmically_many_tests(case: tuple[int, int]) -> None:
    count, first = case
    asked: list[int] = []
    assert first_bad(count, lambda k: bool(asked.append(k)) or k >= first) == first
    assert len(asked) <= count.bit_length()


def test_a_step_that_mends_is_still_a_step_from_good_to_bad() -> None:
    bad = (False, True, False, False, True, True)
    found = first_bad(5, lambda k: bad[k])
    assert (bad[found - 1], bad[found]) == (False, True)


def test_without_keeps_the_order() -> None:
    assert without((3, 1, 2), (1,)) == (3, 2)
    assert all(without(order, order) == () for order in itertools.permutations(range(3)))
