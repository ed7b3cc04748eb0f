r"""What can be written down: transport of linear leaky networks and of gates that hold or never move, and the
gains of units that only leak."""

import math

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from ctgate.controls.times import rounding_of

# The Gaussian weight beyond is 1e-18 of the whole, and the step resolves a logistic function of slope 50.
_REACH = 9.0
_NODES = 4001


def linear_transport(
    weight: Float[Tensor, "unit unit"],
    alpha: float,
    tau: float | Float[Tensor, "*unit"],
    lags: Num[Tensor, " lag"],
    dt: float | None = None,
) -> Float[Tensor, "lag unit unit"]:
    r"""Phi(t, t - lag) of a leaky network with :math:`\varphi(x) = x`, the same at every t:

    .. math:: \Phi = e^{A\,\mathrm{lag}}, \qquad A = D_{\alpha/\tau}\,(W - I),

    and with ``dt`` that of its Euler map, :math:`(I + dt\,A)^{\mathrm{lag}}`, the lag then counting steps.
    Its diagonal times the learning rate is the exact effective learning rate; with W = 0 it is
    :math:`e^{-\alpha\,\mathrm{lag}/\tau}`.

    Parameters: ``weight`` W; ``alpha`` the gate; ``tau`` [time], a number or one per unit; ``lags`` [time],
        or with ``dt`` [time] integers [steps].

    Raises: ValueError for a lag that is negative or, with ``dt``, no integer.

    Source: THEORY.md 15.
    """
    _check_lags("linear_transport", lags)
    eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    scale = torch.as_tensor(alpha / tau, dtype=weight.dtype, device=weight.device)
    generator = scale.reshape(-1, 1) * (weight - eye)
    if dt is None:
        exact: Tensor = torch.linalg.matrix_exp(lags.to(weight).reshape(-1, 1, 1) * generator)
        return exact
    if bool((lags != lags.round()).any()):
        raise ValueError(f"linear_transport(lags=...): lags are {lags.tolist()}; with dt they count steps")
    step = eye + dt * generator
    return torch.stack([torch.linalg.matrix_power(step, int(lag)) for lag in lags.tolist()])


def piecewise_retention(
    edges: Float[Tensor, " edge"],
    rates: Float[Tensor, "interval *batch unit"],
    t: float,
    lags: Float[Tensor, " lag"],
) -> Float[Tensor, "lag *batch unit"]:
    r"""What gates that hold piecewise constant rates leave of a state after each lag, a product of
    exponentials:

    .. math:: \mu^{(0)}(t, t - \mathrm{lag}) = \prod_j e^{-\mathrm{rate}_j\,|[t - \mathrm{lag},\,t]\,\cap\,
              [e_j,\,e_{j+1}]|}.

    It is the effective learning rate at order "leak", and exact where no unit acts on another or, through
    its gate or target, on itself.

    Parameters: ``edges`` e [time], increasing; ``rates`` [1/time] on the intervals between them; ``t``
        and ``t - lags`` [time] inside the edges.

    Raises: ValueError for edges that do not fit, times outside them or a negative lag.

    Source: THEORY.md 15.
    """
    _check_lags("piecewise_retention", lags)
    if len(edges) != len(rates) + 1 or bool((edges.diff() <= 0.0).any()):
        raise ValueError(
            f"piecewise_retention(edges=...): edges are {edges.tolist()}; they must increase, one more "
            f"than the {len(rates)} intervals of rates"
        )
    stop = torch.as_tensor(t, dtype=edges.dtype, device=edges.device)
    start = stop - lags
    slack = rounding_of(torch.maximum(edges[-1].abs(), edges[0].abs()), torch.finfo(edges.dtype).eps)
    if bool((start < edges[0] - slack).any()) or bool(stop > edges[-1] + slack):
        raise ValueError(
            f"piecewise_retention(t={t}, lags=...): lags are in [{lags.min().item()}, {lags.max().item()}] "
            f"and the edges in [{edges[0].item()}, {edges[-1].item()}]; [t - lag, t] must lie inside"
        )
    overlap = torch.minimum(edges[1:], stop) - torch.maximum(edges[:-1], start.unsqueeze(-1))
    exponent = torch.tensordot(overlap.clamp(min=0.0).to(rates.dtype), rates, dims=1)
    return torch.exp(-exponent)


