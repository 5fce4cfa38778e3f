"""The README and the documentation's pages: their code runs, their commands and links exist."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import REPOSITORY, SHORT, Finished
from pnorm_decay import sparsity

DOCS = REPOSITORY / "docs"
READ = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES = [*READ, *sorted(DOCS.glob("*.md")), *sorted((DOCS / "reference").glob("*.md"))]
OTHERS = ("lightning", "transformers")  # too heavy for the test environment
PROGRAM = re.compile(r"((?:experiments|scripts)/\w+\.py)(.*)")


def blocks(language: str) -> list[tuple[str, str]]:
    """(where, code) of every block of a language."""
    return [
        (f"{path.relative_to(REPOSITORY)}:{number}", code)
        for path in PAGES
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


def commands() -> list[str]:
    """The lines of the shell blocks, continued ones joined, without comments."""
    joined = [code.replace("\\\n", " ") for _, code in blocks("bash")]
    return [line.partition("#")[0].strip() for code in joined for line in code.splitlines()]


@pytest.mark.parametrize(("where", "code"), blocks("python"), ids=[w for w, _ in blocks("python")])
def test_an_example_runs(
    where: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_program: Callable[..., Finished],
) -> None:
    monkeypatch.chdir(tmp_path)  # for what the trainers write
    (tmp_path / "results").symlink_to(REPOSITORY / "results")
    for package in OTHERS:
        if package in code:
            pytest.importorskip(package)
    if "init_process_group" in code:  # as torchrun starts a process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inputs = torch.randn(64, 4)
    dataset = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    names = {
        "model": model,
        "network": model,
        "loader": DataLoader(dataset, batch_size=16),
        "dataset": dataset,
        "loss_fn": nn.CrossEntropyLoss(),
        "torch": torch,
        "epochs": 100,
    }
    if "load_run" in code:
        short = ["experiment=demo/resnet_digits", *SHORT, "logger=none"]
        assert run_program("experiments/train.py", *short).code == 0
        names["folder"] = next(tmp_path.glob("runs/demo/*/*"))
    exec(compile(code, where, "exec"), names)
    after = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    changed = any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert changed == bool(
        re.search(r"\bmodel\b.*(\.step\(\)|\.train\(\)|\.fit\()", code, re.DOTALL)
    )
    target = re.search(
        r"TargetSparsity\(\w+, ([\d.]+).*print\(.*\bsparsity\((\w+)\)", code, re.DOTALL
    )
    if target:
        assert sparsity(names[target[2]]) == pytest.approx(float(target[1]), abs=0.03)


def test_the_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    found = commands()
    asked = {target for command in found for target in re.findall(r"\bmake ([a-z-]+)", command)}
    assert {"reproduce-figures", "data", "dashboard"} <= asked
    assert asked <= targets
    for command in found:
        for program, arguments in PROGRAM.findall(command):
            text = (REPOSITORY / program).read_text()
            if program != "experiments/train.py":
                assert all(option in text for option in re.findall(r" (--[\w-]+)", arguments))


def runs() -> list[str]:
    every = [match[1] for command in commands() for match in PROGRAM.findall(command)]
    return sorted({arguments.strip() for arguments in every if "=" in arguments})


@pytest.mark.parametrize("arguments", runs())
def test_a_command_names_a_config(arguments: str) -> None:
    words = [word for word in shlex.split(arguments) if word != "-m" and "hydra/" not in word]
    overrides = []
    for override in OverridesParser.create().parse_overrides(words):
        value = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        overrides.append(
            override.input_line if value is None else f"{override.key_or_group}={value}"
        )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        cfg = compose("train", overrides)
    assert {"optimizer", "model", "data"} <= cfg.keys()


def test_links_lead_somewhere() -> None:
    """In the repository; on the site the build looks, at headings too."""
    links = [
        (path, target)
        for path in PAGES
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text())
    ]
    assert len(links) > 50
    assert [f"{p.name}: {t}" for p, t in links if not (p.parent / t).exists()] == []
