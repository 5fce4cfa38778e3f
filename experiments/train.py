"""Trains one network or, with -m, a sweep; `--help` lists the choices.

On two CPU cores a run of experiment=demo/resnet_digits takes seconds; experiment=paper/... is for
GPUs. A run that is already complete costs nothing, one that was cut off goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C ends the program without frames as long as it imports; nothing has begun.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from pnorm_decay.training import stopping
from pnorm_decay.training.command_line import check_choices, explained, flags_first
from pnorm_decay.training.errors import print_error
from pnorm_decay.training.progress import console, in_sweep, is_first_process, say_if_one_of_a_sweep
from pnorm_decay.training.run import run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry point: one run."""
    stopping.install()  # here too, for the processes that a launcher of clusters starts
    if stopping.requested():
        raise stopping.Stopped
    try:
        run(cfg)
    except Exception as error:
        if in_sweep():
            raise  # the other runs go on; Hydra raises it again when they are done
        print_error(error)
        sys.exit(2)
    say_if_one_of_a_sweep()


if __name__ == "__main__":
    # Hydra then raises what goes wrong instead of printing it over several lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with stopping.graceful():
        try:
            sys.argv[1:] = flags_first(sys.argv[1:])
            check_choices(sys.argv[1:], CONFIGS)
            main()
            if stopping.requested():
                raise stopping.Stopped
        except Exception as error:
            print_error(explained(error, sys.argv[1:], CONFIGS))
            sys.exit(2)
        except KeyboardInterrupt:
            if is_first_process():
                console.print("stopped; the same command goes on from the last checkpoint")
            sys.exit(130)
