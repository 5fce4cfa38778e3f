"""Augmentation of a batch, against one image at a time."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from pnorm_decay.data import augment


def test_crop_equals_cropping_one_by_one() -> None:
    images = torch.randint(256, (30, 3, 9, 12), dtype=torch.uint8)
    top, left = torch.randint(9, (2, 30))
    result = augment.crop(images, top, left, padding=4)
    for image, row, column, cropped in zip(images, top, left, result, strict=True):
        padded = F.pad(image, (4, 4, 4, 4))
        assert torch.equal(cropped, padded[:, row : row + 9, column : column + 12])


def test_flip_equals_flipping_one_by_one() -> None:
    images = torch.randint(256, (20, 3, 8, 6), dtype=torch.uint8)
    chosen = torch.arange(20) % 3 == 0
    result = augment.flip(images, chosen)
    for image, mirrored, flipped in zip(images, chosen, result, strict=True):
        assert torch.equal(flipped, reference.hflip(image) if mirrored else image)


@pytest.mark.parametrize("size", [(32, 32), (20, 32)])
def test_rotation_equals_torchvisions_one_by_one(size: tuple[int, int]) -> None:
    images = torch.rand(9, 3, *size) * 255
    degrees = torch.linspace(-40, 40, 9)
    result = augment.rotate(images, degrees)
    for image, angle, rotated in zip(images, degrees, result, strict=True):
        expected = reference.rotate(image, angle.item(), InterpolationMode.BILINEAR)
        torch.testing.assert_close(rotated, expected, atol=0.05, rtol=0)


def test_rotation_by_zero_changes_nothing() -> None:
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(augment.rotate(images, torch.zeros(2)), images)
