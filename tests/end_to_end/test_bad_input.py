"""What was tried from outside, and the one line that comes of it now."""

from __future__ import annotations

import sys

import pytest
import wandb

from pnorm_decay.models import ResNet18
from pnorm_decay.training.claiming import LOCKS
from pnorm_decay.training.command_line import flags_first

TRAIN = "experiments/train.py"
DIGITS = "experiment=demo/resnet_digits"
TEXT = "experiment=demo/nanogpt_pydoc"
FROM_0 = "must be a finite number of at least 0"
COUNT = "must be a whole number from 1 to 2147483647"

# Overrides, and what the line says: the key, its value, what is allowed.
TRIED = [
    # Values of the wrong type, which were taken for another value.
    ("seed=true", "seed=true: must be a whole number from 0"),
    ("seed=1.5", "seed=1.5: must be a whole number from 0"),
    ("optimizer.lr=true", f"optimizer.lr=true: {FROM_0}"),
    ("optimizer.lr='1'", f"optimizer.lr=1: {FROM_0}"),
    ("optimizer.lr=[1]", f"optimizer.lr=[1]: {FROM_0}"),
    ("optimizer.lambda_p=nan", f"optimizer.lambda_p=nan: {FROM_0}"),
    ("optimizer.lambda_p=inf", f"optimizer.lambda_p=inf: {FROM_0}"),
    ("optimizer.p=nan", f"optimizer.p=nan: {FROM_0}"),
    ("optimizer.betas=[0.9,0.9,0.9]", "must be two numbers in [0, 1)"),
    ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9, 1]: must be two numbers in [0, 1)"),
    ("betas=0.9", "optimizer.betas=0.9: must be two numbers in [0, 1)"),
    ("data.flip=abc", "data.flip=abc: must be a valid boolean"),
    ("data.crop_padding=0.5", "data.crop_padding=0.5: must be a valid integer"),
    ("model.width=wide", "model.width=wide: must be a valid integer"),
    ("trainer.compile=1", "trainer.compile=1: must be true or false"),
    ("trainer.save_model=yes", "trainer.save_model=yes: must be true or false"),
    ("skip_recorded=maybe", "skip_recorded=maybe: must be true or false"),
    ("schedule.final_fraction=half", "schedule.final_fraction=half: must be a number in [0, 1]"),
    ("schedule.warmup_epochs=x", "schedule.warmup_epochs=x: must be a finite number"),
    ("+optimizer.reweight_every=1.5", "optimizer.reweight_every=1.5: must be a valid integer"),
    # Nulls.
    ("seed=null", "seed=null: must be a whole number from 0"),
    ("optimizer.p=null", f"optimizer.p=null: {FROM_0}"),
    ("optimizer.lr=null", f"optimizer.lr=null: {FROM_0}"),
    ("optimizer.lambda_p=null", f"optimizer.lambda_p=null: {FROM_0}"),
    ("optimizer.betas=null", "optimizer.betas=null: must be two numbers in [0, 1)"),
    ("optimizer.method=null", "optimizer.method=null: must be a name"),
    ("data.crop_padding=null", "data.crop_padding=null: must be a valid integer"),
    ("experiment_name=null", "experiment_name=null: must be <scale>/<name>"),
    ("runs_dir=null", "'${runs_dir}': Incompatible value 'None' for field of type 'str'"),
    ("results_dir=null", "results_dir=null: must be a folder"),
    ("logger.project=null", "logger.project=null: must be a name"),
    ("trainer.batch_size=null", f"trainer.batch_size=null: {COUNT}"),
    ("optimizer=null", "optimizer=null: must be one of adamw, coupled"),
    ("data=null", "data=null: must be one of cifar10, digits"),
    ("+sweep=null", "+sweep=null: must be one of adamw"),
    ("experiment=demo/resnet_digits experiment=null", "experiment=null: must be one of cpu/"),
    ("optimizer=[adamw]", "optimizer=[adamw]: must be one of adamw"),
    ("optimizer=pwd,null -m", "optimizer=pwd,null: must be one of adamw"),
    ("model=1", "model=1: must be one of gpt, resnet18"),
    ("hydra/launcher=null", "hydra/launcher=null: must be a name"),
    # What is left out, and what there is not.
    ("~optimizer", "optimizer: is missing; must be a choice of optimizer=..."),
    ("~schedule", "schedule._target_: is missing"),
    ("~optimizer.lr", f"optimizer.lr: is missing; {FROM_0}"),
    ("~optimizer._target_", "optimizer._target_: is missing"),
    ("pruning=magnitude optimizer=adamw ~pruning.sparsity", "pruning.sparsity: is missing"),
    ("+optimizer.q=1", "optimizer.q=1: AdamPWD has no such option; there are amsgrad"),
    ("+data.q=1", "data.q=1: Digits has no such option; there are crop_padding, flip"),
    ("+pruning.sparsity=0.5", "pruning.sparsity=0.5: NoPruning has no such option"),
    ("+trainer.stesp=1", "trainer.stesp=1: no such setting; there are batch_size"),
    ("+tariner.steps=1", 'tariner={"steps": 1}: no such setting'),
    ("model._target_=no.such.Class", "model._target_=no.such.Class: cannot be found"),
    ("model._target_=math.pi", "model._target_=math.pi: must be a class or a function"),
    ("data._target_=torch.zeros", "data._target_: zeros does not tell its options"),
    ("decay_schedule=p_ramp decay_schedule.option=betas", "option=betas: must be an option of num"),
    ("decay_schedule=p_ramp decay_schedule.option=foreach", "must be an option of numbers"),
    ("decay_schedule=p_ramp decay_schedule.option=params", "must be an option of numbers"),
    ("decay_schedule=p_ramp decay_schedule.option=lr", "that is what schedule=... is for"),
    # Keys and choices that there are not, and the nearest.
    ("optimizer.p=abc", f"optimizer.p=abc: {FROM_0}"),
    (
        "optimizer.lamda_p=1",
        "optimizer.lamda_p=1: there is no such key; the nearest are optimizer.lambda_p",
    ),
    ("lr=1", "lr=1: there is no such key; the nearest is optimizer.lr"),
    ("optimiser=pwd", "optimiser=pwd: there is no such key; the nearest are optimizer"),
    ("trainer.stesp.x=3", "trainer.stesp.x=3: there is no such key; the nearest are trainer.steps"),
    ("foo.bar=1", "foo.bar=1: there is no such key; experiments/train.py --help shows all"),
    ("optimizer.lr.x=1 optimizer.foo=abc", "optimizer.lr.x"),
    ("optimizer.exact=true", "AdamPWD has the option: write +optimizer.exact=true"),
    ("optimizer.params=1", "optimizer.params=1: there is no such key"),
    (
        "experiment=nanogpt_pydoc",
        "nanogpt_pydoc: there is no such choice; there are cpu/",
    ),
    ("experiment=demo/nosuch", "experiment=demo/nosuch: there is no such choice; there are cpu/"),
    ("optimizer=adam", "optimizer=adam: there is no such choice; there are adamw, coupled"),
    ("hydra/launcher=nosuch", "hydra/launcher=nosuch: there is no such choice; there are basic"),
    ("sweep=nosuch -m", "sweep=nosuch: there is no such choice; there are adamw"),
    # Lists and sweeps.
    ("seed=0,1", "seed=0,1: several values are a sweep; add -m"),
    ("seed=[0,1]", "seed=[0, 1]: must be a whole number from 0"),
    ("seed=[0,1] -m", "seed=[0, 1]: must be a whole number from 0"),
    ("-m optimizer.p=0.8,abc", f"optimizer.p=abc: {FROM_0}"),
    ("optimizer.lr=1e-3,abc -m optimizer.p=0.5,0.8", f"optimizer.lr=abc: {FROM_0}"),
    (
        "-m seed=0,1 hydra.launcher.runs_per_gpu=0",
        "hydra.launcher.runs_per_gpu=0: must be auto or a whole number of at least 1",
    ),
    ("-m sweep=pwd --cfg job", "-m, --cfg: -m runs a sweep, --cfg shows one config"),
    ("--info -m sweep=pwd", "-m, --info: -m runs a sweep"),
    # Out of range.
    ("seed=-1", "seed=-1: must be a whole number from 0 to 4294967295"),
    ("seed=4294967296", "seed=4294967296: must be a whole number from 0 to 4294967295"),
    ("optimizer.p=0", "optimizer: Invalid p: 0.0 (must be positive and finite)"),
    ("pruning=magnitude optimizer=adamw pruning.sparsity=1", "must be a number in [0, 1)"),
    ("pruning=magnitude optimizer=adamw pruning.num_steps=0", "pruning.num_steps=0: must be"),
    (
        "pruning=spred optimizer=adamw pruning.factors=1",
        "pruning.factors=1: pruning.name=spred stands for 2",
    ),
    ("decay_schedule=p_ramp decay_schedule.end=0", "decay_schedule.end=0: must be a number in"),
    ("decay_schedule=p_ramp decay_schedule.start=0", "decay_schedule.start=0.0: p must be"),
    ("data.rotation_degrees=200", "rotation_degrees must be in [0, 180], got 200"),
    ("trainer.batch_size=1", "trainer.batch_size=1: must be at least 2, for a batch norm"),
    ("trainer.threads=0", "trainer.threads=0: must be auto or a whole number from 1 to 4096"),
    ("trainer.checkpoint_minutes=0", "trainer.checkpoint_minutes=0: must be a positive number"),
    # Sizes that cannot be had.
    ("model.width=1000000", "model: takes 10,896,002 GB, and this machine has"),
    ("model.width=1000000000", "model: [enforce fail at alloc_cpu.cpp"),
    ("model.width=100000000000000000000000", "model: "),
    ("trainer.batch_size=100000000000", f"trainer.batch_size=100000000000: {COUNT}"),
    ("trainer.epochs=1e300", "trainer.epochs=1e+300: must be a positive number or null"),
    ("trainer.threads=4096", "trainer.threads=4096: must be at most "),
    # Folders.
    ("runs_dir=''", "runs_dir=: must be a folder"),
    ("results_dir=''", "results_dir=: must be a folder"),
    ("experiment_name=../../elsewhere", "experiment_name=../../elsewhere: must be <scale>/<name>"),
    ("experiment_name=one", "experiment_name=one: must be <scale>/<name>"),
    (f"runs_dir=/{'x' * 300}", f"File name too long: '/{'x' * 77}…"),
    (f"data=cifar10 data.path=/{'xxxxxxxxx/' * 500}", "File name too long: '/xxxxxxxxx/"),
    # A method under a wrong name.
    ("pruning=spred optimizer.p=0.8", "pruning=spred has p=1 by L2 decay of what it trains"),
    ("pruning=dwf optimizer=proximal", "pruning=dwf has p=0.666667 by L2 decay"),
    ("pruning=rewa optimizer=l1", "pruning=rewa has p=0.888889 by L2 decay"),
    ("pruning=spred optimizer.p=2 decay_schedule=p_ramp", "decay_schedule.option=p: pruning=spred"),
    ("optimizer.method=adamw", "pnorm_decay.AdamPWD is not that method"),
    ("pruning=magnitude pruning.name=none", "must have another name"),
    ("pruning.name=magnitude", "must have another name"),
    ("optimizer=l1 optimizer.p=0.5", "optimizer.p=0.5: l1 has p=1"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers in [0, 1)"),
    ("trainer.steps=1e3", "trainer.steps=1000.0: must be a whole number"),
    ("optimizer=sgd optimizer.momentum=1", "optimizer.momentum=1: must be a number in [0, 1)"),
    ("optimizer.method=exact", "optimizer.exact=null: optimizer.method=exact stands for true"),
    ("+optimizer.exact=true", "optimizer.exact=true: optimizer.method=pwd stands for false"),
    (
        "optimizer=exact optimizer.exact=false",
        "optimizer.exact=false: optimizer.method=exact stands for",
    ),
    ("optimizer.method=magnitude", "pnorm_decay.AdamPWD is not that method"),
    ("optimizer.method=pwd_target", "must not end with _target, as runs to a target do"),
    ("pruning=magnitude pruning.name=pwd", "MagnitudePruning is not that method"),
    ("pruning=oto pruning.name=spred", "pnorm_decay.baselines.OTO is not that method"),
    (
        "pruning=magnitude_global pruning.scope=layer",
        "pruning.scope=layer: pruning.name=magnitude_global stands",
    ),
    (
        "pruning=dwf pruning.factors=2 optimizer=adamw",
        "pruning.factors=2: pruning.name=dwf stands for 3 or more",
    ),
    ("pruning=oto decay_schedule=target_sparsity", "both make zeros; use one of them"),
    ("experiment=demo/nanogpt_pydoc model.block_size=1000000", "data: block_size 1000000 is too"),
    ("logger.mode=loud", "logger.mode=loud: must be one of offline, online, disabled"),
]


