"""One recorded forward pass of a Hugging Face model: its samples' losses and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.flows.trainers.sample_losses import (
    LossRule,
    fits,
    sum_by_sample,
)
from secateur.flows.trainers.token_losses import find_token_losses
from secateur.influence.recorded_batch import RecordedBatch
from secateur.tasks.data.take_samples import take_samples

# Relative, because a loss in half precision is rounded.
LOSS_TOLERANCE = 1e-2
# What the loss is computed from, and what describes all rows together.
NOT_OF_ONE_SAMPLE = ("num_items_in_batch", "fused_lm_head", "max_length_q", "max_length_k")


@dataclass
class RecordedForward:
    """The arguments of a forward pass whose samples are recorded.

    Attributes:
        model: the model.
        inputs: its arguments, without labels.
        labels: one per sample, or one per position.
        documents: the sample that each position belongs to, if several share a row.
        samples: number of samples.
        smoothing: the Trainer's factor of label smoothing.
        call: runs the model without recording.
    """

    model: nn.Module
    inputs: dict[str, Any]
    labels: Tensor
    documents: Tensor | None
    samples: int
    smoothing: float
    call: Callable[..., Any]
    rule: LossRule | None = None

    def find_rule(self) -> LossRule:
        """Return the rule by which the model's own loss comes from its logits and labels.

        Raises:
            PlanError: it is not their cross-entropy.
        """
        inputs, labels = self._take(torch.zeros(1, dtype=torch.int64))
        with torch.no_grad(), torch.random.fork_rng():
            output = self.call(**inputs, labels=labels)
        loss = output.get("loss")
        for rule in fits(output["logits"], labels):
            counted = rule.counted(labels).sum()
            expected = float(rule.label_losses(output["logits"], labels).sum() / counted)
            if loss is None or abs(expected - float(loss)) <= LOSS_TOLERANCE * abs(float(loss)):
                return LossRule(rule.shifted, self.smoothing)
        raise _unknown_loss("the model's loss")

    def losses_of(self, places: Tensor) -> Tensor:
        """Return the mean loss of each of some samples, in one row each."""
        inputs, labels = self._take(places)
        assert self.rule is not None
        logits = self.call(**inputs)["logits"]
        losses = self.rule.label_losses(logits, labels)
        counts = self.rule.counted(labels).reshape(len(labels), -1).sum(1)
        return losses.reshape(len(labels), -1).sum(1) / counts.clamp(min=1)

    def read(self, output: Any, batch: RecordedBatch) -> None:
        """Read the samples' losses and weights off the outputs of the recorded pass."""
        assert self.rule is not None
        counted = self.rule.counted(self.labels)
        counts = self._sum(counted.long())
        scores = output.get("log_probs")
        if scores is not None:
            padded = nn.functional.pad(scores.detach(), (0, 1))
            batch.losses = self._sum(-padded) / counts.clamp(min=1)

            def weigh_scores(gradient: Tensor) -> None:
                # The loss adds up ignored positions too, whose score is a constant 0.
                slopes = nn.functional.pad(-gradient, (0, 1)) * counted
                batch.weights = self._sum(slopes).double().cpu()

            scores.register_hook(weigh_scores)
            return
        loss = output.get("loss")
        found = None if loss is None else find_token_losses(loss, self.rule.align(self.labels))
        if found is None:
            found = self.rule.label_losses(output["logits"].detach(), self.labels)
        losses = self._sum(found)
        batch.losses = losses / counts.clamp(min=1)
        items = self.inputs.get("num_items_in_batch")
        if loss is None:
            output["logits"].register_hook(lambda g: self._weigh_logits(output["logits"], g, batch))
            return
        total = counts.sum() if items is None else items
        expected = losses.sum() / total
        if abs(float(expected - loss.detach())) > LOSS_TOLERANCE * abs(float(loss.detach())) + 1e-6:
            raise _unknown_loss(f"the model's loss ({float(loss.detach()):.4g})")

        def weigh_loss(gradient: Tensor) -> None:
            # The gradient of the loss is the factor that the Trainer scales the loss by.
            batch.weights = (gradient * counts / total).double().cpu()

        loss.register_hook(weigh_loss)

    def _weigh_logits(self, logits: Tensor, gradient: Tensor, batch: RecordedBatch) -> None:
        """Find the weights by which the samples' own gradients make up the logits' gradient."""
        assert self.rule is not None
        with torch.enable_grad():
            own = logits.detach().requires_grad_()
            losses = self._sum(self.rule.label_losses(own, self.labels))
            counts = self._sum(self.rule.counted(self.labels).long()).clamp(min=1)
            (slopes,) = torch.autograd.grad((losses / counts).sum(), own)
        product = self._sum((gradient.float() * slopes.float()).sum(-1))
        weights = product / self._sum(slopes.float().square().sum(-1)).clamp(min=1e-30)
        rest = gradient.float() - self._spread(weights)[..., None] * slopes.float()
        if float(rest.norm()) > 5 * LOSS_TOLERANCE * float(gradient.float().norm()):
            raise _unknown_loss("the loss")
        batch.weights = weights.double().cpu()

    def _take(self, places: Tensor) -> tuple[dict[str, Any], Tensor]:
        inputs = {n: v for n, v in self.inputs.items() if n not in NOT_OF_ONE_SAMPLE}
        tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.dim()}
        rest = {n: v for n, v in inputs.items() if n not in tensors}
        tensors["labels"] = self.labels
        if self.documents is not None:
            shape = self.documents.shape
            tensors = {n: t for n, t in tensors.items() if t.shape == shape and n != "seq_idx"}
            tensors["documents"] = self.documents
        taken = take_samples(tensors, places)
        taken.pop("documents", None)
        labels = taken.pop("labels")
        return rest | taken, labels

    def _sum(self, values: Tensor) -> Tensor:
        return sum_by_sample(values, self.samples, self.documents)

    def _spread(self, values: Tensor) -> Tensor:
        """Return each sample's value at each of its positions."""
        if self.documents is not None:
            return torch.where(self.documents >= 0, values[self.documents.clamp(min=0)], 0)
        return values.view(-1, *[1] * (self.labels.dim() - 1))


def _unknown_loss(what: str) -> PlanError:
    return PlanError(
        f"{what} is not the cross-entropy of logits and labels, so the samples' losses are not "
        f"known; record it in your own loop with `secateur.Recording`"
    )
