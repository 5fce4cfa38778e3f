"""Files that are either complete or absent: atomic writes, checked downloads, checksums."""

import hashlib
import os
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from pnorm_decay.data.base import DataError

TIMEOUT_SECONDS = 30


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` only once it is complete and on the disk.

    The temporary file lies in the same folder under a name of its own, so that two processes may
    write the same path at once: the last one wins, and readers see a whole file at any time.

    Raises:
        DataError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # Gone already after the rename; after any failure, an interrupt too, it must not stay.
        with suppress(OSError):
            temporary.unlink()


def download(url: str, sha256: str) -> bytes:
    """Fetch a small file whole.

    Raises:
        DataError: it cannot be fetched, or its SHA-256 is not `sha256` (hexadecimal).
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
    check_sha256(content, sha256, url)
    return content


def check_sha256(content: bytes, expected: str, source: str | Path) -> None:
    """Raise `DataError` naming `source` unless `content` has the expected SHA-256."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{source} has a wrong checksum: sha256 {found[:12]}…, expected {expected[:12]}…"
        )
