"""What a program says when something goes wrong: one line, not longer than one reads."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

LONGEST = 160  # characters of a word, or of a text in quotes, that is shown whole


def one_line(error: object) -> str:
    """An error's message without line breaks; of overlong paths the middle is left out."""
    text = " ".join(str(error).splitlines())
    overlong = rf"'[^']{{{LONGEST},}}'|\S{{{LONGEST},}}"
    half = LONGEST // 2 - 1
    return re.sub(overlong, lambda found: f"{found[0][:half]}…{found[0][-half:]}", text)


@contextmanager
def files_reported(console: Console) -> Iterator[None]:
    """Ends the program with a line and exit code 2 where a file cannot be read or written."""
    try:
        yield
    except OSError as error:
        console.print(f"error: {one_line(error)}", markup=False)
        sys.exit(2)
