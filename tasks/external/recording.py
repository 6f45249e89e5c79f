"""Room `tasks`: recording a stage that another loop trains: the same ledger, checkpoints and basis as `train` makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.recorder import RecordedBatch, Recorder
from secateur.storage.ledger import read_checkpoint, read_ledger, write_checkpoint
from secateur.tasks.analysis.windows import freeze_windows
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.external.compatibility import (
    check_model,
    check_optimizer,
    check_plan,
    preserve_rng,
    resolve_windows,
)
from secateur.tasks.plan import LossPolicy, Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.checkpoint import capture_state, load_state
from secateur.tasks.training.fit_basis import store_basis
from secateur.tasks.training.optimizer import build_optimizer
from secateur.tasks.training.train import (
    TrainingResult,
    commit_segment,
    commit_trained,
    count_segments,
    start_checkpoint,
    window_of_step,
)

Keys = Sequence[str] | Sequence[int] | Int[Tensor, " batch"]

RANDOM = "random"  # torch's random state, beside what every checkpoint holds


class Recording:
    """Records a stage of a plan while a loop of your own trains it::

        with Recording("plan.yaml", 0, model, optimizer) as recording:
            for step, (keys, x, y) in enumerate(batches):
                if step < recording.step:  # committed already, by a trainer that was interrupted
                    continue
                optimizer.zero_grad()
                with recording.batch(keys) as batch:
                    losses = functional.cross_entropy(model(x), y, reduction="none")
                    batch.losses = losses
                    losses.mean().backward()
                optimizer.step()

    The plan says what the run is about: model and task (so that targets can be differentiated, and questions answered
    afterwards), data, targets, the optimizer's kind, basis, `segment_steps`. The loop is yours, with its order, schedule,
    accumulation and clipping. Every `segment_steps` optimizer steps a ledger file and a checkpoint are committed together;
    leaving the block without an error commits the rest, and that the stage is trained.

    Entering gives model and optimizer the state that the stage goes on from: that of the last whole segment, or of the end
    of the stage before. The very first state of a run is the model's own.

    Args:
        plan: the plan, or the path of its file.
        model: holds what the plan's model holds, by the same names.
        optimizer: of the plan's kind, over the model's parameters; its settings are yours.
        steps: optimizer steps that the stage will take; windows in fractions of it need them.
        by: what the trainer is called in the ledger.
        tolerance: relative distance allowed between the contributions' sum and the gradient.

    Attributes:
        finished: the stage was trained before.

    Raises:
        PlanError, SecateurError, StorageError: what in plan, model, optimizer or data would not work.
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        stage: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None = None,
        by: str = "outside",
        tolerance: float = 1e-3,
    ) -> None:
        self.plan = _read(plan)
        self.stage, self.steps, self.by, self.finished = stage, steps, by, False
        self._model, self._optimizer, self._tolerance = model, optimizer, tolerance
        self._recorder: Recorder | None = None
        self._segments, self._done = 0, 0

    def __enter__(self) -> Self:
        self.prepare()
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    @property
    def step(self) -> int:
        """The next optimizer step's number within the stage, from 0."""
        return self._done if self._recorder is None else self._recorder.next_step

    @property
    def at_boundary(self) -> bool:
        """Whether a segment has just been committed."""
        return self._recorder is not None and self._segments > 0 and self.step == self._done

    def prepare(self) -> None:
        """Checks what was given; makes the run, its list of samples, its start and its basis, where they are not there."""
        check_plan(self.plan, self.stage)
        with preserve_rng():
            self.run = Run.start(self.plan)
            check_model(self.run, self._model)
            check_optimizer(self.plan, self._model, self._optimizer)
            self._like = build_optimizer(self.plan.optimizer, self._model)
            list_stage_samples.fn(self.run.url, self.stage)
            self._samples = read_stage_samples(self.run, self.stage)
            self._rows = {key: row for row, key in enumerate(self._samples.frame["key"])}
            freeze_windows.fn(self.run.url, self.stage)
            self.run = Run.open(self.run.url)
            self._windows = resolve_windows(
                self.run.plan, self.stage, len(self._samples), self.steps
            )
            self._folder = self.run.folder.stage(self.stage)
            self._segments = count_segments(self.run, self.stage, self.by)
            if self.stage == 0:
                self._first()
        self.finished = self._folder.trained.committed
        self._done = steps_committed(self.plan, self.stage)

    def begin(self) -> None:
        """Gives model and optimizer the state that the stage goes on from, and listens to the optimizer from here."""
        self._restore()
        if self.finished:
            return
        bindings = self.run.bindings(self._model)
        basis = self.run.basis(bindings)
        self._recorder = Recorder(self._model, self._optimizer, bindings, basis, self._tolerance)
        self._recorder.start_at(self._done)
        self._after = self._optimizer.register_step_post_hook(self._stepped)

    def reach(self, step: int) -> bool:
        """Whether a trainer that counts by itself, and is about to take step `step`, is recorded. One that resumes from a
        checkpoint of its own may repeat steps that the ledger has; at the first it lacks, `begin` gives it the state.

        Raises:
            PlanError: the trainer is ahead of the ledger.
        """
        if self.finished or step < self.step:
            return False
        if step > self.step:
            raise PlanError(
                f"the trainer goes on at step {step} of stage {self.stage}, and the ledger of {self.run.url} ends at step "
                f"{self.step}; resume from a checkpoint of that step or an earlier one"
            )
        if self._recorder is None:
            self.begin()
        return True

    @contextmanager
    def batch(
        self, keys: Keys, weights: Float[Tensor, " batch"] | None = None
    ) -> Iterator[RecordedBatch]:
        """Records the forward and backward pass inside the block: a batch, or one of several before an optimizer step.

        Args:
            keys: the samples' keys in the stage's shards, or their numbers in the run's list, in the order of the batch.
            weights: of each sample's loss in the loss that is differentiated, where that is no mean over the block's
                samples; not needed where `batch.losses` are set with their graph.
        """
        if self._recorder is None:
            raise PlanError(
                f"stage {self.stage} of {self.run.url} is trained already, in {self.step} steps; leave them out"
            )
        step, rows = self.step, self._numbered(keys)
        if self.steps is not None and step >= self.steps:
            raise PlanError(
                f"stage {self.stage} goes on after the {self.steps} steps that it was to take; correct `steps`"
            )
        stage = self.plan.stages[self.stage]
        place = (
            window_of_step(self._windows, stage.stride, step)
            if self._windows is not None
            else (0, 1.0)
        )
        if place is None:
            yield RecordedBatch(rows, torch.zeros(len(rows)), -1)
            return
        with self._recorder.batch(rows, weights, *place) as batch:
            yield batch
        self._check_losses(batch, step)

    def finish(self) -> TrainingResult:
        """Commits the steps since the last whole segment, and that the stage is trained; where it was before, gives model
        and optimizer the state of its end."""
        if self.finished:
            self._restore()
        else:
            if self._recorder is not None and self.step > self._done:
                self._commit()
            self._check_recorded()
            trained = TrainingResult(
                stage=self.stage,
                samples=len(self._samples),
                steps=self._done,
                segments=self._segments,
                by=self.by,
            )
            commit_trained(self.run, trained)
            self.finished = True
        return TrainingResult(**self._folder.trained.manifest.facts)

    def close(self) -> None:
        """Leaves model and optimizer without hooks; what is not committed is forgotten."""
        if self._recorder is not None:
            self._recorder.close()
            self._after.remove()
            self._recorder = None

    def _first(self) -> None:
        """A run's start, and the basis fitted from there with the plan's own loop on a model of its own."""
        start = self._folder.start
        if not start.committed:
            with start.attempt("checkpoint", {}) as attempt:
                write_checkpoint(attempt, capture_state(self._model, self._optimizer, self._like))
        weights = {
            n.removeprefix("model."): t
            for n, t in read_checkpoint(start).items()
            if n.startswith("model.")
        }
        store_basis(self.run, weights)

    def _restore(self) -> None:
        if self._segments:
            state = read_checkpoint(self._folder.segment(self._segments - 1))
            load_state(state, self._model, self._optimizer, like=self._like)
            torch.set_rng_state(state[RANDOM])
            print(
                f"stage {self.stage} of {self.run.url} carries on at step {self._done}",
                file=sys.stderr,
                flush=True,
            )
            return
        carried = self.stage == 0 or self.plan.optimizer.at_stage == "carry"
        start = read_checkpoint(start_checkpoint(self.run, self.stage))
        load_state(start, self._model, self._optimizer, carried, self._like)

    def _stepped(self, *_: object) -> None:
        """Runs right after the optimizer's own step."""
        if self.step - self._done >= self.plan.segment_steps:
            self._commit()

    def _commit(self) -> None:
        assert self._recorder is not None
        segment = self._recorder.take()
        state = capture_state(self._model, self._optimizer, self._like) | {
            RANDOM: torch.get_rng_state()
        }
        if not commit_segment(self.run, self.stage, self._segments, segment, state, self.by):
            raise PlanError(
                f"another process has recorded segment {self._segments} of stage {self.stage} of {self.run.url}; let one "
                f"trainer go on, and give the other a run of another name"
            )
        self._segments, self._done = self._segments + 1, self.step

    def _numbered(self, keys: Keys) -> Int[Tensor, " batch"]:
        """The samples' rows in the stage's list."""
        rows = [key if isinstance(key, int) else self._rows.get(key, -1) for key in _listed(keys)]
        for key, row in zip(_listed(keys), rows, strict=True):
            if not 0 <= row < len(self._samples):
                raise PlanError(
                    f"sample {key} of step {self.step} is none of the {len(self._samples)} that stage {self.stage} trains on; "
                    f"give keys as the stage's shards have them"
                )
        return torch.tensor(rows, dtype=torch.int64)

    def _check_losses(self, batch: RecordedBatch, step: int) -> None:
        if batch.losses is None:
            if isinstance(self.plan.stages[self.stage].prune, LossPolicy):
                raise PlanError(
                    f"the plan prunes stage {self.stage} by loss, and step {step} gave none; set `batch.losses`"
                )
            return
        bad = (~batch.losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            key = self._samples.keys([int(batch.samples[bad[0]])])[0]
            raise PlanError(
                f"the loss of sample {key} is {float(batch.losses[bad[0]]):g} at step {step} of stage {self.stage}; lower the "
                f"learning rate or look at the sample"
            )

    def _check_recorded(self) -> None:
        if not any(
            (read_ledger(ledger)[0]["windows"] >= 0).any() for ledger in self._folder.segments()
        ):
            raise PlanError(
                f"no step of stage {self.stage} of {self.run.url} was recorded in a window; take its steps within the "
                f"block, each with `recording.batch`"
            )


def steps_committed(plan: Plan | str | Path, stage: int) -> int:
    """The first step of a stage that its ledger lacks."""
    segments = Run.of(_read(plan)).folder.stage(stage).segments()
    return int(segments[-1].manifest.facts["next_step"]) if segments else 0


def _read(plan: Plan | str | Path) -> Plan:
    return plan if isinstance(plan, Plan) else read_plan(str(plan))


def _listed(keys: Keys) -> Sequence[str] | Sequence[int]:
    return keys.tolist() if isinstance(keys, Tensor) else keys
