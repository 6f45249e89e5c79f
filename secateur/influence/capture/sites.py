"""Sites: the modules at whose calls contributions are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.blocks import Block, Piece
from secateur.influence.capture.layouts import assume_layout
from secateur.influence.capture.own_forward import OwnForward
from secateur.influence.layers import LayerFamily


@dataclass(frozen=True, eq=False)
class Binding:
    """The place among the blocks of what a site captures.

    Attributes:
        module_name: the site's name in the model.
        block_index: the index of the block.
        columns: the block's column for each column of the captures, or -1 if that is not captured
            here.
    """

    module_name: str
    block_index: int
    columns: Int[Tensor, " cols"]


@dataclass(frozen=True)
class CallLayout:
    """The dimension of the samples in each tensor of a call's arguments and of its outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """A module at whose calls contributions are captured.

    Attributes:
        module_name: its name in the model.
        module: the module.
        bindings: the places of what is captured: one for a layer family's block, or one per
            parameter.
        layouts: of each call in a forward pass, if a trace has found them. Without them, the
            samples are taken to lie along the first dimension of every tensor as long as the batch.
    """

    module_name: str
    module: nn.Module
    bindings: tuple[Binding, ...]
    layouts: tuple[CallLayout, ...]

    def layout(
        self, call: int, inputs: Sequence[torch.Size], outputs: Sequence[torch.Size], samples: int
    ) -> CallLayout:
        """Return the layout of a call.

        Args:
            call: its number in the forward pass.
            inputs: shapes of the tensors among its arguments.
            outputs: shapes of the tensors that it returned.
            samples: the number of samples.
        """
        if not self.layouts:
            return CallLayout(
                tuple(assume_layout(shape, samples) for shape in inputs),
                tuple(assume_layout(shape, samples) for shape in outputs),
            )
        layout = self.layouts[call % len(self.layouts)]
        if (len(layout.inputs), len(layout.outputs)) != (len(inputs), len(outputs)):
            raise SecateurError(
                f"module {self.module_name} was called with {len(inputs)} tensors and returned "
                f"{len(outputs)}, and in the first step it took {len(layout.inputs)} and returned "
                f"{len(layout.outputs)}; call it in the same way at every step"
            )
        return layout


@dataclass(frozen=True, eq=False)
class FamilySite(Site):
    """A layer of a known family.

    Attributes:
        family: the family.
        repeated: whether the layer, an embedding, is called once for all samples (positions, in
            many language models). Its argument is then repeated for each, so that their
            contributions can be separated.
    """

    family: LayerFamily
    repeated: bool = False


@dataclass(frozen=True, eq=False)
class OwnForwardSite(Site):
    """A module whose own forward is differentiated.

    Attributes:
        forward: differentiates it.
        pieces: block and piece of each parameter, in the order of the bindings.
    """

    forward: OwnForward
    pieces: tuple[tuple[Block, Piece], ...]
