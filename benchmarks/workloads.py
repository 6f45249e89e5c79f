"""Workloads A to D: small enough that the true effect of a sample can be measured by retraining.

`docs/fidelity.md` describes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.directional_derivatives import LossPart
from secateur.influence.recorder import Recorder

Losses = Callable[[nn.Module, Tensor], Tensor]
Data = Callable[[Tensor | None], tuple[Tensor, Tensor]]
State = tuple[dict[str, Tensor], dict[str, object]]  # of the model, and of the optimizer


@dataclass
class Workload:
    """A training run that can be repeated with one sample left out of one step.

    Attributes:
        model: makes the model.
        optimizer: makes the optimizer of a model.
        batches: ids of the samples of each step.
        rate: learning rate of each step.
        losses: one loss per sample, from the model and sample ids.
        validation: ids of the validation samples, whose mean loss is the target.
        removals: the step and the place in its batch of each sample to leave out.
        data: inputs and labels of some samples, or of the validation set if None.
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batches: list[Tensor]
    rate: Callable[[int], float]
    losses: Losses
    validation: Tensor
    removals: list[tuple[int, int]]
    data: Data

    def target_losses(self, model: nn.Module) -> Tensor:
        """Return one loss per validation sample."""
        return self.losses(model, self.validation)

    def train(
        self,
        make_recorder: Callable[[nn.Module, torch.optim.Optimizer], Recorder] | None = None,
        before_step: Callable[[int, nn.Module, Recorder], None] | None = None,
    ) -> Trained:
        """Train to the end, and keep the state before every step.

        Args:
            make_recorder: if given, every step is recorded.
            before_step: called before each recorded step.
        """
        model = self.model()
        optimizer = self.optimizer(model)
        recorder = make_recorder(model, optimizer) if make_recorder else None
        states = []
        for step in range(len(self.batches)):
            states.append(_copy_state(model, optimizer))
            if recorder and before_step:
                before_step(step, model, recorder)
            self.step(model, optimizer, step, None, recorder)
        return Trained(model, optimizer, states, recorder)

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        without: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Take one step.

        Args:
            without: a place of the batch to leave out. The other samples keep their weights.
        """
        ids = self.batches[step]
        weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
        if without is not None:
            weights[without] = 0
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        optimizer.zero_grad()
        if recorder is None:
            (self.losses(model, ids) @ weights).backward()
        else:
            with recorder.batch(ids, weights) as batch:
                losses = self.losses(model, ids)
                batch.losses = losses.detach()
                (losses @ weights).backward()
        optimizer.step()

    def loss_part(self, ids: Tensor) -> LossPart:
        """Return the mean loss of a batch, as replay takes it."""
        weights = torch.full((len(ids),), 1 / len(ids))
        return LossPart(lambda model: self.losses(model, ids), weights)

    def retraining_effects(self, trained: Trained) -> Tensor:
        """Return how leaving each of `removals` out changes the target's loss at the end.

        Training is repeated from the sample's step.
        """
        base = float(self.target_losses(trained.model).detach().mean())
        changes = []
        for step, place in self.removals:
            model = self.model()
            optimizer = self.optimizer(model)
            _load_state(model, optimizer, trained.states[step])
            self.step(model, optimizer, step, place)
            for later in range(step + 1, len(self.batches)):
                self.step(model, optimizer, later)
            with torch.no_grad():
                changes.append(float(self.target_losses(model).mean()) - base)
        return torch.tensor(changes, dtype=torch.float64)


@dataclass
class Trained:
    """A finished training, its state before every step, and its recorder."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    states: list[State]
    recorder: Recorder | None


@dataclass(frozen=True)
class DigitsSettings:
    """How a workload on digits is trained."""

    optimizer: str
    lr: float
    epochs: int


DIGITS = {
    "A": DigitsSettings("sgd", 0.05, 3),
    "B": DigitsSettings("sgd", 0.3, 3),
    "C": DigitsSettings("adamw", 0.002, 3),
    "D": DigitsSettings("adamw", 0.01, 6),
}


def make_digits(name: str, seed: int, removals: int = 150) -> Workload:
    """Return a workload A to D: scikit-learn digits, MLP 64-32-10 GELU, batches of 64, float64.

    `A-relu` and so on have ReLU in place of GELU.
    """
    settings = DIGITS[name[0]]
    activation = nn.ReLU if name.endswith("-relu") else nn.GELU
    pixels, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = pixels.double() / 16
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, validation = order[:1280], order[1280:]
    batches: list[Tensor] = []
    for _ in range(settings.epochs):
        batches += train[torch.randperm(1280, generator=generator)].split(64)

    def make_model() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10)).double()

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return functional.cross_entropy(model(images[ids]), labels[ids], reduction="none")

    def data(ids: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = validation if ids is None else ids
        return images[rows], labels[rows]

    return Workload(
        name,
        make_model,
        lambda model: _digits_optimizer(settings, model),
        batches,
        lambda step: _digits_rate(settings, step, len(batches)),
        losses,
        validation,
        draw_removals(len(batches), 64, removals, generator),
        data,
    )


def draw_removals(
    steps: int, batch_size: int, count: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Draw steps, and a place in the batch of each."""
    step_numbers = torch.randint(steps, (count,), generator=generator)
    places = torch.randint(batch_size, (count,), generator=generator)
    return list(zip(step_numbers.tolist(), places.tolist(), strict=True))


def _digits_optimizer(settings: DigitsSettings, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), settings.lr)
    return torch.optim.AdamW(model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0.01)


def _digits_rate(settings: DigitsSettings, step: int, steps: int) -> float:
    """The learning rate of a step: constant for SGD, else a warm-up and a cosine to a tenth."""
    if settings.optimizer == "sgd":
        return settings.lr
    warmup = steps // 10
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (steps - warmup))
    return settings.lr * (0.1 + 0.9 * (1 + cosine) / 2)


def _copy_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict()
    slots = {
        number: {k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()}
        for number, slot in state["state"].items()
    }
    return weights, {"state": slots, "param_groups": state["param_groups"]}


def _load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    weights, slots = state
    model.load_state_dict(weights)
    # A copy, because the optimizer would change the tensors that it is given.
    optimizer.load_state_dict(copy.deepcopy(slots))
