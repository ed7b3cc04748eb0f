r"""The adjoint equation as a field of its own, along a solution that is known.

In reversed time s = -t the adjoint obeys

.. math:: \frac{da}{ds} = A(t)^\top a + \frac{\partial\ell}{\partial h}(t), \qquad t = -s,

with h(t) from the continuous extension of the forward solution. THEORY.md 13.
"""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from ctgate.dense import Extension
from ctgate.fields import Jacobian, VectorField
from ctgate.fields.base import Time
from ctgate.fields.jacobian import unit_vectors
from ctgate.kernels import Linearization
from ctgate.problem import ODEProblem

# dl/dh of a running cost at one time, as a function of the time as a field gets it and of the state.
Source = Callable[[Tensor, Tensor], Tensor]


class Along(VectorField):
    """A linear equation along a known solution: what it reads there.

    Times may carry one dimension in front of the batch, for many times at once.
    """

    autonomous = False
    broadcasts_time = True

    def __init__(self, prob: ODEProblem, path: Extension, size: int) -> None:
        super().__init__(input_size=prob.field.input_size, state_size=size)
        self.prob = prob
        self.path = path
        self._sample: tuple[int, ...] | None = None

    def of_sample(self, sample: tuple[int, ...]) -> "Along":
        """The equation along one sample's path."""
        own = copy(self)
        own._sample = sample
        return own

    def at(self, t: Time, like: Tensor) -> tuple[Time, Tensor]:
        """The forward time, and the state there, with the batch dimensions of ``like``."""
        batch = self.prob.h0.ndim - 1
        if not isinstance(t, Tensor) or t.ndim == 0:
            when = torch.as_tensor(t, dtype=torch.float64, device=like.device)
            if self._sample is not None:
                return when, self.path.of_sample(self._sample, when.reshape(1)).reshape(*(1,) * batch, -1)
            return when, self.path(when.reshape(1))[0]
        if t.ndim == batch + 1:
            return t, self.path(t.movedim(-1, 0))[0]
        shared = t.numel() == len(t) and self.path.nodes.ndim == 1
        return t, self.path(t.reshape(-1) if shared else t.squeeze(-1))

    def linearized(self, t: Time, h: Tensor, u: Tensor | None) -> Sequence[Linearization]:
        """The forward field around states (*batch, state), one linearization; or (time, *batch, state), one
        as well where the field does not read the time, else one per time."""
        if self.prob.field.autonomous or h.ndim == self.prob.h0.ndim:
            when = 0.0 if self.prob.field.autonomous else t
            return [self.prob.call("linearize", when, h, u)]
        assert isinstance(t, Tensor)
        inputs = repeat(None) if u is None else iter(u.expand(len(h), *u.shape[1:]))
        return [
            self.prob.call("linearize", single(own), state, next(inputs))
            for own, state in zip(t.unbind(0), h.unbind(0), strict=True)
        ]


class Adjoint(Along):
    """The adjoint, with a running cost as its source if there is one. State a ``(*batch, state)``."""

    def __init__(self, prob: ODEProblem, path: Extension, source: Source | None = None) -> None:
        super().__init__(prob, path, prob.h0.shape[-1])
        self.source = source

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """A^T a + dl/dh."""
        return self.pulled(t, h, u)[0]

    def pulled(self, s: Time, a: Tensor, u: Tensor | None) -> tuple[Tensor, Sequence[Linearization]]:
        """da/ds, and the field around the forward states."""
        t, h = self.at(-s, a)
        around = self.linearized(t, h, u)
        rows = [lin.vjp(row) for lin, row in _paired(around, a)]
        value = rows[0] if len(around) == 1 and rows[0].shape == a.shape else torch.stack(rows)
        if self.source is not None:
            value = value + self.sourced(t, h)
        return value, around

    def sourced(self, t: Time, h: Tensor) -> Tensor:
        """dl/dh, time by time where there are several."""
        assert self.source is not None
        if self._sample is not None:
            # A cost knows its samples by their place in the batch, so it sees all of them.
            when = torch.as_tensor(t, dtype=torch.float64, device=h.device)
            whole = self.path(when.reshape(1))[0]
            own = when.expand(*whole.shape[:-1], 1) if self.path.nodes.ndim > 1 else when
            return self.source(own, whole)[self._sample].reshape(h.shape)
        if h.ndim == self.prob.h0.ndim:
            return self.source(torch.as_tensor(t, dtype=torch.float64, device=h.device), h)
        assert isinstance(t, Tensor)
        pairs = zip(t.unbind(0), h.unbind(0), strict=True)
        return torch.stack([self.source(single(own), state) for own, state in pairs])

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """The forward rates, which the adjoint forgets by as well, and all else."""
        when, state = self.at(-t, h)
        rate, _ = self.prob.call("rate_drive", when, state, u)
        return rate, self(t, h, u) + rate * h

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """The forward Jacobian, transposed."""
        when, state = self.at(-t, h)
        jacobian: Jacobian = self.prob.call("jacobian", when, state, u)
        return Jacobian(jacobian.leak, jacobian.coupling.mT)


