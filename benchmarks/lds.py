"""Linear datamodeling score (LDS) and loss without the top 1%, as on bergson's leaderboard.

`python -m benchmarks.lds [--seeds 0 1 2] [--peers PYTHON] [--json FILE]`

A small GPT-2 (`benchmarks.small_gpt2`) is trained again 40 times without a random 1% of the texts,
with the same initial weights and batches. LDS is Spearman's correlation, over these trainings,
between the summed scores of the texts left out and the loss of a question, averaged over the 20
questions. Then it is trained again without the 1% of the texts that an estimate scores highest,
for a few of the questions. `--peers` names the Python of an environment with `bergson`,
`dattri-llm` and `rank-bm25` (`benchmarks/lds_peers.py`); without it their rows are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.lds_estimates import ESTIMATES, sum_over_uses
from benchmarks.lds_peers import PEERS
from benchmarks.record import agreement, record_training
from benchmarks.small_gpt2 import LR, WEIGHT_DECAY, Size, TextTraining, make_text_training
from benchmarks.timing import format_spread

RANDOM = "random texts"  # a row: what leaving out random texts does


@dataclass(frozen=True)
class Protocol:
    """How estimates are judged.

    Attributes:
        retrainings: trainings without random texts.
        fraction: of the texts that are left out, at random or from the top.
        top_questions: questions for which the top is left out.
    """

    retrainings: int = 40
    fraction: float = 0.01
    top_questions: int = 3


@dataclass
class Estimate:
    """Scores, `questions samples`, and the seconds of processor time that they took.

    `refusal` says why there are none.
    """

    scores: Tensor | None
    seconds: float = 0.0
    refusal: str = ""


def draw_subsets(samples: int, count: int, fraction: float, seed: int) -> Tensor:
    """Return random subsets of equal size, `count samples`, true where a sample is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, round(fraction * samples))
    removed = torch.zeros(count, samples, dtype=torch.bool)
    for row in removed:
        row[torch.randperm(samples, generator=generator)[:size]] = True
    return removed


def datamodeling_score(scores: Tensor, removed: Tensor, losses: Tensor) -> float:
    """Return the linear datamodeling score.

    Args:
        scores: by how much a question's loss would rise without a sample, `questions samples`.
        removed: the samples that each training left out, `trainings samples`.
        losses: of the questions after each training, `trainings questions`.
    """
    predicted = removed.double() @ scores.double().T
    pairs = zip(predicted.T, losses.T, strict=True)
    return statistics.mean(_correlation(a, b) for a, b in pairs)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation. An estimate that tells no subset from another predicts nothing."""
    return float(spearmanr(a, b).statistic) if len(a.unique()) > 1 else 0.0


def top_removal(training: TextTraining, scores: Tensor, base: Tensor, protocol: Protocol) -> float:
    """Return the mean rise of a question's loss without its highest scored samples."""
    size = max(1, round(protocol.fraction * training.samples))
    rises = []
    for question, row in enumerate(scores[: protocol.top_questions]):
        removed = torch.zeros(training.samples, dtype=torch.bool)
        removed[row.topk(size).indices] = True
        rises.append(float(training.retrain(removed)[question] - base[question]))
    return statistics.mean(rises)


def measure(
    seed: int, size: Size, protocol: Protocol, peers: str | None
) -> dict[str, dict[str, float] | str]:
    """Return the figures of every row for one seed, or why there are none."""
    training = make_text_training(seed, size)
    base = training.retrain(torch.zeros(training.samples, dtype=torch.bool))
    removed = draw_subsets(training.samples, protocol.retrainings, protocol.fraction, seed)
    losses = torch.stack([training.retrain(row) for row in removed])
    print(seed, f"loss of the questions {base.mean():.3f}", flush=True)
    rises = (losses - base)[:, : protocol.top_questions]
    rows: dict[str, dict[str, float] | str] = {RANDOM: {"top": float(rises.mean())}}
    estimates = score_ourselves(training)
    truth = estimates["replay"].scores
    assert truth is not None
    if peers:
        estimates |= score_with_peers(training, peers)
    for name, estimate in estimates.items():
        if estimate.scores is None:
            rows[name] = estimate.refusal
        else:
            rows[name] = {
                "lds": datamodeling_score(estimate.scores, removed, losses),
                "top": top_removal(training, estimate.scores, base, protocol),
                "agreement": agreement(estimate.scores, truth),
                "seconds": estimate.seconds,
            }
        print(seed, name, rows[name], flush=True)
    return rows


