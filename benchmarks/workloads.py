"""The workloads of DESIGN section 7: small enough that the truth can be had by retraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from secateur.influence.recorder import Recorder


@dataclass
class Workload:
    """A training run that can be repeated with one sample left out of one step.

    Attributes:
        batches: ids of the samples of each step.
        rate: learning rate of each step.
        losses: one loss a sample, from the model and sample ids.
        target: mean loss on the validation set.
        target_losses: one loss a validation sample.
        data: inputs and labels of some samples, or of the validation set if None.
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batches: list[Tensor]
    rate: Callable[[int], float]
    losses: Callable[[nn.Module, Tensor], Tensor]
    target_losses: Callable[[nn.Module], Tensor]
    removals: list[tuple[int, int]]
    data: Callable[[Tensor | None], tuple[Tensor, Tensor]]

    def train(
        self,
        recorder: Callable[[nn.Module, torch.optim.Optimizer], Recorder] | None = None,
        before: Callable[[int, nn.Module, Recorder], None] | None = None,
    ) -> Trained:
        """Trains to the end, keeping every state; recorded where `recorder` makes one, calling `before` each step."""
        model = self.model()
        optimizer = self.optimizer(model)
        recording = recorder(model, optimizer) if recorder else None
        states = []
        for step in range(len(self.batches)):
            states.append(_copy(model, optimizer))
            if recording and before:
                before(step, model, recording)
            self.step(model, optimizer, step, None, recording)
        return Trained(model, optimizer, states, recording)

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        without: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """One step, perhaps without one place of its batch; the others keep their weight."""
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

    def truth(self, trained: Trained) -> Tensor:
        """What leaving each of `removals` out did to the target's loss at the end, by retraining from its step."""
        base = float(self.target_losses(trained.model).detach().mean())
        changes = []
        for step, place in self.removals:
            model, optimizer = self.model(), None
            optimizer = self.optimizer(model)
            _restore(model, optimizer, trained.states[step])
            for later in range(step, len(self.batches)):
                self.step(model, optimizer, later, place if later == step else None)
            with torch.no_grad():
                changes.append(float(self.target_losses(model).mean()) - base)
        return torch.tensor(changes, dtype=torch.float64)


@dataclass
class Trained:
    """A finished run, its state before every step, and the recorder that watched."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    states: list[tuple[dict[str, Tensor], dict[str, object]]]
    recorder: Recorder | None


def digits(name: str, seed: int, removals: int = 150) -> Workload:
    """Workloads A to D: scikit-learn digits, MLP 64-32-10 GELU, batches of 64, float64; `A-relu` and so on with kinks."""
    settings = {
        "A": ("sgd", 0.05, 3),
        "B": ("sgd", 0.3, 3),
        "C": ("adamw", 0.002, 3),
        "D": ("adamw", 0.01, 6),
    }
    kind, lr, epochs = settings[name[0]]
    activation = nn.ReLU if name.endswith("-relu") else nn.GELU
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.double() / 16
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, validation = order[:1280], order[1280:]
    batches = [
        b for _ in range(epochs) for b in train[torch.randperm(1280, generator=generator)].split(64)
    ]
    steps = len(batches)

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10)).double()

    def optimizer(made: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(made.parameters(), lr)
        return torch.optim.AdamW(made.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        if kind == "sgd":
            return lr
        warm = steps // 10
        if step < warm:
            return lr * (step + 1) / warm
        return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2)

    def losses(made: nn.Module, ids: Tensor) -> Tensor:
        return functional.cross_entropy(made(images[ids]), labels[ids], reduction="none")

    chosen = torch.stack(
        [
            torch.randint(steps, (removals,), generator=generator),
            torch.randint(64, (removals,), generator=generator),
        ],
        1,
    )
    places = [(int(step), int(place)) for step, place in chosen]

    def data(ids: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = validation if ids is None else ids
        return images[rows], labels[rows]

    return Workload(
        name,
        model,
        optimizer,
        batches,
        rate,
        losses,
        lambda made: losses(made, validation),
        places,
        data,
    )


def _copy(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, object]]:
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = optimizer.state_dict()
    slots = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()}
        for i, s in state["state"].items()
    }
    return weights, {"state": slots, "param_groups": state["param_groups"]}


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: tuple[dict[str, Tensor], dict[str, object]],
) -> None:
    model.load_state_dict(state[0])
    optimizer.load_state_dict(copy.deepcopy(state[1]))  # it would train on the tensors given
