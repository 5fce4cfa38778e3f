"""Samples text from a trained network, to the terminal as it comes.

    python experiments/generate.py runs/cpu/nanogpt_shakespeare/07227983cd03
    python experiments/generate.py network.sparse --prompt "ROMEO:" --tokens 1000
    python experiments/generate.py network.sparse --dense

The network is a finished run's folder or a file that `pnorm_decay.deploy.save_sparse` wrote.
Layers with many zeros are computed without them where that is faster; `--dense` keeps them whole.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch

from pnorm_decay import sparsity
from pnorm_decay.data import DataError, PydocTopics, TinyShakespeare
from pnorm_decay.deploy import generate, load_sparse, sparse_inference
from pnorm_decay.deploy.inference import SparseLinear
from pnorm_decay.models.gpt import GPT
from pnorm_decay.training import load_run
from pnorm_decay.training.settings import ConfigError, bearable


def network_of(path: Path, heads: int | None) -> GPT:
    """The network in a run's folder or a sparse file.

    Raises:
        ConfigError: there is none that writes text.
    """
    if path.is_dir():
        network, _ = load_run(path)
        if not isinstance(network, GPT):
            raise ConfigError(f"{path} holds a {type(network).__name__}, which writes no text")
        return network

    return GPT.from_state_dict(load_sparse(path), heads).eval()


def vocabulary_of(network: GPT) -> list[str]:
    """The characters that the network's tokens stand for: those of the data of as many.

    Raises:
        ConfigError: there are no such data.
    """
    size = network.token_embedding.num_embeddings
    for data in (TinyShakespeare(1), PydocTopics(1)):
        if len(data.vocabulary()) == size:
            return data.vocabulary()
    raise ConfigError(f"the network has {size} characters, as no text of this version has")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", type=Path, help="a run's folder, or a sparse file")
    parser.add_argument("--prompt", default="\n", help="what the text goes on from")
    parser.add_argument("--tokens", type=int, default=500, help="how many characters (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
    parser.add_argument("--seed", type=int, help="for the same text again")
    parser.add_argument("--dense", action="store_true", help="compute with the zeros")
    parser.add_argument("--threads", type=int, help="(default: as torch chooses)")
    parser.add_argument("--heads", type=int, help="of a sparse file's network (default: by width)")
    arguments = parser.parse_args()
    for name, least in (("tokens", 0), ("temperature", 0), ("threads", 1), ("heads", 1)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} must be at least {least}, not {value}")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        parser.error(f"--seed must be from 0 to 2^64 - 1, not {arguments.seed}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.threads:
            torch.set_num_threads(bearable(arguments.threads, "--threads"))
        network = network_of(arguments.network, arguments.heads)
        vocabulary = vocabulary_of(network)
        if unknown := set(arguments.prompt) - set(vocabulary):
            raise ConfigError(f"--prompt: the network knows no {''.join(sorted(unknown))!r}")
        if not arguments.prompt:
            raise ConfigError("--prompt must not be empty")
    except (ConfigError, DataError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    share = sparsity(network)
    if not arguments.dense:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where nothing is gained, it is dense
            network = cast(GPT, sparse_inference(network, torch.zeros(1, 1, dtype=torch.long)))
    generator = torch.Generator()
    generator.seed() if arguments.seed is None else generator.manual_seed(arguments.seed)
    prompt = torch.tensor([vocabulary.index(character) for character in arguments.prompt])
    sys.stdout.write(arguments.prompt)
    start = time.perf_counter()
    options: Any = {"temperature": arguments.temperature, "generator": generator}
    try:
        for token in generate(network, prompt, arguments.tokens, **options):
            sys.stdout.write(vocabulary[token])
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    seconds = time.perf_counter() - start
    is_sparse = any(isinstance(layer, SparseLinear) for layer in network.modules())
    form = "sparse" if is_sparse else "dense"
    sys.stdout.write("\n")
    sys.stderr.write(
        f"{arguments.tokens} tokens, {arguments.tokens / seconds:,.0f} a second ({form}; "
        f"{100 * share:.1f} % of the weights are zero; {torch.get_num_threads()} threads)\n"
    )


if __name__ == "__main__":
    main()
