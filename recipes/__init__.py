"""What people run: one LightningModule per objective, the backbones and the text they are trained on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.backbones import load_backbone
    from recipes.causal_lm import CausalLM
    from recipes.completion_lm import CompletionLM
    from recipes.contrastive import Contrastive
    from recipes.corpus import python_corpus
    from recipes.data import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
    from recipes.masked_lm import MaskedLM
    from recipes.objective_distance import ObjectiveDistanceMonitor
    from recipes.sequence_classification import SequenceClassification
    from recipes.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "CompletionLM",
    "Completions",
    "Contrastive",
    "LabelledText",
    "LabelledTokens",
    "MaskedLM",
    "ObjectiveDistanceMonitor",
    "PackedText",
    "SequenceClassification",
    "TextPairs",
    "TokenClassification",
    "load_backbone",
    "python_corpus",
]

_HOME = {
    "CausalLM": "recipes.causal_lm",
    "CompletionLM": "recipes.completion_lm",
    "Contrastive": "recipes.contrastive",
    "MaskedLM": "recipes.masked_lm",
    "ObjectiveDistanceMonitor": "recipes.objective_distance",
    "Completions": "recipes.data",
    "LabelledText": "recipes.data",
    "LabelledTokens": "recipes.data",
    "PackedText": "recipes.data",
    "TextPairs": "recipes.data",
    "SequenceClassification": "recipes.sequence_classification",
    "TokenClassification": "recipes.token_classification",
    "load_backbone": "recipes.backbones",
    "python_corpus": "recipes.corpus",
}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import recipes` (and a command line's --help) free of torch and transformers.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
