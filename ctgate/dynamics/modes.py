r"""Eigenvalues of a Jacobian as modes: how fast each one decays or grows, and how fast it turns."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Complex, Float
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import Euler
from ctgate.fields import VectorField
from ctgate.sensitivity.labels import label
from ctgate.storage.dataset import array

Kind = Literal["flow", "map"]
# What separates modes that decay from those that grow.
MARGINAL = {"flow": "Re(eigenvalue) = 0", "map": "abs(eigenvalue) = 1"}


def check_field(field: object, what: str) -> None:
    """Raise TypeError for what is no field."""
    if not isinstance(field, VectorField):
        raise TypeError(
            f"{what}(field=...): field is {type(field).__name__}; it must be a ctgate field: wrap "
            "fn(t, h, u) in ct.Field(fn)"
        )


def step_of(alg: object, what: str) -> float | None:
    """The step of the map, None for the flow."""
    if alg is not None and not isinstance(alg, Euler):
        raise TypeError(
            f"{what}(alg=...): alg is {alg!r}; it must be None, for the flow, or ct.Euler(dt), for the map"
        )
    return None if alg is None else alg.dt


@dataclass(frozen=True)
class Modes:
    r"""The eigenvalues of the flow's Jacobian A, or of that of its Euler map, :math:`\mu = 1 + dt\,\lambda`,
    those that grow fastest or decay slowest first.

    Attributes:
        rates: eigenvalues :math:`\lambda` of A [1/time], ``(*batch, mode)``.
        step: dt of the map, None for the flow.

    Source: THEORY.md 3 and 21.
    """

    rates: Complex[Tensor, "*batch mode"]
    step: float | None

    @classmethod
    def of(cls, jacobians: Float[Tensor, "*batch state state"], step: float | None) -> "Modes":
        """Those of matrices A; NaN where one is not finite."""
        finite = jacobians.isfinite().all(-1).all(-1)[..., None]
        rates = torch.linalg.eigvals(torch.where(finite[..., None], jacobians, 0.0))
        # Pairs are a complex number and its conjugate to the bit, so that both grow alike.
        rates = rates.gather(-1, rates.imag.argsort(dim=-1, descending=True, stable=True))
        order = cls(rates, step).growth.argsort(dim=-1, descending=True, stable=True)
        rates = rates.gather(-1, order)
        return cls(torch.where(finite, rates, complex(math.nan, math.nan)), step)

    @property
    def kind(self) -> Kind:
        """What they are the modes of."""
        return "flow" if self.step is None else "map"

    @property
    def eigenvalues(self) -> Complex[Tensor, "*batch mode"]:
        """lambda [1/time] of the flow, mu of the map."""
        return self.rates if self.step is None else 1.0 + self.step * self.rates

    @property
    def growth(self) -> Float[Tensor, "*batch mode"]:
        r""":math:`\mathrm{Re}\,\lambda` or :math:`\log|\mu| / dt` [1/time]: a slow mode of the map keeps its
        digits, since :math:`|\mu|^2 - 1` is known where 1 is not added."""
        real, imag = self.rates.real, self.rates.imag
        if self.step is None:
            return real
        excess = self.step * (2.0 * real + self.step * (real.square() + imag.square()))
        squared = (1.0 + self.step * real).square() + (self.step * imag).square()
        return torch.where(excess.abs() < 0.5, excess.log1p(), squared.log()) / (2.0 * self.step)

    @property
    def time_constants(self) -> Float[Tensor, "*batch mode"]:
        """-1 / growth [time]: negative for a mode that grows, infinite for one that does neither."""
        return torch.where(self.growth == 0.0, math.inf, -self.growth.reciprocal())

    @property
    def periods(self) -> Float[Tensor, "*batch mode"]:
        r""":math:`2\pi / |\mathrm{Im}\,\lambda|`, for the map :math:`2\pi\,dt / |\arg \mu|` [time]; infinite
        for a mode that does not turn, two steps for one that changes sign at every step."""
        if self.step is None:
            return 2.0 * math.pi / self.rates.imag.abs()
        return 2.0 * math.pi * self.step / self.eigenvalues.angle().abs()

    def variables(self, dims: tuple[str, ...]) -> dict[str, Any]:
        """Variables of a Dataset over ``(*dims, mode)``."""
        unit = "1/time" if self.step is None else "1"
        matrix = "Jacobian of the flow" if self.step is None else "Jacobian of the map"
        values = self.eigenvalues
        rows = {
            "eigenvalue_real": (values.real, f"real part of the eigenvalues of the {matrix}", unit),
            "eigenvalue_imag": (values.imag, f"imaginary part of the eigenvalues of the {matrix}", unit),
            "growth_rate": (self.growth, "rate at which the mode grows", "1/time"),
            "time_constant": (self.time_constants, "time constant, negative for a mode that grows", "time"),
            "period": (self.periods, "period of the mode", "time"),
        }
        return {
            name: ((*dims, "mode"), array(numbers), label(text, units))
            for name, (numbers, text, units) in rows.items()
        }


def attributes(field: VectorField, modes: Modes) -> dict[str, Any]:
    """What a Dataset of modes says about where they come from."""
    real = modes.rates.real
    return {
        "kind": modes.kind,
        "dt": math.nan if modes.step is None else modes.step,
        "marginal": MARGINAL[modes.kind],
        "field": type(field).__name__,
        "dtype": str(real.dtype).removeprefix("torch."),
        "device": str(real.device),
        "ctgate_version": __version__,
    }


def eigenvalues(data: xr.Dataset) -> xr.DataArray:
    """The eigenvalues of a Dataset of :func:`jacobian_spectrum` or :func:`fixed_points`, (..., mode), as
    complex numbers, which files do not hold.

    Raises: ValueError for another Dataset.

    Source: THEORY.md 21.
    """
    _check_modes(data, "eigenvalues")
    values: xr.DataArray = data["eigenvalue_real"] + 1j * data["eigenvalue_imag"]
    return values.rename("eigenvalue").assign_attrs(label("eigenvalues", data["eigenvalue_real"].units))


def slow_mode_fraction(
    data: xr.Dataset, delta: float, *, around: Literal["point", "line"] = "point"
) -> xr.DataArray:
    r"""The share of the modes within ``delta`` of marginal,

    =========  ============================  ===============================
    around     flow                          map
    =========  ============================  ===============================
    "point"    :math:`|\lambda| \le \delta`  :math:`|\mu - 1| \le \delta`
    "line"     :math:`|\mathrm{Re}\,\lambda| \le \delta`  :math:`||\mu| - 1| \le \delta`
    =========  ============================  ===============================

    The discs of the point belong together, :math:`|\mu - 1| = dt\,|\lambda|`, and are what the theory of
    random networks counts: modes that neither decay nor turn, as closed gates make them. The line has also
    the modes that turn without decaying.

    Parameters:
        data: from :func:`jacobian_spectrum` or :func:`fixed_points`. delta: [1/time] of a flow, a number of a
            map; not negative. around: as above.

    Returns: the share over all dims but ``mode``; NaN where there are no eigenvalues.

    Raises: ValueError for another Dataset or a ``delta`` or ``around`` that does not fit.

    Source: THEORY.md 21.
    """
    _check_modes(data, "slow_mode_fraction")
    if not delta >= 0.0:
        raise ValueError(f"slow_mode_fraction(delta=...): delta is {delta!r}; it must not be negative")
    if around not in ("point", "line"):
        raise ValueError(f"slow_mode_fraction(around=...): it is {around!r}; it must be 'point' or 'line'")
    values, flow = eigenvalues(data), data.attrs["kind"] == "flow"
    if around == "point":
        distance = abs(values if flow else values - 1.0)
    else:
        distance = abs(values.real if flow else abs(values) - 1.0)
    share = (distance <= delta).mean("mode").where(values.notnull().all("mode"))
    text = f"share of the modes within {delta:g} of the marginal {around}"
    return share.rename("slow_mode_fraction").assign_attrs(label(text, "1"))


def _check_modes(data: xr.Dataset, what: str) -> None:
    if (
        not {"eigenvalue_real", "eigenvalue_imag"} <= set(data.data_vars)
        or data.attrs.get("kind") not in MARGINAL
    ):
        raise ValueError(
            f"{what}(data=...): the Dataset has the variables {sorted(map(str, data.data_vars))}; it must be "
            "one of jacobian_spectrum or fixed_points, with its attributes"
        )
