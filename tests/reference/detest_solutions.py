r"""Solutions of DETEST: 21 in closed form, and the printed states at t = 20.

The closed forms are derived here; :data:`END` is EVALU of W. H. Enright and J. D. Pryce, ACM Trans. Math.
Softw. 13 (1987) 1, algorithm 648.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import special
from scipy.optimize import brentq

Array = np.ndarray


def a1(t: float) -> Array:
    return np.array([math.exp(-t)])


def a2(t: float) -> Array:
    return np.array([1.0 / math.sqrt(1.0 + t)])


def a3(t: float) -> Array:
    return np.array([math.exp(math.sin(t))])


def a4(t: float) -> Array:
    return np.array([20.0 / (1.0 + 19.0 * math.exp(-0.25 * t))])


def a5(t: float) -> Array:
    r"""In polar coordinates of (t, y) the curve is :math:`r = 4 e^{\pi/2 - \theta}`."""

    def miss(y: float) -> float:
        return math.log(math.hypot(t, y) / 4.0) - 0.5 * math.pi + math.atan2(y, t)

    # y falls once it is below t, and y + t > 0; the left side increases in y there and above.
    return np.array([brentq(miss, -t + 1e-12, 20.0, xtol=1e-15, rtol=1e-15)])


def b2(t: float) -> Array:
    """Three eigenvectors of a symmetric matrix, with eigenvalues 0, -1 and -3."""
    slow, fast = 0.5 * math.exp(-t), 0.5 * math.exp(-3.0 * t)
    return np.array([1.0 + slow + fast, 1.0 - 2.0 * fast, 1.0 - slow + fast])


def b3(t: float) -> Array:
    r"""y2 = w'/w turns the second equation into :math:`w'' = e^{-t} w`, modified Bessel functions of
    :math:`s = 2 e^{-t/2}`."""
    a, b = special.k1(2.0), special.i1(2.0)
    s = 2.0 * math.exp(-0.5 * t)
    second = -0.5 * s * (a * special.i1(s) - b * special.k1(s)) / (a * special.i0(s) + b * special.k0(s))
    first = math.exp(-t)
    return np.array([first, second, 1.0 - first - second])


def b4(t: float) -> Array:
    """The point (y1, y2) turns once in 2 pi at the radius 2 + cos t."""
    radius = 2.0 + math.cos(t)
    return np.array([radius * math.cos(t), radius * math.sin(t), math.sin(t)])


def b5(t: float) -> Array:
    """Jacobi's sn, cn, dn of parameter (squared modulus) 0.51."""
    return np.array(special.ellipj(t, 0.51)[:3])


def c1(t: float) -> Array:
    """Poisson probabilities of 0 to 8 decays, and of more."""
    first = np.array([math.exp(-t) * t**k / math.factorial(k) for k in range(9)])
    return np.append(first, special.gammainc(9.0, t))


def c2(t: float) -> Array:
    """The numbers in a pure birth process: geometric probabilities."""
    grown = -math.expm1(-t)
    return np.append(math.exp(-t) * grown ** np.arange(9), grown**9)


def _heat(points: int, t: float) -> Array:
    """Sine modes of the second difference, which decay at the rates 4 sin^2."""
    k = np.arange(1, points + 1)
    angle = math.pi * k / (points + 1)
    decay = np.exp(-4.0 * t * np.sin(0.5 * angle) ** 2)
    return 2.0 / (points + 1) * np.sin(np.outer(k, angle)) @ (decay * np.sin(angle))


def _kepler(e: float, t: float) -> Array:
    """Kepler's equation t = E - e sin E for the eccentric anomaly E."""
    anomaly = brentq(lambda x: x - e * math.sin(x) - t, t - 1.0, t + 1.0, xtol=1e-15, rtol=1e-15)
    side = math.sqrt(1.0 - e * e)
    rate = 1.0 / (1.0 - e * math.cos(anomaly))
    return np.array(
        [
            math.cos(anomaly) - e,
            side * math.sin(anomaly),
            -math.sin(anomaly) * rate,
            side * math.cos(anomaly) * rate,
        ]
    )


def e1(t: float) -> Array:
    r""":math:`J_{1/2}(x) = \sqrt{2/(\pi x)} \sin x` at x = t + 1."""
    x = t + 1.0
    size = math.sqrt(2.0 / (math.pi * x))
    return size * np.array([math.sin(x), math.cos(x) - 0.5 * math.sin(x) / x])


def e4(t: float) -> Array:
    """The speed tends to its limit sqrt(0.08) as a hyperbolic tangent."""
    limit = math.sqrt(0.08)
    return np.array([30.0 + math.log(math.cosh(0.4 * limit * t)) / 0.4, limit * math.tanh(0.4 * limit * t)])


def e5(t: float) -> Array:
    """y' = sinh w with w' = 1 / (25 - t)."""
    left = (25.0 - t) / 25.0
    return np.array([-12.5 * math.log(left) - 6.25 * (1.0 - left**2), 0.5 * (1.0 / left - left)])


EXACT: dict[str, Callable[[float], Array]] = {
    "A1": a1, "A2": a2, "A3": a3, "A4": a4, "A5": a5,
    "B2": b2, "B3": b3, "B4": b4, "B5": b5,
    "C1": c1, "C2": c2, "C3": partial(_heat, 10), "C4": partial(_heat, 51),
    "D1": partial(_kepler, 0.1), "D2": partial(_kepler, 0.3), "D3": partial(_kepler, 0.5),
    "D4": partial(_kepler, 0.7), "D5": partial(_kepler, 0.9),
    "E1": e1, "E4": e4, "E5": e5,
}  # fmt: skip

