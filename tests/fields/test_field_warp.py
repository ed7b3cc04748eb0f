"""Time warps: a gate is dc/dt (C. Tallec and Y. Ollivier, arXiv 1804.11188)."""

import itertools
import math

import torch

from ctgate.fields import GRU, Leaky, MultiGate

DT, STEPS = 0.01, 400


def clock(t):
    """c(t) with 0 < c' < 1."""
    return 0.6 * t + 0.3 * (1.0 - math.cos(t))


def speed(t):
    return 0.6 + 0.3 * math.sin(t)


def signal(s):
    s = torch.as_tensor(s, dtype=torch.float64)
    return torch.stack((torch.sin(2.0 * s), torch.cos(0.7 * s)))


def rk4(rhs, h, times):
    """Runge-Kutta by hand; rhs(t, h)."""
    states = [h]
    for start, stop in itertools.pairwise(times):
        dt = stop - start
        k1 = rhs(start, h)
        k2 = rhs(start + dt / 2, h + dt / 2 * k1)
        k3 = rhs(start + dt / 2, h + dt / 2 * k2)
        k4 = rhs(stop, h + dt * k3)
        h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(h)
    return torch.stack(states)


@torch.no_grad()
def test_rate_times_clock_speed_undoes_a_warp(tools):
    """A warped input with rate and drive times c' gives the unwarped trajectory at the warped times."""
    field = GRU(2, 4, tau=0.37, dtype=torch.float64)
    h0 = tools.randn(3, 4)
    times = [DT * k for k in range(STEPS + 1)]
    plain = rk4(lambda s, h: field(s, h, signal(s)), h0, [clock(t) for t in times])

    def warped(t, h):
        rate, drive = field.rate_drive(t, h, signal(clock(t)))
        return speed(t) * drive - speed(t) * rate * h

    assert (rk4(warped, h0, times) - plain).abs().max() < 1e-8
    unwarped = rk4(lambda t, h: field(t, h, signal(clock(t))), h0, times)
    assert (unwarped - plain).abs().max() > 1e-2  # without c' the trajectory is another one


def test_tau_divided_by_clock_speed_multiplies_rate_and_drive(tools):
    h, u = tools.randn(3, 4), tools.randn(3, 2, seed=2)
    field = GRU(2, 4, tau=0.37, dtype=torch.float64)
    other = GRU(2, 4, tau=0.37 / 0.8, dtype=torch.float64)
    other.load_state_dict({k: v for k, v in field.state_dict().items() if "tau" not in k}, strict=False)
    for own, warped in zip(field.rate_drive(0.0, h, u), other.rate_drive(0.0, h, u), strict=True):
        torch.testing.assert_close(warped, 0.8 * own, rtol=1e-14, atol=1e-15)


@torch.no_grad()
def test_a_gate_is_the_derivative_of_the_clock(tools):
    """A MultiGate whose gate is c'(t) runs a Leaky network in warped time."""
    leaky = Leaky(2, 4, alpha=1.0, tau=0.37, dtype=torch.float64)
    gated = MultiGate(3, 4, tau=0.37, dtype=torch.float64)
    for parameter in gated.parameters():
        parameter.zero_()
    gated.weight_hh[4:] = leaky.weight_hh
    gated.weight_ih[4:, :2] = leaky.weight_ih
    gated.bias[4:] = leaky.bias
    gated.weight_ih[:4, 2] = 1.0  # the gate hears the third channel alone, logit(c')

    def driven(t, h):
        logit = torch.tensor([math.log(speed(t) / (1.0 - speed(t)))], dtype=torch.float64)
        return gated(t, h, torch.cat((signal(clock(t)), logit)))

    h0 = tools.randn(3, 4)
    times = [DT * k for k in range(STEPS + 1)]
    plain = rk4(lambda s, h: leaky(s, h, signal(s)), h0, [clock(t) for t in times])
    assert (rk4(driven, h0, times) - plain).abs().max() < 1e-8
