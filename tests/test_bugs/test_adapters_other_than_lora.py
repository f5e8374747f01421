"""The monitor only supported LoRA: it ignored DoRA's magnitude, failed on LoHa and LoKr, and measured IA3's own tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from depthcb.adapters import adapted_modules, effective_weights


def adapted(config: PeftConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A linear layer with non-zero adapters, and its base weight."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)).to(dtype), config)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    (module,) = adapted_modules(model)
    return module.eval(), module.get_base_layer().weight.detach().clone()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["0"]),
        LoraConfig(r=2, target_modules=["0"], use_dora=True),
        LoHaConfig(r=2, target_modules=["0"]),
        LoKrConfig(r=2, target_modules=["0"]),
        OFTConfig(oft_block_size=4, target_modules=["0"]),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=["lora", "dora", "loha", "lokr", "oft", "ia3"],
)
@torch.no_grad()
def test_the_effective_weight_is_what_the_module_multiplies_with(config: PeftConfig) -> None:
    module, base = adapted(config)
    # IA3 also scales the bias, so the output for 0 is not just the bias.
    multiplies = (module(torch.eye(8)) - module(torch.zeros(8, 8))).T
    (found,) = effective_weights(module)
    torch.testing.assert_close(found, multiplies, rtol=1e-4, atol=1e-5)
    assert (found - base).norm() > 0.1 * base.norm()
    assert torch.equal(module.get_base_layer().weight, base), "measuring changed the weight"


@torch.no_grad()
def test_a_small_update_of_half_precision_weights_is_not_rounded_away() -> None:
    module, base = adapted(LoraConfig(r=2, target_modules=["0"]), torch.bfloat16)
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    b.data *= 1e-4
    (found,) = effective_weights(module)
    change = found.double() - base.double()
    expected = module.scaling["default"] * b.double() @ a.double()
    assert float((change - expected).norm() / expected.norm()) < 0.05


def test_what_cannot_be_measured_is_refused_before_training() -> None:
    module, base = adapted(LoraConfig(r=2, target_modules=["0"]))
    module.get_base_layer().weight = nn.Parameter(base.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of Linear is quantised.*unquantised"):
        effective_weights(module)
