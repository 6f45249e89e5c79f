"""The memory of a plan's passes through its model, counted on shapes without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit
from secateur.influence.bindings import Binding, Bindings
from secateur.influence.capture.site_hooks import Sink
from secateur.influence.captures import Capture, LookupCapture
from secateur.influence.coordinate_basis import CoordinateBasis, share_coefficients
from secateur.influence.directional_derivatives import LossPart, differentiate_forward, run_pass
from secateur.influence.hooks import ContributionSum, capture_hooks
from secateur.influence.kronecker_basis import KroneckerBasis
from secateur.influence.memory_meter import measure_peak, shape_mode
from secateur.influence.vector_products import PRODUCTS_AT_ONCE, ComputeMatrices
from secateur.storage.shards import Samples
from secateur.tasks.data.collate import Tensors, collate
from secateur.tasks.data.take_samples import DOCUMENTS, take_samples
from secateur.tasks.plan import CoordinateBasisConfig, KroneckerBasisConfig, Plan
from secateur.tasks.run import LearningTask, Run
from secateur.tasks.training.distribution import outermost_layers
from secateur.tasks.training.loop import eval_mode, precision
from secateur.tasks.training.pass_size import largest_rows

# Samples whose passes exist together while it is found where to capture: two, and three.
LOCATED = 5


class PassMemory:
    """Counts what the passes of a plan take, with the largest samples that there are.

    Attributes:
        model: the plan's model. It has shapes and no data, unless its factory needs data.
        bindings: its captured layers.
        extrapolated: why passes were run with data, on one and two samples; None if they were not.
    """

    def __init__(self, run: Run) -> None:
        self.extrapolated: str | None = None
        self._run = run
        self.task: LearningTask = run.task()
        self._mode = shape_mode()
        try:
            with self._mode:
                self.model = run.bare_model()
                _move(self.model, run.plan)
        except Exception as error:  # the model's own code may need values, in any way
            self._use_data(error)
        self.bindings: Bindings = run.bindings(self.model)

    def training(self, samples: Samples, count: int, repeat: bool, parts: int = 1) -> int:
        """A recorded pass of training with its gradients.

        Args:
            repeat: whether another pass follows whose gradients are added.
            parts: into how many parts the gradients of layers are divided as soon as they are
                there, as by FSDP2.
        """
        basis = self._basis()

        def run(batch: Tensors, size: int) -> None:
            like = next(iter(self.bindings.parameters().values()))
            with _divided_gradients(self.model, parts):
                for _ in range(2 if repeat else 1):
                    total = ContributionSum(basis, size, like)
                    with capture_hooks(self.bindings, total, size, total.watch, _documents(batch)):
                        self._backward(batch)

        return self._measure(run, samples, count)

    def fit(self, samples: Samples, count: int) -> int:
        """A pass of the fit of the basis, with its gradients and the fit's sums."""
        config = self._run.plan.basis_config
        fit: EnergyFit | MomentFit = EnergyFit(self.bindings)
        if isinstance(config, KroneckerBasisConfig):
            fit = MomentFit(self.bindings, config.rank)

        def run(batch: Tensors, size: int) -> None:
            add = _without_values(fit.add)
            with capture_hooks(self.bindings, add, size, documents=_documents(batch)):
                self._backward(batch)

        return fit.nbytes + self._measure(run, samples, count)

    def target(self, samples: Samples, count: int) -> int:
        """A pass of the gradients of target samples."""
        basis = self._basis()

        def run(batch: Tensors, size: int) -> None:
            total = ContributionSum(basis, size, next(iter(self.bindings.parameters().values())))
            with eval_mode(self.model), capture_hooks(self.bindings, total, size) as hooks:
                losses = self._losses(batch)
                torch.autograd.grad(losses.sum(), hooks.outputs, allow_unused=True)

        return self._measure(run, samples, count)

    def mean_gradient(self, samples: Samples, count: int) -> int:
        """A pass of the gradient of a target's mean loss, in all parameters."""

        def run(batch: Tensors, size: int) -> None:
            with eval_mode(self.model):
                losses = self._losses(batch)
            torch.autograd.grad(losses.sum(), list(self._trained().values()), allow_unused=True)

        return self._measure(run, samples, count)

    def replay(self, samples: Samples, count: int) -> int:
        """The passes of one step of replay, with the gradients that they return."""

        def run(batch: Tensors, size: int) -> None:
            losses = partial(_model_losses, self.task, batch)
            parts = [LossPart(losses, torch.full((size,), 1 / size, dtype=torch.float64))]
            if self._run.plan.replay.method == "jvp":
                direction = {n: torch.empty_like(p) for n, p in self._trained().items()}
                differentiate_forward(self.model, parts, direction, lambda: None)
            else:
                kept = run_pass(self.model, parts, self._trained())
                run_pass(self.model, parts, self._trained())
                del kept

        return self._measure(run, samples, count)

    def matrices(
        self, compute: ComputeMatrices, samples: Samples, count: int, spans: list[int]
    ) -> int:
        """The vector products of the curvature that are made at one time, in the widest span."""
        basis = self._basis()
        # The products before stay until the next ones are there.
        repeat = 2 if sum(-(-span // PRODUCTS_AT_ONCE) for span in spans) > 1 else 1

        def run(products: int, batch: Tensors, size: int) -> None:
            losses = [lambda: self._losses(batch).mean()]
            compute(losses, self.model, basis, [slice(0, products)] * repeat)

        one = self._measure(partial(run, 1), samples, count)
        products = min(max(spans), PRODUCTS_AT_ONCE)
        if products == 1:
            return one
        # Each further product takes as much as the second.
        return one + (products - 1) * (self._measure(partial(run, 2), samples, count) - one)

    def _measure(self, run: Callable[[Tensors, int], None], samples: Samples, count: int) -> int:
        """The bytes of a pass with the `count` samples of the most bytes, the batch included."""
        rows = largest_rows(samples, torch.arange(len(samples)))
        if self.extrapolated is None:
            try:
                return self._count(run, samples, rows[:count])
            except Exception as error:  # a model or task that needs values fails in its own way
                self._use_data(error)
                batch = collate(self.task, samples, rows[:3], self._run.plan.device)
                self._locate(batch, len(rows[:3]))
        self._count(run, samples, rows[:1])  # what the first pass caches is no part of a pass
        one = self._count(run, samples, rows[:1])
        if count == 1:
            return one
        return one + (count - 1) * (self._count(run, samples, rows[:2]) - one)

    def _count(self, run: Callable[[Tensors, int], None], samples: Samples, rows: Tensor) -> int:
        batch = collate(self.task, samples, rows, "cpu")
        size = sum(tensor.nbytes for tensor in batch.values())
        device = self._run.plan.device
        with self._shapes():
            if self.extrapolated is None:
                batch = {name: self._mode.from_tensor(tensor) for name, tensor in batch.items()}
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            peak = measure_peak(lambda: run(batch, len(rows)))
        for parameter in self.model.parameters():
            parameter.grad = None
        return size + peak

    def _locate(self, batch: Tensors, count: int) -> None:
        def losses_of(rows: Tensor) -> Tensor:
            return self._losses(take_samples(batch, rows))

        self.bindings.locate(losses_of, count)

    def _use_data(self, error: Exception) -> None:
        self.extrapolated = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.model = self._run.model()
        self.bindings = self._run.bindings(self.model)

    def _shapes(self) -> AbstractContextManager[object]:
        return nullcontext() if self.extrapolated else self._mode

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _losses(self, batch: Tensors) -> Tensor:
        with precision(self._run.plan):
            return self.task.losses(self.model, batch)

    def _backward(self, batch: Tensors) -> None:
        losses = self._losses(batch)
        weights = torch.full(losses.shape, 1 / len(losses), dtype=torch.float64)
        (losses * weights.to(losses)).sum().backward()

    def _basis(self) -> Basis:
        """A basis of the plan's size. In which blocks its entries are hardly matters for a pass."""
        config = self._run.plan.basis_config
        blocks = self.bindings.blocks
        if isinstance(config, CoordinateBasisConfig):
            sizes = share_coefficients([block.size for block in blocks], config.numbers)
            basis = CoordinateBasis(blocks, [torch.arange(size) for size in sizes])
            for site in self.bindings.sites:
                for binding in site.bindings:
                    basis.find_entries(binding)
            for number, block in enumerate(blocks):
                basis.find_piece_entries(number, [piece.columns for piece in block.pieces])
            return basis
        dtype = getattr(torch, self._run.plan.number_type)
        sides = [(block.rows, block.cols) for block in blocks]
        factors = [
            (torch.zeros(r, min(config.rank, r), dtype=dtype), torch.zeros(c, min(config.rank, c)))
            for r, c in sides
        ]
        return KroneckerBasis(blocks, [(out, inner.to(dtype)) for out, inner in factors])


def coefficients_per_block(plan: Plan, bindings: Bindings) -> list[int]:
    """Return how many coefficients the plan's basis has in each block.

    Coordinates are chosen when the basis is fitted. So this is the division among blocks that takes
    most memory: as many as possible are in the largest blocks.
    """
    config = plan.basis_config
    blocks = bindings.blocks
    if not isinstance(config, CoordinateBasisConfig):
        return [min(config.rank, b.rows) * min(config.rank, b.cols) for b in blocks]
    rest = sum(b.size for b in blocks)
    if config.numbers is not None:
        rest = min(rest, max(config.numbers, len(blocks)))
    rest -= len(blocks)
    shares = [1] * len(blocks)
    for number in sorted(range(len(blocks)), key=lambda n: -blocks[n].size):
        added = min(blocks[number].size - 1, rest)
        shares[number] += added
        rest -= added
    return shares


def most_coefficients(plan: Plan, bindings: Bindings) -> dict[str, int]:
    """Return how many coefficients each block has at most."""
    shares = coefficients_per_block(plan, bindings)
    if not isinstance(plan.basis_config, CoordinateBasisConfig):
        return {b.name: share for b, share in zip(bindings.blocks, shares, strict=True)}
    free = sum(shares) - len(shares)
    return {block.name: min(block.size, 1 + free) for block in bindings.blocks}


@dataclass(frozen=True)
class _ShapeOfLookup(LookupCapture):
    """A lookup whose energy is formed without its ids, which have no values."""

    def energy(self) -> Tensor:
        return self.right.new_zeros(self.rows, self.right.shape[-1])


def _without_values(add: Sink) -> Sink:
    def sink(binding: Binding, capture: Capture) -> None:
        if isinstance(capture, LookupCapture):
            capture = _ShapeOfLookup(capture.ids, capture.right, capture.rows)
        add(binding, capture)

    return sink


@contextmanager
def _divided_gradients(model: nn.Module, parts: int) -> Iterator[None]:
    """Within the block, keep one part of the gradient of every parameter of a layer."""
    kept: dict[nn.Parameter, Tensor] = {}

    def keep_part(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        kept[parameter] = parameter.grad.flatten()[: -(-parameter.numel() // parts)].clone()
        parameter.grad = None

    layers = outermost_layers(model) if parts > 1 else []
    trained = {p for layer in layers for p in layer.parameters() if p.requires_grad}
    hooks = [parameter.register_post_accumulate_grad_hook(keep_part) for parameter in trained]
    yield
    for hook in hooks:
        hook.remove()


def _documents(batch: Tensors) -> Tensor | None:
    return batch.get(DOCUMENTS)


def _move(model: nn.Module, plan: Plan) -> None:
    """Bring a model without data to the plan's device and dtype. `Module.to` fails for it."""
    dtype = getattr(torch, plan.dtype)
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                value = parameter.detach().to(plan.device, dtype)
                moved[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, buffer.to(plan.device, kind))


def _model_losses(task: LearningTask, batch: Tensors, model: nn.Module) -> Tensor:
    return task.losses(model, batch)
