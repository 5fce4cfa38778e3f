"""ResNet18 in its CIFAR form, with a `width` that scales it down to a laptop."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `stride` halves the image in the first of them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet18 for small images: 3x3 stem, no max-pool, strides 1, 2, 2, 2.

    At `width=64`, three input channels and ten classes it has the paper's 11,173,962 parameters.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the others have two, four and eight times as many.

    Raises:
        ValueError: one of them is below 1.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            self._stage(width, width, stride=1),
            self._stage(width, 2 * width, stride=2),
            self._stage(2 * width, 4 * width, stride=2),
            self._stage(4 * width, 8 * width, stride=2),
        )
        self.head = nn.Linear(8 * width, num_classes)
        self._initialise()

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, stride=1),
        )

    def _initialise(self) -> None:
        # No tensor of two or more dimensions starts at zero: for p < 2 zero is absorbing under
        # pWD, so a zero-initialised weight would never move.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            images: float `(B, in_channels, H, W)`; any H and W from 1 on.

        Returns:
            Logits `(B, num_classes)`.
        """
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.stages(x)
        return self.head(torch.mean(x, dim=(2, 3)))
