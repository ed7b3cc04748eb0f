"""The GRU whose reset gate acts after the product, compiled: see :mod:`ctgate.kernels.fused.gru`.

``rows`` (step, sample * 4 hidden) are the pre-activations n, r, z, what r multiplies, which become values.
"""

from typing import no_type_check

from ctgate.kernels.compiled.elementary import compiled, sigmoid, tanh


@compiled
@no_type_check
def forward(hidden, k, keep, scales, hs, outs, rows):
    """Gates, candidate, and what the step makes of them: keep h + scale (1 - z)(n - h)."""
    h, out, own, scale = hs[k], outs[k], rows[k], scales[k]
    for sample in range(h.size // hidden):
        at, first = sample * hidden, 4 * sample * hidden
        n, r = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        gate = own[first + 2 * hidden : first + 3 * hidden]
        seen = own[first + 3 * hidden : first + 4 * hidden]
        before, after = h[at : at + hidden], out[at : at + hidden]
        for i in range(hidden):
            r[i] = sigmoid(r[i])
        for i in range(hidden):
            n[i] = tanh(n[i] + r[i] * seen[i])
        for i in range(hidden):
            opening = sigmoid(gate[i])
            gate[i] = opening
            after[i] = keep * before[i] + scale * opening * (n[i] - before[i])


@compiled
@no_type_check
def backward(hidden, k, j, keep, scales, hs, along, pres, outs, rows):
    """The cotangents of the pre-activations, and what the state's own gets past the product."""
    h, a, pre, out, own, scale = hs[k], along[k], pres[k], outs[j], rows[k], scales[k]
    one = own.dtype.type(1)
    for sample in range(h.size // hidden):
        at, first = sample * hidden, 4 * sample * hidden
        n, r = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        gate = own[first + 2 * hidden : first + 3 * hidden]
        seen = own[first + 3 * hidden : first + 4 * hidden]
        of_n, of_r = pre[first : first + hidden], pre[first + hidden : first + 2 * hidden]
        of_z = pre[first + 2 * hidden : first + 3 * hidden]
        of_seen = pre[first + 3 * hidden : first + 4 * hidden]
        before, after, cotangent = h[at : at + hidden], out[at : at + hidden], a[at : at + hidden]
        for i in range(hidden):
            opening = scale * gate[i] * cotangent[i]
            argument = opening * (one - n[i] * n[i])
            of_n[i] = argument
            of_seen[i] = argument * r[i]
            of_r[i] = argument * r[i] * seen[i] * (one - r[i])
            of_z[i] = opening * (one - gate[i]) * (n[i] - before[i])
            after[i] += keep * cotangent[i] - opening


@compiled
@no_type_check
def backward_within(hidden, k, j, keep, scales, hs, along, outs, rows):
    """:func:`backward` with the cotangents in the place of the values; what is in ``outs`` is overwritten."""
    h, a, out, own, scale = hs[k], along[k], outs[j], rows[k], scales[k]
    one = own.dtype.type(1)
    for sample in range(h.size // hidden):
        at, first = sample * hidden, 4 * sample * hidden
        n, r = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        gate = own[first + 2 * hidden : first + 3 * hidden]
        seen = own[first + 3 * hidden : first + 4 * hidden]
        before, after, cotangent = h[at : at + hidden], out[at : at + hidden], a[at : at + hidden]
        for i in range(hidden):
            opening = scale * gate[i] * cotangent[i]
            argument = opening * (one - n[i] * n[i])
            of_r = argument * r[i] * seen[i] * (one - r[i])
            gate[i] = opening * (one - gate[i]) * (n[i] - before[i])
            seen[i] = argument * r[i]
            n[i], r[i] = argument, of_r
            after[i] = keep * cotangent[i] - opening


@compiled
@no_type_check
def push(hidden, k, keep, scales, hs, vs, pres, outs, rows):
    """Adds what a step makes of the tangents of its state and of its pre-activations."""
    h, v, pre, out, own, scale = hs[k], vs[k], pres[k], outs[k], rows[k], scales[k]
    one = own.dtype.type(1)
    for item in range(v.size // hidden):
        at, first = item * hidden, 4 * item * hidden
        here = at % h.size
        n, r = own[4 * here : 4 * here + hidden], own[4 * here + hidden : 4 * here + 2 * hidden]
        gate = own[4 * here + 2 * hidden : 4 * here + 3 * hidden]
        seen = own[4 * here + 3 * hidden : 4 * here + 4 * hidden]
        of_n, of_r = pre[first : first + hidden], pre[first + hidden : first + 2 * hidden]
        of_z = pre[first + 2 * hidden : first + 3 * hidden]
        of_seen = pre[first + 3 * hidden : first + 4 * hidden]
        state, before, after = h[here : here + hidden], v[at : at + hidden], out[at : at + hidden]
        for i in range(hidden):
            opening = scale * gate[i]
            argument = of_n[i] + r[i] * (of_seen[i] + seen[i] * (one - r[i]) * of_r[i])
            after[i] += (
                (keep - opening) * before[i]
                + opening * (one - n[i] * n[i]) * argument
                + opening * (one - gate[i]) * (n[i] - state[i]) * of_z[i]
            )
