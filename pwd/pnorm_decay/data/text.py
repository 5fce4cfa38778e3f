"""Character-level text: Python's own pydoc topics, and Tiny Shakespeare."""

import platform
import string
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnorm_decay.data.base import (
    DataError,
    Dataset,
    check_batch_size,
    keep_latest,
    random_stream,
    to_device,
)
from pnorm_decay.data.cache import cache_write
from pnorm_decay.data.download import check_sha256, download
from pnorm_decay.data.sources import check_regular

TRAIN_FRACTION = 0.9
BLOCK_STARTS = 2  # this module's purpose for random_stream
STEPS_A_DRAW = 1000


class Tokens(NamedTuple):
    """A text split in two: int64 vectors, and the number of different characters in it."""

    train: Tensor
    val: Tensor
    vocab_size: int


def encode(text: str) -> tuple[np.ndarray, list[str]]:
    """Number the characters of a text in sorted order.

    Returns:
        int64 tokens of shape `(len(text),)`, and the vocabulary: token i stands for its item i.
    """
    vocabulary = sorted(set(text))
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    table = np.zeros(ord(vocabulary[-1]) + 1, dtype=np.int64)
    table[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    return table[codes], vocabulary


class TextDataset(Dataset):
    """A text of which the first 90% are for training and the rest for validation.

    Args:
        block_size: tokens in a training example.

    Raises:
        ValueError: `block_size` is below 1.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self._loaded: Tokens | None = None
        self._drawn: tuple[tuple[int, int, int], Tensor] | None = None

    @abstractmethod
    def _text(self) -> str:
        """Read the whole text."""

    @abstractmethod
    def _source(self) -> str:
        """Say where the text comes from: instances that agree share what is loaded."""

    def setup(self, device: torch.device) -> None:
        """See `Dataset.setup`.

        Raises:
            DataError: the text is missing or has a wrong checksum.
            ValueError: the text is too short for `block_size`.
        """

        def load() -> Tokens:
            tokens, vocabulary = encode(self._text())
            split = int(TRAIN_FRACTION * len(tokens))
            whole = torch.from_numpy(tokens).to(device)
            return Tokens(whole[:split], whole[split:], len(vocabulary))

        loaded = keep_latest((type(self), self._source(), str(device)), load)
        if self.block_size >= len(loaded.train):
            raise ValueError(
                f"block_size {self.block_size} is too large: "
                f"the training part has {len(loaded.train):,} characters"
            )
        self._loaded = loaded
        self._drawn = None

    @property
    def _tokens(self) -> Tokens:
        if self._loaded is None:
            raise RuntimeError("call setup(device) before using the data")
        return self._loaded

    @property
    def model_args(self) -> dict[str, int]:
        """`vocab_size`: the number of different characters in the whole text."""
        return {"vocab_size": self._tokens.vocab_size}

    def vocabulary(self) -> list[str]:
        """The characters of the whole text, in the order of their tokens.

        Raises:
            DataError: the text is missing or has a wrong checksum.
        """
        return encode(self._text())[1]

    def steps_per_epoch(self, batch_size: int) -> int | None:
        """None: blocks start anywhere, so there are no epochs."""
        check_batch_size(batch_size)
        return None

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Blocks from random places of the training part.

        Returns:
            x and y, int64 `(batch_size, block_size)`; y is x one character further on.
        """
        check_batch_size(batch_size)
        windows = self._tokens.train.unfold(0, self.block_size, 1)
        starts = self._starts(seed, step // STEPS_A_DRAW, batch_size)[step % STEPS_A_DRAW]
        return windows[starts], windows[starts + 1]

    def _starts(self, seed: int, number: int, batch_size: int) -> Tensor:
        """Where the blocks of many steps begin, int64 (steps, batch), on the device.

        Drawn many at a time, so that a step copies nothing to the device.
        """
        key = (seed, number, batch_size)
        if self._drawn is None or self._drawn[0] != key:
            train = self._tokens.train
            stream = random_stream(BLOCK_STARTS, seed, number)
            size = (STEPS_A_DRAW, batch_size)
            starts = stream.integers(len(train) - self.block_size, size=size)
            self._drawn = (key, to_device(starts, train.device))
        return self._drawn[1]

    def val_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive blocks in which every character but the first is a target exactly once.

        Yields:
            x and y, int64 `(B, block_size)` with B at most `batch_size`; at the end, one shorter
            block `(1, rest)` if the text does not divide evenly.
        """
        check_batch_size(batch_size)
        val = self._tokens.val
        whole = (len(val) - 1) // self.block_size
        x, y = (
            val[shift : shift + whole * self.block_size].view(whole, self.block_size)
            for shift in (0, 1)
        )
        if whole:
            yield from zip(x.split(batch_size), y.split(batch_size), strict=True)
        rest = val[whole * self.block_size :]
        if len(rest) > 1:
            yield rest[None, :-1], rest[None, 1:]


class PydocTopics(TextDataset):
    """The reference text that every Python installation carries as `pydoc_data.topics`.

    It differs from one Python version to the next, so the label names the version. Many topics
    repeat one another; a paragraph is kept where it occurs first and dropped afterwards, or the
    validation part (the last topics in the alphabet) would partly be found in the training part.

    Args:
        block_size: tokens in a training example.
    """

    @property
    def label(self) -> str:
        """The text, with the version of Python."""
        return f"pydoc topics of Python {platform.python_version()}"

    def _source(self) -> str:
        return "pydoc_data.topics"

    def _text(self) -> str:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name].strip() for name in sorted(topics))
        return "\n\n".join(dict.fromkeys(text.split("\n\n")))


class TinyShakespeare(TextDataset):
    """Karpathy's Tiny Shakespeare, 1,115,394 characters: the file of every nanoGPT run.

    Args:
        block_size: tokens in a training example.
        path: a local copy; None (or an empty string) for the one in `cache_dir`, which is
            downloaded when it is not there. Its checksum is verified either way.
        cache_dir: folder for the downloaded file.
    """

    URL = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    LARGEST = 2**21  # bytes; it has 1,115,394
    FILE_NAME = "tinyshakespeare.txt"
    CHARACTERS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase

    def __init__(
        self, block_size: int, path: str | Path | None = None, cache_dir: str | Path = "data"
    ) -> None:
        super().__init__(block_size)
        self.cached = Path(cache_dir) / self.FILE_NAME
        self.path = Path(path) if path else self.cached
        self._is_local = bool(path)

    @property
    def label(self) -> str:
        """The name of the text."""
        return "Tiny Shakespeare"

    def vocabulary(self) -> list[str]:
        """The characters of the text, in the order of their tokens; known without the file."""
        return list(self.CHARACTERS)

    def prepare(self) -> Path:
        """Put the checked text into the cache folder, where runs without a `path` find it.

        Returns:
            The file in `cache_dir`.

        Raises:
            DataError: it is missing and cannot be downloaded, or has a wrong checksum.
        """
        content = self._content()
        if self.path != self.cached:
            with cache_write(self.cached) as file:
                file.write(content)
        return self.cached

    def _source(self) -> str:
        return str(self.path.resolve())

    def _text(self) -> str:
        return self._content().decode("utf-8")

    def _content(self) -> bytes:
        if not self._is_local and not self.path.exists():
            return self._download()
        try:
            check_regular(self.path, self.LARGEST)
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        check_sha256(content, self.SHA256, self.path)
        return content

    def _download(self) -> bytes:
        try:
            content = download(self.URL, self.SHA256, self.LARGEST)
        except DataError as error:
            raise DataError(
                f"{error}. Put that file at {self.cached}, or set data.path=... "
                "(or the environment variable PNORM_SHAKESPEARE) to a local copy."
            ) from error
        with cache_write(self.cached) as file:
            file.write(content)
        return content
