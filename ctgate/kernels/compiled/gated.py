"""The cells with one gate, compiled: see :mod:`ctgate.kernels.fused.gated`.

``rows`` (step, sample * (gates + hidden)) are the pre-activations of gates, if there are any, and candidate,
which become values.
"""

from typing import no_type_check

from numba import njit

from ctgate.kernels.compiled.elementary import compiled, sigmoid, tanh


@njit(fastmath={"contract", "nsz", "reassoc"})
@no_type_check
def _moved(a, n, h):
    """The sum of a (n - h), in whatever order is fast."""
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * (n[i] - h[i])
    return total


@compiled
@no_type_check
def forward(hidden, k, keep, scales, hs, outs, rows):
    """Gates, candidate, and what the step makes of them: keep h + scale g (n - h)."""
    h, out, own, scale = hs[k], outs[k], rows[k], scales[k]
    samples = h.size // hidden
    width = own.size // max(1, samples)
    gates = width - hidden
    for sample in range(samples):
        at, first = sample * hidden, sample * width
        gate, n = own[first : first + gates], own[first + gates : first + width]
        before, after = h[at : at + hidden], out[at : at + hidden]
        for i in range(gates):
            gate[i] = sigmoid(gate[i])
        for i in range(hidden):
            n[i] = tanh(n[i])
        if gates == hidden:
            for i in range(hidden):
                after[i] = keep * before[i] + scale * gate[i] * (n[i] - before[i])
        else:
            weight = scale * gate[0] if gates else scale
            for i in range(hidden):
                after[i] = keep * before[i] + weight * (n[i] - before[i])


@compiled
@no_type_check
def backward(hidden, k, j, keep, scales, hs, along, pres, outs, rows):
    """The cotangents of the pre-activations, and what the state's own gets past the product."""
    h, a, pre, out, own, scale = hs[k], along[k], pres[k], outs[j], rows[k], scales[k]
    samples, one = h.size // hidden, own.dtype.type(1)
    width = own.size // max(1, samples)
    gates = width - hidden
    for sample in range(samples):
        at, first = sample * hidden, sample * width
        gate, n = own[first : first + gates], own[first + gates : first + width]
        of_gate, of_n = pre[first : first + gates], pre[first + gates : first + width]
        before, after, cotangent = h[at : at + hidden], out[at : at + hidden], a[at : at + hidden]
        if gates == hidden:
            for i in range(hidden):
                opening = scale * gate[i] * cotangent[i]
                of_n[i] = opening * (one - n[i] * n[i])
                of_gate[i] = opening * (one - gate[i]) * (n[i] - before[i])
                after[i] += keep * cotangent[i] - opening
        else:
            weight = scale * gate[0] if gates else scale
            for i in range(hidden):
                opening = weight * cotangent[i]
                of_n[i] = opening * (one - n[i] * n[i])
                after[i] += keep * cotangent[i] - opening
            if gates:
                of_gate[0] = weight * (one - gate[0]) * _moved(cotangent, n, before)


@compiled
@no_type_check
def push(hidden, k, keep, scales, hs, vs, pres, outs, rows):
    """Adds what a step makes of the tangents of its state and of its pre-activations."""
    h, v, pre, out, own, scale = hs[k], vs[k], pres[k], outs[k], rows[k], scales[k]
    samples, one = h.size // hidden, own.dtype.type(1)
    width = own.size // max(1, samples)
    gates = width - hidden
    for item in range(v.size // hidden):
        at, first = item * hidden, item * width
        here, start = at % h.size, first % own.size
        gate, n = own[start : start + gates], own[start + gates : start + width]
        of_gate, of_n = pre[first : first + gates], pre[first + gates : first + width]
        state, before, after = h[here : here + hidden], v[at : at + hidden], out[at : at + hidden]
        if gates == hidden:
            for i in range(hidden):
                weight = scale * gate[i]
                moved = (one - n[i] * n[i]) * of_n[i] + (one - gate[i]) * (n[i] - state[i]) * of_gate[i]
                after[i] += (keep - weight) * before[i] + weight * moved
        else:
            weight = scale * gate[0] if gates else scale
            opened = (one - gate[0]) * of_gate[0] if gates else of_n.dtype.type(0)
            for i in range(hidden):
                moved = (one - n[i] * n[i]) * of_n[i] + opened * (n[i] - state[i])
                after[i] += (keep - weight) * before[i] + weight * moved
