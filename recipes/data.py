"""Text that every machine with Python has: the source and the docstrings of installed libraries.

The text depends on the installed versions, so a study records ``corpus_fingerprint`` beside its numbers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import itertools
import os
import platform
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetInfo, Features, List, Value
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from recipes.backbones import cache_folder

Kind = Literal["code", "prose"]

_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_PROSE = 80  # characters: below it a docstring is a title


def python_corpus(kind: Kind, *, packages: Sequence[str] = ("stdlib",)) -> Dataset:
    """Read the Python source of installed libraries into documents, each text once.

    A document is one top-level function or class with its decorators (``"code"``) or one docstring of at least 80
    characters (``"prose"``). The order is that of the file names. Files that do not parse are skipped; their number is
    in ``dataset.info.description``. The first call reads for some seconds and keeps the result in the user's cache.

    Args:
        kind: ``"code"`` or ``"prose"``.
        packages: ``"stdlib"`` or names of installed packages, without their test folders.

    Returns:
        Columns ``text`` and ``file``, the path below the library's root with forward slashes.

    Raises:
        ValueError: Another kind, or a package that is not installed as Python source.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, not {kind!r}")
    sources = [source for package in packages for source in _sources(package)]
    cache = cache_folder() / "corpus" / f"{kind}-{_state(kind, sources)}.parquet"
    table = _read(cache)
    if table is None:
        table = _scan(kind, sources)
        _write(table, cache)
    notes = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    description = f"Python {kind} of {', '.join(packages)}: {len(sources)} files, {notes['skipped']} do not parse"
    return Dataset(table.replace_schema_metadata(None), info=DatasetInfo(description=description))


def split_by_file(dataset: Dataset, val_fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split documents into training and validation so that no file is in both.

    A file's side follows from its name and the seed alone, neither from the other files nor from their order.

    Args:
        dataset: Rows with a column ``file``.
        val_fraction: Probability that a file is for validation, above 0 and below 1.
        seed: Another seed gives another split.

    Raises:
        ValueError: ``val_fraction`` is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, not at {val_fraction}")
    below = int(val_fraction * 2**64)
    held_out = {file: _hash(seed, file) < below for file in dataset.unique("file")}
    sides = [held_out[file] for file in dataset["file"]]
    train = [row for row, held in enumerate(sides) if not held]
    val = [row for row, held in enumerate(sides) if held]
    return dataset.select(train), dataset.select(val)


def in_hashed_order(texts: Iterable[str], seed: int) -> list[str]:
    """Texts in an order that follows from each text and the seed alone: the first few already mix many files."""
    return sorted(texts, key=lambda text: _hash(seed, text))


def corpus_fingerprint(dataset: Dataset) -> str:
    """The SHA-256 of a corpus: of its texts in their order."""
    return _digest(dataset["text"])


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, *, blocks: int | None = None
) -> Dataset:
    """Tokenise documents, end each with the end-of-text token, and cut the stream into equal blocks.

    The tokenizer adds no token of its own, and a text that spells out a special token does not become one. The
    remainder of the stream is dropped.

    Args:
        texts: Documents, read only as far as needed.
        tokenizer: Its end-of-text token (BERT's kin: the separator) stands between documents.
        block_size: Tokens in a block.
        blocks: Number of blocks to stop at, None for all the text.

    Returns:
        One column ``input_ids``.

    Raises:
        ValueError: The sizes are not positive, the tokenizer has no token to end a text with, or the text is too short.
    """
    if block_size < 1 or (blocks is not None and blocks < 1):
        raise ValueError(f"block_size and blocks must be positive, not {block_size} and {blocks}")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither an end-of-text nor a separator token to join texts")
    stream: list[int] = []
    for ids in _tokenise(texts, tokenizer):
        stream += [*ids, end]
        if blocks is not None and len(stream) >= blocks * block_size:
            break
    made = len(stream) // block_size
    if made < (blocks or 1):
        raise ValueError(f"The text gives {made} blocks of {block_size} tokens, but {blocks or 1} are needed")
    rows = [stream[i * block_size : (i + 1) * block_size] for i in range(min(made, blocks or made))]
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int64"))}))


