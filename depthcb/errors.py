"""Exceptions that callers need to distinguish; all other errors are plain ValueErrors."""

from __future__ import annotations

from collections.abc import Iterator


class NotFiniteError(ValueError):
    """Raised when a loss, update, gradient or activation is NaN or infinite."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception, then its cause or context, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
