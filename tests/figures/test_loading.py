from __future__ import annotations

import numpy as np
import pytest

from figures.made_up import experiment, frame, run
from pnorm_decay import records
from pnorm_decay.figures.loading import (
    average_seeds,
    best_adamw,
    by_p,
    load,
    load_all,
    nines,
)


def test_seeds_of_one_setting_are_averaged():
    rows = [run(seed=seed, accuracy=a, sparsity=s) for seed, a, s in [(0, 90, 0.5), (1, 94, 0.7)]]
    rows.append(run(lr=1e-2, accuracy=80, sparsity=0.2))
    averaged = average_seeds(frame(rows)).set_index("lr")
    assert averaged.loc[1e-3, "val_accuracy"] == 92
    assert averaged.loc[1e-3, "val_accuracy_std"] == pytest.approx(8**0.5)
    assert averaged.loc[1e-3, "sparsity"] == pytest.approx(0.6)
    assert averaged["seeds"].to_dict() == {1e-3: 2, 1e-2: 1}
    assert np.isnan(averaged.loc[1e-2, "val_accuracy_std"])


def test_a_setting_without_p_or_lambda_is_kept():
    averaged = average_seeds(frame([run("novel", p=None, lambda_p=None, accuracy=70)]))
    assert averaged["val_accuracy"].tolist() == [70]


def test_pruned_runs_are_averaged_only_at_the_same_target():
    rows = [
        run("magnitude", target_sparsity=s, seed=seed, accuracy=90 - 10 * s + seed, sparsity=s)
        for seed in (0, 1)
        for s in (0.5, 0.9, 0.99)
    ]
    averaged = average_seeds(frame(rows)).sort_values("sparsity")
    assert averaged["seeds"].tolist() == [2, 2, 2]
    assert averaged["val_accuracy"].tolist() == pytest.approx([85.5, 81.5, 80.6])


def test_two_runs_of_one_seed_are_never_averaged():
    rows = [run("oto", accuracy=80, sparsity=0.5), run("oto", accuracy=90, sparsity=0.5)]
    assert sorted(average_seeds(frame(rows))["val_accuracy"]) == [80, 90]


def test_runs_of_different_length_are_never_averaged():
    rows = [run(seed=0, steps=100, accuracy=80), run(seed=1, steps=200, accuracy=90)]
    assert sorted(average_seeds(frame(rows))["val_accuracy"]) == [80, 90]


def test_best_adamw_is_the_mean_of_the_setting_that_the_first_seed_chooses():
    rows = [run("adamw", seed=seed, accuracy=a) for seed, a in [(1, 90), (0, 96)]]
    rows += [run("adamw", lr=1e-2, accuracy=94), run(accuracy=99)]
    assert best_adamw(average_seeds(frame(rows))) == 93
    assert best_adamw(average_seeds(frame([run()]))) is None


def test_nines():
    assert nines([0, 0.9, 0.99, 1.0]).tolist() == pytest.approx([0, 1, 2, 5])


def test_by_p_rises_and_leaves_out_rows_without_p():
    assert [p for p, _ in by_p(frame([run(p=1.5), run(p=0.5), run(p=None)]))] == [0.5, 1.5]


def test_finished_runs_without_metrics_count_as_diverged():
    loaded = experiment([run(), run(accuracy=None), run(accuracy=None) | {"status": "finished"}])
    assert len(loaded.finished) == 1
    assert len(loaded.diverged) == 2


def test_note_says_what_a_reader_must_know():
    note = experiment([run(), run(seed=1), run(accuracy=None)]).note
    assert "resnet_digits, demo scale, not the paper's setting" in note
    assert "Data: made-up digits." in note
    assert "3 runs (1 diverged), 2 seeds" in note
    assert "selected on the same validation data, by its first seed." in note


def test_note_tells_runs_of_one_precision_from_those_of_another():
    rows = [run(device="cpu, bf16"), run(device="cpu, bf16"), run(device="cpu, fp32")]
    assert "3 runs (2 in bf16, 1 in fp32), 1 seed" in experiment(rows).note
    assert "2 runs, 1 seed" in experiment(rows[:2]).note


def test_note_at_paper_scale_makes_no_excuse():
    note = experiment([run()], scale="paper").note
    assert "not the paper's" not in note
    assert "1 run, 1 seed" in note


def test_load_takes_scale_and_name_from_the_path(tmp_path):
    records.write(tmp_path / "cpu" / "nanogpt_x.csv", frame([run()]))
    loaded = load(tmp_path / "cpu" / "nanogpt_x.csv")
    assert (loaded.scale, loaded.name) == ("cpu", "nanogpt_x")
    assert (loaded.is_text, loaded.is_image) == (True, False)


def test_load_all_reads_what_it_can(tmp_path):
    records.write(tmp_path / "demo" / "resnet_a.csv", frame([run()]))
    records.write(tmp_path / "demo" / "resnet_b.csv", frame([run(accuracy=None)]))
    (tmp_path / "demo" / "resnet_c.csv").write_text("run_id,p\n1,2\n")
    (tmp_path / "demo" / "resnet_d.csv").write_text("")
    experiments, errors = load_all(tmp_path, ["demo", "cpu"])
    assert [loaded.name for loaded in experiments] == ["resnet_a"]
    assert [
        "resnet_b" in str(errors[0]),
        "resnet_c" in str(errors[1]),
        "resnet_d" in str(errors[2]),
    ]
    assert "no finished run" in str(errors[0])
    assert "lacks the column" in str(errors[1])


def test_load_all_of_nothing_says_where_it_looked(tmp_path):
    experiments, errors = load_all(tmp_path, ["demo"])
    assert experiments == []
    assert len(errors) == 1
    assert str(tmp_path / "demo") in str(errors[0])


def test_the_note_tells_failed_runs_from_diverged_ones():
    rows = [run(), run(lr=1e-2, accuracy=None), run(lr=1e-1, accuracy=None, status="failed")]
    assert "3 runs (1 diverged, 1 failed), 1 seed." in experiment(rows).note
    assert len(experiment(rows).finished) == 1
