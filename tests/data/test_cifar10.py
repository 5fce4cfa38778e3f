"""CIFAR-10: from image files and in its original form."""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from data.made_up import (
    ARCHIVES,
    CPU,
    PER_CLASS,
    assert_holds_the_copy,
    encoded,
    loaded,
    pack,
    pixels,
    raw,
    write_copy,
)
from pnorm_decay.data import CIFAR10, DataError, base, cifar10
from pnorm_decay.data.cache import Images
from pnorm_decay.data.sources import read_images

# CIFAR-10 from image files


def test_folder(copy: Path, cache: Path) -> None:
    dataset = loaded(copy, cache)
    assert_holds_the_copy(dataset)
    assert dataset.model_args == {"num_classes": 10, "in_channels": 3}


def test_folder_below_one_top_folder(tmp_path: Path, cache: Path) -> None:
    write_copy(tmp_path / "outer" / "cifar10")
    assert_holds_the_copy(loaded(tmp_path / "outer", cache))


@pytest.mark.parametrize("top", [".", "cifar10"])
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive(copy: Path, cache: Path, tmp_path: Path, suffix: str, top: str) -> None:
    archive = pack(copy, tmp_path / f"images{suffix}", top)
    shutil.rmtree(copy)
    assert_holds_the_copy(loaded(archive, cache))
    assert len(list(cache.iterdir())) == 1  # the cache, and nothing extracted


