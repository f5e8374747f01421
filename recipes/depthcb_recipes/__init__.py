"""What people run: one LightningModule per objective, the backbones and the text they are trained on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthcb_recipes.backbones.loading import load_backbone
    from depthcb_recipes.data.completions import Completions
    from depthcb_recipes.data.corpus import python_corpus
    from depthcb_recipes.data.labelled_text import LabelledText
    from depthcb_recipes.data.labelled_tokens import LabelledTokens
    from depthcb_recipes.data.packed_text import PackedText
    from depthcb_recipes.data.text_pairs import TextPairs
    from depthcb_recipes.objectives.causal_lm import CausalLM
    from depthcb_recipes.objectives.completion_lm import CompletionLM
    from depthcb_recipes.objectives.contrastive import Contrastive
    from depthcb_recipes.objectives.distance_monitor import ObjectiveDistanceMonitor
    from depthcb_recipes.objectives.masked_lm import MaskedLM
    from depthcb_recipes.objectives.sequence_classification import SequenceClassification
    from depthcb_recipes.objectives.token_classification import TokenClassification

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
    "CausalLM": "depthcb_recipes.objectives.causal_lm",
    "CompletionLM": "depthcb_recipes.objectives.completion_lm",
    "Contrastive": "depthcb_recipes.objectives.contrastive",
    "MaskedLM": "depthcb_recipes.objectives.masked_lm",
    "ObjectiveDistanceMonitor": "depthcb_recipes.objectives.distance_monitor",
    "Completions": "depthcb_recipes.data.completions",
    "LabelledText": "depthcb_recipes.data.labelled_text",
    "LabelledTokens": "depthcb_recipes.data.labelled_tokens",
    "PackedText": "depthcb_recipes.data.packed_text",
    "TextPairs": "depthcb_recipes.data.text_pairs",
    "SequenceClassification": "depthcb_recipes.objectives.sequence_classification",
    "TokenClassification": "depthcb_recipes.objectives.token_classification",
    "load_backbone": "depthcb_recipes.backbones.loading",
    "python_corpus": "depthcb_recipes.data.corpus",
}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import depthcb_recipes`, and a command line's --help, free of torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
