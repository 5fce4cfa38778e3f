from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import vl_convert
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from conftest import REPOSITORY
from figures.made_up import adamw, experiment, grid, run
from pnorm_decay import records
from pnorm_decay.figures.explorer import CHOICES, command, page, rows
from pnorm_decay.figures.loading import load
from pnorm_decay.training import settings
from pnorm_decay.training.identity import identity
from pnorm_decay.training.settings import Settings

RECORDED = sorted((REPOSITORY / "results").glob("[cd]*/*.csv"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_command_of_a_run_repeats_just_this_run(path, monkeypatch):
    monkeypatch.setattr(settings, "bf16_is_fast", lambda device: True)  # as where they were made
    name = f"{path.parent.name}/{path.stem}"
    runs = load(path).runs
    of_method = runs.drop_duplicates(["method", "device"]).to_dict("records")
    assert {row["method"] for row in of_method} <= CHOICES.keys()
    for row in of_method:
        _, program, *overrides = command(name, row).split()
        assert (REPOSITORY / program).exists()
        with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
            cfg = compose("train", overrides, return_hydra_config=True)
        with open_dict(cfg):
            del cfg["hydra"]
        cfg.experiment_name, cfg.sweep_name = name, "none"
        assert identity(Settings.from_config(cfg), row["data"]) == row["run_id"]


def test_a_method_of_another_version_has_no_command():
    assert command("demo/x", run("novel")) is None


def test_every_method_of_this_version_has_a_command():
    assert settings.METHODS.keys() - {"none"} <= CHOICES.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("trainer.steps=20 model.n_embd=48", ["++trainer.steps=20", "++model.n_embd=48"]),
        ("decay_schedule=p_ramp", ["decay_schedule=p_ramp"]),
    ],
)
def test_the_command_has_what_sets_a_run_apart(overrides, words):
    line = command("demo/nanogpt_pydoc", run(overrides=overrides)).split()
    assert line[-len(words) :] == words
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        compose("train", line[2:])


def test_every_finished_run_is_there_with_plain_values():
    found = rows([experiment([*grid(), *adamw(), run(accuracy=None)])])
    assert len(found) == len(grid()) + 2
    assert found[0]["experiment"] == "demo/resnet_digits"
    assert found[0]["target"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_page_needs_no_network_and_no_name_ends_its_script():
    runs = [*grid(), run("</script><b>", p=2, accuracy=80, sparsity=0.5)]
    text = page([experiment(runs)])
    assert text.count("</script>") == 2  # of the libraries and of the page's own
    text = text.replace(vl_convert.javascript_bundle(), "")
    assert not re.search("@[A-Z]+@", text)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)


def test_the_program_writes_it(run_program, tmp_path):
    records.write(tmp_path / "cpu" / "resnet_a.csv", experiment(grid()).runs)
    done = run_program("scripts/explorer.py", "--results", str(tmp_path))
    assert done.code == 0, done.err
    assert (tmp_path / "explorer.html").stat().st_size < 3_000_000
    nothing = run_program("scripts/explorer.py", "--results", str(tmp_path / "none"))
    assert nothing.code == 2
    assert "no recorded runs" in nothing.out


# What a visitor does, and what then stands on the page.
VISIT = """<script>
const wait = setInterval(() => {
  if (!document.body.dataset.ready) return;
  clearInterval(wait);
  const count = () => document.querySelectorAll("tbody tr").length;
  const marks = document.querySelectorAll("#charts canvas, #charts svg").length;
  const seen = { marks, all: count() };
  const choose = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).onchange();
  };
  choose("method", "AdamW");
  seen.adamw = count();
  choose("method", "");
  document.getElementById("collapsed").click();
  seen.collapsed = count();
  document.querySelectorAll("thead button")[6].click();
  seen.first = document.querySelector("tbody tr").children[6].textContent;
  document.querySelector("tbody tr").click();
  seen.line = document.getElementById("line").textContent;
  document.title = JSON.stringify(seen);
}, 20);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_it_draws_filters_sorts_and_gives_the_command(tmp_path):
    runs = [*grid(), *adamw(), run(lambda_p=1, accuracy=10.0, sparsity=0.999)]
    path = tmp_path / "explorer.html"
    path.write_text(page([experiment(runs)]) + VISIT)
    words = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    words += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
    words += f" --enable-logging=stderr --user-data-dir={tmp_path / 'profile'} {path.as_uri()}"
    done = subprocess.run([CHROMIUM, *words.split()], capture_output=True, text=True)
    seen = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    assert seen == {
        "marks": 1,
        "all": 8,
        "adamw": 2,
        "collapsed": 9,
        "first": "0.99900",
        "line": command("demo/resnet_digits", runs[-1]),
    }
    assert "CONSOLE" not in done.stderr
