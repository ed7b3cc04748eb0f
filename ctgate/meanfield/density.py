r"""How many eigenvalues lie where: the density of the spectrum inside its support.

Hermitisation of :math:`1 - H U` gives for each quantity that random blocks see two positive numbers, g for
what is seen and s for how much it matters, with

.. math::
    M = H L H^\dagger,\; L_k = a_k^2\,g_{b(k)}, \qquad
    g_b = \langle [M (1 + S M)^{-1}]_{bb} \rangle, \qquad
    s_b = \sum_{k:\, b(k) = b} a_k^2\,\langle [H^\dagger S (1 + M S)^{-1} H]_{kk} \rangle,

S = diag(s), averages over units. The trace of the resolvent per unit is then

.. math:: G(\lambda) = \Bigl\langle \sum_p \frac{1}{\lambda - p} \Bigr\rangle
          + \bigl\langle \mathrm{tr}\, H'\,L\,H^\dagger S\,(1 + M S)^{-1} \bigr\rangle,

and the eigenvalues per unit inside a closed curve are :math:`\oint G\,d\lambda / 2\pi i`. Outside the support
g s = 0.
"""

import warnings
from typing import NamedTuple

import numpy as np

from ctgate.meanfield.equations import Array
from ctgate.meanfield.population import Population
from ctgate.meanfield.support import Complex, perron, transfer_matrix

_AT_ONCE = 2**18
_TOLERANCE = 1e-9
_SWEEPS = 2000
_NEWTON = 4


class Answers(NamedTuple):
    """Units at some points: H and its derivative (m, unit, seen, block); :math:`|H_{bk}|^2`, and
    :math:`H_{1k}\\bar H_{2k}` (m, unit, block), zero where one quantity is seen; what each block sees."""

    value: Complex
    derivative: Complex
    squares: Array
    cross: Complex
    sees: list[int]


class Balance(NamedTuple):
    """M of every unit for some g and s: its diagonal (m, unit, seen), the entry above it, det(1 + S M)."""

    diagonal: Array
    cross: Complex
    determinant: Array


