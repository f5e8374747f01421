"""The front end for plain PyTorch loops: one ``with`` block for what watches or controls the training in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from depthcb.attached import Control, EqualSteps, Profiling, Ratios, Watch
from depthcb.engine import ProfileRecorder, StepEqualizer, StepRatioMeter
from depthcb.fits import Setting
from depthcb.plain import SECRETS

Optimizers = Optimizer | Sequence[Optimizer]


def watch(
    model: nn.Module,
    optimizer: Optimizers = (),
    probe: Any = None,
    *,
    folder: str | Path | None = None,
    sinks: Sequence[Any] = (),
    every: int = 50,
    layers: list[str] | str | None = None,
    seed: object = None,
    hparams: Mapping[str, Any] | None = None,
    redact: Collection[str] = SECRETS,
    **options: Any,
) -> Watch:
    """Watches a plain training loop: profiles where you call ``measure``, and the step ratios of every n-th step.

    The reference is recorded on entering the ``with`` block. Nothing in the training changes. What is attached later
    acts later in each step, so a `watch` inside the block of `equal_step` sees the controlled steps.

    Args:
        model: The model, at its pretrained weights; also one in DistributedDataParallel, or sharded by FSDP2.
        optimizer: All optimizers of the model, for the step ratios; none for profiles alone.
        probe: Inputs to measure on: a batch, a list of batches, a Dataset or a DataLoader.
        folder: The run's folder, for ``depthcb report`` and ``depthcb show``; None for the one of another block around
            the same model, or for no record.
        sinks: Receive each row of numbers: W&B runs, TensorBoard ``SummaryWriter``s, or callables ``(row, step)``.
        every: Log the ratios of every n-th step.
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        seed: The seed of the run, without which it cannot be paired with another one.
        hparams: Other settings that two runs must share to be compared as a pair.
        redact: Words in the names of settings whose values are kept out of the record, see `depthcb.DepthProfile`.
        options: Further arguments of `depthcb.engine.ProfileRecorder`.

    Raises:
        ValueError: An argument is invalid; on entering, the layers cannot be found, or the model is not supported.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer, torch.randn(32, 6), measures=["cosine"]) as w:
        ...     model(torch.ones(2, 6)).square().sum().backward()
        ...     optimizer.step()
        ...     profile = w.measure()["cosine"]
        >>> profile.step, len(profile.change)
        (0, 3)
    """
    setting = _setting(model, optimizer, folder, sinks, seed, hparams)
    profiling = Profiling(ProfileRecorder(probe, layers, **options), redact)
    ratios = Ratios(StepRatioMeter(layers, every=every), redact) if setting.optimizers else None
    return Watch(setting, profiling, ratios)


def equal_step(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    folder: str | Path | None = None,
    sinks: Sequence[Any] = (),
    every: int = 50,
    layers: list[str] | str | None = None,
    redact: Collection[str] = SECRETS,
    **options: Any,
) -> EqualSteps:
    """Equalizes ||dW|| / ||W|| over the layers in every step of a plain training loop [paper]; see `depthcb.EqualStep`.

    Args:
        model: The model; also one in DistributedDataParallel, or sharded by FSDP2.
        optimizer: All optimizers of the model.
        folder: See `watch`.
        sinks: See `watch`.
        every: Log every n-th step.
        layers: The layers, as accepted by `LayerStack.find`; None searches for them.
        redact: See `watch`.
        options: Further arguments of `depthcb.engine.StepEqualizer`, such as ``target``.

    Raises:
        ValueError: An argument is invalid; on entering, the target cannot be imposed or the model is not supported; at
            the end, the weights changed without a step of an optimizer.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with equal_step(model, optimizer, every=1) as control:
        ...     model(torch.ones(2, 6)).square().sum().backward()
        ...     optimizer.step()
        >>> a, b, c = control.equalizer.mean_realised.values()
        >>> abs(a / b - 1) < 1e-4 and abs(b / c - 1) < 1e-4
        True
    """
    control = Control(StepEqualizer(layers, every=every, **options), redact)
    return EqualSteps(_setting(model, optimizer, folder, sinks), [control])


def _setting(
    model: nn.Module,
    optimizer: Optimizers,
    folder: str | Path | None,
    sinks: Sequence[Any],
    seed: object = None,
    hparams: Mapping[str, Any] | None = None,
) -> Setting:
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    described = {} if hparams is None else {"hparams": dict(hparams)}
    return Setting(cast(nn.Module, inner), optimizers, folder, sinks, seed, described)
