"""Room `flows`: the events that tell others how far a run is, and what their payloads hold (docs/events.md)."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event
from pydantic import BaseModel, Field

from secateur.flows.run_lock import absolute_url
from secateur.storage.outputs import Output
from secateur.tasks.analysis.audit import Fidelity, is_audited, read_audit
from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.pruning.prune import DECISIONS
from secateur.tasks.pruning.prune import read_prune_result as record_of
from secateur.tasks.run.run import Run
from secateur.tasks.training.train import SECATEUR

PREFIX = "secateur"


class RunEvent(BaseModel):
    """What every payload holds."""

    run: str = Field(description="path or URL of the run's folder")


class StageEvent(RunEvent):
    """What the payload of every event about a stage holds."""

    stage: int = Field(description="the stage, from 0")


class StageTrained(StageEvent):
    """`secateur.stage.trained`: the stage's last segment is committed."""

    samples: int = Field(description="samples the stage trained on")
    steps: int = Field(description="optimizer steps")
    segments: int = Field(description="ledger files")
    by: str = Field(
        description="whose loop trained it: `secateur` (the curate flow), or another trainer's name"
    )


class StageEmbedded(StageEvent):
    """`secateur.stage.embedded`: every recorded use of a sample has its embedding."""

    embeddings: int = Field(description="recorded uses of samples, one embedding each")


class StageIndexed(StageEvent):
    """`secateur.stage.indexed`: the stage can be queried."""

    kind: str = Field(description="flat, fp16 or sq8")
    vectors: int = Field(description="embeddings in the index")


class StagePruned(StageEvent):
    """`secateur.stage.pruned`: the next stage's shards are there."""

    name: str = Field(
        description="`plan` for the plan's own policy, else the policy and its settings"
    )
    samples: int = Field(description="samples before")
    kept: int = Field(description="samples in the shards")
    dropped: int = Field(description="samples left out")
    reasons: dict[str, int] = Field(description="how many were dropped for each reason")
    folder: str = Field(description="path or URL of the folder that holds the pruned shards")
    shards: int = Field(description="how many there are")


class RunFinished(RunEvent):
    """`secateur.run.finished`: every stage is trained, indexed and, where the plan says so, pruned."""

    stages: int = Field(description="stages of the plan")


class FidelityLow(StageEvent):
    """`secateur.fidelity.low`: an audit's Spearman correlation is under `trust.min_fidelity`; where the plan sets none, its
    95% interval reaches down to 0."""

    target: str = Field(description="the target audited")
    estimate: str = Field(description="embedding or replay, whichever the plan scores by")
    spearman: float = Field(description="rank correlation of the scores with true retraining")
    interval: tuple[float, float] = Field(description="holds 95% of its bootstrap")
    least: float = Field(description="what it was held against")


NAMES: dict[type[RunEvent], str] = {
    StageTrained: "secateur.stage.trained",
    StageEmbedded: "secateur.stage.embedded",
    StageIndexed: "secateur.stage.indexed",
    StagePruned: "secateur.stage.pruned",
    RunFinished: "secateur.run.finished",
    FidelityLow: "secateur.fidelity.low",
}


def emit_trained(run_url: str, stage: int) -> None:
    """Tells that a stage is trained. `prune` waits for it where another trainer did so; `curate` goes on by itself."""
    run = _opened(run_url)
    artefact = run.folder.stage(stage).trained
    own = artefact.manifest.facts["by"] == SECATEUR
    _tell(
        run,
        StageTrained(run=run.url, **artefact.manifest.facts),
        artefact,
        "curate" if own else "run",
    )


def emit_embedded(run_url: str, stage: int) -> None:
    """Tells that a stage has its embeddings."""
    run = _opened(run_url)
    artefact = run.folder.stage(stage).embeddings
    _tell(
        run,
        StageEmbedded(run=run.url, stage=stage, embeddings=artefact.manifest.facts["rows"]),
        artefact,
    )


def emit_indexed(run_url: str, stage: int) -> None:
    """Tells that a stage can be queried."""
    run = _opened(run_url)
    artefact = run.folder.stage(stage).index
    facts = artefact.manifest.facts
    _tell(
        run,
        StageIndexed(run=run.url, stage=stage, kind=facts["kind"], vectors=facts["vectors"]),
        artefact,
    )


def emit_pruned(run_url: str, stage: int, name: str) -> None:
    """Tells that the next stage's shards are there."""
    run = _opened(run_url)
    artefact = run.folder.stage(stage).prune(name)
    found = record_of(artefact, stage, name)
    told = StagePruned(
        run=run.url,
        folder=f"{artefact.url(DECISIONS).rpartition('/')[0]}/shards",
        shards=len(found.shards),
        **found.model_dump(exclude={"shards", "trust"}),
    )
    _tell(run, told, artefact)


def emit_finished(run_url: str) -> None:
    """Tells that a run is at its end."""
    run = _opened(run_url)
    _tell(run, RunFinished(run=run.url, stages=len(run.plan.stages)), run.folder.plan)


def emit_low_fidelity(run_url: str, stage: int) -> None:
    """Tells that a stage's scores cannot be trusted, where its audit says so."""
    run = _opened(run_url)
    if not is_audited(run.plan, stage):
        return
    found, least = read_audit(run, stage), run.plan.trust.min_fidelity
    measured = found.fidelity[run.plan.estimate]
    if is_low(measured, least):
        told = FidelityLow(
            run=run.url, stage=stage, target=found.target, estimate=run.plan.estimate, spearman=measured.spearman,
            interval=measured.spearman_interval, least=least or 0.0,
        )  # fmt: skip
        _tell(run, told, run.folder.stage(stage).audit(found.removals))


def is_low(measured: Fidelity, least: float | None) -> bool:
    """Whether scores agree less with retraining than the plan asks; where it asks nothing, not even surely at all."""
    return measured.spearman < least if least is not None else measured.spearman_interval[0] <= 0


def _opened(run_url: str) -> Run:
    """The run, at a URL that means the same to whoever listens."""
    return Run.open(absolute_url(Run.open(run_url)))


def _tell(run: Run, payload: RunEvent, committed: Output, kind: str = "run") -> None:
    """Emits an event about something committed. Whoever runs a flow again tells it again, since the one before may have been
    killed before it could: the event's id is the commit's own, so that a server keeps one and a listener knows it."""
    if not has_lasting_server():
        return  # no server is configured, so nobody listens
    name = NAMES[type(payload)]
    emit_event(
        name,
        resource={
            "prefect.resource.id": f"{PREFIX}.{kind}.{run.plan.run}",
            "prefect.resource.name": run.plan.run,
            "prefect.resource.role": "run",
        },
        related=[] if kind == "run" else [_related(run)],
        payload=payload.model_dump(mode="json"),
        id=uuid5(NAMESPACE_URL, f"{run.url}/{name}/{committed.manifest.attempt}"),
    )


def _related(run: Run) -> dict[str, str]:
    """So that a run's own feed shows what `curate` tells too."""
    return {"prefect.resource.id": f"{PREFIX}.run.{run.plan.run}", "prefect.resource.role": "run"}
