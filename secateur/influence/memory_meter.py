"""Count the memory of the tensors that a computation makes, and run it without making them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within its block, forward and backward.

    Every operation is seen, so activations, gradients and temporary tensors all count. What a
    kernel allocates for itself does not. The count depends on shapes only, so it is the same on
    every machine, and for tensors without data (see `shape_mode`).

    Attributes:
        current: bytes of the tensors made within the block that still exist.
        peak: the largest value of `current`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.current = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {id(storage): storage for storage in _storages(result)}
        if not made.keys() <= self._alive.keys():
            # An output may be a view of an input, which is no new memory.
            given = {id(storage) for storage in _storages((args, kwargs))}
            for key, storage in made.items():
                if key not in given and key not in self._alive:
                    self._add(key, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._release, key, size))
        self.current += size
        self.peak = max(self.peak, self.current)

    def _release(self, key: int, size: int, _: object) -> None:
        self._alive.pop(key, None)
        self.current -= size


def measure_peak(run: Callable[[], object]) -> int:
    """Return the bytes that a function's tensors take at most, at one time."""
    meter = MemoryMeter()
    with meter:
        run()
    return meter.peak


def shape_mode() -> FakeTensorMode:
    """Return a context in which tensors have shapes and no data.

    A model built within the block takes no memory, and its passes take none either. The context may
    be entered again, and its `from_tensor` returns a tensor's shape without the data. Operations
    whose shapes depend on values (`nonzero`, `item`) raise an error.
    """
    # Imported late, because it takes a second.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
