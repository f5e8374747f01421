"""The probe: which positions count, how inputs are passed, and that nothing is left behind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from probe_models import Reader, TakesXY, ids, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from depthcb import LayerStack
from depthcb.isolation import isolated_rng
from depthcb.probe import Probe


@pytest.mark.parametrize("causal", [True, False])
def test_rows_are_what_they_say(causal: bool) -> None:
    model, tokens = Reader(causal), ids()
    outputs: list[Tensor] = []
    with torch.no_grad():
        handles = [b.register_forward_hook(lambda m, i, out: outputs.append(out)) for b in model.blocks]
        model(tokens)
    for handle in handles:
        handle.remove()
    start = int(causal)  # position 0 of a causal model never counts
    mean, last = record(model, tokens), record(model, tokens, rows="last")
    sample = record(model, tokens, rows="tokens", max_tokens=13)
    assert mean.causal == causal
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(mean.rows[layer], output[:, start:].mean(dim=1))
        torch.testing.assert_close(last.rows[layer], output[:, -1])
        assert len(sample.rows[layer]) == 13
        for row, example in zip(sample.rows[layer], sample.examples, strict=True):
            assert any(torch.equal(row, position) for position in output[example, start:])
    assert sample.examples.bincount().tolist() == [3, 3, 3, 2, 2]
    if causal:
        with pytest.raises(ValueError, match="rows='first' of a causal model"):
            record(model, tokens, rows="first")
    else:
        torch.testing.assert_close(record(model, tokens, rows="first").rows[0], outputs[0][:, 0])


@pytest.mark.parametrize("rows", ["mean", "last", "tokens"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_never_counts(rows: Any, causal: bool) -> None:
    """Rows are the same for right-padded, left-padded and unpadded inputs, batched or one by one."""
    model, lengths = Reader(causal), (7, 4, 5, 3)
    texts = [ids(1, n, seed=n)[0] for n in lengths]

    def padded(left: bool) -> dict[str, Tensor]:
        tokens, mask = torch.full((4, 7), 19), torch.zeros(4, 7, dtype=torch.int64)
        for i, text in enumerate(texts):
            where = slice(7 - len(text), 7) if left else slice(0, len(text))
            tokens[i, where], mask[i, where] = text, 1
        return {"input_ids": tokens, "attention_mask": mask}

    alone = record(model, *[text[None] for text in texts], rows=rows, max_tokens=10)
    for left in (True, False):
        together = record(model, padded(left), rows=rows, max_tokens=10)
        assert torch.equal(alone.examples, together.examples)
        for a, b in zip(alone.rows, together.rows, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        (hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0), True),
        (hf.GPTNeoXConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50), True),
        (hf.Mamba2Config(hidden_size=16, num_hidden_layers=2, vocab_size=50, num_heads=4, head_dim=8, state_size=4, n_groups=1), True),
        (hf.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, attention_hidden_size=16, rescale_every=0), True),
        (hf.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50), False),
        (hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4), False),
    ],
    ids=lambda c: getattr(c, "model_type", None),
)  # fmt: skip
def test_causality_is_found_by_perturbing(config: Any, causal: bool) -> None:
    model = hf.AutoModel.from_config(config)
    batch = torch.randn(4, 3, 8, 8) if config.model_type == "vit" else {"input_ids": ids(4, 9)}
    assert record(model, batch).causal == causal


def test_maps_and_vectors() -> None:
    images, vectors = torch.randn(4, 3, 5, 5), torch.randn(4, 3)
    conv = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 1))
    with torch.no_grad():
        torch.testing.assert_close(record(conv, images).rows[1], conv(images).mean(dim=(2, 3)))
    assert record(conv, images, rows="tokens", max_tokens=40).rows[1].shape == (40, 8)
    last = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 8))  # no convolution: features last
    with torch.no_grad():
        torch.testing.assert_close(record(last, images).rows[1], last(images).mean(dim=(1, 2)))
    linear = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 8))
    with torch.no_grad():
        torch.testing.assert_close(record(linear, vectors).rows[1], linear(vectors))


@dataclass
class Output:
    hidden: Tensor
    extra: int = 0


class Odd(nn.Module):
    """Wraps its output in a given type."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap, self.linear = wrap, nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        while not isinstance(x, Tensor):
            x = x.hidden if isinstance(x, Output) else x["hidden"] if isinstance(x, dict) else x[0]
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: (t, None), lambda t: {"hidden": t}, lambda t: Output(t), lambda t: [t]]
)
def test_layers_that_return_tuples_dicts_and_dataclasses(wrap: Any) -> None:
    model = nn.Sequential(Odd(wrap), Odd(wrap))
    assert record(model, torch.randn(4, 3)).rows[0].shape == (4, 3)


class TakesBatch(TakesXY):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.blocks(batch["pixels"])


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (TakesXY(), torch.ones(4, 3)),
        (TakesXY(), (torch.ones(4, 3), torch.zeros(4))),
        (TakesXY(), [torch.ones(4, 3), torch.zeros(4)]),
        (TakesXY(), {"x": torch.ones(4, 3), "labels": torch.zeros(4)}),
        (TakesBatch(), {"pixels": torch.ones(4, 3), "labels": torch.zeros(4)}),
    ],
)
def test_batches_are_fed_as_the_signature_asks(model: nn.Module, batch: Any) -> None:
    probe = Probe.collect(batch, limit=8)
    assert len(probe.batches) == 1
    assert probe.record(model, LayerStack.find(model)).rows[0].shape == (4, 3)


