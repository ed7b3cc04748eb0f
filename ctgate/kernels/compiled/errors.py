"""The size of a Runge-Kutta step's error, compiled."""

from typing import no_type_check

from ctgate.kernels.compiled.elementary import compiled


@compiled
@no_type_check
def ratios(rows, weights, sizes, following, rtol, atol, error, out):
    """``out`` (sample,) is the root mean square over units of e / (atol + rtol max(|h|, |h'|)), NaN where a
    state is not finite: h is the first of ``rows`` (row, sample * state), h' is ``following``, and e is the
    size of a step times the weighted sum of the other rows. ``error`` (state,) is for what is between."""
    state = error.size
    for sample in range(out.size):
        at = sample * state
        before, after = rows[0, at : at + state], following[at : at + state]
        for i in range(state):
            error[i] = 0
        for k in range(weights.size):
            weight, row = sizes[sample] * weights[k], rows[k + 1, at : at + state]
            for i in range(state):
                error[i] += weight * row[i]
        for i in range(state):
            old, new = abs(before[i]), abs(after[i])
            ratio = error[i] / (atol + rtol * (old if old > new else new))
            # What is not finite differs from itself by NaN.
            error[i] = ratio * ratio + (old - old) + (new - new)
        # Halves are added, which keeps the sum a loop over independent numbers.
        width = state
        while width > 1:
            half = width // 2
            for i in range(half):
                error[i] += error[width - half + i]
            width -= half
        out[sample] = (error[0] / state) ** 0.5
