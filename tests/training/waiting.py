"""A sweep whose runs wait for the test: `python waiting.py <Hydra's arguments>`.

A run leaves the file <seed>.<its process> in the folder and ends once <seed>.go is there; asked to
stop, it leaves <seed>.saved. <seed>.fail makes it fail.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from pnorm_decay.training import stopping

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    folder, seed = Path(cfg.runs_dir), cfg.seed
    folder.mkdir(exist_ok=True)
    (folder / f"{seed}.{os.getpid()}").touch()
    while not (folder / f"{seed}.go").exists():
        if stopping.requested():
            (folder / f"{seed}.saved").touch()
            raise stopping.Stopped
        if (folder / f"{seed}.fail").exists():
            raise RuntimeError("out of memory")
        time.sleep(0.01)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with stopping.graceful():
        try:
            main()
        except stopping.Stopped:
            sys.exit(130)
