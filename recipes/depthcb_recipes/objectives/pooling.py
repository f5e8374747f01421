"""Pooling of token vectors to one vector per text."""

from __future__ import annotations

import torch
from torch import Tensor


def last_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the vector of each text's last non-padding token, for left or right padding.

    Args:
        hidden: Token vectors, (B, T, D).
        mask: Attention mask, (B, T), 0 for padding; None if there is no padding.

    Returns:
        Text vectors, (B, D).

    Example:
        >>> hidden = torch.arange(6.0).view(2, 3, 1)
        >>> last_token(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]])).flatten().tolist()
        [1.0, 5.0]
    """
    if mask is None:
        return hidden[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = ((mask != 0) * positions).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def first_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the vector of each text's first non-padding token; see `last_token` for shapes.

    Example:
        >>> first_token(torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [0, 1, 1]])).flatten().tolist()
        [0.0, 4.0]
    """
    if mask is None:
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden), device=hidden.device), (mask != 0).int().argmax(dim=1)]


def mean_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the mean vector of each text's non-padding tokens; see `last_token` for shapes.

    Example:
        >>> mean_token(torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [1, 1, 1]])).flatten().tolist()
        [0.5, 4.0]
    """
    if mask is None:
        return hidden.mean(dim=1)
    real = (mask != 0).unsqueeze(2).to(hidden.dtype)
    return (hidden * real).sum(dim=1) / real.sum(dim=1)
