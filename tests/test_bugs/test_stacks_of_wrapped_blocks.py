"""Blocks that a wrapper had given classes of their own were no stack, or a part of one, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from test_stack import Block, blocks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from depthcb import LayerStack


class Quantised(nn.Linear):
    """As quantisation libraries replace linear layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.round())


def normed(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            parametrizations.spectral_norm(part)
    return module


def discriminator() -> nn.Module:
    convolutions = [parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)]
    return nn.Sequential(*[m for c in convolutions for m in (c, nn.LeakyReLU(0.2))])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (discriminator, "0 2 4 6"),
        (lambda: nn.Sequential(*[(Quantised if i in (1, 2) else nn.Linear)(8, 8) for i in range(5)]), "0 1 2 3 4"),
        (lambda: nn.Sequential(*[normed(b) if i < 2 else b for i, b in enumerate(blocks(4))]), "0 1 2 3"),
        (lambda: nn.Sequential(*[normed(nn.Linear(8, 8)) if i < 2 else nn.Linear(8, 8) for i in range(4)]), "0 1 2 3"),
    ],
)
def test_wrapped_layers_count_as_what_they_were(make: Callable[[], nn.Module], names: str) -> None:
    assert list(LayerStack.find(make()).names) == names.split()


@pytest.mark.parametrize("sharded", [range(2, 15), range(16), [0]])
def test_sharded_blocks_count_as_what_they_were(sharded: range | list[int]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"layers": nn.ModuleList(blocks(16))})
        mesh = init_device_mesh("cpu", (1,))
        for i in sharded:
            fully_shard(model["layers"][i], mesh=mesh)  # type: ignore[index]
        assert LayerStack.find(model).names == tuple(f"layers.{i}" for i in range(16))
    finally:
        dist.destroy_process_group()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


class Hides(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("make", "found", "left"),
    [
        (lambda: nn.ModuleList([*blocks(15), Other()]), "15 of 16", "layers.15"),
        (lambda: nn.ModuleList([Other(), *blocks(13), nn.Linear(8, 8)]), "13 of 15", "layers.0, layers.14"),
        (lambda: nn.Sequential(*map(Hides, blocks(2)), *blocks(14)), "14 of 16", "layers.0.module, layers.1.module"),
        (lambda: nn.ModuleList([*map(Hides, blocks(14)), *blocks(2)]), "14 of 16", "layers.14, layers.15"),
    ],
)
def test_a_partial_stack_is_said(make: Callable[[], nn.Module], found: str, left: str) -> None:
    model = nn.ModuleDict({"layers": make()})
    with pytest.warns(UserWarning, match=f"are {found} blocks; left out: {left}. Name all of them, or these"):
        stack = LayerStack.find(model)
    with warnings.catch_warnings():  # both remedies
        warnings.simplefilter("error")
        assert LayerStack.find(model, list(stack.names)) == stack
        assert len(LayerStack.find(model, "layers.*")) > len(stack) or "module" in left


def test_a_stem_and_a_head_are_no_blocks() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 4), nn.LayerNorm(8))
    model = nn.Sequential(stem, *blocks(3), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2))
    assert LayerStack.find(model).names == ("1", "2", "3")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["layers.3", "layers.1"], "Layer 'layers.1' is listed after 'layers.3'"),
        (["layers.0", "layers.10", "layers.9"], "Layer 'layers.9' is listed after 'layers.10'"),
        (["layers.0", "layers.9", "layers.10"], None),
        (["layers.3", "more.1.0", "more.1.1"], None),
        (["more.1.1", "more.0.0"], "Layer 'more.0.0' is listed after 'more.1.1'"),
    ],
)
def test_names_out_of_depth_order_are_said(names: list[str], said: str | None) -> None:
    more = nn.ModuleList(nn.ModuleList(blocks(2)) for _ in range(2))
    model = nn.ModuleDict({"more": more, "layers": nn.ModuleList(Block() for _ in range(11))})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert LayerStack.find(model, names).names == tuple(names)
    assert [str(w.message).partition(":")[0] for w in found] == ([said] if said else [])
