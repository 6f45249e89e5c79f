"""Room `tasks`: online selection, what the steps of a window train on instead of what the order gives (`window.select`)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import PlanError
from secateur.influence.hooks import sample_gradients
from secateur.influence.recorder import Recorder
from secateur.influence.selection import SELECTION_RULES, Choice, select_randomly
from secateur.storage.frames import read_frame, write_frame
from secateur.storage.layout import StageFolder
from secateur.storage.outputs import Attempt
from secateur.tasks.data.batches import seed_for
from secateur.tasks.data.samples import list_target_samples, scoring_rows
from secateur.tasks.plan import SelectionConfig
from secateur.tasks.training.loop import Tensors, TrainingLoop, eval_mode

SELECTION = "selection.parquet"
FACTS = "selection"
HELD = 64  # groups of a target's samples that stay decoded


class OnlineSelector:
    """Chooses, before each step of a selecting window, the rows that the loop trains on, and keeps what was decided."""

    def __init__(self, loop: TrainingLoop, recorder: Recorder) -> None:
        self._loop, self._recorder = loop, recorder
        self._bindings = loop.run.bindings(loop.model)
        self._targets: dict[str, TargetGroups] = {}
        self._frames: list[pl.DataFrame] = []

    def choose(self, step: int) -> None:
        """Decides what a step trains on, if it is in a selecting window; `loop.chosen` then holds it.

        Raises:
            PlanError: a candidate's or the target's loss is not finite.
        """
        loop, found = self._loop, self._loop.order.selection_at(step)
        if found is None:
            return
        window, spec = found
        rows, count = loop.order.candidates(step, spec.candidates), loop.order.stage.batch_size
        if spec.method == "random":
            choice = select_randomly(len(rows), count, seed_for(loop.order.seed(step), "select"))
        else:
            loop.set_rates(step)
            with eval_mode(loop.model):
                choice = SELECTION_RULES[spec.method](
                    self._steps(rows, step), self._target(spec, step), count
                )
        loop.chosen[step] = rows[choice.order]
        self._frames.append(_frame(step, window, rows, choice, spec.method))

    def write(self, attempt: Attempt) -> None:
        """Adds what was decided since the last time to a segment, if anything was."""
        if self._frames:
            frame, self._frames = pl.concat(self._frames), []
            write_frame(attempt, SELECTION, frame)
            attempt.facts[FACTS] = {"candidates": len(frame), "chosen": int(frame["chosen"].sum())}

    def _steps(self, rows: Int[Tensor, " n"], step: int) -> Float[Tensor, "n p"]:
        """What each candidate would add to the parameters as one of a batch, in the numbers of the run's basis.

        The optimizer is linearised at the candidates' mean gradient; clipping, which depends on the choice, is not foreseen.
        """
        loop, plan = self._loop, self._loop.run.plan
        numbers, sizes = [], []
        for part in rows.split(self._pass):
            batch = loop.batch(part)
            sizes.append(loop.sizes(batch, len(part)))
            numbers.append(self._contributions(batch, part, step))
        weights = torch.cat(sizes)
        if plan.task.reduction != "sum":
            weights = weights / (weights.mean() * loop.order.stage.batch_size)
        contributed = torch.cat(numbers).cpu().double() * weights[:, None]
        share = loop.order.stage.batch_size / len(rows)
        return contributed * self._recorder.sensitivity(contributed.sum(0) * share)

    def _target(self, spec: SelectionConfig, step: int) -> Float[Tensor, " p"]:
        """The gradient of the target's mean loss, over as many of its samples as the plan says."""
        name = spec.target or self._loop.run.plan.target
        if name not in self._targets:
            self._targets[name] = TargetGroups(self._loop, name, spec.samples)
        held = self._targets[name].group(step)
        numbers = torch.cat([self._contributions(batch, rows, step, name) for rows, batch in held])
        return numbers.mean(0).cpu().double()

    def _contributions(
        self, batch: Tensors, rows: Int[Tensor, " n"], step: int, target: str | None = None
    ) -> Float[Tensor, "n p"]:
        loop = self._loop

        def losses() -> Tensor:
            values = loop.task.losses(loop.model, batch)
            if target is None:
                return loop.checked(values, rows, step)
            if not bool(values.isfinite().all()):
                raise PlanError(
                    f"the loss of target {target} is not finite at step {step}; look at its samples"
                )
            return values

        return sample_gradients(losses, len(rows), self._bindings, self._recorder.basis)[0]

    @property
    def _pass(self) -> int:
        """Samples that go through the model at once: as many as in training."""
        stage = self._loop.order.stage
        return stage.batch_size // stage.accumulate


