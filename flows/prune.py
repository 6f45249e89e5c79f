"""Room `flows`: pruning one stage of a run that exists, on request or on an event."""

from __future__ import annotations

from prefect import flow

from flows import events
from flows.alone import alone
from tasks.audit import audit, wanted
from tasks.embed import compose_stage, embed_segment
from tasks.index import index_stage
from tasks.plan import Policy
from tasks.prune import Pruned, name_of, prune_stage, unpruned_before
from tasks.replay import replay
from tasks.run import Run
from tasks.score import score
from tasks.targets import differentiate_targets
from tasks.train import end_checkpoint
from tasks.trust import try_kept


@flow(name="prune", flow_run_name="prune {run} stage {stage}")
def prune(run: str, stage: int, policy: Policy | None = None) -> Pruned | None:
    """Prunes a trained stage; what is missing of its embeddings, index and scores is made first. An earlier stage that the
    plan prunes and nobody has yet, because its event was lost or comes later, is pruned before it.

    Args:
        run: path or URL of the run's folder.
        policy: another policy than the plan's; its result stands beside the plan's own.

    Returns:
        Samples kept and dropped, and the shards; nothing where neither plan nor caller has a policy for the stage.

    Raises:
        PlanError: the stage or one before it is not wholly trained.
    """
    opened = Run.open(run)
    end_checkpoint(opened, stage)
    with alone(opened):
        for earlier in unpruned_before(opened, stage):
            appraise(opened.url, earlier)
            cut(opened.url, earlier)
        appraise(opened.url, stage)
        if policy is None and opened.plan.stages[stage].prune is None:
            return None
        return cut(opened.url, stage, policy)


def appraise(run_url: str, stage: int) -> None:
    """Embeds, indexes and scores a trained stage, and audits it where the plan says so."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.embeddings.committed:
        end_checkpoint(run, stage)
        for future in embed_segment.map(run_url, stage, list(range(len(folder.segments())))):
            future.result()
    compose_stage(run_url, stage)
    events.embedded(run_url, stage)
    index_stage(run_url, stage)
    events.indexed(run_url, stage)
    differentiate_targets(run_url, stage)
    if run.plan.estimate == "replay":
        replay(run_url, stage)
    score(run_url, stage)
    if wanted(run.plan, stage):
        audit(run_url, stage)
        events.fidelity(run_url, stage)


def cut(run_url: str, stage: int, policy: Policy | None = None) -> Pruned:
    """Prunes an appraised stage by the plan's policy or another, after its trial where the plan asks for one."""
    run = Run.open(run_url)
    chosen = policy or run.plan.stages[stage].prune
    if chosen is not None and run.plan.trust.trial:
        try_kept(run_url, stage, name_of(run, stage, chosen), chosen.model_dump(mode="json"))
    found = prune_stage(run_url, stage, policy.model_dump(mode="json") if policy else None)
    events.pruned(run_url, stage, found.name)
    return found
