from __future__ import annotations

import pandas as pd
import pytest

from pnorm_decay.figures.inference import RANDOM, inference_figure, read
from pnorm_decay.records import RecordError


def rows() -> pd.DataFrame:
    made = []
    for threads in (1, 2):
        for case, speed in (("write text", 500.0), ("16 images", 200.0)):
            shared = {"case": case, "threads": threads, "machine": "a machine"}
            dense = {"sparsity": 0.0, "per_second": speed, "ratio": 1.0, "multiply_adds_left": 1.0}
            made.append({**shared, "network": RANDOM, "form": "dense bf16", **dense})
            for network, shares in ((RANDOM, (0.99, 0.9, 0.95)), ("1492ae312905", (0.98,))):
                for share in shares:
                    ratio = threads * 0.1 / (1 - share)
                    measured = {
                        "sparsity": share,
                        "per_second": speed * ratio,
                        "ratio": ratio,
                        "multiply_adds_left": 1 - share,
                    }
                    made.append({**shared, "network": network, "form": "sparse", **measured})
    return pd.DataFrame(made)


def test_lines_are_random_zeros_and_crosses_trained_networks_of_one_thread():
    left, right = inference_figure(rows()).axes
    for ax, column in ((left, "per_second"), (right, "ratio")):
        lines = {(line.get_label(), line.get_marker()): line for line in ax.get_lines()}
        text = lines["write text", "o"]
        expected = rows().query("threads == 1 and case == 'write text' and form == 'sparse'")
        random = expected[expected["network"] == RANDOM].sort_values("sparsity")
        assert list(text.get_xdata()) == [0.9, 0.95, 0.99]
        assert list(text.get_ydata()) == list(random[column])
        crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
        assert [list(line.get_xdata()) for line in crosses] == [[0.98], [0.98]]
    dotted = [line.get_ydata()[0] for line in left.get_lines() if line.get_linestyle() == ":"]
    assert dotted == [500, 200]


def test_bad_files(tmp_path):
    path = tmp_path / "inference.csv"
    with pytest.raises(RecordError, match="cannot read"):
        read(path)
    rows().drop(columns="ratio").to_csv(path)
    with pytest.raises(RecordError, match="lacks the column ratio"):
        read(path)
    rows()[:0].to_csv(path)
    with pytest.raises(RecordError, match="holds no measurements"):
        read(path)
    rows().assign(ratio="much").to_csv(path)
    with pytest.raises(RecordError, match="wrong type"):
        read(path)
    rows().to_csv(path)
    assert len(read(path)) == len(rows())
