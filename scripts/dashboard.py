"""Creates the W&B workspace of the experiments' runs, for an entity and a project of one's own."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import wandb
from rich.console import Console

from pnorm_decay.training.workspace import as_json, build

console = Console(highlight=False, soft_wrap=True, markup=False)

SECONDS = 20  # for the server to answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Needs an account and the network: first .venv/bin/wandb login, and make sync for "
        "runs that were logged offline. Each call saves a workspace of its own.",
    )
    parser.add_argument("--entity", help="W&B user or team (default: your own)")
    parser.add_argument("--project", default="pnorm-decay", help="(default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="print the workspace and save nothing; needs no account"
    )
    args = parser.parse_args()
    if args.json:
        sys.stdout.write(as_json(build(args.entity or "", args.project)) + "\n")
        return
    logging.getLogger("wandb").setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(SECONDS))
    try:
        api = wandb.Api(timeout=SECONDS)
        entity = args.entity or api.default_entity
        if not entity:
            raise ValueError("the account has no entity of its own; name one with --entity")
        workspace = build(entity, args.project).save()
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        console.print(f"error: {reason} (--json prints the workspace without an account)")
        sys.exit(2)
    console.print(f"saved: {workspace.url}")


if __name__ == "__main__":
    main()
