"""Builds the wheel and tries it in new environments: the oldest Python and torch, and the newest.

    python scripts/try_wheel.py
    python scripts/try_wheel.py --only oldest
    UV_TORCH_BACKEND=cpu python scripts/try_wheel.py

uv makes the environments and finds or fetches the Pythons; the last line has it take torch's CPU
wheels, which are smaller than what the package index holds. `scripts/smoke.py` is what is tried,
first beside torch alone and then with the extra `deploy`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Name -> the Python, and what is installed beside the wheel; torch 2.4 is of NumPy 1's time.
ENVIRONMENTS = {
    "oldest": ("3.11", ["torch==2.4.*", "numpy<2"]),
    "newest": ("3.13", ["torch"]),
}


class TrialError(RuntimeError):
    """A command failed; what it printed says why."""


def call(*words: str | Path, cwd: Path, **variables: str) -> None:
    environment = os.environ | variables
    environment.pop("PYTHONPATH", None)
    if subprocess.run([*map(str, words)], cwd=cwd, env=environment).returncode:
        raise TrialError(f"this failed: {' '.join(map(str, words))}")


def uv() -> str:
    """The uv of this program's environment or, where it has none, of the PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else "uv"


def build(folder: Path) -> Path:
    """The wheel, made from the source archive as an index would get it; nothing stays behind."""
    call(uv(), "build", "--quiet", "--out-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test(wheel: Path, python: str, beside: list[str], folder: Path) -> None:
    """Tries a wheel in a new environment below a folder."""
    environment = folder / f"python{python}"
    call(uv(), "venv", "--quiet", "--python", python, environment, cwd=folder)
    here = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    install: list[str | Path] = [uv(), "pip", "install", "--quiet", "--python", here]
    smoke: list[str | Path] = [here, ROOT / "scripts" / "smoke.py"]
    kept = str(folder / "compiled")  # what is compiled here is no other installation's
    call(*install, wheel, *beside, cwd=folder)
    call(*smoke, "--alone", cwd=folder, PNORM_DECAY_CACHE=kept)
    call(*install, f"{wheel}[deploy]", *beside, cwd=folder)
    call(*smoke, "--deploy", cwd=folder, PNORM_DECAY_CACHE=kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=ENVIRONMENTS, help="one of the environments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pnorm-decay-") as scratch:
        folder = Path(scratch)
        try:
            wheel = build(folder)
            for name, (python, beside) in ENVIRONMENTS.items():
                if arguments.only in (None, name):
                    test(wheel, python, beside, folder)
        except TrialError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
