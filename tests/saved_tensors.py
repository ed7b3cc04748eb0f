"""What autograd holds on to."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved:
    """A tensor that an operation saved for its backward pass; it lives as long as the graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        # With its own graph it would keep the node that keeps it.
        self.tensor = tensor.detach()


@contextmanager
def watched() -> Iterator[Callable[[], list[Tensor]]]:
    """Watch what operations save; call the result for the tensors that are still held."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield lambda: [saved.tensor for saved in alive]