def test_order_in_the_archive_does_not_matter(copy: Path, cache: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(copy.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(copy))
    assert_holds_the_copy(loaded(tmp_path / "images.zip", cache))


def test_other_files_are_passed_over(copy: Path, cache: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("what this is")
    (copy / "sample.png").write_bytes(b"outside train and test")
    (copy / "train" / "labels.txt").write_text("airplane")
    (copy / "train" / "cat" / "._0000.png").write_bytes(b"macOS litter")
    (copy / "train" / "cat" / "list.csv").write_text("0000.png")
    assert_holds_the_copy(loaded(copy, cache))
    assert_holds_the_copy(loaded(pack(copy, tmp_path / "images.tar"), cache))


@pytest.mark.parametrize(
    ("kind", "suffix", "label"),
    [
        ("png", ".png", "CIFAR-10"),
        ("jpeg", ".jpg", "CIFAR-10, JPEG copy"),
        ("jpeg", ".JPEG", "CIFAR-10, JPEG copy"),
        ("jpeg", ".png", "CIFAR-10, JPEG copy"),  # what is inside counts
    ],
)
def test_label_tells_jpeg_copies(
    tmp_path: Path, cache: Path, kind: str, suffix: str, label: str
) -> None:
    folder = write_copy(tmp_path / "images", kind, suffix)
    for path in (folder, pack(folder, tmp_path / "images.tar.xz")):
        dataset = CIFAR10(path, cache)
        # 50 images are not the 60,000 that the name promises; a record must not hide it.
        assert dataset.label == f"{label}, 50 of 60,000 images"
    dataset.setup(CPU)
    assert dataset.label == f"{label}, 50 of 60,000 images"


def test_the_content_is_known_without_reading_the_images(
    copy: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(copy, moved)
    first = CIFAR10(copy, cache).identity
    assert CIFAR10(moved, cache).identity == first  # wherever it lies
    monkeypatch.setattr(Images, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(cifar10, "decode_copy", lambda *_: pytest.fail("decoded"))
    assert CIFAR10(copy, cache).identity == first


def test_another_pixel_or_label_or_number_is_another_identity(copy: Path, cache: Path) -> None:
    seen = {CIFAR10(copy, cache).identity}
    (copy / "test" / "airplane" / "0000.png").write_bytes(encoded(np.zeros((32, 32, 3), np.uint8)))
    seen.add(CIFAR10(copy, cache).identity)
    shutil.copy(copy / "train" / "cat" / "0000.png", copy / "train" / "cat" / "1000.png")
    seen.add(CIFAR10(copy, cache).identity)
    (copy / "train" / "cat" / "1000.png").rename(copy / "train" / "dog" / "1000.png")
    seen.add(CIFAR10(copy, cache).identity)
    assert len(seen) == 4


def test_a_cache_of_an_older_version_is_summed_up(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CIFAR10(copy, cache).identity
    (path,) = cache.iterdir()
    with np.load(path) as arrays:
        older = {name: arrays[name] for name in arrays.files if name != "content"}
    np.savez(path, **older)
    monkeypatch.setattr(cifar10, "decode_copy", lambda *_: pytest.fail("decoded"))
    assert CIFAR10(copy, cache).identity == expected
    assert Images.read_content(path).sha256 in expected


def test_the_copy_of_the_recorded_runs_and_the_original_are_known_by_their_label(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = CIFAR10(copy, cache)
    assert dataset.identity.startswith(f"{dataset.label}, sha256 ")
    monkeypatch.setattr(cifar10, "RECORDED_COPY", dataset.identity.rpartition(" ")[2])
    assert CIFAR10(copy, cache).identity == dataset.label
    assert CIFAR10(None, cache).identity == "CIFAR-10"


def test_jpeg_pixels_are_decoded(tmp_path: Path, cache: Path) -> None:
    dataset = loaded(write_copy(tmp_path / "images", "jpeg", ".jpg"), cache)
    images, _ = next(dataset.val_batches(1))
    content = encoded(pixels("test", "airplane", 0), "jpeg")
    expected = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(raw(dataset, images)[0].permute(1, 2, 0).numpy(), expected)


def test_cache_is_used_instead_of_decoding(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(copy, cache)
    monkeypatch.setattr(base, "_latest", None)
    monkeypatch.setattr(cifar10, "decode_copy", lambda *_: pytest.fail("decoded again"))
    assert_holds_the_copy(loaded(copy, cache))


def test_changed_sources_are_decoded_again(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(copy, cache)
    monkeypatch.setattr(base, "_latest", None)
    changed = copy / "test" / "airplane" / "0000.png"
    state = changed.stat()
    changed.write_bytes(encoded(np.zeros((32, 32, 3), np.uint8)))
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    dataset = loaded(copy, cache)
    assert int(raw(dataset, next(dataset.val_batches(1))[0]).max()) == 0


def test_other_sources_have_other_caches(copy: Path, cache: Path, tmp_path: Path) -> None:
    jpeg = write_copy(tmp_path / "jpeg", "jpeg", ".jpg")
    loaded(copy, cache)
    assert loaded(jpeg, cache).label.startswith("CIFAR-10, JPEG copy")
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_cache_is_made_again(
    copy: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    cached = CIFAR10(copy, cache).prepare()
    content = bytearray(cached.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 255
    cached.write_bytes(content[: {"truncated": 1000, "empty": 0}.get(damage)])
    assert_holds_the_copy(loaded(copy, cache))
    assert f"{cached} is damaged" in caplog.text
    monkeypatch.setattr(cifar10, "decode_copy", lambda *_: pytest.fail("not repaired"))
    CIFAR10(copy, cache).prepare()


def test_a_full_disk_leaves_no_half_cache(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: io.BufferedWriter, **_: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(DataError, match=r"cannot write .*\.npz: No space left on device"):
            loaded(copy, cache)
    assert list(cache.iterdir()) == []
    assert_holds_the_copy(loaded(copy, cache))


def test_an_interrupt_while_decoding_leaves_nothing(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Images:
        raise KeyboardInterrupt

    monkeypatch.setattr(Images, "from_arrays", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CIFAR10(copy, cache).prepare()
    assert not cache.exists()


def test_two_decoders_at_once_both_end_well(copy: Path, cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(lambda _: CIFAR10(copy, cache).prepare(), range(2)))
    assert list(cache.iterdir()) == [files[0]] == [files[1]]
    assert_holds_the_copy(loaded(copy, cache))


def assert_refused(path: Path, cache: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        loaded(path, cache)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_class_is_named(copy: Path, cache: Path, split: str) -> None:
    shutil.rmtree(copy / split / "frog")
    assert_refused(copy, cache, rf"{split}/frog is missing or has no images")


def test_an_empty_class_is_named(copy: Path, cache: Path) -> None:
    for file in (copy / "train" / "truck").iterdir():
        file.unlink()
    assert_refused(copy, cache, r"train/truck is missing or has no images")


def test_an_unknown_class_is_named(copy: Path, cache: Path) -> None:
    (copy / "train" / "cat").rename(copy / "train" / "lion")
    assert_refused(copy, cache, r"train/lion/000\d\.png is not in the folder of a CIFAR-10 class")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((28, 32, 3), np.uint8), "32 x 28 RGB"),
        (np.zeros((32, 32), np.uint8), "32 x 32 L"),
        (np.zeros((32, 32, 4), np.uint8), "32 x 32 RGBA"),
    ],
)
def test_an_image_of_the_wrong_kind_is_named(
    copy: Path, cache: Path, array: np.ndarray, found: str
) -> None:
    (copy / "test" / "dog" / "0001.png").write_bytes(encoded(array))
    assert_refused(copy, cache, rf"test/dog/0001\.png is {found}, CIFAR-10 is 32 x 32 RGB")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_truncated_image_is_named(tmp_path: Path, cache: Path, kind: str) -> None:
    folder = write_copy(tmp_path / "images", kind)
    file = folder / "test" / "dog" / "0001.png"
    file.write_bytes(file.read_bytes()[:-200])
    assert_refused(folder, cache, r"test/dog/0001\.png is truncated or damaged")


def test_a_damaged_image_is_named(copy: Path, cache: Path) -> None:
    (copy / "test" / "dog" / "0001.png").write_bytes(b"\x89PNG but no more")
    assert_refused(copy, cache, r"test/dog/0001\.png is truncated or damaged")


def test_what_is_no_image_is_named(copy: Path, cache: Path) -> None:
    (copy / "test" / "dog" / "0001.png").write_bytes(b"GIF89a")
    assert_refused(copy, cache, r"test/dog/0001\.png is unknown, the first image is png")


def test_mixed_formats_are_refused(copy: Path, cache: Path) -> None:
    (copy / "test" / "dog" / "0001.png").write_bytes(encoded(pixels("test", "dog", 1), "jpeg"))
    assert_refused(copy, cache, r"test/dog/0001\.png is jpeg, the first image is png")


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_named(
    copy: Path, cache: Path, tmp_path: Path, suffix: str, share: float
) -> None:
    archive = pack(copy, tmp_path / f"images{suffix}")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    assert_refused(archive, cache, "is truncated or damaged: ")


@pytest.mark.parametrize("cut", [0, 300])
def test_a_tar_that_ends_between_members_is_noticed(
    copy: Path, cache: Path, tmp_path: Path, cut: int
) -> None:
    # tarfile itself takes this for a complete archive: every class is there, some images are not.
    archive = pack(copy, tmp_path / "images.tar")
    with tarfile.open(archive) as file:
        last = file.getmembers()[-1]
    archive.write_bytes(archive.read_bytes()[: last.offset + cut])
    assert_refused(archive, cache, "is truncated or damaged: the end-of-archive mark is missing")


def test_a_damaged_header_inside_a_tar_is_noticed(copy: Path, cache: Path, tmp_path: Path) -> None:
    archive = pack(copy, tmp_path / "images.tar")
    with tarfile.open(archive) as file:
        last = file.getmembers()[-1]
    content = bytearray(archive.read_bytes())
    content[last.offset] ^= 255
    archive.write_bytes(content)
    assert_refused(archive, cache, "is truncated or damaged: something else")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz"])
def test_a_wrong_checksum_at_the_end_of_an_archive_is_noticed(
    copy: Path, cache: Path, tmp_path: Path, suffix: str
) -> None:
    archive = pack(copy, tmp_path / f"images{suffix}")
    content = bytearray(archive.read_bytes())
    content[-6] ^= 255
    archive.write_bytes(content)
    assert_refused(archive, cache, "CRC|Corrupt|truncated or damaged")


def test_a_missing_path_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "nowhere.zip"
    assert_refused(path, cache, r"data\.path=.*PNORM_CIFAR10.* must name a local copy")
    with pytest.raises(DataError, match=str(path)):
        _ = CIFAR10(path, cache).label


def test_another_kind_of_file_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "images.rar"
    path.write_bytes(b"Rar!")
    assert_refused(path, cache, r"neither a folder nor an archive \(\.tar, ")


def test_what_is_no_regular_file_is_named(copy: Path, cache: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    assert_refused(pipe, cache, r"pipe\.tar is not a regular file")
    device = tmp_path / "device.zip"
    device.symlink_to("/dev/zero")
    assert_refused(device, cache, r"device\.zip is not a regular file")
    os.mkfifo(copy / "train" / "cat" / "9999.png")
    assert_refused(copy, cache, r"9999\.png is not a regular file")


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_a_file_larger_than_an_image_can_be_is_named(
    copy: Path, cache: Path, tmp_path: Path, suffix: str
) -> None:
    image = copy / "train" / "cat" / "0000.png"
    image.write_bytes(image.read_bytes() + bytes(2**20))
    source = pack(copy, tmp_path / f"large{suffix}") if suffix else copy
    assert_refused(
        source, cache, r"cat/0000\.png has 1,0\d\d,\d\d\d bytes, more than the 1,048,576"
    )


def test_more_images_than_there_are_is_said(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "IMAGE_COUNT", 10)
    assert_refused(copy, cache, "holds more than the 10 images of CIFAR-10")


def test_a_folder_without_images_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "train").mkdir()
    assert_refused(tmp_path, cache, r"holds no train/<class>/\*\.png or \*\.jpg")


def test_an_unwritable_cache_folder_is_named(copy: Path, cache: Path) -> None:
    cache.touch()
    with pytest.raises(DataError, match=rf"cannot write {cache}"):
        loaded(copy, cache)


def test_the_real_copy(shared_file: Callable[[str], Path]) -> None:
    archive = shared_file("cifar10-jpeg.tar.xz")
    assert cifar10.find_kind(archive) == "jpeg"
    first = next(read_images(archive))
    assert first.place == "train/airplane/0000.jpg"
    assert cifar10._decode(archive, first).shape == (32, 32, 3)


# CIFAR-10 in its original form


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a web server on this machine shows the test's folder (torchvision needs http)."""
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def original(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive that torchvision takes for the original and can download."""
    folder = tmp_path / "made" / cifar10.ORIGINAL_FOLDER
    folder.mkdir(parents=True)
    for split, name in (("train", "data_batch_1"), ("test", "test_batch")):
        count = PER_CLASS[split]
        places = [(label, index) for index in range(count) for label in range(10)]
        rows = [pixels(split, cifar10.CLASSES[label], index) for label, index in places]
        batch = {
            "data": np.stack(rows).transpose(0, 3, 1, 2).reshape(len(rows), -1),
            "labels": [label for label, _ in places],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.CLASSES)}))
    archive = pack(folder, tmp_path / "elsewhere.tar.gz", cifar10.ORIGINAL_FOLDER)
    md5 = datasets.utils.calculate_md5
    original = datasets.CIFAR10
    monkeypatch.setattr(original, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(original, "tgz_md5", md5(archive))
    monkeypatch.setattr(original, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(original, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = {**original.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(original, "meta", meta)
    return archive


def assert_holds_the_original(dataset: CIFAR10, cache: Path) -> None:
    images, labels = next(iter(dataset.val_batches(1000)))
    assert labels.tolist() == [*range(10)] * 2
    expected = [pixels("test", name, index) for index in range(2) for name in cifar10.CLASSES]
    assert torch.equal(
        raw(dataset, images).permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected))
    )
    assert dataset.label == "CIFAR-10"  # torchvision has compared checksums


def test_download(original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CIFAR10(cache_dir=cache)
    assert dataset.label == "CIFAR-10"
    dataset.setup(CPU)
    assert_holds_the_original(dataset, cache)
    assert [file.name for file in cache.iterdir()] == ["cifar10-original.npz"]
    original.unlink()
    monkeypatch.setattr(base, "_latest", None)
    CIFAR10(path="", cache_dir=cache).setup(CPU)


def test_original_archive_and_its_unpacked_folder(
    original: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "none").as_uri())
    made = tmp_path / "made"
    for number, path in enumerate([original, made, made / cifar10.ORIGINAL_FOLDER]):
        own_cache = cache / str(number)
        dataset = loaded(path, own_cache)
        assert_holds_the_original(dataset, own_cache)
        assert [file.name for file in own_cache.iterdir()] == ["cifar10-original.npz"]
    assert original.is_file()


def test_original_archive_in_the_cache_folder_is_found(
    original: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "none").as_uri())
    cache.mkdir()
    original.rename(cache / cifar10.ORIGINAL_ARCHIVE)
    dataset = CIFAR10(cache_dir=cache)
    dataset.setup(CPU)
    assert_holds_the_original(dataset, cache)


def test_without_network_the_message_says_what_to_do(original: Path, cache: Path) -> None:
    original.unlink()
    with pytest.raises(DataError) as caught:
        CIFAR10(cache_dir=cache).setup(CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert datasets.CIFAR10.url in message
    assert str(cache / "cifar-10-python.tar.gz") in message
    assert "data.path=" in message
    assert "PNORM_CIFAR10" in message
    assert list(cache.iterdir()) == []


def test_a_download_with_a_wrong_checksum_leaves_nothing(original: Path, cache: Path) -> None:
    original.write_bytes(original.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot download") as caught:
        CIFAR10(cache_dir=cache).setup(CPU)
    assert "corrupted" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_local_original_with_a_wrong_checksum_is_kept_and_refused(
    original: Path, cache: Path
) -> None:
    content = original.read_bytes() + b"!"
    original.write_bytes(content)
    assert_refused(original, cache, "has a wrong checksum: expected md5")
    assert original.read_bytes() == content


def test_a_damaged_file_of_the_unpacked_original_is_refused(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    batch = tmp_path / "made" / cifar10.ORIGINAL_FOLDER / "test_batch"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert_refused(tmp_path / "made", cache, "is missing or has a wrong checksum")


# Batches


def test_channels_are_normalised_one_by_one(copy: Path, cache: Path) -> None:
    images, _ = loaded(copy, cache).train_batch(0, 30, seed=0)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    deviations = images.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviations, torch.ones(3), atol=1e-5, rtol=0)
