"""Prompts with a preferred and a rejected completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from depthcb_recipes.data.corpus import completions, python_corpus
from depthcb_recipes.data.text_data import TextData, end_of_text, plain_ids
from depthcb_recipes.objectives.objective import IGNORED


class PreferencePairs(TextData):
    """Prompts with a preferred and a rejected completion, for `DPO`; prompt tokens have the label -100.

    In the Python corpus, the prompt is a function or class signature, its body is preferred, and the body of the next
    one in the same file is rejected. An end-of-text token is appended to each completion, and rows are truncated to
    ``max_length``. Rows whose completions are left empty or alike are dropped.

    Args:
        backbone: See `TextData`.
        dataset: See `TextData`.
        prompt: Name of the prompt column.
        chosen: Name of the column with the preferred completion, without the prompt.
        rejected: Name of the column with the rejected completion, without the prompt.
        **options: See `TextData`.

    Raises:
        ValueError: See `TextData`.
    """

    python_columns = ("prompt", "chosen", "rejected")

    def __init__(
        self,
        backbone: str | PreTrainedTokenizerBase,
        dataset: str = "python",
        *,
        prompt: str = "prompt",
        chosen: str = "chosen",
        rejected: str = "rejected",
        **options: Any,
    ) -> None:
        super().__init__(backbone, dataset, **options)
        self.columns = (prompt, chosen, rejected)

    def python_rows(self) -> Dataset:
        rows = completions(python_corpus("code"))
        bodies, files = rows["completion"], rows["file"]
        of_file: dict[str, list[int]] = {}
        for i, file in enumerate(files):
            of_file.setdefault(file, []).append(i)
        following = {i: then for own in of_file.values() for i, then in zip(own, own[1:] + own[:1], strict=True)}
        paired = rows.rename_column("completion", "chosen")
        return paired.add_column("rejected", [bodies[following[i]] for i in range(len(bodies))])

    def encode(self, rows: Dataset) -> Iterator[dict[str, list[int]]]:
        end = end_of_text(self.tokenizer)
        for prompt, *texts in zip(*(plain_ids(self.tokenizer, rows[column]) for column in self.columns), strict=True):
            chosen, rejected = ([*prompt, *text, end][: self.max_length] for text in texts)
            if chosen != rejected and min(map(len, (chosen, rejected))) > len(prompt) > 0:
                hidden = [IGNORED] * len(prompt)
                yield {
                    "input_ids": chosen,
                    "labels": hidden + chosen[len(prompt) :],
                    "rejected_input_ids": rejected,
                    "rejected_labels": hidden + rejected[len(prompt) :],
                }
