"""Preference tuning: the loss against numpy, where its reference comes from, and fits that are resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.special import log_expit, log_softmax
from shrunk import write_tokenizer
from torch import Tensor

from depthcb import DepthProfile
from depthcb_recipes import DPO, ObjectiveDistanceMonitor, PreferencePairs
from depthcb_recipes.data.corpus import completions, python_corpus

BETA = 0.3


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, initializer_range=0.3)).eval()


def pairs() -> dict[str, Tensor]:
    """Three pairs; prompts of 2 tokens, completions of 2 to 5, padding on the right."""
    batch: dict[str, Tensor] = {}
    for prefix, lengths, seed in (("", (7, 5, 4), 0), ("rejected_", (4, 6, 7), 1)):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, 40, (3, 7), generator=generator)
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(7) < 2), -100)
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}labels": labels}
    return batch


def sums(model: Any, batch: dict[str, Tensor], prefix: str) -> np.ndarray:
    """The completions' log-probabilities, by a loop in float64."""
    ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits.double().numpy()
    said = log_softmax(logits, axis=-1)
    return np.array(
        [
            sum(said[row, at - 1, labels[row, at]] for at in range(1, ids.shape[1]) if labels[row, at] != -100)
            for row in range(len(ids))
        ]
    )


def test_the_loss_agrees_with_numpy() -> None:
    """TRL's sigmoid loss: -logsigmoid(beta * (pi_logratios - ref_logratios)); accuracy and margin are its rewards'."""
    before, now, batch = tiny(0), tiny(1), pairs()
    batch |= DPO(before).reference(batch)
    pi, ref = (sums(m, batch, "") - sums(m, batch, "rejected_") for m in (now, before))
    dpo = DPO(now, beta=BETA)
    loss = dpo.loss(batch)
    assert loss.value.item() == pytest.approx(-log_expit(BETA * (pi - ref)).mean(), rel=1e-5)
    assert loss.weight == 3
    dpo.update_metrics(loss)
    assert dpo.metrics["margin"].compute().item() == pytest.approx(BETA * (pi - ref).mean(), rel=1e-4)
    assert dpo.metrics["accuracy"].compute().item() == pytest.approx((pi > ref).mean())


def test_a_loss_by_hand() -> None:
    """With uniform logits each token has log(1/40): margins come from the lengths and the reference alone."""
    model, batch = tiny(0), pairs()
    torch.nn.init.zeros_(model.lm_head.weight)
    batch |= {
        "reference_chosen": torch.tensor([-10.0, -9.0, -8.0]),
        "reference_rejected": torch.tensor([-7.0, -9.0, -20.0]),
    }
    tokens, one = [(5, 2), (3, 4), (2, 5)], math.log(1 / 40)
    margins = [(c * one + a) - (r * one + b) for (c, r), a, b in zip(tokens, (10, 9, 8), (7, 9, 20), strict=True)]
    expected = sum(math.log(1 + math.exp(-BETA * margin)) for margin in margins) / 3
    assert DPO(model, beta=BETA).loss(batch).value.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_at_the_pretrained_weights() -> None:
    """-beta / 2 of the gradient of log p(chosen) - log p(rejected), by transformers' own loss."""
    model, batch = tiny(0), pairs()
    dpo = DPO(model, beta=BETA)
    loss = dpo.loss(batch | dpo.reference(batch)).value
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total: Any = 0.0
    for sign, prefix in ((1, ""), (-1, "rejected_")):
        own = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")}
        total = total - sign * model(**own).loss * (own["labels"] != -100).sum()
    (-BETA / 2 * total / 3).backward()
    for grad, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_pairs_of_the_python_corpus() -> None:
    """A rejected body is that of another function of the same file."""
    rows = PreferencePairs("minilm").python_rows()
    whole = completions(python_corpus("code"))
    bodies: dict[str, set[str]] = {}
    for body, file in zip(whole["completion"], whole["file"], strict=True):
        bodies.setdefault(file, set()).add(body)
    assert rows["chosen"] == whole["completion"]
    assert all(body in bodies[file] for body, file in zip(rows["rejected"], rows["file"], strict=True))
    shared = sum(a == b for a, b in zip(rows["chosen"], rows["rejected"], strict=True))
    assert shared < 0.2 * len(rows)  # files with one function, whose rows are dropped


def test_encoding(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    table = [{"q": "def f():\n", "good": f"    return {i}", "bad": f"    pass # {i * i}"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*table, {**table[0], "bad": table[0]["good"]}]))
    data = PreferencePairs(
        str(tmp_path), str(file), prompt="q", chosen="good", rejected="bad", batch_size=4, max_length=32
    )
    assert len(data.train_data) + len(data.val_data) == 40  # a pair of equal texts is none
    batch = next(iter(data.train_dataloader()))
    read = data.tokenizer.decode
    for row in range(4):
        for prefix, holds in (("", "return"), ("rejected_", "pass")):
            ids, labels = batch[f"{prefix}input_ids"][row], batch[f"{prefix}labels"][row]
            real = batch[f"{prefix}attention_mask"][row] == 1
            assert read(ids[real]).startswith("def f():\n")
            assert holds in read(ids[labels != -100])
            assert "def" not in read(ids[labels != -100])
            assert ids[labels != -100][-1] == data.tokenizer.eos_token_id


def fit(folder: Path, steps: int, ckpt: str | None = None) -> tuple[DPO, Any]:
    pl.seed_everything(0)
    data = PreferencePairs(str(folder), max_length=32, batch_size=4, train_rows=32, val_rows=96, stateful=True)
    keep = ModelCheckpoint(folder / "kept", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    watching = [DepthProfile(), ObjectiveDistanceMonitor(most_batches=24, width=3.0)]
    trainer = pl.Trainer(
        max_steps=steps, val_check_interval=8, callbacks=[*watching, keep], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
    )  # fmt: skip
    dpo = DPO(str(folder), lr=1e-3, warmup_steps=0)
    trainer.fit(dpo, data, ckpt_path=ckpt, weights_only=True)
    return dpo, trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:.*set_vital")
def test_a_fit_learns_and_a_resumed_one_keeps_the_reference(tmp_path: Path) -> None:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": write_tokenizer(tmp_path)}
    torch.manual_seed(0)
    config = hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    whole, trainer = fit(tmp_path, 16)
    watch, distance = trainer.callbacks[:2]
    assert trainer.callback_metrics["val/loss"] < math.log(2)
    assert trainer.callback_metrics["val/margin"] > 0
    assert trainer.callback_metrics["val/accuracy"] > 0.5
    assert min(watch.profiles[-1].change) > 0
    assert distance.distance is not None
    assert distance.distance.overall is not None
    (path,) = (tmp_path / "kept").glob("*step=8.ckpt")
    resumed, _ = fit(tmp_path, 16, str(path))
    pretrained, batch = DPO(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), None
    data = PreferencePairs(str(tmp_path), max_length=32, batch_size=40, train_rows=32, val_rows=96)
    batch = data.collate(list(data.train_data))
    expected = torch.stack(list(pretrained.eval().reference(batch).values()), dim=1)
    for module in (whole, resumed):
        assert len(module.references) == 2
        assert any(
            t.shape == expected.shape and torch.allclose(t, expected, rtol=1e-5) for t in module.references.values()
        )
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="beta must be positive, not 0"):
        DPO(tiny(0), beta=0)
    with pytest.raises(ValueError, match=r"needs reference_chosen and reference_rejected: use .*PreferencePairs"):
        DPO(tiny(0)).loss(pairs())
