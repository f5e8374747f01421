"""Errors that callers tell apart; all else is a ValueError with one clear sentence."""

from __future__ import annotations


class NotFiniteError(ValueError):
    """A loss, an update, a gradient or activations that are NaN or infinite."""
