"""Other projects' estimates for `benchmarks.lds`, run in an environment of their own.

`PYTHON -m benchmarks.lds_peers FOLDER NAME OUT` reads the training from a folder, and writes the
scores, `questions samples`, and the seconds of processor time. A positive score means that the
question's loss would rise without the sample. It needs `bergson`, `dattri-llm`, `dattri`,
`rank-bm25` and `transformers`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.dattri_capture import capture_gradients

DAMPING = 0.1  # bergson's own setting on its leaderboard


@dataclass(frozen=True)
class Given:
    """A training, as `benchmarks.lds` hands it over.

    Attributes:
        folder: of its files.
        work: an empty folder for the estimate's own files.
        texts: tokens of the samples, then of the questions.
        batches: samples of every step, `steps batch`.
        rates: learning rate of every step.
        final_losses: of the questions after training.
    """

    folder: Path
    work: Path
    texts: Tensor
    batches: Tensor
    rates: list[float]
    lr: float
    weight_decay: float
    final_losses: Tensor

    @property
    def samples(self) -> int:
        """Number of samples to train on."""
        return int(self.batches.max()) + 1


def read_given(folder: Path, work: Path) -> Given:
    """Read a training that was handed over."""
    tensors = load_file(folder / "training.safetensors")
    lr, decay = tensors["settings"].tolist()
    rates = tensors["rates"].tolist()
    losses = tensors["final_losses"]
    return Given(folder, work, tensors["texts"], tensors["batches"], rates, lr, decay, losses)


def bm25(given: Given) -> Tensor:
    """Score by BM25 over words."""
    from rank_bm25 import BM25Okapi  # type: ignore[import-not-found]

    texts = json.loads((given.folder / "texts.json").read_text())
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    index = BM25Okapi(words[: given.samples])
    return torch.stack([torch.tensor(index.get_scores(q)) for q in words[given.samples :]])


def trackstar(given: Given, projection: int) -> Tensor:
    """Score by bergson's TrackStar, with the settings of its leaderboard.

    Args:
        projection: numbers per side of each of the 4 matrices per layer.
    """
    from bergson.cli.trackstar import trackstar as run  # type: ignore[import-not-found]
    from bergson.config.config import (  # type: ignore[import-not-found]
        PreprocessConfig,
        ScoreConfig,
        TrackstarConfig,
        TrackstarIndexConfig,
    )

    settings = TrackstarConfig(
        query=_query(given),
        preprocess_cfg=PreprocessConfig(unit_normalize=True),
        score_cfg=ScoreConfig(batch_size=1024),
        stats_sample_size=None,
    )
    run(_index(given, TrackstarIndexConfig, projection_dim=projection), settings)
    return _read_bergson(given)


def ekfac(given: Given) -> Tensor:
    """Score by bergson's EK-FAC, with the settings of its leaderboard."""
    from bergson.config.config import (
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        ScoreConfig,
    )
    from bergson.hessians.pipeline import hessian_pipeline  # type: ignore[import-not-found]

    hessian_pipeline(
        _index(given, IndexConfig),
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(batch_size=1024),
        PreprocessConfig(),
        HessianPipelineConfig(
            query=_query(given), inversion_cfg=InversionConfig(damping_factor=DAMPING)
        ),
    )
    return _read_bergson(given)


def magic(given: Given) -> Tensor:
    """Score by bergson's MAGIC, which trains the model itself, on the same batches.

    Raises:
        RuntimeError: its model is not the one that was handed over.
    """
    from bergson.config.config import LRScheduleConfig
    from bergson.magic.cli import worker  # type: ignore[import-not-found]
    from bergson.magic.config import MagicConfig  # type: ignore[import-not-found]

    class Rates(LRScheduleConfig):
        def get_schedule(self, num_steps: int) -> Callable[[Any], float]:
            return lambda step: given.rates[int(step)]

    settings = MagicConfig(
        run_path=f"{given.work}/bergson",
        model=f"{given.folder}/initial",
        data=_data(given, "samples"),
        query=_query(given),
        batch_size=given.batches.shape[1],
        lr_schedule=Rates(),
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=given.weight_decay,
        save_models=True,
        wandb_project="",
    )
    # The rows of all epochs in order. Rows of one sample share its number, and so its weight.
    ids = given.batches.flatten()
    samples = _dataset(given.texts[ids], ids)
    questions = _dataset(given.texts[given.samples :])
    counts = given.samples, len(questions)
    worker(0, 0, 1, samples, questions, *counts, settings)
    losses = _question_losses(given, f"{given.work}/bergson/retrained/base")
    if not torch.allclose(losses, given.final_losses, atol=0.01):
        gap = float((losses - given.final_losses).abs().max())
        raise RuntimeError(f"bergson's trainer ended {gap:.3f} away in a question's loss")
    return _read_bergson(given)


