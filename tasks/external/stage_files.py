"""What a recorded stage has committed: its start, segments with checkpoints, and result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from secateur.errors import PlanError
from secateur.influence.process_group import Ranks
from secateur.influence.segment import Segment
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import read_checkpoint, write_checkpoint
from secateur.tasks.data.collate import Tensors
from secateur.tasks.engine.progress import print_status
from secateur.tasks.external.compatibility import preserve_rng
from secateur.tasks.external.recording_checks import check_recorded
from secateur.tasks.plan import Plan
from secateur.tasks.plan.plan_file import read_plan
from secateur.tasks.results.training_results import (
    TrainingResult,
    count_segments,
    start_checkpoint,
)
from secateur.tasks.run import Run
from secateur.tasks.training.checkpoint import capture_state, load_state
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.optimizers import build_optimizer
from secateur.tasks.training.segments import commit_segment, commit_training_result

# Torch's random state, in addition to what every checkpoint holds. Of several processes, each but
# the first adds its number to the name.
RANDOM_STATE = "random"


class StageFiles:
    """The files of a stage that another loop trains. Of several processes, the first writes them.

    Args:
        ranks: this process among those that train the model.
        by: the trainer's name in the ledger.

    Attributes:
        segments: how many are committed.
        committed_steps: how many steps they have.
    """

    def __init__(
        self,
        run: Run,
        stage: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        by: str,
    ) -> None:
        self.segments = count_segments(run, stage, by)
        self.committed_steps = count_committed_steps(run.plan, stage)
        self._run = run
        self._stage = stage
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._by = by
        self._folder = run.folder.stage(stage)
        # Checkpoints number the parameters as the plan's optimizer does, and the user's optimizer
        # may list them in another order.
        self._numbered_like = build_optimizer(run.plan.optimizer, model)

    def create_start(self) -> None:
        """Commit the run's first checkpoint, and fit the basis on a copy of the model."""
        start = self._folder.start
        if not self._ranks.first_decides(start.committed):
            state = self._capture_state()

            def write(attempt: Attempt) -> None:
                write_checkpoint(attempt, state)

            if self._ranks.is_first:
                start.write_once("checkpoint", {}, write)
        with self._ranks.first_goes_first(), preserve_rng():
            weights = {
                name.removeprefix("model."): tensor
                for name, tensor in read_checkpoint(start).items()
                if name.startswith("model.")
            }
            fit_basis(self._run, weights)

    def load_start(self) -> None:
        """Give model and optimizer the state that the stage continues from."""
        if self.segments:
            self._load_segment_end()
            return
        carried = self._stage == 0 or self._run.plan.optimizer.at_stage == "carry"
        state = read_checkpoint(start_checkpoint(self._run, self._stage))
        load_state(state, self._model, self._optimizer, carried, self._numbered_like)

    def commit(self, segment: Segment, next_step: int) -> None:
        """Commit a segment, with a checkpoint.

        Raises:
            PlanError: another process has recorded the segment.
        """
        state = self._capture_state()
        for rank, random_state in enumerate(self._ranks.gather(torch.get_rng_state())):
            state[_random_state_name(rank)] = random_state
        is_committed = self._ranks.is_first and commit_segment(
            self._run, self._stage, self.segments, segment, state, self._by
        )
        if not self._ranks.first_decides(is_committed):
            raise PlanError(
                f"another process has recorded segment {self.segments} of stage {self._stage} of "
                f"{self._run.url}; let one trainer continue, and give the other a run of another "
                f"name"
            )
        self.segments += 1
        self.committed_steps = next_step

    def commit_result(self, samples: int) -> TrainingResult:
        """Commit that the stage is trained to its end."""
        result = TrainingResult(
            stage=self._stage,
            samples=samples,
            steps=self.committed_steps,
            segments=self.segments,
            by=self._by,
        )
        with self._ranks.first_goes_first():
            check_recorded(self._run, self._stage)
            return commit_training_result(self._run, result)

    def _load_segment_end(self) -> None:
        state = read_checkpoint(self._folder.segment(self.segments - 1))
        load_state(state, self._model, self._optimizer, numbered_like=self._numbered_like)
        # A process that took no part before keeps the random state that it has.
        if (name := _random_state_name(self._ranks.rank)) in state:
            torch.set_rng_state(state[name])
        if self._ranks.is_first:
            print_status(
                f"stage {self._stage} of {self._run.url} continues at step {self.committed_steps}"
            )

    def _capture_state(self) -> Tensors:
        """Return what the first process writes into a checkpoint."""
        keep = self._ranks.is_first
        return capture_state(self._model, self._optimizer, self._numbered_like, keep)


def _random_state_name(rank: int) -> str:
    return f"{RANDOM_STATE}.{rank}" if rank else RANDOM_STATE


def count_committed_steps(plan: Plan | str | Path, stage: int) -> int:
    """Return how many steps of a stage the ledger has."""
    segments = Run.of_plan(load_plan(plan)).folder.stage(stage).segments()
    return int(segments[-1].manifest.facts["next_step"]) if segments else 0


def load_plan(plan: Plan | str | Path) -> Plan:
    """Return a plan, which may be given by the path of its file."""
    return plan if isinstance(plan, Plan) else read_plan(plan)
