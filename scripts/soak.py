"""Kills a training run again and again, and checks that it ends as one that was left alone.

A small real run is killed at random moments (SIGKILL, or SIGTERM and Ctrl-C, which let it save),
at times its newest checkpoint is cut short as well, and it is started again until it ends. Record
and weights must equal, to the bit, those of a run that nobody disturbed. What stands behind `--`
goes to the run as it is.

    python scripts/soak.py
    python scripts/soak.py --kills 10 -- experiment=demo/nanogpt_pydoc
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pnorm_decay.records import RESULT_FILE
from pnorm_decay.training.checkpoint import CHECKPOINT_FILE

TRAIN = Path(__file__).resolve().parents[1] / "experiments" / "train.py"
RUN = [
    "experiment=demo/resnet_digits",
    "model.width=4",
    "trainer.epochs=null",
    "trainer.steps=150",
    "trainer.eval_every=20",
    "trainer.threads=1",
    "trainer.checkpoint_minutes=1e-9",  # after every step
    "skip_recorded=false",
]
PROVENANCE = ("seconds", "finished_at", "commit")
# SIGKILL most of the time: it is the one that a program cannot prepare for.
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST_WAIT = 0.6  # seconds from a process's first checkpoint to its death
SHARE_DAMAGED = 0.2  # of the kills that are followed by damage to the newest checkpoint

console = Console(highlight=False, soft_wrap=True)


def start(folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """A new process that does the run, or goes on with it."""
    places = [f"runs_dir={folder / 'runs'}", f"logger.dir={folder}"]
    command = [sys.executable, str(TRAIN), *RUN, *overrides, *places]
    # A W&B service that this process was given or has started would hold a killed run's id.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def one(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder's only run, or None."""
    return next(folder.glob(f"runs/*/*/*/{name}"), None)


def age(folder: Path) -> int:
    """When the run's newest checkpoint was written, in nanoseconds; 0 where there is none."""
    path = one(folder, CHECKPOINT_FILE)
    try:
        return path.stat().st_mtime_ns if path else 0
    except FileNotFoundError:  # between the look and now
        return 0


def kill(process: subprocess.Popen[bytes], folder: Path, draw: random.Random) -> str | None:
    """Kills a process some time after its first checkpoint.

    Returns:
        What was done to it, or None where it ended by itself before that.
    """
    before = age(folder)
    while process.poll() is None and age(folder) == before:
        time.sleep(0.005)
    how = draw.choice(SIGNALS)
    try:
        process.wait(draw.uniform(0, LONGEST_WAIT))
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(how)
    process.wait()
    checkpoint = one(folder, CHECKPOINT_FILE)
    if checkpoint is not None and draw.random() < SHARE_DAMAGED:
        content = checkpoint.read_bytes()
        checkpoint.write_bytes(content[: draw.randrange(len(content))])
        return f"{how.name}, checkpoint cut short"
    return how.name


def end_of(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A finished run's record without when and where it was made, and its weights."""
    result = one(folder, RESULT_FILE)
    if result is None:
        sys.exit(f"a run failed; its log:\n{(folder / 'log.txt').read_text()[-2000:]}")
    record = json.loads(result.read_text())["record"]
    weights = torch.load(result.with_name("model.pt"), weights_only=True)
    return {key: value for key, value in record.items() if key not in PROVENANCE}, weights


def differences(folder: Path, reference: Path) -> list[str]:
    """What differs between two finished runs: columns of the record and names of weights."""
    (record, weights), (expected, expected_weights) = end_of(folder), end_of(reference)
    columns = [key for key in expected if record[key] != expected[key]]
    tensors = [k for k, tensor in expected_weights.items() if not torch.equal(weights[k], tensor)]
    return columns + tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="how often to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, overrides = parser.parse_args(words[:end]), words[end + 1 :]
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills}: must be at least 1")
    draw = random.Random(arguments.seed)
    kills = rounds = 0
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference"
        reference.mkdir()
        start(reference, overrides).wait()
        end_of(reference)
        while kills < arguments.kills:
            rounds += 1
            folder = Path(scratch) / f"round{rounds}"
            folder.mkdir()
            while one(folder, RESULT_FILE) is None:
                process = start(folder, overrides)
                if kills == arguments.kills:
                    process.wait()
                    break
                how = kill(process, folder, draw)
                if how is None and one(folder, RESULT_FILE) is None:
                    end_of(folder)  # it failed: say why
                if how is not None:
                    kills += 1
                    console.print(f"kill {kills}: {how}")
            different = differences(folder, reference)
            if different:
                console.print(f"run {rounds} ended differently: {', '.join(different)}")
                sys.exit(1)
    console.print(f"{kills} kills, {rounds} runs: each ended as the undisturbed one, to the bit")


if __name__ == "__main__":
    main()
