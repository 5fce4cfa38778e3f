"""Random crop, flip and rotation of a whole batch: a few tensor operations, no loop over images.

What is drawn comes in as arguments, so that each function is deterministic. Zero is black: these
work on raw pixels, before normalisation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Surround each image with `padding` black pixels and cut a window of the old size out of it.

    Args:
        images: `(B, C, H, W)` of any dtype.
        top: row of the padded image at which each window begins, int64 `(B,)` in [0, 2 padding].
        left: the same for columns.
        padding: black pixels added on every side, at least 0.

    Returns:
        `(B, C, H, W)` of the same dtype.
    """
    B, _, H, W = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view, (B, C, rows, columns, H, W)
    return windows[torch.arange(B, device=images.device), :, top, left]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right in the chosen images.

    Args:
        images: `(B, C, H, W)` of any dtype.
        chosen: bool `(B,)`.
    """
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image about its centre, with bilinear interpolation; what comes in is black.

    Args:
        images: floating-point `(B, C, H, W)`.
        degrees: `(B,)`, positive counter-clockwise.
    """
    _, _, H, W = images.shape
    radians = torch.deg2rad(degrees).to(images)[:, None, None]
    sine, cosine = radians.sin(), radians.cos()
    # Positions of the pixels' centres, in pixels from the centre of the image.
    y = (torch.arange(H, device=images.device, dtype=images.dtype) - (H - 1) / 2)[:, None]
    x = torch.arange(W, device=images.device, dtype=images.dtype) - (W - 1) / 2
    # Where each pixel of the result comes from, in grid_sample's units: -1 to 1 from edge to edge.
    source_x = (cosine * x - sine * y) * (2 / W)
    source_y = (sine * x + cosine * y) * (2 / H)
    grid = torch.stack((source_x, source_y), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)
