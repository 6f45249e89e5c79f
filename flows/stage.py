"""Room `flows`: what happens to a trained stage, in the order in which its parts need one another."""

from __future__ import annotations

from flows import artifacts, events
from flows.workers import Call, Crew
from tasks.artifacts import Live
from tasks.audit import Audited, audit, wanted
from tasks.embed import compose_stage, embed_segment
from tasks.index import index_stage
from tasks.plan import Policy
from tasks.profile import profile
from tasks.prune import Pruned, chosen_policy, decide_stage, name_of, prune_stage, rewrite_shard
from tasks.removals import removals_left, retrain_without
from tasks.replay import groups_of, replay
from tasks.report import report
from tasks.run import Run
from tasks.score import score
from tasks.targets import differentiate_targets
from tasks.train import end_checkpoint
from tasks.trust import try_kept


def appraise(crew: Crew, run_url: str, stage: int) -> None:
    """Embeds, indexes and scores a trained stage, draws its influence profile, and audits it where the plan says so."""
    run = Run.open(run_url)
    folder = run.folder.stage(stage)
    if not folder.embeddings.committed:
        end_checkpoint(run, stage)
        calls = [Call(embed_segment, (run_url, stage, number)) for number in range(len(folder.segments()))]
        live = Live(run, f"stage-{stage}-embedding", len(calls))
        crew.together(calls, f"stage {stage}, embedding", live)
    crew.call(compose_stage, run_url, stage)
    events.embedded(run_url, stage)
    judged = [Call(index_stage, (run_url, stage)), Call(differentiate_targets, (run_url, stage))]
    if run.plan.estimate == "replay":
        judged += _replays(crew, run, stage)
    crew.together(judged, f"stage {stage}, judging")
    events.indexed(run_url, stage)
    crew.call(score, run_url, stage)
    crew.call(profile, run_url, stage)
    if wanted(run.plan, stage):
        audit_stage(crew, run_url, stage)
        events.fidelity(run_url, stage)


def audit_stage(crew: Crew, run_url: str, stage: int, removals: int | None = None) -> Audited:
    """Audits an appraised stage; its removals and replays side by side."""
    left = [Call(retrain_without, (run_url, stage, *use)) for use in removals_left(run_url, stage, removals)]
    if left and crew.count != 1:
        calls = [*_replays(crew, Run.open(run_url), stage), *left]
        crew.together(calls, f"stage {stage}, retraining without a sample")
    return crew.call(audit, run_url, stage, removals)


def cut(crew: Crew, run_url: str, stage: int, policy: Policy | None = None) -> Pruned:
    """Prunes an appraised stage by the plan's policy or another, after its trial where the plan asks for one."""
    run, given = Run.open(run_url), policy.model_dump(mode="json") if policy else None
    name = name_of(run, stage, given)
    if run.plan.trust.trial:
        crew.call(try_kept, run_url, stage, name, chosen_policy(run, stage, given).model_dump(mode="json"))
    if not run.folder.stage(stage).prune(name).committed and crew.count != 1:
        shards = range(crew.call(decide_stage, run_url, stage, given))
        crew.together([Call(rewrite_shard, (run_url, stage, name, n)) for n in shards], f"stage {stage}, rewriting")
    found = crew.call(prune_stage, run_url, stage, given)
    events.pruned(run_url, stage, found.name)
    return found


def tell(crew: Crew, run_url: str, stage: int) -> None:
    """Writes the report of a stage that the plan's own policy has pruned, or that no policy prunes, and shows it."""
    crew.call(report, run_url, stage)
    artifacts.stage(run_url, stage)


def _replays(crew: Crew, run: Run, stage: int) -> list[Call]:
    """What is left to replay: one walk for each worker, or for each target where there are fewer."""
    targets = [name for name in run.plan.targets if not run.folder.stage(stage).replay(name, 0).committed]
    walks = 1 if crew.spec.kind == "threads" else crew.count or len(targets)
    groups = groups_of(targets, walks)
    return [Call(replay, (run.url, stage, group)) for group in groups]
