r"""A field around one state: what its derivatives do to vectors."""

import abc
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

Directions = Mapping[str, Tensor]
Blocks = dict[str, Tensor]


class Linearization(abc.ABC):
    r"""f = dh/dt around one state per sample, as products with its derivatives

    .. math:: A = \frac{\partial f}{\partial h}, \qquad B = \frac{\partial f}{\partial \theta}, \qquad
              C = \frac{\partial f}{\partial u} .

    No matrix is formed. A vector may carry further dimensions in front of the batch,
    ``(*lead, *batch, ...)``: many directions at once. The parameters are those in force when it was made, by
    the field's names.

    Attributes: ``h``, the state ``(*batch, state)``.

    Source: THEORY.md 3.
    """

    h: Float[Tensor, "*batch state"]

    @abc.abstractmethod
    def jvp(self, v: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A v [state/time]."""

    @abc.abstractmethod
    def vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """The transpose: A^T a."""

    @abc.abstractmethod
    def input_jvp(self, w: Float[Tensor, "*lead channel"]) -> Float[Tensor, "*lead state"]:
        """C w."""

    @abc.abstractmethod
    def input_vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead channel"]:
        """C^T a, one per sample also where samples share an input; no channels without one."""

    @abc.abstractmethod
    def parameter_jvp(self, direction: Directions) -> Float[Tensor, "*batch state"]:
        """B v for the direction v, a dict of tensors in the shapes of some of the parameters."""

    @abc.abstractmethod
    def parameter_vjp(self, a: Float[Tensor, "*batch state"], keep: int = 0) -> Blocks:
        """B^T a by parameter name, summed over all but the last ``keep`` dimensions of the batch: with h
        ``(time, sample, state)`` and ``keep=1`` each is ``(sample, *shape)``."""


def check_vectors(what: str, x: Tensor, batch: torch.Size, size: int, lead: bool = True) -> None:
    """Raise ValueError unless ``x`` is ``(*lead, *batch, size)``."""
    wanted = (*batch, size)
    if x.shape[max(x.ndim - len(wanted), 0) :] != wanted or (x.ndim > len(wanted) and not lead):
        shown = ", ".join([*(["*lead"] if lead else []), *map(str, wanted)])
        raise ValueError(f"{what} has shape {tuple(x.shape)}; it must be ({shown})")


def check_keep(keep: int, dims: int) -> None:
    """Raise ValueError unless ``keep`` of ``dims`` batch dimensions can be kept."""
    if not 0 <= keep <= dims:
        raise ValueError(
            f"parameter_vjp(keep=...): keep is {keep}; it must be between 0 and {dims}, the number of batch "
            "dimensions of h"
        )


def check_directions(direction: Directions, parameters: Directions) -> None:
    """Raise unless every tensor of the direction has the name and the shape of a parameter."""
    for name, value in direction.items():
        if name not in parameters:
            raise KeyError(
                f"parameter_jvp(direction=...): {name!r} is no parameter of the field; it has "
                f"{', '.join(parameters) or 'none'}"
            )
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"parameter_jvp(direction=...): {name!r} has shape {tuple(value.shape)}; it must be "
                f"{tuple(parameters[name].shape)}"
            )


class AutogradLinearization(Linearization):
    """The products by reverse differentiation of the field: for fields that do not state them.

    What users write is differentiated backwards only, products with A too (twice): some of torch's operations
    have no forward derivative, or a wrong one. No sample's f may depend on another sample's state.

    Caution: torch 2.13 differentiates its layer norm wrongly a third time, and the gradient of its weight
    under vmap a second time. The products of a field with one are right, but where they are differentiated
    again those of :meth:`jvp`, and of :meth:`parameter_jvp` and :meth:`parameter_vjp` with ``keep``, are not.
    """

    def __init__(self, field: nn.Module, t: float | Tensor, h: Tensor, u: Tensor | None) -> None:
        self.h = h
        self._field = field
        self._t = t
        self._u = None if u is None else u.expand(*h.shape[:-1], u.shape[-1])
        self._parameters: Blocks = dict(field.named_parameters())

    def _of(self, t: float | Tensor, h: Tensor, u: Tensor | None, parameters: Blocks) -> Tensor:
        value: Tensor = functional_call(self._field, parameters, (t, h, u))
        return value

    def _of_state(self, h: Tensor) -> Tensor:
        return self._of(self._t, h, self._u, self._parameters)

    def _of_input(self, u: Tensor) -> Tensor:
        return self._of(self._t, self.h, u, self._parameters)

    def jvp(self, v: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A v."""
        check_vectors("jvp(v=...): v", v, self.h.shape[:-1], self.h.shape[-1])
        return _many(_push(self._of_state, self.h), v, self.h.ndim)

    def vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A^T a."""
        check_vectors("vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        _, pull, *_ = vjp(self._of_state, self.h)
        return _many(lambda weights: pull(weights)[0], a, self.h.ndim)

    def input_jvp(self, w: Float[Tensor, "*lead channel"]) -> Float[Tensor, "*lead state"]:
        """C w."""
        channels = 0 if self._u is None else self._u.shape[-1]
        check_vectors("input_jvp(w=...): w", w, self.h.shape[:-1], channels)
        if self._u is None:
            return self.h.new_zeros(*w.shape[:-1], self.h.shape[-1])
        return _many(_push(self._of_input, self._u), w, self.h.ndim)

    def input_vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead channel"]:
        """C^T a."""
        check_vectors("input_vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        if self._u is None:
            return a.new_zeros(*a.shape[:-1], 0)
        _, pull, *_ = vjp(self._of_input, self._u)
        return _many(lambda weights: pull(weights)[0], a, self.h.ndim)

    def parameter_jvp(self, direction: Directions) -> Float[Tensor, "*batch state"]:
        """B v."""
        check_directions(direction, self._parameters)
        if not direction:
            return torch.zeros_like(self.h)
        names = list(direction)

        def of(*values: Tensor) -> Tensor:
            changed = {**self._parameters, **dict(zip(names, values, strict=True))}
            return self._of(self._t, self.h, self._u, changed)

        value, pull, *_ = vjp(of, *(self._parameters[name] for name in names))
        _, push, *_ = vjp(pull, torch.zeros_like(value))
        along: Tensor = push(tuple(direction[name] for name in names))[0]
        return along

    def parameter_vjp(self, a: Float[Tensor, "*batch state"], keep: int = 0) -> Blocks:
        """B^T a by name."""
        check_vectors("parameter_vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1], lead=False)
        check_keep(keep, self.h.ndim - 1)
        if not self._parameters:
            return {}
        if keep == 0:
            return self._pull_parameters(self._t, self.h, self._u, a)
        batch = self.h.shape[:-1]
        split = len(batch) - keep
        own_times = isinstance(self._t, Tensor) and self._t.ndim > 0
        t = self._t.expand(*batch, 1) if isinstance(self._t, Tensor) and own_times else self._t

        def samples_first(x: float | Tensor | None) -> float | Tensor | None:
            if not isinstance(x, Tensor) or x.ndim == 0:
                return x
            flat = x.reshape(*batch[:split], -1, x.shape[-1])
            return flat.movedim(split, 0)

        parts = [samples_first(x) for x in (t, self.h, self._u, a)]
        in_dims = tuple(0 if isinstance(x, Tensor) and x.ndim > 0 else None for x in parts)
        rows: Blocks = vmap(self._pull_parameters, in_dims=in_dims)(*parts)  # type: ignore[arg-type]
        return {name: row.reshape(*batch[split:], *row.shape[1:]) for name, row in rows.items()}

    def _pull_parameters(self, t: float | Tensor, h: Tensor, u: Tensor | None, a: Tensor) -> Blocks:
        _, pull, *_ = vjp(lambda parameters: self._of(t, h, u, parameters), self._parameters)
        blocks: Blocks = pull(a)[0]
        return blocks


def _push(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative of a function at x as a map of tangents: the transpose of the transpose."""
    value, pull, *_ = vjp(function, x)
    _, push, *_ = vjp(lambda weights: pull(weights)[0], torch.zeros_like(value))
    return lambda tangent: push(tangent)[0]


def _many(product: Callable[[Tensor], Tensor], vectors: Tensor, ndim: int) -> Tensor:
    """A product with vectors that may carry dimensions in front of the batch."""
    if vectors.ndim <= ndim:
        return product(vectors)
    flat = vectors.reshape(-1, *vectors.shape[vectors.ndim - ndim :])
    products: Tensor = vmap(product)(flat)
    return products.reshape(*vectors.shape[:-1], products.shape[-1])
