"""The Pareto front of accuracy against sparsity."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(sparsity: ArrayLike, accuracy: ArrayLike) -> NDArray[np.intp]:
    """The runs that no other run beats in both sparsity and accuracy.

    A run is beaten by one that is at least as sparse and as accurate, and better in one of the two.
    Runs that tie in both are all kept.

    Args:
        sparsity: shape (n,), higher is better.
        accuracy: shape (n,), higher is better.

    Returns:
        Indices into the arguments, by rising sparsity.

    Raises:
        ValueError: the shapes differ or a value is NaN.
    """
    s, a = np.asarray(sparsity, dtype=float), np.asarray(accuracy, dtype=float)
    if s.ndim != 1 or s.shape != a.shape:
        raise ValueError(f"sparsity and accuracy must be alike and flat, not {s.shape}, {a.shape}")
    if np.isnan(s).any() or np.isnan(a).any():
        raise ValueError("sparsity and accuracy must not hold NaN")
    levels, level = np.unique(s, return_inverse=True)
    best_at = np.full(len(levels), -np.inf)
    np.maximum.at(best_at, level, a)
    best_from = np.maximum.accumulate(best_at[::-1])[::-1]
    best_beyond = np.append(best_from[1:], -np.inf)
    kept = np.flatnonzero((a == best_at[level]) & (a > best_beyond[level]))
    return kept[np.argsort(s[kept], kind="stable")]
