"""Tokenizers of the packaged backbones."""

from __future__ import annotations

from typing import Any

import pytest

from depthcb_recipes.backbones.loading import load_tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def bert() -> Any:
    return load_tokenizer("minilm")
