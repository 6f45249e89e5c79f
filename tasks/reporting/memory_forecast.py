"""The peak memory of each part of a run, foretold from the plan, the samples and the shapes."""

from __future__ import annotations

from secateur.storage.shards import Samples
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.forecast_sizes import PartMemory, RecordedStage, Sizes
from secateur.tasks.reporting.pass_memory import PassMemory
from secateur.tasks.reporting.replay_memory import forecast_replay, replays
from secateur.tasks.reporting.training_memory import forecast_fit, forecast_training
from secateur.tasks.reporting.valuation_memory import (
    forecast_composing,
    forecast_embedding,
    forecast_scoring,
    forecast_targets,
)


def forecast_memory(
    plan: Plan,
    sizes: Sizes,
    passes: PassMemory,
    stages: list[RecordedStage],
    samples: Samples,
    targets: dict[str, Samples],
) -> list[PartMemory]:
    """Return the peak memory of each part, at its largest stage.

    Args:
        stages: the sizes of the stages' records.
        samples: the samples to train on.
        targets: the samples of each target.
    """
    largest = max(stages, key=lambda stage: stage.batch * stage.segment_steps)
    most_records = max(stages, key=lambda stage: stage.records)
    parts = []
    if getattr(plan.basis_config, "method", "pca") == "pca":  # coordinates are fitted too
        parts.append(forecast_fit(plan, sizes, passes, samples, stages[0]))
    parts.append(forecast_training(plan, sizes, passes, samples, stages))
    parts.append(forecast_embedding(sizes, largest))
    parts.append(forecast_composing(plan, sizes, most_records))
    parts.append(forecast_targets(plan, sizes, passes, targets))
    if replays(plan):
        parts.append(forecast_replay(plan, sizes, passes, samples, stages, targets))
    parts.append(forecast_scoring(plan, sizes, largest, stages, targets))
    return parts
