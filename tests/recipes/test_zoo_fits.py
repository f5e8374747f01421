"""Real fits: every objective on every model of the mini zoo lowers its validation loss on text it has not seen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from depthcb_recipes import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.backbones.zoo import MINI_ZOO
from depthcb_recipes.data.corpus import python_corpus
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.completion_lm import CompletionLM
from depthcb_recipes.objectives.contrastive import Contrastive
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.sequence_classification import SequenceClassification
from depthcb_recipes.objectives.token_classification import TokenClassification

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # may have to pretrain the model
    pytest.mark.filterwarnings("ignore:.*fall.* back to.*"),
]

STEPS = 40
KINDS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "causal": (CausalLM, PackedText, {"block_size": 64}),
    "masked": (MaskedLM, PackedText, {"block_size": 64, "masked": True}),
    "completion": (CompletionLM, Completions, {"max_length": 96}),
    "sequence": (SequenceClassification, LabelledText, {"max_length": 64, "batch_size": 16, "val_rows": 128}),
    "token": (TokenClassification, LabelledTokens, {"max_length": 64}),
    "contrastive": (Contrastive, TextPairs, {"max_length": 64}),
}
PAIRS = [(k, n) for n in MINI_ZOO for k in KINDS if k != "masked" or n == "bert-mini"]


@pytest.fixture(scope="module")
def other_prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Docstrings of a library that the zoo was not pretrained on."""
    path = tmp_path_factory.mktemp("prose") / "torch.jsonl"
    python_corpus("prose", packages=("torch",), most_files=300).select_columns(["text"]).to_json(str(path))
    return str(path)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_objective_on_every_family_lowers_its_validation_loss(kind: str, name: str, other_prose: str) -> None:
    pretrain_if_missing(name)
    objective, data_of, options = KINDS[kind]
    source = other_prose if kind in ("causal", "masked") else "python"
    data = data_of(name, source, **{"batch_size": 8, "val_rows": 64, **options})
    pl.seed_everything(0, verbose=False)
    module = objective(name, lr=5e-4)
    trainer = pl.Trainer(
        max_steps=STEPS, val_check_interval=STEPS, check_val_every_n_epoch=None, accelerator="cpu", gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    after = trainer.callback_metrics["val/loss"].item()
    assert after < 0.99 * before
