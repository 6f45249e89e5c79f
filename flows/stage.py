"""Run the parts of a stage: train, score, analyze, prune and report, each with its pipeline tasks.

The flows `curate` (behind `secateur run`), `prune`, `audit` and `compare`, the tests and the
benchmarks all call these functions.
"""

from __future__ import annotations

from secateur.flows import events, pipeline_tasks, run_artifacts
from secateur.flows.workers import Call, Workers
from secateur.tasks.analysis.question_replays import remaining_questions
from secateur.tasks.analysis.retraining import remaining_removals
from secateur.tasks.engine.ui_artifacts import ProgressArtifact
from secateur.tasks.plan import LaunchConfig, Policy
from secateur.tasks.pruning.decide import resolve_policy
from secateur.tasks.pruning.prune import pruning_name
from secateur.tasks.results.agreement_results import AgreementResult
from secateur.tasks.results.audit_results import AuditResult
from secateur.tasks.results.pruning_results import PruneResult
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.results.valuation_results import is_reduced
from secateur.tasks.run import Run
from secateur.tasks.valuation.drawn_questions import draw_questions
from secateur.tasks.valuation.embed import count_parts
from secateur.tasks.valuation.replay import group_walks


def train_stage(
    workers: Workers, run_url: str, stage: int, launch: LaunchConfig | None = None
) -> None:
    """List a stage's samples, freeze its windows, and train it. Stage 0 also fits the basis.

    Args:
        launch: the processes that train; those of the plan that started the run if None.

    Raises:
        PlanError: the plan asks more questions (`trust.questions`) than its targets have samples.
    """
    run = Run.open(run_url)
    draw_questions(run, run.plan.trust.asked)
    workers.call(pipeline_tasks.list_samples, run_url, stage)
    workers.call(pipeline_tasks.freeze_windows, run_url, stage)
    if stage == 0:
        workers.call(pipeline_tasks.fit_basis, run_url)
    workers.call(pipeline_tasks.train, run_url, stage, launch)


def score_stage(workers: Workers, run_url: str, stage: int) -> None:
    """Embed, index and score a trained stage, and compute the targets' gradients."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.embeddings.committed:
        end_checkpoint(run, stage)
        if is_reduced(run):
            workers.call(pipeline_tasks.choose_directions, run_url, stage)
        parts = range(count_parts(run, stage))
        calls = [Call(pipeline_tasks.embed_part, (run_url, stage, number)) for number in parts]
        progress = ProgressArtifact(run, f"stage-{stage}-embedding", len(calls))
        workers.map(calls, f"stage {stage}, embedding", progress)
    workers.call(pipeline_tasks.compose_embeddings, run_url, stage)
    events.emit_embedded(run_url, stage)
    calls = [
        Call(pipeline_tasks.index_embeddings, (run_url, stage)),
        Call(pipeline_tasks.differentiate_targets, (run_url, stage)),
    ]
    if run.plan.estimate == "replay":
        calls += _replay_calls(workers, run, stage)
    workers.map(calls, f"stage {stage}, valuing")
    events.emit_indexed(run_url, stage)
    workers.call(pipeline_tasks.score_uses, run_url, stage)


def analyze_stage(workers: Workers, run_url: str, stage: int) -> None:
    """Write a scored stage's influence profile, and compare its answers and audit it if planned."""
    workers.call(pipeline_tasks.profile_influence, run_url, stage)
    plan = Run.open(run_url).plan
    if plan.trust.asked:
        measure_agreement(workers, run_url, stage)
        events.emit_low_agreement(run_url, stage)
    if plan.audits(stage):
        audit_stage(workers, run_url, stage)
        events.emit_low_fidelity(run_url, stage)


def measure_agreement(
    workers: Workers, run_url: str, stage: int, questions: int | None = None
) -> AgreementResult:
    """Compare an embedded stage's answers with replay. Its replays run in parallel if they can.

    Args:
        questions: how many, in place of the plan's number.
    """
    run = Run.open(run_url)
    count = questions or run.plan.trust.asked
    numbers = remaining_questions(run, stage, count)
    if numbers and workers.count != 1:
        groups = group_walks(numbers, _walks(workers, len(numbers)))
        arguments = [(run.url, stage, count, group) for group in groups]
        calls = [Call(pipeline_tasks.replay_drawn, one) for one in arguments]
        workers.map(calls, f"stage {stage}, replaying questions")
    return workers.call(pipeline_tasks.measure_agreement, run_url, stage, questions)


def audit_stage(
    workers: Workers, run_url: str, stage: int, removals: int | None = None
) -> AuditResult:
    """Audit a scored stage. Its removals and replays run in parallel if there are workers."""
    run = Run.open(run_url)
    removals_left = remaining_removals(run, stage, removals)
    if removals_left and workers.count != 1:
        calls = _replay_calls(workers, run, stage)
        calls += [
            Call(pipeline_tasks.retrain_without, (run_url, stage, step, row))
            for step, row in removals_left
        ]
        workers.map(calls, f"stage {stage}, retraining without a sample")
    return workers.call(pipeline_tasks.audit_scores, run_url, stage, removals)


def prune_stage(
    workers: Workers, run_url: str, stage: int, policy: Policy | None = None
) -> PruneResult:
    """Prune a scored stage by the plan's policy or another, after its trial if the plan has one."""
    run = Run.open(run_url)
    name = pruning_name(run, stage, policy)
    if run.plan.trust.trial:
        resolved = resolve_policy(run, stage, policy)
        workers.call(pipeline_tasks.run_trial, run_url, stage, name, resolved)
    if not run.folder.stage(stage).prune(name).committed and workers.count != 1:
        shards = range(workers.call(pipeline_tasks.decide, run_url, stage, policy))
        calls = [
            Call(pipeline_tasks.rewrite_shard, (run_url, stage, name, shard)) for shard in shards
        ]
        workers.map(calls, f"stage {stage}, rewriting")
    result = workers.call(pipeline_tasks.write_shards, run_url, stage, policy)
    events.emit_pruned(run_url, stage, result.name)
    return result


def release_checkpoints(workers: Workers, run_url: str, stage: int) -> None:
    """Remove the checkpoints within a stage if the plan keeps none and has read them all."""
    if Run.open(run_url).plan.checkpoints.keep == "stage_ends":
        workers.call(pipeline_tasks.remove_checkpoints, run_url, stage)


def report_stage(workers: Workers, run_url: str, stage: int) -> None:
    """Write a stage's report, and show it in Prefect's UI.

    If the plan has a policy for the stage, it must be pruned by it already.
    """
    workers.call(pipeline_tasks.write_report, run_url, stage)
    run_artifacts.post_stage(run_url, stage)


def _replay_calls(workers: Workers, run: Run, stage: int) -> list[Call]:
    """The replays for targets that are missing."""
    folder = run.folder.stage(stage)
    targets = [name for name in run.plan.targets if not folder.replay(name, 0).committed]
    groups = group_walks(targets, _walks(workers, len(targets)))
    return [Call(pipeline_tasks.replay_targets, (run.url, stage, group)) for group in groups]


def _walks(workers: Workers, questions: int) -> int:
    """How many walks replay so many questions: one per worker, or per question if there are fewer.

    Threads take turns at replays, so they share one walk.
    """
    return 1 if workers.kind in ("threads", "inline") else workers.count or questions