def uniform_envelope(lags: Float[Tensor, " lag"], low: float, high: float) -> Float[Tensor, " lag"]:
    r"""The mean of :math:`e^{-\gamma\,\mathrm{lag}}` over rates uniform on [low, high],

    .. math:: f = \frac{e^{-\mathrm{low}\,\mathrm{lag}} - e^{-\mathrm{high}\,\mathrm{lag}}}
              {(\mathrm{high} - \mathrm{low})\,\mathrm{lag}} :

    the envelope of a network whose gates are drawn once and never move is the Laplace transform of the
    density of its rates. With low = 0 it falls as 1/lag.

    Parameters: ``lags`` [time], >= 0; ``low`` < ``high`` [1/time].

    Raises: ValueError for bounds that are not 0 <= low < high, or a negative lag.

    Source: THEORY.md 15.
    """
    _check_lags("uniform_envelope", lags)
    if not 0.0 <= low < high:
        raise ValueError(f"uniform_envelope(low={low}, high={high}): they must satisfy 0 <= low < high")
    width = (high - low) * lags
    # (1 - e^-x) / x, which is 1 at x = 0.
    mean = torch.where(width > 0.0, -torch.expm1(-width) / torch.where(width > 0.0, width, 1.0), 1.0)
    return torch.exp(-low * lags) * mean


def gamma_envelope(lags: Float[Tensor, " lag"], shape: float, scale: float) -> Float[Tensor, " lag"]:
    r"""The mean of :math:`e^{-\gamma\,\mathrm{lag}}` over Gamma-distributed rates,

    .. math:: f = (1 + \mathrm{scale}\cdot\mathrm{lag})^{-\mathrm{shape}} :

    a power law whose exponent is that of the density at small rates, :math:`\gamma^{\mathrm{shape} - 1}`.

    Parameters: ``lags`` [time], >= 0; ``shape`` > 0; ``scale`` > 0 [1/time]. The mean rate is their product.

    Raises: ValueError for a shape or scale that is not positive, or a negative lag.

    Source: THEORY.md 15.
    """
    _check_lags("gamma_envelope", lags)
    if not (shape > 0.0 and scale > 0.0):
        raise ValueError(f"gamma_envelope(shape={shape}, scale={scale}): both must be > 0")
    return torch.exp(-shape * torch.log1p(scale * lags))


def logistic_normal_envelope(
    lags: Float[Tensor, " lag"], mean: float, std: float, tau: float = 1.0
) -> Float[Tensor, " lag"]:
    r"""The mean of :math:`e^{-\sigma(x)\,\mathrm{lag}/\tau}` over pre-activations x ~ N(mean, std^2): gates
    of a random network at rest.

    By the trapezoid rule on 4001 points, which for such integrands is accurate to rounding of f(0) = 1 while
    ``std`` < 50.

    Parameters: ``lags`` [time], >= 0; ``mean`` and ``std`` of the gate's pre-activation; ``tau`` [time].

    Raises: ValueError for a negative ``std`` or lag, or a ``tau`` that is not positive.

    Source: THEORY.md 15.
    """
    _check_lags("logistic_normal_envelope", lags)
    if not (std >= 0.0 and tau > 0.0):
        raise ValueError(f"logistic_normal_envelope(std={std}, tau={tau}): std must be >= 0 and tau > 0")
    node = np.linspace(-_REACH, _REACH, _NODES)
    weight = np.exp(-0.5 * node**2) * (2.0 * _REACH / (_NODES - 1)) / math.sqrt(2.0 * math.pi)
    rate = torch.sigmoid(torch.from_numpy(mean + std * node)) / tau
    kernel = torch.exp(-lags.to(rate).unsqueeze(-1) * rate)
    return (kernel @ torch.from_numpy(weight).to(kernel)).to(lags.dtype)


