"""Room `tasks`: pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def scatter(frame: pl.DataFrame, fidelity: Mapping[str, Any], title: str) -> bytes:
    """Each estimate's scores against retraining, a panel an estimate."""
    figure = Figure(figsize=(4.5 * len(fidelity), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"audit: {title}, {len(frame)} removals")
    for place, (name, found) in enumerate(fidelity.items(), 1):
        axes = figure.add_subplot(1, len(fidelity), place)
        axes.axline((0, 0), slope=1, color="0.8", zorder=0)
        axes.scatter(frame["truth"].to_numpy(), frame[name].to_numpy(), s=14)
        low, high = found.spearman_interval
        axes.set_title(f"{name}: Spearman {found.spearman:.2f} ({low:.2f} to {high:.2f})", fontsize=10)
        axes.set_xlabel("change of the target's loss by retraining without the sample", fontsize=8)
        axes.set_ylabel("score", fontsize=8)
        axes.tick_params(labelsize=7)
    return _png(figure)


def over_steps(scores: pl.DataFrame, targets: list[str], title: str) -> bytes:
    """Each target's mean score at every step, with the tenths of the samples that scored least and most outside the band."""
    figure = Figure(figsize=(9, 2.4 * len(targets)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"))
    for place, name in enumerate(targets, 1):
        column = pl.col(f"score_{name}")
        found = (
            scores.group_by("step")
            .agg(mean=column.mean(), low=column.quantile(0.1), high=column.quantile(0.9))
            .sort("step")
        )
        axes = figure.add_subplot(len(targets), 1, place)
        axes.axhline(0, color="0.8", zorder=0)
        axes.fill_between(found["step"].to_numpy(), found["low"].to_numpy(), found["high"].to_numpy(), alpha=0.25, lw=0)
        axes.plot(found["step"].to_numpy(), found["mean"].to_numpy(), lw=1)
        axes.set_ylabel(f"score, {name}", fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
