"""The base class of curvature settings, and their registry. `tasks/training` has the classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.tasks.plan.base import Config
from secateur.tasks.plan.registry import Registry

if TYPE_CHECKING:
    from secateur.influence.curvature import Curvature
    from secateur.influence.recorder import Recorder
    from secateur.influence.segment import Segment
    from secateur.influence.vector_products import ComputeMatrices
    from secateur.tasks.run import LearningTask
    from secateur.tasks.training.loop import TrainingLoop


class CurvatureConfig(Config, ABC):
    """How a step's gradient changes when the parameters change.

    A subclass gives `kind` its name and implements `build`. If it needs more than the recorded
    contributions, it records that in `record_step` and sets `needs_own_loop`.

    Attributes:
        needs_own_loop: whether it makes extra passes, which only `secateur run` can make.
        compute_matrices: evaluates the matrices that `count_matrices` counts, so that their memory
            can be foretold; None if there are none.
    """

    kind: str
    coupling: Literal["block", "full"] | None = Field(
        None,
        description="`full` if a change in one block changes the gradient of the others; null "
        "means full if `components` is set, and block otherwise",
    )
    needs_own_loop: ClassVar[bool] = False
    compute_matrices: ClassVar[ComputeMatrices | None] = None

    @abstractmethod
    def build(self, segment: Segment, spans: Sequence[slice]) -> Curvature:
        """Return the curvature of a recorded segment.

        Args:
            spans: the coefficients that are coupled: one slice per block, or one slice of all.
        """

    def count_gradients(self, task: LearningTask, steps: int, batch: int) -> int:
        """Return how many gradients a segment records beside contributions. By default none.

        Args:
            steps: recorded steps of the segment.
            batch: samples per step.
        """
        return 0

    def count_matrices(self, steps: int) -> int:
        """Return how many matrices of the coupled coefficients a segment records. By default none.

        Args:
            steps: of the segment.
        """
        return 0

    def record_step(
        self, recorder: Recorder, loop: TrainingLoop, segment: range, step: int, recorded: bool
    ) -> None:
        """Record what a step needs beside contributions, before it is taken. By default nothing.

        Args:
            segment: the steps of the segment that the step is in.
            recorded: whether this step's contributions are recorded.
        """


CURVATURES: Registry[CurvatureConfig] = Registry(
    CurvatureConfig,  # type: ignore[type-abstract]  # only concrete classes are registered
    tag="kind",
    builtins="secateur.tasks.training.curvatures",
)
register_curvature = CURVATURES.register
