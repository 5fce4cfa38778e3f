"""Packs what an hour on a GPU needs on a machine without a network into one folder.

The folder has the wheels that a Python with torch may lack, the code of this working tree, both
data sets, and start.py, which unpacks and starts it there:

    python scripts/gpu_bundle.py --python 3.12
    python3 gpu-bundle/start.py --minutes 45    # there, with a Python that has torch

The data sets are those of PNORM_CIFAR10 and PNORM_SHAKESPEARE, else those in data/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from rich.console import Console

from pnorm_decay.data.cifar10 import ORIGINAL_ARCHIVE, ORIGINAL_FOLDER
from pnorm_decay.data.text import TinyShakespeare
from pnorm_decay.messages import one_line
from pnorm_decay.training.provenance import COMMIT_FILE, git_commit

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("Makefile", "pyproject.toml", "configs", "experiments", "pwd", "scripts", "tests")
LARGEST = 60_000_000  # bytes of the whole folder
GLIBC = range(28, 4, -1)  # the newest 2.x that a wheel may ask for: that of Debian 10, RHEL 8

console = Console(highlight=False, soft_wrap=True)


class BundleError(Exception):
    """What cannot be packed, in one line."""


def run(*words: str) -> None:
    """Runs a program of this Python.

    Raises:
        BundleError: it failed.
    """
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BundleError(
            f"{' '.join(words[:3])} failed: {said[-1] if said else 'no reason given'}"
        )


def requirements() -> list[str]:
    """What the hour needs beside torch: the extra `gpu` of pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]["gpu"]


def pinned(scratch: Path, python: str, machine: str) -> list[str]:
    """All packages to carry, at the versions of requirements.lock; torch and its own left out."""
    asked, without, found = (scratch / name for name in ("asked.txt", "without.txt", "found.txt"))
    asked.write_text("\n".join(requirements()))
    without.write_text("torch; sys_platform == 'none'\n")  # so that nothing is resolved for it
    run(
        *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", str(asked)),
        *("--override", str(without), "--constraint", str(REPOSITORY / "requirements.lock")),
        *("--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"),
        *("--no-emit-index-url", "--output-file", str(found)),
    )
    return [line for line in found.read_text().splitlines() if "==" in line]


def fetch(packages: list[str], folder: Path, python: str, machine: str) -> None:
    """Downloads wheels for another Python and system; pure ones that nobody built are built."""
    platforms = [f"manylinux_2_{number}_{machine}" for number in GLIBC]
    platforms += [f"manylinux2014_{machine}", f"manylinux1_{machine}"]
    there = [word for name in platforms for word in ("--platform", name)]
    there += ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:"]
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    for package in (*packages, "pip"):
        try:
            run("pip", "download", *quiet, *there, "--dest", str(folder), package)
        except BundleError:
            before = set(folder.iterdir())
            run("pip", "wheel", *quiet, "--wheel-dir", str(folder), package)
            for wheel in set(folder.iterdir()) - before:
                if not wheel.name.endswith("-none-any.whl"):
                    raise BundleError(
                        f"{package}: no wheel for {machine}, Python {python}"
                    ) from None


def pack(wheels: Path, target: Path) -> None:
    """Wheels in one archive, stored in them without compression: a third smaller than they are."""
    with tarfile.open(target, "w:xz") as archive, tempfile.TemporaryDirectory() as scratch:
        for wheel in sorted(wheels.glob("*.whl")):
            stored = Path(scratch) / wheel.name
            with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(stored, "w") as new:
                for member in old.infolist():
                    new.writestr(member.filename, old.read(member))
            archive.add(stored, wheel.name)
            stored.unlink()


def copy_code(folder: Path) -> None:
    """The code as it stands, files that git knows, and which commit it is."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--", *CODE]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, target)
    (folder / COMMIT_FILE).write_text(f"{git_commit()}\n")


def data_sets() -> dict[str, Path]:
    """Where the data sets are here, by the environment variable that names them.

    Raises:
        BundleError: one of them is nowhere.
    """
    data = REPOSITORY / "data"
    places = {
        "PNORM_CIFAR10": [data / ORIGINAL_ARCHIVE, data / ORIGINAL_FOLDER],
        "PNORM_SHAKESPEARE": [data / TinyShakespeare.FILE_NAME],
    }
    found = {}
    for variable, known in places.items():
        named = os.environ.get(variable)
        paths = [Path(named)] if named else known
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            where = ", ".join(map(str, paths))
            raise BundleError(f"there is no {where}: set {variable} or do `make data`")
        found[variable] = path
    return found


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bundle(folder: Path, python: str, machine: str) -> None:
    """Makes the folder anew.

    Raises:
        BundleError: something is missing or cannot be fetched.
    """
    data = data_sets()
    if folder.exists():
        if not (folder / "start.py").exists() and any(folder.iterdir()):
            raise BundleError(f"{folder} holds something else")
        for what in ("gpu", "runs"):
            if (folder / "code" / what).exists():
                raise BundleError(f"{folder / 'code' / what} holds results: move them away first")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    copy_code(folder / "code")
    shutil.copyfile(REPOSITORY / "scripts" / "gpu_start.py", folder / "start.py")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    (folder / "made_for.txt").write_text(f"{'.'.join(python.split('.')[:2])} {machine}\n")
    for variable, path in data.items():
        target = folder / "data" / variable / path.name
        target.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch) / "wheels"
        wheels.mkdir()
        console.print(f"fetching wheels for Python {python} on {machine}")
        fetch(pinned(Path(scratch), python, machine), wheels, python, machine)
        for wheel in wheels.glob("pip-*.whl"):  # which start.py runs as it is
            shutil.move(wheel, folder / wheel.name)
        console.print("packing them, which takes a minute or two")
        pack(wheels, folder / "wheels.tar.xz")
    total = size(folder)
    console.print(f"{folder}: {total / 1e6:.1f} MB")
    if total > LARGEST:
        console.print(f"warning: that is more than {LARGEST / 1e6:.0f} MB", style="yellow")
    console.print(f"there: python3 {folder.name}/start.py --minutes 45")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "gpu-bundle")
    parser.add_argument("--python", default="3.12", help="the version there (default: 3.12)")
    parser.add_argument(
        "--machine",
        default="x86_64",
        choices=("x86_64", "aarch64"),
        help="the processor there (default: x86_64); the system is Linux",
    )
    arguments = parser.parse_args()
    try:
        bundle(arguments.folder, arguments.python, arguments.machine)
    except (BundleError, OSError) as error:
        console.print(f"error: {one_line(error)}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
