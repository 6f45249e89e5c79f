"""The events that report how far a run is, and their payloads (docs/events.md)."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel, Field

from secateur.flows.run_lock import absolute_url
from secateur.storage.outputs import Output
from secateur.tasks.engine.prefect_server import has_lasting_server
from secateur.tasks.results.agreement_results import read_agreement
from secateur.tasks.results.audit_results import Fidelity, audit_output, read_audit
from secateur.tasks.results.pruning_results import DECISIONS, read_prune_result
from secateur.tasks.results.training_results import SECATEUR
from secateur.tasks.run import Run

PREFIX = "secateur"


class RunEvent(BaseModel):
    """The payload of every event."""

    run: str = Field(description="path or URL of the run's folder")


class StageEvent(RunEvent):
    """The payload of every event about a stage."""

    stage: int = Field(description="the stage, from 0")


class StageTrained(StageEvent):
    """`secateur.stage.trained`: the stage's last segment is committed."""

    samples: int = Field(description="samples the stage trained on")
    steps: int = Field(description="optimizer steps")
    segments: int = Field(description="number of ledger files, one per segment")
    by: str = Field(
        description="whose loop trained it: `secateur` (flow `curate`), or another trainer's name"
    )


class StageEmbedded(StageEvent):
    """`secateur.stage.embedded`: every recorded use of a sample has its embedding."""

    embeddings: int = Field(description="recorded uses of samples; each has one embedding")


class StageIndexed(StageEvent):
    """`secateur.stage.indexed`: the stage can be queried."""

    kind: str = Field(description="how FAISS stores the embeddings: `flat`, `fp16` or `sq8`")
    vectors: int = Field(description="number of embeddings in the index")


class StagePruned(StageEvent):
    """`secateur.stage.pruned`: the next stage's shards are written."""

    name: str = Field(
        description="`plan` for the plan's own policy, otherwise the policy and its settings"
    )
    samples: int = Field(description="samples before pruning")
    kept: int = Field(description="samples in the shards")
    dropped: int = Field(description="samples that were dropped")
    reasons: dict[str, int] = Field(description="how many were dropped for each reason")
    folder: str = Field(description="path or URL of the folder that holds the pruned shards")
    shards: int = Field(description="number of pruned shards")


class RunFinished(RunEvent):
    """`secateur.run.finished`: all stages are trained, indexed, and pruned if the plan says so."""

    stages: int = Field(description="stages of the plan")


class FidelityLow(StageEvent):
    """`secateur.fidelity.low`: an audit's Spearman correlation is below `trust.min_fidelity`.

    If the plan sets no `trust.min_fidelity`, the event means that the 95% interval of the
    correlation reaches down to 0.
    """

    target: str = Field(description="the target of the audit")
    estimate: str = Field(description="`embedding` or `replay`, as the plan scores")
    spearman: float = Field(description="rank correlation of the scores with retraining")
    interval: tuple[float, float] = Field(
        description="95% interval of the correlation, by bootstrap"
    )
    least: float = Field(
        description="the least correlation that is accepted: `trust.min_fidelity`, or 0"
    )


class AgreementLow(StageEvent):
    """`secateur.agreement.low`: a stage's answers agree with replay less than the plan demands.

    The demand is `trust.min_agreement`. Without it there is no such event.
    """

    estimate: str = Field(description="`embedding` or `pull_back`, whichever agrees less")
    spearman: float = Field(
        description="rank correlation of its answers with replay, the median over the questions"
    )
    questions: int = Field(description="how many single target samples were asked about")
    least: float = Field(description="the least correlation that is accepted")


NAMES: dict[type[RunEvent], str] = {
    StageTrained: "secateur.stage.trained",
    StageEmbedded: "secateur.stage.embedded",
    StageIndexed: "secateur.stage.indexed",
    StagePruned: "secateur.stage.pruned",
    RunFinished: "secateur.run.finished",
    AgreementLow: "secateur.agreement.low",
    FidelityLow: "secateur.fidelity.low",
}


def emit_trained(run_url: str, stage: int) -> None:
    """Report that a stage is trained.

    `prune` waits for this if another trainer trained the stage. `curate` continues by itself.
    """
    run = _open_run(run_url)
    output = run.folder.stage(stage).trained
    by_curate = output.manifest.facts["by"] == SECATEUR
    payload = StageTrained(run=run.url, **output.manifest.facts)
    _emit(run, payload, output, "curate" if by_curate else "run")


