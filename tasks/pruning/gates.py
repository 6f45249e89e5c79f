"""Room `tasks`: trust gates, what must hold before a stage is pruned (DESIGN, section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from pydantic import TypeAdapter

from secateur.errors import PlanError
from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.tasks.analysis.audit import read_audit
from secateur.tasks.analysis.retraining import audit_settings
from secateur.tasks.data.batches import seed_for
from secateur.tasks.data.samples import held_out_rows, list_target_samples, read_stage_samples
from secateur.tasks.engine.prefect_task import pipeline_task
from secateur.tasks.plan import Policy, ScheduleConfig
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.training.train import end_checkpoint
from secateur.tasks.valuation.target_gradients import target_loss
from secateur.tasks.valuation.tracin import read_policy_scores


@pipeline_task(
    "try what is kept",
    makes=lambda run, stage, name, policy: run.folder.stage(stage).trial(name),
    draws=True,
)
def run_trial(run_url: str, stage: int, name: str, policy: dict[str, Any]) -> dict[str, Any]:
    """Trains a few steps on what a policy keeps and on as many samples at random, from the stage's end.

    Returns:
        Loss on the judging half of the target: `kept`, `random` (one a draw), and their seeds.
    """
    run = Run.open(run_url)
    artefact, spec = run.folder.stage(stage).trial(name), run.plan.trust.trial
    if spec is None:
        raise PlanError(f"the plan of {run_url} has no trust.trial")
    if not artefact.committed:
        samples = read_stage_samples(run, stage)
        chosen: Policy = TypeAdapter(Policy).validate_python(policy)
        keep = decide_samples(
            run.plan, stage, chosen, read_policy_scores(run, stage, chosen), samples
        )["keep"].to_numpy()
        seeds = [seed_for(run.plan.seed, "trial", stage, draw) for draw in range(spec.draws)]
        draws = [np.random.default_rng(seed).permutation(keep) for seed in seeds]
        with artefact.attempt(
            "trial", {"scores": run.folder.stage(stage).scores.fingerprint}
        ) as attempt:
            losses = [_trained(run, stage, samples, flags, spec.steps) for flags in (keep, *draws)]
            attempt.facts.update(kept=losses[0], random=losses[1:], seeds=seeds, steps=spec.steps)
    return dict(artefact.manifest.facts)


def evaluate_gates(run: Run, stage: int, name: str) -> dict[str, Any]:
    """Whether the plan's gates hold for a pruning, with every figure; empty where none is asked for."""
    found: dict[str, Any] = {}
    if run.plan.trust.min_fidelity is not None:
        fidelity = read_audit(run, stage).fidelity[run.plan.estimate]
        holds = fidelity.spearman >= run.plan.trust.min_fidelity
        found["min_fidelity"] = {
            "holds": holds,
            "least": run.plan.trust.min_fidelity,
            **fidelity.model_dump(mode="json"),
        }
    if run.plan.trust.trial is not None:
        facts = run.folder.stage(stage).trial(name).manifest.facts
        found["trial"] = {"holds": facts["kept"] <= float(np.mean(facts["random"])), **facts}
    return found


def apply_gates(
    run: Run, stage: int, decisions: pl.DataFrame, gates: dict[str, Any]
) -> pl.DataFrame:
    """The decisions, or all samples kept where a gate does not hold.

    Raises:
        PlanError: a gate does not hold, and the plan says `otherwise: fail`.
    """
    why = _broken(gates)
    if why is None:
        return decisions
    if run.plan.trust.otherwise == "fail":
        raise PlanError(_refusal(run, stage, why))
    reason = pl.when("keep").then("reason").otherwise(pl.lit(f"kept: {why}"))
    return decisions.with_columns(reason=reason, keep=pl.lit(True))


def refusal_reason(run: Run, stage: int, name: str) -> str | None:
    """Why a pruning will not be made, where that is known already: a gate that was tried, does not hold, and fails."""
    folder, trust = run.folder.stage(stage), run.plan.trust
    tried = (
        [folder.audit(audit_settings(run.plan).removals)] if trust.min_fidelity is not None else []
    )
    tried += [folder.trial(name)] if trust.trial is not None else []
    if trust.otherwise != "fail" or not all(artefact.committed for artefact in tried):
        return None
    why = _broken(evaluate_gates(run, stage, name))
    return _refusal(run, stage, why) if why is not None else None


def _refusal(run: Run, stage: int, why: str) -> str:
    return f"stage {stage} of {run.url} is not pruned: {why}; nothing was dropped"


def _broken(gates: dict[str, Any]) -> str | None:
    """What is wrong with the first gate that does not hold."""
    return next((_sentence(name, gate) for name, gate in gates.items() if not gate["holds"]), None)


def _sentence(name: str, gate: dict[str, Any]) -> str:
    if name == "min_fidelity":
        return f"the audit's Spearman correlation is {gate['spearman']:.2f}, under the plan's {gate['least']:g}"
    return f"the trial's loss is {gate['kept']:.4f} on what is kept and {np.mean(gate['random']):.4f} at random"


def _trained(run: Run, stage: int, samples: Samples, keep: np.ndarray, steps: int) -> float:
    """The target's loss after a few steps on some of a stage's samples, at the unscheduled rate."""
    constant = Run(run.plan.model_copy(update={"schedule": ScheduleConfig()}), run.folder)
    loop = TrainingLoop(
        constant, stage, Samples(samples.urls, samples.frame.filter(pl.Series(keep)))
    )
    loop.restore(
        read_checkpoint(end_checkpoint(run, stage)),
        optimizer=run.plan.optimizer.at_stage == "carry",
    )
    for step in range(steps):
        loop.step(step)
    target = list_target_samples(run, run.plan.target)
    return target_loss(loop, target, held_out_rows(run.plan, run.plan.target, len(target)))
