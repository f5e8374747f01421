import math
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from depthcb_recipes import PackedText
from depthcb_recipes.backbones.loading import load_backbone, load_tokenizer
from depthcb_recipes.objectives.causal_lm import CausalLM
from depthcb_recipes.objectives.objective import decay_groups

VOCABULARY = 50


def tiny(vocabulary=VOCABULARY, width=16):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=width, n_head=2, n_positions=64, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def padded_batch(rows=3, length=12):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{**quiet, "enable_checkpointing": False, **options})


def own_loss(model, batch):
    with torch.no_grad():
        return model(**batch).loss


@pytest.mark.parametrize("labelled", [True, False])
def test_loss_is_transformers_own(labelled):
    module = CausalLM(tiny().eval())
    batch = padded_batch()
    given = batch if labelled else {key: batch[key] for key in ("input_ids", "attention_mask")}
    loss, tokens = module.loss(given)[:2]
    assert loss.item() == pytest.approx(own_loss(module.model, batch).item(), abs=1e-5)
    assert tokens == (batch["labels"][:, 1:] != -100).sum()


def test_a_batch_may_be_ids_alone():
    module = CausalLM(tiny().eval())
    ids = padded_batch()["input_ids"]
    loss, tokens = module.loss({"input_ids": ids})[:2]
    assert loss.item() == pytest.approx(own_loss(module.model, {"input_ids": ids, "labels": ids}).item(), abs=1e-5)
    assert tokens == ids.shape[0] * (ids.shape[1] - 1)


def test_forward_leaves_the_head_out():
    module = CausalLM(tiny().eval())
    used = []
    module.model.lm_head.register_forward_hook(lambda *_: used.append(1))
    batch = padded_batch()
    output = module(batch["input_ids"], batch["attention_mask"])
    assert output.last_hidden_state.shape == (3, 12, 16)
    assert output.past_key_values is None
    assert not used
    module.loss(batch)
    assert used


def test_perplexity_counts_each_token_once():
    batches = [padded_batch(rows) for rows in (1, 5, 2)]
    module = CausalLM(tiny().eval())
    result = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    tokens = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
    losses = [own_loss(module.model, batch).item() for batch in batches]
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    assert result["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert result["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert mean != pytest.approx(sum(losses) / 3, rel=1e-6)


class Curve(Callback):
    def __init__(self):
        self.loss, self.perplexity, self.rates = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_epoch_end(self, trainer, pl_module):  # the module's values are visible to callbacks by now
        self.loss.append(trainer.callback_metrics["val/loss"].item())
        self.perplexity.append(trainer.callback_metrics["val/perplexity"].item())


@pytest.mark.parametrize(
    ("optimizer", "lr", "precision"),
    [
        ("adamw", 1e-2, "32-true"),
        ("sgd", 0.5, "32-true"),
        pytest.param("adamw", 1e-2, "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_python_text_is_learned(optimizer, lr, precision):
    tokenizer = load_tokenizer("minilm")
    data = PackedText(tokenizer, block_size=32, batch_size=8, val_rows=16, train_rows=160)
    module = CausalLM(tiny(len(tokenizer)), optimizer=optimizer, lr=lr, warmup_steps=5)
    curve = Curve()
    fit = trainer(max_epochs=2, precision=precision, callbacks=[curve])
    fit.fit(module, data)
    assert fit.global_step == 40
    assert curve.loss[-1] < curve.loss[0] - 0.5
    assert curve.perplexity == pytest.approx([math.exp(loss) for loss in curve.loss], rel=1e-5)
    assert "train/loss" in fit.callback_metrics
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert curve.rates == pytest.approx([lr * min((i + 1) / 5, (40 - i) / 35) for i in range(40)])


def test_two_fits_of_one_seed_are_equal():
    results = []
    for global_seed in (1, 2):
        model = tiny(30522)
        torch.manual_seed(global_seed)
        model.config.resid_pdrop = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        data = PackedText(load_tokenizer("minilm"), block_size=16, val_rows=8, train_rows=32)
        trainer(max_steps=4).fit(CausalLM(model, lr=1e-3), data)
        results.append(model.transformer.wte.weight)
    assert torch.equal(*results)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([padded_batch()] * 3)


@pytest.mark.parametrize(
    ("data", "end"),
    [([padded_batch()] * 3, {"max_epochs": -1, "max_time": {"seconds": 1}}), (Stream(), {"max_epochs": 1})],
    ids=["endless", "unknown length"],
)
def test_a_fit_whose_end_is_unknown_keeps_its_peak(data, end):
    curve = Curve()
    module = CausalLM(tiny(), lr=1e-3, warmup_steps=0)
    batches = DataLoader(data, batch_size=None)
    trainer(callbacks=[curve], limit_val_batches=0, **end).fit(module, batches, batches)
    assert set(curve.rates) == {1e-3}


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.01), ("sgd", 0.0)])
def test_the_penalty_of_sgd_is_off_by_default(optimizer, decay):
    module = CausalLM(tiny(), optimizer=optimizer)
    batches = DataLoader([padded_batch()], batch_size=None)
    trainer(max_steps=1, limit_val_batches=0).fit(module, batches, batches)
    assert module.optimizers().param_groups[0]["weight_decay"] == decay


def test_vectors_do_not_decay():
    model = tiny()
    model.transformer.wpe.weight.requires_grad_(False)
    decayed, spared = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decayed = {names[id(parameter)] for parameter in decayed["params"]}
    in_spared = {names[id(parameter)] for parameter in spared["params"]}
    assert in_decayed | in_spared == set(names.values()) - {"transformer.wpe.weight"}
    assert not in_decayed & in_spared
    assert in_spared == {name for name in names.values() if name.endswith("bias") or ".ln_" in name}


def test_what_a_model_marks_itself_does_not_decay():
    config = Mamba2Config(num_hidden_layers=1, hidden_size=16, num_heads=4, head_dim=8, state_size=8, vocab_size=32)
    model = Mamba2ForCausalLM(config)
    decayed, _ = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not any(names[id(parameter)].endswith((".A_log", ".D", ".dt_bias")) for parameter in decayed["params"])


def test_a_name_is_loaded_once_when_the_trainer_sets_the_model_up():
    module = CausalLM("minilm", lr=1e-4)
    assert not hasattr(module, "model")
    assert module.hparams["backbone"] == "minilm"
    data = PackedText(load_tokenizer("minilm"), block_size=16, val_rows=8, train_rows=16)
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(module, data)
    loaded = module.model
    module.configure_model()
    assert module.model is loaded
    reference, _ = load_backbone("minilm")
    assert not torch.equal(
        loaded.bert.encoder.layer[0].output.dense.weight, reference.bert.encoder.layer[0].output.dense.weight
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.ckpt"
        fit.save_checkpoint(path, weights_only=True)
        again = CausalLM.load_from_checkpoint(path)
    assert again.hparams["lr"] == 1e-4
    for parameter, trained in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(parameter, trained)


def test_a_model_is_used_as_it_is():
    model = tiny()
    module = CausalLM(model)
    module.configure_model()
    assert module.model is model
    assert "backbone" not in module.hparams
    assert module.hparams["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be one of 'adamw', 'sgd', not 'adam'"),
        ({"lr": 0.0}, "lr must be positive, not 0.0"),
        ({"lr": -1e-3}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLM("minilm", **arguments)
