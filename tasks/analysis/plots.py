"""Plots of audits and influence profiles, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.tasks.results.audit_results import Fidelity
from secateur.tasks.results.profile_results import Phases

PHASE_COLORS = {"warm-up": "C3", "basin": "0.5", "ascent": "C2"}

# The panels of a profile: the title, the quantity and its statistic over the samples of a step.
PROFILE_PANELS = [
    ("mean |influence| / learning rate", "per_rate", "mean_abs"),
    ("mean influence / learning rate", "per_rate", "mean"),
    ("mean influence", "score", "mean"),
]
EVOLUTION_PANELS = [
    ("mean |influence| / learning rate", "mean_abs"),
    ("mean influence / learning rate", "mean"),
]


def draw_audit(frame: pl.DataFrame, fidelity: Mapping[str, Fidelity], title: str) -> bytes:
    """Plot the scores of each estimate against retraining, one panel per estimate.

    Args:
        frame: one row per removal, with the column `truth` and a column per estimate.
        fidelity: by estimate.
    """
    figure = _new_figure(
        4.5 * len(fidelity), 4.5, f"audit: {title}, {len(frame)} removals", fontsize=12
    )
    for place, (name, agreement) in enumerate(fidelity.items(), 1):
        axes = figure.add_subplot(1, len(fidelity), place)
        axes.axline((0, 0), slope=1, color="0.8", zorder=0)
        axes.scatter(frame["truth"].to_numpy(), frame[name].to_numpy(), s=14)
        low, high = agreement.spearman_interval
        axes.set_title(
            f"{name}: Spearman {agreement.spearman:.2f} ({low:.2f} to {high:.2f})", fontsize=10
        )
        axes.set_xlabel("change of the target's loss by retraining without the sample", fontsize=8)
        axes.set_ylabel("score", fontsize=8)
        axes.tick_params(labelsize=7)
    return _render_png(figure)


def draw_profile(frame: pl.DataFrame, phases: Mapping[str, Phases], last: int, title: str) -> bytes:
    """Plot the influence of each step up to the end of stage `last`, one row per target.

    The panels of a row are absolute and signed influence over the learning rate, and influence.

    Args:
        frame: a stage's `profile.parquet`.
        phases: by target, of the steps of the last stage.
    """
    figure = _new_figure(13, 3.4 * len(phases), f"influence: {title}")
    for row, (target, target_phases) in enumerate(phases.items()):
        for column, (label, quantity, statistic) in enumerate(PROFILE_PANELS, 1):
            place = row * len(PROFILE_PANELS) + column
            axes = figure.add_subplot(len(phases), len(PROFILE_PANELS), place)
            rows = _best_estimates(frame.filter(target=target, quantity=quantity), last)
            _draw_steps(axes, rows, statistic)
            if column == 1:
                axes.set_yscale("log")
                _draw_phases(axes, target_phases, len(rows.filter(pl.col("stage") < last)))
            axes.set_title(f"{target}: {label}", fontsize=9, pad=12)
    return _render_png(figure)


def draw_evolution(frame: pl.DataFrame, title: str) -> bytes:
    """Plot how each stage's mean influence over the learning rate changes as training goes on.

    Args:
        frame: a stage's `evolution.parquet`, with one row per target, stage and later stage from
            whose end (`view`) the influence is seen.
    """
    targets = frame["target"].unique(maintain_order=True).to_list()
    figure = _new_figure(11, 3.8 * len(targets), f"influence as training goes on: {title}")
    for row, target in enumerate(targets):
        for column, (label, statistic) in enumerate(EVOLUTION_PANELS, 1):
            axes = figure.add_subplot(len(targets), 2, 2 * row + column)
            _draw_views(axes, frame.filter(target=target), statistic)
            axes.set_yscale("log" if statistic == "mean_abs" else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(f"{target}: {label}", fontsize=9)
            axes.set_xlabel("as seen from the end of stage", fontsize=8)
            axes.tick_params(labelsize=7, which="both")
            if column == 1:
                axes.legend(title="trained on in", fontsize=7, title_fontsize=7)
    return _render_png(figure)


def _best_estimates(rows: pl.DataFrame, last: int) -> pl.DataFrame:
    """The rows by embeddings, but by replay for the last stage's own steps if there are any."""
    by_embedding = rows.filter(estimate="embedding")
    by_replay = rows.filter(stage=last, estimate="replay")
    if by_replay.is_empty():
        return by_embedding
    return pl.concat([by_embedding.filter(pl.col("stage") < last), by_replay])


def _draw_views(axes: Axes, frame: pl.DataFrame, statistic: str) -> None:
    """Plot one line per stage, over the later stages from whose ends it is seen."""
    stages = frame.sort("stage", "view").group_by("stage", maintain_order=True)
    for (stage,), rows in stages:
        views = rows["view"].to_numpy()
        values = rows[statistic].to_numpy()
        axes.plot(views, values, "o-", ms=3, lw=1.2, label=f"stage {stage}")


def _draw_steps(axes: Axes, rows: pl.DataFrame, statistic: str) -> None:
    """Plot a statistic of every step, stage after stage, with its running mean.

    Behind a signed statistic, a band shows the quartiles within the steps.
    """
    steps = rows.sort("stage", "step").with_row_index("place")
    places = steps["place"].to_numpy()
    width = max(1, len(steps) // 40)
    smooth = steps.select(
        pl.col(statistic, "q25", "q75").rolling_mean(width, center=True, min_samples=1)
    )
    if statistic == "mean":
        low = smooth["q25"].to_numpy()
        axes.fill_between(places, low, smooth["q75"].to_numpy(), color="C0", alpha=0.2, lw=0)
        axes.axhline(0, color="0.7", lw=0.8)
    axes.plot(places, steps[statistic].to_numpy(), ".", ms=2, color="0.6")
    axes.plot(places, smooth[statistic].to_numpy(), lw=1.4, color="C0")
    stage_starts = steps.group_by("stage", maintain_order=True).first()["place"].to_list()
    for start in stage_starts[1:]:
        axes.axvline(start, color="0.4", lw=0.8, ls=":")
    axes.set_xlabel("recorded step", fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def _draw_phases(axes: Axes, phases: Phases, offset: int) -> None:
    """Shade the phases behind a profile, and the intervals of their boundaries.

    Args:
        offset: number of plotted steps before the stage that has these phases.
    """
    for phase in phases.phases:
        start = offset + phase.start
        stop = offset + phase.stop
        axes.axvspan(start, stop, color=PHASE_COLORS[phase.name], alpha=0.15, lw=0, zorder=0)
        axes.hlines(phase.level, start, stop, color="k", lw=0.8)
    for name in dict.fromkeys(phase.name for phase in phases.phases):
        pieces = [phase for phase in phases.phases if phase.name == name]
        middle = offset + (pieces[0].start + pieces[-1].stop) / 2
        axes.annotate(
            name,
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    for boundary in phases.boundaries:
        # An interval of a single step would not be visible.
        stop = max(boundary.high, boundary.low + 1)
        axes.axvspan(offset + boundary.low, offset + stop, color="k", alpha=0.15, lw=0)


def _new_figure(width: float, height: float, title: str, fontsize: float = 11) -> Figure:
    """A figure for a file. `pyplot` is not used, because it would keep state and pick a backend."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=fontsize)
    return figure


def _render_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, which would change the bytes of the same plot.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
