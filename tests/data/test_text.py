import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pnorm_decay.data import DataError, PydocTopics, TinyShakespeare, text
from pnorm_decay.data.cache import cache_write

CPU = torch.device("cpu")
CONTENT = ("To be, or not to be, that is the question:\n" * 9 + "Ω").encode()


@pytest.fixture
def local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short text that passes for Tiny Shakespeare, at an address that works without network."""
    path = tmp_path / "input.txt"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(TinyShakespeare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(TinyShakespeare, "URL", path.as_uri())
    return path


@pytest.fixture
def pydoc() -> PydocTopics:
    dataset = PydocTopics(block_size=16)
    dataset.setup(CPU)
    return dataset


def decode(tokens: Tensor, vocabulary: list[str]) -> str:
    return "".join(vocabulary[token] for token in tokens.tolist())


def test_encode_numbers_the_characters_in_sorted_order() -> None:
    tokens, vocabulary = text.encode("bañc a🎈")
    assert vocabulary == [" ", "a", "b", "c", "ñ", "🎈"]
    assert tokens.tolist() == [2, 1, 4, 3, 0, 1, 5]


def test_setup_splits_the_whole_text(local_copy: Path) -> None:
    dataset = TinyShakespeare(block_size=4, path=local_copy)
    dataset.setup(CPU)
    vocabulary = sorted(set(CONTENT.decode()))
    # The last character occurs in the validation part only, and is in the vocabulary.
    assert dataset.model_args == {"vocab_size": len(vocabulary)}
    x, y = zip(*dataset.val_batches(1), strict=True)
    val = decode(torch.cat([x[0][0, :1], *(part.flatten() for part in y)]), vocabulary)
    assert val == CONTENT.decode()[int(0.9 * len(CONTENT.decode())) :]


def test_train_batch_shapes_and_shift(pydoc: PydocTopics) -> None:
    x, y = pydoc.train_batch(step=3, batch_size=5, seed=0)
    assert x.shape == y.shape == (5, 16)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert 0 <= int(x.min()) <= int(x.max()) < pydoc.model_args["vocab_size"]


def test_train_batch_is_a_function_of_step_and_seed(pydoc: PydocTopics) -> None:
    first = pydoc.train_batch(7, 8, seed=1)
    pydoc.train_batch(0, 8, seed=5)
    again = PydocTopics(block_size=16)
    again.setup(CPU)
    for one, other in zip(first, again.train_batch(7, 8, seed=1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first[0], pydoc.train_batch(8, 8, seed=1)[0])
    assert not torch.equal(first[0], pydoc.train_batch(7, 8, seed=2)[0])
    assert not torch.equal(first[0], pydoc.train_batch(1, 8, seed=7)[0])


def test_training_blocks_come_from_everywhere_and_stay_inside(local_copy: Path) -> None:
    dataset = TinyShakespeare(block_size=4, path=local_copy)
    dataset.setup(CPU)
    tokens, _ = text.encode(CONTENT.decode())
    train = torch.from_numpy(tokens)[: int(0.9 * len(tokens))]
    allowed = {tuple(window) for window in train.unfold(0, 5, 1).tolist()}
    x, y = dataset.train_batch(0, 5000, seed=0)
    seen = {tuple(row) for row in torch.cat([x, y[:, -1:]], dim=1).tolist()}
    assert seen == allowed


@pytest.mark.parametrize(("block_size", "batch_size"), [(16, 7), (1, 1000), (100_000, 2), (37, 1)])
def test_validation_predicts_every_character_once(block_size: int, batch_size: int) -> None:
    dataset = PydocTopics(block_size)
    dataset.setup(CPU)
    batches = list(dataset.val_batches(batch_size))
    assert all(x.shape == y.shape for x, y in batches)
    assert all(len(x) <= batch_size for x, _ in batches)
    x = torch.cat([x.flatten() for x, _ in batches])
    y = torch.cat([y.flatten() for _, y in batches])
    tokens, _ = text.encode(dataset._text())
    val = torch.from_numpy(tokens)[int(0.9 * len(tokens)) :]
    assert torch.equal(x, val[:-1])
    assert torch.equal(y, val[1:])


def test_pydoc_validation_paragraphs_are_new() -> None:
    paragraphs = PydocTopics(1)._text().split("\n\n")
    assert len(paragraphs) > 1000
    assert len(set(paragraphs)) == len(paragraphs)


def test_labels_need_no_setup() -> None:
    import platform

    assert PydocTopics(1).label == f"pydoc topics of Python {platform.python_version()}"
    assert TinyShakespeare(1, path="nowhere").label == "Tiny Shakespeare"


def test_there_are_no_epochs(pydoc: PydocTopics) -> None:
    assert pydoc.steps_per_epoch(64) is None


def test_a_second_instance_shares_what_the_first_has_loaded(
    pydoc: PydocTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PydocTopics, "_text", lambda _: pytest.fail("read again"))
    second = PydocTopics(block_size=8)
    second.setup(CPU)
    assert second.model_args == pydoc.model_args


def test_another_text_is_not_mistaken_for_the_latest(pydoc: PydocTopics, local_copy: Path) -> None:
    dataset = TinyShakespeare(4, path=local_copy)
    dataset.setup(CPU)
    assert dataset.model_args != pydoc.model_args


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_below_one_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        PydocTopics(block_size)


def test_block_size_beyond_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size 10000000 is too large"):
        PydocTopics(10_000_000).setup(CPU)


def test_the_longest_possible_block_works(local_copy: Path) -> None:
    longest = int(0.9 * len(CONTENT.decode())) - 1
    dataset = TinyShakespeare(longest, path=local_copy)
    dataset.setup(CPU)
    x, _ = dataset.train_batch(0, 2, 0)
    assert x.shape == (2, longest)
    with pytest.raises(ValueError, match="too large"):
        TinyShakespeare(longest + 1, path=local_copy).setup(CPU)


def test_bad_batch_arguments_are_refused(pydoc: PydocTopics) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pydoc.train_batch(0, 0, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        next(pydoc.val_batches(-1))
    with pytest.raises(ValueError, match="not be negative, got -5 and 0"):
        pydoc.train_batch(0, 1, -5)


def test_use_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call setup"):
        PydocTopics(4).train_batch(0, 1, 0)


def test_download_is_kept_and_not_repeated(local_copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert TinyShakespeare(4, cache_dir=cache).prepare() == cache / "tinyshakespeare.txt"
    assert [file.name for file in cache.iterdir()] == ["tinyshakespeare.txt"]
    assert (cache / "tinyshakespeare.txt").read_bytes() == CONTENT
    local_copy.unlink()
    dataset = TinyShakespeare(4, path="", cache_dir=cache)
    dataset.setup(CPU)
    assert dataset.model_args["vocab_size"] == len(set(CONTENT.decode()))


def test_local_copy_is_prepared_into_the_cache(local_copy: Path, tmp_path: Path) -> None:
    cached = TinyShakespeare(4, path=local_copy, cache_dir=tmp_path / "cache").prepare()
    assert cached.read_bytes() == CONTENT


def test_a_local_copy_is_not_copied_by_a_run(local_copy: Path, tmp_path: Path) -> None:
    TinyShakespeare(4, path=local_copy, cache_dir=tmp_path / "cache").setup(CPU)
    assert not (tmp_path / "cache").exists()


def test_without_network_the_message_says_what_to_do(
    local_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_copy.unlink()
    with pytest.raises(DataError) as caught:
        TinyShakespeare(4, cache_dir=tmp_path / "cache").setup(CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert TinyShakespeare.URL in message
    assert str(tmp_path / "cache" / "tinyshakespeare.txt") in message
    assert "data.path=" in message
    assert "PNORM_SHAKESPEARE" in message
    assert not (tmp_path / "cache").exists()


def test_a_download_with_a_wrong_checksum_leaves_nothing(local_copy: Path, tmp_path: Path) -> None:
    local_copy.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=r"wrong checksum: sha256 \w+…, expected") as caught:
        TinyShakespeare(4, cache_dir=tmp_path / "cache").setup(CPU)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_a_local_copy_with_a_wrong_checksum_is_refused_by_name(local_copy: Path) -> None:
    local_copy.write_bytes(CONTENT + b"!")
    with pytest.raises(DataError, match=r"input\.txt has a wrong checksum"):
        TinyShakespeare(4, path=local_copy).setup(CPU)


def test_a_local_copy_that_might_never_end_is_refused_by_name(
    local_copy: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(DataError, match=f"{path} is not a regular file"):
            TinyShakespeare(4, path=path).setup(CPU)
    local_copy.write_bytes(bytes(2**21 + 1))
    with pytest.raises(DataError, match=r"input\.txt has 2,097,153 bytes, more than"):
        TinyShakespeare(4, path=local_copy).setup(CPU)


def test_a_missing_local_copy_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.txt: No such file"):
        TinyShakespeare(4, path=tmp_path / "none.txt").setup(CPU)


def test_the_real_file(shared_file: Callable[[str], Path]) -> None:
    dataset = TinyShakespeare(64, path=shared_file("tinyshakespeare.txt"))
    dataset.setup(CPU)
    assert dataset.model_args == {"vocab_size": 65}
    # nanoGPT's prepare.py: 1,003,854 training and 111,540 validation tokens.
    assert sum(y.numel() for _, y in dataset.val_batches(512)) == 111_540 - 1


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with cache_write(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_two_writers_at_once_both_end_well(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with cache_write(target) as slow:
        slow.write(b"slow ")
        with cache_write(target) as quick:
            quick.write(b"quick")
        assert target.read_bytes() == b"quick"
        slow.write(b"but whole")
    assert target.read_bytes() == b"slow but whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        with cache_write(target) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new"


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"cannot write .*file/inside: "),
        cache_write(tmp_path / "file" / "inside"),
    ):
        pytest.fail("opened a file below a file")


def test_the_characters_of_tokens(shared_file: Callable[[str], Path]) -> None:
    path = shared_file("tinyshakespeare.txt")
    assert TinyShakespeare(64).vocabulary() == text.encode(path.read_text())[1]
    assert PydocTopics(64).vocabulary() == text.encode(PydocTopics(64)._text())[1]
