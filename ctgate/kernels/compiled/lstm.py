r"""The LSTM, compiled: see :mod:`ctgate.kernels.fused.lstm`.

``rows`` (step, sample * 4 hidden) are the pre-activations o, i, f, g, which become values, those of f with
the opposite sign; ``ys`` (step, sample * hidden) is y. Of a state c comes before h.
"""

from typing import no_type_check

from ctgate.kernels.compiled.elementary import compiled, sigmoid, tanh


@compiled
@no_type_check
def forward(hidden, k, keep, scales, hs, outs, rows, ys):
    """Gates, y, and what the step makes of them: keep c + scale d and keep h + scale (o y - h)."""
    state, out, own, shown, scale = hs[k], outs[k], rows[k], ys[k], scales[k]
    rest = keep - scale
    for sample in range(shown.size // hidden):
        at, first, start = sample * hidden, 4 * sample * hidden, 2 * sample * hidden
        o, i = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        f = own[first + 2 * hidden : first + 3 * hidden]
        g = own[first + 3 * hidden : first + 4 * hidden]
        c, h = state[start : start + hidden], state[start + hidden : start + 2 * hidden]
        to_c, to_h = out[start : start + hidden], out[start + hidden : start + 2 * hidden]
        y = shown[at : at + hidden]
        gates = own[first : first + 3 * hidden]
        for n in range(3 * hidden):
            gates[n] = sigmoid(gates[n])
        for n in range(hidden):
            g[n] = tanh(g[n])
        for n in range(hidden):
            d = i[n] * g[n] - f[n] * c[n]
            y[n] = tanh(c[n] + d)
            to_c[n] = keep * c[n] + scale * d
            to_h[n] = scale * o[n] * y[n] + rest * h[n]


@compiled
@no_type_check
def backward(hidden, k, j, keep, scales, hs, along, pres, outs, rows, ys):
    """The cotangents of the pre-activations, and what those of c and h get past the product."""
    state, a, pre, out, own, shown, scale = hs[k], along[k], pres[k], outs[j], rows[k], ys[k], scales[k]
    one, rest = own.dtype.type(1), keep - scale
    for sample in range(shown.size // hidden):
        at, first, start = sample * hidden, 4 * sample * hidden, 2 * sample * hidden
        o, i = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        f = own[first + 2 * hidden : first + 3 * hidden]
        g = own[first + 3 * hidden : first + 4 * hidden]
        of_o, of_i = pre[first : first + hidden], pre[first + hidden : first + 2 * hidden]
        of_f = pre[first + 2 * hidden : first + 3 * hidden]
        of_g = pre[first + 3 * hidden : first + 4 * hidden]
        c, y = state[start : start + hidden], shown[at : at + hidden]
        of_cell, of_hidden = a[start : start + hidden], a[start + hidden : start + 2 * hidden]
        to_c, to_h = out[start : start + hidden], out[start + hidden : start + 2 * hidden]
        for n in range(hidden):
            visible = scale * of_hidden[n]
            through = visible * o[n] * (one - y[n] * y[n])
            written = scale * of_cell[n] + through
            of_o[n] = visible * y[n] * o[n] * (one - o[n])
            of_i[n] = written * g[n] * i[n] * (one - i[n])
            of_f[n] = -written * c[n] * f[n] * (one - f[n])
            of_g[n] = written * i[n] * (one - g[n] * g[n])
            to_c[n] += (keep - scale * f[n]) * of_cell[n] + through * (one - f[n])
            to_h[n] += rest * of_hidden[n]


@compiled
@no_type_check
def push(hidden, k, keep, scales, hs, vs, pres, outs, rows, ys):
    """Adds what a step makes of the tangents of its state and of its pre-activations."""
    state, v, pre, out, own, shown, scale = hs[k], vs[k], pres[k], outs[k], rows[k], ys[k], scales[k]
    one, rest = own.dtype.type(1), keep - scale
    for item in range(v.size // (2 * hidden)):
        start, top = 2 * item * hidden, 4 * item * hidden
        here = start % state.size
        first, at = 2 * here, here // 2
        o, i = own[first : first + hidden], own[first + hidden : first + 2 * hidden]
        f = own[first + 2 * hidden : first + 3 * hidden]
        g = own[first + 3 * hidden : first + 4 * hidden]
        of_o, of_i = pre[top : top + hidden], pre[top + hidden : top + 2 * hidden]
        of_f = pre[top + 2 * hidden : top + 3 * hidden]
        of_g = pre[top + 3 * hidden : top + 4 * hidden]
        c, y = state[here : here + hidden], shown[at : at + hidden]
        of_cell, of_hidden = v[start : start + hidden], v[start + hidden : start + 2 * hidden]
        to_c, to_h = out[start : start + hidden], out[start + hidden : start + 2 * hidden]
        for n in range(hidden):
            written = g[n] * i[n] * (one - i[n]) * of_i[n] + i[n] * (one - g[n] * g[n]) * of_g[n]
            moved = written - f[n] * ((one - f[n]) * c[n] * of_f[n] + of_cell[n])
            seen = (one - y[n] * y[n]) * (of_cell[n] + moved) + y[n] * (one - o[n]) * of_o[n]
            to_c[n] += keep * of_cell[n] + scale * moved
            to_h[n] += rest * of_hidden[n] + scale * o[n] * seen
