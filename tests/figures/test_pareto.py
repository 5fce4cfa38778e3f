from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnorm_decay.figures.pareto import pareto_front

# Few distinct values, so that ties are common.
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def is_beaten(one, by):
    return by[0] >= one[0] and by[1] >= one[1] and by != one


@given(POINTS)
def test_keeps_exactly_the_points_that_no_other_beats(points):
    s, a = np.array(points, dtype=float).reshape(-1, 2).T
    expected = {i for i, one in enumerate(points) if not any(is_beaten(one, o) for o in points)}
    front = pareto_front(s, a)
    assert set(front.tolist()) == expected
    assert len(front) == len(expected)


@given(POINTS)
def test_runs_by_rising_sparsity_and_falling_accuracy(points):
    s, a = np.array(points, dtype=float).reshape(-1, 2).T
    front = pareto_front(s, a)
    assert (np.diff(s[front]) >= 0).all()
    assert (np.diff(a[front]) <= 0).all()


@pytest.mark.parametrize(
    ("sparsity", "accuracy"),
    [([0.1, np.nan], [1, 2]), ([0.1, 0.2], [1, np.nan]), ([0.1], [1, 2]), ([[0.1]], [[1]])],
)
def test_refuses_what_has_no_order(sparsity, accuracy):
    with pytest.raises(ValueError, match="must"):
        pareto_front(sparsity, accuracy)
