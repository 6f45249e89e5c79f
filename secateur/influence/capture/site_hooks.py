"""The hooks on a model's sites, which capture contributions in one forward and backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from secateur.errors import SecateurError
from secateur.influence.capture.call_trace import tensors_of
from secateur.influence.capture.documents import Documents
from secateur.influence.capture.kept import KeptTensors
from secateur.influence.capture.layouts import move_samples_first, wrong_batch
from secateur.influence.capture.own_call import OwnCall
from secateur.influence.capture.own_forward import OutputGradient
from secateur.influence.capture.repeated import repeat_argument
from secateur.influence.capture.sites import (
    Binding,
    CallLayout,
    FamilySite,
    OwnForwardSite,
    Site,
)
from secateur.influence.captures import HALF_TYPES, Capture, DenseCapture, widen

_TENSOR = object()  # stands in the place of an argument that is a tensor

Sink = Callable[[Binding, Capture], None]
Watch = Callable[[Tensor], None]


class SiteHooks:
    """The hooks on sites, for one forward and backward pass.

    Attributes:
        outputs: the edge of each call's outputs in the autograd graph. Differentiating with respect
            to these alone calls every sink, and forms no weight's gradient.
        shapes: shapes of the arguments of each site's first call.
        unfollowed: whether a site was called without autograd, as reentrant checkpointing does.
        half: whether a gradient or a weight was in half precision, or autocast was on.

    Args:
        sink: gets each binding and capture.
        watch: called before `sink` with the gradient with respect to a site's output, samples
            first. The last layer's comes first.
        samples: the number of samples.
        documents: where they stand in the rows of the batch, if several share a row.
    """

    def __init__(
        self, sink: Sink, watch: Watch | None, samples: int, documents: Documents | None
    ) -> None:
        self.outputs: list[GradientEdge] = []
        self.shapes: dict[str, list[torch.Size]] = {}
        self.unfollowed = False
        self.half = False
        self._sink = sink
        self._watch = watch
        self._samples = samples
        self._documents = documents
        self._calls: Counter[Site] = Counter()
        # A site's own forward is run again to differentiate it. All hooks rest meanwhile.
        self._resting = False

    def install(self, site: Site, handles: ExitStack) -> None:
        """Put the hooks of a site on its module, and their removal on `handles`."""
        if isinstance(site, FamilySite):
            self._install_family(site, handles)
        elif isinstance(site, OwnForwardSite):
            self._install_own_forward(site, handles)

    def _install_family(self, site: FamilySite, handles: ExitStack) -> None:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self.unfollowed |= not torch.is_grad_enabled()
            if self._resting or not output.requires_grad:
                return output
            inputs = args or tuple(kwargs.values())
            given = tensors_of(inputs)
            output = output if _can_follow(output, given) else output.clone()
            layout = self._layout(site, [x.shape for x in given], [output])
            dims = layout.inputs
            kept = KeptTensors(_in_computed_precision(given, site))
            # The hook below must not hold the tensors themselves: checkpointing drops them.
            others = [_TENSOR if isinstance(x, Tensor) else x for x in inputs]

            def capture(gradient: Tensor) -> None:
                rows = self._see(site, gradient, layout.outputs[0])
                moved = iter(self._arrange(site, kept.take(last=True), dims))
                arguments = tuple(next(moved) if x is _TENSOR else x for x in others)
                found = site.family.capture(module, arguments, rows)
                if found.batch != self._samples:
                    found = found.fold(self._samples)
                for binding in site.bindings:
                    self._sink(binding, found)

            self._listen(output, capture)
            return output

        # Without a trace it is not known, but a batch of one that is not one is a sure sign.
        unknown = isinstance(site.module, nn.Embedding) and not site.layouts and self._samples > 1
        if site.repeated or unknown:
            repeat = repeat_argument(
                site.module, self._samples, not site.repeated, lambda: self._resting
            )
            handles.callback(repeat.remove)
        handles.callback(site.module.register_forward_hook(after, with_kwargs=True).remove)

    def _install_own_forward(self, site: OwnForwardSite, handles: ExitStack) -> None:
        open_calls: list[OwnCall] = []

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not self._resting:
                open_calls.append(OwnCall.begin(module, (args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if self._resting:
                return output
            self.unfollowed |= not torch.is_grad_enabled()
            call = open_calls.pop()
            call.end()
            output = _keep_apart(output)
            outputs = tensors_of(output)
            layout = self._layout(site, call.shapes, outputs)
            for number, tensor in enumerate(outputs):
                if tensor.requires_grad:
                    self._listen(tensor, self._own_capture(site, call, layout, number))
            return output

        module = site.module
        handles.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        handles.callback(module.register_forward_hook(after).remove)

    def _own_capture(
        self, site: OwnForwardSite, call: OwnCall, layout: CallLayout, output: int
    ) -> Callable[[Tensor], None]:
        def capture(gradient: Tensor) -> None:
            dim = layout.outputs[output]
            rows = self._see(site, gradient, dim)
            if self._documents is not None:
                gradient, dim = rows, 0
            received = OutputGradient(output, gradient, dim, self._samples)
            tensors = call.kept.take()
            dims = layout.inputs
            if self._documents is not None:
                if call.is_random:
                    raise SecateurError(
                        f"module {site.module_name} draws random numbers, and several documents "
                        f"share a row, so its forward cannot be repeated for each; switch off its "
                        f"dropout, or train on one document per row"
                    )
                tensors = self._arrange(site, tensors, dims)
                dims = tuple(min(dim, 0) for dim in dims)
            # Not earlier, because taking the tensors may recompute activations, hooks included.
            self._resting = True
            try:
                for first, gradients in site.forward.gradients(call, tensors, dims, received):
                    self._sink_gradients(site, first, gradients)
            finally:
                self._resting = False

        return capture

    def _sink_gradients(self, site: OwnForwardSite, first: int, gradients: list[Tensor]) -> None:
        own = zip(site.bindings, site.pieces, gradients, strict=True)
        for binding, (block, piece), values in own:
            stored = values.transpose(1, 2) if piece.transposed else values
            matrix = widen(stored).reshape(len(values), block.rows, piece.columns)
            self._sink(binding, DenseCapture(matrix, first))

    def _layout(self, site: Site, inputs: list[torch.Size], outputs: list[Tensor]) -> CallLayout:
        self.shapes.setdefault(site.module_name, inputs)
        self.half |= any(torch.is_autocast_enabled(x.device.type) for x in outputs[:1])
        number = self._calls[site]
        self._calls[site] += 1
        return site.layout(number, inputs, [tensor.shape for tensor in outputs], self._samples)

    def _listen(self, output: Tensor, capture: Callable[[Tensor], None]) -> None:
        """Call `capture` with the gradient with respect to an output, when it is known."""
        shape = output.shape

        def backward_hook(gradient: Tensor) -> None:
            with torch.no_grad():
                capture(gradient.reshape(shape))

        # What changes a view in place replaces its node in the graph, and leaves its base's.
        base = output._base
        followed = base if base is not None and _is_same_data(base, output) else output
        followed.register_hook(backward_hook)
        # A graph that checkpointing builds within the backward pass must not be held.
        if torch._C._current_graph_task_id() == -1:
            # The edge is taken now, because an activation may overwrite the output in place.
            self.outputs.append(get_gradient_edge(followed))

    def _arrange(self, site: Site, tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """Return a call's arguments with the samples first."""
        moved = []
        for tensor, dim in zip(tensors, dims, strict=True):
            rows = tensor if dim < 0 else move_samples_first(tensor, dim)
            if self._documents is not None and dim >= 0:
                rows = self._documents.gather(rows, site.module_name)
            moved.append(rows)
        return moved

    def _see(self, site: Site, gradient: Tensor, dim: int) -> Tensor:
        """Return an output's gradient with the samples first.

        Raises:
            SecateurError: it has no dimension of the samples, or another number of them.
        """
        self.half |= gradient.dtype in HALF_TYPES
        rows = move_samples_first(gradient, max(dim, 0))
        if self._documents is not None and dim >= 0:
            rows = self._documents.gather_gradient(rows, site.module_name)
        length = len(rows) if rows.dim() else 1
        if dim < 0 or length % self._samples or (not site.layouts and length != self._samples):
            raise wrong_batch(site.module_name, length, self._samples)
        if self._watch is not None:
            self._watch(rows)
        return rows


