"""How parameters are divided into units, in models of transformers and of torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import TinyLM
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CodeGenConfig,
    CodeGenModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    Mamba2Config,
    Mamba2Model,
    MambaConfig,
    MambaModel,
    OPTConfig,
    OPTModel,
    ResNetConfig,
    ResNetModel,
    RwkvConfig,
    RwkvModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)  # fmt: skip

from depthcb import LayerStack
from depthcb.engine import StepEqualizer
from depthcb.units import VECTORS, find_units

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 32,
}  # fmt: skip
OF_GPT2: dict[str, Any] = {
    "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MAMBA: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
#: By name: the model, and of a layer's second layer what is in attention (or the mixer) and what in the MLP, by hand.
MODELS: dict[str, tuple[Any, list[str], list[str]]] = {
    "bert": (lambda: BertModel(BertConfig(**SIZES)), ["attention.self", "attention.output.dense"],
             ["intermediate", "output.dense"]),
    "gpt2": (lambda: GPT2Model(GPT2Config(**OF_GPT2)), ["attn"], ["mlp"]),
    "opt": (lambda: OPTModel(OPTConfig(num_hidden_layers=2, hidden_size=16, ffn_dim=32, num_attention_heads=2,
                                       vocab_size=32, word_embed_proj_dim=16)), ["self_attn"], ["fc1", "fc2"]),
    "neox": (lambda: GPTNeoXModel(GPTNeoXConfig(**SIZES)), ["attention"], ["mlp"]),
    "codegen": (lambda: CodeGenModel(CodeGenConfig(**OF_GPT2, rotary_dim=4, n_positions=32)), ["attn"], ["mlp"]),
    "llama": (lambda: LlamaModel(LlamaConfig(**SIZES)), ["self_attn"], ["mlp"]),
    "mamba": (lambda: MambaModel(MambaConfig(**MAMBA)), ["mixer"], []),
    "mamba2": (lambda: Mamba2Model(Mamba2Config(**MAMBA, num_heads=4, head_dim=8, state_size=8)), ["mixer"], []),
    "rwkv": (lambda: RwkvModel(RwkvConfig(**MAMBA, attention_hidden_size=16)), ["attention"], ["feed_forward"]),
    "vit": (lambda: ViTModel(ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"})), ["attention"],
            ["mlp"]),
    "t5": (lambda: T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32)),
           ["layer.0.SelfAttention"], ["layer.1.DenseReluDense"]),
    "torch": (lambda: nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2)), ["self_attn"],
              ["linear1", "linear2"]),
}  # fmt: skip


def ids(parameters: Any) -> set[int]:
    return {id(p) for p in parameters}


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_found_by_structure(name: str) -> None:
    make, attention, mlp = MODELS[name]
    stack = LayerStack.find(make())
    layer = stack.modules[1]
    units = {unit.key: ids(unit.parameters) for unit in find_units(stack, "group")}
    assert [len(layer) for layer in stack.parameters()] == [
        sum(len(u) for key, u in units.items() if key.startswith(f"L0{i}/")) for i in range(2)
    ]
    norms = {
        id(p) for n, m in layer.named_modules() if "norm" in type(m).__name__.lower() for p in m.parameters()
    }  # by class names, which the search does not use
    mixing = "mixer" if "mamba" in name else "attention"
    expected = {
        f"L01/{mixing}": ids(p for part in attention for p in layer.get_submodule(part).parameters()) - norms,
        "L01/mlp": ids(p for part in mlp for p in layer.get_submodule(part).parameters()) - norms,
        "L01/norm": norms,
    }
    assert {k: v for k, v in units.items() if k.startswith("L01")} == {k: v for k, v in expected.items() if v}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_a_unit_and_all_vectors_of_a_layer_another(name: str) -> None:
    stack = LayerStack.find(MODELS[name][0]())
    found = {unit.key: unit.parameters for unit in find_units(stack, "matrix", outside=True)}
    everything = [p for parameters in found.values() for p in parameters]
    assert len(everything) == len(ids(everything))
    assert ids(everything) == ids(stack.root.parameters())
    for i, layer in enumerate(stack.modules):
        for path, p in layer.named_parameters():
            key = f"L0{i}/{path if p.dim() > 1 else VECTORS}"
            assert id(p) in ids(found[key])
            assert p.dim() < 2 or len(found[key]) == 1


def test_layers_are_the_units_by_default() -> None:
    stack = LayerStack.find(TinyLM())
    units = find_units(stack, outside=True)
    assert [unit.parameters for unit in units[:4]] == stack.parameters()
    assert [unit.key for unit in units] == ["L00", "L01", "L02", "L03", *stack.outside()]
    assert [unit.name for unit in units] == [*stack.names, *stack.outside()]


def test_tied_tensors_count_once() -> None:
    model = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(3))
    model[2].linear1.weight = model[0].linear1.weight
    keys = [unit.key for unit in find_units(LayerStack.find(model), "matrix")]
    assert "L00/linear1.weight" in keys
    assert "L02/linear1.weight" not in keys
    units = find_units(LayerStack.find(model), "group")
    assert len(ids(p for u in units for p in u.parameters)) == sum(len(u.parameters) for u in units)


def test_globs_name_groups_and_structure_finds_the_rest() -> None:
    stack = LayerStack.find(TinyLM())
    units = find_units(stack, "group", {"writes": ["*.c_proj.weight", "*.c_proj.bias"]})
    assert [unit.key for unit in units[:4]] == ["L00/norm", "L00/attention", "L00/writes", "L00/mlp"]
    block = stack.modules[0]
    assert ids(units[2].parameters) == ids([*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()])  # type: ignore[union-attr, operator]


def blocks_of_unknown_structure() -> nn.Module:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [2, 2]}
    return ResNetModel(ResNetConfig(**sizes))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (blocks_of_unknown_structure, {}, r"layers\.0' has layer\.0, layer\.1.*structure doesn't say.*groups="),
        (lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), {}, "layer '0' has weight, of which"),
        (TinyLM, {"groups": {"attention": "*atn*"}}, r"'\*atn\*' matches no parameter of any layer"),
        (TinyLM, {"groups": {"at/tn": "*attn*"}}, "has the name 'at/tn'"),
        (TinyLM, {"unit": "matrix", "groups": {"attn": "*attn*"}}, "but unit='matrix': pass unit='group'"),
        (TinyLM, {"unit": "tensor"}, "unit='tensor' is unknown"),
    ],
)
def test_what_is_not_known_is_an_error(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_units(LayerStack.find(make()), **{"unit": "group"} | arguments)


def test_unknown_structure_can_be_named() -> None:
    stack = LayerStack.find(blocks_of_unknown_structure())
    units = find_units(stack, "group", {"convolution": "*convolution*"})
    assert [unit.key for unit in units[:2]] == ["L00/convolution", "L00/norm"]


def test_wrappers_do_not_change_keys() -> None:
    plain, wrapped = TinyLM(), TinyLM()
    wrapped.model.transformer.h[1].mlp = torch.compile(wrapped.model.transformer.h[1].mlp)
    for kind in ("matrix", "group"):
        keys = [[u.key for u in find_units(LayerStack.find(m), kind)] for m in (plain, wrapped)]  # type: ignore[arg-type]
        assert keys[0] == keys[1]


@pytest.mark.parametrize("unit", ["matrix", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_equal_in_the_units_of_every_architecture(name: str, unit: Any) -> None:
    """With random gradients of very different sizes."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.01), []
    for p in model.parameters():
        p.grad = torch.randn_like(p) * float(torch.rand(()) * 10)
    before = {id(p): p.detach().double().clone() for p in model.parameters()}
    with StepEqualizer(unit=unit).attach(model, [optimizer], log=lambda row, step: rows.append(row)):
        optimizer.step()
    stack, ratios = LayerStack.find(model), []
    for layer in stack.modules:
        for part in parts_by_hand(layer, unit):
            moved = sum(float((p.detach().double() - before[id(p)]).square().sum()) for p in part)
            ratios.append((moved / sum(float(before[id(p)].square().sum()) for p in part)) ** 0.5)
    assert len(ratios) == sum("equal_step/ratio/" in key for key in rows[0])
    assert max(ratios) / min(ratios) - 1 < 1e-4
    assert rows[0]["equal_step/spread"] > 1.5, "nothing to equalise: a weak test"


def parts_by_hand(layer: nn.Module, unit: str) -> list[list[nn.Parameter]]:
    """The matrices and the vectors of a layer, or the norms, the attention or mixer, and the rest."""
    named = dict(layer.named_parameters())
    if unit == "matrix":
        vectors = [p for p in named.values() if p.dim() < 2]
        return [*([p] for p in named.values() if p.dim() > 1), vectors]
    norms = {n: p for n, p in named.items() if "norm" in n.lower() or re.search(r"(^|\.)(pre_)?ln(_?\d)?\.", n)}
    mixing = {
        n: p for n, p in named.items() if n not in norms and re.match(r"attn|attention|self_attn|mixer|layer\.0", n)
    }
    rest = [p for n, p in named.items() if n not in norms and n not in mixing]
    return [part for part in ([*norms.values()], [*mixing.values()], rest) if part]
