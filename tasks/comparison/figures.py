"""Room `tasks.comparison`: what one arm of one seed came to, and the figures of many, with intervals over the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import BaseModel
from scipy import stats

from secateur.storage.frames import read_frame, write_frame
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.run import Run

FIGURES = "figures.parquet"
CONFIDENCE = 0.95


class Interval(BaseModel):
    """A mean over seeds and its 95% t interval; none for a single seed."""

    mean: float
    low: float | None
    high: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Of one value a seed, by Student's t distribution with a degree of freedom less than there are seeds."""
        array = np.asarray(values, np.float64)
        mean = float(array.mean())
        if len(array) < 2:
            return Interval(mean=mean, low=None, high=None)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * stats.sem(array))
        return Interval(mean=mean, low=mean - reach, high=mean + reach)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on that side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def text(self, signed: bool = False) -> str:
        """The mean and its interval, where there is one."""
        sign = "+" if signed else ""
        mean = f"{self.mean:{sign}.4f}"
        return (
            mean if self.low is None else f"{mean} ({self.low:{sign}.4f} to {self.high:{sign}.4f})"
        )


def write_figures(run: Run, seed: int, judges: list[str], seconds: dict[int, float] | None) -> None:
    """Stores what an arm's finished run came to, one row a stage, target and figure.

    Args:
        judges: the targets whose figures are of samples that never score.
        seconds: what scoring and pruning each stage took; None where it went on from an interrupted one.
    """
    if run.folder.figures.committed:
        return
    rows = [row for stage in range(len(run.plan.stages)) for row in _rows(run, stage, judges)]
    frame = pl.DataFrame(rows).with_columns(
        pl.lit(seed).alias("seed"),
        pl.lit(run.plan.run).alias("arm"),
        select_seconds=pl.col("stage").replace_strict(
            seconds or {}, default=None if seconds is None else 0.0, return_dtype=pl.Float64
        ),
    )
    with run.folder.figures.attempt("figures", {}) as attempt:
        write_frame(attempt, FIGURES, frame.select("seed", "arm", pl.exclude("seed", "arm")))


def _rows(run: Run, stage: int, judges: list[str]) -> list[dict[str, object]]:
    folder = run.folder.stage(stage)
    trained = [segment.manifest.facts for segment in folder.segments()]
    pruned = folder.prune("plan")
    common = {
        "stage": stage,
        "samples": len(read_stage_samples(run, stage)),
        "kept": int(pruned.manifest.facts["kept"]) if pruned.committed else None,
        "steps": int(trained[-1]["next_step"]),
        "train_seconds": sum(float(facts["seconds"]) for facts in trained),
    }
    return [
        common | {"target": target, "judges": target in judges, "figure": figure, "value": value}
        for target, figures in folder.targets.manifest.facts.items()
        for figure, value in figures.items()
        if figure != "samples"
    ]


def read_figures(urls: Sequence[str]) -> pl.DataFrame:
    """The figures of finished arms."""
    return pl.concat([read_frame(Run.open(url).folder.figures, FIGURES) for url in urls])


def summarize_figures(frame: pl.DataFrame, against: Sequence[str]) -> pl.DataFrame:
    """One row an arm, target and figure at the last stage's end: `mean`, `low`, `high` over the seeds, and the same of
    the difference from each arm of `against`, seed by seed, as `<arm>_mean`, `<arm>_low`, `<arm>_high`."""
    last = frame.filter(pl.col("stage") == pl.col("stage").max()).sort("seed")
    rows = []
    for (arm, target, judging, figure), own in last.group_by(
        "arm", "target", "judges", "figure", maintain_order=True
    ):
        row: dict[str, object] = {"arm": arm, "target": target, "judges": judging, "figure": figure}
        row |= Interval.of(own["value"].to_list()).model_dump()
        for other in against:
            theirs = last.filter(
                pl.col("arm") == other, pl.col("target") == target, pl.col("figure") == figure
            )
            found = (
                Interval.of((own["value"] - theirs["value"]).to_list()) if arm != other else None
            )
            row |= {
                f"{other}_{k}": v
                for k, v in (
                    found.model_dump() if found else dict.fromkeys(Interval.model_fields)
                ).items()
            }
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)
