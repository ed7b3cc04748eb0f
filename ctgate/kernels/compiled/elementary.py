r"""exp, the logistic function and tanh for compiled loops, in float32 and float64.

Within 2 units in the last place, the logistic function within 3, of every value that is a normal number.
Where one is smaller, exp and the logistic function may give 0 (in float32 from e^-87.7 and sigmoid(-88.4)
on, in float64 from e^-708.7 and sigmoid(-709.4)); exp is infinite from e^88.4 and e^709.4. NaN gives NaN.
They are made of operations that a compiler turns into vector instructions, without a table or a branch.

exp reduces its argument to :math:`x = n \ln 2 + r`, :math:`|r| \le \tfrac12 \ln 2`. Adding a large number
whose last bit counts 1 rounds to n, which then stands in the last bits of the sum. The argument is kept
between two whole numbers for which the bits of :math:`2^n` are those of 0 and of infinity. tanh is a
polynomial (float32) or a rational function (float64) where :math:`|x| < 0.625`, and above it
:math:`1 - 2 / (e^{2|x|} + 1)`, which does not cancel there.

Source of the coefficients, but for Taylor's: S. L. Moshier, Cephes Mathematical Library (expf, tanhf, tanh).
"""

import math
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# What a compiler may assume: sums of products contract, and the sign of zero does not matter. NaN and
# infinity keep their meaning, and sums their order.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
_VERSION = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"


def compiled(function: Callable[..., None]) -> Any:
    """A compiled loop over arrays, which lets go of the interpreter's lock and is kept on disk."""
    # Numba compares the file of the loop with what is on disk, not this one, which is compiled into it.
    function.__qualname__ += f"_{_VERSION}"
    loop = njit(nogil=True, **_OPTIONS)(function)
    # There may be no directory to keep it in: it is then compiled in every process.
    with suppress(RuntimeError):
        loop.enable_caching()
    return loop


@intrinsic
@no_type_check
def _power_of_two(typing, shifted):
    """2^n from a number whose last bits are n."""
    bits, mantissa, bias = (32, 23, 127) if shifted == types.float32 else (64, 52, 1023)

    def generate(context, builder, signature, arguments):
        whole = ir.IntType(bits)
        n = builder.shl(builder.bitcast(arguments[0], whole), ir.Constant(whole, mantissa))
        return builder.bitcast(builder.add(n, ir.Constant(whole, bias << mantissa)), arguments[0].type)

    return shifted(shifted), generate


@no_type_check
def exp(x):
    """e^x."""
    raise NotImplementedError("for compiled code only")


@no_type_check
def sigmoid(x):
    """1 / (1 + e^-x)."""
    raise NotImplementedError("for compiled code only")


@no_type_check
def tanh(x):
    """The hyperbolic tangent."""
    raise NotImplementedError("for compiled code only")


@overload(exp, jit_options=_OPTIONS)
@no_type_check
def _exp(x):
    if x == types.float32:
        return _single_exp()
    return _double_exp()


@no_type_check
def _single_exp():
    one, low, high, shift, inverse, coarse, fine = map(
        np.float32, (1.0, -88.0, 89.0, 1.5 * 2**23, 1.0 / math.log(2.0), 0.693359375, -2.12194440e-4)
    )
    c2, c3, c4, c5, c6, c7 = map(
        np.float32,
        (
            5.0000001201e-1,
            1.6666665459e-1,
            4.1665795894e-2,
            8.3334519073e-3,
            1.3981999507e-3,
            1.9875691500e-4,
        ),
    )

    def function(x):
        x = high if x > high else x
        x = low if x < low else x
        shifted = x * inverse + shift
        n = shifted - shift
        r = x - n * coarse - n * fine
        series = ((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2
        return (series * (r * r) + r + one) * _power_of_two(shifted)

    return function


@no_type_check
def _double_exp():
    shift, inverse, coarse, fine = (
        1.5 * 2**52,
        1.0 / math.log(2.0),
        0.693145751953125,
        1.42860682030941723212e-6,
    )
    c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13 = (1.0 / math.factorial(k) for k in range(2, 14))

    def function(x):
        x = 710.0 if x > 710.0 else x
        x = -709.0 if x < -709.0 else x
        shifted = x * inverse + shift
        n = shifted - shift
        r = x - n * coarse - n * fine
        series = ((c13 * r + c12) * r + c11) * r + c10
        series = (((series * r + c9) * r + c8) * r + c7) * r + c6
        series = (((series * r + c5) * r + c4) * r + c3) * r + c2
        return (series * (r * r) + r + 1.0) * _power_of_two(shifted)

    return function


@overload(sigmoid, jit_options=_OPTIONS)
@no_type_check
def _sigmoid(x):
    one = np.float32(1.0) if x == types.float32 else 1.0

    def function(x):
        return one / (one + exp(-x))

    return function


@overload(tanh, jit_options=_OPTIONS)
@no_type_check
def _tanh(x):
    if x == types.float32:
        return _single_tanh()
    return _double_tanh()


@no_type_check
def _single_tanh():
    zero, one, two, near = map(np.float32, (0.0, 1.0, 2.0, 0.625))
    c1, c2, c3, c4, c5 = map(
        np.float32,
        (-3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3),
    )

    def function(x):
        size, square = abs(x), x * x
        inside = ((((c5 * square + c4) * square + c3) * square + c2) * square + c1) * square * x + x
        outside = one - two / (exp(two * size) + one)
        outside = outside if x > zero else -outside
        return inside if size < near else outside

    return function


@no_type_check
def _double_tanh():
    p0, p1, p2 = -1.61468768441708447952e3, -9.92877231001918586564e1, -9.64399179425052238628e-1
    q0, q1, q2 = 4.84406305325125486048e3, 2.23548839060100448583e3, 1.12811678491632931402e2

    def function(x):
        size, square = abs(x), x * x
        quotient = ((p2 * square + p1) * square + p0) / (((square + q2) * square + q1) * square + q0)
        inside = x + x * square * quotient
        outside = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
        outside = outside if x > 0.0 else -outside
        return inside if size < 0.625 else outside

    return function