class PythonText(LightningDataModule):
    """Packed Python text for next-token prediction, split by file.

    Documents are taken in hashed order, so a few blocks are already a mix of many files. Every loader draws from its
    own generator: two fits see the same batches, and the process-wide random numbers are neither read nor moved.

    Args:
        tokenizer: The backbone's tokenizer.
        kind: ``"code"`` or ``"prose"``, see ``python_corpus``.
        block_size: Tokens in a row.
        batch_size: Rows in a batch.
        val_blocks: Rows for validation.
        train_blocks: Rows for training, None for all there are.
        seed: Decides the split, the choice of documents and the order of training rows.
        packages: Libraries to read, see ``python_corpus``.

    Raises:
        ValueError: Another kind, an unknown package, or less text than the blocks need (when the text is read).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: Kind = "code",
        block_size: int = 128,
        batch_size: int = 8,
        val_blocks: int = 64,
        train_blocks: int | None = None,
        seed: int = 0,
        packages: Sequence[str] = ("stdlib",),
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, not {kind!r}")
        self.tokenizer = tokenizer
        self.kind = kind
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_blocks = val_blocks
        self.train_blocks = train_blocks
        self.seed = seed
        self.packages = tuple(packages)

    def prepare_data(self) -> None:
        """Fill the cache, so that only one process of a machine scans the libraries."""
        python_corpus(self.kind, packages=self.packages)

    @cached_property
    def train_data(self) -> Dataset:
        """The training rows, tokenised on first use."""
        return pack(self._texts(self.kind, 0), self.tokenizer, self.block_size, blocks=self.train_blocks)

    @cached_property
    def val_data(self) -> Dataset:
        """The validation rows, tokenised on first use."""
        return pack(self._texts(self.kind, 1), self.tokenizer, self.block_size, blocks=self.val_blocks)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches; each new loader starts the same order again."""
        return self._loader(self.train_data, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in a fixed order."""
        return self._loader(self.val_data, shuffle=False)

    def probe_batches(
        self, rows: int = 64, block_size: int = 64, batch_size: int = 16, kind: Kind = "code"
    ) -> list[dict[str, Tensor]]:
        """Fixed inputs for a depth probe, from validation files only.

        Each row is the start of a different document: cut from one packed stream, neighbouring rows would share their
        document and count as fewer than they are.

        Args:
            rows: Number of rows.
            block_size: Tokens in a row; shorter documents are passed over.
            batch_size: Rows in a batch.
            kind: ``"code"`` or ``"prose"``.

        Raises:
            ValueError: Too few documents are that long.
        """
        long = (ids[:block_size] for ids in _tokenise(self._texts(kind, 1), self.tokenizer) if len(ids) >= block_size)
        ids = list(itertools.islice(long, rows))
        if len(ids) < rows:
            raise ValueError(f"Only {len(ids)} validation documents have {block_size} tokens, but {rows} are needed")
        batches = torch.split(torch.tensor(ids), batch_size)
        return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]

    def _texts(self, kind: Kind, side: Literal[0, 1]) -> Iterator[str]:
        """One side of the split (0 training, 1 validation), its documents in hashed order."""
        part = split_by_file(python_corpus(kind, packages=self.packages), seed=self.seed)[side]
        yield from in_hashed_order(part["text"], self.seed)

    def _loader(self, data: Dataset, shuffle: bool) -> DataLoader[dict[str, Tensor]]:
        # Without a generator of its own even an unshuffled loader draws one number from the process-wide one, and a
        # validation would change the dropout of the training steps after it.
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        return DataLoader(
            data, self.batch_size, shuffle=shuffle, generator=generator, collate_fn=collate, num_workers=0
        )


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Stack packed rows: nothing is padding, and every token is its own label (the model shifts them)."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}


def _tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, at_once: int = 64) -> Iterator[list[int]]:
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, at_once)):
        # verbose=False: whole documents may be longer than the model's context, the rows cut from them are not
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        yield from encoded["input_ids"]


def _sources(package: str) -> list[tuple[str, Path]]:
    """The Python files of a library, as (name below its root, path), in the order of the names."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [(path.relative_to(root).as_posix(), path) for path in _python_files(root)]
        return sorted(found)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(f"The package {package!r} is not installed, so it has no text to read")
    if spec.submodule_search_locations is None:
        found = [(Path(spec.origin).name, Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    else:
        roots = [Path(root) for root in spec.submodule_search_locations]
        found = [(path.relative_to(root.parent).as_posix(), path) for root in roots for path in _python_files(root)]
    if not found:
        raise ValueError(f"The package {package!r} is installed without Python source, so it has no text to read")
    return sorted(found)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _scan(kind: Kind, sources: Sequence[tuple[str, Path]]) -> pa.Table:
    documents: dict[str, str] = {}  # text → the first file that has it
    skipped = 0
    for file, path in sources:
        try:
            texts = _documents(path, kind)
            "".join(texts).encode()  # a lone surrogate cannot be stored
        except (SyntaxError, ValueError):
            skipped += 1
            continue
        for text in texts:
            documents.setdefault(text, file)
    table = pa.table({"text": pa.array(documents, pa.string()), "file": pa.array(documents.values(), pa.string())})
    return table.replace_schema_metadata({"skipped": str(skipped), "sha256": _digest(documents)})


def _documents(path: Path, kind: Kind) -> list[str]:
    with tokenize.open(path) as stream:  # it knows the encoding line
        source = stream.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    if kind == "prose":
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(tree) if isinstance(node, holders)]
        cleaned = [inspect.cleandoc(string).strip() for string in strings]
        return [text for text in cleaned if len(text) >= _SHORTEST_PROSE]
    lines = source.split("\n")  # not splitlines: it also breaks at form feeds, which ast does not count
    blocks = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return ["\n".join(lines[_first_line(block) - 1 : block.end_lineno]) for block in blocks]


def _first_line(block: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([block.lineno, *(decorator.lineno for decorator in block.decorator_list)])


def _read(path: Path) -> pa.Table | None:
    """A cached corpus, or None if there is none or it is not what was written."""
    try:
        table = pq.read_table(path)
        whole = _digest(table["text"].to_pylist()) == table.schema.metadata[b"sha256"].decode()
    except (OSError, pa.ArrowException, KeyError, TypeError, UnicodeError):
        return None
    return table if whole else None


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        fresh = Path(scratch) / path.name
        pq.write_table(table, fresh)
        os.replace(fresh, path)  # whole or not at all


def _state(kind: Kind, sources: Sequence[tuple[str, Path]]) -> str:
    """A key that changes with Python, with the files to read and with this module."""
    stamps = [(file, path.stat().st_size, path.stat().st_mtime_ns) for file, path in sources]
    known = (platform.python_version(), kind, hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), stamps)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")  # the zero byte keeps ["ab", "c"] and ["a", "bc"] apart
    return digest.hexdigest()


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest())
