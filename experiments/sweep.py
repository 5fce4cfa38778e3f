"""Runs every sweep of a scale's experiments, one after the other; finished runs are skipped.

    python experiments/sweep.py demo
    python experiments/sweep.py cpu --experiments nanogpt_shakespeare --sweeps pwd adamw
    python experiments/sweep.py cpu --repeat-best

--repeat-best does the best of the recorded runs again, with the seeds that the experiment's config
names as repeat_seeds. What stands behind `--` goes to each sweep as it is, for instance
`-- trainer.epochs=1`.

It is one `experiments/train.py -m experiment=<scale>/<name> sweep=<sweep>` after another,
in one process, which starts its workers once.
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

from pnorm_decay.training.progress import console

TRAIN = Path(__file__).with_name("train.py")
CONFIGS = TRAIN.parents[1] / "configs"


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


def run_sweep(scale: str, name: str, sweep: str, overrides: list[str]) -> bool:
    """Runs one sweep; False where a run of it failed."""
    console.rule(f"{scale}/{name}, {sweep}", align="left")
    experiment = [f"experiment={scale}/{name}", f"sweep={sweep}"]
    sys.argv = [str(TRAIN), "-m", *experiment, *overrides]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except SystemExit as end:
        if end.code == 130:  # stopped by the user
            raise
        return not end.code
    return True


def main() -> None:
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
        help="runs beside each other (default: one a GPU or, without one, one a core)",
    )
    parser.add_argument(
        "--repeat-best",
        action="store_true",
        help="only the best recorded runs, with the experiment's other seeds",
    )
    words = sys.argv[1:]
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
    failed = []
    for path in experiments:
        repeats = repeats_of(path) if arguments.repeat_best else []
        if path.stem not in wanted or repeats is None:
            continue
        for sweep in sweeps_of(path, arguments.sweeps):
            if not run_sweep(arguments.scale, path.stem, sweep, [*repeats, *overrides]):
                failed.append(f"{path.stem} {sweep}")
    if failed:
        console.print("error: runs failed in", ", ".join(failed), style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
