"""The catalogue of objectives and backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_families import FAMILIES, tiny
from rich.console import Console

from depthcb.cli import main
from depthcb_recipes.backbones.catalogue import HUB, backbones, describe, family
from depthcb_recipes.backbones.loading import PACKAGED, BackboneNotFoundError, pretraining
from depthcb_recipes.backbones.zoo import MINI_ZOO

EXPECTED = {
    "bert-mini": ("encoder", "sequential"),
    "gpt2-mini": ("decoder", "sequential"),
    "opt-mini": ("decoder", "sequential"),
    "neox-mini": ("decoder", "parallel"),
    "codegen-mini": ("decoder", "parallel"),
    "mamba2-mini": ("state-space", "single"),
    "rwkv-mini": ("recurrent", "sequential"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_zoo_has_every_family_and_block_type(name: str) -> None:
    found = describe(name)
    assert (found.family, found.block) == EXPECTED[name]
    assert found.layers == 8
    assert found.parameters is not None
    assert 2e6 < found.parameters < 8e6


def test_everything_is_listed_without_a_hub() -> None:
    listed = {b.name: b for b in backbones()}
    assert list(listed) == [*PACKAGED, *MINI_ZOO, *HUB]
    assert len(HUB) == 15
    assert (listed["smollm2-135m"].layers, listed["smollm2-135m"].family) == (30, "decoder")
    assert (listed["minilm"].layers, listed["minilm"].block) == (6, "sequential")
    assert set(EXPECTED) == set(MINI_ZOO)


@pytest.mark.parametrize("flag", [True, False])
def test_a_folder_is_described_by_what_it_holds(flag: bool, tmp_path: Path) -> None:
    tiny("neox", "ForCausalLM", use_parallel_residual=flag).save_pretrained(tmp_path)
    found = describe(str(tmp_path))
    assert (found.family, found.layers) == ("decoder", 2)
    assert found.block == ("parallel" if flag else "sequential")


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    special = {"bert": "encoder", "roberta": "encoder", "mamba2": "state-space", "rwkv": "recurrent"}
    assert family(FAMILIES[name]) == special.get(name, "decoder")


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("gpt2", "ForCausalLM", "causal_lm"),
        ("rwkv", "ForCausalLM", "causal_lm"),
        ("roberta", "ForMaskedLM", "masked_lm"),
    ],
)
def test_what_a_checkpoint_was_pretrained_by(name: str, head: str, expected: str, tmp_path: Path) -> None:
    tiny(name, head).save_pretrained(tmp_path)
    assert pretraining(str(tmp_path)) == expected


def test_a_checkpoint_without_a_head_has_an_unknown_past(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no language-model head \(it is a BertModel\)"):
        pretraining(str(tmp_path))


def test_nothing_to_describe_is_one_clear_error() -> None:
    with pytest.raises(BackboneNotFoundError, match=r"'\./nowhere' is neither packaged, nor a local folder"):
        describe("./nowhere")


def test_the_lists_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "width", 200, raising=False)
    assert main(["backbones", "minilm", "neox-mini"]) == 0
    printed = capsys.readouterr().out
    assert "minilm" in printed
    assert "parallel" in printed
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for objective in ("CausalLM", "MaskedLM", "CompletionLM", "SequenceClassification", "TokenClassification",
                      "Contrastive", "DPO"):  # fmt: skip
        assert objective in printed
    assert main(["backbones", "./nowhere"]) == 2
    assert "depthcb backbones: The backbone './nowhere'" in capsys.readouterr().err
