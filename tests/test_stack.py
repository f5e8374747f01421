"""The layer stack of every family is found without a table of names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from depthcb import LayerStack

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
SSM = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 99}
VISION = {"image_size": 32, "patch_size": 8}

ONE_LIST = {
    "encoder.layer": [hf.BertConfig(**SMALL), hf.RobertaConfig(**SMALL), hf.ElectraConfig(**SMALL, embedding_size=32)],
    "transformer.layer": [hf.DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=99)],
    "transformer.h": [
        hf.GPT2Config(**GPT),
        hf.CodeGenConfig(**{**GPT, "n_head": 4}, rotary_dim=4),
        hf.GPTJConfig(**GPT, rotary_dim=4),
        hf.FalconConfig(**SMALL),
    ],
    "model.decoder.layers": [
        hf.OPTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, ffn_dim=64, vocab_size=99)
    ],
    "model.layers": [hf.LlamaConfig(**SMALL), hf.PhiConfig(**SMALL), hf.MixtralConfig(**SMALL, num_local_experts=4)],
    "gpt_neox.layers": [hf.GPTNeoXConfig(**SMALL), hf.GPTNeoXConfig(**SMALL, use_parallel_residual=False)],
    "backbone.layers": [hf.MambaConfig(**SSM), hf.Mamba2Config(**SSM, num_heads=4, head_dim=16, state_size=8, n_groups=1)],
    "rwkv.blocks": [hf.RwkvConfig(**SSM, attention_hidden_size=32)],
    "layers": [hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **VISION)],
}  # fmt: skip
DECODERS = (
    hf.GPT2Config, hf.CodeGenConfig, hf.GPTJConfig, hf.FalconConfig, hf.OPTConfig, hf.LlamaConfig, hf.PhiConfig,
    hf.MixtralConfig, hf.GPTNeoXConfig, hf.MambaConfig, hf.Mamba2Config, hf.RwkvConfig,
)  # fmt: skip


def build(config: hf.PreTrainedConfig) -> nn.Module:
    auto = hf.AutoModelForCausalLM if isinstance(config, DECODERS) else hf.AutoModel
    return auto.from_config(config)


class Block(nn.Module):
    """A block with submodules, one of them a small Sequential."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def blocks(count: int) -> list[Block]:
    return [Block() for _ in range(count)]


@pytest.mark.parametrize(
    ("path", "config"), [pytest.param(p, c, id=f"{c.model_type}") for p, cs in ONE_LIST.items() for c in cs]
)
def test_families(path: str, config: hf.PreTrainedConfig) -> None:
    model = build(config)
    stack = LayerStack.find(model)
    assert stack.names == tuple(f"{path}.{i}" for i in range(3))
    assert LayerStack.find(model, layers=path) == stack
    assert LayerStack.find(model, layers=f"{path}.*") == stack
    owned = [id(p) for layer in stack.parameters() for p in layer]
    outside = [id(p) for group in stack.outside().values() for p in group]
    assert len(owned + outside) == len(set(owned + outside))
    assert set(owned + outside) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("config", "first", "last", "count"),
    [
        (hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 1, 2]),
         "encoder.stages.0.layers.0", "encoder.stages.2.layers.1", 5),
        (hf.SwinConfig(**{**VISION, "patch_size": 4}, embed_dim=8, depths=[1, 2, 1], num_heads=[2] * 3, window_size=4),
         "encoder.layers.0.blocks.0", "encoder.layers.2.blocks.0", 4),
        (hf.ConvNextConfig(hidden_sizes=[8, 16, 16], depths=[2, 2, 3], num_stages=3),
         "encoder.stages.0.layers.0", "encoder.stages.2.layers.2", 7),
    ],
    ids=["resnet", "swin", "convnext"],
)  # fmt: skip
def test_stages_are_one_stack(config: hf.PreTrainedConfig, first: str, last: str, count: int) -> None:
    names = LayerStack.find(build(config)).names
    assert (names[0], names[-1], len(names)) == (first, last, count)


class NumberedStages(nn.Module):
    """A ResNet in the layout of torchvision: stages are numbered attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layer1, self.layer2 = nn.Sequential(*blocks(2)), nn.Sequential(*blocks(1))
        self.fc = nn.Linear(8, 2)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Sequential(*blocks(3)), nn.Sequential(*blocks(2))


class FusedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8, num_layers=3), nn.Linear(8, 9)


class SeparateLSTMs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstms = nn.Embedding(9, 8), nn.ModuleList(nn.LSTM(8, 8) for _ in range(3))


class Distilled(nn.Module):
    """A student with a larger, frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.ModuleList(blocks(12)), nn.ModuleList(blocks(1) + blocks(1))
        self.teacher.requires_grad_(False)


