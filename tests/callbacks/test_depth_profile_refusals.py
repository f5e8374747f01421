"""What DepthProfile refuses, and what it warns about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from regression import OneChild, Regression, numbers
from support import fit
from torch import nn

from depthcb import DepthProfile

# Tiny models have few directions, and some tests train in eval mode or without validation on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 5 directions.*",
    "ignore:.*in eval mode at the start.*",
    "ignore:.*have no `val_dataloader`.*",
    "ignore:The dirpath has changed.*",
)


class Batches:
    """Something that Lightning takes for a loader."""

    def __iter__(self) -> Any:
        return iter(torch.randn(2, 8, 4))

    def __len__(self) -> int:
        return 2


def broken() -> nn.Module:
    model = OneChild()
    with torch.no_grad():
        model.blocks[1].bias[0] = float("nan")
    return model


def one_layer() -> nn.Module:
    model = OneChild()
    model.blocks = model.blocks[:1]
    return model


@pytest.mark.parametrize(
    ("watch", "module", "data", "message"),
    [
        (lambda: DepthProfile(), OneChild, (numbers()[0],), "no validation loader .* and no probe"),
        (lambda: DepthProfile(), OneChild, (numbers()[0], Batches()), "the validation data is a Batches, and iterating it"),
        (lambda: DepthProfile(probe=torch.randn(3, 4)), OneChild, None, "gives 3 rows: a comparison needs at least 4"),
        (lambda: DepthProfile(layers="model.layers"), OneChild, None, r"'model\.layers' matches no module of Regression"),
        (lambda: DepthProfile(layers=["model.blocks.0"]), OneChild, None, "at least 2 layers"),
        (lambda: DepthProfile(), one_layer, None, "No list of layers of one class found"),
        (lambda: DepthProfile(measures=("cca",)), OneChild, None, r"'cca'.*'cka'"),
        (lambda: DepthProfile(rows="max"), OneChild, None, "rows='max' is unknown"),  # type: ignore[arg-type]
        (lambda: DepthProfile(every_n_validations=0), OneChild, None, "every_n_validations=0"),
        (lambda: DepthProfile(forward=lambda m, b: m.model.blocks[0](b)), OneChild, None, r"never reached layer model\.blocks\.1"),
        (lambda: DepthProfile(probe={"pixels": torch.randn(8, 4)}), OneChild, None, "cannot be called on a probe batch of type dict"),
        (lambda: DepthProfile(), lambda: OneChild(constant=True), None, r"'model\.blocks\.0' has the same activations"),
        (lambda: DepthProfile(), broken, None, r"Layer 'model\.blocks\.1' has NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_training(watch: Any, module: Any, data: Any, message: str) -> None:
    regression = Regression(module())
    start = [p.clone() for p in regression.parameters()]
    with pytest.raises(ValueError, match=message):
        fit(regression, [watch()], data or numbers(), max_epochs=1, max_steps=-1)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(start, regression.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_validation_that_is_switched_off_is_said() -> None:
    """`limit_val_batches=0` hides the loader from the callback, which is the same as no validation."""
    with pytest.raises(ValueError, match=r"no validation loader \(or limit_val_batches=0\) and no probe"):
        fit(Regression(OneChild()), [DepthProfile()], numbers(), max_steps=1, limit_val_batches=0)
    watch = DepthProfile(probe=torch.randn(16, 4))
    with pytest.warns(UserWarning, match="never validates"):
        fit(Regression(OneChild()), [watch], numbers(), max_steps=1, limit_val_batches=0)


def test_a_probe_without_validation_is_said_to_measure_nothing() -> None:
    with pytest.warns(UserWarning, match="never validates"):
        fit(Regression(OneChild()), [DepthProfile(probe=torch.randn(16, 4))], numbers()[:1], max_epochs=1, max_steps=-1)
