r"""What a vector field has to say: the rate at which a state forgets, and what drives it."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from ctgate.fields.jacobian import Jacobian, pullback, unit_vectors
from ctgate.kernels import AutogradLinearization, Linearization
from ctgate.kernels.fused import FusedCell, Stretch, unroll

# One time, or a column with one time per sample.
Time = float | Float[Tensor, ""] | Float[Tensor, "*#batch 1"]
Gates = dict[str, Float[Tensor, "*batch _"]]

# What dh/dt is made of, here and in the cells, and what a class may state about its derivatives.
_EQUATION = ("rate_drive", "forward", "tau", "tau_z", "tau_r", "candidate", "project_input")
_DERIVATIVES = ("jacobian", "input_jacobian", "linearize", "fused_cell")


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` expands to ``target`` without enlarging it."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(size in (1, wanted) for size, wanted in zip(shape, tail, strict=True))


class VectorField(nn.Module, abc.ABC):
    r"""An ordinary differential equation in gated form,

    .. math:: \frac{dh}{dt} = -\mathrm{rate}(t, h, u) \odot h + \mathrm{drive}(t, h, u).

    ``rate`` [1/time] is the inverse time constant of every unit and ``drive`` [state/time] what moves it.
    The pair stays finite when a gate closes (rate 0 is a perfect integrator), it gives an exponential
    integrator its exponent, and one Euler step of size ``tau`` is the discrete gated cell.

    A subclass defines :meth:`rate_drive`, without in-place operations and without branches on values, so
    that ``torch.func`` and ``torch.compile`` work on it. The tensors it uses belong among its parameters and
    buffers. A class that changes ``rate_drive``, or what it is made of, does not inherit the analytic
    derivatives of its parent: unless it states its own, :meth:`jacobian`, :meth:`input_jacobian` and
    :meth:`linearize` are automatic.

    Attributes:
        input_size: number of input channels; None when any number is accepted.
        state_size: number of state variables; None when any number is accepted.
        autonomous: True when ``t`` is not used and ``h``, ``u`` may carry extra leading dimensions, so that a
            whole trajectory can be evaluated in one call.
        broadcasts_time: True when ``t`` may be a tensor that broadcasts against states with extra leading
            dimensions: a field that reads the time, evaluated on a whole trajectory in one call.
        gate_names: the keys of :meth:`gates`.

    Source: THEORY.md 1 and 7; the reading of gates as inverse time constants follows C. Tallec and Y.
    Ollivier, arXiv 1804.11188.
    """

    input_size: int | None
    state_size: int | None
    autonomous: bool = True
    broadcasts_time: bool = False
    gate_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        level = {name: k for k in reversed(range(len(cls.__mro__))) for name in vars(cls.__mro__[k])}
        changed = min(level[name] for name in _EQUATION if name in level)
        for name in _DERIVATIVES:
            if level[name] > changed and getattr(cls, name) is not getattr(VectorField, name):
                setattr(cls, name, getattr(VectorField, name))

    def __init__(self, *, input_size: int | None, state_size: int | None) -> None:
        super().__init__()
        for name, size, least in (("input_size", input_size, 0), ("state_size", state_size, 1)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < least):
                raise ValueError(
                    f"{type(self).__name__}({name}=...): {name} is {size!r}; it must be an integer >= {least}"
                )
        self.input_size = input_size
        self.state_size = state_size

    @property
    def components(self) -> dict[str, slice]:
        """Where each named part of the state lies in its last dimension."""
        return {"hidden": slice(0, self.state_size)}

    @property
    def output(self) -> slice:
        """Where the hidden state lies that a readout or a next layer sees."""
        return self.components["hidden"]

    @property
    def tau(self) -> Tensor | None:
        """The time unit of the output [time], a scalar or one value per unit; None if there is none."""
        return None

    @abc.abstractmethod
    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """The pair (rate [1/time], drive [state/time]) at time ``t``, state ``h`` and input ``u``.

        Both have the shape and dtype of ``h``. The batch dimensions of ``u`` may broadcast to those of ``h``.

        Raises:
            ValueError: a trailing size of ``h`` or ``u`` that does not fit, or ``u`` missing.
            TypeError: ``h`` or ``u`` of another dtype than the parameters.
        """

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """dh/dt = drive - rate * h [state/time]."""
        rate, drive = self.rate_drive(t, h, u)
        return drive - rate * h

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """Every gate by its name, ``(*batch, hidden)``, dimensionless unless its class says otherwise."""
        return {}

    def time_constants(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """1 / rate [time]; infinite where a gate is closed."""
        return self.rate_drive(t, h, u)[0].reciprocal()

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        r"""d(dh/dt)/dh, split into the rate and all else: :func:`ctgate.jacobian` without its checks.

        A field that does not define it gets it from :meth:`rate_drive` by reverse differentiation, all rows
        :math:`\partial_j \mathrm{drive}_i - h_i \partial_j \mathrm{rate}_i` at once. No sample's result may
        then depend on another sample's state.

        Source: THEORY.md 3.
        """
        (rate, _), pull = pullback(lambda x: self.rate_drive(t, x, u), h)
        rows: Tensor = vmap(lambda unit: pull((-h * unit, unit)))(unit_vectors(h))
        return Jacobian(rate, rows.movedim(0, -2))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """d(dh/dt)/du [state/time per unit of input], one row per state variable; no columns without u.

        A field that does not define it gets it by reverse differentiation, as :meth:`jacobian`.

        Source: THEORY.md 3.
        """
        if u is None:
            self.check_arguments(h, u)
            return h.new_zeros(*h.shape, 0)
        own = u.expand(*h.shape[:-1], u.shape[-1])
        _, pull = pullback(lambda v: self.forward(t, h, v), own)
        rows: Tensor = vmap(pull)(unit_vectors(h))
        return rows.movedim(0, -2)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The products of this field's derivatives by state, input and parameters with vectors, at one state.

        A field that does not state them is differentiated in reverse; no sample's result may then depend on
        another sample's state.

        Source: THEORY.md 3.
        """
        self.check_arguments(h, u)
        return AutogradLinearization(self, t, h, u)

    @property
    def fused_cell(self) -> type[FusedCell] | None:
        """The class of what :meth:`fuse` makes, None where there is nothing that states this equation."""
        return None

    @property
    def fusable(self) -> bool:
        """Whether :meth:`fuse` can be called."""
        return False

    def fuse(self, parameters: Mapping[str, Tensor]) -> FusedCell:
        """This field's evaluations and derivatives on buffers, for loops over many steps, with these
        parameters, all of them, in place of its own.

        Source: THEORY.md 19.
        """
        raise NotImplementedError(f"{type(self).__name__} is not fusable")

    @property
    def unrolls(self) -> bool:
        """Whether :meth:`unroll` can be called."""
        return self.fusable

    def unroll(
        self,
        stretch: Stretch,
        us: Tensor | None,
        h0: Tensor,
        dts: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """The states of many steps, (step + 1, sample, state), as :func:`ctgate.kernels.fused.unroll` has
        them; a field whose state is more than that of a cell has a loop of its own."""
        return unroll(stretch, us, h0, dts, parameters)

    def of_sample(self, sample: tuple[int, ...]) -> "VectorField":
        """This field as one sample of the batch sees it, alone: itself, unless it holds something of each
        sample."""
        return self

    def initial_state(self, batch_shape: Sequence[int] = ()) -> Float[Tensor, "*batch state"]:
        """Zeros of shape ``(*batch_shape, state)`` in the dtype and on the device of the parameters.

        Raises:
            ValueError: the field has no ``state_size``.
        """
        if self.state_size is None:
            raise ValueError(
                f"{type(self).__name__}.initial_state: state_size is None; construct the field with "
                "state_size=, or pass your own h0"
            )
        like = next(self.parameters(), None)
        return torch.zeros(
            (*batch_shape, self.state_size),
            dtype=None if like is None else like.dtype,
            device=None if like is None else like.device,
        )

    def check_arguments(self, h: Tensor, u: Tensor | None) -> None:
        """Raise ValueError when the sizes of ``h`` or ``u`` are not this field's; looks at shapes only."""
        name = type(self).__name__
        if h.ndim == 0 or (self.state_size is not None and h.shape[-1] != self.state_size):
            raise ValueError(
                f"{name}: h has shape {tuple(h.shape)}; its last dimension must be "
                f"state_size = {self.state_size} ({', '.join(self.components)})"
            )
        if u is None:
            if self.input_size:
                raise ValueError(
                    f"{name}: u is None; the field has input_size = {self.input_size}, so u must be a tensor "
                    f"(*batch, {self.input_size})"
                )
            return
        if u.ndim == 0 or (self.input_size is not None and u.shape[-1] != self.input_size):
            raise ValueError(
                f"{name}: u has shape {tuple(u.shape)}; its last dimension must be "
                f"input_size = {self.input_size}"
            )
        if u.shape[:-1] != h.shape[:-1] and not broadcasts_to(u.shape[:-1], h.shape[:-1]):
            raise ValueError(
                f"{name}: u has batch shape {tuple(u.shape[:-1])}, which does not broadcast to the batch "
                f"shape {tuple(h.shape[:-1])} of h"
            )


def jacobian(
    field: VectorField,
    t: Time,
    h: Float[Tensor, "*batch state"],
    u: Float[Tensor, "*#batch channel"] | None = None,
) -> Jacobian:
    r"""The Jacobian of the flow,

    .. math:: A = \frac{\partial (dh/dt)}{\partial h} = -D_{\mathrm{leak}} + \mathrm{coupling} .

    Analytic for the gated fields and for a :class:`ctgate.Stack` of them. :class:`ctgate.Field` and fields of
    one's own are differentiated in reverse, all rows at once: there no sample's dh/dt may depend on another
    sample's state, and a ``Field`` leaks nothing, so all of A is coupling. The result is made of
    differentiable operations, and ``torch.func`` passes through it.

    Parameters:
        field: a :class:`ctgate.VectorField`.
        t: the time [time], a float or a 0-dim tensor, or a column ``(*batch, 1)``.
        h: states, ``(*batch, state)``.
        u: inputs, ``(*batch, channel)``, the batch broadcasting to that of h; None without input.

    Returns: :class:`Jacobian`, leak ``(*batch, state)`` and coupling ``(*batch, state, state)`` [1/time];
        ``.full()`` is A. The discrete step of size dt has the Jacobian 1 + dt A.

    Raises: TypeError for a field that is no VectorField, an ``h`` that is no floating-point tensor, or of
        another dtype than the parameters; ValueError for sizes that do not fit.

    Source: THEORY.md 3.
    """
    if not isinstance(field, VectorField):
        raise TypeError(
            f"jacobian(field=...): field is {type(field).__name__}; it must be a ctgate field: wrap "
            "fn(t, h, u) in ct.Field(fn)"
        )
    if not isinstance(h, Tensor) or not h.is_floating_point():
        kind = h.dtype if isinstance(h, Tensor) else type(h).__name__
        raise TypeError(f"jacobian(h=...): h is {kind}; it must be a floating-point tensor (*batch, state)")
    field.check_arguments(h, u)
    return field.jacobian(t, h, u)
