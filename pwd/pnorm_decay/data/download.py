"""Small downloads, bounded and checked."""

import hashlib
import urllib.request
from http.client import HTTPException
from pathlib import Path

from pnorm_decay.data.base import DataError

TIMEOUT_SECONDS = 30


def download(url: str, sha256: str, largest: int) -> bytes:
    """Fetch a small file whole, of at most `largest` bytes.

    Raises:
        DataError: it cannot be fetched, or its SHA-256 is not `sha256` (hexadecimal).
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read(largest)
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
