"""Messages fit in a line that one reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnorm_decay.messages import LONGEST, one_line

WORDS = st.lists(st.text("aé'/$ .", min_size=1, max_size=3 * LONGEST), max_size=4)


@given(WORDS)
def test_no_word_is_overlong_and_short_ones_stay(words: list[str]) -> None:
    text = "\n".join(words)
    shown = one_line(ValueError(text))
    assert len(shown.splitlines()) <= 1
    assert max(map(len, shown.split()), default=0) < LONGEST + 2
    if all(len(word) < LONGEST for word in text.split()) and "'" not in text:
        assert shown == " ".join(text.splitlines())


def test_an_overlong_path_keeps_its_ends() -> None:
    error = OSError(36, "File name too long", f"/home/some one/{'x' * 300}/results")
    shown = one_line(error)
    assert shown.startswith("[Errno 36] File name too long: '/home/some one/xx")
    assert shown.endswith("xx/results'")
    assert "…" in shown
    assert len(shown) < 250


@pytest.mark.parametrize(
    "program",
    [
        "scripts/plot.py --results",
        "scripts/tables.py --results",
        "scripts/explorer.py --results",
        "scripts/verify.py --results",
        "scripts/collect.py --runs",
        "scripts/evaluate.py --runs",
        "scripts/download_data.py --cache-dir",
        "experiments/toy.py --output",
    ],
)
@pytest.mark.parametrize("path", ["x" * 300, "xxxxxxxxx/" * 500], ids=["name", "path"])
def test_programs_take_no_overlong_path(run_program, tmp_path, program, path) -> None:
    done = run_program(*program.split(), str(tmp_path / path))
    lines = [line for line in (done.out + done.err).splitlines() if "File name too long" in line]
    assert done.code != 0
    assert lines
    assert all(len(line) < 400 for line in (done.out + done.err).splitlines())
    assert "Traceback" not in done.err
