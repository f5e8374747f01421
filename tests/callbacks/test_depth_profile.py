"""DepthProfile in real fits, with its values recomputed from the activations in numpy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.stats
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from regression import OneChild, Regression, numbers
from support import LENGTH, TinyLM, fit, loaders, logged, seeded, texts
from torch import Tensor, nn
from torch.utils.data import DataLoader

from depthcb import DepthProfile, EqualStep, LayerStack, Profile, UpdateRatioMonitor, depth_profile

# Tiny models have few directions, and some tests train in eval mode or without validation on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 5 directions.*",
    "ignore:.*in eval mode at the start.*",
    "ignore:.*have no `val_dataloader`.*",
    "ignore:The dirpath has changed.*",
)


def activations(module: TinyLM, batch: dict[str, Tensor]) -> list[np.ndarray]:
    """Mean over positions 1.. of every block's output, by hand."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    with torch.no_grad():
        states = module.model.transformer(**batch, output_hidden_states=True).hidden_states
        blocks = [*states[1:-1], None]
        found: list[Tensor] = []
        handle = module.model.transformer.h[-1].register_forward_hook(
            lambda m, i, out: found.append(out if isinstance(out, Tensor) else out[0])
        )  # the last hidden state is after the final norm
        module.model.transformer(**batch)
        handle.remove()
        blocks[-1] = found[0]
    for m, flag in flags:
        m.training = flag
    return [b[:, 1:].double().mean(dim=1).numpy() for b in blocks]


