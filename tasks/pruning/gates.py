"""Trust gates: conditions that must hold before a stage is pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from secateur.errors import PlanError
from secateur.storage.attempt import Attempt
from secateur.storage.ledger import read_checkpoint
from secateur.storage.shards import Samples
from secateur.tasks.data.held_out import held_out_rows
from secateur.tasks.data.samples import list_target_samples
from secateur.tasks.data.seeds import seed_for
from secateur.tasks.plan import Policy, ScheduleConfig
from secateur.tasks.pruning.context import PruningContext
from secateur.tasks.pruning.decide import decide_samples
from secateur.tasks.results.agreement_results import read_agreement
from secateur.tasks.results.audit_results import audit_output, read_audit
from secateur.tasks.results.training_results import end_checkpoint
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation.target_gradients import target_loss

# The figures of each gate, and under `holds` whether it holds.
Gates = dict[str, dict[str, Any]]


def run_trial(run: Run, stage: int, name: str, policy: Policy) -> dict[str, Any]:
    """Train a few steps on what a policy keeps, and on as many samples drawn at random.

    Every training starts from the stage's end.

    Args:
        name: the pruning's name.

    Returns:
        The loss on the held-out samples of the pruning target: `kept`, `random` (one per draw), and
        the draws' `seeds`.
    """
    config = run.plan.trust.trial
    if config is None:
        raise PlanError(f"the plan of {run.url} has no trust.trial")
    steps = config.steps

    def write(attempt: Attempt) -> None:
        context = PruningContext.of_stage(run, stage)
        keep = decide_samples(policy, context)["keep"].to_numpy()
        seeds = [seed_for(run.plan.seed, "trial", stage, draw) for draw in range(config.draws)]
        choices = [keep, *(np.random.default_rng(seed).permutation(keep) for seed in seeds)]
        losses = [_loss_after_training(context, choice, steps) for choice in choices]
        attempt.facts.update(kept=losses[0], random=losses[1:], seeds=seeds, steps=steps)

    folder = run.folder.stage(stage)
    inputs = {"scores": folder.scores.fingerprint}
    return dict(folder.trial(name).write_once("trial", inputs, write).facts)


def evaluate_gates(run: Run, stage: int, name: str) -> Gates:
    """Return whether each gate of the plan holds for a pruning, with its figures.

    Empty if the plan has no gate.
    """
    gates: Gates = {}
    trust = run.plan.trust
    if trust.min_fidelity is not None:
        fidelity = read_audit(run, stage).fidelity[run.plan.estimate]
        gates["min_fidelity"] = {
            "holds": fidelity.spearman >= trust.min_fidelity,
            "least": trust.min_fidelity,
            **fidelity.model_dump(mode="json"),
        }
    if run.plan.gates_by_agreement:
        assert trust.min_agreement is not None
        agreement = read_agreement(run, stage).estimates["embedding"]
        gates["min_agreement"] = {
            "holds": agreement.spearman >= trust.min_agreement,
            "least": trust.min_agreement,
            **agreement.model_dump(mode="json"),
        }
    if trust.trial is not None:
        facts = run.folder.stage(stage).trial(name).manifest.facts
        holds = facts["kept"] <= float(np.mean(facts["random"]))
        gates["trial"] = {"holds": holds, **facts}
    return gates


def apply_gates(run: Run, stage: int, decisions: pl.DataFrame, gates: Gates) -> pl.DataFrame:
    """Return the decisions, or all samples kept if a gate does not hold.

    Raises:
        PlanError: a gate does not hold, and the plan says `otherwise: fail`.
    """
    problem = _first_problem(gates)
    if problem is None:
        return decisions
    if run.plan.trust.otherwise == "fail":
        raise PlanError(_refusal(run, stage, problem))
    reason = pl.when("keep").then("reason").otherwise(pl.lit(f"kept: {problem}"))
    return decisions.with_columns(reason=reason, keep=pl.lit(True))


def refusal_reason(run: Run, stage: int, name: str) -> str | None:
    """Return why pruning is refused, or None if it is not, or if that is not known yet.

    Pruning is refused if a gate does not hold and the plan says `otherwise: fail`.
    """
    trust = run.plan.trust
    evaluated = []
    if trust.min_fidelity is not None:
        evaluated.append(audit_output(run, stage))
    if run.plan.gates_by_agreement:
        evaluated.append(run.folder.stage(stage).agreement)
    if trust.trial is not None:
        evaluated.append(run.folder.stage(stage).trial(name))
    if trust.otherwise != "fail" or not all(output.committed for output in evaluated):
        return None
    problem = _first_problem(evaluate_gates(run, stage, name))
    return None if problem is None else _refusal(run, stage, problem)


def _refusal(run: Run, stage: int, problem: str) -> str:
    return f"stage {stage} of {run.url} is not pruned: {problem}; nothing was dropped"


def _first_problem(gates: Gates) -> str | None:
    """A sentence about the first gate that does not hold."""
    for name, gate in gates.items():
        if gate["holds"]:
            continue
        if name == "min_fidelity":
            return (
                f"the audit's Spearman correlation is {gate['spearman']:.2f}, under the plan's "
                f"{gate['least']:g}"
            )
        if name == "min_agreement":
            return (
                f"the embeddings' answers agree with replay to {gate['spearman']:.2f}, under the "
                f"plan's {gate['least']:g}"
            )
        return (
            f"the trial's loss is {gate['kept']:.4f} on the samples that are kept and "
            f"{np.mean(gate['random']):.4f} on random ones"
        )
    return None


def _loss_after_training(context: PruningContext, keep: np.ndarray, steps: int) -> float:
    """The pruning target's held-out loss after a few steps on some of the stage's samples."""
    run = context.run
    samples = context.samples
    # A schedule would end these few steps near a rate of zero, so the rate is constant.
    constant = Run(run.plan.model_copy(update={"schedule": ScheduleConfig()}), run.folder)
    kept = Samples(samples.urls, samples.frame.filter(pl.Series(keep)))
    loop = TrainingLoop(constant, context.stage, kept)
    checkpoint = read_checkpoint(end_checkpoint(run, context.stage))
    loop.load_state(checkpoint, optimizer=run.plan.optimizer.at_stage == "carry")
    for step in range(steps):
        loop.step(step)
    name = run.plan.pruning_target
    target = list_target_samples(run, name)
    return target_loss(loop, target, held_out_rows(run.plan, name, len(target)))
