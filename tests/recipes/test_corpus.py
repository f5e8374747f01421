"""The Python corpus and its labels."""

import ast
import importlib.util
import keyword
import re
import sys

import pytest

from depthcb_recipes.cache import cache_folder
from depthcb_recipes.data.corpus import (
    PACKAGES,
    TOKEN_KINDS,
    _python_files,
    balanced,
    completions,
    corpus_fingerprint,
    docstring_packages,
    docstring_pairs,
    python_corpus,
    python_tokens,
    split_by_file,
)

LONG = "Words that say in some detail what the thing below is for, so that the docstring is long enough to count."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small installed library with all special cases, and an empty cache."""
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


def test_a_bad_kind_is_refused():
    with pytest.raises(ValueError, match="'code', 'prose', not 'poetry'"):
        python_corpus("poetry")


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


@pytest.fixture(scope="module")
def code():
    return python_corpus("code")


def test_completions_are_the_whole_text_cut_after_the_signature(code):
    rows = completions(code)
    texts = set(code["text"])
    assert len(rows) > 0.7 * len(code)
    for row in rows.select(range(0, len(rows), 7)):
        prompt, completion = row["prompt"], row["completion"]
        assert prompt + completion in texts
        node = ast.parse(prompt.rstrip() + " pass" if prompt.count("\n") == 1 else prompt + "    pass").body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert ast.parse(prompt + completion).body[0].name == node.name


def test_pairs_are_docstrings_and_functions_without_them(code):
    rows = docstring_pairs(code)
    assert len(rows) > 2000
    assert min(map(len, rows["first"])) >= 80
    for row in rows.select(range(0, len(rows), 11)):
        function = ast.parse(row["second"]).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert row["first"] not in row["second"]


def test_token_kinds_are_what_tokenize_says(code):
    rows = python_tokens(code.select(range(300)))
    assert len(rows) > 250
    for row in rows:
        assert len(row["tokens"]) == len(row["labels"])
        assert set(row["labels"]) <= set(TOKEN_KINDS)
        for word, kind in zip(row["tokens"], row["labels"], strict=True):
            assert not word.isspace()
            assert (kind == "keyword") == keyword.iskeyword(word)
            assert (kind == "comment") == word.startswith("#")
            assert kind != "name" or word.isidentifier()
            assert kind != "number" or word[0].isdigit() or word[0] == "."
            assert kind != "string" or word[-1] in "'\""
    seen = {kind for row in rows for kind in row["labels"]}
    assert seen == set(TOKEN_KINDS)


def test_the_names_of_the_packages_are_no_answer(library):
    """Library names are masked, and docstrings that occur in two libraries are dropped."""
    other = library.parent / "depthcb_other"
    other.mkdir()
    own = "What depthcb_other does, in words that nobody else uses, long enough for a docstring that counts as prose."
    (other / "__init__.py").write_text(f'def f():\n    """{LONG}"""\n\n\ndef g():\n    """{own}"""\n')
    rows = docstring_packages(("depthcb_sample", "depthcb_other"))
    assert set(rows["label"]) == {"depthcb_sample", "depthcb_other"}
    assert LONG not in rows["text"]
    assert own.replace("depthcb_other", "_") in rows["text"]
    assert not any(name in text for name in ("depthcb_sample", "depthcb_other") for text in rows["text"])


@pytest.mark.slow
def test_the_eight_packages_have_enough_docstrings_each():
    rows = docstring_packages()
    assert set(rows["label"]) == set(PACKAGES)
    words = {word for text in rows["text"] for word in re.findall(r"[a-z]+", text.lower())}
    assert not words & {*PACKAGES, "np", "pd"}
    even = balanced(rows, "label")
    counts = {even["label"].count(name) for name in PACKAGES}
    assert len(counts) == 1
    assert counts.pop() > 300


def test_test_folders_are_not_walked():
    root = importlib.util.find_spec("unittest").submodule_search_locations[0]
    assert all("test" not in path.parts[-2:] for path in _python_files(root))


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "depthcb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "depthcb"
