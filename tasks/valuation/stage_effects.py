"""The effect of leaving out each use of a stage on a target's loss at the stage's end."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.tasks.results.valuation_results import (
    read_embeddings,
    read_replayed_target,
    read_scoring_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.embedding_space import start_query, to_embedding_space
from secateur.tasks.valuation.pull_back import pull_back_scores
from secateur.tasks.valuation.replay import replay_stage


def stage_effects(run: Run, stage: int, target: str, estimate: str) -> Float[Tensor, " uses"]:
    """Return an estimate of TSLOO for every recorded use, in the order of `scores.parquet`.

    Positive means that the use lowered the mean loss of those target samples that score training
    samples.

    Args:
        estimate: `embedding`, `pull_back` or `replay`, as in a query.

    Raises:
        PlanError: the stage cannot be replayed (see `replay_stage`).
    """
    if estimate == "replay":
        replay_stage(run, stage, [target])
        return read_replayed_target(run, stage, target)
    mean = read_scoring_gradients(run, stage, target).mean(0, keepdim=True)
    if estimate == "pull_back":
        ((_, effects),) = pull_back_scores(run, [stage], mean)
        return effects[:, 0]
    embeddings = run.folder.stage(stage).embeddings
    vector = to_embedding_space(run, stage, start_query(run, mean))[0].double()
    return torch.cat([part.double() @ vector for part in read_embeddings(embeddings)])
