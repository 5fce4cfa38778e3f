"""Made-up runs: small, and with accuracies and sparsities that a test can work out by hand."""

from __future__ import annotations

from itertools import count, product

import pandas as pd

from pnorm_decay import records
from pnorm_decay.figures.loading import Experiment

COUNTER = count()


def run(method="pwd", p=0.5, lambda_p=1e-3, lr=1e-3, accuracy=90.0, sparsity=0.5, **others):
    """One row of a results file; an accuracy of None is a run that diverged."""
    diverged = accuracy is None
    row = dict.fromkeys(records.COLUMNS) | {
        "run_id": f"run{next(COUNTER):04d}",
        "method": method,
        "p": p,
        "lambda_p": lambda_p,
        "lr": lr,
        "seed": 0,
        "steps": 100,
        "val_accuracy": accuracy,
        "sparsity": None if diverged else sparsity,
        "data": "made-up digits",
        "status": "diverged" if diverged else "finished",
    }
    return row | others


def frame(rows):
    return pd.DataFrame(rows).astype(records.COLUMNS)


def experiment(rows, name="resnet_digits", scale="demo"):
    return Experiment(scale, name, frame(rows))


def grid(p=0.5, lambdas=(1e-4, 1e-3, 1e-2), lrs=(1e-3, 1e-2), skip=()):
    """pWD on a grid: each lambda_p costs an accuracy of 1 and brings a sparsity of 0.3."""
    return [
        run(p=p, lambda_p=lambda_p, lr=lr, accuracy=95.0 - i - j / 2, sparsity=0.3 * i + 0.1 * j)
        for (i, lambda_p), (j, lr) in product(enumerate(lambdas), enumerate(lrs))
        if (i, j) not in skip
    ]


def adamw():
    return [
        run("adamw", p=2, lambda_p=0.01, accuracy=94.0, sparsity=0.0),
        run("adamw", p=2, lambda_p=0.1, accuracy=94.5, sparsity=0.0),
    ]