def white_gain(
    rate: Float[Tensor, "*any"], span: float = math.inf, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K of a unit that only leaks, for a B that is white in time with unit variance,

    .. math:: P = \frac{1 - e^{-2\gamma T}}{2\gamma}, \qquad B = \gamma b:\; \gamma^2 P \to \frac{\gamma}{2} .

    The step that such a unit takes is proportional to its time constant :math:`1/\gamma` only where B does
    not know the gate. In a gated cell B carries the factor :math:`\gamma` (``gated=True``) and the law is the
    inverse: the slower the unit, the smaller its step.

    Parameters: ``rate`` :math:`\gamma` [1/time], >= 0; ``span`` T [time]; ``gated``, whether B = rate * b.

    Returns: [time], with ``gated`` [1/time]; infinite for a rate of zero and an infinite span.

    Raises: ValueError for a negative rate or span.

    Source: THEORY.md 16.
    """
    _check_gain("white_gain", rate, span=span)
    return 0.5 * rate * _filled(2.0 * rate, span) if gated else _retained(2.0 * rate, span)


def coherent_gain(
    rate: Float[Tensor, "*any"], span: float = math.inf, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K of a unit that only leaks, for a constant B = 1: :math:`((1 - e^{-\gamma T})/\gamma)^2`.

    With ``gated`` it is :math:`(1 - e^{-\gamma T})^2`, 1 for a long span: gates distribute a weight of 1
    over lags and add no gain.

    Parameters: as :func:`white_gain`. Returns: [time^2], with ``gated`` [1].

    Raises: ValueError for a negative rate or span.

    Source: THEORY.md 16.
    """
    _check_gain("coherent_gain", rate, span=span)
    return (_filled(rate, span) if gated else _retained(rate, span)).square()


def correlated_gain(
    rate: Float[Tensor, "*any"], correlation_time: float, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K at rest of a unit that only leaks, for a B with the correlation :math:`e^{-|t|/t_b}`,

    .. math:: P = \frac{1}{\gamma}\int_0^\infty e^{-\gamma s}\,c(s)\,ds = \frac{t_b}{\gamma(1 + \gamma t_b)},
              \qquad B = \gamma b:\; \frac{\gamma t_b}{1 + \gamma t_b},

    between :func:`coherent_gain` (:math:`\gamma t_b \gg 1`) and twice :math:`t_b` times :func:`white_gain`
    (:math:`\gamma t_b \ll 1`).

    Parameters: ``rate`` [1/time], > 0; ``correlation_time`` :math:`t_b` [time], > 0; ``gated`` as
        :func:`white_gain`. Returns: [time^2], with ``gated`` [1].

    Raises: ValueError for a rate or time that is not positive.

    Source: THEORY.md 16.
    """
    _check_gain("correlated_gain", rate, correlation_time=correlation_time)
    if bool((rate == 0.0).any()) or correlation_time == 0.0:
        raise ValueError(
            f"correlated_gain: the smallest rate is {float(rate.min())} and correlation_time is "
            f"{correlation_time}; both must be > 0"
        )
    share = correlation_time / (1.0 + rate * correlation_time)
    return rate * share if gated else share / rate


def _check_lags(what: str, lags: Tensor) -> None:
    if bool((lags < 0).any()):
        raise ValueError(f"{what}(lags=...): the smallest lag is {lags.min().item()}; it must be >= 0")


def _check_gain(what: str, rate: Tensor, **times: float) -> None:
    if bool((rate < 0.0).any()):
        raise ValueError(f"{what}(rate=...): the smallest rate is {float(rate.min())}; it must be >= 0")
    for name, value in times.items():
        if not value >= 0.0:
            raise ValueError(f"{what}({name}=...): {name} is {value}; it must be >= 0")


def _filled(rate: Tensor, span: float) -> Tensor:
    """1 - exp(-rate span)."""
    return (rate > 0.0).to(rate.dtype) if math.isinf(span) else -torch.expm1(-rate * span)


def _retained(rate: Tensor, span: float) -> Tensor:
    """The integral of exp(-rate s) over 0 <= s <= span, also where the rate is 0."""
    safe = torch.where(rate > 0.0, rate, 1.0)
    return torch.where(rate > 0.0, _filled(safe, span) / safe, span)
