"""Losses equal those of transformers' heads, padding is ignored, and unsuitable backbones are rejected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from recipes_families import ENCODERS, FAMILIES, VOCABULARY, tiny
from scipy.special import logsumexp
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.retrieval import RetrievalRecall

from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.completion_lm import CompletionLM
from depthcb_recipes.objectives.contrastive import Contrastive
from depthcb_recipes.objectives.masked_lm import MaskedLM
from depthcb_recipes.objectives.objective import Objective
from depthcb_recipes.objectives.sequence_classification import SequenceClassification
from depthcb_recipes.objectives.token_classification import TokenClassification

LABELS = 3


def texts(side: str = "right", lengths: tuple[int, ...] = (9, 5, 7, 2)) -> dict[str, Tensor]:
    """Rows of the given lengths, padded on one side."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), 1), torch.zeros(len(lengths), width, dtype=torch.int64)
    for i, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, at] = torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(i))
        mask[i, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def token_labels(batch: dict[str, Tensor]) -> Tensor:
    return (batch["input_ids"] % LABELS).masked_fill(batch["attention_mask"] == 0, -100)


def causal(family: str) -> Any:
    return tiny(family, "ForCausalLM", is_decoder=True) if family in ENCODERS else tiny(family, "ForCausalLM")


def objective(kind: str, family: str) -> tuple[Objective, dict[str, Tensor]]:
    """An objective without dropout, and a right-padded batch for it."""
    return make(kind, family).eval(), batch_of(kind)


def make(kind: str, family: str) -> Objective:
    if kind == "causal":
        return CausalLM(causal(family))
    if kind == "completion":
        return CompletionLM(causal(family))
    if kind == "masked":
        return MaskedLM(tiny(family, "ForMaskedLM"))
    if kind == "contrastive":
        return Contrastive(tiny(family))
    torch.manual_seed(0)
    return {"sequence": SequenceClassification, "token": TokenClassification}[kind](tiny(family), num_labels=LABELS)


def batch_of(kind: str, side: str = "right") -> dict[str, Tensor]:
    batch = texts(side)
    if kind == "completion":
        mask = batch["attention_mask"]
        last = (mask.flip(1).cumsum(1).flip(1) <= 2) & (mask == 1)  # the last two non-padding tokens
        return batch | {"labels": batch["input_ids"].masked_fill(~last, -100)}
    if kind == "masked":
        chosen = (batch["input_ids"] % 4 == 0) & (batch["attention_mask"] == 1)
        return {
            "input_ids": batch["input_ids"].masked_fill(chosen, 2),
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(~chosen, -100),
        }
    if kind == "sequence":
        return batch | {"labels": torch.tensor([0, 2, 1, 1])}
    if kind == "token":
        return batch | {"labels": token_labels(batch)}
    if kind == "contrastive":
        pair = texts(side, (3, 9, 4, 6))
        return batch | {f"pair_{k}": v for k, v in pair.items()}
    return batch


KINDS = ("causal", "completion", "masked", "sequence", "token", "contrastive")
PAIRS = [(k, f) for k in KINDS for f in FAMILIES if k != "masked" or f in ENCODERS]
LEFT = [(k, f) for k, f in PAIRS if f not in ("mamba2", "rwkv")]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_every_pair_learns_a_batch_by_heart(kind: str, family: str) -> None:
    module, batch = make(kind, family), batch_of(kind)
    module.hparams["lr"], module.hparams["warmup_steps"] = 3e-3, 0
    data, val = DataLoader([batch] * 20, batch_size=None), DataLoader([batch], batch_size=None)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = trainer.validate(module, val, verbose=False)[0]
    trainer.fit(module, data, val)
    after = trainer.validate(module, val, verbose=False)[0]
    assert after["val/loss"] < 0.97 * before["val/loss"]
    names = {"sequence": {"accuracy", "f1"}, "token": {"accuracy", "f1"}, "contrastive": {"recall_at_1"}}
    assert set(after) == {"val/loss"} | {f"val/{n}" for n in names.get(kind, {"perplexity"})}
    if "val/perplexity" in after:
        assert after["val/perplexity"] == pytest.approx(math.exp(after["val/loss"]), rel=1e-5)


@pytest.mark.parametrize(("kind", "family"), LEFT)
def test_padding_on_either_side_gives_one_loss(kind: str, family: str) -> None:
    module, right = objective(kind, family)
    left = batch_of(kind, "left")
    with torch.no_grad():
        a, b = module.loss(right), module.loss(left)
    torch.testing.assert_close(a.value, b.value, rtol=1e-5, atol=1e-5)
    assert a.weight == b.weight


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_what_padding_holds_does_not_matter(kind: str, family: str) -> None:
    module, batch = objective(kind, family)
    other = {k: v.clone() for k, v in batch.items()}
    for prefix in ("", "pair_"):
        if f"{prefix}input_ids" in other:
            other[f"{prefix}input_ids"][other[f"{prefix}attention_mask"] == 0] = 7
    with torch.no_grad():
        torch.testing.assert_close(module.loss(batch).value, module.loss(other).value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "rwkv"])
