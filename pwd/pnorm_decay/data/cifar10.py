"""CIFAR-10: the original through torchvision, or a copy made of image files."""

import io
import logging
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from pnorm_decay.data.base import DataError
from pnorm_decay.data.cache import DAMAGED_CACHE_ERRORS, Content, Images
from pnorm_decay.data.images import ImageDataset
from pnorm_decay.data.sources import (
    SPLITS,
    ImageFile,
    check_regular,
    fingerprint,
    read_images,
    top_folder,
)

logger = logging.getLogger(__name__)

# How the pixels were kept: the original arrays, or image files of one of two formats.
Kind = Literal["original", "jpeg", "png"]

# In the order of the original labels, which is the alphabet's.
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
IMAGE_COUNT = 60_000
# The copy that the recorded runs were trained on, as `Images.content` sums it up.
RECORDED_COPY = "eec90e10bd2f5438e70e4e8599dc5b7672ffbabf978fde50cd6de1e7ed6d6bf0"
IMAGE_SIZE = (32, 32)
ORIGINAL_FOLDER = "cifar-10-batches-py"
ORIGINAL_ARCHIVE = "cifar-10-python.tar.gz"
HOW_TO_POINT = "data.path=... (or the environment variable PNORM_CIFAR10)"


class CIFAR10(ImageDataset):
    """CIFAR-10: 60,000 colour images of 32 x 32 pixels; its own test part is for validation.

    Decoded once into one file in `cache_dir`. There is one cache for the original pixels, however
    they came, and one for every state of a copy made of image files.

    Args:
        path: a local copy: a folder or archive (.tar, .tar.gz, .tgz, .tar.xz, .zip) of
            `train/<class>/*.{png,jpg,jpeg}` and `test/<class>/...`, or the original
            `cifar-10-python.tar.gz`, packed or unpacked. None (or an empty string): the original in
            `cache_dir`, downloaded through torchvision when it is not there.
        cache_dir: folder for the decoded images.
        crop_padding: black pixels around an image, out of which a random window is cut; 0 = off.
        flip: mirror every second image, by chance.
        rotation_degrees: turn each image by an angle drawn from +- this; 0 = off.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        cache_dir: str | Path = "data",
        crop_padding: int = 4,
        flip: bool = True,
        rotation_degrees: float = 0.0,
    ) -> None:
        super().__init__(crop_padding, flip, rotation_degrees)
        self.path = Path(path) if path else None
        self.cache_dir = Path(cache_dir)
        self._found_kind: Kind | None = None
        self._found_content: Content | None = None

    @property
    def label(self) -> str:
        """What the pixels are, with the number of images if some are missing."""
        label = "CIFAR-10, JPEG copy" if self._kind == "jpeg" else "CIFAR-10"
        if self._content is None or self._content.count == IMAGE_COUNT:
            return label
        return f"{label}, {self._content.count:,} of {IMAGE_COUNT:,} images"

    @property
    def identity(self) -> str:
        """The label, and a checksum of a copy's pixels unless it is the one of the recorded runs."""
        if self._content is None or self._content.sha256 == RECORDED_COPY:
            return self.label
        return f"{self.label}, sha256 {self._content.sha256}"

    def prepare(self) -> Path:
        """Decode the images into the cache unless they are there.

        Returns:
            The file in `cache_dir`.

        Raises:
            DataError: the images are missing, damaged or not CIFAR-10's.
        """
        self._load()
        return self._cached

    @property
    def _kind(self) -> Kind:
        if self._found_kind is None:
            self._found_kind = find_kind(self.path) if self.path else "original"
        return self._found_kind

    @property
    def _content(self) -> Content | None:
        """Of a copy, which is decoded for it if it was not yet; None for the original itself."""
        if self._kind == "original":  # torchvision compares its checksum
            return None
        if self._found_content is None:
            try:
                self._found_content = Images.read_content(self._cached)
            except DAMAGED_CACHE_ERRORS:
                self._found_content = self._load().content
        return self._found_content

    @property
    def _cached(self) -> Path:
        state = f"-{fingerprint(self.path)[:16]}" if self.path and self._kind != "original" else ""
        return self.cache_dir / f"cifar10-{self._kind}{state}.npz"

    def _source(self) -> Hashable:
        if self.path is None or not self.path.exists():
            return (str(self.path), str(self.cache_dir.resolve()))
        # Cheap rather than watertight: a folder's own time does not change with its files.
        return (str(self.path.resolve()), self.path.stat().st_mtime_ns)

    def _load(self) -> Images:
        cached = self._cached
        if cached.is_file():
            try:
                return Images.read(cached)
            except DAMAGED_CACHE_ERRORS as error:
                logger.warning("decoding again, because %s is damaged: %s", cached, error)
        if self.path is None or self._kind == "original":
            images = load_original(self.path, self.cache_dir)
        else:
            images = decode_copy(self.path, self._kind)
        images.write(cached)
        return images