@pytest.fixture
def train(run_program, tmp_path):
    def train(*overrides: str):
        experiment = [] if overrides[:1] and overrides[0].startswith("experiment") else [DIGITS]
        places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
        return run_program(TRAIN, *experiment, "logger=none", *places, *overrides)

    return train


def assert_is_one_line(done, said: str) -> None:
    assert done.err.startswith("error: ")
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert len(done.err) < 500
    assert done.code == 2


@pytest.mark.parametrize(("overrides", "said"), TRIED, ids=[overrides for overrides, _ in TRIED])
def test_what_was_tried_is_one_line_before_anything_is_written(train, tmp_path, overrides, said):
    assert_is_one_line(train(*overrides.split(" ")), said)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if path.parent.name not in (LOCKS, ".hydra")] == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OMP_NUM_THREADS", "many", "OMP_NUM_THREADS=many: must be a positive whole number"),
        ("OMP_NUM_THREADS", "0", "OMP_NUM_THREADS=0: must be a positive whole number"),
        ("WANDB_MODE", "garbage", "WANDB_MODE=garbage: Input should be 'online'"),
    ],
)
def test_a_variable_that_says_nothing_is_named(train, monkeypatch, name, value, said):
    wandb.teardown()  # it reads its variables once a process
    monkeypatch.setenv(name, value)
    assert_is_one_line(train("logger=wandb"), said)


