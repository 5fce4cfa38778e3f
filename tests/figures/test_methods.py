from __future__ import annotations

import matplotlib.colors as colors
import numpy as np
import pandas as pd
import pytest

from figures.made_up import adamw, experiment, grid, run
from pnorm_decay.figures.methods import methods_figure, trade_off
from pnorm_decay.figures.style import ADAMW_COLOR, p_style


def lines(ax, label):
    return [line for line in ax.get_lines() if line.get_label() == label]


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts() if text.get_text()]


def note(fig):
    return " ".join(fig.texts[-1].get_text().split())


def test_a_front_a_point_and_a_legend_entry_for_each_p(methods):
    left = methods.axes[0]
    for p in (0.5, 1.0, 1.5):
        (front,) = lines(left, f"p = {p:g}")
        assert colors.to_hex(front.get_color()) == p_style(p).color
        assert list(front.get_xdata()) == pytest.approx([0.0, 0.1, 0.3, 0.4, 0.6, 0.7])
        assert list(front.get_ydata()) == pytest.approx([95.0, 94.5, 94.0, 93.5, 93.0, 92.5])
    assert {"p = 0.5", "p = 1", "p = 1.5", "best AdamW", "IMP", "novel"} == set(legend(methods))


def test_dashed_line_is_at_the_best_adamw(methods):
    (line,) = lines(methods.axes[0], "AdamW")
    assert list(line.get_ydata()) == [94.5, 94.5]
    assert line.get_linestyle() == "--"
    assert line.get_color() == ADAMW_COLOR


def test_dominated_runs_are_not_on_the_front():
    rows = [run(accuracy=90, sparsity=0.9), run(lr=1e-2, accuracy=89, sparsity=0.5)]
    left = methods_figure(experiment(rows)).axes[0]
    (front,) = lines(left, "p = 0.5")
    assert list(front.get_xdata()) == [0.9]
    assert any(len(line.get_xdata()) == 2 for line in left.get_lines())


def test_known_methods_look_as_in_the_paper_and_unknown_ones_differ():
    rows = [run(name, p=2, accuracy=80, sparsity=0.5) for name in ("magnitude", "oto", "a", "b")]
    left = methods_figure(experiment([*grid(), *rows])).axes[0]
    looks = {
        label: (lines(left, label)[0].get_marker(), lines(left, label)[0].get_color())
        for label in ("IMP", "OTO", "a", "b")
    }
    assert looks["IMP"][0] == "x"
    assert looks["OTO"][0] == "*"
    assert len(set(looks.values())) == 4


def test_collapsed_runs_are_marked_and_counted_and_do_not_stretch_the_axis():
    rows = [*grid(), *adamw(), run(lambda_p=1, accuracy=10, sparsity=1.0)]
    fig = methods_figure(experiment(rows))
    left = fig.axes[0]
    assert left.get_ylim()[0] > 90
    (front,) = lines(left, "p = 0.5")
    assert min(front.get_ydata()) == 92.5  # the line does not lead down to the collapsed run
    assert left.get_xlim()[1] < 1
    assert "1 below the axis" in legend(fig)
    marks = [line for line in left.get_lines() if line.get_marker() == "v"]
    assert sum(len(line.get_xdata()) for line in marks) == 1


def test_sparsity_axis_reaches_the_sparsest_run_and_gives_nines_equal_room():
    rows = [run(lr=lr, accuracy=90, sparsity=s) for lr, s in [(1e-3, 0.0), (1e-2, 0.999)]]
    left = methods_figure(experiment(rows)).axes[0]
    assert left.get_xlim()[1] > 0.999
    places = left.transData.transform([(0, 90), (0.9, 90), (0.99, 90), (0.999, 90)])[:, 0]
    assert np.diff(places) == pytest.approx(np.diff(places)[0])


def test_seeds_become_one_point_with_an_error_bar():
    rows = [run(seed=seed, accuracy=a, sparsity=0.5) for seed, a in enumerate((90, 92))]
    fig = methods_figure(experiment([*rows, *adamw()]))
    left = fig.axes[0]
    (front,) = lines(left, "p = 0.5")
    assert list(front.get_ydata()) == [91]
    heights = [segment[:, 1] for c in left.collections for segment in c.get_segments()]
    assert any(h.max() - h.min() == pytest.approx(2 * 2**0.5) for h in heights)
    assert "standard deviation" in note(fig)


def test_trade_off_panel_shows_the_best_of_each_p_and_method(methods):
    right = methods.axes[1]
    assert [label.get_text() for label in right.get_xticklabels()] == [
        "0.5",
        "1",
        "1.5",
        "IMP",
        "novel",
    ]
    heights = [
        float(line.get_ydata()[0])
        for line in right.get_lines()
        if line.get_marker() in ("o", "D", "s", "x", "^")
    ]
    best_pwd = 2 * (92.5 / 94.5) * 0.7 / (92.5 / 94.5 + 0.7)
    imp = 2 * (93 / 94.5) * 0.99 / (93 / 94.5 + 0.99)
    assert heights[:4] == pytest.approx([best_pwd, best_pwd, best_pwd, imp])


def test_trade_off_of_known_points():
    accuracy, sparsity = pd.Series([50.0, 100.0, 100.0, 0.0]), pd.Series([0.5, 0.0, 1.0, 0.0])
    assert trade_off(accuracy, sparsity, 100.0).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_note_names_data_runs_and_our_own_formula(full, methods):
    text = note(methods)
    assert full.note.replace("\n", " ") in text
    assert "our choice, not the paper's" in text
    assert "accuracy / best of AdamW" in text


def test_without_adamw_there_is_no_dashed_line_and_the_note_says_so():
    fig = methods_figure(experiment(grid()))
    assert lines(fig.axes[0], "AdamW") == []
    assert "no AdamW run is recorded" in note(fig)


@pytest.mark.parametrize(
    "rows",
    [[run()], adamw(), [run("novel", p=None, lambda_p=None)], [run(accuracy=0.0, sparsity=1.0)]],
    ids=["one run", "AdamW alone", "a method without p", "nothing learnt"],
)
def test_draws_what_little_there_is(rows):
    fig = methods_figure(experiment(rows))
    assert len(fig.axes) == 2
    assert f"{len(rows)} run" in note(fig)
