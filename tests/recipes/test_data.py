"""Data modules: alignment, padding, masks and splits, on the Python corpus and on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from depthcb.probe import Probe
from depthcb_recipes import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
from depthcb_recipes.cache import cache_folder
from depthcb_recipes.data.corpus import python_corpus, split_by_file
from depthcb_recipes.data.packed_text import blocks, document_rows, masking
from depthcb_recipes.data.text_data import TextData

BOTH = pytest.mark.parametrize("name", ["smollm2", "bert"])
PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
KINDS: list[type[TextData]] = [PackedText, Completions, LabelledText, LabelledTokens, TextPairs]


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


def test_no_document_is_in_two_validation_rows(smollm2: Any) -> None:
    long = [" ".join(f"w{i}x{j}" for j in range(200)) for i in range(5)]
    short = [f"short text number {i}" for i in range(40)]
    texts = [long[0], *short[:20], *long[1:], *short[20:]]
    rows = list(document_rows(texts, smollm2, 32, seed=0))
    assert {len(ids) for ids, _ in rows} == {32}
    numbers = [number for _, number in rows]
    assert len(numbers) == len(set(numbers))
    assert [numbers.index(i) >= 0 for i in (0, 21, 22, 23, 24)] == [True] * 5
    words = [smollm2.decode(ids) for ids, _ in rows]
    for text in short:
        assert sum(f"number {text.split()[-1]}" + smollm2.eos_token in word for word in words) <= 1
    assert "w0x0 " not in words[0], "not always the start"
    assert rows == list(document_rows(texts, smollm2, 32, seed=0))
    assert rows != list(document_rows(texts, smollm2, 32, seed=1))
    more = list(document_rows(texts, smollm2, 32, seed=0, most=3))
    assert [number for _, number in more].count(21) == 3
    assert len({tuple(ids) for ids, _ in more}) == len(more)


def test_more_rows_than_documents_take_more_from_each(smollm2: Any) -> None:
    data = PackedText(smollm2, block_size=512, val_rows=192)
    numbers = torch.tensor([row["document"] for row in data.val_data])
    assert len(numbers) == 192
    counts = numbers.unique(return_counts=True)[1]
    assert counts.max() > 1
    few = PackedText(smollm2, block_size=64, val_rows=96).val_data
    assert len(set(few["document"])) == 96


@pytest.mark.parametrize("masked", [False, True])
def test_a_probe_of_64_rows_has_many_documents(masked: bool, bert: Any) -> None:
    data = PackedText(bert, block_size=64, val_rows=96, masked=masked)
    batches = list(data.val_dataloader())
    drawn = Probe.collect(data.val_dataloader(), limit=64)
    numbers = torch.cat([batch["document"] for batch in drawn.batches])
    assert len(numbers) == 64
    assert len(numbers.unique()) >= 48
    assert "document" not in next(iter(data.train_dataloader()))
    assert all(batch["document"].dtype == torch.int64 for batch in batches)


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
