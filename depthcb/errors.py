"""Errors that callers tell apart; all else is a ValueError with one clear sentence."""

from __future__ import annotations

from collections.abc import Iterator


class NotFiniteError(ValueError):
    """A loss, an update, a gradient or activations that are NaN or infinite."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then what led to it, and so on back."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
