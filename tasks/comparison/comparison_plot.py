"""The plot of a comparison: the metrics of every seed, and their differences from no pruning."""

from __future__ import annotations

import io

import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from secateur.tasks.comparison.arms import PLAN, UNPRUNED


def draw_comparison(
    frame: pl.DataFrame, summary: pl.DataFrame, judge: str, title: str, before: pl.DataFrame
) -> bytes:
    """Plot a comparison, one row per metric, and return it as PNG.

    The left panel of a row shows each seed's values arm by arm. The right panel shows their
    differences from no pruning.

    Args:
        frame: the metrics of all seeds and arms.
        summary: as `summarize_figures` returns it.
        judge: the target to plot.
        before: the metrics at the end of the stages that the arms share, drawn as a line.
    """
    last_stage = pl.col("stage") == pl.col("stage").max()
    last = frame.filter(last_stage, target=judge).sort("seed")
    means = summary.filter(target=judge)
    metrics = sorted(means["figure"].unique(), key=lambda name: (name != "loss", name))
    arms = means["arm"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(4 + 1.5 * len(arms), 0.5 + 2.8 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    seeds = last["seed"].n_unique()
    figure.suptitle(
        f"{title}: does pruning pay? target {judge}, {seeds} seed{'s' if seeds > 1 else ''}",
        fontsize=11,
    )
    for row, metric in enumerate(metrics):
        values = last.filter(figure=metric)
        metric_means = means.filter(figure=metric)
        left = figure.add_subplot(len(metrics), 2, 2 * row + 1)
        _draw_start(left, before.filter(figure=metric))
        _draw_values(left, values, metric_means, arms)
        left.legend(fontsize=7)
        left.set_ylabel(f"{metric} at the last stage's end", fontsize=8)
        right = figure.add_subplot(len(metrics), 2, 2 * row + 2)
        others = [arm for arm in arms if arm != UNPRUNED]
        _draw_differences(right, values, metric_means, others)
        right.set_ylabel(f"{metric}: difference from {UNPRUNED}", fontsize=8)
    buffer = io.BytesIO()
    # Without the version of matplotlib, which would change the bytes of the same plot.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw_start(axes: Axes, before: pl.DataFrame) -> None:
    start = float(before["value"].to_numpy().mean())
    label = "before pruning (mean)"
    axes.axhline(start, color="0.6", linewidth=0.8, linestyle="--", label=label)


def _draw_values(axes: Axes, values: pl.DataFrame, means: pl.DataFrame, arms: list[str]) -> None:
    """Draw each seed as a thin line through its arms, and the means with their 95% intervals."""
    places = range(len(arms))
    for _, seed in values.group_by("seed", maintain_order=True):
        by_arm = dict(seed.select("arm", "value").iter_rows())
        heights = [by_arm[arm] for arm in arms]
        axes.plot(places, heights, "o-", color="0.75", markersize=3, linewidth=0.6)
    _draw_means(axes, means, arms, "")


def _draw_differences(
    axes: Axes, values: pl.DataFrame, means: pl.DataFrame, arms: list[str]
) -> None:
    """Draw each seed's differences from no pruning, and their means with 95% intervals."""
    axes.axhline(0, color="0.6", linewidth=0.8)
    unpruned = values.filter(arm=UNPRUNED)["value"].to_numpy()
    for place, arm in enumerate(arms):
        differences = values.filter(arm=arm)["value"].to_numpy() - unpruned
        axes.plot([place] * len(differences), differences, "o", color="0.75", markersize=3)
    _draw_means(axes, means, arms, f"{UNPRUNED}_")


def _draw_means(axes: Axes, means: pl.DataFrame, arms: list[str], prefix: str) -> None:
    """Draw means and intervals beside the seeds' values, and label the arms."""
    columns = [f"{prefix}{name}" for name in ("mean", "low", "high")]
    for place, arm in enumerate(arms):
        mean, low, high = means.filter(arm=arm).select(columns).row(0)
        reach = None if low is None else [[mean - low], [high - mean]]
        color = "C3" if arm == PLAN else "C0"
        axes.errorbar(place + 0.12, mean, reach, fmt="s", color=color, markersize=5, capsize=3)
    axes.set_xticks(range(len(arms)), arms, fontsize=8, rotation=20 if len(arms) > 4 else 0)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