def _index(given: Given, kind: type, **options: Any) -> Any:
    """The settings of a bergson index over the samples, at the trained model."""
    # As many tokens in a batch as bergson allows. The head is the embedding, and is left out.
    return kind(
        run_path=f"{given.work}/bergson",
        model=f"{given.folder}/final",
        data=_data(given, "samples"),
        token_batch_size=2 * given.texts.shape[1],
        filter_modules="lm_head",
        overwrite=True,
        **options,
    )


def _data(given: Given, part: str) -> Any:
    from bergson.config.config import DataConfig

    path = f"{given.work}/{part}"
    if not Path(path).exists():
        texts = given.texts[: given.samples] if part == "samples" else given.texts[given.samples :]
        _dataset(texts).save_to_disk(path)
    return DataConfig(dataset=path)


def _query(given: Given) -> Any:
    from bergson.config.config import QuerySetConfig

    return QuerySetConfig.from_data(_data(given, "questions"), aggregation="none")


def _dataset(texts: Tensor, numbers: Tensor | None = None) -> Any:
    """Texts as a dataset; `numbers` are the documents that they belong to."""
    from datasets import Dataset

    columns: dict[str, Any] = {
        "input_ids": texts.tolist(),
        "length": [texts.shape[1]] * len(texts),
    }
    if numbers is not None:
        columns["doc_ids"] = numbers[:, None].expand_as(texts).tolist()
    return Dataset.from_dict(columns)


def _question_losses(given: Given, model: str) -> Tensor:
    """Return the losses of the questions under a saved model."""
    from transformers import AutoModelForCausalLM

    questions = given.texts[given.samples :]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=questions[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), questions[:, 1:], reduction="none"
    )
    return losses.mean(1).double()


def _read_bergson(given: Given) -> Tensor:
    from bergson.data import load_scores_loss_signed  # type: ignore[import-not-found]

    scores, _ = load_scores_loss_signed(f"{given.work}/bergson/scores")
    # What reduces a question's loss is negative there.
    return -torch.as_tensor(scores).T.contiguous()


def dattri_llm(given: Given, mask: int | None) -> Tensor:
    """Score by dattri-llm's AdamW-influence.

    Args:
        mask: size of a random mask of coordinates per module; all of them if None.
    """
    import dattri_llm as peer  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.folder / "initial")
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, weight_decay=given.weight_decay)
    projection = {"__default__": {"style": "mask", "proj_dim": mask}} if mask else None
    moments = peer.OptimizerStateCallback(model, optimizer, projection_kwargs=projection)
    stores = [f"{given.work}/dattri/train", f"{given.work}/dattri/test"]
    with capture_gradients(model, projection, stores[0], [moments]):
        for step, ids in enumerate(given.batches):
            for group in optimizer.param_groups:
                group["lr"] = given.rates[step]
            _backward(model, given.texts[ids])
            optimizer.step()
            moments.record_post(step)
    with capture_gradients(model, projection, stores[1], []):
        _backward(model, given.texts[given.samples :])
    arguments = peer.AttributionArguments(output_dir=f"{given.work}/dattri/out")
    attributor = peer.AdamWInfluenceAttributor(arguments)
    result = attributor.attribute_from_cache(
        *stores, dynamics=moments.dynamics(), propagation="test"
    )
    steps = torch.tensor(result.row_steps)
    scores = torch.zeros(given.samples, result.scores.shape[1], dtype=torch.float64)
    for step, ids in enumerate(given.batches):
        scores.index_add_(0, ids, result.scores[steps == step].double())
    return -scores.T.contiguous()  # a score there is the change as the sample's weight grows


def _backward(model: Any, texts: Tensor) -> None:
    model.zero_grad()
    logits = model(input_ids=texts[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).backward()


PEERS: dict[str, Callable[[Given], Tensor]] = {
    "BM25": bm25,
    "bergson TrackStar, 2,048 numbers": partial(trackstar, projection=16),
    "bergson TrackStar, 8,192 numbers": partial(trackstar, projection=32),
    "bergson EK-FAC": ekfac,
    "dattri-llm AdamWInfluence, mask": partial(dattri_llm, mask=128),
    "dattri-llm AdamWInfluence, all": partial(dattri_llm, mask=None),
    "bergson MAGIC": magic,
}


def main() -> None:
    """Score by one estimate, and write the scores."""
    folder, name, out = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as work:
        given = read_given(Path(folder), Path(work))
        start = time.process_time()
        scores = PEERS[name](given)
        seconds = time.process_time() - start
    save_file({"scores": scores.contiguous()}, out, metadata={"seconds": str(seconds)})


if __name__ == "__main__":
    main()