class Aliased(nn.Module):
    """One list under two names, and a list of embedding tables longer than it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 8) for _ in range(5))
        self.layers = nn.ModuleList(blocks(3))
        self.body = nn.ModuleDict({"layers": self.layers})


def swin_like() -> nn.Module:
    """Stages and down-samplers in one Sequential, as in torchvision's Swin."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 4), nn.LayerNorm(8))
    return nn.Sequential(stem, nn.Sequential(*blocks(2)), nn.Conv2d(8, 8, 2), nn.Sequential(*blocks(2)))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Sequential(*blocks(3)), ["0", "1", "2"]),
        (lambda: nn.Sequential(nn.Embedding(9, 8), *blocks(2), nn.Linear(8, 9)), ["1", "2"]),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), ["0", "2", "4"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), ["0", "3"]),
        (NumberedStages, ["layer1.0", "layer1.1", "layer2.0"]),
        (swin_like, ["1.0", "1.1", "3.0", "3.1"]),
        (SeparateLSTMs, ["lstms.0", "lstms.1", "lstms.2"]),
        (Aliased, ["layers.0", "layers.1", "layers.2"]),
    ],
)  # fmt: skip
def test_plain_torch_models(make: Callable[[], nn.Module], names: list[str]) -> None:
    assert list(LayerStack.find(make()).names) == names


def t5() -> nn.Module:
    return hf.T5Model(hf.T5Config(d_model=32, d_ff=64, num_layers=3, num_heads=2, vocab_size=99, d_kv=16))


def jamba() -> nn.Module:
    config = hf.JambaConfig(**{**SMALL, "num_hidden_layers": 8}, num_key_value_heads=2, num_experts=2)
    return hf.JambaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, r"(?s)2 equally plausible stacks in T5Model: .*layers='encoder\.block'"),
        (TwoTowers, r"(?s)layers='image': image \(3 x Block.*layers='text': text \(2 x Block"),
        (Distilled, r"(?s)teacher \(12 x Block, [\d,]+ frozen parameters\).*student \(2 x Block"),
        (FusedLSTM, r"lstm \(3 x LSTM.*use one nn\.LSTM per layer"),
        (jamba, r"model\.layers .*alternate; name the layers"),
        (lambda: nn.Linear(2, 2), "No list of layers of one class found in Linear: name them with layers="),
        (lambda: build(hf.BertConfig(**{**SMALL, "num_hidden_layers": 1})), r"with one layer only: 'encoder\.layer'"),
    ],
)
def test_what_cannot_be_told_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerStack.find(make())


def test_the_user_can_name_layers() -> None:
    model = t5()
    assert LayerStack.find(model, "encoder").names == LayerStack.find(model, "encoder.block").names
    assert LayerStack.find(model, "decoder.block.[02]").names == ("decoder.block.0", "decoder.block.2")
    assert LayerStack.find(model, ["decoder.block.2", "encoder.block.0"]).names == (
        "decoder.block.2",
        "encoder.block.0",
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("encoder.layers", r"layers='encoder\.layers' matches no module of T5Model; did you mean .*encoder"),
        ("encoder.blocks.*", "matches no module"),
        (["encoder.block.0", "x"], "layers='x' matches no module"),
        (["encoder.block.0"], "at least 2 layers, found only 'encoder.block.0'"),
        (["encoder.block.0", "encoder.block.0.layer"], "is inside layer 'encoder.block.0'"),
        (["encoder.block.0", "encoder.block.0"], "One module appears twice"),
    ],
)
def test_bad_names_are_refused(layers: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerStack.find(t5(), layers)


def test_a_glob_leaves_out_what_has_no_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert LayerStack.find(model, "*").names == ("0", "2")


def test_names_are_stable_under_wrappers() -> None:
    plain = nn.Sequential(nn.Embedding(9, 8), *blocks(3))
    names, outside = LayerStack.find(plain).names, list(LayerStack.find(plain).outside())
    per_block = nn.Sequential(plain[0], *[torch.compile(checkpoint_wrapper(b)) for b in plain[1:]])
    for wrapped in (per_block, torch.compile(plain), nn.Sequential(plain[0], *map(checkpoint_wrapper, plain[1:]))):
        stack = LayerStack.find(wrapped)
        assert stack.names == names
        assert list(stack.outside()) == outside
        assert LayerStack.find(wrapped, ["1", "3"]).names == ("1", "3")


def test_a_tied_tensor_belongs_to_one_layer() -> None:
    model = nn.Sequential(*blocks(3), nn.Linear(8, 8))
    model[1].mlp[0].weight = model[0].mlp[0].weight
    model[3].weight = model[2].mlp[0].weight
    stack = LayerStack.find(model)
    assert [len(layer) for layer in stack.parameters()] == [6, 5, 6]
    assert [p.shape for p in stack.outside()["3"]] == [torch.Size([8])]  # the bias; the weight is layer 2's
