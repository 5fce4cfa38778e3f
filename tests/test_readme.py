"""What the README says of the recorded runs is what the CSV files hold."""

from __future__ import annotations

import re

from conftest import REPOSITORY
from pnorm_decay.figures.loading import load

README = (REPOSITORY / "README.md").read_text()
RECORDED = REPOSITORY / "results" / "cpu" / "nanogpt_shakespeare.csv"


def test_its_caption_counts_the_recorded_runs():
    experiment = load(RECORDED)
    (caption,) = re.findall(r"\*Figure 3\. (.*?)\*\n", README, flags=re.DOTALL)
    seeds = experiment.runs["seed"].nunique()
    said = " ".join(caption.split())
    assert f"{len(experiment.runs)} runs" in said
    assert f"{seeds} seeds" in said
    assert "cpu scale" in said


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 120
