from __future__ import annotations

import pytest

from figures.made_up import adamw, experiment, grid, run
from pnorm_decay.figures.contour import contour_figure
from pnorm_decay.figures.frontier import frontier_figure
from pnorm_decay.figures.methods import methods_figure


@pytest.fixture(scope="session")
def full():
    """A whole experiment: three p, AdamW, IMP, a method nobody knows, a diverged run."""
    rows = [*grid(0.5), *grid(1.0), *grid(1.5), *adamw()]
    rows += [run("magnitude", p=2, accuracy=93.0, sparsity=s) for s in (0.5, 0.9, 0.99)]
    rows += [run("novel", p=2, accuracy=92.0, sparsity=0.7)]
    rows += [run(p=0.5, lambda_p=1e-1, accuracy=None)]
    return experiment(rows)


@pytest.fixture(scope="session")
def frontier(full):
    """Figure 2 of it; tests look and do not touch."""
    return frontier_figure(full)


@pytest.fixture(scope="session")
def methods(full):
    """Its supplement; tests look and do not touch."""
    return methods_figure(full)


@pytest.fixture(scope="session")
def contour(full):
    """Figure 4 of it; tests look and do not touch."""
    return contour_figure(full)
