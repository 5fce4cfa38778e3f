from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.contour import ContourSet

from figures.made_up import adamw, experiment, grid, run
from pnorm_decay.figures.contour import contour_figure, on_planes, planes


def panels(fig):
    """The axes of the planes, without the colour bar's."""
    return [ax for ax in fig.axes if ax.get_title()]


def lines_of(ax):
    return [c for c in ax.collections if isinstance(c, ContourSet)]


def cells(ax):
    """What is coloured: (left, right, bottom, top) in log10 -> accuracy."""
    found = {}
    for mesh in (c for c in ax.collections if isinstance(c, QuadMesh)):
        corners, values = mesh.get_coordinates(), np.ma.masked_invalid(mesh.get_array())
        for i, j in np.argwhere(~np.ma.getmaskarray(values)):
            (left, bottom), (right, top) = corners[i, j], corners[i + 1, j + 1]
            edges = tuple(round(float(edge), 6) for edge in (left, right, bottom, top))
            found[edges] = float(values[i, j])
    return found


def points(ax, label):
    return [
        (float(x), float(y))
        for line in ax.get_lines()
        if line.get_label() == label
        for x, y in line.get_xydata()
    ]


def bar(fig):
    return next(ax for ax in fig.axes if not ax.get_title())


def test_a_panel_for_each_p_with_its_best_accuracy(contour):
    titles = [ax.get_title() for ax in panels(contour)]
    assert titles == [
        "p = 0.5, best 95.0%",
        "p = 1, best 95.0%",
        "p = 1.5, best 95.0%",
        "p = 2 (AdamW), best 94.5%",
    ]


def test_adamw_does_not_stand_in_where_pwd_was_run_at_two():
    shown = on_planes(experiment([*grid(2.0), *adamw()]))
    assert [plane.title for plane in planes(shown)] == ["p = 2"]
    assert set(shown.runs["method"]) == {"pwd"}


def test_runs_are_marked_where_they_are(contour):
    first = panels(contour)[0]
    expected = [(x, y) for x in (-4, -3, -2) for y in (-3, -2)]
    assert np.allclose(sorted(points(first, "runs")), expected)
    assert points(first, "diverged") == [pytest.approx((-1, -3))]


def test_white_lines_are_the_sparsities_within_reach(contour):
    (lines,) = lines_of(panels(contour)[0])
    assert list(lines.levels) == [0.01, 0.2, 0.4]  # the sparsest run has 0.7
    assert (lines.get_edgecolor()[:, :3] == 1).all()


def test_sparsity_line_lies_where_interpolation_puts_it():
    rows = [
        run(lambda_p=lambda_p, lr=lr, accuracy=90, sparsity=s)
        for lambda_p, s in ((1e-4, 0.0), (1e-2, 0.8))
        for lr in (1e-3, 1e-2)
    ]
    (lines,) = lines_of(panels(contour_figure(experiment(rows)))[0])
    at_04 = lines.allsegs[list(lines.levels).index(0.4)][0]
    assert at_04[:, 0] == pytest.approx(-3)


def test_labels_name_the_sparsities(contour):
    first = panels(contour)[0]
    assert {text.get_text() for text in first.texts} <= {"0.01", "0.2", "0.4"}
    assert {"0.2", "0.4"} <= {text.get_text() for text in first.texts}


def test_there_are_lines_at_the_high_sparsities():
    rows = [
        run(lambda_p=lambda_p, lr=lr, sparsity=s)
        for lambda_p, s in ((1e-4, 0.5), (1e-2, 1.0))
        for lr in (1e-3, 1e-2)
    ]
    (lines,) = lines_of(panels(contour_figure(experiment(rows)))[0])
    at = {level: lines.allsegs[i][0][:, 0] for i, level in enumerate(lines.levels)}
    assert list(at) == [0.8, 0.9, 0.99]
    assert at[0.9] == pytest.approx(-4 + 2 * 0.8)


