"""Fetch CIFAR-10 and Tiny Shakespeare into data/, or prepare them from local copies.

    python scripts/download_data.py
    python scripts/download_data.py --cifar10 cifar10.zip --shakespeare input.txt

Local copies may also be named by the environment variables PNORM_CIFAR10 and PNORM_SHAKESPEARE.
The exit status is 1 if one of the two could not be made ready.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from pnorm_decay.data import CIFAR10, DataError, TinyShakespeare
from pnorm_decay.messages import one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cifar10",
        metavar="PATH",
        default=os.environ.get("PNORM_CIFAR10"),
        help="local copy: cifar-10-python.tar.gz (packed or unpacked), or a folder or archive of "
        "train/<class>/*.{png,jpg} and test/<class>/...",
    )
    parser.add_argument(
        "--shakespeare",
        metavar="PATH",
        default=os.environ.get("PNORM_SHAKESPEARE"),
        help="local copy of char-rnn's data/tinyshakespeare/input.txt",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="PATH",
        default="data",
        help="folder for the prepared files (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    """Make both data sets ready; a failure of the first does not stop the second."""
    arguments = parse_arguments()
    # soft_wrap: messages hold paths and addresses, which a line break would spoil.
    console = Console(soft_wrap=True, highlight=False)
    errors = Console(soft_wrap=True, highlight=False, stderr=True)
    datasets: list[CIFAR10 | TinyShakespeare] = [
        CIFAR10(path=arguments.cifar10, cache_dir=arguments.cache_dir),
        TinyShakespeare(block_size=1, path=arguments.shakespeare, cache_dir=arguments.cache_dir),
    ]
    failed = False
    for dataset in datasets:
        try:
            file = dataset.prepare()
        except (DataError, OSError) as error:
            failed = True
            errors.print(one_line(error), style="red", markup=False)
        else:
            console.print(f"{dataset.label}: ready, {file} ({megabytes(file)})", markup=False)
    return int(failed)


def megabytes(file: Path) -> str:
    """The size of a file, for reading."""
    return f"{file.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
