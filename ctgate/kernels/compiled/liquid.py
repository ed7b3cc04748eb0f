"""The liquid time constant cell, compiled: see :mod:`ctgate.kernels.fused.liquid`.

``rows`` (step, sample * hidden) are the pre-activations of f, which become values, ``fixed`` (1, 2 hidden)
the reversal values and tau.
"""

from typing import no_type_check

from ctgate.kernels.compiled.elementary import compiled, sigmoid


@compiled
@no_type_check
def forward(hidden, k, keep, scales, hs, outs, rows, fixed):
    """f, and what the step makes of it: keep h + scale (tau f (A - h) - h)."""
    h, out, own, scale = hs[k], outs[k], rows[k], scales[k]
    reversal, unit = fixed[0, :hidden], fixed[0, hidden:]
    for at in range(0, h.size, hidden):
        f, before, after = own[at : at + hidden], h[at : at + hidden], out[at : at + hidden]
        for i in range(hidden):
            f[i] = sigmoid(f[i])
        for i in range(hidden):
            drawn = unit[i] * f[i] * (reversal[i] - before[i])
            after[i] = keep * before[i] + scale * (drawn - before[i])


@compiled
@no_type_check
def backward(hidden, k, j, keep, scales, hs, along, pres, outs, rows, fixed):
    """The cotangents of the pre-activations, and what the state's own gets past the product."""
    h, a, pre, out, own, scale = hs[k], along[k], pres[k], outs[j], rows[k], scales[k]
    one = own.dtype.type(1)
    reversal, unit = fixed[0, :hidden], fixed[0, hidden:]
    for at in range(0, h.size, hidden):
        f, before, after = own[at : at + hidden], h[at : at + hidden], out[at : at + hidden]
        cotangent, of_f = a[at : at + hidden], pre[at : at + hidden]
        for i in range(hidden):
            moved, opened = scale * cotangent[i], unit[i] * f[i]
            of_f[i] = moved * opened * (one - f[i]) * (reversal[i] - before[i])
            after[i] += keep * cotangent[i] - moved * (opened + one)


@compiled
@no_type_check
def push(hidden, k, keep, scales, hs, vs, pres, outs, rows, fixed):
    """Adds what a step makes of the tangents of its state and of its pre-activations."""
    h, v, pre, out, own, scale = hs[k], vs[k], pres[k], outs[k], rows[k], scales[k]
    one = own.dtype.type(1)
    reversal, unit = fixed[0, :hidden], fixed[0, hidden:]
    for at in range(0, v.size, hidden):
        here = at % h.size
        f, state, of_f = own[here : here + hidden], h[here : here + hidden], pre[at : at + hidden]
        before, after = v[at : at + hidden], out[at : at + hidden]
        for i in range(hidden):
            opened = unit[i] * f[i]
            drawn = opened * (one - f[i]) * (reversal[i] - state[i]) * of_f[i]
            after[i] += (keep - scale * (opened + one)) * before[i] + scale * drawn
