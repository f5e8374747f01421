"""Measures of how far a layer's activations have moved: pure functions, and a registry of them for `DepthProfile`."""

from __future__ import annotations

from depthcb.similarity.cka import (
    CKAChange,
    check_defined,
    cka_change,
    cka_normalized_change,
)
from depthcb.similarity.gram import effective_rank, gram, sketch
from depthcb.similarity.measure import MEASURES, Measure, find_measures
from depthcb.similarity.rows import cosine_change, procrustes_change, relative_l2_change

__all__ = [
    "MEASURES",
    "CKAChange",
    "Measure",
    "check_defined",
    "cka_change",
    "cka_normalized_change",
    "cosine_change",
    "effective_rank",
    "find_measures",
    "gram",
    "procrustes_change",
    "relative_l2_change",
    "sketch",
]
