"""Files that are either complete or absent."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the name ``path`` only once it is complete and on the disk.

    The temporary file lies in the same folder, which is made where it is missing, under a name of
    its own: two processes may write one path at once, and readers see a whole file at any time.

    Raises:
        OSError: the folder cannot be written, the disk is full or a device is at ``path``; what was
            there stays.
    """
    if path.is_char_device() or path.is_block_device():  # root would replace it for everybody
        raise OSError(errno.EINVAL, "it is a device", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # Gone already after the rename; after any failure, an interrupt too, it must not stay.
        with suppress(OSError):
            temporary.unlink()


def regular_size(path: Path, largest: int | None = None) -> int:
    """The bytes of a file that ends: no pipe and no device.

    Args:
        path: of a file, or a link to one.
        largest: bytes that it may have.

    Raises:
        OSError: it is not there, is no regular file, or is too large.
    """
    state = path.stat()
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if largest is not None and state.st_size > largest:
        reason = f"it has {state.st_size:,} bytes, more than the {largest:,} it can have"
        raise OSError(errno.EFBIG, reason, str(path))
    return state.st_size


def read_regular(path: Path, largest: int | None = None) -> bytes:
    """The content of such a file; arguments and errors as of ``regular_size``."""
    regular_size(path, largest)
    return path.read_bytes()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_changed(path: Path, text: str) -> None:
    """As ``write_text``, unless the file holds that text: its time then stays, for make to see."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
