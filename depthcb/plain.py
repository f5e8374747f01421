"""Settings as plain JSON that keeps their values and types, and JSON text without NaN."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import marshal
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

#: Words in the name of a setting whose value is not written down.
SECRETS = ("api_key", "apikey", "token", "secret", "secrets", "password", "passwords", "passwd", "credentials")
REDACTED = "(redacted)"
#: The keys of a value that JSON does not know: its type, and the value in JSON's terms or why that is not known.
TYPE, VALUE, UNKNOWN = "__type__", "value", "__unknown__"
#: Arrays with more elements are told apart by a hash, and above the second number not at all.
MOST_SHOWN, MOST_HASHED = 1_000, 1_000_000
#: Objects nested deeper than this are not followed, nor more objects than this in one value.
DEEPEST, MOST_OBJECTS = 32, 100_000


def plain(value: Any, redact: Collection[str] = ()) -> Any:
    """Returns a value as plain JSON data, such that different values stay different.

    Numbers, text, lists and dicts with text as keys are themselves, and tuples are lists. Everything else becomes
    ``{"__type__": ..., "value": ...}``: NaN and infinity, sets, paths, enum members, dataclasses, namespaces,
    configurations of OmegaConf, arrays, dtypes, and other objects by their attributes. Functions and classes are their
    name, a lambda also its code. A `torch.nn.Module` is its printed form. What cannot be told by its value has
    ``"__unknown__"``, with the reason. Nothing raises an error.

    Args:
        value: Any object.
        redact: Words: a value is replaced by ``"(redacted)"`` if they occur in its name, in dicts and in attributes at
            any depth. Words are compared whole, so that ``"token"`` is in ``hf_token`` and ``accessToken`` but not in
            ``tokenizer`` or ``max_tokens``. Numbers, booleans and None are kept.

    Example:
        >>> plain({"lr": 0.1, "betas": (0.9, 0.95), "seen": {1}})
        {'lr': 0.1, 'betas': [0.9, 0.95], 'seen': {'__type__': 'set', 'value': [1]}}
        >>> plain({"api_key": "sk-1", "tokenizer": "gpt2"}, redact=SECRETS)
        {'api_key': '(redacted)', 'tokenizer': 'gpt2'}
    """
    return _plain(value, tuple(map(_words, redact)), (), itertools.count())


def dumps(value: Any) -> str:
    """Returns strict JSON, without NaN; what JSON does not know is written as by `plain`."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(plain(value), allow_nan=False)


def loads(text: str) -> Any:
    """Reads what `dumps` wrote; NaN and infinity are numbers again."""
    return json.loads(text, object_hook=_floats if TYPE in text else None)


def _floats(fields: dict[str, Any]) -> Any:
    return float(fields[VALUE]) if fields.get(TYPE) == "float" and VALUE in fields else fields


def _plain(value: Any, redact: Sequence[list[str]], parents: tuple[int, ...], seen: Iterator[int]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else _typed(value, repr(value))
    if id(value) in parents:
        return _typed(value, f"the one {parents[::-1].index(id(value)) + 1} levels above")
    if len(parents) == DEEPEST or next(seen) > MOST_OBJECTS:
        return {TYPE: _name(type(value)), UNKNOWN: "too large"}
    inner = functools.partial(_plain, redact=redact, parents=(*parents, id(value)), seen=seen)
    try:
        return _converted(value, inner, redact)
    except Exception as error:  # a property or an interpolation of the user's may raise anything
        return {TYPE: _name(type(value)), UNKNOWN: type(error).__name__}


def _converted(value: Any, inner: Callable[[Any], Any], redact: Sequence[list[str]]) -> Any:
    def fields(items: Mapping[Any, Any]) -> Any:
        found = [(k, REDACTED if _is_secret(k, v, redact) else inner(v)) for k, v in items.items()]
        if all(type(k) is str and k not in (TYPE, UNKNOWN) for k, _ in found):
            return dict(found)
        return {TYPE: "dict", VALUE: [[inner(k), v] for k, v in found]}

    kind = type(value)
    if kind is dict:
        return fields(value)
    if kind in (list, tuple):
        return [inner(item) for item in value]
    if isinstance(value, enum.Enum):
        return _typed(value, [value.name, inner(value.value)])
    if isinstance(value, Mapping):
        return _typed(value, fields(dict(value.items())))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _typed(value, fields({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}))
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return _typed(value, fields(vars(value)))
    if isinstance(value, PurePath):
        return {TYPE: "pathlib.Path", VALUE: str(value)}
    if isinstance(value, (set, frozenset)):
        return _typed(value, sorted(map(inner, value), key=json.dumps))
    if isinstance(value, functools.partial):
        return _typed(value, [inner(value.func), inner(value.args), fields(value.keywords)])
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _function(value, inner)
    if all(hasattr(value, name) for name in ("tolist", "dtype", "shape")):
        return {**_typed(value, _array(value, inner)), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return _typed(value, [inner(item) for item in value])
    is_module = any(_name(base) == "torch.nn.modules.module.Module" for base in kind.__mro__)
    if not is_module and getattr(value, "__dict__", None):
        return _typed(value, fields(vars(value)))
    text = repr(value)
    return {TYPE: _name(kind), UNKNOWN: "no value"} if " at 0x" in text else _typed(value, text)


def _typed(value: Any, told: Any) -> dict[str, Any]:
    return {TYPE: _name(type(value)), VALUE: told}


def _name(kind: Any) -> str:
    module = getattr(kind, "__module__", None)
    return kind.__qualname__ if module in (None, "builtins") else f"{module}.{kind.__qualname__}"


def _function(value: Any, inner: Callable[[Any], Any]) -> Any:
    """Returns a function or class by its name, with what distinguishes lambdas and nested functions of one name."""
    told: dict[str, Any] = {TYPE: "function", VALUE: _name(value)}
    if isinstance(value, types.MethodType):
        return told | {"self": inner(value.__self__)}
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
        # Version 2 has no references, which depend on what else holds the same constants.
        told["code"] = hashlib.sha256(marshal.dumps(value.__code__, 2)).hexdigest()
        told["holds"] = [inner(cell.cell_contents) for cell in value.__closure__ or ()] + [inner(value.__defaults__)]
    return told


def _array(value: Any, inner: Callable[[Any], Any]) -> Any:
    count = math.prod(value.shape)
    if count > MOST_HASHED:
        raise ValueError("too many elements")
    items = value.tolist()
    return inner(items) if count <= MOST_SHOWN else hashlib.sha256(repr(items).encode()).hexdigest()


def _words(name: str) -> list[str]:
    """Splits a name at camel case and at everything that is no letter or digit."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower())


def _is_secret(key: Any, value: Any, redact: Sequence[list[str]]) -> bool:
    if not isinstance(key, str) or value is None or isinstance(value, (bool, int, float)):
        return False
    words = _words(key)
    return any(words[i : i + len(r)] == r for r in redact for i in range(len(words)))
