"""Times inference with the zeros left out against the best that torch does with them.

nanoGPT (10.7 million weights) writes text at batch 1 and reads a prompt of 256 characters; ResNet18
(width 64) classifies images of 32 x 32 pixels. Dense networks run in fp32 and in bf16, the images
in `channels_last` too, and both through torch.compile; sparse ones are `sparse_inference`'s, of
random zeros (every weight as likely) or of trained networks (runs' folders or sparse files), which
come through `compact`, too. All forms of a case take turns.
`ratio` is to the fastest dense form of the same case, threads and network. The file of a dense form
is torch.save's, of the others save_sparse's.

    python scripts/bench_inference.py
    python scripts/bench_inference.py --networks results/networks/cpu/*/* --threads 1

Each case is written when it is done; what the output already holds is not done again.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench_common import machine, memory, reset_peak_memory, thread_count, write_rows
from pnorm_decay import sparsity
from pnorm_decay.deploy import (
    SparseFileError,
    compact,
    generate,
    load_sparse,
    save_sparse,
    sparse_inference,
)
from pnorm_decay.deploy.inference import InBfloat16, InParts
from pnorm_decay.messages import one_line
from pnorm_decay.models.gpt import GPT
from pnorm_decay.models.resnet import ResNet18
from pnorm_decay.optim import split_decayed
from pnorm_decay.training import load_run
from pnorm_decay.training.settings import ConfigError

SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
CASES = ("write text", "read a prompt", "1 image", "16 images", "100 images")
KEY = ["case", "threads", "network"]
WRITTEN = 128  # characters, after a prompt
PROMPT = 16
READ = 256
RANDOM = "random zeros"

console = Console(highlight=False, soft_wrap=True)

Form = Callable[[], object]


def nanogpt() -> GPT:
    return GPT(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)


def with_random_zeros(model: nn.Module, share: float) -> nn.Module:
    """A copy in which every decayed weight is zero with this probability."""
    model = copy.deepcopy(model)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in split_decayed(model)[0]:
            weight.masked_fill_(torch.rand(weight.shape, generator=stream) < share, 0)
    return model


def example_of(case: str, model: nn.Module) -> Tensor:
    """What the network reads in one call."""
    while isinstance(model, InBfloat16 | InParts):
        model = model.module
    if isinstance(model, GPT):
        size, vocabulary = model.block_size, model.token_embedding.num_embeddings
        length = 1 if case == "write text" else min(READ, size)
        return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    first: Any = model.get_submodule("conv1")
    channels = first.weight.shape[1]
    return torch.randn(int(case.split()[0]), channels, 32, 32)


def runner(case: str, form: str, model: Any, example: Tensor) -> Form:
    """One call: a text, or one forward pass."""
    if case != "write text":
        in_bf16 = form.startswith(("dense bf16", "compiled bf16")) and example.is_floating_point()
        return partial(model, example.bfloat16() if in_bf16 else example)
    prompt = torch.arange(min(PROMPT, model.block_size // 4)) % model.token_embedding.num_embeddings
    count = min(WRITTEN, model.block_size - len(prompt))

    def write() -> list[int]:
        return list(generate(model, prompt, count, generator=torch.Generator().manual_seed(0)))

    return write


def items_of(case: str, model: Any, example: Tensor) -> int:
    """Characters or images of one call."""
    if case != "write text":
        return example.shape[1] if isinstance(model, GPT) else len(example)
    return min(WRITTEN, model.block_size - min(PROMPT, model.block_size // 4))


def dense_forms(model: nn.Module, with_compiler: bool) -> Iterator[tuple[str, nn.Module]]:
    """What torch offers."""
    kinds = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16()}
    if isinstance(model, GPT):
        last = kinds
    else:
        last = {
            f"{name} channels_last": copy.deepcopy(form).to(memory_format=torch.channels_last)
            for name, form in kinds.items()
        }
        kinds |= last
    for name, form in kinds.items():
        yield f"dense {name}", form
    if with_compiler:
        for name, form in last.items():
            # A text is one character longer each time: one graph for all lengths.
            made: Any = torch.compile(copy.deepcopy(form), dynamic=isinstance(model, GPT))
            yield f"compiled {name}", made


def multiply_adds(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """(with the weights that are not 0, with all) of linear layers and convolutions."""
    counts = [0, 0]

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        places = output.numel() // layer.weight.shape[0]
        counts[0] += places * int(layer.weight.count_nonzero())
        counts[1] += places * layer.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(example)
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


def megabytes(model: nn.Module) -> float:
    """Of parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def file_megabytes(form: str, model: nn.Module) -> float:
    """What a network takes on the disk: all of it, or what `save_sparse` writes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "network"
        if "dense" in form:
            torch.save(model.state_dict(), path)
        else:
            save_sparse(model, path)
        return round(path.stat().st_size / 1e6, 3)


def peak_megabytes(case: str, form: str, model: nn.Module) -> float:
    """What loading a network and two calls add to a process's memory, at the peak."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "network.pt"
        torch.save(model, path)
        command = [sys.executable, __file__, "--child", case, form, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def child(case: str, form: str, path: str) -> None:
    """The measurement of peak_megabytes, in that process."""
    torch.set_num_threads(1)
    before = reset_peak_memory()
    model = torch.load(path, weights_only=False)
    run = runner(case, form, model, example_of(case, model))
    run()
    run()
    sys.stdout.write(f"{(memory('VmHWM') - before) / 1e6:.1f}")


def take_turns(forms: dict[str, Form], rounds: int, seconds: float) -> dict[str, float]:
    """The median seconds of a call of each form."""
    repeats = {}
    for name, form in forms.items():
        form()
        start = time.perf_counter()
        form()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                form()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(taken) for name, taken in times.items()}


