"""Which dimensions are examples, positions and features, and which mask belongs to the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from probe_models import record
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from depthcb import LayerStack, depth_profile
from depthcb.probe import Probe, first_tensor


def outputs_of(layers: Iterable[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """What the layers return while ``run`` calls their model."""
    outputs: list[Tensor] = []
    # Copied, because some models go on in place.
    handles = [layer.register_forward_hook(lambda m, a, o: outputs.append(first_tensor(o).clone())) for layer in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


class TimeFirst(nn.Module):
    """nn.TransformerEncoder with its default batch_first=False."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(50, 8), nn.Parameter(torch.randn(length, 1, 8))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(ids.T) + self.place)


@pytest.mark.parametrize("length", [12, 16])
def test_activations_with_time_first(length: int) -> None:
    model = TimeFirst(length).eval()
    ids = torch.randint(0, 50, (16, length))
    found = record(model, ids)
    torch.backends.mha.set_fastpath_enabled(False)
    outputs = outputs_of(model.encoder.layers, lambda: model(ids))
    torch.backends.mha.set_fastpath_enabled(True)
    assert found.layout.axes == ("TBD",) * 3
    assert not found.causal
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, output.mean(dim=0))


class Block(nn.Module):
    def __init__(self, wrap: Any, dilation: int) -> None:
        super().__init__()
        self.first = wrap(nn.Conv1d(16, 16, 3, padding=dilation, dilation=dilation))
        self.second = wrap(nn.Conv1d(16, 16, 3, padding=dilation, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x).relu())).relu()


@pytest.mark.parametrize("wrap", [lambda conv: conv, weight_norm])
@pytest.mark.parametrize("size", [8, 16])
def test_convolutions_in_a_block_have_channels_first(wrap: Any, size: int) -> None:
    model = nn.Sequential(*[Block(wrap, 2**i) for i in range(3)])
    x = torch.randn(size, 16, 40)
    with torch.no_grad():
        torch.testing.assert_close(record(model, x).rows[2], model(x).mean(dim=2))


def test_volumes() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(3)])
    x = torch.randn(8, 2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(record(model, x).rows[2], model(x).mean(dim=(2, 3, 4)))


class Scaled(nn.Module):
    """No weight says which dimension holds the features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_what_stays_ambiguous_is_an_error_whose_remedy_works() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), *[Scaled() for _ in range(3)])
    x = torch.randn(8, 3, 5, 5)
    stack = LayerStack.find(model, ["1", "2", "3"])
    with pytest.raises(ValueError, match=r"Layer '1' returns shape \(8, 3, 5, 5\) .* Pass axes= with one letter"):
        Probe((x,)).record(model, stack)
    with torch.no_grad():
        found = Probe((x,), axes="BDTT").record(model, stack).rows[2]
        torch.testing.assert_close(found, model(x).mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="axes='BTT': use one letter per dimension"):
        Probe((x,), axes="BTT")


def t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )).eval()  # fmt: skip


def seq2seq(kind: str, target: int) -> dict[str, Tensor]:
    ids, labels = torch.randint(2, 50, (16, 12)), torch.randint(2, 50, (16, target))
    for i in range(16):
        ids[i, 5 + i % 7 :], labels[i, 3 + i % 5 :] = 0, -100
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    if kind == "masks":
        decoder = torch.cat([torch.zeros(16, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], dim=1)
        batch |= {"decoder_input_ids": decoder, "decoder_attention_mask": (labels != -100).long()}
    return batch


@pytest.mark.parametrize("target", [9, 12])
@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_decoder_has_a_mask_of_its_own(kind: str, target: int) -> None:
    """Also where the encoder's mask has as many positions; position 0 of a causal model never counts."""
    model, batch = t5(), seq2seq(kind, target)
    found = Probe((batch,)).record(model, LayerStack.find(model, "decoder.block"))
    outputs = outputs_of(model.decoder.block, lambda: model(**batch))
    real = (batch["labels"] != -100)[..., None].float()
    real[:, 0] = 0
    assert found.causal
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, (output * real).sum(dim=1) / real.sum(dim=1))


def test_an_image_tower_has_no_text_mask() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = hf.SiglipConfig(
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
    )
    model = hf.SiglipModel(config).eval()
    mask = (torch.arange(16) < torch.randint(4, 17, (8, 1))).long()
    batch = {
        "input_ids": torch.randint(2, 60, (8, 16)) * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(8, 3, 16, 16),
    }
    layers = "vision_model.encoder.layers"
    found = Probe((batch,)).record(model, LayerStack.find(model, layers))
    outputs = outputs_of(model.vision_model.encoder.layers, lambda: model(**batch))
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, output.mean(dim=1))
    text = Probe((batch,)).record(model, LayerStack.find(model, "text_model.encoder.layers"))
    assert text.layout.mask == "attention_mask"


def test_unchanged_models_have_changed_by_nothing_in_any_layout() -> None:
    model = TimeFirst(16)
    assert depth_profile(model, model, torch.randint(0, 50, (16, 16)))["cka"].change == (0.0, 0.0, 0.0)


def masked_mean(output: Tensor, real: Tensor) -> Tensor:
    weights = real[..., None].float()
    return (output * weights).sum(dim=1) / weights.sum(dim=1)


def test_speech_encoders_have_fewer_positions_than_samples() -> None:
    config = hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        num_feat_extract_layers=2, feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.0,
    )  # fmt: skip
    model = hf.Wav2Vec2Model(config).eval()
    lengths = torch.arange(400, 800, 50)
    mask = (torch.arange(800) < lengths[:, None]).long()
    batch = {"input_values": torch.randn(8, 800) * mask, "attention_mask": mask}
    found = Probe((batch,)).record(model, LayerStack.find(model, "encoder.layers"))
    outputs = outputs_of(model.encoder.layers, lambda: model(**batch))
    frames = ((lengths - 10) // 5 + 1 - 3) // 2 + 1
    real = torch.arange(outputs[0].shape[1]) < frames[:, None]
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, masked_mean(output, real))


def test_an_encoder_that_pads_to_whole_windows() -> None:
    config = hf.LongformerConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50,
        attention_window=4, max_position_embeddings=40,
    )  # fmt: skip
    model = hf.LongformerModel(config).eval()
    mask = (torch.arange(9) < torch.arange(2, 10)[:, None]).long()
    batch = {"input_ids": torch.randint(3, 50, (8, 9)), "attention_mask": mask}
    found = Probe((batch,)).record(model, LayerStack.find(model, "encoder.layer"))
    outputs = outputs_of(model.encoder.layer, lambda: model(**batch))
    assert outputs[0].shape[1] == 12
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, masked_mean(output[:, :9], mask))


# peft asks transformers for something by an older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prompt_tuning_adds_positions() -> None:
    base = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32))
    peft_config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, peft_config).eval()
    mask = (torch.arange(9) < torch.arange(2, 10)[:, None]).long()
    batch = {"input_ids": torch.randint(0, 50, (8, 9)), "attention_mask": mask}
    stack = LayerStack.find(model)
    found = Probe((batch,)).record(model, stack)
    outputs = outputs_of(stack.modules, lambda: model(**batch))
    real = torch.cat([torch.ones(8, 4, dtype=torch.long), mask], dim=1)
    real[:, 0] = 0
    assert found.causal
    for rows, output in zip(found.rows, outputs, strict=True):
        torch.testing.assert_close(rows, masked_mean(output, real))
