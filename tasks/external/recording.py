"""Record a stage that another loop trains, into the same files that `secateur run` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.influence.bindings import LossesOf
from secateur.influence.optimizers import unwrap_optimizer
from secateur.influence.process_group import current_ranks
from secateur.influence.recorded_batch import RecordedBatch
from secateur.influence.recorder import Recorder
from secateur.influence.sharded_tensors import unwrap_model
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.external.compatibility import (
    check_model,
    check_optimizer,
    check_plan,
    preserve_rng,
    resolve_windows,
)
from secateur.tasks.external.recording_checks import (
    Keys,
    check_losses,
    find_rows,
)
from secateur.tasks.external.stage_files import StageFiles, load_plan
from secateur.tasks.plan import Plan
from secateur.tasks.results.training_results import (
    TrainingResult,
    read_training_result,
)
from secateur.tasks.run import Run
from secateur.tasks.training.segments import (
    window_of_step,
)


class StageRecording:
    """Records a stage of a plan while your own loop trains it::

        with Recording("plan.yaml", 0, model, optimizer) as recording:
            for step, (keys, x, y) in enumerate(batches):
                if step < recording.step:  # committed before an interruption
                    continue
                optimizer.zero_grad()
                with recording.batch(keys) as batch:
                    losses = functional.cross_entropy(model(x), y, reduction="none")
                    batch.losses = losses
                    losses.mean().backward()
                optimizer.step()

    Users import it as `secateur.Recording`.

    The plan describes the run: data, targets, the optimizer's kind, the basis, `segment_steps`, and
    model and learning task, which compute the targets' gradients and answer queries later. The
    loop alone decides the order of samples, the schedule, accumulation and clipping.

    Every `segment_steps` optimizer steps, a ledger file and a checkpoint are committed together.
    Leaving the block without an error commits the remaining steps, and that the stage is trained.

    Entering the block gives model and optimizer the state that the stage continues from: that of
    the last committed segment, or of the end of the stage before. If neither exists, the run begins
    with the state that the model has.

    Under `torchrun`, every process makes its own recording, and records the samples that it trains
    on. The first process writes and commits, and the others wait for it.

    Args:
        plan: the plan, or the path of its file.
        model: has the same state as the plan's model, by the same names. It may be wrapped in
            `DistributedDataParallel`, or divided with `fully_shard`.
        optimizer: of the plan's kind, over the model's parameters. Its settings are your own.
        steps: optimizer steps that the stage will take. Windows in fractions of them need it.
        by: the trainer's name in the ledger. Only the trainer that began a stage can continue it.
        tolerance: relative distance allowed between the contributions' sum and the gradient. If
            None, it is 0.001, and 0.02 where anything is computed in half precision.

    Attributes:
        finished: whether the stage is trained to its end, now or by an earlier recording.
        ranks: this process among those that train the model.

    Raises:
        PlanError, SecateurError, StorageError: the plan, model, optimizer or data cannot be used.
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
        tolerance: float | None = None,
    ) -> None:
        self.plan = load_plan(plan)
        self.stage = stage
        self.steps = steps
        self.by = by
        self.finished = False
        self.ranks = current_ranks()
        self._model = unwrap_model(model)
        self._optimizer = unwrap_optimizer(optimizer)
        self._tolerance = tolerance
        self._recorder: Recorder | None = None

    def __enter__(self) -> Self:
        self.prepare()
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    @property
    def step(self) -> int:
        """The next optimizer step's number within the stage, from 0."""
        return self._files.committed_steps if self._recorder is None else self._recorder.next_step

    @property
    def at_boundary(self) -> bool:
        """Whether a segment has just been committed."""
        if self._recorder is None:
            return False
        return self._files.segments > 0 and self.step == self._files.committed_steps

    @property
    def is_next_recorded(self) -> bool:
        """Whether the next step is recorded: it is in a window, or it serves the curvature."""
        return self._window_of(self.step) is not None

    def prepare(self) -> None:
        """Check the arguments, and create the run, its sample list, start and basis if missing."""
        check_plan(self.plan, self.stage)
        # The first process makes what is missing; the others then find it made.
        with self.ranks.first_goes_first(), preserve_rng():
            self.run = Run.start(self.plan)
            check_model(self.run, self._model)
            check_optimizer(self.plan, self._model, self._optimizer)
            list_stage_samples(self.run, self.stage)
            self._samples = read_stage_samples(self.run, self.stage)
            self._rows = {key: row for row, key in enumerate(self._samples.frame["key"])}
            self._freeze_windows()
            count = len(self._samples)
            self._windows = resolve_windows(self.run.plan, self.stage, count, self.steps)
            self._files = StageFiles(
                self.run, self.stage, self._model, self._optimizer, self.ranks, self.by
            )
        if self.stage == 0:
            self._files.create_start()
        self.finished = self.run.folder.stage(self.stage).trained.committed

    def begin(self) -> None:
        """Load the state that the stage continues from, and record optimizer steps from here."""
        self._files.load_start()
        if self.finished:
            return
        bindings = self.run.bindings(self._model)
        basis = self.run.basis(bindings)
        self._recorder = Recorder(self._model, self._optimizer, bindings, basis, self._tolerance)
        self._recorder.start_at(self._files.committed_steps)
        self._step_hook = self._optimizer.register_step_post_hook(self._after_step)

    def reach(self, step: int) -> bool:
        """Return whether to record the step that a trainer takes next.

        A trainer that resumes from its own checkpoint may repeat steps that the ledger has. These
        are not recorded again. At the first step that the ledger lacks, `begin` is called.

        Args:
            step: the trainer's own count, from 0.

        Raises:
            PlanError: the trainer is ahead of the ledger.
        """
        if self.finished or step < self.step:
            return False
        if step > self.step:
            raise PlanError(
                f"the trainer continues at step {step} of stage {self.stage}, and the ledger of "
                f"{self.run.url} ends at step {self.step}; resume from a checkpoint of that step "
                f"or an earlier one"
            )
        if self._recorder is None:
            self.begin()
        return True

    @contextmanager
    def batch(
        self,
        keys: Keys,
        weights: Float[Tensor, " batch"] | None = None,
        losses_of: LossesOf | None = None,
        documents: Int[Tensor, "rows positions"] | None = None,
    ) -> Iterator[RecordedBatch]:
        """Record the forward and backward pass inside the block.

        Several blocks before one optimizer step are gradient accumulation.

        Args:
            keys: the samples' keys in the stage's shards, or their row numbers in the run's sample
                list, in the order of the batch.
            weights: of each sample's loss in the loss that is differentiated, if that is not a mean
                over the block's samples. Not needed if `batch.losses` are set with their graph.
            losses_of: runs the samples at some places of the batch, and returns one loss for each:
                `lambda rows: criterion(model(x[rows]), y[rows])`. With it, modules of any layout
                are captured, and it is checked that contributions are those of the samples they
                are recorded for. Without it, nothing tells if samples are mixed or exchanged.
            documents: the place in `keys` of the sample that each position of the batch belongs to,
                or -1, if several samples share a row.
        """
        if self._recorder is None:
            raise PlanError(
                f"stage {self.stage} of {self.run.url} is trained already, in {self.step} steps; "
                f"leave them out"
            )
        step = self.step
        rows = find_rows(keys, self._rows, self.stage, step)
        if self.steps is not None and step >= self.steps:
            raise PlanError(
                f"stage {self.stage} continues after the {self.steps} steps that it should take; "
                f"correct `steps`"
            )
        place = self._window_of(step)
        if place is None:  # the step is not recorded, but the block sets its losses all the same
            yield RecordedBatch(rows, torch.zeros(len(rows)), -1)
            return
        with self._recorder.batch(rows, weights, *place, losses_of, documents) as batch:
            yield batch
        policy = self.plan.stages[self.stage].prune
        check_losses(batch, policy, self._samples, self.stage, step)

    def skip_step(self) -> None:
        """Record a step that changed nothing, because a `GradScaler` met an overflow.

        Trainers count such steps. In your own loop they are simply left out.
        """
        assert self._recorder is not None
        self._recorder.skip_step()
        self._after_step()

    def finish(self) -> TrainingResult:
        """Commit the steps since the last segment, and that the stage is trained to its end.

        If it was trained before, load the state of its end into model and optimizer.
        """
        if self.finished:
            self._files.load_start()
            return read_training_result(self.run, self.stage)
        if self._recorder is not None and self.step > self._files.committed_steps:
            self._commit()
        result = self._files.commit_result(len(self._samples))
        self.finished = True
        return result

    def close(self) -> None:
        """Remove the hooks from model and optimizer, and forget what is not committed."""
        if self._recorder is not None:
            self._recorder.close()
            self._step_hook.remove()
            self._recorder = None

    def _window_of(self, step: int) -> tuple[int, float] | None:
        """Return what `window_of_step` does for a step."""
        if self._windows is None:
            return 0, 1.0
        return window_of_step(self._windows, self.plan.stages[self.stage].stride, step)

    def _freeze_windows(self) -> None:
        """Freeze the stage's automatic windows, if the plan has any."""
        if not any(stage.auto_windows for stage in self.run.plan.stages):
            return
        # Imported here, because it imports matplotlib and ruptures, which most recordings never
        # need.
        from secateur.tasks.analysis.windows import freeze_windows

        freeze_windows(self.run, self.stage)
        self.run = Run.open(self.run.url)

    def _after_step(self, *_: object) -> None:
        """Runs right after the optimizer's own step."""
        if self.step - self._files.committed_steps >= self.plan.segment_steps:
            self._commit()

    def _commit(self) -> None:
        assert self._recorder is not None
        self._files.commit(self._recorder.take_segment(), self.step)