def forms_of(
    case: str,
    label: str,
    networks: dict[str, nn.Module],
    example: Tensor,
    arguments: argparse.Namespace,
) -> tuple[dict[tuple[str, str], nn.Module], dict[str, nn.Module]]:
    """By (network, form), what is timed; and by network, what its file holds."""
    first = next(iter(networks))
    forms: dict[tuple[str, str], nn.Module] = {
        (first, name): form for name, form in dense_forms(networks[first], not arguments.no_compile)
    }
    stored = dict(networks)
    for name, network in networks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where nothing is gained, it is dense
            forms[name, "sparse"] = sparse_inference(network, example)
            if arguments.bf16:
                forms[name, "sparse or bf16"] = sparse_inference(network, example, allow_bf16=True)
            if label != RANDOM:
                small = stored[f"{name} compact"] = compact(network, example)
                forms[f"{name} compact", "compact"] = small
                forms[f"{name} compact", "compact sparse"] = sparse_inference(small, example)
    return forms, stored


def is_dense(form: str) -> bool:
    """Whether a form computes with all weights of the whole network."""
    return form.startswith(("dense", "compiled"))


def measure(
    case: str,
    threads: int,
    label: str,
    networks: dict[str, nn.Module],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of networks of one shape: the dense forms of the first, the sparse one of each."""
    torch.set_num_threads(threads)
    first = next(iter(networks.values()))
    example = example_of(case, first)
    forms, stored = forms_of(case, label, networks, example, arguments)
    runs = {" ".join(key): runner(case, key[1], form, example) for key, form in forms.items()}
    taken = take_turns(runs, arguments.rounds, arguments.seconds)
    times = list(zip(forms, taken.values(), strict=True))
    best = min(seconds for (_, form), seconds in times if is_dense(form))
    items, rows, (_, whole) = items_of(case, first, example), [], multiply_adds(first, example)
    for (name, form), seconds in times:
        is_measured = threads == arguments.threads[0] and "compiled" not in form
        peak = peak_megabytes(case, form, forms[name, form]) if is_measured else None
        kept = forms[name, form] if is_dense(form) else stored[name]
        left, all_left = multiply_adds(stored[name], example)
        rows.append(
            {
                "case": case,
                "threads": threads,
                "network": label,
                "form": form,
                "sparsity": 0.0 if is_dense(form) else round(sparsity(stored[name]), 4),
                "per_second": round(items / seconds, 2),
                "milliseconds": round(1e3 * seconds, 4),
                "ratio": round(best / seconds, 3),
                "multiply_adds_left": round((left if "sparse" in form else all_left) / whole, 5),
                "weights_megabytes": round(megabytes(forms[name, form]), 2),
                "file_megabytes": None if "compiled" in form else file_megabytes(form, kept),
                "peak_megabytes": peak,
                "rounds": arguments.rounds,
                **machine(),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table(title=f"{rows[0]['case']}, {rows[0]['threads']} threads, {rows[0]['network']}")
    for column in ("", "zeros", "multiply-adds left", "ms", "per second", "to the best dense"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["form"],
            f"{row['sparsity']:.2f}",
            f"{100 * row['multiply_adds_left']:.1f} %",
            f"{row['milliseconds']:.3f}",
            f"{row['per_second']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)


def groups(arguments: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, nn.Module]]]:
    """(case, label, networks) of everything that is asked for."""
    torch.manual_seed(0)
    for case in arguments.cases:
        model = ResNet18() if "image" in case else nanogpt()
        if arguments.networks is None:
            yield (
                case,
                RANDOM,
                {
                    f"{share}": with_random_zeros(model.eval(), share)
                    for share in arguments.sparsity
                },
            )
    for path in arguments.networks or ():
        network = trained_network(path)
        for case in arguments.cases:
            if isinstance(network, GPT) != ("image" in case):
                yield case, path.stem, {path.stem: network}


def trained_network(path: Path) -> nn.Module:
    """That of a run's folder or of a sparse file.

    Raises:
        ConfigError, SparseFileError, OSError: there is none, or it is damaged.
    """
    if path.is_dir():
        return load_run(path)[0]
    state = load_sparse(path)
    try:
        if "token_embedding.weight" in state:
            return GPT.from_state_dict(state).eval()
        width, channels = state["conv1.weight"].shape[:2]
        network = ResNet18(len(state["head.weight"]), channels, width)
        network.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} holds neither a GPT nor a ResNet18") from error
    return network.eval()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", nargs="+", type=thread_count, default=[1, 2])
    parser.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--networks", nargs="+", type=Path, help="trained ones, no random zeros")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--bf16", action="store_true", help="sparse_inference(allow_bf16=True) too")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each form")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn, at least")
    parser.add_argument("--output", type=Path, default=Path("results/bench/inference.csv"))
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds positive")
    if not all(0 <= share <= 1 for share in arguments.sparsity):
        parser.error("--sparsity must be in [0, 1]")
    return arguments


@torch.no_grad()
def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    arguments = parse_arguments()
    logging.getLogger("torch").setLevel(logging.ERROR)
    done = pd.read_csv(arguments.output) if arguments.output.exists() else pd.DataFrame(columns=KEY)
    rows: list[dict[str, Any]] = [
        {str(column): value for column, value in row.items()} for row in done.to_dict("records")
    ]
    try:
        for case, label, networks in groups(arguments):
            for threads in arguments.threads:
                if [case, threads, label] in [[row[column] for column in KEY] for row in rows]:
                    continue
                new = measure(case, threads, label, networks, arguments)
                show(new)
                rows += new
                write_rows(arguments.output, rows)
                torch.compiler.reset()
    except (ConfigError, SparseFileError, OSError) as error:
        console.print(f"error: {one_line(error)}", markup=False)
        sys.exit(2)
    console.print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
