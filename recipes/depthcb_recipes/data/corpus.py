"""The Python corpus: source code and docstrings of installed libraries, with labels derived from the source.

The text depends on the installed versions, so studies record ``corpus_fingerprint`` with their results.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import io
import keyword
import os
import platform
import re
import sysconfig
import textwrap
import token
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from datasets import Dataset, DatasetInfo

from depthcb_recipes.cache import cache_folder, cached, digest

Kind = Literal["code", "prose"]

_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_PROSE = 80  # characters; shorter docstrings are mere titles


#: Packages whose docstrings are classified; all of them are dependencies of the recipes.
PACKAGES = ("torch", "transformers", "numpy", "pandas", "lightning", "torchmetrics", "datasets", "huggingface_hub")
#: Maximum number of files per package. Classes are balanced to the smallest package, so reading more gains nothing.
MOST_FILES = 500
#: The token types that are classified.
TOKEN_KINDS = ("name", "keyword", "operator", "number", "string", "comment")


def python_corpus(kind: Kind, *, packages: Sequence[str] = ("stdlib",), most_files: int | None = None) -> Dataset:
    """Reads the Python source of installed libraries into unique documents.

    A document is a top-level function or class with its decorators (``"code"``) or a docstring of at least 80
    characters (``"prose"``). Documents are ordered by file name. Files that do not parse are skipped; their number is
    in ``dataset.info.description``. The first call takes a few seconds; the result is cached on disk.

    Args:
        kind: ``"code"`` or ``"prose"``.
        packages: ``"stdlib"`` or names of installed packages; test folders are excluded.
        most_files: Maximum number of files per package, selected by hash of the name; None for all.

    Returns:
        A dataset with the columns ``text`` and ``file`` (path relative to the library's root, with forward slashes).

    Raises:
        ValueError: If ``kind`` is unknown or a package is not installed as Python source.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, not {kind!r}")
    sources = [source for package in packages for source in _sources(package, most_files)]
    path = cache_folder() / "corpus" / f"{kind}-{_state(kind, sources)}.parquet"
    table = cached(path, lambda: _scan(kind, sources))
    skipped = table.schema.metadata[b"skipped"].decode()
    description = f"Python {kind} of {', '.join(packages)}: {len(sources)} files, {skipped} do not parse"
    return Dataset(table.replace_schema_metadata(None), info=DatasetInfo(description=description))


def split_by_file(dataset: Dataset, val_fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits documents into training and validation so that no file is in both.

    The assignment of a file depends only on its name and the seed, not on the other files or their order.

    Args:
        dataset: Dataset with a column ``file``.
        val_fraction: Probability that a file is used for validation, between 0 and 1 (exclusive).
        seed: Seed of the split.

    Raises:
        ValueError: If ``val_fraction`` is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    below = int(val_fraction * 2**64)
    held_out = {file: _hash(seed, file) < below for file in dataset.unique("file")}
    sides = [held_out[file] for file in dataset["file"]]
    train = [row for row, held in enumerate(sides) if not held]
    val = [row for row, held in enumerate(sides) if held]
    return dataset.select(train), dataset.select(val)


def in_hashed_order(texts: Iterable[str], seed: int) -> list[str]:
    """Sorts texts by a seeded hash of their content, so that even the first few mix many files."""
    return sorted(texts, key=lambda text: _hash(seed, text))


def corpus_fingerprint(dataset: Dataset) -> str:
    """Returns the SHA-256 of a corpus's texts, in order."""
    return digest(dataset["text"])


def completions(code: Dataset) -> Dataset:
    """Extracts signatures and bodies of the functions and classes in ``python_corpus("code")``.

    Returns:
        A dataset with the columns ``prompt`` (decorators and signature, including the line break), ``completion`` and
        ``file``. One-line definitions are dropped.
    """
    return _derived(code, _signature_and_body)


def docstring_pairs(code: Dataset) -> Dataset:
    """Extracts docstrings and the functions or methods they document.

    Returns:
        A dataset with the columns ``first`` (docstring of at least 80 characters), ``second`` (the function without its
        docstring) and ``file``.
    """
    return _derived(code, _docstrings_and_functions)


def python_tokens(code: Dataset) -> Dataset:
    """Extracts the tokens of functions and classes with their types.

    Returns:
        A dataset with the columns ``tokens``, ``labels`` (names from ``TOKEN_KINDS``) and ``file``. Whitespace tokens
        are dropped.
    """
    return _derived(code, _tokens_and_kinds)


def docstring_packages(packages: Sequence[str] = PACKAGES) -> Dataset:
    """Extracts docstrings, labelled by the library they come from.

    Library names are masked in the text; docstrings that occur in several libraries are dropped. The classes are not
    balanced; see `balanced`.

    Returns:
        A dataset with the columns ``text``, ``label`` and ``file``.
    """
    stamps = [_state("prose", _sources(package, MOST_FILES)) for package in packages]
    path = cache_folder() / "corpus" / f"packages-{digest([*packages, *stamps])[:16]}.parquet"
    return Dataset(cached(path, lambda: _docstrings_and_packages(packages)))


def _docstrings_and_packages(packages: Sequence[str]) -> pa.Table:
    names = "|".join(map(re.escape, packages))
    named = re.compile(rf"(?i)(?:py)?(?:{names})\w*|(?<![a-z])(?:np|pd|hf)(?![a-z])")
    origins: dict[str, tuple[str, str] | None] = {}
    for package in packages:
        prose = python_corpus("prose", packages=(package,), most_files=MOST_FILES)
        for text, file in zip(prose["text"], prose["file"], strict=True):
            masked = named.sub("_", text)
            origins[masked] = None if masked in origins else (package, file)
    rows = [{"text": text, "label": origin[0], "file": origin[1]} for text, origin in origins.items() if origin]
    return pa.Table.from_pylist(rows)


def balanced(rows: Dataset, label: str) -> Dataset:
    """Keeps the first rows of each label, as many as the rarest label has, in their original order."""
    places: dict[Any, list[int]] = {}
    for row, name in enumerate(rows[label]):
        places.setdefault(name, []).append(row)
    most = min(map(len, places.values()), default=0)
    return rows.select(sorted(row for of_one in places.values() for row in of_one[:most]))


def _derived(code: Dataset, read: Any) -> Dataset:
    made_from = digest([_own_source(), *code["text"], *code["file"]])[:16]
    path = cache_folder() / "corpus" / f"{read.__name__.strip('_')}-{made_from}.parquet"
    return Dataset(cached(path, lambda: _read_each(code, read)))


def _read_each(code: Dataset, read: Any) -> pa.Table:
    rows: dict[str, dict[str, Any]] = {}  # unique: methods are often copied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in third-party code
        for text, file in zip(code["text"], code["file"], strict=True):
            for row in read(text):
                rows.setdefault(repr(row), {**row, "file": file})
    return pa.Table.from_pylist(list(rows.values()))


def _signature_and_body(text: str) -> Iterator[dict[str, str]]:
    first = _statement(text).body[0]
    at = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
    lines = text.split("\n")
    if at > 0 and lines[at - 1].rstrip().endswith(":") and not lines[at - 1].lstrip().startswith("#"):
        yield {"prompt": "\n".join(lines[:at]) + "\n", "completion": "\n".join(lines[at:])}


def _docstrings_and_functions(text: str) -> Iterator[dict[str, str]]:
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, holder = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip(), node.body[0]
        assert holder.end_lineno is not None
        assert node.end_lineno is not None
        alone = node.body[1].lineno > holder.end_lineno and holder.lineno > node.lineno
        if len(docstring) >= _SHORTEST_PROSE and alone:
            function = lines[_first_line(node) - 1 : holder.lineno - 1] + lines[holder.end_lineno : node.end_lineno]
            dedented = textwrap.dedent("\n".join(function))
            if not dedented[0].isspace():  # multi-line strings with less indentation prevent dedenting
                yield {"first": docstring, "second": dedented}


def _tokens_and_kinds(text: str) -> Iterator[dict[str, list[str]]]:
    tokens, kinds = [], []
    try:
        for item in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = _kind(item)
            if kind is not None:
                tokens.append(item.string)
                kinds.append(kind)
    except (tokenize.TokenError, SyntaxError):  # documents end where ast ends the node, which tokenize may reject
        return
    if tokens:
        yield {"tokens": tokens, "labels": kinds}


def _kind(item: tokenize.TokenInfo) -> str | None:
    if item.type == token.NAME:
        return "keyword" if keyword.iskeyword(item.string) else "name"
    kinds = {token.OP: "operator", token.NUMBER: "number", token.STRING: "string", tokenize.COMMENT: "comment"}
    return kinds.get(item.type)


def _statement(text: str) -> Any:
    return ast.parse(text).body[0]


def _sources(package: str, most: int | None = None) -> list[tuple[str, Path]]:
    """Returns the Python files of a library as (name relative to its root, path), sorted by name."""
    found = _all_sources(package)
    if most is not None and len(found) > most:
        chosen = set(in_hashed_order((file for file, _ in found), seed=0)[:most])
        found = [source for source in found if source[0] in chosen]
    return found


def _all_sources(package: str) -> list[tuple[str, Path]]:
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [(path.relative_to(root).as_posix(), path) for path in _python_files(root)]
        return sorted(found)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(f"The package {package!r} is not installed")
    if spec.submodule_search_locations is None:
        found = [(Path(spec.origin).name, Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    else:
        roots = [Path(root) for root in spec.submodule_search_locations]
        found = [(path.relative_to(root.parent).as_posix(), path) for root in roots for path in _python_files(root)]
    if not found:
        raise ValueError(f"The package {package!r} is installed without Python source")
    return sorted(found)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _scan(kind: Kind, sources: Sequence[tuple[str, Path]]) -> pa.Table:
    documents: dict[str, str] = {}  # text → first file that contains it
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
    return table.replace_schema_metadata({"skipped": str(skipped)})


def _documents(path: Path, kind: Kind) -> list[str]:
    with tokenize.open(path) as stream:  # honours the encoding declaration
        source = stream.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in third-party code
        tree = ast.parse(source)
    if kind == "prose":
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(tree) if isinstance(node, holders)]
        cleaned = [inspect.cleandoc(string).strip() for string in strings]
        return [text for text in cleaned if len(text) >= _SHORTEST_PROSE]
    lines = source.split("\n")  # not splitlines, which also splits at form feeds, unlike ast
    blocks = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    return ["\n".join(lines[_first_line(block) - 1 : block.end_lineno]) for block in blocks]


def _first_line(block: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([block.lineno, *(decorator.lineno for decorator in block.decorator_list)])


def _state(kind: Kind, sources: Sequence[tuple[str, Path]]) -> str:
    """Returns a cache key that depends on the Python version, the files to read and this module."""
    stamps = [(file, path.stat().st_size, path.stat().st_mtime_ns) for file, path in sources]
    known = (platform.python_version(), kind, _own_source(), stamps)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _own_source() -> str:
    """Returns a hash of this module's source, since it determines what is extracted."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest())
