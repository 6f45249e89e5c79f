"""Room `tasks`: pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.tasks.results.profile_results import Phases

COLOURS = {"warm-up": "C3", "basin": "0.5", "ascent": "C2"}


def draw_audit(frame: pl.DataFrame, fidelity: Mapping[str, Any], title: str) -> bytes:
    """Each estimate's scores against retraining, a panel an estimate."""
    figure = Figure(figsize=(4.5 * len(fidelity), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"audit: {title}, {len(frame)} removals")
    for place, (name, found) in enumerate(fidelity.items(), 1):
        axes = figure.add_subplot(1, len(fidelity), place)
        axes.axline((0, 0), slope=1, color="0.8", zorder=0)
        axes.scatter(frame["truth"].to_numpy(), frame[name].to_numpy(), s=14)
        low, high = found.spearman_interval
        axes.set_title(
            f"{name}: Spearman {found.spearman:.2f} ({low:.2f} to {high:.2f})", fontsize=10
        )
        axes.set_xlabel("change of the target's loss by retraining without the sample", fontsize=8)
        axes.set_ylabel("score", fontsize=8)
        axes.tick_params(labelsize=7)
    return _png(figure)


def draw_profile(frame: pl.DataFrame, phases: Mapping[str, Phases], last: int, title: str) -> bytes:
    """Influence over learning rate at each step up to the end of stage `last`, a row a target: absolute, signed, raw.

    The phases are those of the last stage's own steps.
    """
    figure = _figure(13, 3.4 * len(phases), f"influence: {title}")
    panels = {
        "mean |influence| / learning rate": ("per_rate", "mean_abs"),
        "mean influence / learning rate": ("per_rate", "mean"),
    }
    panels |= {"mean influence": ("score", "mean")}
    for row, (target, found) in enumerate(phases.items()):
        for column, (label, (quantity, figures)) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(len(phases), len(panels), row * len(panels) + column)
            rows = frame.filter(target=target, quantity=quantity, estimate="embedding")
            own = frame.filter(target=target, quantity=quantity, stage=last, estimate="replay")
            rows = pl.concat([rows.filter(pl.col("stage") < last), own]) if len(own) else rows
            _draw_steps(axes, rows, figures)
            if column == 1:
                axes.set_yscale("log")
                _shade(axes, found, _offset(rows, last))
            axes.set_title(f"{target}: {label}", fontsize=9, pad=12)
    return _png(figure)


def draw_evolution(frame: pl.DataFrame, title: str) -> bytes:
    """Each stage's mean influence over learning rate as seen from its own end and those of the stages after it."""
    targets = frame["target"].unique(maintain_order=True).to_list()
    figure = _figure(11, 3.8 * len(targets), f"influence as training goes on: {title}")
    for row, target in enumerate(targets):
        for column, figures in enumerate(("mean_abs", "mean"), 1):
            axes = figure.add_subplot(len(targets), 2, 2 * row + column)
            for (stage,), seen in (
                frame.filter(target=target)
                .sort("stage", "view")
                .group_by("stage", maintain_order=True)
            ):
                axes.plot(
                    seen["view"].to_numpy(),
                    seen[figures].to_numpy(),
                    "o-",
                    ms=3,
                    lw=1.2,
                    label=f"stage {stage}",
                )
            axes.set_yscale("log" if figures == "mean_abs" else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(
                f"{target}: {'mean |influence|' if column == 1 else 'mean influence'} / learning rate",
                fontsize=9,
            )
            axes.set_xlabel("as seen from the end of stage", fontsize=8)
            axes.tick_params(labelsize=7, which="both")
            if column == 1:
                axes.legend(title="trained on in", fontsize=7, title_fontsize=7)
    return _png(figure)


def _draw_steps(axes: Axes, rows: pl.DataFrame, figures: str) -> None:
    """A figure of every step, stage after stage, with its running mean; the spread within steps behind a signed one."""
    steps = rows.sort("stage", "step").with_row_index("place")
    places, values = steps["place"].to_numpy(), steps[figures].to_numpy()
    wide = max(1, len(steps) // 40)
    if figures == "mean":
        band = steps.select(pl.col("q25", "q75").rolling_mean(wide, center=True, min_samples=1))
        axes.fill_between(
            places, band["q25"].to_numpy(), band["q75"].to_numpy(), color="C0", alpha=0.2, lw=0
        )
        axes.axhline(0, color="0.7", lw=0.8)
    axes.plot(places, values, ".", ms=2, color="0.6")
    axes.plot(
        places,
        steps[figures].rolling_mean(wide, center=True, min_samples=1).to_numpy(),
        lw=1.4,
        color="C0",
    )
    for start in steps.group_by("stage", maintain_order=True).first()["place"].to_list()[1:]:
        axes.axvline(start, color="0.4", lw=0.8, ls=":")
    axes.set_xlabel("recorded step", fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def _shade(axes: Axes, found: Phases, offset: int) -> None:
    """The phases behind a profile, and the intervals of their boundaries."""
    for phase in found.phases:
        axes.axvspan(
            offset + phase.start,
            offset + phase.stop,
            color=COLOURS[phase.name],
            alpha=0.15,
            lw=0,
            zorder=0,
        )
        axes.hlines(phase.level, offset + phase.start, offset + phase.stop, color="k", lw=0.8)
    for name in dict.fromkeys(phase.name for phase in found.phases):
        own = [phase for phase in found.phases if phase.name == name]
        middle = offset + (own[0].start + own[-1].stop) / 2
        axes.annotate(
            name,
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    for boundary in found.boundaries:
        axes.axvspan(
            offset + boundary.low,
            offset + max(boundary.high, boundary.low + 1),
            color="k",
            alpha=0.15,
            lw=0,
        )


def _offset(rows: pl.DataFrame, last: int) -> int:
    return len(rows.filter(pl.col("stage") < last))


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
