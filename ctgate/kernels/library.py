"""torch's own recurrent kernels, oneDNN's and cuDNN's, where hidden states are all that is wanted."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def favoured(lstm: bool, like: Tensor) -> bool:
    """Whether torch has a kernel of its own for this device and dtype, rather than a loop of operations."""
    if like.device.type == "cuda":
        return bool(torch.backends.cudnn.is_acceptable(like))  # type: ignore[no-untyped-call]
    onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    enabled = onednn and bool(torch.backends.mkldnn.enabled)
    return enabled and lstm and like.device.type == "cpu" and like.dtype == torch.float32


def recur(
    us: Tensor, states: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs of the last layer (step, sample, hidden) and all last states, as ``states``.

    ``us`` (step, sample, channel); ``states`` are (h,) of a GRU, (h, c) of an LSTM, each (layer, sample,
    hidden); ``weights`` of each layer are weight_ih, weight_hh and, unless there are none, bias_ih, bias_hh.
    """
    flat = [weight for layer in weights for weight in layer]
    train = torch.is_grad_enabled() and any(x.requires_grad for x in (us, *states, *flat))
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    options = (len(weights[0]) == 4, len(weights), 0.0, train, False, False)
    with warnings.catch_warnings():
        # cuDNN copies weights that do not lie side by side: little against many steps.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        if len(states) == 1:
            outputs, *last = torch.gru(us, states[0], flat, *options)
        else:
            outputs, *last = torch.lstm(us, tuple(states), flat, *options)
    return outputs, tuple(last)