@pytest.mark.parametrize("skip", [(), [(2, 1)]], ids=["complete grid", "ragged grid"])
def test_a_cell_is_a_run_and_there_are_no_others(skip):
    ax = panels(contour_figure(experiment(grid(skip=skip))))[0]
    expected = {
        (x - 0.5, x + 0.5, y - 0.5, y + 0.5): 95.0 - i - j / 2
        for i, x in enumerate((-4, -3, -2))
        for j, y in enumerate((-3, -2))
        if (i, j) not in skip
    }
    assert cells(ax) == expected


def test_lines_end_where_a_run_is_missing():
    lambdas = [10.0**k for k in (-4, -3, -2, -1)]
    whole, ragged = (
        panels(contour_figure(experiment(grid(lambdas=lambdas, skip=skip))))[0]
        for skip in ([], [(3, 1)])
    )

    def reach(ax, level):
        (lines,) = lines_of(ax)
        return np.concatenate(lines.allsegs[list(lines.levels).index(level)])[:, 1].max()

    assert reach(whole, 0.8) == pytest.approx(-2)
    assert reach(ragged, 0.8) == pytest.approx(-2.5)  # on the diagonal between two runs


def test_panels_have_the_same_axes_which_hold_every_cell():
    rows = [*grid(0.5), *grid(1.0, lambdas=(1e-2, 1e-1, 1.0), lrs=(1e-4, 1e-3))]
    drawn = panels(contour_figure(experiment(rows)))
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in drawn}) == 1
    for ax in drawn:
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left < -4.5
        assert right > 0.5
        assert bottom < -4.5
        assert top > -1.5
    labelled = [[ax.yaxis.get_major_ticks()[0].label1.get_visible() for ax in drawn]]
    assert labelled == [[True, False]]


def test_colours_of_all_panels_are_one_scale(contour):
    meshes = [c for ax in panels(contour) for c in ax.collections if isinstance(c, QuadMesh)]
    assert len(meshes) == 4
    assert {tuple(mesh.norm.boundaries) for mesh in meshes} == {(91, 93, 94, 95, 96)}


@pytest.mark.parametrize(
    ("lowest", "steps", "extend"),
    [
        (93.5, [93, 94, 95, 96], "neither"),
        (80.0, [76, 86, 91, 93, 94, 95, 96], "neither"),
        (10.0, [56, 76, 86, 91, 93, 94, 95, 96], "min"),
    ],
)
def test_colours_reach_down_as_far_as_accuracy_falls(lowest, steps, extend):
    rows = [*grid(skip=[(2, 1)]), run(lambda_p=1e-2, lr=1e-2, accuracy=lowest, sparsity=0.9)]
    fig = contour_figure(experiment(rows))
    (mesh,) = [c for c in panels(fig)[0].collections if isinstance(c, QuadMesh)]
    assert (list(mesh.norm.boundaries), mesh.norm.extend) == (steps, extend)
    assert bar(fig).get_ylabel() == "validation accuracy (%)"
    shown = mesh.to_rgba(np.array([95.0, 94.0, 93.0, lowest]))
    assert len({tuple(color) for color in shown}) == (4 if lowest < 93 else 3)


@pytest.mark.parametrize(
    "rows",
    [
        [run()],
        [run(lambda_p=1e-3), run(lambda_p=1e-2)],
        grid(lrs=(1e-3,)),
    ],
    ids=["one", "two", "one lr"],
)
def test_runs_in_a_row_are_cells_without_lines(rows):
    ax = panels(contour_figure(experiment(rows)))[0]
    assert len(cells(ax)) == len(rows)
    assert lines_of(ax) == []


def test_runs_on_a_diagonal_are_coloured_circles():
    rows = [run(lambda_p=10.0**k, lr=10.0**k, accuracy=90 + k, sparsity=0.1) for k in (-4, -3, -2)]
    ax = panels(contour_figure(experiment(rows)))[0]
    assert cells(ax) == {}
    (dots,) = [c for c in ax.collections if c.get_label() == "runs"]
    assert len(dots.get_offsets()) == len(rows)
    assert np.ma.allclose(dots.get_array(), [row["val_accuracy"] for row in rows])


