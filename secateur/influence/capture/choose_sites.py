"""Choose the sites by a trace of the model: where each parameter is read, and by which samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.blocks import Block
from secateur.influence.capture.call_trace import Call, Trace, trace_calls
from secateur.influence.capture.layouts import SHARED, UNKNOWN, compare_shapes, is_in_order
from secateur.influence.capture.make_sites import Layouts, SiteMaker, default_owners
from secateur.influence.capture.repeated import can_repeat
from secateur.influence.capture.sites import CallLayout, Site
from secateur.influence.capture.unchanged import unchanged_model
from secateur.influence.layers import find_layer_family

if TYPE_CHECKING:
    from secateur.influence.bindings import LossesOf

# What is known of a module's calls.
UNSUITABLE: Layouts = ()
ONCE_FOR_ALL = CallLayout((SHARED,), (SHARED,))  # of an embedding, in all its calls
REPEATED = CallLayout((0,), (0,))  # of the same, after its argument was repeated for each sample


def find_sites(
    model: nn.Module, blocks: Sequence[Block], losses_of: LossesOf, samples: int
) -> tuple[Site, ...]:
    """Return the sites of a model's captured parameters.

    The model runs two and three samples of a batch. A tensor's dimension that grows with that is
    the one of the samples. A parameter is captured at the innermost module that
    reads it, or calls what reads it, and whose arguments and outputs have such dimensions.

    Raises:
        SecateurError: there is no such module.
    """
    maker = SiteMaker(model, blocks)
    parameters = {name: maker.parameters[name] for name in sorted(maker.captured)}
    with unchanged_model(model):
        two, three = _trace_two_and_three(model, parameters, losses_of, samples)
        chooser = _Chooser(maker, three, _call_layouts(two, three))
        for module in list(chooser.once_for_all):
            if not can_repeat(module, losses_of):
                chooser.exclude(module)
    return tuple(_sites(model, maker, chooser))


def _sites(model: nn.Module, maker: SiteMaker, chooser: _Chooser) -> list[Site]:
    readers = chooser.readers()
    unread = maker.captured - {name for names in readers.values() for name in names}
    # A parameter that no call read may be read later: the expert of a rare word. What is captured
    # around the other experts captures it too.
    for module, names in default_owners(model, maker).items():
        for name in unread.intersection(names):
            around = _modules_around(model, maker.module_names[module])
            reader = next((m for m in around if m in readers), module)
            readers.setdefault(reader, []).append(name)
    return [
        site
        for module, names in readers.items()
        for site in maker.make(
            module, names, chooser.layouts.get(module, ()), module in chooser.once_for_all
        )
    ]


def _modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """Return a module and those that hold it, from the innermost to the outermost."""
    parts = name.split(".") if name else []
    names = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [model.get_submodule(n) for n in names]


def _trace_two_and_three(
    model: nn.Module, parameters: dict[str, nn.Parameter], losses_of: LossesOf, samples: int
) -> list[Trace]:
    """Trace two and three samples.

    They are different ones, because each may send another number of its tokens to an expert. If
    others are of another length, they are the first one over and over.
    """

    def trace_up_to(last: int) -> list[Trace]:
        rows = [torch.linspace(0, last, count).round().long() for count in (2, 3)]
        return [_trace(model, parameters, losses_of, places) for places in rows]

    traces = trace_up_to(samples - 1)
    inputs = [trace.calls[0].inputs for trace in traces if trace.calls]
    if len(inputs) == 2 and UNKNOWN in map(_compare, *inputs):
        traces = trace_up_to(0)
    return traces


def _trace(
    model: nn.Module, parameters: dict[str, nn.Parameter], losses_of: LossesOf, rows: Tensor
) -> Trace:
    losses: list[Tensor] = []
    trace = trace_calls(model, parameters, lambda: losses.append(losses_of(rows)))
    _drop_unused_outputs(trace, losses[0])
    return trace


def _drop_unused_outputs(trace: Trace, losses: Tensor) -> None:
    """Detach the outputs that have no part in the losses, so that their layout does not matter."""
    outputs = [(call, i) for call in trace.calls for i in range(len(call.outputs))]
    followed = [(c, i) for c, i in outputs if c.outputs[i].requires_grad]
    tensors = [call.outputs[i] for call, i in followed]
    try:
        gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    except RuntimeError:
        return  # reentrant checkpointing does not take part in `grad`
    for (call, i), gradient in zip(followed, gradients, strict=True):
        if gradient is None:
            call.outputs[i] = call.outputs[i].detach()


def _call_layouts(two: Trace, three: Trace) -> dict[nn.Module, Layouts]:
    """Return the layouts of each module's calls; of a module that cannot be a site, none."""
    calls = [_by_module(trace) for trace in (two, three)]
    layouts: dict[nn.Module, Layouts] = {}
    for module, own in calls[1].items():
        pairs = list(zip(calls[0].get(module, []), own, strict=False))
        found = [_layout(a, b, two.is_random or three.is_random) for a, b in pairs]
        suitable = len(calls[0].get(module, [])) == len(own) and None not in found
        known = tuple(layout for layout in found if layout is not None)
        if suitable and len(set(known)) == 1:
            known = known[:1]
        layouts[module] = known if suitable else UNSUITABLE
    return layouts


