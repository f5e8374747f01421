"""What people run: one LightningModule per objective, the backbones and the text they are trained on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthcb_recipes.backbones import load_backbone
    from depthcb_recipes.causal_lm import CausalLM
    from depthcb_recipes.completion_lm import CompletionLM
    from depthcb_recipes.contrastive import Contrastive
    from depthcb_recipes.corpus import python_corpus
    from depthcb_recipes.data import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
    from depthcb_recipes.masked_lm import MaskedLM
    from depthcb_recipes.objective_distance import ObjectiveDistanceMonitor
    from depthcb_recipes.sequence_classification import SequenceClassification
    from depthcb_recipes.token_classification import TokenClassification

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
    "CausalLM": "depthcb_recipes.causal_lm",
    "CompletionLM": "depthcb_recipes.completion_lm",
    "Contrastive": "depthcb_recipes.contrastive",
    "MaskedLM": "depthcb_recipes.masked_lm",
    "ObjectiveDistanceMonitor": "depthcb_recipes.objective_distance",
    "Completions": "depthcb_recipes.data",
    "LabelledText": "depthcb_recipes.data",
    "LabelledTokens": "depthcb_recipes.data",
    "PackedText": "depthcb_recipes.data",
    "TextPairs": "depthcb_recipes.data",
    "SequenceClassification": "depthcb_recipes.sequence_classification",
    "TokenClassification": "depthcb_recipes.token_classification",
    "load_backbone": "depthcb_recipes.backbones",
    "python_corpus": "depthcb_recipes.corpus",
}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import depthcb_recipes`, and a command line's --help, free of torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
