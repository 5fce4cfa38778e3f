"""The two model families of the paper: a CIFAR ResNet18 and nanoGPT's character model."""

from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18

__all__ = ["GPT", "ResNet18"]
