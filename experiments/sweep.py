"""Runs every sweep of a scale's experiments, one after the other; finished runs are skipped.

    python experiments/sweep.py demo
    python experiments/sweep.py cpu --experiments nanogpt_shakespeare --sweeps pwd adamw
    python experiments/sweep.py cpu --repeat-best
    python experiments/sweep.py demo --record

--record records the runs by scripts/collect.py, does the best of them again as --repeat-best does,
and records these, too; the rows of a demo sweep take the place of those that were recorded.

--repeat-best does the best of the recorded runs again, with the seeds that the experiment's config
names as repeat_seeds. What stands behind `--` goes to each sweep as it is, for instance
`-- trainer.epochs=1`.

It is one `experiments/train.py -m experiment=<scale>/<name> sweep=<sweep>` after another,
in one process, which starts its workers once. A sweep whose runs are all complete is left out.
"""

from __future__ import annotations

import argparse
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C ends the program without frames as long as it imports; nothing has begun.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from omegaconf import OmegaConf

from pnorm_decay.training.completing import count_if_complete
from pnorm_decay.training.progress import console

TRAIN = Path(__file__).resolve().with_name("train.py")
CONFIGS = TRAIN.parents[1] / "configs"
COLLECT = TRAIN.parents[1] / "scripts" / "collect.py"
# Overrides that change no run.
OF_NO_RESULT = ("runs_dir=", "results_dir=", "hydra.", "logger=", "trainer.threads=")


def read(experiment: Path) -> dict[str, Any]:
    """An experiment's config file as it stands."""
    return OmegaConf.to_container(OmegaConf.load(experiment))  # type: ignore[return-value]


def sweeps_of(experiment: Path, chosen: list[str] | None) -> list[str]:
    """The sweeps that an experiment's config lists, or those of them that are chosen, in order."""
    listed = list(read(experiment)["sweeps"])
    return listed if chosen is None else [sweep for sweep in chosen if sweep in listed]


def repeats_of(experiment: Path) -> list[str] | None:
    """The overrides that repeat an experiment's best runs, None where its config names no seeds."""
    seeds = read(experiment).get("repeat_seeds")
    return [f"seed={seeds}", "repeat_best=true"] if seeds else None


def run_program(path: Path, *words: str) -> Any:
    """Runs a program in this process; its exit status.

    Raises:
        SystemExit: the user stopped it.
    """
    sys.argv = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code == 130:
            raise
        return end.code
    return 0


def run_sweep(scale: str, name: str, sweep: str, overrides: list[str]) -> bool:
    """Runs what is missing of one sweep; False where a run of it failed."""
    words = [f"experiment={scale}/{name}", f"sweep={sweep}", *overrides]
    count = count_if_complete(words, CONFIGS)
    if count is not None:
        console.print(f"{scale}/{name}, {sweep}: all {count} runs are already complete")
        return True
    console.rule(f"{scale}/{name}, {sweep}", align="left")
    return not run_program(TRAIN, "-m", *words)


def run_sweeps(
    experiments: list[Path], sweeps: list[str] | None, overrides: list[str], *, repeat_best: bool
) -> None:
    """Runs the sweeps of some experiments.

    Raises:
        SystemExit: runs failed, or the user stopped it.
    """
    failed = []
    for path in experiments:
        repeats = repeats_of(path) if repeat_best else []
        if repeats is None:
            continue
        for sweep in sweeps_of(path, sweeps):
            if not run_sweep(path.parent.name, path.stem, sweep, [*repeats, *overrides]):
                failed.append(f"{path.stem} {sweep}")
    if failed:
        console.print("error: runs failed in", ", ".join(failed), style="red")
        sys.exit(1)


def record(scale: str, overrides: list[str], *, whole: bool) -> None:
    """Records the runs of a scale, where there is a folder of runs.

    Args:
        scale: its name.
        overrides: of the runs; they may say where the folders are.
        whole: whether all sweeps were done: then rows of the demo scale are this machine's alone.

    Raises:
        SystemExit: a record cannot be read or written.
    """
    set_here = dict(word.split("=", 1) for word in overrides if "=" in word)
    runs, results = (set_here.get(f"{what}_dir", what) for what in ("runs", "results"))
    if not Path(runs).is_dir():  # all are recorded, by another machine
        return
    words = ["--scale", scale, "--runs", runs, "--results", results]
    if scale == "demo" and whole:
        words.append("--anew")
    if code := run_program(COLLECT, *words):
        sys.exit(code)


def make_parser() -> argparse.ArgumentParser:
    """What reads the command line up to ``--``."""
    files = (CONFIGS / "experiment").glob("*/*.yaml")
    scales = sorted({path.parent.name for path in files if "sweeps" in read(path)})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scale", choices=scales)
    parser.add_argument("--experiments", nargs="+", metavar="NAME", help="only these of the scale")
    parser.add_argument("--sweeps", nargs="+", metavar="SWEEP", help="only these of an experiment")
    parser.add_argument(
        "--workers",
        type=int,
        help="runs beside each other (default: measured on GPUs or, without one, one a core)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--repeat-best",
        action="store_true",
        help="only the best recorded runs, with the experiment's other seeds",
    )
    what.add_argument(
        "--record",
        action="store_true",
        help="all, recorded in results/: first the sweeps, then the best runs with other seeds",
    )
    return parser


def main() -> None:
    parser, words = make_parser(), sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, overrides = parser.parse_args(words[:end]), words[end + 1 :]
    if arguments.workers is not None:
        if arguments.workers < 1:
            parser.error(f"--workers {arguments.workers}: must be at least 1")
        overrides.append(f"hydra.launcher.n_jobs={arguments.workers}")
    experiments = sorted((CONFIGS / "experiment" / arguments.scale).glob("*.yaml"))
    wanted = arguments.experiments or [path.stem for path in experiments]
    for name in wanted:
        if name not in [path.stem for path in experiments]:
            parser.error(f"--experiments {name}: not in configs/experiment/{arguments.scale}")
    names = {sweep for p in experiments if p.stem in wanted for sweep in sweeps_of(p, None)}
    for sweep in arguments.sweeps or []:
        if sweep not in names:
            known = ", ".join(sorted(names))
            parser.error(f"--sweeps {sweep}: no sweep of these experiments; there are {known}")
    chosen = [path for path in experiments if path.stem in wanted]
    sweeps: list[str] | None = arguments.sweeps
    if not arguments.record:
        run_sweeps(chosen, sweeps, overrides, repeat_best=arguments.repeat_best)
        return
    whole = sweeps is None and all(word.startswith(OF_NO_RESULT) for word in overrides)
    run_sweeps(chosen, sweeps, overrides, repeat_best=False)
    record(arguments.scale, overrides, whole=whole)
    if any(map(repeats_of, chosen)):
        run_sweeps(chosen, sweeps, overrides, repeat_best=True)
        record(arguments.scale, overrides, whole=whole)


if __name__ == "__main__":
    main()
