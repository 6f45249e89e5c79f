"""The runs of a comparison's arms, which share all outputs before the first pruning."""

from __future__ import annotations

import polars as pl

from secateur.errors import PlanError
from secateur.storage.copy_outputs import copy_output, copy_outputs
from secateur.storage.layout import ComparisonFolder
from secateur.storage.shard_listing import list_shards
from secateur.storage.shards import expand_shard_urls
from secateur.tasks.comparison.arms import PLAN, STANDARD_ARMS, Arm, arm_plan
from secateur.tasks.data.samples import damaged_shard_handler
from secateur.tasks.plan import Plan
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run

NOT_SHARED = ("decided", "rewritten", "prune", "trial", "audit", "removals", "agreement", "report")


def comparable_plan(plan: Plan, judge: str | None = None) -> Plan:
    """Return the plan with held-out samples to evaluate on.

    It has audits, and questions about its agreement, only if a gate needs them.

    If no target is free for evaluation, half of the pruning target is held out.

    Args:
        judge: the target to evaluate on. By default one that no samples are chosen by, if the plan
            has one.

    Raises:
        PlanError: no stage prunes for a later one, or the target is unknown or shares samples with
            one that scores.
    """
    first = plan.first_pruned_stage
    if first is None or first == len(plan.stages) - 1:
        raise PlanError(
            "no stage of the plan prunes for a later one, so there is nothing to compare; give one "
            "a `prune`"
        )
    if judge is not None and judge not in plan.targets:
        raise PlanError(f"--judge {judge} is none of the plan's targets {', '.join(plan.targets)}")
    others = [name for name in plan.targets if name not in plan.scoring_targets]
    for name in others:
        _check_disjoint(plan, name)
    split = None
    if judge in plan.scoring_targets:
        split = judge
    elif judge is None and not others:
        split = plan.pruning_target
    targets = {}
    for name, target in plan.targets.items():
        share = plan.held_out_share(name) or (0.5 if name == split else 0.0)
        targets[name] = target.model_copy(update={"judging": share})
    audit = plan.audit if plan.trust.min_fidelity is not None else None
    trust = plan.trust
    if not plan.gates_by_agreement:
        trust = trust.model_copy(update={"questions": None, "min_agreement": None})
    return plan.model_copy(update={"targets": targets, "audit": audit, "trust": trust})


def held_out_targets(plan: Plan, judge: str | None = None) -> list[str]:
    """Return the targets whose reported metrics are of held-out samples, the chosen one first."""
    free = [name for name in plan.targets if name not in plan.scoring_targets]
    names = [name for name in plan.targets if name in free or plan.held_out_share(name)]
    first = judge or next(iter(free), names[0])
    return [first, *(name for name in names if name != first)]


def seed_plan(plan: Plan, seed: int) -> Plan:
    """Return a comparison's plan for one seed. Each arm's run has the arm's name."""
    folder = ComparisonFolder(plan.root, plan.run).seed(seed)
    return plan.model_copy(update={"root": folder.url, "seed": seed})


def start_arm(plan: Plan, name: str, arm: Arm) -> Run:
    """Create an arm's run, or join it. The plan's own arm must have run before any other.

    Args:
        plan: the comparison's, for one seed.

    Raises:
        PlanError: the arm's settings contradict one another, or its folder holds another run.
    """
    shares: dict[int, float] = {}
    if name != PLAN:
        own = Run.of_plan(arm_plan(plan, PLAN, STANDARD_ARMS[PLAN], {}))
        pruned = [number for number, stage in enumerate(plan.stages) if stage.prune]
        shares = {number: _kept_share(own, number) for number in pruned}
    return Run.start(arm_plan(plan, name, arm, shares))


def share_outputs(run: Run, own_url: str) -> None:
    """Copy into an arm's run what it shares with the plan's own run: all before the first pruning.

    Args:
        own_url: path or URL of the plan's own run.
    """
    own = Run.open(own_url)
    first = own.plan.first_pruned_stage
    assert first is not None
    copy_output(own.folder.basis, run.folder.basis)
    scored = () if run.plan.score == own.plan.score else ("scores", "profile")
    for stage in range(first + 1):
        source = own.folder.stage(stage).root
        copy_outputs(source, run.folder.stage(stage).root, (*NOT_SHARED, *scored))


def _kept_share(run: Run, stage: int) -> float:
    """The share of a stage's scored samples that the plan's own policy kept."""
    ranked = read_decisions(run, stage).filter(pl.col("rank").is_not_null())
    kept = int(ranked["keep"].sum())
    policy = run.plan.stages[stage].prune
    fraction = policy.keep_fraction if policy else None
    # The plan's own fraction is returned if it gives the same count, because it has fewer digits.
    if fraction is not None and round(len(ranked) * fraction) == kept:
        return fraction
    return kept / len(ranked)


def _check_disjoint(plan: Plan, other: str) -> None:
    """Raise if a target for evaluation shares samples with one that scores training samples."""
    evaluated = _list_target(plan, other)
    for name in plan.scoring_targets:
        common = len(_list_target(plan, name).join(evaluated, "sha256", how="semi"))
        if common:
            raise PlanError(
                f"{common} samples of target {name}, which scores training samples, are also in "
                f"target {other}, which would evaluate; leave them out of one, or leave out "
                f"{other} and let `judging` split {name}"
            )


def _list_target(plan: Plan, name: str) -> pl.DataFrame:
    data = plan.targets[name]
    return list_shards(expand_shard_urls(data.shards), damaged_shard_handler(data, []))