def _by_module(trace: Trace) -> dict[nn.Module, list[Call]]:
    calls: dict[nn.Module, list[Call]] = {}
    for call in trace.calls:
        calls.setdefault(call.module, []).append(call)
    return calls


def _layout(two: Call, three: Call, is_random: bool) -> CallLayout | None:
    """Return a call's layout, or None if samples cannot be told apart in its tensors."""
    if len(two.inputs) != len(three.inputs) or len(two.outputs) != len(three.outputs):
        return None
    inputs = tuple(map(_compare, two.inputs, three.inputs))
    outputs = tuple(map(_compare, two.outputs, three.outputs))
    used = [dim for dim, t in zip(outputs, three.outputs, strict=True) if t.requires_grad]
    if _is_table(three.module) and inputs == outputs == (SHARED,):
        return ONCE_FOR_ALL
    if UNKNOWN in inputs or not any(dim >= 0 for dim in inputs) or any(dim < 0 for dim in used):
        return None
    # Only tensors of several places per sample are in another order within a model that is right.
    several = [
        (a, b, dim)
        for a, b, dim in zip(two.inputs, three.inputs, inputs, strict=True)
        if dim >= 0 and a.shape[dim] > 2
    ]
    if not is_random and not all(is_in_order(a, b, dim) for a, b, dim in several):
        return None
    return CallLayout(inputs, outputs)


def _compare(two: Tensor, three: Tensor) -> int:
    return compare_shapes(two.shape, three.shape)


def _is_table(module: nn.Module) -> bool:
    """Check whether a module looks up its one argument, and does nothing else."""
    return isinstance(module, nn.Embedding) and find_layer_family(module) is not None


class _Chooser:
    """Chooses which module captures each parameter.

    Attributes:
        layouts: of each module's calls.
        once_for_all: embeddings that are called once for all samples.
    """

    def __init__(self, maker: SiteMaker, trace: Trace, layouts: dict[nn.Module, Layouts]) -> None:
        self._maker = maker
        self._trace = trace
        self.layouts = layouts
        self.once_for_all = {m for m, found in layouts.items() if found == (ONCE_FOR_ALL,)}
        layouts |= dict.fromkeys(self.once_for_all, (REPEATED,))

    def exclude(self, module: nn.Module) -> None:
        """Capture nothing at a module."""
        self.layouts[module] = UNSUITABLE
        self.once_for_all.discard(module)

    def readers(self) -> dict[nn.Module, list[str]]:
        """Return the parameters that are captured at each module.

        Raises:
            SecateurError: a parameter is read where it cannot be captured.
        """
        readers: dict[nn.Module, list[str]] = {}
        for name in sorted(self._maker.captured):
            for module in self._readers_of(name):
                readers.setdefault(module, []).append(name)
        return readers

    def _readers_of(self, name: str) -> set[nn.Module]:
        if name in self._trace.outside:
            raise SecateurError(
                f"parameter {name} is read outside the model's forward, where samples cannot be "
                f"told apart; read it in the model, or list it under `uncaptured`"
            )
        calls = [call for call in self._trace.calls if name in call.reads]
        chosen = {self._choose(call, name, set()) for call in calls}
        # Where one module captures all that happens within it, those within it must not count
        # the same again.
        for call in calls:
            modules = [c.module for c in call.path()]
            inner = next(m for m in modules if m in chosen)
            around = [m for m in modules if m in chosen and m is not inner]
            if around:
                chosen = {self._choose(c, name, {inner}) for c in calls}
        return chosen

    def _choose(self, call: Call, name: str, excluded: set[nn.Module]) -> nn.Module:
        """Return the innermost suitable module around a call, or itself."""
        for around in call.path():
            module = around.module
            if module in excluded or not self.layouts.get(module, UNSUITABLE):
                continue
            if self._maker.holds(module, name):
                return module
        raise SecateurError(
            f"parameter {name} is read in {self._maker.module_names[call.module] or 'the model'}, "
            f"and no module around it takes and returns tensors with a dimension for the samples, "
            f"so their contributions cannot be told apart; list it under `uncaptured`"
        )
