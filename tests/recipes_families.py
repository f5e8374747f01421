"""Tiny random networks of every family, with 2 layers of width 16."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

VOCABULARY = 50
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WIDE = {**_SMALL, "intermediate_size": 32}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
_RECURRENT = {k: v for k, v in _SMALL.items() if k != "num_attention_heads"}

FAMILIES: dict[str, hf.PreTrainedConfig] = {
    "bert": hf.BertConfig(**_WIDE),
    "roberta": hf.RobertaConfig(**{**_WIDE, "pad_token_id": 1}),
    "gpt2": hf.GPT2Config(**_GPT),
    "opt": hf.OPTConfig(**_SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64),
    "llama": hf.LlamaConfig(**_WIDE),
    "neox": hf.GPTNeoXConfig(**_WIDE, use_parallel_residual=True),
    "neox-sequential": hf.GPTNeoXConfig(**_WIDE, use_parallel_residual=False),
    "codegen": hf.CodeGenConfig(**{**_GPT, "n_head": 4, "rotary_dim": 2, "n_ctx": 64}),
    "mamba2": hf.Mamba2Config(**_RECURRENT, num_heads=4, head_dim=8, state_size=8, n_groups=1, expand=2),
    "rwkv": hf.RwkvConfig(**_RECURRENT, attention_hidden_size=16, context_length=64, rescale_every=0),
}
ENCODERS = ("bert", "roberta")


def tiny(family: str, head: str = "Model", dropout: float = 0.0, **config: Any) -> Any:
    """A network with random weights, e.g. ``tiny("gpt2", "ForCausalLM")``; deterministic."""
    config = FAMILIES[family].to_dict() | config
    config = {k: dropout if "drop" in k and isinstance(v, float) else v for k, v in config.items()}
    made = type(FAMILIES[family])(**config)
    auto = {"Model": hf.AutoModel, "ForCausalLM": hf.AutoModelForCausalLM, "ForMaskedLM": hf.AutoModelForMaskedLM}
    torch.manual_seed(0)
    if head in auto:
        return auto[head].from_config(made)
    return getattr(hf, f"AutoModel{head}").from_config(made)
