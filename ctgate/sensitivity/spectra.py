"""How unequal the directions of a matrix are, told by its singular values."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def anisotropy(
    sigma: Float[Tensor, "*batch rank"], size: int, directions: int | None = None, exact: bool = False
) -> tuple[Float[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    r""":math:`\sigma_1 / \sigma_r` of descending singular values, and the numerical rank.

    The rank counts those above :math:`\sigma_1` times the precision times ``size``, the larger one of the
    matrix; with ``exact``, where small ones are as accurate as large ones, those above 0. r is the rank, or
    ``directions``: then the ratio is NaN beyond the rank, as it is for a matrix of zeros.
    """
    noise = 0.0 if exact else torch.finfo(sigma.dtype).eps * size
    rank = (sigma > noise * sigma[..., :1]).sum(-1)
    last = rank if directions is None else torch.full_like(rank, directions)
    other = sigma.gather(-1, (last - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where((last <= rank) & (rank > 0), sigma[..., 0] / other, torch.nan), rank


def cosine(x: Float[Tensor, "*batch n"], y: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*batch"]:
    """The cosine of the angle between vectors; NaN where one of them is zero."""
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    value: Tensor = (x * y).sum(-1) / norms
    return value
