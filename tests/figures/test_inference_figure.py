from __future__ import annotations

import pandas as pd
import pytest

from pnorm_decay.figures.inference import FILES_OF, RANDOM, inference_figure, read
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


def files() -> pd.DataFrame:
    sizes = {"torch.save": (44e6, 44e6), "save_sparse": (4e6, 20e6), "scipy npz": (6e6, 28e6)}
    return pd.DataFrame(
        {"network": network, "sparsity": share, "format": name, "bytes": size}
        for network in (FILES_OF, "a trained network")
        for name, pair in sizes.items()
        for share, size in zip((0.9, 0.5), pair, strict=True)
    )


def test_sizes_are_those_of_one_network_in_megabytes():
    sizes = inference_figure(rows(), files()).axes[0]
    lines = {line.get_label(): line for line in sizes.get_lines()}
    assert list(lines["save_sparse"].get_xdata()) == [0.5, 0.9]
    assert list(lines["save_sparse"].get_ydata()) == [20, 4]
    assert list(lines["torch.save"].get_ydata()) == [44, 44]


def test_lines_are_random_zeros_and_crosses_trained_networks_of_one_thread():
    _, left, right = inference_figure(rows(), files()).axes
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
