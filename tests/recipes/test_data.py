import ast
import importlib.util
import sys

import pytest
import torch

from recipes.backbones import cache_folder, load_tokenizer
from recipes.data import (
    PythonText,
    _python_files,
    collate,
    corpus_fingerprint,
    pack,
    python_corpus,
    split_by_file,
)

LONG = "Words that say in some detail what the thing below is for, so that the docstring is long enough to count."


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def bert():
    return load_tokenizer("minilm")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small installed library with everything that needs care, and a cache of its own."""
    root = tmp_path / "site" / "depthcb_sample"
    (root / "deep" / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text(f'"""{LONG}"""\n\n\ndef f(x):\n    return x\n')
    (root / "a.py").write_text(
        "import functools\n\x0c\n\n@functools.cache\n@staticmethod\ndef g():\n"
        f'    """{LONG}\n\n        Indented.\n    """\n    return "\\d\x0c"\n\n\nx = 1\n\n\n'
        "class C:\n    def m(self):\n        pass"
    )
    (root / "deep" / "b.py").write_bytes(b"# coding: latin-1\r\ndef h():\r\n    return '\xe9'\r\n")
    (root / "deep" / "same.py").write_text("def f(x):\n    return x\n")
    (root / "deep" / "broken.py").write_text("def (:\n")
    (root / "deep" / "tests" / "test_b.py").write_text("def never(): pass\n")
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def test_code_is_each_top_level_definition_once(library):
    code = python_corpus("code", packages=("depthcb_sample",))
    assert dict(zip(code["file"], code["text"], strict=False)) == {
        "depthcb_sample/__init__.py": "def f(x):\n    return x",
        "depthcb_sample/a.py": "class C:\n    def m(self):\n        pass",
        "depthcb_sample/deep/b.py": "def h():\n    return 'é'",
    }
    assert code["text"][1].startswith("@functools.cache\n@staticmethod\ndef g():")
    assert code["text"][1].endswith('return "\\d\x0c"')
    assert len(code) == 4
    assert "5 files, 1 do not parse" in code.info.description


def test_prose_is_each_long_docstring_once(library):
    prose = python_corpus("prose", packages=("depthcb_sample",))
    assert prose["text"] == [LONG, f"{LONG}\n\nIndented."]


def test_the_cache_is_used_and_a_spoilt_one_is_made_again(library, tmp_path):
    first = python_corpus("code", packages=("depthcb_sample",))
    (cached,) = (tmp_path / "cache" / "depthcb" / "corpus").iterdir()
    whole = cached.read_bytes()
    for spoilt in (b"", b"nonsense", whole[: len(whole) // 2], whole.replace(b"return x", b"return y")):
        assert spoilt != whole
        cached.write_bytes(spoilt)
        again = python_corpus("code", packages=("depthcb_sample",))
        assert corpus_fingerprint(again) == corpus_fingerprint(first)
        assert again.info.description == first.info.description
        assert cached.read_bytes() == whole
    stamp = cached.stat().st_mtime_ns
    python_corpus("code", packages=("depthcb_sample",))
    assert cached.stat().st_mtime_ns == stamp


def test_a_changed_library_is_read_again(library):
    first = python_corpus("code", packages=("depthcb_sample",))
    (library / "new.py").write_text("def new(): pass\n")
    second = python_corpus("code", packages=("depthcb_sample",))
    assert len(second) == len(first) + 1


def test_a_package_of_one_module_has_text(library):
    (library.parent / "depthcb_single.py").write_text("def one(): pass\n")
    assert python_corpus("code", packages=("depthcb_single",))["file"] == ["depthcb_single.py"]


def test_the_standard_library_is_enough_text():
    code, prose = python_corpus("code"), python_corpus("prose")
    assert len(set(code["text"])) == len(code) > 4000
    assert len(set(prose["text"])) == len(prose) > 3000
    assert min(map(len, prose["text"])) >= 80
    assert code["file"] == sorted(code["file"])
    assert {"json/decoder.py", "ast.py"} < set(code["file"])
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in code["file"])
    for text in code["text"][:200]:
        ast.parse(text)


def test_a_corpus_is_the_same_without_the_cache(tmp_path, monkeypatch):
    cached = corpus_fingerprint(python_corpus("code"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus_fingerprint(python_corpus("code")) == cached


def test_the_fingerprint_sees_order_and_borders(library):
    code = python_corpus("code", packages=("depthcb_sample",))
    assert corpus_fingerprint(code.select([1, 0])) != corpus_fingerprint(code.select([0, 1]))
    assert len(corpus_fingerprint(code)) == 64


@pytest.mark.parametrize(
    ("package", "message"),
    [("depthcb_no_such", "'depthcb_no_such' is not installed"), ("sys", "without Python source"), ("a b", "'a b'")],
)
def test_an_unreadable_package_is_named(package, message):
    assert package != "sys" or "sys" in sys.builtin_module_names
    with pytest.raises(ValueError, match=message):
        python_corpus("code", packages=(package,))


def test_a_bad_kind_is_refused(bert):
    with pytest.raises(ValueError, match="'code', 'prose', not 'poetry'"):
        python_corpus("poetry")
    with pytest.raises(ValueError, match="not 'poetry'"):
        PythonText(bert, kind="poetry")


def test_no_file_is_on_both_sides_whatever_the_order():
    corpus = python_corpus("code")
    train, val = split_by_file(corpus)
    assert len(train) + len(val) == len(corpus)
    assert not set(train["file"]) & set(val["file"])
    assert 0.05 < len(set(val["file"])) / len(set(corpus["file"])) < 0.15
    _, turned = split_by_file(corpus.select(range(len(corpus) - 1, -1, -1)))
    assert turned["text"] == val["text"][::-1]
    _, part = split_by_file(corpus.select(range(1000)))
    assert set(part["file"]) <= set(val["file"])
    _, other = split_by_file(corpus, seed=1)
    assert set(other["file"]) != set(val["file"])
    _, most = split_by_file(corpus, val_fraction=0.9)
    assert set(most["file"]) > set(val["file"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_split_needs_two_sides(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_file(python_corpus("code"), val_fraction=fraction)


@pytest.mark.parametrize("name", ["smollm2", "bert"])
def test_packed_blocks_hold_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = ["def f(x):\n    return x + 1", "a <|im_end|> [SEP] b", "the last of the three"]
    end = tokenizer.sep_token_id if name == "bert" else tokenizer.eos_token_id
    rows = pack(texts, tokenizer, 4)["input_ids"]
    assert {len(row) for row in rows} == {4}
    stream = [token for row in rows for token in row]
    whole = [ids for text in texts for ids in [*tokenizer.encode(text, **PLAIN), end]]
    assert stream == whole[: len(whole) // 4 * 4]
    assert stream.count(end) == len([token for token in stream if token in tokenizer.all_special_ids]) >= 2
    if name == "smollm2":
        assert tokenizer.decode(stream[: stream.index(end)]) == texts[0]


PLAIN = {"add_special_tokens": False, "split_special_tokens": True}


def test_packing_stops_reading_when_it_has_enough(smollm2):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "some words to count"

    assert len(pack(endless(), smollm2, 8, blocks=10)) == 10
    assert len(read) < 100


def test_too_little_text_is_an_error(smollm2):
    with pytest.raises(ValueError, match="gives 0 blocks of 64 tokens, but 2 are needed"):
        pack(["short"], smollm2, 64, blocks=2)
    with pytest.raises(ValueError, match="but 1 are needed"):
        pack(["short"], smollm2, 64)
    with pytest.raises(ValueError, match="must be positive"):
        pack(["short"], smollm2, 0)
    with pytest.raises(ValueError, match="validation documents have 100000 tokens"):
        PythonText(smollm2).probe_batches(block_size=100_000)


def test_collate_makes_every_token_a_label():
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"] is not batch["input_ids"]
    assert batch["attention_mask"].all()


def drain(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


def test_loaders_repeat_and_leave_the_random_numbers_alone(smollm2):
    data = PythonText(smollm2, block_size=32, batch_size=8, val_blocks=20, train_blocks=40)
    data.prepare_data()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loader = data.train_dataloader()
    first, second_epoch = drain(loader), drain(loader)
    val = drain(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    twin = PythonText(smollm2, block_size=32, batch_size=8, val_blocks=20, train_blocks=40)
    assert torch.equal(drain(twin.train_dataloader()), first)
    assert torch.equal(drain(twin.val_dataloader()), val)
    assert first.shape == (40, 32)
    assert val.shape == (20, 32)
    assert not torch.equal(second_epoch, first)
    assert torch.equal(second_epoch.sort(0).values, first.sort(0).values)
    assert torch.equal(val, torch.tensor(twin.val_data["input_ids"]))
    other = PythonText(smollm2, block_size=32, batch_size=8, val_blocks=20, train_blocks=40, seed=1)
    assert not torch.equal(drain(other.train_dataloader()), first)


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_the_probe_is_starts_of_held_out_documents(smollm2, kind):
    data = PythonText(smollm2)
    batches = data.probe_batches(rows=40, block_size=32, batch_size=16, kind=kind)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 32), (16, 32), (8, 32)]
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)
    train, val = split_by_file(python_corpus(kind))
    starts = [smollm2.decode(row) for batch in batches for row in batch["input_ids"]]
    assert len(set(starts)) > 30
    files = {file for file, text in zip(val["file"], val["text"], strict=True) if text.startswith(tuple(starts))}
    assert len(files) > 5
    assert not files & set(train["file"])
    again = data.probe_batches(rows=40, block_size=32, batch_size=16, kind=kind)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_few_rows_are_already_a_mix_of_files(smollm2):
    data = PythonText(smollm2, val_blocks=64)
    text = smollm2.decode([token for row in data.val_data["input_ids"] for token in row])
    _, val = split_by_file(python_corpus("code"))
    used = {file for file, document in zip(val["file"], val["text"], strict=True) if document[:200] in text}
    assert len(used) >= 10


def test_test_folders_are_not_walked():
    root = importlib.util.find_spec("unittest").submodule_search_locations[0]
    assert all("test" not in path.parts[-2:] for path in _python_files(root))


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "depthcb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "depthcb"
