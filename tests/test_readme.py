"""What the README says of the recorded runs is what the CSV files hold."""

from __future__ import annotations

import re

import pytest

from conftest import REPOSITORY
from pnorm_decay.figures.loading import load

README = (REPOSITORY / "README.md").read_text()
RECORDED = sorted((REPOSITORY / "results" / "cpu").glob("*.csv"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_its_captions_count_the_recorded_runs(path):
    experiment = load(path)
    figure = 2 if experiment.is_image else 3
    (caption,) = re.findall(rf"\*Figure {figure}\. (.*?)\*\n", README, flags=re.DOTALL)
    seeds = experiment.runs["seed"].nunique()
    said = " ".join(caption.split())
    assert f"{len(experiment.runs)} runs" in said
    assert (f"{seeds} seeds" if seeds > 1 else "one seed") in said
    assert "cpu scale" in said
