"""Causality is found on the batch as it is: no token edited, no example cut."""

from __future__ import annotations

import pytest
import torch
from probe_models import WIDTH, Mixer, record
from torch import Tensor, nn

from depthcb import DepthProfile, LayerStack, depth_profile
from depthcb.probe import Probe

IMAGE = 7


class SeesImages(nn.Module):
    """Puts one image at each image token; all images of a batch lie in one flat tensor."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.image = nn.Embedding(20, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Mixer(causal) for _ in range(3))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        places = input_ids == IMAGE
        if int(places.sum()) != len(pixel_values):
            raise ValueError(f"{int(places.sum())} image tokens and {len(pixel_values)} images do not match")
        x = self.embedding(input_ids).masked_scatter(places[..., None], self.image(pixel_values))
        for block in self.blocks:
            x = block(x, torch.ones_like(input_ids))
        return x


def images_and_text() -> dict[str, Tensor]:
    ids = torch.randint(8, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 1], ids[::2, 4] = IMAGE, IMAGE  # one image or two
    pixels = torch.randn(int((ids == IMAGE).sum()), 4, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels}


@pytest.mark.parametrize("causal", [True, False])
def test_batches_that_must_stay_whole(causal: bool) -> None:
    model, batch = SeesImages(causal), images_and_text()
    found = record(model, batch)
    assert found.causal == causal
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(found.rows[2], output[:, 1:].mean(dim=1) if causal else output.mean(dim=1))
    assert depth_profile(model, model, batch)["cka"].change == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_the_user_has_the_last_word(causal: bool, said: bool) -> None:
    model, batch = SeesImages(causal), images_and_text()
    found = record(model, batch, causal=said)
    assert found.causal == said
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(found.rows[2], output[:, 1:].mean(dim=1) if said else output.mean(dim=1))
    assert DepthProfile(causal=said).recorder.causal is said


class OneByOne(nn.Module):
    """Layers on single positions: without any mixing, a model counts as not causal."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_layers_that_mix_no_positions_are_not_causal() -> None:
    model, x = OneByOne(), torch.randn(6, 5, 4)
    found = Probe((x,)).record(model, LayerStack.find(model))
    assert not found.causal
    with torch.no_grad():
        torch.testing.assert_close(found.rows[2], model(x).mean(dim=1))
