"""Data modules: alignment, padding, masks and splits, on the Python corpus and on files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from depthcb_recipes import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.cache import cache_folder
from depthcb_recipes.data.corpus import in_hashed_order, python_corpus, split_by_file
from depthcb_recipes.data.packed_text import blocks, masking
from depthcb_recipes.data.text_data import TextData

BOTH = pytest.mark.parametrize("name", ["smollm2", "bert"])
PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
KINDS: list[type[TextData]] = [PackedText, Completions, LabelledText, LabelledTokens, TextPairs]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def bert() -> Any:
    return load_tokenizer("minilm")


# Packing


@BOTH
def test_blocks_hold_the_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    texts = ["def f(x):\n    return x + 1", "a <|im_end|> [SEP] b", "the last of the three"]
    end = tokenizer.sep_token_id if name == "bert" else tokenizer.eos_token_id
    rows = list(blocks(texts, tokenizer, 4))
    assert {len(row) for row in rows} == {4}
    stream = [token for row in rows for token in row]
    whole = [ids for text in texts for ids in [*tokenizer.encode(text, **PLAIN), end]]
    assert stream == whole[: len(whole) // 4 * 4]
    assert stream.count(end) == len([token for token in stream if token in tokenizer.all_special_ids]) >= 2
    if name == "smollm2":
        assert tokenizer.decode(stream[: stream.index(end)]) == texts[0]


def test_packing_reads_no_more_than_it_needs(smollm2: Any) -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "some words to count"

    made = blocks(endless(), smollm2, 8)
    assert len([next(made) for _ in range(10)]) == 10
    assert len(read) < 300


def test_every_token_of_a_block_is_a_label(smollm2: Any) -> None:
    data = PackedText(smollm2, block_size=32, val_rows=8)
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"] is not batch["input_ids"]
    assert batch["attention_mask"].all()


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_the_probe_is_starts_of_held_out_documents(smollm2: Any, kind: Any) -> None:
    data = PackedText(smollm2)
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


def test_few_blocks_are_already_a_mix_of_files(smollm2: Any) -> None:
    data = PackedText(smollm2, val_rows=64)
    text = smollm2.decode([token for row in data.val_data["input_ids"] for token in row])
    _, val = split_by_file(python_corpus("code"))
    used = {file for file, document in zip(val["file"], val["text"], strict=True) if document[:200] in text}
    assert len(used) >= 10


# Masking


def test_masking_statistics(bert: Any) -> None:
    """Of the 15 % selected tokens, 80 % are masked, 10 % replaced, 10 % kept; special tokens are never selected."""
    collator = masking(bert, 0.15, seed=3)
    inside = torch.randint(1000, 29000, (400, 126), generator=torch.Generator().manual_seed(0))
    ends = torch.full((400, 1), bert.sep_token_id)
    ids = torch.cat([ends, inside, ends], dim=1)
    masked, labels = collator.torch_mask_tokens(ids.clone())
    chosen = labels != -100
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    n = int(chosen.sum())

    def near(count: Tensor, of: int, share: float) -> bool:
        return abs(int(count) / of - share) < 4 * (share * (1 - share) / of) ** 0.5

    assert near(chosen.sum(), inside.numel(), 0.15)
    assert near((masked[chosen] == bert.mask_token_id).sum(), n, 0.8)
    assert near((masked[chosen] == ids[chosen]).sum(), n, 0.1)


def test_training_masks_are_drawn_anew_and_validation_masks_are_fixed(bert: Any) -> None:
    data = PackedText(bert, masked=True, block_size=32, train_rows=32, val_rows=16)
    state = torch.get_rng_state()
    loader = data.train_dataloader()
    epochs = [torch.cat([b["labels"] for b in loader]).ne(-100).sum() for _ in range(3)]
    assert len(set(map(int, epochs))) > 1
    first, second = (torch.cat([b["input_ids"] for b in data.val_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)
    assert (first == bert.mask_token_id).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tokenizer_without_a_mask_is_refused(smollm2: Any) -> None:
    with pytest.raises(ValueError, match="no mask token: use CausalLM"):
        PackedText(smollm2, masked=True, val_rows=4).val_dataloader()


# Label alignment


@BOTH
def test_only_the_completion_has_labels(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    data = Completions(tokenizer, max_length=64, val_rows=40)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    whole: dict[tuple[int, ...], list[list[int]]] = {}
    for row in data.sides[1]:
        prompt = tuple(tokenizer.encode(row["prompt"], **PLAIN))
        whole.setdefault(prompt, []).append([*tokenizer.encode(row["completion"], **PLAIN), end])
    for row in data.val_data:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        ids = row["input_ids"]
        assert row["labels"] == [-100] * start + ids[start:]
        assert ids[start:] in [ids[: 64 - start] for ids in whole[tuple(ids[:start])]]


WORDS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C", "M")), min_size=1, max_size=6),
    min_size=1,
    max_size=8,
)


@BOTH
@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_the_first_subword_of_each_word_has_its_label(name: str, smollm2: Any, bert: Any, words: list[str]) -> None:
    """Each word is labelled with its index, and compared to the tokenizer's own word ids of pre-split words."""
    tokenizer = {"smollm2": smollm2, "bert": bert}[name]
    data = LabelledTokens(tokenizer, max_length=512)
    row = data._aligned(words, list(range(len(words))))
    labelled = [label for label in row["labels"] if label != -100]
    assert labelled == sorted(set(labelled)), "each word once, in order"
    if name == "smollm2":
        assert labelled == list(range(len(words))), "bytes: no word is lost"
        starts = [i for i, label in enumerate(row["labels"]) if label != -100]
        for word, begin, end in zip(words, starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert tokenizer.decode(row["input_ids"][begin:end]).strip(" ") == word
        return
    split = tokenizer(words, is_split_into_words=True, split_special_tokens=True)
    if split["input_ids"] == row["input_ids"]:
        ids = split.word_ids()
        first = [w if w is not None and w != ids[i - 1] else -100 for i, w in enumerate(ids)]
        assert row["labels"] == first


def test_python_tokens_keep_their_kind(smollm2: Any) -> None:
    data = LabelledTokens(smollm2, val_rows=8)
    keywords = data.label_names.index("keyword")
    for row in data.val_data:
        said = [
            smollm2.decode([i]).strip() for i, k in zip(row["input_ids"], row["labels"], strict=True) if k == keywords
        ]
        assert set(said) <= {"def", "class", "return", "if", "else", "elif", "for", "in", "not", "is", "None", "True",
                             "False", "and", "or", "try", "except", "raise", "with", "as", "import", "from", "while",
                             "yield", "lambda", "pass", "del", "global", "finally", "break", "continue", "assert",
                             "async", "await", "nonlocal", "non"}  # fmt: skip


def test_labels_of_texts_are_those_of_their_rows(bert: Any) -> None:
    data = LabelledText(bert, val_rows=50)
    known = {tuple(bert(t, truncation=True, max_length=128)["input_ids"]): n for t, n in
             zip(data.sides[1]["text"], data.sides[1]["label"], strict=True)}  # fmt: skip
    for row in data.val_data:
        assert data.label_names[row["labels"]] == known[tuple(row["input_ids"])]
    counts = [data.sides[1]["label"].count(n) for n in data.label_names]
    assert len(set(counts)) == 1, "as many of each library"


def test_pairs_stay_pairs_in_their_order(bert: Any) -> None:
    data = TextPairs(bert, val_rows=32)
    batch = next(iter(data.val_dataloader()))
    for i, (first, second) in enumerate(zip(data.sides[1]["first"][:16], data.sides[1]["second"][:16], strict=True)):
        for prefix, text in (("", first), ("pair_", second)):
            ids = bert(text, truncation=True, max_length=128)["input_ids"]
            assert batch[f"{prefix}input_ids"][i, : len(ids)].tolist() == ids
            assert batch[f"{prefix}attention_mask"][i].sum() == len(ids)


@BOTH
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(name: str, side: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    before = tokenizer.padding_side
    try:
        tokenizer.padding_side = side
        rows = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [8], "labels": [4]}]
        batch = Completions(tokenizer).collate(rows)
    finally:
        tokenizer.padding_side = before
    pad = tokenizer.pad_token_id
    short = {"input_ids": [8, pad, pad], "attention_mask": [1, 0, 0], "labels": [4, -100, -100]}
    for key, row in short.items():
        assert batch[key][1].tolist() == (row if side == "right" else row[1:] + row[:1])
    assert batch["input_ids"][0].tolist() == [5, 6, 7]