class TargetGroups:
    """A target's scoring samples in groups, one a step in turn, so that each is decoded once while they are few."""

    def __init__(self, loop: TrainingLoop, name: str, size: int) -> None:
        samples, order = list_target_samples(loop.run, name), loop.order
        scoring = scoring_rows(loop.run.plan, name, len(samples))
        generator = torch.Generator().manual_seed(
            seed_for(loop.run.plan.seed, "target", order.number, name)
        )
        self._groups = scoring[torch.randperm(len(scoring), generator=generator)].split(size)
        micro = order.stage.batch_size // order.stage.accumulate
        read = lambda number: [
            (rows, loop.batch(rows, samples)) for rows in self._groups[number].split(micro)
        ]
        self._read = lru_cache(HELD)(read)

    def group(self, step: int) -> list[tuple[Int[Tensor, " n"], Tensors]]:
        """The rows and tensors of a step's group, in passes."""
        return self._read(step % len(self._groups))


def read_selected_rows(folder: StageFolder) -> dict[int, Int[Tensor, " batch"]]:
    """What online selection chose for each step of a stage's committed segments, in the order it was trained on."""
    found = {}
    for segment in folder.segments():
        if FACTS in segment.manifest.facts:
            frame = (
                read_frame(segment, SELECTION, ["step", "sample", "rank"])
                .drop_nulls("rank")
                .sort("step", "rank")
            )
            for (step,), rows in frame.group_by("step", maintain_order=True):
                found[int(str(step))] = torch.from_numpy(rows["sample"].to_numpy().astype(np.int64))
    return found


def count_selected(folder: StageFolder) -> dict[str, int]:
    """How many candidates online selection had in a stage's committed segments, and how many it chose."""
    facts = [segment.manifest.facts.get(FACTS, {}) for segment in folder.segments()]
    return {name: sum(found.get(name, 0) for found in facts) for name in ("candidates", "chosen")}


def _frame(
    step: int, window: int, rows: Int[Tensor, " n"], choice: Choice, method: str
) -> pl.DataFrame:
    """One row a candidate: `step`, `window`, `sample`, `score`, `gain`, `chosen`, `rank` of a chosen one, `reason`."""
    rank = np.zeros(len(rows), np.uint32)
    rank[choice.order.numpy()] = np.arange(1, len(choice.order) + 1)
    best = f"the {len(choice.order)} of {len(rows)}"
    reasons = (
        (f"chosen: among {best} drawn", f"passed over: not among {best} drawn")
        if method == "random"
        else (
            f"chosen: among {best} of largest gain",
            f"passed over: not among {best} of largest gain",
        )
    )
    frame = pl.DataFrame(
        {
            "step": np.full(len(rows), step, np.uint32),
            "window": np.full(len(rows), window, np.uint32),
            "sample": rows.numpy().astype(np.uint32),
            "score": choice.scores.numpy(),
            "gain": choice.gains.numpy(),
            "rank": rank,
        }
    )
    chosen = pl.col("rank") > 0
    return frame.with_columns(
        pl.col("score", "gain").fill_nan(None),
        chosen.alias("chosen"),
        pl.when(chosen).then("rank").alias("rank"),
        pl.when(chosen).then(pl.lit(reasons[0])).otherwise(pl.lit(reasons[1])).alias("reason"),
    ).select("step", "window", "sample", "score", "gain", "chosen", "rank", "reason")
