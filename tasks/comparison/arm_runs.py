"""Room `tasks.comparison`: the runs of a comparison's arms, which share what they have in common."""

from __future__ import annotations

import polars as pl

from secateur.errors import PlanError
from secateur.storage.frames import read_frame
from secateur.storage.layout import ComparisonFolder
from secateur.storage.outputs import copy_output, copy_outputs
from secateur.storage.shards import expand_shard_urls, list_shards
from secateur.tasks.comparison.arms import ALWAYS, PLAN, Arm, arm_plan
from secateur.tasks.data.samples import damaged_shard_handler
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.plan import PREVIOUS, AutoWindowsConfig, Plan
from secateur.tasks.pruning.prune import DECISIONS, PLAN_PRUNING
from secateur.tasks.run.run import Run

NOT_SHARED = ("decided", "rewritten", "prune", "trial", "audit", "removals", "report")


def comparable_plan(plan: Plan, judge: str | None = None) -> Plan:
    """The plan with a target split where it would otherwise score and judge, and audits only where a gate needs them.

    Args:
        judge: the target that judges; another than the one pruned for, where the plan has one.

    Raises:
        PlanError: nothing is pruned for a later stage, or the judge is unknown or holds samples that score.
    """
    deciding = first_pruned(plan)
    if deciding is None or deciding == len(plan.stages) - 1:
        raise PlanError(
            "no stage of the plan prunes for a later one, so there is nothing to compare; give one a `prune`"
        )
    if judge is not None and judge not in plan.targets:
        raise PlanError(f"--judge {judge} is none of the plan's targets {', '.join(plan.targets)}")
    scoring = scoring_targets(plan)
    others = [name for name in plan.targets if name not in scoring]
    for name in others:
        _check_apart(plan, scoring, name)
    split = judge if judge in scoring else plan.target if not (judge or others) else None
    shares = {name: plan.judging(name) or (0.5 if name == split else 0.0) for name in plan.targets}
    targets = {
        name: target.model_copy(update={"judging": shares[name]})
        for name, target in plan.targets.items()
    }
    audit = plan.audit if plan.trust.min_fidelity is not None else None
    return plan.model_copy(update={"targets": targets, "audit": audit})


def held_out_targets(plan: Plan, judge: str | None = None) -> list[str]:
    """The targets whose reported figures are of samples that never score, the chosen one first."""
    scoring = scoring_targets(plan)
    names = [name for name in plan.targets if name not in scoring or plan.judging(name)]
    first = judge or next((name for name in names if name not in scoring), names[0])
    return [first, *(name for name in names if name != first)]


def scoring_targets(plan: Plan) -> list[str]:
    """The targets by which samples are chosen: the one pruned for, and those of online selection."""
    selecting = [
        select.target or plan.target for stage in plan.stages for select in stage.selections
    ]
    return list(dict.fromkeys([plan.target, *selecting]))


def needs_scores(plan: Plan, stage: int) -> bool:
    """Whether a pruning or the windows of a later stage need a stage scored; a profile needs all stages before it."""
    later = plan.stages[stage:]
    automatic = any(
        isinstance(spec.windows, AutoWindowsConfig) and spec.windows.auto == PREVIOUS
        for spec in later[1:]
    )
    return automatic or any(spec.prune is not None for spec in later)


def first_pruned(plan: Plan) -> int | None:
    """The first stage that is pruned."""
    return next((number for number, stage in enumerate(plan.stages) if stage.prune), None)


def seed_plan(plan: Plan, seed: int) -> Plan:
    """A comparison's plan for one seed; its run's name is the arm's to say."""
    folder = ComparisonFolder(plan.root, plan.run).seed(seed)
    return plan.model_copy(update={"root": folder.url, "seed": seed})


def start_arm(plan: Plan, name: str, arm: Arm) -> Run:
    """Makes an arm's run, or joins it; but for the plan's own, it is made after that one.

    Args:
        plan: the comparison's, for one seed.

    Raises:
        PlanError: the arm's settings do not go together, or its folder holds another run.
    """
    own = Run.of(arm_plan(plan, PLAN, ALWAYS[PLAN], {}))
    shares = (
        {}
        if name == PLAN
        else {n: _share(own, n) for n, stage in enumerate(plan.stages) if stage.prune}
    )
    return Run.start(arm_plan(plan, name, arm, shares))


@pipeline_task("share")
def share_outputs(run_url: str, own_url: str) -> None:
    """Copies into an arm's run what it has in common with the plan's own, byte for byte: all up to the first pruning."""
    run, own = Run.open(run_url), Run.open(own_url)
    deciding = first_pruned(own.plan)
    assert deciding is not None
    copy_output(own.folder.basis, run.folder.basis)
    scored = () if run.plan.score == own.plan.score else ("scores", "profile")
    for stage in range(deciding + 1):
        copy_outputs(
            own.folder.stage(stage).root, run.folder.stage(stage).root, (*NOT_SHARED, *scored)
        )


def _share(run: Run, stage: int) -> float:
    """The share of a stage's judged samples that the plan's own policy kept."""
    judged = read_frame(run.folder.stage(stage).prune(PLAN_PRUNING), DECISIONS).filter(
        pl.col("rank").is_not_null()
    )
    kept = int(judged["keep"].sum())
    asked = getattr(run.plan.stages[stage].prune, "keep", None)
    return asked if asked is not None and round(len(judged) * asked) == kept else kept / len(judged)


def _check_apart(plan: Plan, scoring: list[str], other: str) -> None:
    """Raises where a target that judges holds samples of one that scores."""
    judging = list_shards(
        expand_shard_urls(plan.targets[other].shards),
        damaged_shard_handler(plan.targets[other], []),
    )
    for name in scoring:
        data = plan.targets[name]
        common = len(
            list_shards(expand_shard_urls(data.shards), damaged_shard_handler(data, [])).join(
                judging, "sha256", how="semi"
            )
        )
        if common:
            raise PlanError(
                f"{common} samples of target {name}, which scores, are in target {other} too, which would judge; leave them out "
                f"of one, or leave out {other} and let `judging` split {name}"
            )
