"""Figures of a study, made of its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kindiff.study.records import Record
from kindiff.study.tables import Row, best_rows, by_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "kind": "#c2410c",
    "full": "#374151",
    "peft": "#1d4ed8",
    "learngene": "#15803d",
    "scratch": "#9ca3af",
}
"""Of a family of methods, in every figure."""


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write STUDY-TASK.png for each task, distance against trainable parameters and GMACs (where they differ), and
    where tasks differ in their steps alone a figure of distance against steps and time; returns their paths."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    study, rows = records[0].study, best_rows(records)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        costs = {
            "trainable parameters, thousands": [row.trainable / 1000 for row in own],
            "inference, million MACs an image": [row.gmacs * 1000 for row in own],
        }
        differ = {label: x for label, x in costs.items() if len(set(x)) > 1} or costs
        height = max(4.5, 0.18 * len(own) + 0.8)  # room for the legend's lines
        figure, panels = plt.subplots(
            1,
            len(differ),
            figsize=(6 * len(differ), height),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        axes = panels[0]
        for axis, (label, x) in zip(axes, differ.items(), strict=True):
            _scatter(axis, own, x, label)
            if label.startswith("trainable"):
                axis.set_xscale("symlog" if min(x) == 0 else "log")
                axis.xaxis.set_minor_formatter(NullFormatter())
                if min(x) > 0:
                    wide = max(x) > 500 * min(x)  # no room for labels between powers of ten
                    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel(f"{own[0].distance_name}, lower is better")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
        figure.suptitle(f"{task}: each method at its best rate; real against real {own[0].floor:.1f}")
        paths.append(folder / f"{study}-{task}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    for name, lines in by_steps(rows).items():
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
        for axis, what in zip(axes, ("steps", "seconds"), strict=True):
            for own in lines:
                axis.errorbar(
                    [getattr(row, what) for row in own], [row.distance_mean for row in own],
                    yerr=[row.distance_spread if row.seeds > 1 else 0.0 for row in own],
                    color=COLOURS[own[0].family], marker="o", markersize=4, capsize=2, label=own[0].label,
                )  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel=f"{what} of training")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
                side.set_major_formatter("{x:g}")
                side.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25)
        axes[0].set_ylabel(f"{lines[0][0].distance_name}, lower is better")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
        paths.append(folder / f"{study}-{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def _scatter(axis: Axes, rows: Sequence[Row], x: Sequence[float], label: str) -> None:
    """A point a method, with the number that it has in the figure's legend."""
    for number, (row, at) in enumerate(zip(rows, x, strict=True), 1):
        spread = row.distance_spread if row.seeds > 1 else 0.0
        axis.errorbar(
            at, row.distance_mean, yerr=spread, fmt="o", color=COLOURS[row.family], capsize=2,
            label=f"{number}  {row.label}",
        )  # fmt: skip
        side = 5 if number % 2 else -11
        axis.annotate(str(number), (at, row.distance_mean), (side, 3), textcoords="offset points", fontsize=8)
    axis.margins(0.12)
    axis.set(xlabel=label)
    axis.grid(alpha=0.25)
