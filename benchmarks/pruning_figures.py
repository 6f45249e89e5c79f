"""The figures of docs/pruning.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIGURES = Path("docs/figures")
LABELS = {
    "nearest 0.1": "nearest (default)",
    "mean": "mean",
    "loss": "loss",
    "el2n": "EL2N",
    "grand": "GraNd",
    "tracin": "TracIn",
    "mean, replay": "TSLOO (replay)",
    "ideal": "cross-fitted on right labels",
}
Values = dict[str, dict[str, list[float]]]


def draw_areas(areas: Values) -> None:
    """Draw what each score finds, one group of bars per workload."""
    figure, (axes,) = _make_figure(3.2, [1])
    bars = {
        label: {workload: scores.get(name) for workload, scores in areas.items()}
        for name, label in LABELS.items()
    }
    _draw_bars(axes, list(areas), bars)
    axes.axhline(0.95, color="grey", lw=0.8, ls=":")
    axes.set(ylabel="area under the ROC curve", ylim=(0.2, 1.0))
    axes.legend(fontsize=7, ncol=4, loc="lower center", framealpha=1)
    _save("pruning_areas", figure)


def draw_arms(accuracy: Values) -> None:
    """Draw the accuracy after the second stage, one group of bars per workload."""
    names = list(next(iter(accuracy.values())))
    figure, (axes,) = _make_figure(3.2, [1])
    bars: Bars = {
        name: {workload: arms[name] for workload, arms in accuracy.items()} for name in names
    }
    _draw_bars(axes, list(accuracy), bars)
    axes.set(ylabel="accuracy on clean test images", ylim=(0.4, 1.0))
    axes.legend(fontsize=7, ncol=5, loc="upper center")
    _save("pruning_arms", figure)


def draw_domains(arms: Values) -> None:
    """Draw the share kept of each domain, and the loss on the target's test text."""
    figure, (left, right) = _make_figure(3, [2, 1])
    domains = [c for c in next(iter(arms.values())) if c not in ("kept", "loss")]
    bars: Bars = {arm: {domain: own[domain] for domain in domains} for arm, own in arms.items()}
    _draw_bars(left, domains, bars)
    left.set(ylabel="share kept", ylim=(0, 1.3))
    left.legend(fontsize=7, ncol=3, loc="upper center")
    medians, distances = _medians_and_distances([own["loss"] for own in arms.values()])
    right.errorbar(range(len(arms)), medians, distances, fmt="o", capsize=3)
    right.set_xticks(range(len(arms)), list(arms), rotation=45, ha="right", fontsize=8)
    right.set(ylabel="loss on the manual's test text")
    _save("pruning_domains", figure)


def draw_duplicates(scores: dict[tuple[int, int], dict[str, list[float]]]) -> None:
    """Draw the mean score of each copy, less that of single samples of its time."""
    figure, panels = _make_figure(3, [1, 1], share_y=True)
    for axes, kind in zip(panels, ("embedding", "replay"), strict=True):
        for copies in (2, 4, 8):
            places = range(1, copies + 1)
            values = [scores[copies, place][f"beyond_{kind}"] for place in places]
            medians, distances = _medians_and_distances(values)
            label = f"{copies} copies"
            axes.errorbar(places, medians, distances, marker="o", ms=3, capsize=2, label=label)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(title=f"TSLOO by {kind}", xlabel="use of the same sample")
    panels[0].set(ylabel="score beyond single samples'")
    panels[0].legend(fontsize=7)
    _save("pruning_duplicates", figure)


Bars = dict[str, dict[str, list[float] | None]]


def _draw_bars(axes: Axes, groups: list[str], bars: Bars) -> None:
    width = 0.85 / len(bars)
    for number, (label, own) in enumerate(bars.items()):
        shift = (number - (len(bars) - 1) / 2) * width
        places, values = [], []
        for place, group in enumerate(groups):
            if group_values := own[group]:
                places.append(place + shift)
                values.append(group_values)
        medians, distances = _medians_and_distances(values)
        color = f"C{number % 10}"
        thin = {"lw": 0.7}
        axes.bar(places, medians, width, yerr=distances, label=label, error_kw=thin, color=color)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)


def _medians_and_distances(values: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Medians, and the distances from there to the least and the greatest values."""
    table = np.array(values)
    medians = np.median(table, 1)
    return medians, np.stack([medians - table.min(1), table.max(1) - medians])


def _make_figure(
    height: float, widths: Sequence[int], share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with one row of panels of the given relative widths."""
    figure = Figure(figsize=(9, height))
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths, sharey=share_y)
    return figure, list(grid[0])


def _save(name: str, figure: Figure) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=80)
