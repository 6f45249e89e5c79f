"""Room `tasks`: data value embeddings of a stage: every segment's own, then carried to the stage's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from secateur.influence.basis import leading_eigenvectors
from secateur.influence.curvature import Curvature, EmpiricalFisher, Fisher, Hessian, NoCurvature
from secateur.influence.recursion import (
    Dynamics,
    Transition,
    carry_effects,
    compose_transitions,
    identity_transition,
    walk_segment,
)
from secateur.influence.segment import Segment
from secateur.storage.integrity import list_outputs
from secateur.storage.ledger import read_ledger
from secateur.storage.outputs import Output
from secateur.storage.tensors import read_tensors, write_tensors
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.engine.progress import track
from secateur.tasks.run.run import Run
from secateur.tasks.training.optimizer import plan_update_rule
from secateur.tasks.training.train import end_checkpoint

AXES = "axes.safetensors"


@pipeline_task("embed segment")
def embed_segment(run_url: str, stage: int, number: int) -> None:
    """Walks one segment by itself: embeddings as of its end, and its transition. Segments may run in parallel."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    artefact = folder.local(number)
    if artefact.committed or folder.embeddings.committed:
        return
    segment = segment_of(folder.segment(number))
    start = identity_transition(
        spans_of(run),
        len(plan_update_rule(run.plan.optimizer).slots) + 1,
        segment.contributions.dtype,
    )
    embeddings, transition = walk_segment(dynamics_of(run, segment), start)
    with artefact.attempt(
        "local embeddings", {"segment": folder.segment(number).fingerprint}
    ) as attempt:
        write_tensors(attempt, "embeddings.safetensors", _numbered(embeddings), {})
        write_tensors(attempt, "transition.safetensors", _numbered(transition), {})


@pipeline_task("compose embeddings", makes=lambda run, stage: run.folder.stage(stage).embeddings)
def compose_stage(run_url: str, stage: int) -> int:
    """Carries every segment's embeddings to the stage's end; memory is one segment's.

    Returns:
        Number of embeddings.
    """
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.embeddings.committed:
        end_checkpoint(run, stage)
        count = len(folder.segments())
        inputs = {"basis": run.folder.basis.fingerprint}
        with folder.embeddings.attempt("embeddings", inputs) as attempt:
            transitions = _to_end(run, stage)
            axes = _principal(run, stage, transitions) if run.plan.components else None
            rows = 0
            for number, carried in _carried(run, stage, transitions):
                kept = carried if axes is None else carried @ axes
                write_tensors(attempt, _name(number), {"embeddings": kept}, {})
                rows += len(kept)
            write_tensors(attempt, "transition.safetensors", _numbered(transitions[-1]), {})
            if axes is not None:
                write_tensors(attempt, AXES, {"axes": axes}, {})
            attempt.facts.update(rows=rows, segments=count)
    for local in list_outputs(folder.root.child("local")):
        local.remove()
    return int(folder.embeddings.manifest.facts["rows"])


def _to_end(run: Run, stage: int) -> list[Transition]:
    """From the end of each segment, the last first, to the stage's end; and at last from the stage's start."""
    folder, theta_only = run.folder.stage(stage), run.plan.optimizer.at_stage == "reset"
    slots = len(plan_update_rule(run.plan.optimizer).slots) + 1
    found = [identity_transition(spans_of(run), slots, getattr(torch, run.plan.dtype), theta_only)]
    for number in reversed(range(len(folder.segments()))):
        found.append(
            compose_transitions(
                found[-1], _listed(read_tensors(folder.local(number), "transition.safetensors"))
            )
        )
    return found


def _carried(run: Run, stage: int, transitions: list[Transition]) -> Iterator[tuple[int, Tensor]]:
    """Each segment's embeddings as of the stage's end, the last segment first."""
    folder, count = run.folder.stage(stage), len(transitions) - 1
    for number in track(reversed(range(count)), f"stage {stage}, composing", count):
        local = _listed(read_tensors(folder.local(number), "embeddings.safetensors"))
        yield number, torch.cat(carry_effects(local, transitions[count - 1 - number]), 1)


def _principal(run: Run, stage: int, transitions: list[Transition]) -> Tensor:
    """`width components`: the directions in which the stage's embeddings are longest, orthonormal."""
    moment = sum(part.double().T @ part.double() for _, part in _carried(run, stage, transitions))
    assert isinstance(moment, Tensor)
    return leading_eigenvectors(moment, run.plan.components or len(moment)).to(
        getattr(torch, run.plan.dtype)
    )


def in_embeddings(run: Run, stage: int, queries: Tensor) -> Tensor:
    """Queries `m width` in the numbers that the stage's embeddings are kept in."""
    if run.plan.components is None:
        return queries
    return queries @ read_tensors(run.folder.stage(stage).embeddings, AXES)["axes"].to(
        queries.dtype
    )


def stage_embeddings(artefact: Output) -> list[Tensor]:
    """The stage's embeddings, one memory-mapped tensor a segment, in the order of `scores.parquet`."""
    segments = artefact.manifest.facts["segments"]
    return [read_tensors(artefact, _name(number))["embeddings"] for number in range(segments)]


def stage_transition(artefact: Output) -> Transition:
    """The stage's transition, from the state at its start to the one read at its end."""
    return _listed(read_tensors(artefact, "transition.safetensors"))


def spans_of(run: Run) -> list[slice]:
    """The numbers that are coupled: each block's, or all."""
    sizes = list(run.folder.basis.manifest.facts["blocks"].values())
    if run.plan.curvature.coupling == "full":
        return [slice(0, sum(sizes))]
    return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def dynamics_of(run: Run, segment: Segment) -> Dynamics:
    """A segment with the plan's optimizer, curvature and coupling."""
    spans = spans_of(run)
    curvature: dict[str, Callable[[], Curvature]] = {
        "empirical_fisher": lambda: EmpiricalFisher(segment),
        "fisher": lambda: Fisher(segment),
        "hessian": lambda: Hessian(segment, spans),
        "none": NoCurvature,
    }
    return Dynamics.of(
        segment, plan_update_rule(run.plan.optimizer), curvature[run.plan.curvature.kind](), spans
    )


def segment_of(artefact: Output) -> Segment:
    """A segment's record from its ledger."""
    tensors, first_step = read_ledger(artefact)
    return Segment(first_step=first_step, **tensors)


def _name(number: int) -> str:
    return f"seg-{number:05d}.safetensors"


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{i:05d}": t.contiguous() for i, t in enumerate(tensors)}


def _listed(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]