END: dict[str, tuple[float, ...]] = {
    "A1": (2.061153622438558e-09,),
    "A2": (0.2182178902359887,),
    "A3": (2.491650271850414,),
    "A4": (17.73016648131483,),
    "A5": (-0.7887826688964196,),
    "B1": (0.6761876008576667, 0.1860816099640036),
    "B2": (1.000000001030576, 1.0, 0.9999999989694235),
    "B3": (2.061153488557776e-09, 5.257228022048349e-02, 0.9474277177183630),
    "B4": (0.9826950928005993, 2.198447081694832, 0.9129452507276399),
    "B5": (-0.9396570798729192, -0.3421177754000779, 0.7414126596199957),
    "C1": (
        2.061153622240064e-09, 4.122307244619555e-08, 4.122307244716968e-07, 2.748204829855288e-06,
        1.374102414941961e-05, 5.496409659803266e-05, 1.832136553274552e-04, 5.234675866508716e-04,
        1.308668966628220e-03, 9.979127409508656e-01,
    ),
    "C2": (
        2.061153577984930e-09, 2.061153573736588e-09, 2.061153569488245e-09, 2.061153565239902e-09,
        2.061153560991560e-09, 2.061153556743217e-09, 2.061153552494874e-09, 2.061153548246532e-09,
        2.061153543998189e-09, 9.999999814496180e-01,
    ),
    "C3": (
        2.948119211022058e-03, 5.635380154844266e-03, 7.829072515926013e-03, 9.348257908594937e-03,
        1.007943610301970e-02, 9.982674171429909e-03, 9.088693332766085e-03, 7.489115195185912e-03,
        5.322964130953349e-03, 2.762434379029886e-03,
    ),
    "C4": (
        3.124111453721466e-03, 6.015416842150318e-03, 8.470021834842650e-03, 1.033682931733337e-02,
        1.153249572873923e-02, 1.204549525737964e-02, 1.192957068015293e-02, 1.128883207111195e-02,
        1.025804501391024e-02, 8.982017581934167e-03, 7.597500902492453e-03, 6.219920556824985e-03,
        4.935916341009131e-03, 3.801432544256119e-03, 2.844213677587894e-03, 2.069123394222672e-03,
        1.464687282843915e-03, 1.009545263941126e-03, 6.779354330227017e-04, 4.437815269118510e-04,
        2.833264542938954e-04, 1.765005798796805e-04, 1.073342592697238e-04, 6.374497601777217e-05,
        3.698645309704183e-05, 2.097466832643746e-05, 1.162956710412555e-05, 6.306710405783322e-06,
        3.346286430868515e-06, 1.737760074184334e-06, 8.835366904275847e-07, 4.399520411127637e-07,
        2.146181897152360e-07, 1.025981211654928e-07, 4.807864068784215e-08, 2.209175152474847e-08,
        9.956251263138180e-09, 4.402193653748924e-09, 1.910149382204028e-09, 8.135892921473050e-10,
        3.402477118549235e-10, 1.397485617545782e-10, 5.638575303049199e-11, 2.235459707956947e-11,
        8.710498036398032e-12, 3.336554275346643e-12, 1.256679567784939e-12, 4.654359053128788e-13,
        1.693559145599857e-13, 5.996593816663054e-14, 1.891330702629865e-14,
    ),
    "C5": (
        -4.792730224323733, -2.420550725448973, -9.212509306014886e-01, -4.217310404035213,
        7.356202947498970, 3.223785985421212, 4.035559443262270, 17.19865528670555, 7.478910794233703,
        -29.98759326324844, -4.107310937550929, -9.277008321754407e-01, -24.42125302518482,
        23.81459045746554, 14.92096306951359,
        3.499208963063806e-01, -5.748487687912825e-01, -2.551694020879149e-01, -5.237040978903326e-01,
        -2.493000463579661e-01, -8.045341642044464e-02, -3.875289237334110e-01, 5.648603288767891e-02,
        3.023606472143342e-02, 4.133856546712445e-02, -2.862393029841379e-01, -1.183032405136207e-01,
        -1.511986457359206e-01, -2.460068894318766e-01, -3.189687411323877e-02,
    ),
    "D1": (2.198835352008397e-01, 9.427076846341813e-01, -9.787659841058176e-01, 3.287977990962036e-01),
    "D2": (-1.777027357140412e-01, 9.467784719905892e-01, -1.030294163192969, 1.211074890053952e-01),
    "D3": (-5.780432953035361e-01, 8.633840009194193e-01, -9.595083730380727e-01, -6.504915126712089e-02),
    "D4": (-9.538990293416394e-01, 6.907409024219432e-01, -8.212674270877433e-01, -1.539574259125825e-01),
    "D5": (-1.295266250987574, 4.003938963792321e-01, -6.775390924707566e-01, -1.270838154278686e-01),
    "E1": (1.456723600728308e-01, -9.883500195574063e-02),
    "E2": (2.008149762174948, -4.250887527320057e-02),
    "E3": (-1.004178858647128e-01, 2.411400132095954e-01),
    "E4": (33.95091444646555, 2.767822659672869e-01),
    "E5": (14.11797390542629, 2.400000000000002),
}  # fmt: skip