def score_ourselves(training: TextTraining) -> dict[str, Estimate]:
    """Return the scores of our estimates. Each one's seconds include the recorded training."""
    estimates = {}
    with tempfile.TemporaryDirectory() as folder:
        workload = training.workload
        questions = len(workload.validation)
        record = record_training(workload, questions, draws=0, folder=Path(folder))
        for name, estimate in ESTIMATES.items():
            start = time.process_time()
            effects = estimate(record)
            seconds = record.seconds + time.process_time() - start
            scores = sum_over_uses(effects, training.workload.batches, training.samples)
            estimates[name] = Estimate(scores, seconds)
    return estimates


def score_with_peers(training: TextTraining, python: str) -> dict[str, Estimate]:
    """Return the scores of other projects, each run in a process of another environment."""
    estimates = {}
    with tempfile.TemporaryDirectory() as folder:
        hand_over(training, Path(folder))
        for number, name in enumerate(PEERS):
            scores = Path(folder) / f"scores-{number}.safetensors"
            command = [python, "-m", "benchmarks.lds_peers", folder, name, str(scores)]
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
                estimates[name] = Estimate(None, refusal=last)
                continue
            with safe_open(scores, "pt") as file:
                tensor = file.get_tensor("scores")
                estimates[name] = Estimate(tensor, float(file.metadata()["seconds"]))
    return estimates


def hand_over(training: TextTraining, folder: Path) -> None:
    """Write the initial and the final model, the texts and the batches for the peers."""
    from transformers import PreTrainedTokenizerFast

    workload = training.workload
    model: Any = workload.model()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=training.tokenizer)
    for name in ("initial", "final"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "initial":
            optimizer = workload.optimizer(model)
            for step in range(len(workload.batches)):
                workload.step(model, optimizer, step)
    rates = [workload.rate(step) for step in range(len(workload.batches))]
    tensors = {
        "texts": training.texts,
        "batches": torch.stack(workload.batches),
        "rates": torch.tensor(rates, dtype=torch.float64),
        "settings": torch.tensor([LR, WEIGHT_DECAY], dtype=torch.float64),
        "final_losses": workload.target_losses(model).detach(),
    }
    save_file(tensors, folder / "training.safetensors")
    texts = [training.tokenizer.decode(text.tolist()) for text in training.texts]
    (folder / "texts.json").write_text(json.dumps(texts))


def print_table(results: list[dict[str, dict[str, float] | str]]) -> None:
    """Print the median of the seeds, and the least and the greatest value, of every row."""
    columns = {"lds": 2, "top": 3, "agreement": 2, "seconds": 0}
    print(f"{'estimate':40}" + "".join(f"{column:26}" for column in columns))
    for name in results[0]:
        found = [row for row in (result[name] for result in results) if isinstance(row, dict)]
        cells = [
            format_spread([row[column] for row in found], digits) if column in found[0] else "-"
            for column, digits in (columns.items() if found else ())
        ]
        print(f"{name:40}" + ("".join(f"{cell:26}" for cell in cells) or str(results[0][name])))


def main() -> None:
    """Print one line per estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.peers:
        print("without --peers the rows of other projects are left out", file=sys.stderr)
    results = []
    for seed in arguments.seeds:
        results.append(measure(seed, Size(), Protocol(), arguments.peers))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
