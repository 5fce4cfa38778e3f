"""Trains one network or, with -m, a sweep; `--help` lists the choices.

On two CPU cores a run of experiment=demo/resnet_digits takes seconds; experiment=paper/... is for
GPUs. A run that is already complete costs nothing, one that was cut off goes on.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pnorm_decay.data import DataError
from pnorm_decay.records import RecordError
from pnorm_decay.training.progress import console, in_sweep, report
from pnorm_decay.training.run import run
from pnorm_decay.training.settings import ConfigError

USER_ERRORS = (ConfigError, DataError, RecordError, HydraException, OmegaConfBaseException)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry point: one run."""
    try:
        run(cfg)
    except USER_ERRORS as error:
        if in_sweep():
            raise  # the other runs go on; Hydra raises it again when they are done
        report(error)
        sys.exit(2)


if __name__ == "__main__":
    # Hydra then raises what goes wrong instead of printing it over several lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except USER_ERRORS as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last checkpoint")
        sys.exit(130)
