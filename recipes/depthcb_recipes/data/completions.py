"""Prompts and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import completions, python_corpus
from depthcb_recipes.data.text_data import TextData, end_of_text, plain_ids
from depthcb_recipes.objectives.objective import IGNORED


class Completions(TextData):
    """A prompt and its completion, for `CompletionLM`: the labels of the prompt are -100.

    Of Python text the prompt is a signature, the completion its body. A completion ends with the end-of-text token;
    what goes beyond ``max_length`` is cut off its end. Rows whose prompt leaves no room are left out.

    Args:
        backbone: As for `TextData`.
        dataset: As for `TextData`.
        prompt: Column of the prompts.
        completion: Column of the completions.
        **options: As for `TextData`.

    Raises:
        ValueError: As for `TextData`.
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
