"""Images on the device as one uint8 tensor, augmented there; scikit-learn's digits."""

import importlib.util
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnorm_decay.data import augment
from pnorm_decay.data.base import (
    DataError,
    Dataset,
    check_batch_size,
    keep_latest,
    random_stream,
    to_device,
)
from pnorm_decay.data.cache import Images

ORDER, AUGMENTATION = 0, 1  # this module's purposes for random_stream


class Epoch(NamedTuple):
    """What is drawn for the images of an epoch, or of a batch, in the order of training.

    Attributes:
        order: places in the training part, int64.
        top: row at which the window of each is cut out of the padded image, int64.
        left: the same for columns.
        flipped: whether each is mirrored, bool.
        degrees: how far each is turned, float32.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flipped: Tensor
    degrees: Tensor


class ImageDataset(Dataset):
    """Images in two parts, augmented in training.

    Args:
        crop_padding: black pixels around an image, out of which a random window is cut; 0 = off.
        flip: mirror every second image, by chance.
        rotation_degrees: turn each image by an angle drawn from +- this; 0 = off.

    Raises:
        ValueError: `crop_padding` is negative, or `rotation_degrees` outside [0, 180].
    """

    def __init__(self, crop_padding: int, flip: bool, rotation_degrees: float) -> None:
        if crop_padding < 0:
            raise ValueError(f"crop_padding must not be negative, got {crop_padding}")
        if not 0 <= rotation_degrees <= 180:
            raise ValueError(f"rotation_degrees must be in [0, 180], got {rotation_degrees}")
        self.crop_padding = crop_padding
        self.flip = flip
        self.rotation_degrees = rotation_degrees
        self._loaded: Images | None = None
        self._epoch: tuple[tuple[int, int], Epoch] | None = None

    @abstractmethod
    def _load(self) -> Images:
        """Read everything, on the CPU."""

    @abstractmethod
    def _source(self) -> Hashable:
        """Say where the images come from: instances that agree share what is loaded."""

    def setup(self, device: torch.device) -> None:
        """See `Dataset.setup`."""
        key = (type(self), self._source(), str(device))
        self._loaded = keep_latest(key, lambda: self._load().to(device))
        self._epoch = None

    @property
    def _images(self) -> Images:
        if self._loaded is None:
            raise RuntimeError("call setup(device) before using the data")
        return self._loaded

    @property
    def model_args(self) -> dict[str, int]:
        """`num_classes` (ten in either data set) and `in_channels`."""
        return {"num_classes": 10, "in_channels": self._images.train_images.shape[1]}

    def steps_per_epoch(self, batch_size: int) -> int:
        """See `Dataset.steps_per_epoch`."""
        count = len(self._images.train_labels)
        check_batch_size(batch_size, limit=count)
        return count // batch_size

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The next images in the epoch's order, augmented and normalised.

        Every epoch is a permutation of the training part; what is left after the last full batch
        is dropped.

        Returns:
            Images, float32 `(batch_size, C, H, W)`, of mean 0 and deviation 1 in each channel over
            the training part; labels, int64 `(batch_size,)`.
        """
        epoch, position = divmod(step, self.steps_per_epoch(batch_size))
        first = position * batch_size
        drawn = Epoch(*(draw[first : first + batch_size] for draw in self._drawn(seed, epoch)))
        images = self._augment(self._images.train_images[drawn.order], drawn)
        return self._normalise(images), self._images.train_labels[drawn.order]

    def val_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset.val_batches`; normalised as the training part is, not augmented."""
        check_batch_size(batch_size)
        images, labels = self._images.val_images, self._images.val_labels
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield self._normalise(x), y

    def _drawn(self, seed: int, epoch: int) -> Epoch:
        """All that is random in an epoch: drawn once, so that a step copies nothing to the device.

        Everything is drawn whatever is switched on, so that a switch changes nothing else.
        """
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            labels = self._images.train_labels
            order = random_stream(ORDER, seed, epoch).permutation(len(labels))
            stream = random_stream(AUGMENTATION, seed, epoch)
            top, left = stream.integers(2 * self.crop_padding + 1, size=(2, len(labels)))
            flipped = stream.integers(2, size=len(labels)).astype(bool)
            angles = stream.uniform(-1, 1, size=len(labels)).astype(np.float32)
            draws = (order, top, left, flipped, angles * self.rotation_degrees)
            drawn = Epoch(*(to_device(draw, labels.device) for draw in draws))
            self._epoch = ((seed, epoch), drawn)
        return self._epoch[1]

    def _augment(self, images: Tensor, drawn: Epoch) -> Tensor:
        """Crop, flip and rotate, as configured."""
        if self.crop_padding:
            images = augment.crop(images, drawn.top, drawn.left, self.crop_padding)
        if self.flip:
            images = augment.flip(images, drawn.flipped)
        if self.rotation_degrees:
            images = augment.rotate(images.float(), drawn.degrees)
        return images

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._images.mean.view(-1, 1, 1), self._images.std.view(-1, 1, 1)
        return images.float().sub_(mean).div_(std)


class Digits(ImageDataset):
    """scikit-learn's digits: 1,797 grey images of 8 x 8 pixels, which its package ships.

    They are the test part of UCI's data set (13 people's handwriting) and have no split of their
    own. The last 360 (20%) are for validation: the images come person by person, so these are
    mostly by people that the training part does not know, which is harder than a random split.

    Args:
        crop_padding: black pixels around an image, out of which a random window is cut; 0 = off.
        flip: mirror every second image, by chance (a mirrored digit is rarely a digit).
        rotation_degrees: turn each image by an angle drawn from +- this; 0 = off.
    """

    VALIDATION_IMAGES = 360

    def __init__(
        self, crop_padding: int = 0, flip: bool = False, rotation_degrees: float = 0.0
    ) -> None:
        super().__init__(crop_padding, flip, rotation_degrees)

    @property
    def label(self) -> str:
        """The name of the data set."""
        return "scikit-learn digits"

    def _source(self) -> Hashable:
        return "digits"

    def _load(self) -> Images:
        # The file of sklearn.datasets.load_digits, because importing that takes over a second.
        package = importlib.util.find_spec("sklearn")
        folders = package.submodule_search_locations if package is not None else None
        files = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders or ()]
        file = next(filter(Path.exists, files), None)
        if file is None:
            raise DataError("scikit-learn, whose package holds the digits, is not installed")
        table = np.loadtxt(file, delimiter=",")
        # 17 levels of grey, 0 to 16, spread over 0 to 255.
        pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = table[:, -1].astype(np.int64)
        split = len(labels) - self.VALIDATION_IMAGES
        return Images.from_arrays(pixels[:split], labels[:split], pixels[split:], labels[split:])