def find_kind(path: Path) -> Kind:
    """Look at as little of a local copy as tells what it is.

    Raises:
        DataError: it is not there, or it is none.
    """
    if not path.exists():
        raise DataError(
            f"there is no {path}: {HOW_TO_POINT} must name a local copy of CIFAR-10, or be left out"
        )
    if not path.is_dir():
        check_regular(path)
    if _unpacked_root(path) or top_folder(path) == ORIGINAL_FOLDER:
        return "original"
    first = next(read_images(path), None)
    if first is None:
        raise DataError(f"{path} holds no train/<class>/*.png or *.jpg")
    if first.kind not in get_args(Kind):
        raise DataError(f"{path}: {first.place} is neither a PNG nor a JPEG image")
    return "jpeg" if first.kind == "jpeg" else "png"


def decode_copy(path: Path, kind: Kind) -> Images:
    """Decode a folder or an archive of image files.

    Args:
        path: see `read_images`.
        kind: the format that all of them must have.

    Raises:
        DataError: naming what is missing, damaged or not as in CIFAR-10.
    """
    found: dict[str, dict[tuple[int, str], np.ndarray]] = {split: {} for split in SPLITS}
    console = Console(stderr=True)
    # Without a terminal (a log, a worker of a sweep) the bar stays away.
    for file in track(
        read_images(path),
        description=f"decoding {path.name}",
        total=IMAGE_COUNT,
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ):
        if file.class_name not in CLASSES:
            raise DataError(f"{path}: {file.place} is not in the folder of a CIFAR-10 class")
        if file.kind != kind:
            raise DataError(f"{path}: {file.place} is {file.kind}, the first image is {kind}")
        found[file.split][CLASSES.index(file.class_name), file.name] = _decode(path, file)
        if sum(map(len, found.values())) > IMAGE_COUNT:
            raise DataError(f"{path} holds more than the {IMAGE_COUNT:,} images of CIFAR-10")
    arrays = []
    for split, images in found.items():
        ordered = sorted(images)  # by label and name: the order in the archive does not matter
        labels = np.array([label for label, _ in ordered], dtype=np.int64)
        for label, class_name in enumerate(CLASSES):
            if label not in labels:
                raise DataError(f"{path}: {split}/{class_name} is missing or has no images")
        pixels = np.stack([images[key] for key in ordered]).transpose(0, 3, 1, 2)
        arrays += [np.ascontiguousarray(pixels), labels]
    return Images.from_arrays(*arrays)


def _decode(source: Path, file: ImageFile) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(file.content), formats=("PNG", "JPEG"))
        # Never converted: a grey or transparent image is an error, not something to be changed.
        if image.size != IMAGE_SIZE or image.mode != "RGB":
            width, height = image.size
            found = f"{width} x {height} {image.mode}"
            raise DataError(f"{source}: {file.place} is {found}, CIFAR-10 is 32 x 32 RGB")
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL's own words may name an object in memory, which helps nobody.
        raise DataError(f"{source}: {file.place} is truncated or damaged") from error


def load_original(path: Path | None, cache_dir: Path) -> Images:
    """Read the original arrays, whose checksums torchvision verifies.

    Args:
        path: the original archive, its unpacked folder, or the folder that holds that; None to
            look for either in `cache_dir` and download the archive if neither is there.
        cache_dir: where temporary files go; none of them stays.

    Raises:
        DataError: it cannot be downloaded, or a file has a wrong checksum.
    """
    source = path or cache_dir
    root = _unpacked_root(source)
    if root:
        return _read_original(root, source)
    archive = path or cache_dir / ORIGINAL_ARCHIVE
    with _temporary_folder(cache_dir) as folder:
        if archive.exists():
            _link_checked(archive, folder / ORIGINAL_ARCHIVE)
        _unpack_or_download(folder, archive)
        return _read_original(folder, archive)


def _unpacked_root(path: Path) -> Path | None:
    """The folder that torchvision calls root, if the original lies there unpacked."""
    if path.is_dir() and path.resolve().name == ORIGINAL_FOLDER:
        return path.resolve().parent
    return path if (path / ORIGINAL_FOLDER).is_dir() else None


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=".cifar10-")
    except OSError as error:
        raise DataError(f"cannot write to {parent}: {error.strerror or error}") from error
    with folder as name:
        yield Path(name)


def _link_checked(archive: Path, link: Path) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import check_md5

    # Checked here, because torchvision would download over a file with a wrong checksum.
    if not check_md5(archive, datasets.CIFAR10.tgz_md5):
        raise DataError(f"{archive} has a wrong checksum: expected md5 {datasets.CIFAR10.tgz_md5}")
    link.symlink_to(archive.resolve())


def _unpack_or_download(folder: Path, archive: Path) -> None:
    from torchvision import datasets

    try:
        datasets.CIFAR10(folder, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        if archive.exists():
            raise DataError(f"cannot unpack {archive}: {error}") from error
        raise DataError(
            f"cannot download {datasets.CIFAR10.url}: {getattr(error, 'reason', error)}. "
            f"Put that file at {archive}, or set {HOW_TO_POINT} to a local copy."
        ) from error


def _read_original(root: Path, source: Path) -> Images:
    from torchvision import datasets

    arrays: list[np.ndarray] = []
    try:
        for train in (True, False):
            part = datasets.CIFAR10(root, train=train)
            images = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
            arrays += [images, np.array(part.targets, dtype=np.int64)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{source}: a file in {ORIGINAL_FOLDER} is missing or has a wrong checksum"
        ) from error
    return Images.from_arrays(*arrays)
