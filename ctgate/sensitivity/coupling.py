r"""How states, their sensitivities and the parameters move together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from ctgate.algorithms import Algorithm, Euler, NativeAdaptiveAlgorithm, Rosenbrock23, ScipyAlgorithm
from ctgate.problem import ODEProblem
from ctgate.sensealg.forward import DirectedTangents, TangentField, WholeTangents
from ctgate.sensitivity.arguments import Lags, Order, check_lags
from ctgate.sensitivity.blocks import Blocks
from ctgate.sensitivity.epochs import GradientFlow, descend
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.online import DiagonalTangents, Learner, learn_online

_OPTIONS = ("rtol", "atol", "max_steps")
_SENSITIVITIES = ("exact", "directions", "diagonal")


@torch.no_grad()
def coupled_flow(
    prob: ODEProblem,
    loss: Loss,
    eta: float,
    *,
    mode: str = "online",
    alg: Algorithm | None = None,
    parameters: Sequence[str] | None = None,
    train_readout: bool = False,
    lags: Lags | None = None,
    saveat: Sequence[float] | Tensor | None = None,
    progress: bool = False,
    sensitivity: str | None = None,
    directions: int | Mapping[str, Tensor] | None = None,
    seed: int | None = None,
    epochs: float | None = None,
    outer: Algorithm | None = None,
    outer_options: Mapping[str, Any] | None = None,
    order: Order | None = None,
    **options: Any,
) -> xr.Dataset:
    r"""States and parameters as one flow: time constants and learning rates seen to move together.

    **"online"**, while the state moves (continuous real-time recurrent learning),

    .. math:: \frac{dh}{dt} = f(h; \theta), \qquad \frac{dS}{dt} = A S + B, \qquad
              \frac{d\theta}{dt} = -\eta \sum_{\mathrm{samples}} S^{\top} \frac{\partial\ell}{\partial h},

    with the running cost l of the loss, parameters that the batch shares, and S(t_0) = 0. By ``Euler`` it is
    real-time recurrent learning of the discrete cell. While the parameters move, S mixes derivatives by
    parameters of different moments: to first order in eta the whole displacement is -eta dL/dtheta.

    ``sensitivity`` names what stands for S, by default the first:

    - "exact": S, state * P numbers a sample for P parameter entries. Small systems.
    - "directions": k tangents :math:`s_j = S v_j` along directions that stay what they are, so that the
      gradient g is replaced by :math:`\sum_j v_j \langle v_j, g\rangle`. With ``directions=k`` they are drawn
      as :math:`v_j \sim N(0, 1/k)`, and the estimate has g for its mean over draws (a forward gradient); one
      run sees one draw, and moves in the span of its directions only. Given ones are used as they are: the
      estimate is the projection of g on their span if they are orthonormal. State * k numbers a sample: large
      systems.
    - "diagonal": diag(A) in place of A, so no influence passes through another unit; biased, with S of the
      full size, and exact where A is diagonal. It saves the product A S, not the memory.

    **"epochs"**, over training time with the state solved inside (gradient flow),

    .. math:: \frac{d\theta}{dk} = -\eta\,\nabla L(\theta),

    k in epochs. Each gradient is that of :func:`ctgate.solve` with ``alg``. The default ``outer``,
    ``Euler(1.0)``, is gradient descent with the step eta; an adaptive one is the flow that it approximates.

    Parameters:
        prob: a :class:`ctgate.ODEProblem`; where samples have times of their own, "epochs" only.
        loss: a :class:`ctgate.Loss`; "online" takes a running cost and no other.
        eta: positive; online per unit of time, else per epoch.
        mode: "online" or "epochs".
        alg, options: how the state is integrated, and its ``rtol``, ``atol``, ``max_steps``, as in
            :func:`ctgate.solve`. Online no Rosenbrock23, none of scipy's and no steps per sample: the
            parameters tie the samples together.
        parameters: names among ``prob.named_parameters()`` of those that move; None for all.
        train_readout: whether the readout of the loss moves too, as ``readout.<name>``.
        lags: lags of the effective learning rates, steps where ``alg`` is Euler, times else. None for none;
            those of steps need every step, so no ``saveat`` online.
        saveat: online times, or epochs, at which to look; None is every step.
        progress: show a bar (only on a terminal). An interrupt keeps what is done, and warns.
        sensitivity, directions, seed: online, as above; a number of directions needs a seed. Given ones are a
            dict of tensors ``(k, *shape)`` by name; what is left out does not move.
        epochs: how long; with ``outer``, its ``outer_options`` (``rtol``, ``atol``, ``max_steps``), and the
            ``order`` of :func:`ctgate.effective_rates`, "leak" by default.

    Returns: a Dataset over ``time`` or ``epoch`` with ``theta`` (entry), ``displacement_norm`` (parameter),
    and ``loss`` (online the running cost integrated so far). Online: ``state``, ``rate``, ``time_constant``
    (batch, unit), ``tangent_norm`` (batch), ``running_cost``, and ``mu`` (lag, time, batch, unit),
    :math:`\eta\,e^{-\int r}` over the lag before t with the rates as they were then, NaN where the lag is not
    over; for Euler :math:`\eta\prod(1 - \Delta\,r)`. Epochs: ``rate``, the mean over time and samples,
    ``time_constant``, its inverse (unit), ``mu`` (lag, unit) and ``envelope`` (lag), the means of
    :func:`ctgate.effective_rates`.

    Raises: TypeError, ValueError for arguments that do not fit, naming them; SolveError where the state of an
    epoch cannot be solved.

    Source: THEORY.md 17; R. Williams and D. Zipser, Neural Comput. 1 (1989) 270 (real-time recurrent
    learning); A. Baydin et al., arXiv 2202.08587 (forward gradients).
    """
    _check(prob, loss, eta, mode, options)
    blocks = _blocks(prob, parameters)
    readout = _readout_blocks(prob, loss, train_readout)
    delays = None if lags is None else check_lags(lags, isinstance(alg, Euler), "coupled_flow")
    for_online = {"sensitivity": sensitivity, "directions": directions, "seed": seed}
    for_epochs = {"epochs": epochs, "outer": outer, "outer_options": outer_options, "order": order}
    for name, value in (for_epochs if mode == "online" else for_online).items():
        if value is not None:
            raise TypeError(
                f'coupled_flow({name}=...): {name} is given and mode is "{mode}", which takes none'
            )
    shared = {"saveat": saveat, "progress": progress}
    if mode == "online":
        chosen = "exact" if sensitivity is None else sensitivity
        _check_online(prob, loss, alg, chosen, delays, saveat)
        along = _directions(prob, blocks, chosen, directions, seed)
        tangents = _tangents(prob, blocks, chosen, along)
        learner = Learner(loss, float(eta), blocks, readout, along)
        data = learn_online(prob, alg, tangents, learner, delays, {**options, **shared})
        notes = {"sensitivity": chosen, "tangents": tangents.count}
        notes |= {} if seed is None else {"seed": seed}
    else:
        length = _check_epochs(prob, epochs, outer_options, delays)
        flow = GradientFlow(prob, loss, float(eta), alg, blocks, readout, options)
        method = Euler(1.0) if outer is None else outer
        how = {**(outer_options or {}), **shared}
        data = descend(flow, method, length, delays, "leak" if order is None else order, how)
        notes = {}
    return data.assign_attrs(mode=mode, eta=float(eta), **notes)


def _check(prob: object, loss: object, eta: object, mode: object, options: Mapping[str, Any]) -> None:
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"coupled_flow(prob=...): prob is {type(prob).__name__}; it must be a ct.ODEProblem")
    if prob.h0.numel() == 0:
        raise ValueError("coupled_flow(prob=...): the batch of h0 is empty; there is nothing to learn from")
    if not isinstance(loss, Loss):
        raise TypeError(f"coupled_flow(loss=...): loss is {type(loss).__name__}; it must be a ct.Loss")
    _check_positive("eta", eta)
    if mode not in ("online", "epochs"):
        raise ValueError(f'coupled_flow(mode=...): mode is {mode!r}; it must be "online" or "epochs"')
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"coupled_flow got {name!r}; of the options of solve it takes {_OPTIONS}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"coupled_flow({name}=...): {name} is {value!r}; it must be a float")
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"coupled_flow({name}=...): {name} is {value!r}; it must be positive and finite")


def _blocks(prob: ODEProblem, parameters: object) -> Blocks:
    known = prob.named_parameters()
    if isinstance(parameters, str) or not (parameters is None or isinstance(parameters, Sequence)):
        raise TypeError(
            f"coupled_flow(parameters=...): parameters is {parameters!r}; it must be a list of names or None"
        )
    names = list(dict.fromkeys(known if parameters is None else parameters))
    for name in names:
        if name not in known:
            raise ValueError(
                f"coupled_flow(parameters=...): parameters has {name!r}, which the field lacks; its "
                f"parameters are {sorted(known)}"
            )
    if not names:
        raise ValueError("coupled_flow(parameters=...): there are no parameters to move")
    return Blocks.of({name: known[name] for name in names})


def _readout_blocks(prob: ODEProblem, loss: Loss, train_readout: bool) -> Blocks:
    if not train_readout:
        return Blocks({})
    if loss.readout is None:
        raise ValueError("coupled_flow(train_readout=True): the loss has no readout; give Loss(readout=...)")
    named = dict(loss.readout.named_parameters())
    for name, parameter in named.items():
        if parameter.dtype != prob.h0.dtype or parameter.device != prob.h0.device:
            raise ValueError(
                f"coupled_flow(train_readout=True): the readout's {name} is {parameter.dtype} on "
                f"{parameter.device}; h0 is {prob.h0.dtype} on {prob.h0.device}, and they move as one state"
            )
    return Blocks.of(named)


def _check_online(
    prob: ODEProblem, loss: Loss, alg: object, sensitivity: str, lags: Tensor | None, saveat: object
) -> None:
    if loss.running is None or loss.terminal is not None or loss.at is not None:
        raise ValueError(
            'coupled_flow(loss=...): mode is "online" and the loss is not a running cost alone; learning '
            'while the state moves needs Loss(running=...), other costs need mode="epochs"'
        )
    own_steps = isinstance(alg, NativeAdaptiveAlgorithm) and alg.per_sample
    if prob.per_sample or own_steps or isinstance(alg, ScipyAlgorithm | Rosenbrock23):
        what = "prob has times per sample" if prob.per_sample else f"alg is {alg}"
        raise ValueError(
            f'coupled_flow: mode is "online" and {what}; the parameters tie the samples together, which '
            "needs one clock and an explicit method: shared times, and Euler(dt), Dopri5() or another"
        )
    if sensitivity not in _SENSITIVITIES:
        raise ValueError(
            f"coupled_flow(sensitivity=...): sensitivity is {sensitivity!r}; it must be one of "
            f"{_SENSITIVITIES}"
        )
    if lags is not None and saveat is not None and isinstance(alg, Euler):
        raise ValueError(
            "coupled_flow(saveat=...): lags count steps and need every one; leave saveat out and pick times "
            "from the Dataset"
        )


def _directions(
    prob: ODEProblem, blocks: Blocks, sensitivity: str, directions: object, seed: object
) -> Tensor | None:
    """The directions (k, P), drawn or as given; None where S is not seen along directions."""
    who = "coupled_flow(directions=...)"
    if sensitivity != "directions":
        if directions is not None or seed is not None:
            raise TypeError(
                f'{who}: directions and seed go with sensitivity="directions", not {sensitivity!r}'
            )
        return None
    if isinstance(directions, int) and not isinstance(directions, bool) and directions > 0:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"coupled_flow(seed=...): seed is {seed!r}; drawn directions need an integer")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(directions, blocks.entries, generator=generator, dtype=torch.float64)
        return (drawn / math.sqrt(directions)).to(prob.h0)
    if not isinstance(directions, Mapping) or not directions:
        raise TypeError(
            f"{who}: directions is {directions!r}; it must be a positive number of them, or a dict of tensors"
        )
    if seed is not None:
        raise TypeError("coupled_flow(seed=...): seed is given and so are the directions; leave it out")
    counts = set()
    for name, value in directions.items():
        if name not in blocks.shapes:
            raise ValueError(f"{who}: directions has {name!r}; what moves is {list(blocks.names)}")
        shape = blocks.shapes[name]
        if not isinstance(value, Tensor) or value.dtype != prob.h0.dtype or value.device != prob.h0.device:
            raise TypeError(f"{who}: directions[{name!r}] must be a tensor in the dtype and place of h0")
        if value.ndim == 0 or value.shape[1:] != shape:
            raise ValueError(
                f"{who}: directions[{name!r}] has shape {tuple(value.shape)}; it must be (k, *{tuple(shape)})"
            )
        counts.add(len(value))
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{who}: the tensors have {sorted(counts)} directions; they must have one number >= 1"
        )
    count = counts.pop()
    whole = {name: prob.h0.new_zeros(count, *shape) for name, shape in blocks.shapes.items()}
    return blocks.pack({**whole, **directions}, prob.h0, lead=1)


def _tangents(prob: ODEProblem, blocks: Blocks, sensitivity: str, along: Tensor | None) -> TangentField:
    size = prob.h0.shape[-1]
    if along is not None:
        return DirectedTangents(prob.field, size, len(along), blocks.unpack(along))
    if sensitivity == "diagonal":
        return DiagonalTangents(prob.field, size, blocks)
    return WholeTangents(prob.field, size, blocks.names, blocks.entries, with_h0=False)


def _check_epochs(prob: ODEProblem, epochs: Any, outer_options: Any, lags: Tensor | None) -> float:
    _check_positive("epochs", epochs)
    if not (outer_options is None or isinstance(outer_options, Mapping)):
        raise TypeError(
            f"coupled_flow(outer_options=...): outer_options is {outer_options!r}; it must be a dict"
        )
    for name in outer_options or {}:
        if name not in _OPTIONS:
            raise TypeError(f"coupled_flow(outer_options=...) has {name!r}; it takes {_OPTIONS}")
    if lags is not None and prob.per_sample:
        raise ValueError(
            "coupled_flow(lags=...): prob has times per sample, for which effective rates are not labelled; "
            "leave lags out"
        )
    return float(epochs)
