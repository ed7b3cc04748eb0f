"""The right-hand sides of DETEST for scipy: numpy, one state, written apart from those in torch.

Sources: as :mod:`tests.reference.detest`. Linear systems are matrices here, orbits complex numbers, the five
bodies a loop over pairs.
"""

import math

import numpy as np

Array = np.ndarray


def a1(t: float, y: Array) -> Array:
    return np.negative(y)


def a2(t: float, y: Array) -> Array:
    return y * y * y / -2.0


def a3(t: float, y: Array) -> Array:
    return math.cos(t) * y


def a4(t: float, y: Array) -> Array:
    return y * (20.0 - y) / 80.0


def a5(t: float, y: Array) -> Array:
    return 1.0 - 2.0 * t / (y + t)


def b1(t: float, y: Array) -> Array:
    prey, predator = y
    return np.array([2.0 * prey * (1.0 - predator), predator * (prey - 1.0)])


_B2 = np.array([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]])


def b2(t: float, y: Array) -> Array:
    return _B2 @ y


def b3(t: float, y: Array) -> Array:
    first, second = y[0], y[1] ** 2
    return np.array([-first, first - second, second])


def b4(t: float, y: Array) -> Array:
    """In the plane of y1 and y2: turn at the rate 1, and shrink at the speed y3."""
    z = complex(y[0], y[1])
    unit = z / abs(z)
    flow = 1j * z - y[2] * unit
    return np.array([flow.real, flow.imag, unit.real])


def b5(t: float, y: Array) -> Array:
    a, b, c = y
    return np.array([b * c, -a * c, -0.51 * a * b])


def _chain(rates: Array) -> Array:
    """Decay at ``rates`` from each nuclide to the next; the last one is stable."""
    leaving = np.append(rates, 0.0)
    return np.diag(rates, -1) - np.diag(leaving)


_C1 = _chain(np.ones(9))
_C2 = _chain(np.arange(1.0, 10.0))
_C3 = np.diag(np.ones(9), 1) + np.diag(np.ones(9), -1) - 2.0 * np.eye(10)
_C4 = np.diag(np.ones(50), 1) + np.diag(np.ones(50), -1) - 2.0 * np.eye(51)


def c1(t: float, y: Array) -> Array:
    return _C1 @ y


def c2(t: float, y: Array) -> Array:
    return _C2 @ y


def c3(t: float, y: Array) -> Array:
    return _C3 @ y


def c4(t: float, y: Array) -> Array:
    return _C4 @ y


# Jupiter, Saturn, Uranus, Neptune, Pluto, in masses of the sun; the first one is sun and inner planets.
_MASSES = (0.954786104043e-3, 0.285583733151e-3, 0.437273164546e-4, 0.517759138449e-4, 0.277777777778e-5)
_CENTRE, _K2 = 1.00000597682, 2.95912208286


def c5(t: float, y: Array) -> Array:
    """Newton's law for each pair in the accelerated frame of the sun, which every planet pulls as well."""
    places = y[:15].reshape(5, 3)
    forces = []
    for j, place in enumerate(places):
        total = -(_CENTRE + _MASSES[j]) * place / np.linalg.norm(place) ** 3
        for k, other in enumerate(places):
            if k != j:
                arm = other - place
                total = total + _MASSES[k] * arm / np.linalg.norm(arm) ** 3
                total = total - _MASSES[k] * other / np.linalg.norm(other) ** 3
        forces.append(_K2 * total)
    return np.concatenate([y[15:], *forces])


def orbit(t: float, y: Array) -> Array:
    z = complex(y[0], y[1])
    pull = -z / abs(z) ** 3
    return np.array([y[2], y[3], pull.real, pull.imag])


def e1(t: float, y: Array) -> Array:
    """x^2 y'' + x y' + (x^2 - 1/4) y = 0 with x = t + 1."""
    x = t + 1.0
    return np.array([y[1], -(x * y[1] + (x * x - 0.25) * y[0]) / (x * x)])


def e2(t: float, y: Array) -> Array:
    return np.array([y[1], y[1] - y[0] - y[0] * y[0] * y[1]])


def e3(t: float, y: Array) -> Array:
    return np.array([y[1], y[0] * (y[0] * y[0] / 6.0 - 1.0) + 2.0 * math.sin(2.78535 * t)])


def e4(t: float, y: Array) -> Array:
    return np.array([y[1], 0.4 * (0.08 - y[1] ** 2)])


def e5(t: float, y: Array) -> Array:
    return np.array([y[1], math.hypot(1.0, y[1]) / (25.0 - t)])