# Splits, seeds and caches


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_the_validation_is_trained_on(kind: type[TextData], bert: Any) -> None:
    train, val = kind(bert).sides
    assert len(train) > 5 * len(val) > 100
    assert not set(map(repr, train)) & set(map(repr, val))


@pytest.mark.parametrize("kind", [PackedText, LabelledText])
def test_loaders_repeat_and_leave_the_random_numbers_alone(kind: type[TextData], smollm2: Any) -> None:
    def drain(loader: DataLoader[Any]) -> list[list[int]]:
        return [row.tolist() for batch in loader for row in batch["input_ids"]]

    options: dict[str, Any] = {"batch_size": 8, "val_rows": 20, "train_rows": 40}
    data = kind(smollm2, **options)
    data.prepare_data()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loader = data.train_dataloader()
    first, second_epoch, val = drain(loader), drain(loader), drain(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    twin = kind(smollm2, **options)
    assert drain(twin.train_dataloader()) == first
    assert drain(twin.val_dataloader()) == val
    assert (len(first), len(val)) == (40, 20)
    assert second_epoch != first
    other = kind(smollm2, **options, seed=1)
    assert drain(other.train_dataloader()) != first


def test_tokenised_rows_are_kept_and_a_spoilt_file_is_made_again(
    bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "texts.csv"
    source.write_text("text\n" + "".join(f"line {i} of some length for the blocks\n" for i in range(60)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def rows(**options: Any) -> list[Any]:
        return list(PackedText(bert, str(source), block_size=16, **options).val_data)

    first = rows()
    (kept,) = (cache_folder() / "tokenised").iterdir()
    stamp, whole = kept.stat().st_mtime_ns, kept.read_bytes()
    assert rows() == first
    assert kept.stat().st_mtime_ns == stamp
    for spoilt in (b"", b"nonsense", whole[: len(whole) // 2], whole.replace(whole[60:64], b"zzzz")):
        kept.write_bytes(spoilt)
        assert rows() == first
    assert rows(seed=1) != first
    assert len(list((cache_folder() / "tokenised").iterdir())) > 1, "other rows are kept beside these"


# Other datasets


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LINES = [{"text": f"text number {i} in words", "label": "odd" if i % 2 else "even", "stars": i % 3, "tokens": [f"a{i}", "b"],
          "tags": ["X", "O"], "second": f"partner {i}", "score": i / 4} for i in range(40)]  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_of_every_kind(ending: str, bert: Any, tmp_path: Path) -> None:
    path = tmp_path / f"data.{ending}"
    flat = Dataset.from_list([{k: row[k] for k in ("text", "label", "stars")} for row in LINES])
    {"csv": flat.to_csv, "jsonl": flat.to_json, "parquet": flat.to_parquet}[ending](str(path))
    data = LabelledText(bert, str(path))
    assert data.label_names == ["even", "odd"]
    assert [len(side) for side in data.sides] == [36, 4]
    assert len(data.train_data) == 36
    assert LabelledText(bert, str(path), label="stars").label_names == ["0", "1", "2"]


def test_a_folder_with_splits_and_named_classes(bert: Any, tmp_path: Path) -> None:
    """The format of hub datasets: parquet files for each split, with ordered classes."""
    features = Features({"words": List(Value("string")), "ner": List(ClassLabel(names=["O", "PER"]))})
    rows = {"words": [["Ann", "sings"], ["Bo"]], "ner": [[1, 0], [1]]}
    splits = DatasetDict({"train": Dataset.from_dict(rows, features), "validation": Dataset.from_dict(
        {"words": [["he", "Cy"], ["Ann", "sings"]], "ner": [[0, 1], [1, 0]]}, features)})  # fmt: skip
    for name, split in splits.items():
        split.to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    data = LabelledTokens(bert, str(tmp_path / "set"), tokens="words", labels="ner")
    with pytest.warns(UserWarning, match="1 of 2 training rows .* are also in validation"):
        assert [len(side) for side in data.sides] == [1, 2]
    assert data.label_names == ["O", "PER"]
    assert data.num_labels == 2
    labels = [[label for label in row["labels"] if label != -100] for row in data.val_data]
    assert sorted(labels) == [[0, 1], [1, 0]]


def test_pairs_with_a_score_and_texts_without_partners(bert: Any, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "pairs.jsonl", LINES)
    near = TextPairs(bert, source, first="text", score="score", min_score=5)
    assert sum(map(len, near.sides)) == sum(row["score"] >= 5 for row in LINES)
    assert set(near.val_data.column_names) == {"input_ids", "pair_input_ids"}
    alone = TextPairs(bert, source, first="text", second=None)
    assert alone.val_data.column_names == ["input_ids"]


def test_what_is_held_out_of_a_single_split_follows_the_seed(bert: Any, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "lines.jsonl", LINES)
    held = [set(PackedText(bert, source, seed=seed).sides[1]["text"]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 4


def test_lines_stay_in_their_order_and_blank_ones_go(smollm2: Any, tmp_path: Path) -> None:
    """Datasets like WikiText: a row is a line, and many are empty."""
    lines = [line for i in range(30) for line in (f"Sentence {i} of one long story.", "", "  ")]
    for split, part in (("train", lines), ("validation", ["Another story."] * 3)):
        Dataset.from_dict({"text": part}).to_parquet(str(tmp_path / "wiki" / f"{split}.parquet"))
    data = PackedText(smollm2, str(tmp_path / "wiki"), block_size=8)
    stream = smollm2.decode([i for row in data.train_data["input_ids"] for i in row], skip_special_tokens=True)
    assert stream == "".join(line for line in lines if line.strip())[: len(stream)]
    assert len(stream) > 500


def odd(**changed: Any) -> Callable[[Path], str]:
    return lambda folder: jsonl(folder / "odd.jsonl", [{**row, **changed} for row in LINES])


@pytest.mark.parametrize(
    ("kind", "make", "options", "message"),
    [
        (PackedText, odd(), {"column": "body"}, "no column 'body': it has text, label"),
        (LabelledText, odd(), {"label": "class"}, "no column 'class'.*arguments of LabelledText"),
        (LabelledText, odd(), {"label": "score"}, "is neither a string nor an integer"),
        (LabelledText, odd(label="one"), {}, "has only one label"),
        (LabelledTokens, odd(tags=["X", "O", "X"]), {"labels": "tags"}, "has 2 tokens and 3 labels"),
        (PackedText, odd(), {"train_split": "training"}, "no split 'training': it has train"),
        (PackedText, odd(), {"block_size": 100_000}, "validation split .* yields no rows at a length of 100000 tokens"),
        (
            Completions,
            odd(),
            {"prompt": "text", "completion": "second", "max_length": 4},
            "yields no rows at a length of 4",
        ),
        (TextPairs, odd(), {"first": "text", "score": "score", "min_score": 99}, "yields no rows"),
        (PackedText, lambda folder: str(folder / "none.txt"), {}, "There is no file or folder .*none.txt"),
        (PackedText, lambda folder: "none.csv", {}, "There is no file or folder 'none.csv'"),
        pytest.param(
            PackedText,
            lambda folder: "nobody/nothing",
            {},
            "neither a local file or folder nor was it found on the hub",
            marks=pytest.mark.slow,
        ),  # queries the hub, which takes a while without network access
    ],
)
def test_bad_data_is_one_clear_sentence(
    kind: type[TextData], make: Callable[[Path], str], options: dict[str, Any], message: str, bert: Any, tmp_path: Path
) -> None:
    data = kind(bert, make(tmp_path), **options)
    with pytest.raises(ValueError, match=message):
        data.val_data  # noqa: B018


def test_a_text_file_of_another_kind_and_an_empty_split(bert: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match=r"not one of .csv, .json, .jsonl, .parquet: convert it"):
        PackedText(bert, str(tmp_path / "notes.txt")).sides  # noqa: B018
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"empty"):
        PackedText(bert, str(tmp_path / "empty.csv")).sides  # noqa: B018


def test_unlabelled_rows_are_named(bert: Any, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(20)], "label": [-1] * 20}, features)
    rows.to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(ValueError, match="has the label -1 in 'label': remove it"):
        LabelledText(bert, str(tmp_path / "test.parquet")).val_data  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"train_rows": 0}, "train_rows must be at least 1"),
        ({"max_length": 3}, "max_length must be at least 4"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"mask_probability": 1.0}, "mask_probability must be between 0 and 1"),
        ({"kind": "poetry"}, "'code', 'prose', not 'poetry'"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str, bert: Any) -> None:
    with pytest.raises(ValueError, match=message):
        PackedText(bert, **options)


def test_a_tokenizer_without_a_pad_token_is_refused_where_rows_are_padded() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad token: set tokenizer\.pad_token"):
        Completions(tokenizer).collate([{"input_ids": [5, 6]}, {"input_ids": [7]}])


def test_too_few_rows_for_a_probe(bert: Any) -> None:
    with pytest.raises(ValueError, match="validation documents have 100000 tokens"):
        PackedText(bert).probe_batches(block_size=100_000)
    with pytest.raises(ValueError, match="Only 4 validation rows, but 64"):
        LabelledText(bert, val_rows=4).probe_batches()
    batches = LabelledText(bert, val_rows=40).probe_batches(rows=20, batch_size=16)
    assert [len(b["input_ids"]) for b in batches] == [16, 4]
    assert set(batches[0]) == {"input_ids", "attention_mask"}


def test_hashed_order_is_no_ones_but_the_texts_and_the_seeds() -> None:
    texts = [f"t{i}" for i in range(50)]
    assert in_hashed_order(texts, 0) == in_hashed_order(texts[::-1], 0) != texts
    assert in_hashed_order(texts, 1) != in_hashed_order(texts, 0)
