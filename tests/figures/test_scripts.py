"""scripts/plot.py and scripts/tables.py through their command lines."""

from __future__ import annotations

import pytest

from figures.made_up import adamw, frame, grid, run
from pnorm_decay import records

PLOT, TABLES = "scripts/plot.py", "scripts/tables.py"


@pytest.fixture
def results(tmp_path):
    rows = frame([*grid(0.5), *adamw()])
    records.write(tmp_path / "demo" / "resnet_digits.csv", rows)
    records.write(tmp_path / "demo" / "nanogpt_pydoc.csv", rows)
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_plot_draws_three_figures_a_kind_in_both_formats(run_program, results):
    done = run_program(PLOT, "--results", str(results))
    assert done.code == 0, done.err
    names = (
        "figure2",
        "figure2_all_methods",
        "figure3",
        "figure3_all_methods",
        "figure4",
        "figure5",
    )
    expected = {f"demo/{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert files(results / "figures") == expected
    assert done.out.count("wrote ") == len(expected)
    assert done.err == ""
    png = (results / "figures" / "demo" / "figure2.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert 20_000 < len(png) < 1_000_000


def test_plot_draws_figure_one_of_a_real_toy_run(run_program, results):
    run_program("experiments/toy.py", "--output", str(results / "toy" / "figure1.csv"))
    records.write(results / "cpu" / "resnet_a.csv", frame([run()]))
    done = run_program(PLOT, "--results", str(results), "--scale", "cpu", "--format", "png")
    assert done.code == 0, done.err
    assert files(results / "figures") == {
        "figure1.png",
        *(f"cpu/{name}.png" for name in ("figure2", "figure2_all_methods", "figure4")),
    }


def test_two_experiments_of_a_kind_are_told_apart(run_program, tmp_path):
    for name in ("resnet_a", "resnet_b"):
        records.write(tmp_path / "cpu" / f"{name}.csv", frame([run()]))
    records.write(tmp_path / "cpu" / "other.csv", frame([run()]))
    assert run_program(PLOT, "--results", str(tmp_path), "--format", "png").code == 0
    assert files(tmp_path / "figures" / "cpu") == {
        f"{name}_resnet_{x}.png"
        for name in ("figure2", "figure2_all_methods", "figure4")
        for x in "ab"
    }


@pytest.mark.parametrize("program", [PLOT, TABLES])
def test_a_bad_file_is_one_line_and_the_others_are_done(run_program, results, program):
    (results / "demo" / "resnet_digits.csv").write_text("run_id,p\n1,2\n")
    fast = ["--format", "png"] if program == PLOT else []
    done = run_program(program, "--results", str(results), *fast)
    assert done.code == 2
    (line,) = [line for line in done.out.splitlines() if line.startswith("error")]
    assert "resnet_digits.csv lacks the column" in line
    assert "Traceback" not in done.err
    written = files(results) - files(results / "demo")
    assert any("figure3" in name or "table1_nanogpt" in name for name in written)


@pytest.mark.parametrize("program", [PLOT, TABLES])
def test_what_cannot_be_compared_is_left_out_and_said(run_program, tmp_path, program):
    wide = run(accuracy=99.0) | {"overrides": "model.n_embd=48"}
    records.write(tmp_path / "demo" / "nanogpt_pydoc.csv", frame([*adamw(), run(), wide]))
    fast = ["--format", "png"] if program == PLOT else []
    done = run_program(program, "--results", str(tmp_path), *fast)
    assert done.code == 0
    assert "demo/nanogpt_pydoc without 1 run: model.n_embd=48 (1 run)" in done.out.splitlines()


@pytest.mark.parametrize("program", [PLOT, TABLES])
def test_nothing_recorded_is_one_line(run_program, tmp_path, program):
    done = run_program(program, "--results", str(tmp_path))
    assert done.code == 2
    assert len(done.out.splitlines()) == 1
    assert "no recorded runs" in done.out


@pytest.mark.parametrize("arguments", [["--scale", "huge"], ["--format", "gif"]])
def test_a_bad_argument_ends_at_once(run_program, results, arguments):
    done = run_program(PLOT, "--results", str(results), *arguments)
    assert done.code == 2
    assert "invalid choice" in done.err
    assert not (results / "figures").exists()


def test_tables_are_written_both_tables_in_both_formats(run_program, results):
    done = run_program(TABLES, "--results", str(results))
    assert done.code == 0, done.err
    assert files(results / "tables" / "demo") == {
        f"table{n}_{name}.{suffix}"
        for n in (1, 2)
        for name in ("resnet_digits", "nanogpt_pydoc")
        for suffix in ("md", "csv")
    }
    table = (results / "tables" / "demo" / "table1_resnet_digits.csv").read_text().splitlines()
    assert table[0].startswith("method,p,runs,seeds,best_accuracy")
    assert table[1].startswith("pwd,0.5,6,1,95,")
    assert len(table) == 3


@pytest.mark.parametrize("program", [PLOT, TABLES, "scripts/explorer.py"])
def test_what_cannot_be_written_is_one_line(run_program, results, program):
    for name in ("figures", "tables"):
        (results / name).touch()
    more = {PLOT: ["--format", "png"], TABLES: []}.get(
        program, ["--output", str(results / "figures" / "page.html")]
    )
    done = run_program(program, "--results", str(results), *more)
    assert done.code == 2
    assert done.err == ""
    assert "error: [Errno " in done.out.splitlines()[-1]
