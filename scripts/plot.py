"""Draws Figures 1-5, one run's weights and inference, from records alone, into results/figures/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console

from pnorm_decay.figures import inference, toy, weights
from pnorm_decay.figures.contour import contour_figure
from pnorm_decay.figures.frontier import frontier_figure
from pnorm_decay.figures.loading import SCALES, Experiment, load_all
from pnorm_decay.figures.methods import methods_figure
from pnorm_decay.figures.style import save
from pnorm_decay.messages import files_reported, one_line
from pnorm_decay.records import RecordError, read_weights

console = Console(highlight=False, soft_wrap=True, markup=False)

IMAGE_FIGURES = {
    "figure2": frontier_figure,
    "figure2_all_methods": methods_figure,
    "figure4": contour_figure,
}
TEXT_FIGURES = {
    "figure3": frontier_figure,
    "figure3_all_methods": methods_figure,
    "figure5": contour_figure,
}


def draw(fig: Figure, stem: Path, formats: list[str]) -> None:
    for suffix in formats:
        path = stem.with_name(f"{stem.name}.{suffix}")
        save(fig, path)
        console.print(f"wrote {path}")


def draw_experiments(
    experiments: list[Experiment],
    figures: Mapping[str, Callable[[Experiment], Figure]],
    folder: Path,
    formats: list[str],
) -> None:
    """Draws every figure of every experiment; several of one kind get their names in the files'."""
    for experiment in experiments:
        suffix = f"_{experiment.name}" if len(experiments) > 1 else ""
        for name, figure in figures.items():
            draw(figure(experiment), folder / f"{name}{suffix}", formats)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scale",
        action="append",
        choices=SCALES,
        help="only this scale; may be repeated (default: every scale with recorded runs)",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the CSVs are")
    parser.add_argument(
        "--format", nargs="+", choices=["png", "pdf"], default=["png", "pdf"], help="what to write"
    )
    return parser.parse_args()


def main() -> None:
    mpl.use("agg")
    args = parse_arguments()
    folder = args.results / "figures"
    scales = args.scale or SCALES
    experiments, errors = load_all(args.results, scales)
    curves = args.results / "toy" / "figure1.csv"
    if curves.exists():
        try:
            draw(toy.toy_figure(toy.read(curves)), folder / "figure1", args.format)
        except RecordError as unreadable:
            errors.append(unreadable)
    measured = args.results / "bench" / "inference.csv"
    files = args.results / "bench" / "sparse_files.csv"
    if measured.exists() and files.exists():
        try:
            figure = inference.inference_figure(
                inference.read(measured), inference.read(files, inference.FILE_TYPES)
            )
        except RecordError as unreadable:
            errors.append(unreadable)
        else:
            draw(figure, folder / "inference", args.format)
    for scale in scales:
        of_scale = [experiment for experiment in experiments if experiment.scale == scale]
        images = [experiment for experiment in of_scale if experiment.is_image]
        texts = [experiment for experiment in of_scale if experiment.is_text]
        draw_experiments(images, IMAGE_FIGURES, folder / scale, args.format)
        draw_experiments(texts, TEXT_FIGURES, folder / scale, args.format)
        for experiment in of_scale:
            path = args.results / scale / "weights" / f"{experiment.name}.csv"
            if path.exists():
                try:
                    figure = weights.weights_figure(experiment, read_weights(path))
                except RecordError as unreadable:
                    errors.append(unreadable)
                else:
                    draw(figure, folder / scale / f"weights_{experiment.name}", args.format)
    for experiment in experiments:
        if experiment.without:
            console.print(experiment.without)
    for error in errors:
        console.print(f"error: {one_line(error)}")
    sys.exit(2 if errors else 0)


if __name__ == "__main__":
    with files_reported(console):
        main()
