"""Figure 1's program through its command line, against a NumPy computation of its own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

TOY = "experiments/toy.py"


@pytest.fixture
def run_toy(run_program, tmp_path):
    def run(*arguments):
        path = tmp_path / "toy" / "figure1.csv"
        done = run_program(TOY, "--output", str(path), *arguments)
        assert done.code == 0, done.err
        assert str(path) in done.out
        return pd.read_csv(path)

    return run


def weights(table, method):
    curve = table[table["method"] == method]
    assert curve["step"].tolist() == list(range(len(curve)))
    return curve["w"].to_numpy()


def by_numpy(method, p, lr, steps, every, w):
    w, path = np.float64(w), []
    with np.errstate(divide="ignore", over="ignore"):
        for step in range(steps + 1):
            path.append(w)
            if method == "coupled":
                w = w - lr * (w - 1 + np.sign(w) * np.abs(w) ** (p - 1))
            else:
                if method == "pwd" or step % every == 0:
                    s = np.abs(w) ** (p - 2)
                w = (w - lr * (w - 1)) / (1 + lr * s)
    return np.array(path)


def test_coupled_never_settles_and_the_others_reach_zero(run_toy):
    table = run_toy()
    coupled, periodic, pwd = (weights(table, m) for m in ("coupled", "periodic", "pwd"))
    assert len(coupled) == len(periodic) == len(pwd) == 301
    end = coupled[-100:]
    assert (np.diff(np.sign(end)) != 0).sum() > 10
    assert np.abs(end).max() > 0.1
    for smooth in (periodic, pwd):
        assert (np.diff(smooth) <= 0).all()
        assert (smooth >= 0).all()
    assert pwd[-1] == 0
    assert 0 < periodic[-1] < 1e-6


@pytest.mark.parametrize("method", ["coupled", "periodic", "pwd"])
@pytest.mark.parametrize(
    ("p", "lr", "every", "start"), [(0.8, 0.1, 20, 1.0), (0.3, 0.05, 3, -2.0), (1.5, 0.5, 7, 3.0)]
)
def test_agrees_with_numpy(run_toy, method, p, lr, every, start):
    arguments = ("--p", p, "--lr", lr, "--every", every, "--w0", start, "--steps", 200)
    actual = weights(run_toy(*map(str, arguments)), method)
    expected = by_numpy(method, p, lr, 200, every, start)
    # The coupled weight is chaotic once it crosses 0: rounding decides where it goes.
    chaotic = method == "coupled" and p < 1
    crossings = np.flatnonzero(expected * start < 0)
    compared = crossings[0] + 1 if chaotic and len(crossings) else None
    assert np.allclose(actual[:compared], expected[:compared], rtol=1e-9, atol=1e-250)
    assert compared is None or compared > 5


def test_loss_is_the_objective_and_settings_are_recorded(run_toy):
    table = run_toy("--p", "0.5", "--every", "9", "--steps", "30")
    w = table["w"].to_numpy()
    assert np.allclose(table["loss"], (w - 1) ** 2 / 2 + np.abs(w) ** 0.5 / 0.5)
    assert set(table["p"]) == {0.5}
    assert set(table["lr"]) == {0.1}
    every = table.groupby("method")["every"].first()
    assert every[["periodic", "pwd"]].tolist() == [9, 1]
    assert np.isnan(every["coupled"])


def test_same_settings_give_the_same_bytes(run_program, tmp_path):
    for name in ("one.csv", "two.csv"):
        run_program(TOY, "--output", str(tmp_path / name))
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--p", "0"),
        ("--p", "2"),
        ("--p", "nan"),
        ("--lr", "0"),
        ("--lr", "inf"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--every", "0"),
        ("--w0", "far"),
        ("--w0", "0"),
    ],
)
def test_a_bad_value_is_one_line(run_program, tmp_path, option, value):
    done = run_program(TOY, "--output", str(tmp_path / "x.csv"), option, value)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert f"argument {option}: must be" in done.err
    assert repr(value) in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_one_line(run_program, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_program(TOY, "--output", str(tmp_path / "file" / "figure1.csv"))
    assert done.code == 2
    assert "cannot write" in done.out
    assert "Traceback" not in done.err
