"""Online selection: choose what the steps of a window train on, in place of the batch schedule."""

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
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.frames import write_frame
from secateur.tasks.data.collate import Tensors
from secateur.tasks.data.held_out import scoring_rows
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.plan import SelectionConfig
from secateur.tasks.results.training_results import SELECTION, SELECTION_FACTS
from secateur.tasks.training.loop import TrainingLoop, eval_mode

DECODED_GROUPS = 64  # groups of target samples that stay decoded in memory


class OnlineSelector:
    """Chooses the rows that each step of a selecting window trains on, and records the choice."""

    def __init__(self, loop: TrainingLoop, recorder: Recorder) -> None:
        self._loop = loop
        self._recorder = recorder
        self._bindings = loop.run.bindings(loop.model)
        self._targets: dict[str, TargetGroups] = {}
        self._frames: list[pl.DataFrame] = []

    def choose(self, step: int) -> None:
        """Choose what a step trains on, if it is in a selecting window.

        The rows are put into `loop.selected_rows`.

        Raises:
            PlanError: a candidate's loss or the target's loss is not finite.
        """
        loop = self._loop
        place = loop.schedule.selection_at(step)
        if place is None:
            return
        window, config = place
        rows = loop.schedule.candidates(step, config.candidates)
        count = loop.schedule.stage.batch_size
        if config.method == "random":
            seed = seed_for(loop.schedule.seed(step), "select")
            choice = select_randomly(len(rows), count, seed)
        else:
            loop.set_rates(step)
            with eval_mode(loop.model):
                updates = self._candidate_updates(rows, step)
                gradient = self._target_gradient(config, step)
                choice = SELECTION_RULES[config.method](updates, gradient, count)
        loop.selected_rows[step] = rows[choice.order]
        self._frames.append(_choice_frame(step, window, rows, choice, config.method))

    def write(self, attempt: Attempt) -> None:
        """Write the choices since the last call to a segment, if there are any."""
        if self._frames:
            frame = pl.concat(self._frames)
            self._frames = []
            write_frame(attempt, SELECTION, frame, schemas.SELECTION)
            chosen = int(frame["chosen"].sum())
            attempt.facts[SELECTION_FACTS] = {"candidates": len(frame), "chosen": chosen}

    def _candidate_updates(self, rows: Int[Tensor, " n"], step: int) -> Float[Tensor, "n p"]:
        """What each candidate would add to the parameters as one of a batch, in the run's basis.

        The optimizer is linearized at the candidates' mean gradient. Clipping depends on the choice
        and is left out.
        """
        loop = self._loop
        plan = loop.run.plan
        gradients = []
        sizes = []
        for part in rows.split(self._pass_size):
            batch = loop.batch(part)
            sizes.append(loop.sizes(batch, len(part)))
            gradients.append(self._sample_gradients(batch, part, step))
        weights = torch.cat(sizes)
        if plan.task.reduction != "sum":
            weights = weights / (weights.mean() * loop.schedule.stage.batch_size)
        contributions = torch.cat(gradients).cpu().double() * weights[:, None]
        share = loop.schedule.stage.batch_size / len(rows)
        return contributions * self._recorder.step_sensitivity(contributions.sum(0) * share)

    def _target_gradient(self, config: SelectionConfig, step: int) -> Float[Tensor, " p"]:
        """The gradient of the target's mean loss, over as many samples as the plan says."""
        plan = self._loop.run.plan
        name = config.target or plan.pruning_target
        if name not in self._targets:
            self._targets[name] = TargetGroups(self._loop, name, config.samples)
        group = self._targets[name].group(step)
        gradients = [self._sample_gradients(batch, rows, step, name) for rows, batch in group]
        return torch.cat(gradients).mean(0).cpu().double()

    def _sample_gradients(
        self, batch: Tensors, rows: Int[Tensor, " n"], step: int, target: str | None = None
    ) -> Float[Tensor, "n p"]:
        loop = self._loop
        run = loop.losses_of(batch)

        def losses_of(places: Tensor) -> Tensor:
            values = run(places)
            if target is None:
                return loop.check_losses(values, rows[places], step)
            if not bool(values.isfinite().all()):
                raise PlanError(
                    f"the loss of target {target} is not finite at step {step}; look at its samples"
                )
            return values

        return sample_gradients(losses_of, len(rows), self._bindings, self._recorder.basis)[0]

    @property
    def _pass_size(self) -> int:
        """Samples that pass through the model together: as many as in training."""
        stage = self._loop.schedule.stage
        return stage.batch_size // stage.accumulate


class TargetGroups:
    """A target's scoring samples in groups, one group per step in turn.

    Recently used groups stay decoded, so that each sample is decoded once while they are few.
    """

    def __init__(self, loop: TrainingLoop, target: str, size: int) -> None:
        plan = loop.run.plan
        self._loop = loop
        self._samples = list_target_samples(loop.run, target)
        scoring = scoring_rows(plan, target, len(self._samples))
        seed = seed_for(plan.seed, "target", loop.schedule.number, target)
        generator = torch.Generator().manual_seed(seed)
        self._groups = scoring[torch.randperm(len(scoring), generator=generator)].split(size)
        self._decoded = lru_cache(DECODED_GROUPS)(self._decode)

    def group(self, step: int) -> list[tuple[Int[Tensor, " n"], Tensors]]:
        """Return the rows and tensors of a step's group, pass by pass."""
        return self._decoded(step % len(self._groups))

    def _decode(self, number: int) -> list[tuple[Tensor, Tensors]]:
        stage = self._loop.schedule.stage
        passes = self._groups[number].split(stage.batch_size // stage.accumulate)
        return [(rows, self._loop.batch(rows, self._samples)) for rows in passes]


def _choice_frame(
    step: int, window: int, rows: Int[Tensor, " n"], choice: Choice, method: str
) -> pl.DataFrame:
    """One row per candidate, with the columns of `selection.parquet`."""
    rank = np.zeros(len(rows), np.uint32)
    rank[choice.order.numpy()] = np.arange(1, len(choice.order) + 1)
    best = f"the {len(choice.order)} of {len(rows)}"
    best += " drawn" if method == "random" else " of largest gain"
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
    chosen_reason = pl.lit(f"chosen: among {best}")
    other_reason = pl.lit(f"passed over: not among {best}")
    return frame.with_columns(
        pl.col("score", "gain").fill_nan(None),
        chosen.alias("chosen"),
        pl.when(chosen).then("rank").alias("rank"),
        pl.when(chosen).then(chosen_reason).otherwise(other_reason).alias("reason"),
    ).select("step", "window", "sample", "score", "gain", "chosen", "rank", "reason")
