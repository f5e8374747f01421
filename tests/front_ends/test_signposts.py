"""A callback handed to the wrong framework names the right class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
from front_ends.same import batches, model, optimizer, probe
from lightning.fabric import Fabric

import depthcb
import depthcb.fabric as fabric_front_end

LIGHTNING: dict[str, Any] = {
    "DepthProfile": lambda: depthcb.DepthProfile(probe()),
    "EqualStep": depthcb.EqualStep,
    "UpdateRatioMonitor": depthcb.UpdateRatioMonitor,
}
FABRIC: dict[str, Any] = {
    "DepthProfile": lambda: fabric_front_end.DepthProfile(probe()),
    "EqualStep": fabric_front_end.EqualStep,
    "UpdateRatioMonitor": fabric_front_end.UpdateRatioMonitor,
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_a_callback_of_lightning_in_fabric(name: str) -> None:
    fabric, net = Fabric(accelerator="cpu", callbacks=[LIGHTNING[name]()]), model()
    told = rf"^depthcb\.{name} is not for Fabric: use depthcb\.fabric\.{name} there\.$"
    with pytest.raises(TypeError, match=told):
        fabric.setup(net, optimizer(net))
    fabric, net = Fabric(accelerator="cpu", callbacks=[LIGHTNING[name]()]), model()
    wrapped, sgd = fabric.setup_module(net), fabric.setup_optimizers(optimizer(net))
    fabric.backward(wrapped(**next(iter(batches())))["loss"])
    with pytest.raises(TypeError, match=told):
        sgd.step()


@pytest.mark.parametrize("trainer", [pl.Trainer, pytorch_lightning.Trainer])
@pytest.mark.parametrize("name", FABRIC)
def test_a_callback_of_fabric_in_lightning(name: str, trainer: Any) -> None:
    told = rf"^depthcb\.fabric\.{name} is not for Lightning's Trainer: use depthcb\.{name} there\.$"
    with pytest.raises(TypeError, match=told):
        trainer(callbacks=[FABRIC[name]()], logger=False, accelerator="cpu")


def test_a_callback_of_ones_own_is_named() -> None:
    class Mine(depthcb.OptimizerStepCallback):
        def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...

    with pytest.raises(TypeError, match="Mine is not for Fabric, which calls other hooks"):
        Mine().on_after_optimizer_step(strategy=None, optimizer=None)  # type: ignore[call-arg]

    class Sub(depthcb.EqualStep):
        pass

    with pytest.raises(TypeError, match=r"depthcb\.EqualStep is not for Fabric: use depthcb\.fabric\.EqualStep"):
        Sub().on_after_setup()


def test_a_front_end_is_short_and_only_it_imports_its_framework() -> None:
    root = Path(depthcb.__file__).parent
    for file in ("loop", "fabric", "transformers", "fits", "attached", "recording", "signposts"):
        lines = (root / f"{file}.py").read_text(encoding="utf-8").splitlines()
        packages = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
        own = {"transformers"} if file == "transformers" else set()
        assert packages & {"lightning", "transformers", "accelerate", "trl", "peft"} == own, file
        if file in ("loop", "fabric", "transformers"):
            assert len(lines) < 150
