"""Embeddings with a number per coefficient: per segment, then carried to the stage's end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.influence.recursion import (
    Transition,
    carry_effects,
    compose_transitions,
    identity_transition,
    walk_segment,
)
from secateur.storage.attempt import Attempt
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.engine.progress import track
from secateur.tasks.results.valuation_results import (
    TRANSITION,
    coupled_spans,
    pack_tensors,
    segment_file,
    unpack_tensors,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import count_slots, plan_dynamics, read_segment

EMBEDDINGS = "embeddings.safetensors"


def embed_segment(run: Run, stage: int, number: int) -> None:
    """Write a segment's embeddings, for questions about its own end, and its transition.

    Segments do not depend on one another, so they can run in parallel.
    """
    folder = run.folder.stage(stage)

    def write(attempt: Attempt) -> None:
        segment = read_segment(folder.segment(number))
        dtype = segment.contributions.dtype
        end = identity_transition(coupled_spans(run), count_slots(run), dtype)
        embeddings, transition = walk_segment(plan_dynamics(run, segment), end)
        write_tensors(attempt, EMBEDDINGS, pack_tensors(embeddings), {})
        write_tensors(attempt, TRANSITION, pack_tensors(transition), {})

    inputs = {"segment": folder.segment(number).fingerprint}
    folder.embedded(number).write_once("a part of the embeddings", inputs, write)


def carry_segments(run: Run, stage: int, attempt: Attempt) -> int:
    """Write every segment's embeddings as of the stage's end, and the stage's transition.

    Only one segment's embeddings are in memory at a time.

    Returns:
        Number of embeddings.
    """
    transitions = _transitions_to_end(run, stage)
    rows = 0
    for number, carried in _carried_embeddings(run, stage, transitions):
        write_tensors(attempt, segment_file(number), {"embeddings": carried}, {})
        rows += len(carried)
    write_tensors(attempt, TRANSITION, pack_tensors(transitions[-1]), {})
    return rows


def _transitions_to_end(run: Run, stage: int) -> list[Transition]:
    """The transitions from the end of each segment to the stage's end, the last segment first.

    One more follows: the transition from the stage's start.
    """
    folder = run.folder.stage(stage)
    # If the optimizer is reset after the stage, only theta crosses its end.
    theta_only = run.plan.optimizer.at_stage == "reset"
    dtype = getattr(torch, run.plan.number_type)
    end = identity_transition(coupled_spans(run), count_slots(run), dtype, theta_only)
    transitions: list[Transition] = [end]
    for number in reversed(range(len(folder.segments()))):
        segment = unpack_tensors(read_tensors(folder.embedded(number), TRANSITION))
        transitions.append(compose_transitions(transitions[-1], segment))
    return transitions


def _carried_embeddings(
    run: Run, stage: int, transitions: list[Transition]
) -> Iterator[tuple[int, Float[Tensor, "records width"]]]:
    """Each segment's embeddings as of the stage's end, the last segment first."""
    folder = run.folder.stage(stage)
    count = len(transitions) - 1
    for number in track(reversed(range(count)), f"stage {stage}, composing", count):
        local = unpack_tensors(read_tensors(folder.embedded(number), EMBEDDINGS))
        yield number, torch.cat(carry_effects(local, transitions[count - 1 - number]), 1)
