"""Data modules on files, folders and data sets of other kinds, and their errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from depthcb_recipes import Completions, LabelledText, LabelledTokens, PackedText, TextPairs
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.data.corpus import in_hashed_order
from depthcb_recipes.data.text_data import TextData

BOTH = pytest.mark.parametrize("name", ["smollm2", "bert"])
PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
KINDS: list[type[TextData]] = [PackedText, Completions, LabelledText, LabelledTokens, TextPairs]


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


@pytest.mark.slow
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
