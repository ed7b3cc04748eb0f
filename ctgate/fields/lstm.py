"""Long short-term memory."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.interop import TorchCell, layers_from_torch
from ctgate.fields.jacobian import Jacobian, scale_rows
from ctgate.fields.stack import Stack
from ctgate.kernels import Linearization, Own, Product, Scale
from ctgate.kernels.fused import LSTMCell


class LSTM(TorchCell):
    r"""Long short-term memory as a flow of the state (c, h),

    .. math::
        \begin{aligned}
        \tau \frac{dc}{dt} &= -(1 - f) \odot c + i \odot g, \\
        \tau \frac{dh}{dt} &= -h + o \odot \tanh(f \odot c + i \odot g),
        \end{aligned}
        \qquad
        (i, f, o) = \sigma(W_{i,f,o} h + U_{i,f,o} u + b_{i,f,o}), \quad g = \tanh(W_g h + U_g u + b_g),

    so ``rate * tau = (1 - f, 1)`` and ``drive * tau = (i * g, o * tanh(f * c + i * g))``. The hidden state
    relaxes with unit rate towards what the cell state, one ``tau`` ahead, gives out: one Euler step of size
    ``tau`` is exactly the discrete LSTM.

    The state holds the cell first: ``components`` is ``{"cell": ..., "hidden": ...}`` (torch hands over (h,
    c)). Weights are torch's: ``weight_ih`` (4 hidden, input), ``weight_hh`` (4 hidden, hidden), ``bias_ih``,
    ``bias_hh`` (4 hidden,), row blocks in the order i, f, g, o.

    Parameters:
        input_size, hidden_size, tau, learn_tau, bias, layernorm, generator, device, dtype: ``tau`` is a
            positive scalar or one value per unit [time], the same for c and h of a unit, learnable through
            its logarithm; ``layernorm`` acts on the argument of g's tanh.

    Gates: ``input`` (i), ``forget`` (f), ``output`` (o).

    Raises:
        ValueError, TypeError: sizes or ``tau`` out of range.

    Source: THEORY.md 1 and 2; S. Hochreiter and J. Schmidhuber, Neural Comput. 9 (1997) 1735; F. A. Gers,
    J. Schmidhuber and F. Cummins, Neural Comput. 12 (2000) 2451 (forget gate).
    """

    gate_names = ("input", "forget", "output")
    torch_module = nn.LSTM
    torch_cell = nn.LSTMCell
    row_blocks = 4
    state_blocks = 2

    @classmethod
    def from_torch(
        cls, module: nn.Module, tau: float | int | Tensor = 1.0, *, learn_tau: bool = False
    ) -> "LSTM | Stack":
        """The flow whose Euler step of size ``tau`` is ``module``, with clones of its weights.

        More than one layer gives a :class:`Stack`. ``batch_first`` modules are accepted: a field has no
        layout. Gradients of frozen weights stay off, device and dtype are the module's.

        Raises:
            TypeError: ``module`` is neither ``nn.LSTM`` nor ``nn.LSTMCell``. ValueError: it is bidirectional
                or has dropout or ``proj_size``; ``tau`` out of range.

        Source: THEORY.md 2.
        """
        layers = layers_from_torch(cls, module, tau, learn_tau)
        return layers[0] if len(layers) == 1 else Stack(layers)

    @property
    def components(self) -> dict[str, slice]:
        """The cell state c, then the hidden state h."""
        size = self.hidden_size
        return {"cell": slice(0, size), "hidden": slice(size, 2 * size)}

    def _evaluate(self, h: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pre-activations of i, f, g, o."""
        self.check_arguments(h, u)
        own = functional.linear(h[..., self.hidden_size :], self.weight_hh, self.bias_hh)
        i, f, g, o = (self.project_input(u, self.bias_ih) + own).chunk(4, -1)
        return i, f, g, o

    def _coupling(self, h: Tensor, u: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leak of c, dh/dt by c, and dc/dt and dh/dt by an x that reaches the gates through ``weight``."""
        i, f, g, o = self._evaluate(h, u)
        tau, cell = self.tau, h[..., : self.hidden_size]
        to_i, to_f, to_g, to_o = weight.chunk(4)
        into, keep, out = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        new = torch.tanh(self.candidate(g))
        ahead = torch.tanh(keep * cell + into * new)
        forget = torch.sigmoid(-f)
        through_cell = (
            scale_rows(cell * keep * forget, to_f)
            + scale_rows(new * into * torch.sigmoid(-i), to_i)
            + scale_rows(into * (1.0 - new.square()), self.candidate_jacobian(g, to_g))
        )
        shown = out * (1.0 - ahead.square()) / tau
        through_hidden = scale_rows(shown, through_cell) + scale_rows(
            ahead * out * torch.sigmoid(-o) / tau, to_o
        )
        return forget / tau, shown * keep, through_cell / tau.unsqueeze(-1), through_hidden

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """((1 - f, 1) / tau, (i * g, o * tanh(f * c + i * g)) / tau)."""
        i, f, g, o = self._evaluate(h, u)
        tau = self.tau
        cell = h[..., : self.hidden_size]
        written = torch.sigmoid(i) * torch.tanh(self.candidate(g))
        ahead = torch.sigmoid(f) * cell + written
        # sigmoid(-f), not 1 - sigmoid(f): the difference loses every digit of a slow mode
        rate = torch.cat((torch.sigmoid(-f) / tau, tau.reciprocal().expand(cell.shape)), -1)
        return rate, torch.cat((written / tau, torch.sigmoid(o) * torch.tanh(ahead) / tau), -1)

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """(1 - f, 1) / tau leaks; all four gates couple, and h sees c."""
        forget, seen, to_cell, to_hidden = self._coupling(h, u, self.weight_hh)
        leak = torch.cat((forget, self.tau.reciprocal().expand(forget.shape)), -1)
        upper = torch.cat((torch.zeros_like(to_cell), to_cell), -1)
        return Jacobian(leak, torch.cat((upper, torch.cat((torch.diag_embed(seen), to_hidden), -1)), -2))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """The answer of c and of h to the input, through all four gates."""
        return torch.cat(self._coupling(h, u, self.weight_ih)[2:], -2)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The four gates and the cell as products with vectors; what is written to c reaches h at once."""
        i, f, g, o = self._evaluate(h, u)
        cell, hidden = h.chunk(2, -1)
        pace = self.tau.reciprocal()
        into, keep, out = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        forget, new = torch.sigmoid(-f), torch.tanh(self.candidate(g))
        ahead = torch.tanh(keep * cell + into * new)
        shown, seen = out * ahead, pace * out * (1.0 - ahead.square())
        slopes = pace * (into * new - forget * cell), pace * (shown - hidden)
        rows = dict.fromkeys("ifgo", self.hidden_size)
        argument, normalise = self.candidate_edges("g", g)
        edges = [
            Product("weight_hh", "hidden", rows, self.weight_hh, hidden, self.present("bias_hh")),
            self.input_edge(u, rows, "bias_ih"),
            *normalise,
            Scale("i", "written", new * into * torch.sigmoid(-i)),
            Scale("f", "written", cell * keep * forget),
            Scale(argument, "written", into * (1.0 - new.square())),
            Scale("written", "cell'", pace),
            Scale("written", "hidden'", seen),
            Scale("o", "hidden'", pace * shown * torch.sigmoid(-o)),
            Scale("cell", "cell'", -pace * forget),
            Scale("cell", "hidden'", seen * keep),
            Scale("hidden", "hidden'", -pace),
        ]
        if self.log_tau is not None:
            edges += [Own("log_tau", "cell'", -slopes[0]), Own("log_tau", "hidden'", -slopes[1])]
        return self.products(t, h, u, torch.cat(slopes, -1), edges)

    @property
    def fused_cell(self) -> type[LSTMCell]:
        """One for all."""
        return LSTMCell

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"input": i, "forget": f, "output": o}``."""
        i, f, _, o = self._evaluate(h, u)
        return {"input": torch.sigmoid(i), "forget": torch.sigmoid(f), "output": torch.sigmoid(o)}
