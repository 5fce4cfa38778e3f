from __future__ import annotations

import pandas as pd
import pytest

from pnorm_decay.figures.toy import CEILING, FLOOR, read, toy_figure
from pnorm_decay.records import RecordError


@pytest.fixture
def curves():
    weights = {"coupled": [1, -0.5, 0.5], "periodic": [1, 0.5, 0.1], "pwd": [1, 0.1, 0.0]}
    every = {"coupled": None, "periodic": 7, "pwd": 1}
    rows = [
        (method, step, w, 0.0, 0.8, 0.1, every[method])
        for method, ws in weights.items()
        for step, w in enumerate(ws)
    ]
    return pd.DataFrame(rows, columns=["method", "step", "w", "loss", "p", "lr", "every"])


def test_three_lines_as_in_the_paper(curves):
    fig = toy_figure(curves)
    left, right = fig.axes
    drawn = {
        line.get_label(): (line.get_linestyle(), list(line.get_ydata()))
        for line in left.get_lines()
        if not line.get_label().startswith("_")
    }
    assert drawn == {
        "norm in the gradient": (":", [1, -0.5, 0.5]),
        "s refreshed every 7 steps": ("--", [1, 0.5, 0.1]),
        "s refreshed every step (pWD)": ("-", [1, 0.1, 0]),
    }
    assert right.get_yscale() == "log"
    assert list(right.get_lines()[2].get_ydata()) == [1, 0.1, FLOOR]
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == list(drawn)


def test_settings_are_written_on_it(curves):
    note = " ".join(toy_figure(curves).texts[-1].get_text().split())
    for words in ("p = 0.8", "learning rate 0.1", "from w = 1,"):
        assert words in note


def test_a_weight_that_blew_up_ends_its_line(curves):
    curves.loc[curves["method"] == "coupled", "w"] = [1, 2 * CEILING, float("inf")]
    (line,) = [x for x in toy_figure(curves).axes[0].get_lines() if x.get_linestyle() == ":"]
    assert list(line.get_ydata()) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,step,w\npwd,0,1\n", "lacks the column loss, p, lr, every"),
        ("", "is empty"),
        ("method,step,w,loss,p,lr,every\n", "holds no steps"),
        ("method,step,w,loss,p,lr,every\npwd,0,x,1,1,1,1\n", "line 2: w=x: no number"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "figure1.csv"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
