"""Batches of images, drawn and augmented; scikit-learn's digits."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.made_up import CPU, loaded, raw
from pnorm_decay.data import CIFAR10, DataError, Dataset, Digits, augment, base
from pnorm_decay.data.images import Epoch


def epoch(dataset: Dataset, batch_size: int, seed: int, number: int = 0) -> Iterator[Tensor]:
    steps = dataset.steps_per_epoch(batch_size)
    assert steps is not None
    for step in range(number * steps, (number + 1) * steps):
        yield dataset.train_batch(step, batch_size, seed)[1]


def test_digits_batch(digits: Digits) -> None:
    images, labels = digits.train_batch(0, 100, seed=0)
    assert images.shape == (100, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.shape == (100,)
    assert labels.dtype == torch.int64
    assert digits.model_args == {"num_classes": 10, "in_channels": 1}
    assert digits.steps_per_epoch(100) == 14
    assert digits.label == "scikit-learn digits"


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    dataset = Digits()
    dataset.setup(CPU)
    images, labels = zip(*dataset.val_batches(100), strict=True)
    assert [len(part) for part in labels] == [100, 100, 100, 60]
    bundle = load_digits()
    assert torch.equal(torch.cat(labels), torch.from_numpy(bundle.target[-360:]))
    levels = raw(dataset, torch.cat(images)).double() * 16 / 255
    assert np.array_equal(levels.round()[:, 0].numpy(), bundle.images[-360:])
    assert int(raw(dataset, torch.cat(images)).max()) == 255


def test_without_scikit_learn_there_are_no_digits(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="scikit-learn, whose package holds the digits"):
        Digits().setup(CPU)


def test_training_part_is_normalised(digits: Digits) -> None:
    images, _ = digits.train_batch(0, 1437, seed=0)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_every_epoch_is_another_permutation(digits: Digits) -> None:
    # A batch size that divides 1437: an epoch then holds every image once.
    order = [digits._drawn(seed=0, epoch=number).order for number in range(3)]
    for permutation in order:
        assert torch.equal(permutation.sort().values, torch.arange(1437))
    assert not torch.equal(order[0], order[1])
    for number in range(2):
        labels = torch.cat(list(epoch(digits, 479, seed=0, number=number)))
        assert torch.equal(labels, digits._images.train_labels[order[number]])


def test_an_incomplete_last_batch_is_dropped(digits: Digits) -> None:
    batches = list(epoch(digits, 500, seed=0))
    assert [len(labels) for labels in batches] == [500, 500]
    first_of_next = digits.train_batch(2, 500, seed=0)[1]
    assert torch.equal(
        first_of_next, digits._images.train_labels[digits._drawn(0, epoch=1).order[:500]]
    )


def test_train_batch_is_a_function_of_step_and_seed() -> None:
    options = {"crop_padding": 1, "flip": True, "rotation_degrees": 10.0}
    one, other = Digits(**options), Digits(**options)  # type: ignore[arg-type]
    one.setup(CPU)
    other.setup(CPU)
    expected = [one.train_batch(step, 64, seed=3) for step in range(50)]
    for step in [49, 0, 30, 22, 21]:  # in any order, across epochs
        for a, b in zip(expected[step], other.train_batch(step, 64, seed=3), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(expected[7][0], one.train_batch(7, 64, seed=4)[0])
    assert not torch.equal(expected[7][0], one.train_batch(8, 64, seed=3)[0])


def augmented(dataset: Digits, images: Tensor, seed: int, epoch: int) -> Tensor:
    """The images as the first ones of an epoch."""
    dataset.setup(CPU)
    drawn = dataset._drawn(seed, epoch)
    return dataset._augment(images, Epoch(*(draw[: len(images)] for draw in drawn)))


def test_augmentation_differs_between_epochs_and_seeds() -> None:
    dataset = Digits(crop_padding=2)
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(40, 1, 8, 8)
    drawn = [augmented(dataset, images, *key) for key in [(0, 0), (0, 1), (1, 0)]]
    assert len(torch.unique(torch.stack(drawn), dim=0)) == 3
    assert len(torch.unique(drawn[0], dim=0)) > 10  # and between the images of a batch


def test_a_switch_does_not_change_what_else_is_drawn() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(40, 1, 8, 8)
    plain = augmented(Digits(crop_padding=2), images, seed=0, epoch=0)
    flipped = augmented(Digits(crop_padding=2, flip=True), images, seed=0, epoch=0)
    chosen = (plain != flipped).flatten(1).any(dim=1)
    assert 5 < int(chosen.sum()) < 35
    assert torch.equal(flipped[chosen], plain[chosen].flip(3))


def test_validation_is_not_augmented(digits: Digits) -> None:
    augmented = Digits(crop_padding=2, flip=True, rotation_degrees=20)
    augmented.setup(CPU)
    for one, other in zip(digits.val_batches(360), augmented.val_batches(360), strict=True):
        assert torch.equal(one[0], other[0])


def test_a_second_instance_shares_what_the_first_has_loaded(digits: Digits) -> None:
    second = Digits(flip=True)
    second.setup(CPU)
    assert second._images is digits._images


def test_only_the_latest_data_set_is_kept(digits: Digits, copy: Path, cache: Path) -> None:
    dataset = loaded(copy, cache)
    assert base._latest is not None
    assert base._latest[1] is dataset._images
    again = Digits()
    again.setup(CPU)
    assert again._images is not digits._images


def test_bad_batch_arguments_are_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match=r"batch_size 1438 is larger than .* \(1,437\)"):
        digits.steps_per_epoch(1438)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        digits.train_batch(0, 0, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(digits.val_batches(0))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        digits.train_batch(0, 1, -1)
    with pytest.raises(RuntimeError, match="call setup"):
        Digits().train_batch(0, 1, 0)


@pytest.mark.parametrize("make", [Digits, CIFAR10])
def test_bad_options_are_refused(make: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match="crop_padding must not be negative, got -1"):
        make(crop_padding=-1)
    with pytest.raises(ValueError, match=r"rotation_degrees must be in \[0, 180\], got -5"):
        make(rotation_degrees=-5)
    with pytest.raises(ValueError, match="got nan"):
        make(rotation_degrees=float("nan"))


def test_crops_reach_every_offset() -> None:
    dataset = Digits(crop_padding=1)
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    windows = augmented(dataset, image.expand(500, 1, 8, 8), seed=0, epoch=0)
    assert len(torch.unique(windows, dim=0)) == 9


def test_angles_fill_the_range() -> None:
    seen: list[Tensor] = []

    def record(images: Tensor, degrees: Tensor) -> Tensor:
        seen.append(degrees)
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "rotate", record)
        images = torch.zeros(1000, 1, 8, 8, dtype=torch.uint8)
        augmented(Digits(rotation_degrees=10), images, seed=0, epoch=0)
    assert -10 <= seen[0].min() < -9.5
    assert 9.5 < seen[0].max() <= 10
    assert seen[0].mean().abs() < 1
