"""Profiles of networks whose weights are read layer by layer while they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from shrunk import write_tokenizer

from depthcb.cli import main

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS: dict[str, Any] = {
    "bert": (hf.BertConfig, SIZES),
    "gpt2": (hf.GPT2Config, {"n_layer": 3, "n_embd": 32, "n_head": 4}),
    "neox": (hf.GPTNeoXConfig, SIZES),
    "llama": (hf.LlamaConfig, SIZES | {"num_key_value_heads": 2}),
    "mamba": (hf.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
    "rwkv": (hf.RwkvConfig, {"hidden_size": 32, "num_hidden_layers": 3, "context_length": 64}),
}


def write_pair(folder: Path, make: Any, sizes: dict[str, Any], shard: str = "5GB") -> tuple[Path, Path]:
    """Saves a network, in several files if it is larger than a shard, and a changed copy without a tokenizer."""
    config = make(**sizes, vocab_size=write_tokenizer(folder / "a"), bos_token_id=1, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config)
    model.save_pretrained(folder / "a", max_shard_size=shard)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std(correction=0) * torch.randn_like(parameter))
    model.save_pretrained(folder / "b", max_shard_size=shard)
    return folder / "a", folder / "b"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_profile_is_the_usual_one(name: str, tmp_path: Path) -> None:
    """Also of weights in several files, with the rounding floor, which is of a forward in float64."""
    before, after = write_pair(tmp_path, *CONFIGS[name], shard="20KB")
    found = []
    for more in ([], ["--stream"]):
        assert main(["compare", str(before), str(after), "--json", str(tmp_path / "found.json"), *more]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text()))
    usual, streamed = found
    for measure in ("cka", "cka_normalized"):
        assert min(usual[measure]["change"]) > 1e-4
        for field in ("change", "floor"):
            assert streamed[measure][field] == pytest.approx(usual[measure][field], rel=1e-6)
        assert streamed[measure]["slope_interval"] == pytest.approx(usual[measure]["slope_interval"], rel=1e-5)


def test_weights_used_outside_of_their_module_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer that gets a bias of the next one, whose weights are not there yet."""
    from depthcb_recipes.backbones.checkpoints import Weights, empty_network
    from depthcb_recipes.backbones.streaming import only_layer_after_layer, streamed

    config = hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=write_tokenizer(tmp_path))
    hf.GPT2Model(config).save_pretrained(tmp_path)
    model: Any = streamed(empty_network(str(tmp_path)), Weights.of_backbone(str(tmp_path))).eval()
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.h[0].register_forward_hook(lambda layer, args, output: output + model.h[1].mlp.c_proj.bias)
    with (
        pytest.raises(ValueError, match="a uses weights outside of the module that has them"),
        only_layer_after_layer("a"),
    ):
        model(tokens)
    assert all(p.is_meta for p in model.parameters())  # nothing is kept, whatever happens


MEASURE = """
import resource, sys
from pathlib import Path
from depthcb.cli import main
import depthcb_recipes.compare_backbones, depthcb.report
import transformers
def memory(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024
main(["compare", *sys.argv[3:5], *sys.argv[5:]])  # loads libraries
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
assert main(["compare", *sys.argv[1:3], *sys.argv[5:]]) == 0
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from /proc")
def test_two_networks_need_the_memory_of_one_layer(tmp_path: Path) -> None:
    """12 layers of 12.6 MB each; freed memory goes back at once."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} is not long.\n" for i in range(16)))
    (tmp_path / "large").mkdir()
    large = write_pair(tmp_path / "large", hf.GPT2Config, {"n_layer": 12, "n_embd": 512, "n_head": 4})
    small = write_pair(tmp_path, hf.GPT2Config, {"n_layer": 2, "n_embd": 16, "n_head": 2})
    size = (large[0] / "model.safetensors").stat().st_size

    def peak(*more: str) -> int:
        command = [sys.executable, "-c", MEASURE, *map(str, (*large, *small)), *more]
        command += ["--text", str(text)]
        own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
        return int(done.stdout.split()[-1])

    usual, streamed = peak(), peak("--stream")
    assert usual > size
    assert streamed < 0.6 * size
