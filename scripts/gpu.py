"""Makes the most of an hour on a GPU; launched again, it goes on where it was stopped.

In this order: the environment in ten lines; the tests that need CUDA (five minutes at most); both
benchmarks of steps; the paper's experiments, those that settle most first
(configs/hydra/sweeper/hour.yaml), and then the rest of the sweeps at paper scale. Every result is
written as it ends, to gpu/ and, where the environment variable OUT names a folder, there too: the
rows as CSV, report.md, what the runs left but their weights (runs.tar.gz), the log. SIGTERM and
Ctrl-C stop it at any time; runs that have begun save their state to runs/ first.

    python scripts/gpu.py --minutes 45
    python scripts/gpu.py --rehearse   # everything tiny, on the CPU, in runs/rehearsal

It needs torch with CUDA and the packages of the extra `gpu` in pyproject.toml. Where there is no
network, `make gpu-bundle` packs what is needed elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import signal
import sys
import tarfile
import time
import tomllib
from pathlib import Path

# start.py of a bundle has taken its time already.
STARTED = float(os.environ.pop("GPU_HOUR_STARTED", time.monotonic()))
REPOSITORY = Path(__file__).resolve().parents[1]
PATHS = ("OUT", "PNORM_CIFAR10", "PNORM_SHAKESPEARE")
STAGES = ("tests", "optimizer", "training", "hour", "sweeps")


def missing_packages() -> list[str]:
    """What the hour needs and this Python lacks: torch, and the extra `gpu` of pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = ["torch", *project["optional-dependencies"]["gpu"]]
    names = [re.split(r"[<>=!~ ;\[]", line)[0] for line in needed]
    missing = []
    for name in names:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def say_missing(missing: list[str]) -> None:
    """Says which packages are missing and how they get here."""
    names = " ".join(name for name in missing if name != "torch")
    version = ".".join(platform.python_version_tuple()[:2])
    lines = [f"missing here (Python {version}, {platform.machine()}): {', '.join(missing)}"]
    if "torch" in missing:
        lines.append(f"{sys.executable} has no torch: start this program with a Python that has it")
    if names:
        lines += [
            f"with a network:    python -m pip install {names}",
            "without one, pack everything where there is one, carry the folder, start it there:",
            f"                   make gpu-bundle GPU_PYTHON={version}",
            "                   python3 gpu-bundle/start.py --minutes 45",
            "or the wheels alone, from a machine with the same Python and system:",
            f"                   python -m pip wheel --wheel-dir wheels {names}",
            f"                   python -m pip install --no-index --find-links wheels {names}",
        ]
    sys.stderr.write("\n".join(lines) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=45, help="until it stops (default: 45)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="only these, in this order"
    )
    parser.add_argument(
        "--workers", type=int, help="runs beside each other (default: the launcher's choice)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="everything tiny and on the CPU, to see it work"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where runs/, results/ and gpu/ are (default: here; of a rehearsal: runs/rehearsal)",
    )
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes:g}: must be positive")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    return arguments


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the hour begins nothing is to be saved
    arguments = parsed()
    default = REPOSITORY / "runs" / "rehearsal" if arguments.rehearse else REPOSITORY
    folder = (arguments.folder or default).resolve()
    for name in PATHS:
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.environ[name])
    os.chdir(REPOSITORY)  # of which data/ is meant, as by the programs that this one starts
    missing = missing_packages()
    if missing:
        say_missing(missing)
        sys.exit(2)
    source = str(REPOSITORY / "pwd")  # of this copy, whatever else is installed
    sys.path.insert(0, source)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        part for part in (source, os.environ.get("PYTHONPATH")) if part
    )

    import torch

    if not hasattr(tarfile, "data_filter"):
        sys.stderr.write(f"this needs Python 3.11.4 or newer, not {platform.python_version()}\n")
        sys.exit(2)
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.stderr.write(
            f"this would spend {arguments.minutes:g} minutes on the CUDA tests, the benchmarks and "
            f"the paper's runs, and needs a CUDA GPU; torch {torch.__version__} sees none "
            "(python scripts/gpu.py --rehearse does all of it tiny, on the CPU)\n"
        )
        sys.exit(2)

    from gpu_hour import Hour
    from pnorm_decay.training.errors import print_error

    seconds = 60 * arguments.minutes - (time.monotonic() - STARTED)
    hour = Hour(folder, max(0.0, seconds), arguments.workers, rehearsed=arguments.rehearse)
    try:
        code = hour.spend(arguments.stages)
    except Exception as error:
        print_error(error)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
