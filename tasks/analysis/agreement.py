"""Measure how far the answers of a stage's embeddings agree with replay, on a few questions."""

from __future__ import annotations

from statistics import median

import polars as pl
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from secateur.errors import PlanError
from secateur.storage import schemas
from secateur.storage.attempt import Attempt
from secateur.storage.folder import Folder
from secateur.storage.frames import write_frame
from secateur.storage.outputs import list_outputs
from secateur.tasks.analysis.question_replays import (
    expected_agreement_cost,
    replay_drawn,
    sample_asked,
)
from secateur.tasks.results.agreement_results import (
    AGREEMENT,
    MEASURED,
    Agreement,
    AgreementResult,
)
from secateur.tasks.results.valuation_results import (
    read_embeddings,
    read_replay_scores,
    read_target_gradients,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation.drawn_questions import QUESTION, DrawnQuestion, draw_questions
from secateur.tasks.valuation.embedding_space import share_in_embeddings
from secateur.tasks.valuation.pull_back import pull_back_scores
from secateur.tasks.valuation.query import stage_queries
from secateur.tasks.valuation.question import share_held
from secateur.tasks.valuation.target_gradients import (
    loop_at_stage_end,
    mean_gradient,
    squared_norm,
)

# Replay's most helpful uses are sought among so many of an estimate's best, but among no more than
# a quarter of all uses, because in all of them they are found by chance too.
MOST = 50
BEST = 2000


def write_agreement(run: Run, stage: int, questions: int | None = None) -> AgreementResult:
    """Compare the effects of all uses of an embedded stage, by its embeddings and by replay.

    The questions are about single samples of the targets, at the stage's end. Their replays are
    removed afterwards.

    Args:
        questions: how many, in place of the plan's number.

    Raises:
        PlanError: the targets have fewer samples, the plan's precision does not allow replay,
            another number of questions was asked before, another trainer trained the stage, or
            training does not repeat itself.
    """
    folder = run.folder.stage(stage)
    count = questions or run.plan.trust.asked
    drawn = draw_questions(run, count)

    def write(attempt: Attempt) -> None:
        replay_drawn(run, stage, count)
        truth = _replay_scores(run, stage, drawn)
        frame = _compare(run, stage, drawn, truth)
        write_frame(attempt, AGREEMENT, frame, schemas.AGREEMENT)
        attempt.facts.update(_summarize(stage, frame, truth.shape[1]))

    inputs = {"embeddings": folder.embeddings.fingerprint, "targets": folder.targets.fingerprint}
    result = AgreementResult(**folder.agreement.write_once("agreement", inputs, write).facts)
    _remove_replays(folder.root.child("replay"))
    if result.questions != count:
        raise PlanError(
            f"stage {stage} of {run.url} was asked {result.questions} questions before, and is to "
            f"be asked {count} now; ask as many as before, or remove {folder.agreement.root.url}"
        )
    return result


def _remove_replays(replays: Folder) -> None:
    """Remove the replays of questions. Those of targets stay."""
    for replayed in list_outputs(replays):
        name = replayed.root.url.removeprefix(replays.url).strip("/")
        if name.startswith(QUESTION):
            replayed.remove()


def _replay_scores(
    run: Run, stage: int, questions: list[DrawnQuestion]
) -> Float[Tensor, "questions uses"]:
    names = [question.name for question in questions]
    count = len(run.folder.stage(stage).segments())
    parts = [read_replay_scores(run, stage, number, names) for number in range(count)]
    return torch.stack([torch.cat([part[name] for part in parts]) for name in names])


def _compare(
    run: Run, stage: int, questions: list[DrawnQuestion], truth: Float[Tensor, "questions uses"]
) -> pl.DataFrame:
    """One row per question, as `schemas.AGREEMENT` says."""
    rows = [read_target_gradients(run, stage, one.target)[one.row] for one in questions]
    gradients = torch.stack(rows)
    ((_, pulled),) = pull_back_scores(run, [stage], gradients)
    estimates = {"embedding": _embedding_scores(run, stage, gradients), "pull_back": pulled.T}
    most = min(MOST, truth.shape[1])
    best = max(most, min(BEST, truth.shape[1] // 4))
    columns: dict[str, list[float]] = {}
    for name in MEASURED:
        pairs = list(zip(estimates[name].double(), truth, strict=True))
        columns[f"spearman_{name}"] = [_correlation(scores, true) for scores, true in pairs]
        columns[f"found_{name}"] = [share_found(scores, true, most, best) for scores, true in pairs]
    frame = pl.DataFrame(
        {
            "target": [one.target for one in questions],
            "key": [one.key for one in questions],
            "held": _shares_held(run, stage, questions, gradients),
            "most": most,
            "best": best,
            **columns,
        }
    )
    return frame.select(pl.col(name).cast(kind) for name, kind in schemas.AGREEMENT.items())


def _embedding_scores(
    run: Run, stage: int, gradients: Float[Tensor, "questions p"]
) -> Float[Tensor, "questions uses"]:
    """The products that the index searches among, of all uses."""
    ((_, queries),) = stage_queries(run, [stage], gradients)
    vectors = torch.from_numpy(queries).double()
    parts = read_embeddings(run.folder.stage(stage).embeddings)
    return torch.cat([vectors @ part.double().T for part in parts], 1)


def _shares_held(
    run: Run, stage: int, questions: list[DrawnQuestion], gradients: Float[Tensor, "questions p"]
) -> list[float]:
    """The share of each question's gradient that embeddings hold."""
    loop = loop_at_stage_end(run, stage)
    shares = []
    for question, gradient in zip(questions, gradients, strict=True):
        whole = squared_norm(mean_gradient(loop, *sample_asked(run, question)))
        held = share_held(gradient[None], float(whole))
        shares.append(held * share_in_embeddings(run, stage, gradient[None]))
    return shares


def _correlation(scores: Float[Tensor, " uses"], truth: Float[Tensor, " uses"]) -> float:
    """Spearman's correlation. An estimate that tells no use from another agrees with nothing."""
    if len(scores.unique()) == 1 or len(truth.unique()) == 1:
        return 0.0
    return float(stats.spearmanr(scores.numpy(), truth.numpy()).statistic)


def share_found(
    scores: Float[Tensor, " uses"], truth: Float[Tensor, " uses"], most: int, best: int
) -> float:
    """Return the share of the truth's `most` highest uses that are among the `best` by score."""
    highest = truth.topk(most).indices
    return float(torch.isin(highest, scores.topk(best).indices).double().mean())


def _summarize(stage: int, frame: pl.DataFrame, uses: int) -> dict[str, object]:
    columns = frame.to_dict(as_series=False)
    estimates = {
        name: Agreement(
            spearman=median(columns[f"spearman_{name}"]),
            lowest=min(columns[f"spearman_{name}"]),
            found=median(columns[f"found_{name}"]),
        )
        for name in MEASURED
    }
    return AgreementResult(
        stage=stage,
        questions=len(frame),
        uses=uses,
        held=median(columns["held"]),
        most=columns["most"][0],
        best=columns["best"][0],
        cost=expected_agreement_cost(len(frame)),
        estimates=estimates,
    ).model_dump(mode="json")
