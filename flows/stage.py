"""Room `flows`: what happens to a trained stage, in the order in which its parts need one another."""

from __future__ import annotations

from secateur.flows import events, run_artifacts
from secateur.flows.workers import Call, WorkerPool
from secateur.tasks.analysis.audit import AuditResult, is_audited, write_audit
from secateur.tasks.analysis.influence_profile import write_profile
from secateur.tasks.analysis.retraining import remaining_removals, retrain_without
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.gates import run_trial
from secateur.tasks.pruning.prune import (
    PruneResult,
    decide_stage,
    pruning_name,
    resolve_policy,
    rewrite_shard,
    write_pruned_stage,
)
from secateur.tasks.reporting.html_report import write_report
from secateur.tasks.run.run import Run
from secateur.tasks.training.train import end_checkpoint
from secateur.tasks.valuation.embed import compose_stage, embed_segment
from secateur.tasks.valuation.index import index_stage
from secateur.tasks.valuation.replay import group_targets, replay_stage
from secateur.tasks.valuation.score import write_scores
from secateur.tasks.valuation.target_gradients import write_target_gradients


def score_stage(crew: WorkerPool, run_url: str, stage: int) -> None:
    """Embeds, indexes and scores a trained stage, draws its influence profile, and audits it where the plan says so."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.embeddings.committed:
        end_checkpoint(run, stage)
        calls = [
            Call(embed_segment, (run_url, stage, number))
            for number in range(len(folder.segments()))
        ]
        live = ProgressArtifact(run, f"stage-{stage}-embedding", len(calls))
        crew.map(calls, f"stage {stage}, embedding", live)
    crew.call(compose_stage, run_url, stage)
    events.emit_embedded(run_url, stage)
    judged = [Call(index_stage, (run_url, stage)), Call(write_target_gradients, (run_url, stage))]
    if run.plan.estimate == "replay":
        judged += _replays(crew, run, stage)
    crew.map(judged, f"stage {stage}, judging")
    events.emit_indexed(run_url, stage)
    crew.call(write_scores, run_url, stage)
    crew.call(write_profile, run_url, stage)
    if is_audited(run.plan, stage):
        audit_stage(crew, run_url, stage)
        events.emit_low_fidelity(run_url, stage)


def audit_stage(
    crew: WorkerPool, run_url: str, stage: int, removals: int | None = None
) -> AuditResult:
    """Audits an appraised stage; its removals and replays side by side."""
    left = [
        Call(retrain_without, (run_url, stage, *use))
        for use in remaining_removals(run_url, stage, removals)
    ]
    if left and crew.count != 1:
        calls = [*_replays(crew, Run.open(run_url), stage), *left]
        crew.map(calls, f"stage {stage}, retraining without a sample")
    return crew.call(write_audit, run_url, stage, removals)


def prune_stage(
    crew: WorkerPool, run_url: str, stage: int, policy: Policy | None = None
) -> PruneResult:
    """Prunes an appraised stage by the plan's policy or another, after its trial where the plan asks for one."""
    run, given = Run.open(run_url), policy.model_dump(mode="json") if policy else None
    name = pruning_name(run, stage, given)
    if run.plan.trust.trial:
        crew.call(
            run_trial,
            run_url,
            stage,
            name,
            resolve_policy(run, stage, given).model_dump(mode="json"),
        )
    if not run.folder.stage(stage).prune(name).committed and crew.count != 1:
        shards = range(crew.call(decide_stage, run_url, stage, given))
        crew.map(
            [Call(rewrite_shard, (run_url, stage, name, n)) for n in shards],
            f"stage {stage}, rewriting",
        )
    found = crew.call(write_pruned_stage, run_url, stage, given)
    events.emit_pruned(run_url, stage, found.name)
    return found


def report_stage(crew: WorkerPool, run_url: str, stage: int) -> None:
    """Writes the report of a stage that the plan's own policy has pruned, or that no policy prunes, and shows it."""
    crew.call(write_report, run_url, stage)
    run_artifacts.post_stage(run_url, stage)


def _replays(crew: WorkerPool, run: Run, stage: int) -> list[Call]:
    """What is left to replay: one walk for each worker, or for each target where there are fewer."""
    targets = [
        name for name in run.plan.targets if not run.folder.stage(stage).replay(name, 0).committed
    ]
    walks = 1 if crew.spec.kind == "threads" else crew.count or len(targets)
    groups = group_targets(targets, walks)
    return [Call(replay_stage, (run.url, stage, group)) for group in groups]
