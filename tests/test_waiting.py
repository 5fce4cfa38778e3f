"""Tests wait for events, never for seconds: on a busy machine a second is nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import settings

from conftest import REPOSITORY

TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
WAITING = {"wait", "join", "acquire", "get", "run", "communicate", "check_output", "result"}


def waits_for_seconds(tree: ast.AST) -> list[int]:
    """The lines of a program that wait for a time, not for an event."""
    looks = [
        node for loop in ast.walk(tree) if isinstance(loop, ast.While) for node in ast.walk(loop)
    ]
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        limits = [word.value for word in node.keywords if word.arg == "timeout"]
        limits += node.args[:1] if name in ("wait", "join") else []
        numbers = [limit.value for limit in limits if isinstance(limit, ast.Constant)]
        limited = name in WAITING and any(isinstance(n, int | float) and n > 0 for n in numbers)
        if limited or name == "Timer" or (name == "sleep" and node not in looks):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        ("import time\ntime.sleep(1)", [2]),
        ("while not path.exists():\n    time.sleep(0.01)", []),
        ("process.wait(30)", [1]),
        ("process.wait()\n', '.join(names)", []),
        ("subprocess.run(command, timeout=60)", [1]),
        ("threading.Timer(1.0, go.set).start()", [1]),
    ],
)
def test_waiting_for_seconds_is_seen(program, lines):
    assert waits_for_seconds(ast.parse(program)) == lines


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_test_waits_for_seconds(path: Path):
    assert waits_for_seconds(ast.parse(path.read_text())) == []


def test_an_example_of_a_property_may_take_its_time():
    assert settings.default.deadline is None