SHORT = ["model.width=4", "trainer.epochs=null", "trainer.steps=2", "schedule.warmup_epochs=0"]
SHORT.append("trainer.threads=1")  # the suite's processes share the cores


def test_a_list_of_threads_has_one_for_us(train, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")  # one for each level of nesting
    assert train(*SHORT).code == 0


def test_without_wandb_runs_need_no_logger(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(*SHORT).code == 0
    assert_is_one_line(train(*SHORT, "seed=1", "logger=wandb"), "logger=none no W&B")


def test_what_nobody_foresaw_is_a_line_too_and_its_frames_are_kept(train, monkeypatch, tmp_path):
    def broken(self, images):
        raise KeyError("nobody knows\nwhy")

    monkeypatch.setattr(ResNet18, "forward", broken)
    done = train(*SHORT)
    assert_is_one_line(done, "KeyError: 'nobody knows")
    (path,) = (tmp_path / "runs").glob("*/*/*/failure.json")
    assert str(path) in done.err
    assert "in broken" in path.read_text()


def test_at_the_door_too(train, monkeypatch, tmp_path):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pnorm_decay.training.run.build_data", broken)
    done = train()
    assert_is_one_line(done, "ZeroDivisionError: by zero (see ")
    (path,) = tmp_path.glob("pnorm-decay-*.txt")
    assert str(path) in done.err
    assert "in broken" in path.read_text()


def test_flags_may_stand_behind_overrides(train):
    done = train(*SHORT, "hydra/launcher=basic", "seed=1", "-m", "optimizer.p=1.0")
    assert done.code == 0, done.err
    assert done.err.startswith("[1] ")
    assert " p=1 " in done.err
    assert flags_first(["seed=1,2", "--multirun", "~x"]) == ["--multirun", "seed=1,2", "~x"]
    shown = train("optimizer.p=0.7", "--cfg", "job", "seed=3")
    assert shown.code == 0
    assert "\n  p: 0.7\n" in shown.out
    assert shown.out.startswith("seed: 3\n")


def test_a_warning_of_the_library_is_a_line(train):
    done = train(*SHORT, "decay_schedule=target_sparsity")
    assert done.code == 0
    assert "warning: TargetSparsity: after 2 steps" in done.err
    assert "UserWarning" not in done.err


def test_a_warmup_that_is_too_long_is_said(train):
    long = ["schedule.warmup_epochs=null", "schedule.warmup_steps=100"]
    done = train(*SHORT, *long)
    assert done.code == 0
    said = "warning: schedule.warmup_steps=100: more than half of the run, which has 2 steps"
    assert said in done.err
    assert "warning" not in train(*SHORT).err


def test_one_run_of_a_sweep_says_that_it_is_one(train):
    done = train(*SHORT, "sweep=pwd")
    assert done.code == 0
    assert "this was one run; with -m, sweep=pwd does all of its runs" in done.err
    assert "with -m" not in train(*SHORT).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--sweeps", "foo"], "--sweeps foo: no sweep of these experiments; there are"),
        (["demo", "--sweeps", "pwd", "foo"], "--sweeps foo"),
        (["demo", "--experiments", "nanogpt_pydoc", "--sweeps", "oto"], "--sweeps oto"),
        (["demo", "--workers", "0"], "--workers 0: must be at least 1"),
        (["demo", "--workers", "-2"], "--workers -2: must be at least 1"),
    ],
)
def test_a_sweep_of_nothing_is_refused(run_program, arguments, said):
    done = run_program("experiments/sweep.py", *arguments)
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


