"""The 15 networks of the paper's study [the choice is ours], as their public configurations describe them.

Nothing here needs a network or torch: a study is read and planned, and its networks are listed, before anything is
downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Family = Literal["encoder", "decoder", "state-space", "recurrent"]
BlockType = Literal["sequential", "parallel", "single"]


@dataclass(frozen=True)
class Architecture:
    """What matters of a network's configuration.

    Args:
        family: One of the paper's four families [paper].
        block: Whether attention feeds the MLP, both read the same input, or there is only one sublayer, see
            `depthcb_recipes.backbones.block_type.block_type`.
        norm: Whether a block's layer norms come before its sublayers or after the residual sum.
        head: The class that the checkpoint was saved as, which tells its pretraining objective.
        model_type: Architecture name in transformers.
        settings: Fields of its configuration; those that are not given have transformers' defaults, as in the original.
        parameters: Published number of parameters, head included (tied weights count once), which checks the settings.
            Of CodeGen only "350M" is published.
        source: Where the settings can be looked up.
    """

    family: Family
    block: BlockType
    norm: Literal["pre", "post"]
    head: str
    model_type: str
    settings: Mapping[str, Any]
    parameters: int
    source: str

    @property
    def causal(self) -> bool:
        """Whether a position depends on earlier ones only, without a mask that an objective adds."""
        return self.family != "encoder"

    def config(self, **changes: Any) -> PretrainedConfig:
        """Returns the transformers configuration.

        Args:
            **changes: Replace fields.

        Example:
            >>> ARCHITECTURES["facebook/opt-350m"].config().word_embed_proj_dim
            512
        """
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, architectures=[self.head], **{**self.settings, **changes})


def _source(name: str) -> str:
    return f"config.json of {name} on the Hugging Face hub"


def _bert(name: str, width: int, layers: int, heads: int, parameters: int, **more: Any) -> tuple[str, Architecture]:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    settings = {**sizes, "vocab_size": 30522, "max_position_embeddings": 512, "tie_word_embeddings": True,
                "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **more}  # fmt: skip
    roberta = "roberta" in name
    head, model_type = ("RobertaForMaskedLM", "roberta") if roberta else ("BertForMaskedLM", "bert")
    return name, Architecture("encoder", "sequential", "post", head, model_type, settings, parameters, _source(name))


def _gpt2(name: str, width: int, layers: int, heads: int, parameters: int) -> tuple[str, Architecture]:
    settings = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50257,
                "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "tie_word_embeddings": True}  # fmt: skip
    return name, Architecture(
        "decoder", "sequential", "pre", "GPT2LMHeadModel", "gpt2", settings, parameters, _source(name)
    )


def _opt(
    name: str, width: int, layers: int, heads: int, parameters: int, projected: int | None = None
) -> tuple[str, Architecture]:
    settings = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width,
                "word_embed_proj_dim": projected or width, "do_layer_norm_before": projected is None,
                "vocab_size": 50272, "max_position_embeddings": 2048, "dropout": 0.1, "activation_function": "relu",
                "tie_word_embeddings": True}  # fmt: skip
    norm: Literal["pre", "post"] = "post" if projected else "pre"  # OPT-350M alone has post-norm and projections
    return name, Architecture(
        "decoder", "sequential", norm, "OPTForCausalLM", "opt", settings, parameters, _source(name)
    )


def _pythia(
    name: str, width: int, layers: int, heads: int, parameters: int, vocabulary: int = 50304
) -> tuple[str, Architecture]:
    settings = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
                "intermediate_size": 4 * width, "vocab_size": vocabulary, "max_position_embeddings": 2048,
                "use_parallel_residual": True, "rotary_pct": 0.25, "hidden_dropout": 0.0, "attention_dropout": 0.0,
                "tie_word_embeddings": False}  # fmt: skip
    return name, Architecture(
        "decoder", "parallel", "pre", "GPTNeoXForCausalLM", "gpt_neox", settings, parameters, _source(name)
    )


_CODEGEN = {"n_embd": 1024, "n_layer": 20, "n_head": 16, "n_positions": 2048, "n_ctx": 2048, "rotary_dim": 32,
            "vocab_size": 51200, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
            "tie_word_embeddings": False}  # fmt: skip
_MAMBA = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "expand": 2, "conv_kernel": 4,
          "time_step_rank": 48, "vocab_size": 50280, "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
          "tie_word_embeddings": True}  # fmt: skip
# `rescale_every` is 6 in the original and halves weights in place in eval mode; `load_backbone` turns it off too.
_RWKV = {"hidden_size": 768, "attention_hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
         "context_length": 1024, "vocab_size": 50277, "rescale_every": 0, "tie_word_embeddings": False}  # fmt: skip

#: The 15 networks by hub id, in the order of their families.
ARCHITECTURES: dict[str, Architecture] = dict([
    _bert("bert-base-uncased", 768, 12, 12, 109_514_298),
    _bert("bert-large-uncased", 1024, 24, 16, 335_174_458),
    _bert("roberta-base", 768, 12, 12, 124_697_433, vocab_size=50265, max_position_embeddings=514,
          type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5),
    _gpt2("gpt2", 768, 12, 12, 124_439_808),
    _gpt2("gpt2-medium", 1024, 24, 16, 354_823_168),
    _opt("facebook/opt-125m", 768, 12, 12, 125_239_296),
    _opt("facebook/opt-350m", 1024, 24, 16, 331_196_416, projected=512),
    _opt("facebook/opt-1.3b", 2048, 24, 32, 1_315_758_080),
    _pythia("EleutherAI/pythia-160m", 768, 12, 12, 162_322_944),
    _pythia("EleutherAI/pythia-410m", 1024, 24, 16, 405_334_016),
    _pythia("EleutherAI/pythia-1.4b", 2048, 24, 16, 1_414_647_808),
    _pythia("EleutherAI/pythia-6.9b", 4096, 32, 32, 6_857_302_016, vocabulary=50432),
    ("Salesforce/codegen-350M-mono", Architecture(
        "decoder", "parallel", "pre", "CodeGenForCausalLM", "codegen", _CODEGEN, 356_712_448,
        _source("Salesforce/codegen-350M-mono"))),
    ("state-spaces/mamba-130m-hf", Architecture(
        "state-space", "single", "pre", "MambaForCausalLM", "mamba", _MAMBA, 129_135_360,
        _source("state-spaces/mamba-130m-hf"))),
    ("RWKV/rwkv-4-169m-pile", Architecture(
        "recurrent", "sequential", "pre", "RwkvForCausalLM", "rwkv", _RWKV, 169_342_464,
        _source("RWKV/rwkv-4-169m-pile"))),
])  # fmt: skip
