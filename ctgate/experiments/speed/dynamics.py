"""Lyapunov spectra of random networks, against a QR factorisation at every step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctgate as ct
from ctgate.algorithms import FixedStepAlgorithm
from ctgate.dynamics import lyapunov_spectrum
from ctgate.experiments.speed.compare import timed
from ctgate.experiments.speed.lines import Check, Line
from ctgate.experiments.speed.presets import Preset, target

# Chaotic: the gain that separates decay from chaos is 1.
_GAIN, _DT = 2.0, 0.1
# [tau] over which exponents are compared: the largest multiplies rounding in the states by a hundred or so.
_COMPARED = 30.0
_LIMIT = 1e-11


class Network:
    r"""The random network :math:`\dot x = -x + \tanh(J x)`, J with independent entries of variance g^2/N, in
    float64, for some initial states: all exponents over a span from the first tangents on.

    Parameters: ``size`` N; ``batch`` of initial states; ``alg``, Euler or RK4; ``device``.
    """

    def __init__(self, size: int, batch: int, alg: FixedStepAlgorithm, device: str) -> None:
        rng = np.random.default_rng(0)
        self.weight = torch.from_numpy(rng.normal(size=(size, size)) * _GAIN / size**0.5).to(device)
        self.h0 = torch.from_numpy(rng.normal(size=(batch, size))).to(device)
        self.field = ct.Leaky(0, size, bias=False, device=device, dtype=torch.float64)
        with torch.no_grad():
            self.field.weight_hh.copy_(self.weight)
        self.alg = alg

    def ours(self, span: float) -> Tensor:
        """The exponents (sample, index) [1/tau]."""
        prob = ct.ODEProblem(self.field, self.h0, (0.0, span))
        data = lyapunov_spectrum(prob, self.alg, transient=0.0, warmup=0.0, blocks=2, sum_rule=False)
        return torch.from_numpy(data["exponents"].to_numpy())

    @torch.no_grad()
    def plain(self, span: float) -> Tensor:
        """The same: the Jacobian of each stage as a matrix, and a factorisation a step."""
        dt, h, size = self.alg.dt, self.h0, self.h0.shape[-1]
        # Our first tangents, those of seed 0.
        noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q = torch.linalg.qr(noise)[0].to(h).expand(len(h), size, size)
        total = torch.zeros_like(h)
        steps = round(span / dt)
        for _ in range(steps):
            if isinstance(self.alg, ct.Euler):
                slope, matrix = self._stage(h)
                h, v = h + dt * slope, q + dt * (matrix @ q)
            else:
                h, v = self._rk4(h, q, dt)
            q, r = torch.linalg.qr(v)
            total += r.diagonal(dim1=-2, dim2=-1).abs().log()
        return (total / (steps * dt)).cpu()

    def _stage(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """dx/dt and its Jacobian."""
        seen = torch.tanh(h @ self.weight.mT)
        matrix = (1.0 - seen * seen).unsqueeze(-1) * self.weight
        matrix.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return seen - h, matrix

    def _rk4(self, h: Tensor, v: Tensor, dt: float) -> tuple[Tensor, Tensor]:
        k1, a1 = self._stage(h)
        m1 = a1 @ v
        k2, a2 = self._stage(h + 0.5 * dt * k1)
        m2 = a2 @ (v + 0.5 * dt * m1)
        k3, a3 = self._stage(h + 0.5 * dt * k2)
        m3 = a3 @ (v + 0.5 * dt * m2)
        k4, a4 = self._stage(h + dt * k3)
        m4 = a4 @ (v + dt * m3)
        return h + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4), v + dt / 6.0 * (m1 + 2.0 * m2 + 2.0 * m3 + m4)


def spectrum(preset: Preset, device: str) -> Iterator[Line]:
    """All exponents of a network, for one and for several initial states.

    The targets are for steps of one product with the weights, Euler's, where the factorisation is most of the
    work. RK4's of four leave less of it to save; they are recorded, over at most 10 tau.
    """
    size = preset.lyapunov_size
    for alg in (ct.Euler(_DT), *([ct.RK4(_DT)] if preset.records else [])):
        for batch, whole in preset.lyapunov:
            span = whole if isinstance(alg, ct.Euler) else min(10, whole)
            case = Network(size, batch, alg, device)
            found = (case.ours(_COMPARED) - case.plain(_COMPARED)).abs().max()
            name = type(alg).__name__
            line = Line(
                "13",
                f"all exponents, N{size} B{batch}, {name}, {span} tau in steps of {_DT}",
                "QR at every step",
                target=target(device, "lyapunov", name, size, batch),
                checks=(Check("exponents", float(found), _LIMIT),),
            )
            yield timed(
                line,
                lambda case=case, span=span: case.ours(span),  # type: ignore[misc]
                lambda case=case, span=span: case.plain(span),  # type: ignore[misc]
                preset.lyapunov_rounds,
                device,
            )
