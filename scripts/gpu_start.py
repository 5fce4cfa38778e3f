"""Starts scripts/gpu.py from a folder that `make gpu-bundle` packed; needs a Python with torch.

What this Python lacks is unpacked from the folder's wheels into a folder packages-3.x beside this
file; nothing is installed elsewhere, and no network is used. All arguments go to scripts/gpu.py.

    python3 gpu-bundle/start.py --minutes 45
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / f"packages-{sys.version_info.major}.{sys.version_info.minor}"


def pip(*words: str) -> str:
    """What the folder's own pip says; the program ends where it fails."""
    wheel = next(HERE.glob("pip-*.whl"))
    options = ["--no-index", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    command = [sys.executable, str(wheel / "pip"), *words, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(2)
    return done.stdout


def unpack() -> None:
    """Puts the packages that this Python lacks into their folder."""
    asked = str(HERE / "requirements.txt")
    with tempfile.TemporaryDirectory() as wheels:
        with tarfile.open(HERE / "wheels.tar.xz") as archive:
            archive.extractall(wheels, filter="data")
        found = ["--find-links", wheels]
        plan = pip("install", "--dry-run", "--report", "-", "--requirement", asked, *found)
        missing = [
            f"{package['metadata']['name']}=={package['metadata']['version']}"
            for package in json.loads(plan)["install"]
        ]
        sys.stderr.write(
            f"missing here, taken from the wheels: {', '.join(missing) or 'nothing'}\n"
        )
        unfinished = HERE / f"{PACKAGES.name}.unfinished"
        unfinished.mkdir(exist_ok=True)
        if missing:
            pip("install", "--no-deps", "--upgrade", "--target", str(unfinished), *found, *missing)
        unfinished.rename(PACKAGES)


def main() -> None:
    started = time.monotonic()
    if sys.version_info < (3, 11):  # noqa: UP036 - nobody has chosen this Python for us
        sys.exit(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
    if not hasattr(tarfile, "data_filter"):
        sys.exit(f"Python 3.11.4 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
    here = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    made_for = tuple((HERE / "made_for.txt").read_text().split())
    if made_for != here:
        sys.exit(
            f"this folder was packed for Python {' on '.join(made_for)}, and this is Python "
            f"{' on '.join(here)}: pack it again by "
            f"python scripts/gpu_bundle.py --python {here[0]} --machine {here[1]}"
        )
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: start this with a Python that has it")
    if not PACKAGES.exists():
        unpack()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PACKAGES), *([before] if before else [])])
    for folder in (HERE / "data").iterdir():
        os.environ.setdefault(folder.name, str(next(folder.iterdir())))
    os.environ["GPU_HOUR_STARTED"] = str(started)
    program = str(HERE / "code" / "scripts" / "gpu.py")
    os.execv(sys.executable, [sys.executable, program, *sys.argv[1:]])


if __name__ == "__main__":
    main()
