"""The GRU whose reset gate acts before the product, compiled: see :mod:`ctgate.kernels.fused.gru_before`.

``gates`` (step, sample * 2 hidden) are the pre-activations r, z, ``seens`` r h and ``rows`` the candidate's
pre-activation, (step, sample * hidden); pre-activations become values. Cotangents are those of r, z, n, r h.
"""

from typing import no_type_check

from ctgate.kernels.compiled.elementary import compiled, sigmoid, tanh


@compiled
@no_type_check
def reset(hidden, k, keep, scales, hs, outs, gates, seens, rows):
    """Gates, and what of the state the candidate sees."""
    h, own, seen = hs[k], gates[k], seens[k]
    for at in range(0, h.size, hidden):
        block, r = own[2 * at : 2 * (at + hidden)], own[2 * at : 2 * at + hidden]
        before, product = h[at : at + hidden], seen[at : at + hidden]
        for i in range(2 * hidden):
            block[i] = sigmoid(block[i])
        for i in range(hidden):
            product[i] = r[i] * before[i]


@compiled
@no_type_check
def forward(hidden, k, keep, scales, hs, outs, gates, seens, rows):
    """Candidate, and what the step makes of it: keep h + scale (1 - z)(n - h)."""
    h, out, own, target, scale = hs[k], outs[k], gates[k], rows[k], scales[k]
    for at in range(0, h.size, hidden):
        gate, n = own[2 * at + hidden : 2 * (at + hidden)], target[at : at + hidden]
        before, after = h[at : at + hidden], out[at : at + hidden]
        for i in range(hidden):
            n[i] = tanh(n[i])
        for i in range(hidden):
            after[i] = keep * before[i] + scale * gate[i] * (n[i] - before[i])


@compiled
@no_type_check
def outside(hidden, k, j, keep, scales, hs, along, pres, outs, gates, seens, rows):
    """The cotangents of z and n, room for that of r h, and what the state's own gets past the products."""
    h, a, pre, out, own, target = hs[k], along[k], pres[k], outs[j], gates[k], rows[k]
    scale, one, zero = scales[k], own.dtype.type(1), own.dtype.type(0)
    for at in range(0, h.size, hidden):
        first = 4 * at
        gate, n = own[2 * at + hidden : 2 * (at + hidden)], target[at : at + hidden]
        of_z, of_n = pre[first + hidden : first + 2 * hidden], pre[first + 2 * hidden : first + 3 * hidden]
        of_seen = pre[first + 3 * hidden : first + 4 * hidden]
        before, after, cotangent = h[at : at + hidden], out[at : at + hidden], a[at : at + hidden]
        for i in range(hidden):
            opening = scale * gate[i] * cotangent[i]
            of_n[i] = opening * (one - n[i] * n[i])
            of_z[i] = opening * (one - gate[i]) * (n[i] - before[i])
            of_seen[i] = zero
            after[i] += keep * cotangent[i] - opening


@compiled
@no_type_check
def backward(hidden, k, j, keep, scales, hs, along, pres, outs, gates, seens, rows):
    """The cotangent of r, and what the state's own gets from that of r h."""
    pre, out, own, seen = pres[k], outs[j], gates[k], seens[k]
    one = own.dtype.type(1)
    for at in range(0, seen.size, hidden):
        first = 4 * at
        r, product = own[2 * at : 2 * at + hidden], seen[at : at + hidden]
        of_r, of_seen = pre[first : first + hidden], pre[first + 3 * hidden : first + 4 * hidden]
        after = out[at : at + hidden]
        for i in range(hidden):
            of_r[i] = of_seen[i] * product[i] * (one - r[i])
            after[i] += of_seen[i] * r[i]
