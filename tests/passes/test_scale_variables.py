"""The union-find agrees with a naive one, keeps the reason for every pin, and label arrays stay narrow."""

import numpy as np
import pytest
import torch

from qcompile.passes.scale_variables import ANY, ONE, Labels, ScaleVariables, compact, elementwise, ones


def labels(*values: int) -> Labels:
    return np.array(values, np.int64)


class Naive:
    """Equality and pinning with sets: what ScaleVariables must agree with."""

    def __init__(self, count: int) -> None:
        self.groups = [{label} for label in range(count + 1)]

    def group(self, label: int) -> set[int]:
        return next(group for group in self.groups if label in group)

    def unite(self, a: int, b: int) -> None:
        if ANY in (a, b) or self.group(a) is self.group(b):
            return
        left, right = self.group(a), self.group(b)
        self.groups = [group for group in self.groups if group is not left and group is not right]
        self.groups.append(left | right)

    def free(self, label: int) -> bool:
        return ONE not in self.group(label)


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_a_naive_union_find(seed: int) -> None:
    count, random = 40, np.random.default_rng(seed)
    variables, naive = ScaleVariables(), Naive(count)
    everything = variables.fresh(count)
    for _ in range(random.integers(1, 6)):
        left, right = (random.integers(-1, count + 1, random.integers(1, 12)) for _ in range(2))
        left, right = left[: right.size], right[: left.size]
        variables.unify(left, right, "said so")
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            naive.unite(a, b)
    roots = variables.find(everything)
    free = variables.free(everything)
    for a in everything.tolist():
        assert free[a - 1] == naive.free(a)
        assert bool(variables.reason(a)) != bool(free[a - 1])
        for b in everything.tolist():
            together = roots[a - 1] == roots[b - 1]
            assert together == (naive.group(a) is naive.group(b)) or not (naive.free(a) or naive.free(b))


def test_fresh_variables_are_distinct_and_free_beyond_the_first_block() -> None:
    variables = ScaleVariables()
    first, second = variables.fresh(1000), variables.fresh(5000)
    everything = np.concatenate([first, second])
    assert np.unique(everything).size == 6000
    assert ONE not in everything
    assert variables.free(everything).all()
    np.testing.assert_array_equal(variables.find(everything), everything)


def test_no_variables_are_no_trouble() -> None:
    variables = ScaleVariables()
    nothing = variables.fresh(0)
    variables.pin(nothing, "nothing")
    variables.unify(nothing, nothing, "nothing")
    assert not variables.reasons
    assert variables.find(nothing).size == 0


def test_one_and_any_are_neither_free_nor_pinned() -> None:
    variables = ScaleVariables()
    special = labels(ONE, ANY)
    np.testing.assert_array_equal(variables.find(special), special)
    assert not variables.free(special).any()
    variables.pin(special, "cannot be")
    assert variables.reason(ONE) == ""
    assert variables.reason(ANY) == ""


def test_any_fits_everything_and_one_pins() -> None:
    variables = ScaleVariables()
    a, b = variables.fresh(2).tolist()
    variables.unify(labels(a, ANY, ONE), labels(ANY, b, ANY), "a zero")
    assert variables.free(labels(a, b)).all()
    variables.unify(labels(a), labels(ONE), "meets one")
    assert variables.free(labels(a, b)).tolist() == [False, True]
    assert variables.reason(a) == "meets one"


def test_the_first_reason_is_kept() -> None:
    variables = ScaleVariables()
    a, b = variables.fresh(2).tolist()
    variables.pin(labels(a), "first")
    variables.pin(labels(a, b), "second")
    assert (variables.reason(a), variables.reason(b)) == ("first", "second")


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_a_pin_and_its_reason_reach_every_equal_variable(pinned: int) -> None:
    variables = ScaleVariables()
    three = variables.fresh(3)
    variables.pin(three[pinned : pinned + 1], "the culprit")
    variables.unify(three[:2], three[1:], "equal")
    assert not variables.free(three).any()
    assert {variables.reason(label) for label in three.tolist()} == {"the culprit"}


def test_one_call_may_unite_a_variable_with_many() -> None:
    variables = ScaleVariables()
    many = variables.fresh(100)
    variables.unify(np.full(99, many[50]), np.delete(many, 50), "all alike")
    assert np.unique(variables.find(many)).size == 1
    assert variables.free(many).all()


def test_unify_broadcasts() -> None:
    variables = ScaleVariables()
    rows, columns = variables.fresh(2).reshape(2, 1), variables.fresh(3)
    variables.unify(rows, columns, "an outer sum")
    assert np.unique(variables.find(np.concatenate([rows.ravel(), columns]))).size == 1


def test_compact_drops_the_extent_of_repeated_dimensions() -> None:
    repeated = torch.arange(3).expand(4, 5, 3)
    plain = torch.zeros(4, 1, 3, dtype=torch.int64).expand(4, 5, 3)
    (only,), shape = compact(repeated)
    assert (tuple(only.shape), shape) == ((1, 1, 3), (4, 5, 3))
    (left, right), _ = compact(repeated, plain)
    assert tuple(left.shape) == tuple(right.shape) == (4, 1, 3)
    (empty,), _ = compact(torch.zeros(1, 3, dtype=torch.int64).expand(0, 3))
    assert tuple(empty.shape) == (0, 3)


def test_elementwise_computes_once_per_distinct_line() -> None:
    sizes = []

    def add(a: Labels, b: Labels) -> Labels:
        sizes.append(a.shape)
        return a + b

    result = elementwise(add, torch.arange(3).expand(100, 3), torch.ones((), dtype=torch.int64))
    assert sizes == [(1, 3)]
    torch.testing.assert_close(result, torch.tensor([1, 2, 3]).expand(100, 3))
    assert result.stride(0) == 0


def test_ones_take_no_memory() -> None:
    result = ones((1000, 1000))
    assert result.shape == (1000, 1000)
    assert result.untyped_storage().nbytes() == 8
    assert not result.any()
