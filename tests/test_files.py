from __future__ import annotations

import os

import pytest

from pnorm_decay.files import atomic_write, read_regular, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "λ")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unusable_folder_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_only_a_file_that_ends_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"four")
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", largest=4) == b"four"
    with pytest.raises(OSError, match="it has 4 bytes, more than the 3 it can have"):
        read_regular(path, largest=3)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(OSError, match="it is not a regular file"):
            read_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


def test_a_device_is_never_replaced(monkeypatch, tmp_path):
    path = tmp_path / "full"
    path.write_text("a device, as far as the system says")
    monkeypatch.setattr(type(path), "is_char_device", lambda self: self == path)
    with pytest.raises(OSError, match="it is a device"):
        write_text(path, "")
    assert path.read_text().startswith("a device")
