"""The two nulls, net changes, and the pretrained weights that they need."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import TinyLM, fit, loaders, seeded

from depthcb import DepthProfile, LayerStack
from depthcb.null import DRAWS, MATCHED, SEARCH, Null, _matching_scale, null_profiles
from depthcb.pretrained import PretrainedWeights
from depthcb.probe import Probe
from depthcb.reference import Reference
from depthcb.run import read_runs
from depthcb.similarity import find_measures

BATCH = {"input_ids": torch.randint(1, 61, (24, 12), generator=torch.Generator().manual_seed(0))}
MEASURES = find_measures(["cka", "relative_l2"])


def tuned(lr: float = 1e-2) -> tuple[torch.nn.Module, torch.nn.Module]:
    module = seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=lr)))
    pretrained = copy.deepcopy(module.model)
    fit(module, [], loaders())
    return pretrained, module.model


def measured(pretrained: torch.nn.Module, model: torch.nn.Module, probe: Probe, draws: int = 3) -> Null:
    reference = Reference.record(Probe.collect(BATCH, 24), pretrained, LayerStack.find(pretrained), MEASURES)
    weights = PretrainedWeights.of(pretrained)
    return null_profiles(model, weights, probe, reference, MEASURES, draws=draws)


def test_the_noise_has_the_size_of_each_change_and_random_directions() -> None:
    pretrained, model = tuned()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, np.ndarray]] = []

    def spy(noisy: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
        seen.append({name: p.detach().double().numpy().copy() for name, p in noisy.named_parameters()})
        noisy(**batch)

    null = measured(pretrained, model, Probe.collect(BATCH, 24, forward=spy))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the weights are put back"
    assert len(null.draws) == len(null.matched) == 3
    assert null.draws[0] != null.draws[1]
    assert null.scale is not None
    clean = {name: p.detach().double().numpy() for name, p in pretrained.named_parameters()}
    assert any("embd" in name or "wte" in name for name in clean), "parameters outside the stack are moved too"
    for name, start in clean.items():
        net = np.linalg.norm(before[name].double().numpy() - start)
        own, matched = seen[1][name] - start, seen[-3][name] - start  # both of seed 0
        assert np.linalg.norm(own) == pytest.approx(net, rel=1e-3, abs=1e-7)
        assert np.linalg.norm(matched) == pytest.approx(null.scale * net, rel=1e-3, abs=1e-7)
        if start.size > 200 and net > 0:
            cosine = (own * (before[name].double().numpy() - start)).sum() / net**2
            assert abs(cosine) < 5 / np.sqrt(start.size)
            assert (own * matched).sum() == pytest.approx(np.linalg.norm(own) * np.linalg.norm(matched), rel=1e-3)


def test_the_matched_null_changes_as_much_as_training() -> None:
    pretrained, model = tuned()
    null = measured(pretrained, model, Probe.collect(BATCH, 24))
    reference = Reference.record(Probe.collect(BATCH, 24), pretrained, LayerStack.find(pretrained), MEASURES)
    recording = Probe.collect(BATCH, 24).record(model, LayerStack.find(model))
    target = reference.profiles(recording, MEASURES, 0, 0)["cka"].mean
    assert null.matched[0]["cka"].mean == pytest.approx(target, rel=MATCHED - 1)
    assert null.matched[0]["cka"].slope_interval is None, "intervals of draws are not used"


def test_frozen_tensors_stay_and_an_unchanged_model_has_no_matched_null() -> None:
    pretrained, _ = tuned()
    null = measured(pretrained, copy.deepcopy(pretrained), Probe.collect(BATCH, 24))
    assert null.message == "nothing changed"
    assert null.matched == ()
    assert null.draws[0]["cka"].change == (0.0,) * 4


@pytest.mark.parametrize("saturation", [1.0, 0.2])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("target", [1e-8, 1e-3, 0.1, 0.19])
@pytest.mark.parametrize("first", [1e-10, 1e-4, 0.05])
def test_the_scale_is_found_within_six_trials(saturation: float, power: float, target: float, first: float) -> None:
    """Change that grows as a power of the noise and saturates."""
    trials: list[float] = []

    def mean_change(scale: float) -> float:
        trials.append(scale)
        small = first * scale**power
        return saturation * -math.expm1(-small / saturation)

    scale = _matching_scale(mean_change, target, mean_change(1.0))
    assert len(trials) <= SEARCH + 1
    if target < 0.9 * saturation:
        assert scale is not None
        assert mean_change(scale) == pytest.approx(target, rel=MATCHED - 1 + 1e-9)


def test_a_change_that_no_noise_reaches_is_said() -> None:
    assert _matching_scale(lambda s: 0.3 * -math.expm1(-s), 0.5, 0.1) is None


def test_weights_of_another_model_are_refused() -> None:
    pretrained, model = tuned()
    other = PretrainedWeights.of(TinyLM(layers=3).model)
    reference = Reference.record(Probe.collect(BATCH, 24), pretrained, LayerStack.find(pretrained), MEASURES)
    with pytest.raises(ValueError, match="has no pretrained weights of its shape: take them from the same model"):
        null_profiles(model, other, Probe.collect(BATCH, 24), reference, MEASURES)
    with pytest.raises(ValueError, match="draws=0: a null needs at least 1"):
        null_profiles(model, PretrainedWeights.of(pretrained), Probe.collect(BATCH, 24), reference, MEASURES, draws=0)


def test_net_change_agrees_with_numpy() -> None:
    pretrained, model = tuned()
    found = PretrainedWeights.of(pretrained).net_change(model, LayerStack.find(model))
    for value, a, b in zip(found, *(LayerStack.find(m).parameters() for m in (pretrained, model)), strict=True):
        start, end = (np.concatenate([p.detach().double().numpy().ravel() for p in layer]) for layer in (a, b))
        assert value == pytest.approx(np.linalg.norm(end - start) / np.linalg.norm(start), rel=1e-6)


def test_a_callback_measures_the_null_and_net_changes(tmp_path: Path) -> None:
    plain, watched = (seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=1e-2))) for _ in range(2))
    fit(plain, [DepthProfile(BATCH)], loaders())
    watch = DepthProfile(BATCH, pretrained="cpu", null_draws=2)
    fit(watched, [watch], loaders(), logger=CSVLogger(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    (run,) = read_runs(tmp_path)
    assert {len(draws) for draws in (*run.null.values(), *run.matched_null.values())} == {2}
    assert run.record("matched_null_profiles").settings["scale"] > 0  # type: ignore[union-attr]
    expected = watch.recorder.weights.net_change(watched, LayerStack.find(watched))  # type: ignore[union-attr]
    rows = run.record("DepthProfile").rows  # type: ignore[union-attr]
    assert rows[-1]["net_change"] == pytest.approx(expected)
    assert DRAWS >= 8


def resumed(module: pl.LightningModule, watch: DepthProfile, checkpoint: Path) -> None:
    trainer = pl.Trainer(
        max_steps=4, callbacks=[watch], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, *loaders(), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:.*ended before the epoch.*")
def test_the_weights_are_taken_before_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    def module() -> TinyLM:
        return seeded(lambda: TinyLM(lambda p: torch.optim.AdamW(p, lr=1e-2)))

    first = module()
    start = {name: p.detach().clone() for name, p in first.named_parameters()}
    trainer = fit(first, [DepthProfile(BATCH, pretrained="cpu", null_draws=1)], loaders(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    watch = DepthProfile(BATCH, pretrained="cpu", null_draws=1)
    resumed(module(), watch, tmp_path / "a.ckpt")
    assert watch.recorder.weights is not None
    assert all(torch.equal(watch.recorder.weights.tensors[name], tensor) for name, tensor in start.items())

    def other() -> TinyLM:
        torch.manual_seed(5)
        return TinyLM(lambda p: torch.optim.AdamW(p, lr=1e-2))

    with pytest.raises(ValueError, match="so they are not the pretrained ones: build the module from the same"):
        resumed(other(), DepthProfile(BATCH, pretrained="cpu"), tmp_path / "a.ckpt")


def test_another_store_is_refused() -> None:
    with pytest.raises(ValueError, match="pretrained='disk' is unknown: use 'cpu', PretrainedWeights or None"):
        DepthProfile(pretrained="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null_draws=0: a null needs at least 1"):
        DepthProfile(null_draws=0)
