"""All callbacks on compiled, checkpointed, lazily built and weight-sharing models."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from suite import Suite
from support import Judge, TinyLM, fit, seeded
from transformers import AlbertConfig, AlbertForMaskedLM

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor


class Checkpointed(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.model.gradient_checkpointing_enable()


class CompiledBlocks(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        for block in self.model.transformer.h:
            block.compile(backend="aot_eager")


class CompiledModel(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend="aot_eager")  # type: ignore[assignment]


class Lazy(TinyLM):
    """Builds its model in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.built, self.model = self.model, None  # type: ignore[assignment]
        del self._modules["built"]

    def configure_model(self) -> None:
        if self.model is None:
            self.model = seeded(TinyLM).model  # type: ignore[assignment]


class Shared(TinyLM):
    """One block run four times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        block = self.model.transformer.h[0]
        self.model.transformer.h = torch.nn.ModuleList([block] * 4)


class Albert(TinyLM):
    """Four layers that share one set of weights, or two groups that each run twice."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        config = AlbertConfig(
            vocab_size=61, embedding_size=8, hidden_size=16, num_hidden_layers=4, num_hidden_groups=groups,
            num_attention_heads=2, intermediate_size=32,
        )  # fmt: skip
        self.model = AlbertForMaskedLM(config)  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make", [Checkpointed, *(pytest.param(m, marks=pytest.mark.slow) for m in (CompiledBlocks, CompiledModel)), Lazy]
)
def test_models(make: Callable[[], pl.LightningModule]) -> None:
    suite = Suite.make()
    suite.fit(seeded(make))
    suite.check(4, 1)
    assert all(".transformer.h." in name and "_orig_mod" not in name for name in suite.control.names)


@pytest.mark.parametrize("callback", [EqualStep, UpdateRatioMonitor, DepthProfile])
def test_shared_layers_are_refused(callback: Callable[[], pl.Callback]) -> None:
    """The same block at several depths has no depth of its own."""
    with pytest.raises(ValueError, match=r"No list of layers of one class|appears twice|with one layer only"):
        fit(seeded(Shared), [callback()])


@pytest.mark.parametrize("callback", [EqualStep, UpdateRatioMonitor, DepthProfile])
def test_albert_is_refused(callback: Callable[[], pl.Callback]) -> None:
    with pytest.raises(ValueError, match=r"one layer only: 'model\.albert\.encoder.*name them with layers="):
        fit(seeded(lambda: Albert(groups=1)), [callback()])


def test_a_layer_that_runs_twice_has_steps_but_no_depth() -> None:
    """A block that runs twice has one step size but two activations."""
    wanted, realised = Judge(), Judge()
    fit(seeded(lambda: Albert(groups=2)), [wanted, EqualStep(), realised])
    target = wanted.ratios().mean(axis=1, keepdims=True)
    assert realised.ratios() == pytest.approx(target.repeat(2, 1), rel=1e-4)
    with pytest.raises(ValueError, match=r"albert_layers\.0' ran several times in one forward, .*name other layers"):
        fit(seeded(lambda: Albert(groups=2)), [DepthProfile()])