def change(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased 1 - CKA by the ratio of unbiased HSICs."""

    def u(a: np.ndarray) -> np.ndarray:
        k = a @ a.T
        np.fill_diagonal(k, 0)
        n, r = len(k), k.sum(0)
        k = k - (r[:, None] + r[None]) / (n - 2) + r.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        return k

    a, b = u(x), u(y)
    return float(1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


class Snapshots(pl.Callback):
    """Records the probe activations at train start and at each validation, independently of DepthProfile."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.seen: list[list[np.ndarray]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(activations(pl_module, self.batch))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(activations(pl_module, self.batch))


def test_the_curve_is_the_change_of_the_activations(tmp_path: Any) -> None:
    batch = {"input_ids": torch.stack([t["input_ids"] for t in texts(16, seed=1)])}
    watch, snapshots, logger = DepthProfile(), Snapshots(batch), CSVLogger(tmp_path, name="", version="")
    fit(seeded(TinyLM), [watch, snapshots], logger=logger, val_check_interval=2, max_steps=8, max_epochs=2)
    assert len(watch.profiles) == len(snapshots.seen) - 1 == 4
    rows = [row for row in logged(logger) if "depth/cka/slope" in row]
    assert [row["step"] for row in rows] == [p.step for p in watch.profiles]
    assert all("val/loss" in row for row in rows), "the profile is in the row of its validation"
    for profile, now, row in zip(watch.profiles, snapshots.seen[1:], rows, strict=True):
        expected = [change(a, b) for a, b in zip(snapshots.seen[0], now, strict=True)]
        assert profile.change == pytest.approx(expected, rel=1e-3)
        assert profile.slope == pytest.approx(scipy.stats.linregress(profile.depth, expected).slope, rel=1e-2)
        assert [row[f"depth/cka/L{i:02d}"] for i in range(4)] == pytest.approx(profile.change, rel=1e-6)
        for key in ("slope", "relative_slope", "width", "centre", "mean", "spearman"):
            assert row[f"depth/cka/{key}"] == pytest.approx(getattr(profile, key), rel=1e-6)
        assert profile.slope_interval == pytest.approx((row["depth/cka/slope_low"], row["depth/cka/slope_high"]))
        assert profile.slope_interval[0] < profile.slope < profile.slope_interval[1]
    assert (watch.profiles[0].rows, watch.profiles[2].epoch) == (16, 1)
    assert watch.profiles[0].layer_names == tuple(f"model.transformer.h.{i}" for i in range(4))
    assert watch.profiles_by_measure["cka_normalized"][0].measure == "cka_normalized"
    assert watch.reference is not None
    assert watch.reference.causal


def test_unchanged_weights_give_exactly_zero() -> None:
    watch = DepthProfile(measures=("cka", "cka_normalized", "cosine", "relative_l2"))
    fit(seeded(lambda: TinyLM(lambda p: torch.optim.SGD(p, lr=0.0))), [watch])
    for profiles in watch.profiles_by_measure.values():
        assert profiles[-1].change == (0.0,) * 4
        assert profiles[-1].width is None


def test_every_measure_and_kind_of_row() -> None:
    for rows in ("mean", "tokens", "last"):
        watch = DepthProfile(measures=("procrustes", "cka", "cosine", "relative_l2"), rows=rows, probe_rows=12)
        fit(seeded(TinyLM), [watch])
        assert watch.profiles[-1].measure == "procrustes"
        for profiles in watch.profiles_by_measure.values():
            assert min(profiles[-1].change) > 0
            assert profiles[-1].rows == 12
            assert profiles[-1].slope_interval is not None


def test_the_interval_needs_eight_examples() -> None:
    watch = DepthProfile(probe_rows=7)
    fit(seeded(TinyLM), [watch])
    assert watch.profiles[-1].slope_interval is watch.profiles[-1].band is None


def test_every_nth_validation_and_not_the_sanity_check() -> None:
    watch = DepthProfile(every_n_validations=2)
    fit(seeded(TinyLM), [watch], val_check_interval=1, num_sanity_val_steps=2)
    assert [p.step for p in watch.profiles] == [1, 3]


def test_a_refit_keeps_its_reference_until_reset() -> None:
    module, watch = seeded(TinyLM), DepthProfile()
    pretrained = copy.deepcopy(module)
    fit(module, [watch])
    fit(module, [watch])
    first, second = watch.profiles
    assert second.mean > first.mean
    batch = {"input_ids": torch.stack([t["input_ids"] for t in texts(16, seed=1)])}
    apart = depth_profile(pretrained, module, batch, forward=lambda m, b: m.model(**b))["cka"]
    assert second.change == pytest.approx(apart.change, rel=1e-6)
    assert second.slope_interval == pytest.approx(apart.slope_interval, rel=1e-6)
    watch.reset()
    fit(module, [watch])
    assert len(watch.profiles) == 1
    assert watch.profiles[0].mean < second.mean


def test_a_resumed_run_compares_with_the_pretrained_model(tmp_path: Any) -> None:
    def run(folder: str, steps: int, ckpt: str | None = None) -> tuple[DepthProfile, pl.LightningModule]:
        watch, module = DepthProfile(), seeded(TinyLM)
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        pl.seed_everything(7, verbose=False)
        trainer = pl.Trainer(
            max_epochs=steps, callbacks=[watch, keep], logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, num_sanity_val_steps=2,
        )  # fmt: skip
        data = DataLoader(texts(32), batch_size=8), loaders()[1]
        trainer.fit(module.eval(), *data, ckpt_path=ckpt, weights_only=True)
        return watch, module

    whole, _ = run("whole", 3)
    run("half", 2)
    resumed, _ = run("rest", 3, str(tmp_path / "half" / "last.ckpt"))
    assert [p.step for p in resumed.profiles] == [p.step for p in whole.profiles]
    for a, b in zip(resumed.profiles, whole.profiles, strict=True):
        assert a.change == pytest.approx(b.change, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")
def test_a_resume_never_gets_another_reference_in_silence(tmp_path: Any) -> None:
    ckpt = tmp_path / "last.ckpt"
    trainer = fit(seeded(TinyLM), [DepthProfile()])
    trainer.save_checkpoint(ckpt)

    def resume(*callbacks: pl.Callback, module: pl.LightningModule | None = None) -> None:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = pl.Trainer(max_steps=6, enable_checkpointing=False, callbacks=list(callbacks), **options)
        trainer.fit(module or seeded(TinyLM), *loaders(), ckpt_path=ckpt)

    with pytest.raises(ValueError, match="recorded on another probe"):
        resume(DepthProfile(probe=texts(16, seed=5)[0] | {"input_ids": torch.ones(8, LENGTH, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"has layers .*h\.0' to .*h\.3' \(4\), this model .*\(2\)"):
        resume(DepthProfile(layers=["model.transformer.h.0", "model.transformer.h.3"]))
    with pytest.raises(ValueError, match="recorded without rows"):
        resume(DepthProfile(measures=("cosine",)))
    with pytest.raises(ValueError, match="contains no reference for this callback"):
        resume(DepthProfile(name="other"))


def test_two_profiles_side_by_side_and_metrics_to_monitor(tmp_path: Any) -> None:
    watches = [DepthProfile(), DepthProfile(rows="last", name="last_token")]
    keep = ModelCheckpoint(tmp_path, monitor="depth/cka/slope", mode="max")
    stop = EarlyStopping("last_token/cka/slope", mode="max", check_on_train_epoch_end=False)
    trainer = fit(seeded(TinyLM), [*watches, keep, stop], enable_checkpointing=True)
    assert float(keep.best_model_score) == pytest.approx(watches[0].profiles[-1].slope, rel=1e-6)
    assert float(trainer.callback_metrics["last_token/cka/slope"]) == pytest.approx(watches[1].profiles[-1].slope)
    assert watches[0].profiles[-1].change != watches[1].profiles[-1].change


def test_a_module_without_a_forward_of_its_own_is_fed_through_its_child() -> None:
    watch = DepthProfile()
    fit(Regression(OneChild()), [watch], numbers(), max_epochs=1, max_steps=-1)
    assert watch.profiles[-1].mean > 0


class Talks(Regression):
    """Logs in forward(), as some modules do."""

    def forward(self, x: Tensor) -> Tensor:
        self.log("calls", 1.0, reduce_fx="sum")
        return self.model(x)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)


def test_a_forward_that_logs_is_muted_while_the_probe_goes_through() -> None:
    trainers = [
        fit(Talks(OneChild()), callbacks, numbers(), max_epochs=1, max_steps=-1) for callbacks in ([], [DepthProfile()])
    ]
    calls = [t.callback_metrics["calls"].item() for t in trainers]
    assert calls[0] == calls[1] > 0
    assert not {"log", "log_dict"} & set(vars(trainers[1].lightning_module))


@pytest.mark.filterwarnings("ignore:.*fewer than 5 directions")
def test_half_precision_weights_are_said_to_be_probed_as_they_are() -> None:
    with pytest.warns(UserWarning, match=r"weights are torch\.bfloat16, and the probe runs in that"):
        fit(Regression(OneChild()), [DepthProfile()], numbers(), max_epochs=1, max_steps=-1, precision="bf16-true")


def test_half_precision_inputs_are_those_numbers_in_fp32() -> None:
    batch, seen = torch.randn(16, 4, generator=torch.Generator().manual_seed(2)), []
    for dtype in (torch.float16, torch.bfloat16):
        for probe in (batch.to(dtype), batch.to(dtype).float()):
            watch = DepthProfile(probe=probe)
            pl.seed_everything(0, verbose=False)
            fit(Regression(OneChild()), [watch], numbers(), max_epochs=1, max_steps=-1)
            seen.append(watch.profiles[-1].change)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert min(seen[0]) > 0


@dataclass
class Output:
    hidden: Tensor


class Wraps(nn.Module):
    """A linear layer whose input and output are wrapped tensors."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x: Any) -> Any:
        return self.wrap(self.linear(opened(x)))


class Wrapped(OneChild):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Wraps(wrap) for _ in range(3)))


class OpensItsOutput(Regression):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (opened(self.model(batch)) ** 2).mean()


def opened(x: Any) -> Any:
    return (
        x.hidden
        if isinstance(x, Output)
        else x["hidden"]
        if isinstance(x, dict)
        else x[0]
        if isinstance(x, tuple)
        else x
    )


@pytest.mark.parametrize(
    "wrap", [lambda t: (t, None), lambda t: {"hidden": t}, Output], ids=["tuple", "dict", "dataclass"]
)
def test_models_and_layers_that_wrap_their_output_train_like_those_that_do_not(wrap: Any) -> None:
    seen = []
    for how in (lambda t: t, wrap):
        control, monitor, watch = EqualStep(), UpdateRatioMonitor(), DepthProfile()
        pl.seed_everything(0, verbose=False)
        fit(OpensItsOutput(Wrapped(how)), [control, monitor, watch], numbers(), max_epochs=1, max_steps=-1)
        seen.append((watch.profiles[-1].change, control.mean_realised.values(), monitor.mean.values()))
    assert seen[0] == seen[1]
    assert min(seen[0][0]) > 0


class BreaksLater(Regression):
    """One layer becomes NaN, or constant over rows, before the second validation."""

    def __init__(self, weight: float, bias: float) -> None:
        super().__init__(OneChild())
        self.weight, self.bias = weight, bias

    def on_validation_start(self) -> None:
        if self.current_epoch == 0:
            return
        with torch.no_grad():
            self.model.blocks[1].weight.fill_(self.weight)  # type: ignore[index, union-attr]
            self.model.blocks[1].bias.fill_(self.bias)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (1.0, float("nan"), r"Layer 'model\.blocks\.1' has NaN"),
        (0.0, 1.0, r"Layer 'model\.blocks\.1', measure 'cka': the rows are all identical"),
    ],
)
def test_a_layer_that_breaks_in_training_is_named_and_the_profiles_stay(
    weight: float, bias: float, message: str
) -> None:
    watch, module = DepthProfile(), BreaksLater(weight, bias)
    with pytest.raises(ValueError, match=message):
        fit(module, [watch], numbers(), max_epochs=3, max_steps=-1)
    assert len(watch.profiles) == 1
    assert not any(m._forward_hooks for m in module.modules())


def test_low_effective_rank_is_named() -> None:
    with pytest.warns(UserWarning, match=r"fewer than 5 directions .* in model\.blocks\.0 \("):
        fit(Regression(OneChild()), [DepthProfile()], numbers(), max_epochs=1, max_steps=-1)


def test_profiles_are_written_and_read() -> None:
    watch = DepthProfile(name="depth")
    fit(seeded(TinyLM), [watch, EqualStep()])
    again = DepthProfile(name="depth")
    again.load_state_dict(watch.state_dict())
    assert again.profiles == watch.profiles
    assert Profile.from_json(watch.profiles[0].to_json()) == watch.profiles[0]
    assert LayerStack.find(seeded(TinyLM)).names == again.profiles[0].layer_names
