"""Every pipeline task of the flows: the plain functions of `tasks/`, as Prefect tasks.

The names are shown in Prefect's UI, and are part of the tags that concurrency limits use.
"""

from __future__ import annotations

from secateur.storage.outputs import Output
from secateur.tasks.analysis import (
    agreement,
    audit,
    groups,
    influence_profile,
    question_replays,
    retraining,
    windows,
)
from secateur.tasks.comparison import arm_runs, figures
from secateur.tasks.data import samples
from secateur.tasks.engine.pipeline_task import PipelineTask
from secateur.tasks.plan import Policy
from secateur.tasks.pruning import gates, prune
from secateur.tasks.reporting import html_report
from secateur.tasks.results.audit_results import audit_output
from secateur.tasks.run import Run
from secateur.tasks.training import checkpoint_removal
from secateur.tasks.training import fit_basis as basis
from secateur.tasks.training import train as training
from secateur.tasks.valuation import (
    directions,
    embed,
    index,
    query,
    replay,
    score,
    target_gradients,
)


def _decisions(run: Run, stage: int, policy: Policy | None) -> Output:
    return run.folder.stage(stage).decided(prune.pruning_name(run, stage, policy))


def _pruning(run: Run, stage: int, policy: Policy | None) -> Output:
    return run.folder.stage(stage).prune(prune.pruning_name(run, stage, policy))


list_samples = PipelineTask(
    "list samples",
    samples.list_stage_samples,
    outputs=lambda run, stage: run.folder.stage(stage).samples,
)
freeze_windows = PipelineTask("settle windows", windows.freeze_windows)
fit_basis = PipelineTask(
    "fit basis",
    basis.fit_basis,
    outputs=lambda run, weights: run.folder.basis,
    uses_random_numbers=True,
)
remove_checkpoints = PipelineTask("remove checkpoints", checkpoint_removal.remove_checkpoints)
train = PipelineTask(
    "train",
    training.train_stage,
    outputs=lambda run, stage, launch: run.folder.stage(stage).trained,
    uses_random_numbers=True,
)
choose_directions = PipelineTask(
    "choose directions",
    directions.choose_directions,
    outputs=lambda run, stage: run.folder.stage(stage).components,
)
embed_part = PipelineTask("embed", embed.embed_part)
compose_embeddings = PipelineTask(
    "compose embeddings",
    embed.compose_stage,
    outputs=lambda run, stage: run.folder.stage(stage).embeddings,
)
index_embeddings = PipelineTask(
    "index",
    index.index_stage,
    outputs=lambda run, stage: run.folder.stage(stage).index,
)
differentiate_targets = PipelineTask(
    "differentiate targets",
    target_gradients.write_target_gradients,
    outputs=lambda run, stage: run.folder.stage(stage).targets,
    uses_random_numbers=True,
)
replay_targets = PipelineTask(
    "replay",
    replay.replay_stage,
    outputs=replay.last_replay_outputs,
    uses_random_numbers=True,
)
score_uses = PipelineTask(
    "score",
    score.write_scores,
    outputs=lambda run, stage: run.folder.stage(stage).scores,
)
profile_influence = PipelineTask(
    "profile",
    influence_profile.write_profile,
    outputs=lambda run, stage: run.folder.stage(stage).profile,
)
retrain_without = PipelineTask(
    "retrain without a sample", retraining.retrain_without, uses_random_numbers=True
)
audit_scores = PipelineTask(
    "audit", audit.write_audit, outputs=audit_output, uses_random_numbers=True
)
replay_drawn = PipelineTask(
    "replay questions", question_replays.replay_drawn, uses_random_numbers=True
)
measure_agreement = PipelineTask(
    "measure agreement",
    agreement.write_agreement,
    outputs=lambda run, stage, questions: run.folder.stage(stage).agreement,
    uses_random_numbers=True,
)
run_trial = PipelineTask(
    "try what is kept",
    gates.run_trial,
    outputs=lambda run, stage, name, policy: run.folder.stage(stage).trial(name),
    uses_random_numbers=True,
)
decide = PipelineTask("decide", prune.decide_stage, outputs=_decisions)
rewrite_shard = PipelineTask("rewrite shard", prune.rewrite_kept_shard)
write_shards = PipelineTask("prune", prune.write_pruned_stage, outputs=_pruning)
write_report = PipelineTask(
    "report",
    html_report.write_report,
    outputs=lambda run, stage: run.folder.stage(stage).report,
)
find_influential = PipelineTask("search", query.find_influential, uses_random_numbers=True)
value_groups = PipelineTask("value groups", groups.value_groups, uses_random_numbers=True)
suggest_windows = PipelineTask("suggest windows", windows.suggest_windows)
share_outputs = PipelineTask("share", arm_runs.share_outputs)
write_figures = PipelineTask(
    "note figures", figures.write_figures, outputs=lambda run, *_: run.folder.figures
)
