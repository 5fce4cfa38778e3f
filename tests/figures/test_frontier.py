from __future__ import annotations

import matplotlib.colors as colors
import pytest

from figures.made_up import adamw, experiment, grid, run
from pnorm_decay.figures.frontier import frontier_figure
from pnorm_decay.figures.style import p_style


def lines(ax, label):
    """The lines of the plotted points with this label, bars' lines left out."""
    found = [line for line in ax.get_lines() if line.get_label() == label]
    return found + [c[0] for c in ax.containers if c.get_label() == label]


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def note(fig):
    return " ".join(fig.texts[-1].get_text().split())


def steered(target, accuracy, method="pwd_target", lr=1e-3, seed=0, p=0.8):
    lambda_p = 0.01 if method.startswith("magnitude") else None
    where = {"target_sparsity": target, "sparsity": target, "seed": seed}
    return run(method, p=p, lambda_p=lambda_p, lr=lr, accuracy=accuracy, **where)


def test_a_thin_front_for_each_p_and_at_most_eight_names(frontier):
    left = frontier.axes[0]
    for p in (0.5, 1.0, 1.5):
        (front,) = lines(left, f"p = {p:g}")
        assert colors.to_hex(front.get_color()) == p_style(p).color
        assert list(front.get_xdata()) == pytest.approx([0.0, 0.1, 0.3, 0.4, 0.6, 0.7])
    assert legend(frontier) == ["p = 0.5", "p = 1", "p = 1.5", "best AdamW"]


def test_runs_to_a_target_are_a_line_through_what_seed_0_chooses():
    rows = [
        steered(0.9, 93.0),
        steered(0.9, 92.0, lr=1e-2),
        steered(0.9, 99.0, lr=1e-2, seed=1),  # the other seeds have no part in the choice
        steered(0.9, 91.0, seed=1),
        steered(0.5, 94.0),
    ]
    left = frontier_figure(experiment([*grid(), *rows])).axes[0]
    (line,) = lines(left, "pWD to a target")
    assert list(line.get_xdata()) == [0.5, 0.9]
    assert list(line.get_ydata()) == [94.0, 92.0]
    assert line.get_linestyle() == "-"
    assert "pWD to a target" in [text.get_text() for text in left.texts]  # beside the line


def test_both_kinds_of_magnitude_pruning_are_one_line():
    rows = [
        steered(0.9, 90.0, "magnitude"),
        steered(0.9, 92.0, "magnitude_global"),
        steered(0.5, 94.0, "magnitude"),
        steered(0.5, 93.0, "magnitude_global"),
    ]
    left = frontier_figure(experiment([*grid(), *rows])).axes[0]
    (line,) = lines(left, "IMP")
    assert list(line.get_ydata()) == [94.0, 92.0]


def test_the_right_panel_shows_the_best_that_is_sparse_enough():
    rows = [steered(0.9, 92.0) | {"sparsity": 0.899}, steered(0.98, 91.0)]  # 1 % of the density
    right = frontier_figure(experiment([*grid(), *adamw(), *rows])).axes[1]
    (constant,) = lines(right, "pWD, constant lambda_p, best p")
    assert list(constant.get_ydata()) == [93.0]  # at least 0.5: the setting at 0.6
    (target,) = lines(right, "pWD to a target")
    assert list(target.get_ydata()) == [92.0, 92.0, 92.0, 91.0, 91.0]
    ticks = [label.get_text() for label in right.get_xticklabels()]
    assert ticks == ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99"]
    assert len(right.get_lines()[-1].get_xdata()) == 2  # AdamW's


def test_what_lies_below_is_counted_and_does_not_stretch_the_axis():
    rows = [*grid(), *adamw(), run(lambda_p=1, accuracy=10, sparsity=0.999)]
    fig = frontier_figure(experiment(rows))
    assert fig.axes[0].get_ylim()[0] > 90
    assert "1 settings lie below the left axis" in note(fig)
    marks = [line for line in fig.axes[1].get_lines() if line.get_marker() == "v"]
    # Only the collapsed setting is as sparse as 0.8 to 0.99.
    assert sum(len(line.get_xdata()) for line in marks) == 5


def test_bars_show_the_spread_of_the_seeds():
    rows = [steered(0.9, a, seed=seed) for seed, a in enumerate((90, 92))]
    fig = frontier_figure(experiment([*rows, *adamw()]))
    heights = [s[:, 1] for c in fig.axes[0].collections for s in c.get_segments()]
    assert any(h.max() - h.min() == pytest.approx(2 * 2**0.5) for h in heights)
    assert "standard deviation" in note(fig)


@pytest.mark.parametrize(
    "rows",
    [[run()], adamw(), [run("novel", p=None, lambda_p=None)], [run(accuracy=0.0, sparsity=1.0)]],
    ids=["one run", "AdamW alone", "a method without p", "nothing learnt"],
)
def test_draws_what_little_there_is(rows):
    fig = frontier_figure(experiment(rows))
    assert len(fig.axes) == 2
    assert f"{len(rows)} run" in note(fig)
