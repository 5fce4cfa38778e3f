import hashlib
import runpy
import sys
from pathlib import Path

import pytest
from torchvision import datasets

from pnorm_decay.data import TinyShakespeare

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download_data.py"
TEXT = b"Speak, speak. " * 10


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing can be downloaded; this text passes for Tiny Shakespeare."""
    for name in ("PNORM_CIFAR10", "PNORM_SHAKESPEARE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "none").as_uri())
    monkeypatch.setattr(TinyShakespeare, "URL", (tmp_path / "none").as_uri())
    monkeypatch.setattr(TinyShakespeare, "SHA256", hashlib.sha256(TEXT).hexdigest())
    path = tmp_path / "input.txt"
    path.write_bytes(TEXT)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_failure_of_the_first_does_not_stop_the_second(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    assert run(monkeypatch, "--shakespeare", text, "--cache-dir", cache) == 1
    out, err = capfd.readouterr()
    assert out == f"Tiny Shakespeare: ready, {cache}/tinyshakespeare.txt (0.0 MB)\n"
    assert len(err.splitlines()) == 1
    assert "data.path=" in err
    assert "Traceback" not in err
    assert (cache / "tinyshakespeare.txt").read_bytes() == TEXT


def test_both_failures_are_explained(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--cache-dir", tmp_path / "cache") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "PNORM_CIFAR10" in err
    assert "PNORM_SHAKESPEARE" in err


def test_environment_names_local_copies(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PNORM_SHAKESPEARE", str(text))
    monkeypatch.setenv("PNORM_CIFAR10", str(tmp_path / "missing.zip"))
    assert run(monkeypatch, "--cache-dir", tmp_path / "cache") == 1
    out, err = capfd.readouterr()
    assert "Tiny Shakespeare: ready" in out
    assert "there is no" in err
    assert "missing.zip" in err


def test_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capfd.readouterr().out
    for option in ("--cifar10", "--shakespeare", "--cache-dir"):
        assert option in out
