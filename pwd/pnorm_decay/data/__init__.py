"""The data sets, each whole on the device behind one interface, `Dataset`."""

from pnorm_decay.data.base import DataError, Dataset
from pnorm_decay.data.cifar10 import CIFAR10
from pnorm_decay.data.images import Digits
from pnorm_decay.data.text import PydocTopics, TinyShakespeare

__all__ = ["CIFAR10", "DataError", "Dataset", "Digits", "PydocTopics", "TinyShakespeare"]