def test_forward_overrides_how_a_batch_is_fed() -> None:
    model = TakesBatch()
    fed = record(model, torch.ones(4, 3), forward=lambda m, x: m.blocks(2 * x))
    with torch.no_grad():
        torch.testing.assert_close(fed.rows[0], model.blocks[0](torch.full((4, 3), 2.0)))


def test_sources() -> None:
    batches = [{"input_ids": ids(4)}, {"input_ids": ids(3)}]
    assert [len(b["input_ids"]) for b in Probe.collect(batches, limit=1).batches] == [4, 3]
    probe = Probe.collect(TensorDataset(torch.ones(9, 2)), limit=5)
    assert len(probe.batches[0][0]) == 5
    assert Probe.collect(probe, limit=1) is probe


def test_the_hash_tells_probes_apart() -> None:
    tokens = ids()
    same = [Probe((tokens,)).hash, Probe((tokens.clone(),)).hash]
    other = [Probe((tokens + 1,)).hash, Probe((tokens[:4],)).hash, Probe((tokens,), rows="last").hash]
    assert same[0] == same[1]
    assert len({same[0], *other}) == 4


class Touchy(nn.Module):
    """Uses randomness in eval mode and complains about a call to train()."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))

    def train(self, mode: bool = True) -> Any:
        raise AssertionError("a probe must not call train() or eval(): modules attach side effects to them")

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.backends.cuda.matmul.allow_tf32
        with torch.backends.cudnn.flags(enabled=False):  # as torch's CTC loss does
            pass
        return self.blocks(x) + torch.rand(1) + random.random() + np.random.rand()


def test_nothing_is_left_behind() -> None:
    model = Touchy()
    model.blocks[1].training = False
    torch.set_float32_matmul_precision("high")
    flags = [m.training for m in model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            recording = record(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert recording.rows[0].dtype == torch.float32
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_go_when_the_forward_fails() -> None:
    model = TakesXY()
    with pytest.raises(RuntimeError, match="on purpose"):
        record(model, torch.ones(4, 3), forward=lambda m, b: [m(b), (_ for _ in ()).throw(RuntimeError("on purpose"))])
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


@pytest.mark.filterwarnings("default")  # the compiler's own warnings
def test_compiled_models_are_seen() -> None:
    """Compiled code runs no forward hooks; the probe runs the plain code behind it."""
    plain = Reader()
    expected = record(plain, ids()).rows
    for compiled in (torch.compile(plain, backend="eager"), Reader()):
        if compiled is not plain and isinstance(compiled, Reader):
            for block in compiled.blocks:
                block.compile(backend="eager")
        compiled(ids())
        torch.testing.assert_close(record(compiled, ids()).rows, expected)


def test_a_tokenizers_own_mapping_in_a_tuple_is_read() -> None:
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[:, 5:] = 0
    plain = {"input_ids": ids(4), "attention_mask": mask}
    wrapped = Probe.collect((hf.BatchEncoding(plain), torch.zeros(4)), limit=4)
    model = Reader()
    found = wrapped.record(model, LayerStack.find(model)).rows
    torch.testing.assert_close(found, record(model, plain).rows)
    assert not torch.equal(found[0], record(model, {"input_ids": ids(4)}).rows[0])


def test_torchs_own_encoder_with_padding_is_read() -> None:
    """Its fused kernels run no hook, and fail on padding when there is one."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3)
    x, padding = torch.randn(5, 6, 8), torch.zeros(5, 6, dtype=torch.bool)
    padding[:, 4:] = True
    recording = record(encoder, x, forward=lambda m, b: m(b, src_key_padding_mask=padding[: len(b)]))
    assert [r.shape for r in recording.rows] == [(5, 8)] * 3
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_take_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    assert torch.isfinite(record(TakesXY().to(dtype), torch.ones(4, 3)).rows[0]).all()


def test_a_loader_whose_dataset_gives_whole_batches() -> None:
    loader = DataLoader([torch.full((4, 3), float(i)) for i in range(5)], batch_size=None)
    assert [b[0, 0].item() for b in Probe.collect(loader, 8).batches] == [0, 1]


def test_ids_and_mask_are_found_in_nested_dicts() -> None:
    tokens, mask = ids(), torch.ones(5, 7, dtype=torch.int64)
    mask[1:, 5:] = 0  # the first row is the longest
    model = Reader(causal=True)
    flat = record(model, {"input_ids": tokens, "attention_mask": mask})
    batch = {"index": torch.arange(5), "text": {"input_ids": tokens, "attention_mask": mask}}
    nested = record(model, batch, forward=lambda m, b: m(**b["text"]))
    assert nested.causal
    torch.testing.assert_close(nested.rows, flat.rows)


def test_conv1d_maps_are_channels_first() -> None:
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Conv1d(5, 5, 3))
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(record(model, x).rows[1], model(x).mean(dim=2))


def test_buffers_that_a_forward_moves_are_put_back() -> None:
    model = TakesXY()
    model.register_buffer("calls", torch.zeros(1))
    buffer = model.calls

    def counts(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.calls = m.calls + 1
        return m(x)

    record(model, torch.ones(4, 3), forward=counts)
    assert model.calls is buffer
    assert model.calls.item() == 0


def test_a_gpu_not_yet_in_use_keeps_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def queued(*_: Any) -> None:
        raise AssertionError("torch.manual_seed would queue a seed for every GPU")

    monkeypatch.setattr(torch, "manual_seed", queued)
    with isolated_rng(3):
        inside = torch.rand(1)
    assert inside == torch.rand(1, generator=torch.Generator().manual_seed(3))
