from __future__ import annotations

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from pnorm_decay.figures.contour import contour_figure
from pnorm_decay.figures.frontier import frontier_figure
from pnorm_decay.figures.style import finish, method_styles, p_style, save

SWEPT = (0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0)


def test_every_p_has_its_colour_and_each_side_of_one_its_marker():
    assert len({p_style(p).color for p in SWEPT}) == len(SWEPT)
    assert {p_style(p).marker for p in SWEPT if p < 1} == {"o"}
    assert {p_style(p).marker for p in SWEPT if p > 1} == {"s"}
    assert p_style(1.0).marker == "D"


def test_a_method_has_a_style_of_its_own_whatever_its_name():
    styles = method_styles(["pwd", "adamw", "magnitude", *(f"m{i}" for i in range(9))])
    assert list(styles) == [*(f"m{i}" for i in range(9)), "magnitude"]
    assert len({(style.color, style.marker) for style in styles.values()}) == 10


@pytest.mark.parametrize(
    ("name", "draw", "suffix"),
    [("frontier", frontier_figure, "png"), ("contour", contour_figure, "pdf")],
)
def test_redrawing_gives_the_same_bytes(full, request, name, draw, suffix, tmp_path):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    save(request.getfixturevalue(name), one)
    save(draw(full), two)
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) > 10_000


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_files_hold_neither_dates_nor_versions(frontier, suffix, tmp_path):
    save(frontier, tmp_path / f"figure.{suffix}")
    written = (tmp_path / f"figure.{suffix}").read_bytes()
    for word in (b"CreationDate", b"Software", b"Producer", mpl.__version__.encode()):
        assert word not in written


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    fig = Figure()
    monkeypatch.setattr(fig, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(fig, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_note_is_below_the_panels():
    fig = Figure(figsize=(7, 3))
    ax = fig.subplots()
    ax.set_xlabel("x")
    finish(fig, "word " * 100)
    note = fig.texts[-1].get_window_extent()
    assert note.y1 < ax.xaxis.label.get_window_extent().y0
    assert note.x1 < fig.bbox.x1
    assert note.height > 15  # several lines


def test_nothing_of_the_figures_overlaps_the_note_or_leaves_the_page(frontier, contour):
    for fig in (frontier, contour):
        note = fig.texts[-1].get_window_extent()
        for ax in fig.axes:
            box = ax.get_tightbbox()
            assert box.y0 > note.y1
            assert box.y1 < fig.bbox.y1 + 1
            assert box.x0 > -1
            assert box.x1 < fig.bbox.x1 + 1


def test_drawing_leaves_matplotlibs_settings_alone(full, tmp_path):
    before = mpl.rcParams.copy()
    save(frontier_figure(full), tmp_path / "figure.png")
    assert mpl.rcParams.copy() == before