def test_runs_that_are_alike_look_alike():
    rows = [run(lambda_p=1e-3, accuracy=90.0), run(lambda_p=1e-2, accuracy=90.0 + 1e-9)]
    ax = panels(contour_figure(experiment(rows)))[0]
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    first, second = mesh.to_rgba(mesh.get_array())[0]
    assert (first == second).all()


def test_a_p_whose_runs_all_diverged_has_a_panel_of_crosses():
    rows = [*grid(0.5), run(p=0.8, accuracy=None), run(p=0.8, lr=1e-2, accuracy=None)]
    last = panels(contour_figure(experiment(rows)))[1]
    assert last.get_title() == "p = 0.8, all diverged"
    assert len(points(last, "diverged")) == 2


def test_seeds_are_averaged_and_the_longest_run_counts():
    rows = [run(seed=0, accuracy=90), run(seed=1, accuracy=94), run(steps=50, accuracy=99)]
    (plane,) = planes(on_planes(experiment(rows)))
    assert plane.settings["val_accuracy"].tolist() == [92]


def test_note_has_the_runs_that_are_drawn_and_those_without_a_place(full, contour):
    text = " ".join(contour.texts[-1].get_text().split())
    drawn = full.runs["method"].isin(["pwd", "adamw"]).sum()
    assert drawn < len(full.runs)
    assert f" {drawn} runs (1 diverged), 1 seed." in text
    assert "Grey crosses: runs that diverged" in text
    assert "Not shown" not in text
    fig = contour_figure(experiment([*grid(), run(lambda_p=0), run("oto", lambda_p=0)]))
    text = " ".join(fig.texts[-1].get_text().split())
    assert "Not shown: 1 run at" in text
    assert "diverged" not in text


def test_without_pwd_the_figure_says_so():
    fig = contour_figure(experiment([run("magnitude", p=2)]))
    assert panels(fig) == []
    assert "no pWD run to show" in [text.get_text() for text in fig.texts]


def test_axes_are_labelled_with_the_values_themselves():
    ax = panels(contour_figure(experiment(grid(lrs=(5e-4, 1e-3, 2e-3)))))[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.0005", "0.001", "0.002"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["$10^{-4}$", "$10^{-3}$", "$10^{-2}$"]


@pytest.mark.parametrize(("lambda_p", "lr"), [(3e-4, 1e-3), (1e-3, 3e-4)])
def test_runs_beside_the_grid_are_coloured_dots_and_bend_no_line(lambda_p, lr):
    rows = grid(p=0.5, lambdas=(1e-4, 1e-3, 1e-2), lrs=(1e-4, 1e-3, 1e-2))
    beside = [run(p=0.5, lambda_p=lambda_p, lr=lr, accuracy=80.0, sparsity=0.9)]
    whole, more = (panels(contour_figure(experiment(r)))[0] for r in (rows, rows + beside))
    dots = [found for found in more.collections if isinstance(found, PathCollection)]
    assert np.concatenate([found.get_offsets() for found in dots]).tolist() == [
        pytest.approx([np.log10(lambda_p), np.log10(lr)])
    ]
    (straight,), (same,) = (lines_of(ax) for ax in (whole, more))
    for before, after in zip(straight.allsegs, same.allsegs, strict=True):
        assert np.allclose(np.concatenate(before), np.concatenate(after))


def test_the_title_has_the_mean_of_the_setting_that_the_first_seed_chooses():
    rows = [run(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((95.0, 91.0))]
    rows.append(run(lr=1e-2, accuracy=94.0))
    (panel,) = panels(contour_figure(experiment(rows)))
    assert panel.get_title() == "p = 0.5, best 93.0%"