class AugmentedAdjoint(Adjoint):
    """The adjoint and, per sample, what has come together of the parameter integral: ``(a, q)`` with
    dq/ds = B^T a, the parameters ``names`` flattened one after the other."""

    def __init__(
        self, prob: ODEProblem, path: Extension, names: Sequence[str], source: Source | None = None
    ) -> None:
        super().__init__(prob, path, source)
        self.names = list(names)
        self.adjoint_size = prob.h0.shape[-1]
        parameters = prob.named_parameters()
        self.integral_size = sum(parameters[name].numel() for name in names)
        self.state_size = self.adjoint_size + self.integral_size

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """(A^T a + dl/dh, B^T a)."""
        a = h[..., : self.adjoint_size]
        value, around = self.pulled(t, a, u)
        rows = [lin.parameter_vjp(row, keep=row.ndim - 1) for lin, row in _paired(around, a)]
        flat = [
            torch.cat([row[name].reshape(*own.shape[:-1], -1) for name in self.names], -1)
            for row, (_, own) in zip(rows, _paired(around, a), strict=True)
        ]
        integrand = flat[0] if flat[0].shape[:-1] == value.shape[:-1] else torch.stack(flat)
        return torch.cat((value, integrand), -1)

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """The integral forgets nothing."""
        when, state = self.at(-t, h)
        rate, _ = self.prob.call("rate_drive", when, state, u)
        rate = torch.cat((rate, rate.new_zeros(*h.shape[:-1], h.shape[-1] - rate.shape[-1])), -1)
        return rate, self(t, h, u) + rate * h

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """The forward Jacobian, transposed, above B^T, which is formed whole; the integral drives nothing."""
        when, state = self.at(-t, h)
        jacobian: Jacobian = self.prob.call("jacobian", when, state, u)
        lin = self.prob.call("linearize", when, state, u)
        keep = state.ndim - 1
        blocks = vmap(lambda unit: lin.parameter_vjp(unit, keep=keep))(unit_vectors(state))
        rows = [blocks[name].reshape(*blocks[name].shape[: keep + 1], -1) for name in self.names]
        immediate = torch.cat(rows, -1).movedim(0, -1)
        left = torch.cat((jacobian.coupling.mT, immediate), -2)
        coupling = torch.cat((left, left.new_zeros(*left.shape[:-1], self.integral_size)), -1)
        leak = torch.cat((jacobian.leak, h.new_zeros(*h.shape[:-1], self.integral_size)), -1)
        return Jacobian(leak, coupling)


def _paired(around: Sequence[Linearization], a: Tensor) -> list[tuple[Linearization, Tensor]]:
    """Each linearization with the adjoints that belong to it."""
    if len(around) == 1 and around[0].h.ndim == a.ndim:
        return [(around[0], a)]
    return list(zip(around, a.unbind(0), strict=True))


def single(t: Tensor) -> Tensor:
    """One of many times as a field gets it: 0-dim where the samples share it, else a column."""
    return t.reshape(()) if t.numel() == 1 else t
