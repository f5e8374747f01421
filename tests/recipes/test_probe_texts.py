"""The fixed texts of a probe: the same ones for every model, from as many documents as possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_families import tiny
from shrunk import paragraphs, write_text

from depthcb_recipes.data.probe_texts import ProbeTexts
from depthcb_recipes.objectives.contrastive import Contrastive

TITLE = "^= [^=].* =$"


@pytest.fixture(scope="module")
def wiki(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text")) / "wiki")


def test_the_texts_are_the_same_for_all_models(wiki: str, bert: Any, smollm2: Any) -> None:
    probe = ProbeTexts(wiki, rows=30, title=TITLE, max_length=40)
    chosen = [text for text, _ in probe.texts()]
    for tokenizer in (bert, smollm2):
        batches = probe.batches(tokenizer)
        ids = [row[mask.bool()] for batch in batches for row, mask in zip(*list(batch.values())[:2], strict=True)]
        assert len(ids) == 30
        assert {batch["input_ids"].shape[1] for batch in batches} == {40}
        for row, text in zip(ids, chosen, strict=True):
            start = tokenizer.decode(row, skip_special_tokens=True)[:25]
            assert start == tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)[:25]
    assert chosen == [text for text, _ in ProbeTexts(wiki, rows=30, title=TITLE).texts()]
    assert set(chosen) != {text for text, _ in ProbeTexts(wiki, rows=30, title=TITLE, seed=1).texts()}


def test_documents_take_turns(wiki: str) -> None:
    """Two paragraphs to a title: 30 texts come from 30 titles, and headings are no texts."""
    found = ProbeTexts(wiki, rows=30, title=TITLE).texts()
    assert len({document for _, document in found}) == 30
    assert all(len(text) >= 200 and not text.startswith("=") for text, _ in found)
    test = paragraphs()[240:]
    assert {text for text, _ in found} <= set(test), "from the test split alone"
    rows = ProbeTexts(wiki, rows=len(test)).texts()
    assert len({document for _, document in rows}) == len(test), "without titles each row is its own document"


def test_what_cannot_be_found_is_named(wiki: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe: .* has no split 'nowhere': it has .*; set probe\.split"):
        ProbeTexts(wiki, split="nowhere").texts()
    with pytest.raises(ValueError, match=r"has no column 'body': it has text; set probe\.column"):
        ProbeTexts(wiki, column="body").texts()
    with pytest.raises(ValueError, match=r"has \d+ texts of at least 200 characters, and 5000 are needed"):
        ProbeTexts(wiki, rows=5000).texts()
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "x" * 300}) + "\n" + json.dumps({"text": "x" * 300}) + "\n")
    with pytest.raises(ValueError, match="has 1 texts"):  # equal texts count once
        ProbeTexts(str(path), split="train", rows=2).texts()


@pytest.mark.parametrize("family", ["neox", "opt", "mamba2", "rwkv"])
def test_texts_pair_with_themselves_in_networks_without_dropout(family: str) -> None:
    """The two views differ, validation repeats itself, and nothing is left on the network."""
    ids = torch.arange(3, 23).view(4, 5)
    with pytest.raises(
        ValueError, match=r"has no dropout, .*: provide pairs, or set dropout, such as model\.dropout=0\.1"
    ):
        Contrastive(tiny(family)).loss({"input_ids": ids})
    module = Contrastive(tiny(family), dropout=0.1)
    scores = module.train().loss({"input_ids": ids}).scores
    assert scores is not None
    assert (scores.diagonal() * module.temperature).max() < 1 - 1e-6, "two different views of each text"
    assert not torch.equal(scores, module.loss({"input_ids": ids}).scores)  # type: ignore[arg-type]
    first, again = (module.eval().loss({"input_ids": ids}).scores for _ in range(2))
    assert torch.equal(first, again)  # type: ignore[arg-type]
    embedded = module.model.get_input_embeddings()
    assert not embedded._forward_hooks
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and less than 1, not 1"):
        Contrastive(tiny(family), dropout=1)
