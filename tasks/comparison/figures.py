"""The metrics of one arm's run, and their means and intervals over the seeds of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from pydantic import BaseModel
from scipy import stats

from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.layout import PLAN_PRUNING
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_prune_result
from secateur.tasks.results.training_results import read_training_result
from secateur.tasks.run import Run

FIGURES = "figures.parquet"
CONFIDENCE = 0.95


class Interval(BaseModel):
    """A mean over seeds with its 95% t interval. A single seed has no interval."""

    mean: float
    low: float | None
    high: float | None

    @staticmethod
    def from_values(values: Sequence[float]) -> Interval:
        """Return the mean of one value per seed, with its interval by Student's t distribution.

        The degrees of freedom are one less than the number of seeds.
        """
        array = np.asarray(values, np.float64)
        mean = float(array.mean())
        if len(array) < 2:
            return Interval(mean=mean, low=None, high=None)
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)
        reach = float(quantile * stats.sem(array))
        return Interval(mean=mean, low=mean - reach, high=mean + reach)

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        if self.low > 0:
            return 1
        return -1 if self.high < 0 else 0

    def text(self, signed: bool = False) -> str:
        """Return the mean, and its interval if it has one, for people to read."""
        sign = "+" if signed else ""
        mean = f"{self.mean:{sign}.4f}"
        if self.low is None:
            return mean
        return f"{mean} ({self.low:{sign}.4f} to {self.high:{sign}.4f})"


def write_figures(run: Run, seed: int, judges: list[str], seconds: dict[int, float] | None) -> None:
    """Write the metrics of an arm's finished run, one row per stage, target and metric.

    Args:
        judges: the targets whose metrics are of held-out samples.
        seconds: how long scoring and pruning each stage took. None if that is not known, because
            the run was interrupted.
    """

    def write(attempt: Attempt) -> None:
        rows: list[dict[str, object]] = []
        for stage in range(len(run.plan.stages)):
            rows += _stage_rows(run, stage, judges)
        frame = pl.DataFrame(rows).with_columns(
            pl.lit(seed).alias("seed"),
            pl.lit(run.plan.run).alias("arm"),
            select_seconds=pl.col("stage").replace_strict(
                seconds or {}, default=None if seconds is None else 0.0, return_dtype=pl.Float64
            ),
        )
        schema = schemas.figures_schema([seed])
        write_frame(attempt, FIGURES, frame.select(*schema), schema)

    run.folder.figures.write_once("figures", {}, write)


def read_figures(urls: Sequence[str]) -> pl.DataFrame:
    """Return the metrics of finished arms, by the URLs of their runs."""
    return pl.concat([read_frame(Run.open(url).folder.figures, FIGURES) for url in urls])


def summarize_figures(frame: pl.DataFrame, controls: Sequence[str]) -> pl.DataFrame:
    """Return one row per arm, target and metric at the end of the last stage.

    `mean`, `low` and `high` are over the seeds. `<control>_mean`, `<control>_low` and
    `<control>_high` are of the difference from a control arm, which is taken seed by seed.

    Args:
        frame: as `read_figures` returns it.
        controls: arms to compare every other arm with.
    """
    # Sorted, so that the values of two arms are in the same order of seeds.
    last = frame.filter(pl.col("stage") == pl.col("stage").max()).sort("seed")
    groups = last.group_by("arm", "target", "judges", "figure", maintain_order=True)
    rows = []
    for (arm, target, judges, metric), group in groups:
        values = group["value"]
        row: dict[str, object] = {"arm": arm, "target": target, "judges": judges, "figure": metric}
        row |= Interval.from_values(values.to_list()).model_dump()
        for control in controls:
            difference: dict[str, object] = dict.fromkeys(Interval.model_fields)
            if control != arm:
                paired = last.filter(arm=control, target=target, figure=metric)["value"]
                difference = Interval.from_values((values - paired).to_list()).model_dump()
            row |= {f"{control}_{name}": value for name, value in difference.items()}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _stage_rows(run: Run, stage: int, judges: list[str]) -> list[dict[str, object]]:
    """The rows of one stage, one per target and metric."""
    folder = run.folder.stage(stage)
    is_pruned = folder.prune(PLAN_PRUNING).committed
    segments = [segment.manifest.facts for segment in folder.segments()]
    stage_columns = {
        "stage": stage,
        "samples": len(read_stage_samples(run, stage)),
        "kept": read_prune_result(run, stage).kept if is_pruned else None,
        "steps": read_training_result(run, stage).steps,
        "train_seconds": sum(float(facts["seconds"]) for facts in segments),
    }
    rows = []
    for target, metrics in folder.targets.manifest.facts.items():
        columns = stage_columns | {"target": target, "judges": target in judges}
        rows += [
            columns | {"figure": metric, "value": value}
            for metric, value in metrics.items()
            if metric != "samples"
        ]
    return rows
