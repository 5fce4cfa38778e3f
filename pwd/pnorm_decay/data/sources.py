"""Reading a local copy of CIFAR-10: a folder or an archive of image files.

The files are `train/<class>/*.{png,jpg,jpeg}` and `test/<class>/...`, possibly below one top
folder. Archives are read member by member; nothing is extracted to the disk.
"""

import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pnorm_decay.data.base import DataError

SPLITS = ("train", "test")
LARGEST_IMAGE = 2**20  # bytes; an image of CIFAR-10 has a few thousand
LARGEST_OTHER = 2**28  # of what is passed over: more than the whole data set
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz")
# What the standard library raises on damaged archives (RuntimeError: an encrypted one, or one
# compressed in a way it does not know), beside OSError.
ARCHIVE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
)


class ImageFile(NamedTuple):
    """An encoded image and what its place says about it."""

    split: str
    class_name: str
    name: str
    content: bytes

    @property
    def place(self) -> str:
        """The path below the top folder."""
        return f"{self.split}/{self.class_name}/{self.name}"

    @property
    def kind(self) -> str:
        """`jpeg` or `png` by the content, whatever the file is called; else `unknown`."""
        if self.content.startswith(b"\xff\xd8"):
            return "jpeg"
        return "png" if self.content.startswith(b"\x89PNG") else "unknown"


def read_images(path: Path) -> Iterator[ImageFile]:
    """Go through all image files of a folder or an archive, reading as little as is asked for.

    Files that are no images, hidden files and anything outside `train` and `test` are passed over.

    Raises:
        DataError: the path is neither a folder nor an archive, or the archive is damaged.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(".zip"):
        return _read_archive(path, _read_zip)
    if path.name.endswith(TAR_SUFFIXES):
        return _read_archive(path, _read_tar)
    expected = ", ".join((*TAR_SUFFIXES, ".zip"))
    raise DataError(f"{path} is neither a folder nor an archive ({expected})")


def check_regular(path: Path, largest: int | None = None) -> None:
    """Refuses what might never end: a pipe, a device, a file larger than it can be.

    Args:
        path: of a file, or a link to one.
        largest: bytes that it may have.

    Raises:
        DataError: it is no regular file, or too large.
        OSError: it cannot be looked at.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise DataError(f"{path} is not a regular file")
    _check_size(str(path), state.st_size, largest)


def _check_size(name: str, size: int, largest: int | None) -> None:
    if largest is not None and size > largest:
        raise DataError(f"{name} has {size:,} bytes, more than the {largest:,} it can have")


def fingerprint(path: Path) -> str:
    """Identify the present state of a folder or a file by names, sizes and times of change.

    Returns:
        A hexadecimal digest. It changes with the path and whenever a file is added, removed or
        written to.
    """
    files = sorted(_image_paths(path)) if path.is_dir() else [path]
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in files:
        state = file.stat()
        digest.update(f"\n{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def top_folder(path: Path) -> str:
    """The top folder of the first entry of a tar archive; empty for anything else or damaged."""
    if not path.name.endswith(TAR_SUFFIXES):
        return ""
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
    except (OSError, *ARCHIVE_ERRORS):
        return ""
    parts = PurePosixPath(first.name).parts if first else ()
    return parts[0] if parts else ""


def _place(name: str) -> tuple[str, str, str] | None:
    """Split `[top/]train/cat/0001.png` in its last three parts; None if it is not of that form."""
    parts = PurePosixPath(name).parts
    if len(parts) not in (3, 4) or parts[-3] not in SPLITS:
        return None
    if parts[0] == "__MACOSX" or parts[-1].startswith("."):
        return None
    if not parts[-1].lower().endswith(IMAGE_SUFFIXES):
        return None
    return parts[-3], parts[-2], parts[-1]


def _image_paths(folder: Path) -> Iterator[Path]:
    tops = [folder, *sorted(folder.iterdir())]
    for split in SPLITS:
        for top in tops:
            for file in (top / split).glob("*/*"):
                if _place(file.relative_to(folder).as_posix()):
                    yield file


def _read_folder(folder: Path) -> Iterator[ImageFile]:
    try:
        for file in _image_paths(folder):
            check_regular(file, LARGEST_IMAGE)
            yield ImageFile(file.parts[-3], file.parts[-2], file.name, file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error


def _read_archive(path: Path, read: Callable[[Path], Iterator[ImageFile]]) -> Iterator[ImageFile]:
    try:
        yield from read(path)
    except DataError:
        raise
    except ARCHIVE_ERRORS as error:
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else "it ends too early"
        raise DataError(f"{path} is truncated or damaged: {reason}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read_tar(path: Path) -> Iterator[ImageFile]:
    with tarfile.open(path) as archive:
        for member in archive:
            place = _place(member.name)
            limit = LARGEST_IMAGE if place else LARGEST_OTHER
            _check_size(f"{path}: {member.name}", member.size, limit)
            file = archive.extractfile(member) if place and member.isfile() else None
            if place and file:
                yield ImageFile(*place, file.read())
        _check_tar_end(archive)


def _check_tar_end(archive: tarfile.TarFile) -> None:
    """Raise unless the archive ended where it should: tarfile itself stops quietly at damage."""
    stream = archive.fileobj
    assert stream is not None
    if stream.tell() < archive.offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the end-of-archive mark is missing")
    # Reading on to the very end makes gzip and xz verify their checksums.
    while chunk := stream.read(tarfile.RECORDSIZE):
        if any(chunk):
            raise tarfile.ReadError("something else than a member header follows a member")


def _read_zip(path: Path) -> Iterator[ImageFile]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            place = _place(member.filename)
            if place:
                _check_size(f"{path}: {member.filename}", member.file_size, LARGEST_IMAGE)
                yield ImageFile(*place, archive.read(member))
