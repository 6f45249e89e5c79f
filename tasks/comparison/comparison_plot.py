"""Room `tasks.comparison`: a comparison as a picture: every seed's figures, and their differences from not pruning."""

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
    """A row a figure of the judging target: each seed's values arm by arm, and the differences from not pruning.

    Args:
        before: the figures at the end of the stages that the arms share, drawn as a line.
    """
    last = frame.filter(pl.col("stage") == pl.col("stage").max(), pl.col("target") == judge).sort(
        "seed"
    )
    own = summary.filter(pl.col("target") == judge)
    names = sorted(own["figure"].unique(), key=lambda name: (name != "loss", name))
    arms = own["arm"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(4 + 1.5 * len(arms), 0.5 + 2.8 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    seeds = last["seed"].n_unique()
    figure.suptitle(
        f"{title}: does pruning pay? target {judge}, {seeds} seed{'s' if seeds > 1 else ''}",
        fontsize=11,
    )
    for number, name in enumerate(names):
        left, right = (figure.add_subplot(len(names), 2, 2 * number + place) for place in (1, 2))
        rows = own.filter(pl.col("figure") == name)
        values = last.filter(pl.col("figure") == name)
        start = float(before.filter(pl.col("figure") == name)["value"].to_numpy().mean())
        left.axhline(
            start, color="0.6", linewidth=0.8, linestyle="--", label="before pruning (mean)"
        )
        _values(left, values, rows, arms)
        left.legend(fontsize=7)
        left.set_ylabel(f"{name} at the last stage's end", fontsize=8)
        _differences(right, values, rows, [arm for arm in arms if arm != UNPRUNED])
        right.set_ylabel(f"{name}: difference from {UNPRUNED}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _values(axes: Axes, values: pl.DataFrame, rows: pl.DataFrame, arms: list[str]) -> None:
    """Each seed is a thin line through its arms; means with 95% intervals."""
    for _, seed in values.group_by("seed", maintain_order=True):
        found = dict(seed.select("arm", "value").iter_rows())
        axes.plot(
            range(len(arms)),
            [found[arm] for arm in arms],
            "o-",
            color="0.75",
            markersize=3,
            linewidth=0.6,
        )
    _means(axes, rows, arms, "")


def _differences(axes: Axes, values: pl.DataFrame, rows: pl.DataFrame, arms: list[str]) -> None:
    """The same of the differences, seed by seed; 0 is not to prune."""
    axes.axhline(0, color="0.6", linewidth=0.8)
    base = values.filter(pl.col("arm") == UNPRUNED)["value"].to_numpy()
    for place, arm in enumerate(arms):
        gaps = values.filter(pl.col("arm") == arm)["value"].to_numpy() - base
        axes.plot([place] * len(gaps), gaps, "o", color="0.75", markersize=3)
    _means(axes, rows, arms, f"{UNPRUNED}_")


def _means(axes: Axes, rows: pl.DataFrame, arms: list[str], prefix: str) -> None:
    for place, arm in enumerate(arms):
        mean, low, high = (
            rows.filter(pl.col("arm") == arm)
            .select(f"{prefix}{k}" for k in ("mean", "low", "high"))
            .row(0)
        )
        reach = None if low is None else [[mean - low], [high - mean]]
        axes.errorbar(
            place + 0.12,
            mean,
            yerr=reach,
            fmt="s",
            color="C3" if arm == PLAN else "C0",
            markersize=5,
            capsize=3,
        )
    axes.set_xticks(range(len(arms)), arms, fontsize=8, rotation=20 if len(arms) > 4 else 0)
    axes.set_xlim(-0.5, len(arms) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