def test_padding_on_the_left_is_refused_where_it_would_be_read(family: str) -> None:
    module, _ = objective("causal", family)
    with pytest.raises(ValueError, match=r"reads padding on the left as text: set tokenizer\.padding_side = 'right'"):
        module.loss(texts("left"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_causal_loss_is_transformers_own(family: str) -> None:
    module, batch = objective("causal", family)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs = module.model(**batch, labels=labels).loss
    torch.testing.assert_close(module.loss(batch).value, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_completion_loss_is_transformers_own(family: str) -> None:
    module, batch = objective("completion", family)
    torch.testing.assert_close(module.loss(batch).value, module.model(**batch).loss, rtol=0, atol=1e-5)
    assert module.loss(batch).weight == 7, "2 + 2 + 2 + 1: the first token of a text has nothing before it"


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_masked_loss_is_transformers_own(family: str) -> None:
    module, batch = objective("masked", family)
    torch.testing.assert_close(module.loss(batch).value, module.model(**batch).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama", "neox"])
@torch.no_grad()
def test_sequence_loss_is_transformers_own(family: str) -> None:
    module, batch = objective("sequence", family)
    theirs = tiny(family, "ForSequenceClassification", num_labels=LABELS, pad_token_id=1).eval()
    theirs.base_model.load_state_dict(module.model.state_dict())
    head = theirs.classifier if family == "bert" else theirs.score
    head.weight.copy_(module.head.weight)
    torch.testing.assert_close(module.loss(batch).value, theirs(**batch).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "neox"])
@torch.no_grad()
def test_token_loss_is_transformers_own(family: str) -> None:
    module, batch = objective("token", family)
    theirs = tiny(family, "ForTokenClassification", num_labels=LABELS).eval()
    theirs.base_model.load_state_dict(module.model.state_dict(), strict=False)
    head = getattr(theirs, "classifier", None) or theirs.score
    head.weight.copy_(module.head.weight)
    head.bias.zero_()
    torch.testing.assert_close(module.loss(batch).value, theirs(**batch).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.no_grad()
def test_contrastive_loss_is_its_closed_form(family: str) -> None:
    module, batch = objective("contrastive", family)
    vectors = []
    for prefix in ("", "pair_"):
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        hidden = module(ids, mask).last_hidden_state.double().numpy()
        rows = [h[m == 1] for h, m in zip(hidden, mask.numpy(), strict=True)]
        pooled = np.array([r.mean(axis=0) if family == "bert" else r[-1] for r in rows])
        vectors.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    scores = vectors[0] @ vectors[1].T / 0.05
    loss = module.loss(batch)
    assert loss.value.item() == pytest.approx(float(np.mean(logsumexp(scores, axis=1) - np.diag(scores))), rel=1e-5)
    module.update_metrics(loss)
    n = len(scores)
    theirs = RetrievalRecall(top_k=1)(
        loss.scores.flatten(), torch.eye(n).flatten().bool(), torch.arange(n).repeat_interleave(n)
    )  # type: ignore[union-attr]
    assert module.metrics["recall_at_1"].compute() == theirs


def test_without_pairs_dropout_makes_them() -> None:
    module = Contrastive(tiny("bert", dropout=0.3)).eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = module.loss(texts()).value, module.loss(texts()).value
    assert first == second > 0.01
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in module.modules())
    module.train()
    assert module.loss(texts()).value != module.loss(texts()).value
    with pytest.raises(ValueError, match=r"GPTNeoXModel has no dropout.*provide pairs"):
        Contrastive(tiny("neox")).loss(texts())


def test_metrics_count_what_counts() -> None:
    module, batch = objective("token", "gpt2")
    with torch.no_grad():
        loss = module.loss(batch)
        module.update_metrics(loss)
        scores = module.scores(module(batch["input_ids"], batch["attention_mask"]).last_hidden_state)
    counted = batch["labels"] != -100
    right = (scores.argmax(2) == batch["labels"])[counted].float().mean()
    assert loss.weight == counted.sum() == 23
    assert module.metrics["accuracy"].compute() == pytest.approx(right.item())


def test_a_batch_without_labels_is_no_nan() -> None:
    module, batch = objective("masked", "bert")
    loss = module.loss(batch | {"labels": torch.full_like(batch["labels"], -100)})
    loss.value.backward()
    assert loss.value == loss.weight == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: MaskedLM(tiny("gpt2", "ForCausalLM")), "MaskedLM needs a bidirectional model"),
        (lambda: MaskedLM(tiny("rwkv", "ForCausalLM")), "MaskedLM needs a bidirectional model"),
        (lambda: CausalLM(tiny("bert", "ForMaskedLM")), "BertForMaskedLM already sees.*use MaskedLM"),
        (lambda: CausalLM(tiny("gpt2")), "GPT2Model has no language-model head"),
        (lambda: SequenceClassification("minilm", num_labels=1), "num_labels must be at least 2, not 1"),
        (lambda: SequenceClassification(tiny("gpt2")).configure_model(), "pass num_labels="),
        (lambda: Contrastive("minilm", temperature=0.0), "temperature must be positive, not 0"),
        (lambda: objective("contrastive", "gpt2")[0].loss(texts(lengths=(4,))), "batch of one"),
        (lambda: objective("completion", "gpt2")[0].loss(texts()), "labels that are -100 for prompt tokens"),
        (lambda: objective("masked", "bert")[0].loss(texts()), "needs labels"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make_bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_a_name_that_makes_no_sense_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="no masked_lm head for 'llama'"):
        MaskedLM("smollm2-135m").configure_model()


def test_a_head_starts_small_and_its_size_is_kept() -> None:
    module = SequenceClassification(tiny("bert"), num_labels=LABELS)
    assert module.hparams["num_labels"] == LABELS
    assert 0 < module.head.weight.std() < 0.1
    assert not module.head.bias.any()
    assert isinstance(module.head, nn.Linear)