def emit_embedded(run_url: str, stage: int) -> None:
    """Report that a stage has its embeddings."""
    run = _open_run(run_url)
    output = run.folder.stage(stage).embeddings
    rows = output.manifest.facts["rows"]
    _emit(run, StageEmbedded(run=run.url, stage=stage, embeddings=rows), output)


def emit_indexed(run_url: str, stage: int) -> None:
    """Report that a stage can be queried."""
    run = _open_run(run_url)
    output = run.folder.stage(stage).index
    facts = output.manifest.facts
    payload = StageIndexed(run=run.url, stage=stage, kind=facts["kind"], vectors=facts["vectors"])
    _emit(run, payload, output)


def emit_pruned(run_url: str, stage: int, name: str) -> None:
    """Report that the next stage's shards are written."""
    run = _open_run(run_url)
    output = run.folder.stage(stage).prune(name)
    result = read_prune_result(run, stage, name)
    payload = StagePruned(
        run=run.url,
        folder=f"{output.url(DECISIONS).rpartition('/')[0]}/shards",
        shards=len(result.shards),
        **result.model_dump(exclude={"shards", "trust"}),
    )
    _emit(run, payload, output)


def emit_finished(run_url: str) -> None:
    """Report that a run is finished."""
    run = _open_run(run_url)
    _emit(run, RunFinished(run=run.url, stages=len(run.plan.stages)), run.folder.plan)


def emit_low_fidelity(run_url: str, stage: int) -> None:
    """Report that a stage's scores cannot be trusted, if its audit shows that."""
    run = _open_run(run_url)
    if not run.plan.audits(stage):
        return
    audit = read_audit(run, stage)
    least = run.plan.trust.min_fidelity
    fidelity = audit.fidelity[run.plan.estimate]
    if not is_low(fidelity, least):
        return
    payload = FidelityLow(
        run=run.url,
        stage=stage,
        target=audit.target,
        estimate=run.plan.estimate,
        spearman=fidelity.spearman,
        interval=fidelity.spearman_interval,
        least=least or 0.0,
    )
    _emit(run, payload, audit_output(run, stage, audit.removals))


def emit_low_agreement(run_url: str, stage: int) -> None:
    """Report that a stage's answers agree with replay less than the plan demands, if they do."""
    run = _open_run(run_url)
    least = run.plan.trust.min_agreement
    if least is None:
        return
    found = read_agreement(run, stage)
    estimate, lowest = min(found.estimates.items(), key=lambda item: item[1].spearman)
    if lowest.spearman < least:
        payload = AgreementLow(
            run=run.url,
            stage=stage,
            estimate=estimate,
            spearman=lowest.spearman,
            questions=found.questions,
            least=least,
        )
        _emit(run, payload, run.folder.stage(stage).agreement)


def is_low(fidelity: Fidelity, least: float | None) -> bool:
    """Return whether scores agree less with retraining than the plan asks.

    If the plan asks nothing, whether agreement is not even surely above 0.
    """
    if least is not None:
        return fidelity.spearman < least
    return fidelity.spearman_interval[0] <= 0


def _open_run(run_url: str) -> Run:
    """The run, with a URL that means the same to every listener."""
    return Run.open(absolute_url(Run.open(run_url)))


def _emit(run: Run, payload: RunEvent, committed: Output, kind: str = "run") -> None:
    """Emit an event about a committed output.

    Delivery is at least once: a flow that runs again emits its events again, because it may have
    been killed before it could. The event's id is derived from the commit, so it is stable, and
    receivers can deduplicate.
    """
    if not has_lasting_server():
        return
    from prefect.events import emit_event

    name = NAMES[type(payload)]
    run_id = f"{PREFIX}.run.{run.plan.run}"
    # The feed of a run also shows what `curate` reports about it.
    related = [{"prefect.resource.id": run_id, "prefect.resource.role": "run"}]
    emit_event(
        name,
        resource={
            "prefect.resource.id": f"{PREFIX}.{kind}.{run.plan.run}",
            "prefect.resource.name": run.plan.run,
            "prefect.resource.role": "run",
        },
        related=[] if kind == "run" else related,
        payload=payload.model_dump(mode="json"),
        id=uuid5(NAMESPACE_URL, f"{run.url}/{name}/{committed.manifest.attempt}"),
    )
