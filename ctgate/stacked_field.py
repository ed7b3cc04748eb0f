"""Fields of one class side by side, as one field."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ctgate.fields import VectorField
from ctgate.fields.base import Gates, Time
from ctgate.fields.jacobian import Jacobian
from ctgate.integrators.stretches import transformed
from ctgate.kernels.fused import FusedCell, Stretch
from ctgate.problem import Method


class StackedField(VectorField):
    r"""n fields of one class side by side, :math:`dh_k/dt = f(t, h_k, u_k; \theta_k)`, for states
    ``(..., n, *batch, state)`` of which ``inner`` dimensions are the batch of one field.

    ``template`` is one of the fields. Its parameters and buffers are this field's parameters ``p0_...``,
    ``p1_...``, ... (placeholders: values come from the problem's ``parameters``), with n in front where they
    differ, or are copies of the same if ``alike``.

    Source: torch.func.vmap over torch.func.functional_call.
    """

    def __init__(
        self,
        template: VectorField,
        tensors: dict[str, Tensor],
        stacked: set[str],
        inner: int,
        alike: bool = False,
    ) -> None:
        super().__init__(input_size=template.input_size, state_size=template.state_size)
        # In a tuple, so that the template's own parameters are not taken for this field's.
        self._template = (template,)
        self._names = list(tensors)
        self._stacked = stacked
        self._inner = inner
        self._alike = alike
        self.autonomous = template.autonomous
        self.gate_names = template.gate_names
        for key, tensor in zip(self.keys(), tensors.values(), strict=True):
            placeholder = tensor.new_empty(()).expand(tensor.shape)
            self.register_parameter(key, nn.Parameter(placeholder, requires_grad=False))

    def keys(self) -> list[str]:
        """This field's own names of the template's parameters and buffers, in their order."""
        return [f"p{number}_{name.replace('.', '_')}" for number, name in enumerate(self._names)]

    @property
    def components(self) -> dict[str, slice]:
        """Those of one field."""
        return self._template[0].components

    @property
    def output(self) -> slice:
        """That of one field."""
        return self._template[0].output

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """The fields' own."""
        rate, drive = self._each("rate_drive", t, h, u)
        return rate, drive

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """The fields' own."""
        value: Tensor = self._each("forward", t, h, u)
        return value

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """The fields' own."""
        gates: Gates = self._each("gates", t, h, u)
        return gates

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """The fields' own; one by differentiation is that of all together, which no transform surrounds."""
        if type(self._template[0]).jacobian is VectorField.jacobian:
            return super().jacobian(t, h, u)
        leak, coupling = self._each("jacobian", t, h, u)
        return Jacobian(leak, coupling)

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """The fields' own, as :meth:`jacobian`."""
        if type(self._template[0]).input_jacobian is VectorField.input_jacobian:
            return super().input_jacobian(t, h, u)
        value: Tensor = self._each("input_jacobian", t, h, u)
        return value

    @property
    def unrolls(self) -> bool:
        """Where one fused cell does for all of them."""
        return self._alike and self._template[0].fusable and not transformed()

    def unroll(
        self,
        stretch: Stretch,
        us: Tensor | None,
        h0: Tensor,
        dts: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """The states by one cell; the gradients of the copies stay apart."""
        template, given = self._template[0], dict(zip(self._names, parameters, strict=True))
        names = tuple(name for name, _ in template.named_parameters())

        def fuse(named: Mapping[str, Tensor]) -> FusedCell:
            return template.fuse({name: x[0] if name in self._stacked else x for name, x in named.items()})

        def plain(named: Mapping[str, Tensor], *rest: Any) -> Tensor:
            return stretch.plain(dict(zip(self.keys(), (given | dict(named)).values(), strict=True)), *rest)

        copies = len(h0) if self._stacked else 0
        own = dataclasses.replace(stretch, fuse=fuse, names=names, plain=plain, copies=copies)
        return super().unroll(own, us, h0, dts, [given[name] for name in names])

    def _each(self, method: str, t: Time, h: Tensor, u: Tensor | None) -> Any:
        """A method of every field, by vmap over the dimension that counts the fields."""
        template = Method(self._template[0], method)
        place = -(2 + self._inner)
        tensors: dict[str, Tensor] = {
            name: getattr(self, key) for name, key in zip(self._names, self.keys(), strict=True)
        }
        if u is not None and u.ndim >= -place:
            shape = list(u.shape)
            shape[place] = h.shape[place]
            u = u.expand(shape)
        own_times = isinstance(t, Tensor) and t.ndim > 0

        def call(own: dict[str, Tensor], t: Time, h: Tensor, u: Tensor | None) -> Any:
            # One field without a batch sees one time, as it does alone.
            time = t.squeeze(-1) if isinstance(t, Tensor) and own_times and self._inner == 0 else t
            state = {f"field.{name}": tensor for name, tensor in {**tensors, **own}.items()}
            value = functional_call(template, state, (time, h, u))
            return (value.leak, value.coupling) if isinstance(value, Jacobian) else value

        dims = (0, 0 if own_times else None, place, None if u is None or u.ndim < -place else place)
        wider: dict[str, int | tuple[int, ...]] = {
            "jacobian": (place, place - 1),
            "input_jacobian": place - 1,
        }
        own = {name: tensors.pop(name) for name in self._stacked}
        try:
            return vmap(call, in_dims=dims if own else (None, *dims[1:]), out_dims=wider.get(method, place))(
                own, t, h, u
            )
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise TypeError(
                f"in a batch of trajectories the field is evaluated under torch.func.vmap, which does not "
                f"pass through {type(self._template[0]).__name__}.{method}; use ensemble=EnsembleSerial()"
            ) from error
