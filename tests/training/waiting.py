"""A sweep whose runs wait for the test: `python waiting.py <Hydra's arguments>`.

A run leaves the file <seed>.<its process> in the folder, which says how many runs the sweep does at
once, and ends once <seed>.go is there; asked to stop, it leaves <seed>.saved. <seed>.fail makes it
fail. With PRETENDED_GPUS set, the machine has so many, and run 0 is complete; the others fill half
of a GPU.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pnorm_decay.training import launcher, stopping
from pnorm_decay.training.sharing import Footprint

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    folder, seed = Path(cfg.runs_dir), cfg.seed
    folder.mkdir(exist_ok=True)
    (folder / f"{seed}.{os.getpid()}").write_text(str(HydraConfig.get().launcher.n_jobs))
    while not (folder / f"{seed}.go").exists():
        if stopping.requested():
            (folder / f"{seed}.saved").touch()
            raise stopping.Stopped
        if (folder / f"{seed}.fail").exists():
            raise RuntimeError("out of memory")
        time.sleep(0.01)


def pretended_measure(cfg: DictConfig) -> Footprint | None:
    return None if cfg.seed == 0 else Footprint(memory=10, free=100, busy=0.5)


if __name__ == "__main__":
    if "PRETENDED_GPUS" in os.environ:
        torch.cuda.device_count = lambda: int(os.environ["PRETENDED_GPUS"])
        launcher.cores, launcher.measure = lambda: 8, pretended_measure
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with stopping.graceful():
        try:
            main()
        except stopping.Stopped:
            sys.exit(130)
