"""Prompts and completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import completions, python_corpus
from depthcb_recipes.data.text_data import TextData, end_of_text, plain_ids
from depthcb_recipes.objectives.objective import IGNORED


class Completions(TextData):
    """Pairs of prompt and completion for `CompletionLM`; prompt tokens have the label -100.

    In the Python corpus, the prompt is a function or class signature and the completion its body. An end-of-text token
    is appended to each completion, and rows are truncated to ``max_length``. Rows whose prompt leaves no room for a
    completion are dropped.

    Args:
        backbone: See `TextData`.
        dataset: See `TextData`.
        prompt: Name of the prompt column.
        completion: Name of the completion column.
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`.
    """

    python_columns = ("prompt", "completion")

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        prompt: str = "prompt",
        completion: str = "completion",
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = (prompt, completion)

    def python_rows(self) -> Dataset:
        return completions(python_corpus("code"))

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        end = end_of_text(self.tokenizer)
        for prompt, text in zip(*(plain_ids(self.tokenizer, rows[column]) for column in self.columns), strict=True):
            ids = [*prompt, *text, end][: self.max_length]
            if len(ids) > len(prompt) > 0:
                yield {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}