def _is_same_data(base: Tensor, view: Tensor) -> bool:
    """Check whether a view has all of its base's entries, in the same order."""
    whole = base.is_contiguous() and view.is_contiguous()
    return whole and base.numel() == view.numel() and base.requires_grad


def _in_computed_precision(inputs: list[Tensor], site: FamilySite) -> list[Tensor]:
    """Return a layer's inputs as autocast casts them, which is less to keep, and what is used."""
    device = inputs[0].device.type
    if not site.family.autocasts or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def _can_follow(output: Tensor, inputs: list[Tensor]) -> bool:
    """Check whether an output is no view, or only another shape of a tensor made in the call.

    A linear map of three dimensions returns such a view.
    """
    base = output._base
    if base is None:
        return True
    is_input = any(base is x or base is x._base for x in inputs)
    reshaped = base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel()
    return reshaped and base.requires_grad and not is_input


def _keep_apart(output: Any) -> Any:
    """Return what a call returned, with copies of its tensors if that is needed to follow them.

    If several are differentiated, one may be computed from another, as a router's scores are from
    its logits, or be the same. The gradient with respect to a copy holds nothing that comes through
    another. And what changes a view in place takes it out of the graph.
    """
    followed = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    if len(followed) < 2 and all(tensor._base is None for tensor in followed):
        return output
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
