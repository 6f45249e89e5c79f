"""The memory of training a stage, and of fitting the basis."""

from __future__ import annotations

from torch import nn

from secateur.influence.moments import LARGEST_SIDE
from secateur.storage.shards import Samples
from secateur.tasks.plan import Plan
from secateur.tasks.reporting.forecast_sizes import PartMemory, RecordedStage, Sizes
from secateur.tasks.reporting.pass_memory import LOCATED, PassMemory
from secateur.tasks.training.distribution import outermost_layers


def forecast_fit(
    plan: Plan, sizes: Sizes, passes: PassMemory, samples: Samples, stage: RecordedStage
) -> PartMemory:
    """Return the passes with the fit's sums; or the eigenvectors of the largest second moment."""
    one_pass = passes.fit(samples, max(stage.whole_micro_batch, LOCATED))
    eigenvectors = 0
    if plan.basis_config.kind == "kronecker":
        sides = [n for b in passes.bindings.blocks for n in (b.rows, b.cols)]
        # Two copies, the vectors in two orders, and a workspace of twice the matrix, in float64.
        eigenvectors = 6 * 8 * max(min(side, LARGEST_SIDE) for side in sides) ** 2
    return PartMemory(
        part="fit of the basis",
        state=sizes.weights + sizes.slots,
        passes=max(one_pass, eigenvectors + sizes.trained),
        records=0,
    )


def forecast_training(
    plan: Plan, sizes: Sizes, passes: PassMemory, samples: Samples, stages: list[RecordedStage]
) -> PartMemory:
    """Return the largest of a pass, an update, and the copy of the state for a checkpoint."""
    stage = max(stages, key=lambda one: one.batch * one.segment_steps)
    batch = max(one.micro_batch for one in stages)
    accumulates = any(one.micro_batch < one.share for one in stages)
    processes, divided = plan.launch.processes, plan.launch.shard == "fsdp"
    parts = processes if divided else 1
    if divided:
        one_pass, alone = passes.training(samples, batch, accumulates, parts), 0
    else:
        one_pass = passes.training(samples, max(batch, LOCATED), accumulates)
        alone = passes.mean_gradient(samples, 1)
    whole = sizes.weights + sizes.slots
    # DDP exchanges gradients in a copy of their size.
    exchanged = sizes.trained if processes > 1 and not divided else 0
    state = whole // parts + exchanged
    trained = sizes.trained // parts
    gathered, exchanged_group = _whole_groups(passes.model) if divided else (0, 0)
    of_curvature, products = _curvature(plan, sizes, passes, samples, stage)
    own = sizes.ledger(stage, stage.share) + of_curvature
    moments = [
        (state + gathered, one_pass, own),
        # A group's gradients, and the copy in which they are exchanged.
        (state + trained + 2 * exchanged_group, 0, own),
        # To check the contributions, some samples run alone.
        (state + trained, alone, own),
        # The gradients of the step before are still there.
        (state + trained, products, own),
        # Two temporary tensors of the parameter that is updated, or a whole one that holds this
        # process's part, when the state is recorded.
        (state + trained + (1 if divided else 2) * sizes.largest, 0, own),
        # The steps' records are joined, and those of all processes are brought together.
        (state + trained, 0, 2 * own + (3 * sizes.ledger(stage, stage.batch)) * (processes > 1)),
        # The checkpoint is a copy. Divided parameters are put together by way of a buffer.
        (
            state + trained + whole + (sizes.largest if divided else 0),
            0,
            own if processes == 1 else sizes.ledger(stage, stage.batch),
        ),
    ]
    held, passing, records = max(moments, key=sum)
    return PartMemory(
        part="training", state=held, passes=passing, records=records, processes=processes
    )


def _whole_groups(model: nn.Module) -> tuple[int, int]:
    """What FSDP2 holds whole during a pass, and the largest group of parameters that it exchanges.

    Whole are the parameters outside the layers, those of a layer and of the next one, and the
    gradients of a layer. The parameters outside the layers are one group, and so is each layer.
    """
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in outermost_layers(model)]
    largest = max(layers, default=0)
    outside = sum(p.nbytes for p in model.parameters()) - sum(layers)
    return outside + 3 * largest, max(outside, largest)


def _curvature(
    plan: Plan, sizes: Sizes, passes: PassMemory, samples: Samples, stage: RecordedStage
) -> tuple[int, int]:
    """What a segment records for the curvature, and the passes that it takes."""
    gradients = plan.curvature.count_gradients(sizes.task, stage.segment_steps, stage.share)
    recorded = gradients * sizes.width * sizes.item
    recorded += plan.curvature.count_matrices(stage.segment_steps) * sizes.coupled
    compute = plan.curvature.compute_matrices
    if compute is None:
        return recorded, 0
    products = passes.matrices(compute, samples, stage.micro_batch, sizes.spans)
    # The matrices of a part of the samples, and their sum so far.
    return recorded, products + 2 * sizes.coupled
