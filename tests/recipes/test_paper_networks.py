"""All 15 networks of the paper's study, narrow but as deep and built as the originals, through paper.yaml offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from shrunk import paper_in_small, write_model, write_text

from depthcb import LayerStack
from depthcb.cli import main
from depthcb.run import read_runs
from depthcb_recipes.backbones.architectures import ARCHITECTURES
from depthcb_recipes.backbones.catalogue import describe
from depthcb_recipes.backbones.loading import load_backbone, pretraining
from depthcb_recipes.studies.grid import RunConfig, load_study
from depthcb_recipes.studies.result import FINISHED, write_result
from depthcb_recipes.studies.runner import run
from depthcb_recipes.studies.store import Store

#: One of each family and block type in the fast tests.
FAST = ("bert-base-uncased", "gpt2", "EleutherAI/pythia-160m", "state-spaces/mamba-130m-hf", "RWKV/rwkv-4-169m-pile")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_catalogue_has_the_published_number_of_parameters(name: str) -> None:
    found = ARCHITECTURES[name]
    with torch.device("meta"):
        model = getattr(hf, found.head)(found.config())
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == found.parameters
    assert name in found.source


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_are_what_the_catalogue_says(name: str, tmp_path: Path) -> None:
    """Depth, family, block type, norm position, projections and ties of the narrow copies."""
    found, folder = ARCHITECTURES[name], write_model(name, tmp_path)
    described = describe(str(folder))
    assert (described.family, described.block) == (found.family, found.block)
    settings = found.settings
    assert described.layers == settings.get("num_hidden_layers", settings.get("n_layer"))
    assert pretraining(str(folder)) == ("masked_lm" if found.family == "encoder" else "causal_lm")
    model, _ = load_backbone(str(folder), head=pretraining(str(folder)))  # type: ignore[arg-type]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert tied == settings["tie_word_embeddings"]
    projected = [n for n, _ in model.named_modules() if n.endswith(("project_in", "project_out"))]
    assert len(projected) == (2 if name == "facebook/opt-350m" else 0)
    assert normalised(model) == (found.norm == "post")


def normalised(model: Any) -> bool:
    """Whether the last block ends with a layer norm, whose output has mean 0 and variance 1 at first."""
    outputs: list[Any] = []
    handle = LayerStack.find(model).modules[-1].register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(5, 15)[None])
    handle.remove()
    hidden = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    mean, spread = hidden.mean(-1), hidden.std(-1, correction=0)
    return bool(mean.abs().max() < 1e-5 and (spread - 1).abs().max() < 1e-2)


def made(config: RunConfig, store: Store) -> None:
    """Makes a run as a worker does, in this process."""
    folder = store.prepare(config)
    result = run(config, folder)
    assert result.status == FINISHED, result.message
    write_result(folder, result)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "objectives"),
    [
        *((name, ("sequence_classification",)) for name in FAST),
        pytest.param("EleutherAI/pythia-160m", ("contrastive",)),  # it has no dropout of its own
        *(
            pytest.param(name, ("causal_lm", "token_classification", "contrastive"), marks=pytest.mark.slow)
            for name in ARCHITECTURES
        ),
    ],
)
def test_each_goes_through_the_papers_study(
    name: str, objectives: tuple[str, ...], text: Path, tmp_path: Path, capsys: Any
) -> None:
    """Fit, both nulls, the pair and the table; the same probe texts, whatever the model."""
    grid = {"objective": list(objectives), "control": ["standard", "equal-step"], "seed": [0]}
    path = paper_in_small(tmp_path, {name: write_model(name, tmp_path / "model")}, text, grid)
    study, store = load_study(path), Store(tmp_path / "out")
    for config in study.runs:
        made(config, store)
        result = store.result(config)
        assert result is not None
        figures = result.figures
        assert figures is not None
        assert list(figures.profiles) == ["procrustes", "cka", "cka_normalized"]
        assert all(len(figures.null[m]) == 1 for m in figures.profiles)
        assert (figures.backbone["family"], figures.backbone["block"]) == (
            ARCHITECTURES[name].family,
            ARCHITECTURES[name].block,
        )
        (record,) = read_runs(store.folder(config))
        settings = record.records["depth"].settings
        assert settings["causal"] == (ARCHITECTURES[name].causal or config.objective == "causal_lm")
        assert settings["probe_rows"] == 24
        if config.control == "equal-step":
            assert figures.realised_spread is not None
            assert figures.realised_spread < 1.001
    assert main(["study", "table", str(path), "--out", str(store.root)]) == 0
    printed = capsys.readouterr().out
    assert ARCHITECTURES[name].block in printed
    assert main(["study", "claims", str(path), "--out", str(store.root)]) == 0