def trace(population: Population, points: Complex) -> Complex:
    r"""G at ``points`` (m,) [time]: the trace of the resolvent per unit.

    Warns where an equation is not solved to 1e-9 after 2000 sweeps.

    Source: THEORY.md 21.
    """
    found = np.empty(points.shape, dtype=complex)
    each = max(1, _AT_ONCE // population.weight.size)
    for part in (slice(k, k + each) for k in range(0, points.size, each)):
        found[part] = _trace(population, points[part])
    return found


def _trace(population: Population, points: Complex) -> Complex:
    away = points[:, None] - population.pole
    found: Complex = (1.0 / away) @ population.weight.astype(complex)
    for lag in population.lag[population.lag > 0.0]:
        found = found + lag / (1.0 + points * lag)
    transfer = transfer_matrix(population, points)
    inside = np.flatnonzero(perron(transfer) > 1.0)
    if not inside.size:
        return found
    answers = _answers(population, points[inside])
    g, s = _solve(answers, population, transfer[inside])
    found[inside] += _random_part(answers, population, g, s)
    return found


def _answers(population: Population, points: Complex) -> Answers:
    resolvent = (1.0 / (points[:, None] - population.pole))[..., None, None]
    delay = 1.0 / (1.0 + points[:, None, None, None] * population.lag)
    value = delay * (population.through * resolvent + population.aside)
    derivative = -delay * (population.lag * value + population.through * resolvent**2)
    cross = (
        value[..., 0, :] * value[..., 1, :].conj()
        if value.shape[-2] == 2
        else np.zeros_like(value[..., 0, :])
    )
    return Answers(value, derivative, value.real**2 + value.imag**2, cross, list(population.wiring.sees))


def _solve(answers: Answers, population: Population, transfer: Array) -> tuple[Array, Array]:
    """g and s (m, seen), by substitution, with the size of g s, which would converge slowly near the edge of
    the support, from an equation of its own in every sweep."""
    g, s = _directions(transfer)
    for _ in range(_SWEEPS):
        balance = _balance(answers, population, g, s)
        s = s * _amplitude(balance, population, g, s)[:, None]
        balance = _balance(answers, population, g, s)
        new_g, new_s = _next(answers, population, balance, s)
        # (g, s) -> (k g, s / k) changes nothing.
        gauge = np.sqrt(new_s.sum(-1) / new_g.sum(-1))[:, None]
        new_g, new_s = new_g * gauge, new_s / gauge
        size = np.sqrt((new_g**2 + new_s**2).sum(-1))
        change = np.sqrt(((new_g - g) ** 2 + (new_s - s) ** 2).sum(-1)) / size
        g, s = new_g, new_s
        if change.max() < _TOLERANCE:
            return g, s
    warnings.warn(f"density: an equation is solved to {change.max():.1e} only", stacklevel=6)
    return g, s


def _directions(transfer: Array) -> tuple[Array, Array]:
    """The right and left Perron vectors of T, where g and s start at the edge of the support."""
    if transfer.shape[-1] == 1:
        return np.ones(transfer.shape[:2]), np.ones(transfer.shape[:2])
    value = perron(transfer)[:, None]
    (a, b), (c, d) = transfer[:, 0].T, transfer[:, 1].T
    top = value[:, 0]
    right = np.stack([b + (top - d), c + (top - a)], -1)
    left = np.stack([c + (top - d), b + (top - a)], -1)
    return np.maximum(right, 1e-12 * value), np.maximum(left, 1e-12 * value)


def _balance(answers: Answers, population: Population, g: Array, s: Array) -> Balance:
    strength = population.variance * g[:, answers.sees]
    diagonal = np.einsum("mubk,mk->mub", answers.squares, strength)
    cross = np.einsum("muk,mk->mu", answers.cross, strength)
    determinant = (1.0 + s[:, None] * diagonal).prod(-1)
    if s.shape[-1] == 2:
        determinant = determinant - s.prod(-1)[:, None] * np.abs(cross) ** 2
    return Balance(diagonal, cross, determinant)


def _amplitude(balance: Balance, population: Population, g: Array, s: Array) -> Array:
    """The factor c of s with < tr S M (1 + c S M)^-1 > = sum s g, the one that a solution has for c = 1."""
    sums = (s[:, None] * balance.diagonal).sum(-1)
    product = np.maximum(balance.determinant - 1.0 - sums, 0.0)
    wanted = (s * g).sum(-1)
    c = np.ones(len(s))
    for _ in range(_NEWTON):
        bottom = 1.0 + c[:, None] * (sums + c[:, None] * product)
        each = (sums + 2.0 * c[:, None] * product) / bottom
        value = each @ population.weight
        fall = (each**2 - 2.0 * product / bottom) @ population.weight
        # 1 / value is concave in c, so that Newton's steps come from below.
        c = np.maximum(c + (1.0 / wanted - 1.0 / value) * value**2 / fall, 1e-12)
    return c


def _kernel(balance: Balance, s: Array) -> tuple[Array, Complex]:
    """S (1 + M S)^-1: diagonal (m, unit, seen) and the entry above it."""
    if s.shape[-1] == 1:
        return s[:, None] / balance.determinant[..., None], np.zeros_like(balance.cross)
    other = 1.0 + (s[:, None] * balance.diagonal)[..., ::-1]
    diagonal = s[:, None] * other / balance.determinant[..., None]
    return diagonal, -s.prod(-1)[:, None] * balance.cross / balance.determinant


def _next(answers: Answers, population: Population, balance: Balance, s: Array) -> tuple[Array, Array]:
    weight = population.weight
    if s.shape[-1] == 1:
        seen = balance.diagonal / balance.determinant[..., None]
    else:
        minor = balance.diagonal.prod(-1) - np.abs(balance.cross) ** 2
        seen = (balance.diagonal + s[:, None, ::-1] * minor[..., None]) / balance.determinant[..., None]
    g = np.einsum("mub,u->mb", seen, weight)
    diagonal, above = _kernel(balance, s)
    weighed = np.einsum("mubk,mub,u->mk", answers.squares, diagonal, weight)
    # conj(H_1) K_12 H_2 and its conjugate
    weighed = weighed + 2.0 * np.einsum("muk,mu,u->mk", answers.cross.conj(), above, weight).real
    new = np.zeros_like(s)
    for block, target in enumerate(answers.sees):
        new[:, target] += population.variance[block] * weighed[:, block]
    return g, new


def _random_part(answers: Answers, population: Population, g: Array, s: Array) -> Complex:
    """< tr H' L H^dagger S (1 + M S)^-1 >."""
    diagonal, above = _kernel(_balance(answers, population, g, s), s)
    turned = answers.value.conj() * diagonal[..., None]
    if s.shape[-1] == 2:
        first, second = answers.value[..., 0, :].conj(), answers.value[..., 1, :].conj()
        turned[..., 0, :] += second * above.conj()[..., None]
        turned[..., 1, :] += first * above[..., None]
    strength = population.variance * g[:, answers.sees]
    return np.asarray(np.einsum("mubk,mubk,mk,u->m", turned, answers.derivative, strength, population.weight))


def expansion_rate(population: Population, factors: Array) -> Array:
    r""":math:`d \ln|\det(1 - t H(0) U)| / d\ln t` per unit at factors t (m,), :math:`\sum_b s_b g_b`."""
    found = np.zeros(factors.shape)
    transfer = transfer_matrix(population, np.zeros(1)) * factors[:, None, None] ** 2
    each = max(1, _AT_ONCE // population.weight.size)
    active = np.flatnonzero(perron(transfer) > 1.0)
    at_rest = _answers(population, np.zeros(1, dtype=complex))
    for part in (active[k : k + each] for k in range(0, active.size, each)):
        scale = factors[part, None, None, None]
        answers = Answers(
            scale * at_rest.value,
            scale * at_rest.derivative,
            scale**2 * at_rest.squares,
            scale[..., 0] ** 2 * at_rest.cross,
            at_rest.sees,
        )
        g, s = _solve(answers, population, transfer[part])
        found[part] = (g * s).sum(-1)
    return found


def enclosed(population: Population, curve: Complex, steps: Complex) -> float:
    r"""Eigenvalues per unit inside a closed curve, whose upper half is given by points :math:`\lambda_j` with
    the increments :math:`d\lambda_j` of a quadrature; the lower half mirrors it."""
    return float((trace(population, curve) * steps).sum().imag / np.pi)
