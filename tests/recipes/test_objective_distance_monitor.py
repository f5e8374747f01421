"""ObjectiveDistanceMonitor: texts are the same, training is not affected, and unsupported cases are rejected."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from recipes_families import tiny
from support import Rows, fit
from torch.utils.data import DataLoader

from depthcb_recipes import LabelledText, LabelledTokens, PackedText, TextPairs
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.completion_lm import CompletionLM
from depthcb_recipes.objectives.contrastive import Contrastive
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.objective_distance_monitor import (
    ObjectiveDistanceMonitor,
    own_batch,
    pretraining_objective,
)
from depthcb_recipes.objectives.sequence_classification import SequenceClassification
from depthcb_recipes.objectives.token_classification import TokenClassification


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tokenizer, found = load_tokenizer("minilm"), {}
    for family, head in (("bert", "ForMaskedLM"), ("gpt2", "ForCausalLM"), ("roberta", "Model")):
        folder = tmp_path_factory.mktemp(family)
        tiny(family, head, vocab_size=len(tokenizer), dropout=0.1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[family] = str(folder)
    return found


# Warnings that are expected for random networks on a handful of texts.
pytestmark = pytest.mark.filterwarnings("ignore:.*batch noise dominates.*")


def measure(module: Any, data: Any, batches: int = 6) -> tuple[ObjectiveDistanceMonitor, Rows]:
    monitor, rows = ObjectiveDistanceMonitor(most_batches=batches), Rows()
    fit(module, [monitor], (data,), max_steps=1, logger=rows)
    return monitor, rows


SMALL: dict[str, Any] = {"train_rows": 32, "val_rows": 64, "batch_size": 8, "max_length": 32}


def test_a_step_further_of_what_it_was_pretrained_by_is_no_distance(folders: dict[str, str]) -> None:
    packed = PackedText(folders["gpt2"], block_size=32, **SMALL)
    monitor, rows = measure(CausalLM(folders["gpt2"]), packed)
    assert monitor.distance is not None
    assert monitor.distance.overall == 0
    (row,) = [row for row in rows.rows if "depth/objective_distance" in row]
    assert (row["step"], row["depth/objective_distance"], row["depth/objective_distance/L01"]) == (0, 0, 0)
    assert (row["depth/objective_distance_low"], row["depth/objective_distance_high"]) == (0, 0)
    masked = PackedText(folders["bert"], masked=True, block_size=32, **SMALL)
    assert measure(MaskedLM(folders["bert"]), masked)[0].distance.overall == 0  # type: ignore[union-attr]


CASES = [
    (lambda f: SequenceClassification(f, num_labels=8), LabelledText),
    (lambda f: TokenClassification(f, num_labels=6), LabelledTokens),
    (Contrastive, TextPairs),
]


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "kind"), CASES)
def test_watching_is_silent_and_every_objective_is_measured(
    make: Any, kind: Any, family: str, folders: dict[str, str]
) -> None:
    results, data = [], kind(folders[family], **SMALL)
    for watched in (True, False):
        torch.manual_seed(1)
        module, monitor = make(folders[family]), ObjectiveDistanceMonitor()
        fit(module, [monitor] if watched else [], (data,), max_steps=2)
        results.append(module.state_dict())
        if watched:
            assert monitor.distance is not None
            assert len(monitor.distance.per_layer) == 2
            assert monitor.distance.overall != 0
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_texts_of_a_batch_are_found_again(folders: dict[str, str]) -> None:
    bert, gpt2 = pretraining_objective(folders["bert"]), pretraining_objective(folders["gpt2"])
    masked = next(iter(PackedText(folders["bert"], masked=True, block_size=32, **SMALL).val_dataloader()))
    plain = next(iter(PackedText(folders["bert"], block_size=32, **SMALL).val_dataloader()))
    assert torch.equal(own_batch(gpt2, MaskedLM(bert.model), masked, "")["input_ids"], plain["input_ids"])
    made = own_batch(bert, CausalLM(gpt2.model), plain, folders["bert"])
    chosen = made["labels"] != -100
    assert 0.1 < chosen.float().mean() < 0.2
    assert torch.equal(torch.where(chosen, made["labels"], made["input_ids"]), plain["input_ids"])
    again = own_batch(bert, CausalLM(gpt2.model), plain, folders["bert"])
    assert torch.equal(made["labels"], again["labels"])
    half = {**plain, "labels": plain["labels"].masked_fill(torch.arange(32) < 9, -100)}
    assert "labels" not in own_batch(gpt2, CompletionLM(gpt2.model), half, "")


def test_what_cannot_be_measured_is_refused_before_training(folders: dict[str, str]) -> None:
    packed = PackedText(folders["gpt2"], block_size=32, **SMALL)
    with pytest.raises(ValueError, match="give its backbone by name"):
        measure(CausalLM(tiny("gpt2", "ForCausalLM")), packed)
    few = PackedText(folders["gpt2"], block_size=32, **(SMALL | {"val_rows": 40}))
    with pytest.raises(ValueError, match="needs at least 6 validation batches, but there are only 5"):
        measure(CausalLM(folders["gpt2"]), few)
    with pytest.raises(ValueError, match="no language-model head"):
        measure(SequenceClassification(folders["roberta"], num_labels=8), LabelledText(folders["roberta"], **SMALL))
    with pytest.raises(ValueError, match="most_batches must be at least 6, not 5"):
        ObjectiveDistanceMonitor(most_batches=5)
    with pytest.raises(ValueError, match="width must be positive, not 0"):
        ObjectiveDistanceMonitor(width=0)


@pytest.mark.slow
def test_noise_is_warned_about_and_more_texts_silence_it(folders: dict[str, str]) -> None:
    options = SMALL | {"val_rows": 256}
    one_masked_token = LabelledText(folders["bert"], **(options | {"batch_size": 1, "max_length": 8}))
    with pytest.warns(UserWarning, match=r"should be narrower than 0\.2, so batch noise .* raise most_batches=6"):
        measure(SequenceClassification(folders["bert"], num_labels=8), one_masked_token)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*batch noise dominates.*")
        packed = PackedText(folders["gpt2"], block_size=32, **options)
        assert measure(CausalLM(folders["gpt2"]), packed, batches=24)[0].distance is not None


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_does_not_measure_again(folders: dict[str, str], tmp_path: Path) -> None:
    packed = PackedText(folders["gpt2"], block_size=32, **SMALL)
    trainer = fit(CausalLM(folders["gpt2"]), [], (packed,), max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    monitor, rows = ObjectiveDistanceMonitor(), Rows()
    module = CausalLM(folders["gpt2"])
    resumed = pl.Trainer(max_steps=2, callbacks=[monitor], logger=rows, enable_checkpointing=False, accelerator="cpu",
                         enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)  # fmt: skip
    resumed.fit(module, packed, ckpt_path=str(tmp_path / "one.ckpt"))
    assert monitor.distance is None
    assert not any("depth/objective_distance" in row for row in rows.rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2-mini", "neox-mini", "bert-mini"])
def test_classification_is_further_than_more_of_the_pretraining(name: str) -> None:
    """On real pretrained networks: the interval of the distance lies above 0, where the batches resolve it.

    A small model can be trained to where its gradient is all noise, which depends on the machine that trained it.
    """
    pretrain_if_missing(name)
    data = LabelledText(name, val_rows=384, batch_size=16, max_length=64)
    loader = data.val_dataloader()
    torch.manual_seed(0)
    module = SequenceClassification(name, num_labels=8)
    monitor = ObjectiveDistanceMonitor(most_batches=24)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module, [monitor], (DataLoader(loader.dataset, 16, collate_fn=loader.collate_fn), loader), max_steps=1)
    found = monitor.distance
    assert found is not None
    if name != "smollm2-135m" and found.interval is None:
        assert any("batch noise" in str(warning.message) for warning in told)
        return
    assert found.overall is not None
    assert found.interval is not None
    assert found.interval[0] > 0.2
