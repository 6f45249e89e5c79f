"""The figures of docs/pruning.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FIGURES = Path("docs/figures")
SHOWN = {"nearest 0.1": "nearest (default)", "mean": "mean", "loss": "loss", "el2n": "EL2N", "grand": "GraNd",
         "tracin": "TracIn", "mean, replay": "TSLOO (replay)", "ideal": "cross-fitted on right labels"}  # fmt: skip
Values = dict[str, dict[str, list[float]]]


def draw_areas(areas: Values) -> None:
    """What each score finds, a group of bars a workload."""
    figure, axes = plt.subplots(figsize=(9, 3.2))
    shown = {
        label: {t: found.get(name) for t, found in areas.items()} for name, label in SHOWN.items()
    }
    _bars(axes, list(areas), shown)
    axes.axhline(0.95, color="grey", lw=0.8, ls=":")
    axes.set(ylabel="area under the ROC curve", ylim=(0.2, 1.0))
    axes.legend(fontsize=7, ncol=4, loc="lower center", framealpha=1)
    _save("pruning_areas", figure)


def draw_arms(accuracy: Values) -> None:
    """Accuracy after the second stage, a group of bars a workload."""
    names = list(next(iter(accuracy.values())))
    figure, axes = plt.subplots(figsize=(9, 3.2))
    _bars(
        axes,
        list(accuracy),
        {name: {t: found[name] for t, found in accuracy.items()} for name in names},
    )
    axes.set(ylabel="accuracy on clean test images", ylim=(0.4, 1.0))
    axes.legend(fontsize=7, ncol=5, loc="upper center")
    _save("pruning_arms", figure)


def draw_domains(arms: Values) -> None:
    """Share kept of each domain, and the loss on the target's test text."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(2, 1))
    domains = [c for c in next(iter(arms.values())) if c not in ("kept", "loss")]
    _bars(left, domains, {arm: {d: found[d] for d in domains} for arm, found in arms.items()})
    left.set(ylabel="share kept", ylim=(0, 1.3))
    left.legend(fontsize=7, ncol=3, loc="upper center")
    losses = [found["loss"] for found in arms.values()]
    right.errorbar(range(len(arms)), *_centred(losses), fmt="o", capsize=3)
    right.set_xticks(range(len(arms)), list(arms), rotation=45, ha="right", fontsize=8)
    right.set(ylabel="loss on the manual's test text")
    _save("pruning_domains", figure)


def draw_duplicates(found: dict[tuple[int, int], dict[str, list[float]]]) -> None:
    """The mean score of each copy beside single samples of its time."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axes, kind in zip(panels, ("embedding", "replay"), strict=True):
        for copies in (2, 4, 8):
            places = range(1, copies + 1)
            axes.errorbar(places, *_centred([found[copies, p][f"beyond_{kind}"] for p in places]), marker="o", ms=3,
                          capsize=2, label=f"{copies} copies")  # fmt: skip
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(title=f"TSLOO by {kind}", xlabel="use of the same sample")
    panels[0].set(ylabel="score beyond single samples'")
    panels[0].legend(fontsize=7)
    _save("pruning_duplicates", figure)


def _bars(axes: Axes, groups: list[str], values: dict[str, dict[str, list[float] | None]]) -> None:
    width = 0.85 / len(values)
    for number, (label, found) in enumerate(values.items()):
        held = [(place, v) for place, group in enumerate(groups) if (v := found[group])]
        middle, away = _centred([v for _, v in held])
        places = [place + (number - (len(values) - 1) / 2) * width for place, _ in held]
        axes.bar(
            places,
            middle,
            width,
            yerr=away,
            label=label,
            error_kw={"lw": 0.7},
            color=plt.cm.tab10(number % 10),
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=8)


def _centred(values: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Medians, and how far below and above them the values reach."""
    table = np.array(values)
    middle = np.median(table, 1)
    return middle, np.stack([middle - table.min(1), table.max(1) - middle])


def _save(name: str, figure: plt.Figure) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=80)
    plt.close(figure)