@pytest.mark.parametrize("number", ["0", "-2", "1.5", "abc", "true"])
def test_the_runs_beside_each_other_are_a_number(run_program, tmp_path, number):
    sweep = ["-m", DIGITS, f"runs_dir={tmp_path}", "seed=0,1", f"hydra.launcher.n_jobs={number}"]
    done = run_program(TRAIN, *sweep)
    shown = {"true": "True"}.get(number, number)
    assert_is_one_line(done, f"hydra.launcher.n_jobs={shown}: must be null, -1 or a whole number")


def test_a_sweep_tries_a_logger_that_cannot_be_used_once(run_program, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "garbage")  # as slow an error is a key that nobody knows
    places = [f"runs_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]
    jobs = ["logger=wandb", "optimizer.p=0.5,0.8,1.0,1.2", "hydra.launcher.n_jobs=1"]
    done = run_program(TRAIN, "-m", DIGITS, *SHORT, *places, *jobs)
    assert done.code == 2
    assert "the other 3 runs are left out, for the same reason" in done.err
    assert "WANDB_MODE=garbage" in done.err.splitlines()[-1]


def test_a_sweep_is_not_shared_by_processes(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = train("-m", "seed=0,1")
    assert_is_one_line(done, "-m: the processes that torchrun starts share a run")


def test_a_link_to_itself_is_one_line(train, run_program, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = run_program(TRAIN, DIGITS, *SHORT, "logger=none", f"runs_dir={loop}")
    assert_is_one_line(done, str(loop))
    assert_is_one_line(train("data=cifar10", f"data.path={loop}"), f"there is no {loop}")
