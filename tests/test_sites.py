"""What attention and the MLP of each layer write to the residual stream, beside hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support import fit, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    Mamba2Config,
    Mamba2Model,
    RwkvConfig,
    RwkvModel,
)

from depthcb import DepthProfile, LayerStack
from depthcb.engine import ProfileRecorder
from depthcb.probe import Probe
from depthcb.report import write_html
from depthcb.run import read_runs
from depthcb.similarity import cka_change
from depthcb.sites import find_sites

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
IDS = torch.randint(0, 50, (24, 7), generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SHAPE, intermediate_size=64))


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Model(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, **ids))


def neox() -> nn.Module:
    return GPTNeoXModel(GPTNeoXConfig(**SHAPE, intermediate_size=64, use_parallel_residual=True))


#: By model: the paths, inside a layer, of what attention and the MLP write; whether blocks add these and nothing else.
WRITERS: list[tuple[Callable[[], nn.Module], str, str, bool]] = [
    (bert, "attention.output.dense", "output.dense", False),
    (gpt2, "attn", "mlp", True),
    (neox, "attention", "mlp", True),
]


def hooked(model: nn.Module, modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The (input, output) of each module in one forward, by hooks written by hand."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        seen[module] = first, output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with torch.no_grad():
        model.eval()(IDS)
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0)


@pytest.mark.parametrize(("make", "attention", "mlp", "sums"), WRITERS)
def test_sites_are_what_hooks_written_by_hand_see(
    make: Callable[[], nn.Module], attention: str, mlp: str, sums: bool
) -> None:
    torch.manual_seed(0)
    model = make()
    blocks = list(LayerStack.find(model).modules)
    places = {
        "attention": [block.get_submodule(attention) for block in blocks],
        "mlp": [block.get_submodule(mlp) for block in blocks],
    }
    before = {site: hooked(model, modules) for site, modules in places.items()}
    if sums:
        for (start, end), (_, a), (_, m) in zip(hooked(model, blocks), before["attention"], before["mlp"], strict=True):
            torch.testing.assert_close(a + m, end - start, rtol=1e-4, atol=1e-5)
    recorder = ProfileRecorder({"input_ids": IDS}, measures=("cka",), causal=False, sites=("block", "attention", "mlp"))
    recorder.prepare(model)
    moved(model)
    recorder.measure(5)
    for site, modules in places.items():
        after = hooked(model, modules)
        wanted = [cka_change(a.mean(1), b.mean(1)).item() for (_, a), (_, b) in zip(before[site], after, strict=True)]
        profile = recorder.profiles_by_site[site]["cka"][-1]
        assert profile.change == pytest.approx(wanted, rel=1e-4)
        assert profile.slope_interval is not None
        assert profile.step == 5
    row = recorder.row({"cka": recorder.profiles[-1]})
    assert row["depth/mlp/cka/L02"] == recorder.profiles_by_site["mlp"]["cka"][-1].change[2]


def test_a_state_space_model_has_no_attention() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "num_heads": 8, "head_dim": 8}
    model = Mamba2Model(Mamba2Config(**shape, n_groups=2, state_size=8))
    with pytest.raises(ValueError, match=r"sites='attention': layer 'layers.0' has mixer: leave it out"):
        find_sites(model, LayerStack.find(model), Probe(({"input_ids": IDS},)), ("attention",))


def test_heads_are_slices_of_what_the_projection_reads() -> None:
    torch.manual_seed(0)
    model = gpt2()
    projections = [block.get_submodule("attn.c_proj") for block in LayerStack.find(model).modules]
    before = hooked(model, projections)
    recorder = ProfileRecorder({"input_ids": IDS}, measures=("cka",), causal=False, sites=("block", "head"))
    recorder.prepare(model)
    moved(model)
    profiles = recorder.measure(0)
    after = hooked(model, projections)
    assert list(recorder.profiles_by_site) == ["head00", "head01", "head02", "head03"]
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        wanted = [
            cka_change(a[..., part].mean(1), b[..., part].mean(1)).item()
            for (a, _), (b, _) in zip(before, after, strict=True)
        ]
        profile = recorder.profiles_by_site[f"head{head:02d}"]["cka"][-1]
        assert profile.change == pytest.approx(wanted, rel=1e-4)
        assert profile.title == f"change of head {head}"
    assert not any("head" in key for key in recorder.row(profiles))


def test_heads_need_a_known_number() -> None:
    model = RwkvModel(RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=3, vocab_size=50))
    with pytest.raises(ValueError, match="sites='head': the layers of RwkvModel don't say how many heads they have"):
        find_sites(model, LayerStack.find(model), Probe(({"input_ids": IDS},)), ("head",))


class _Scaled(nn.Module):
    """A block whose MLP is scaled before it is added, so that no module's output is what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        written: Tensor = x + 0.5 * self.mlp(self.norm(x))
        return written


def test_an_output_that_is_not_written_as_it_is_is_no_site() -> None:
    model = nn.Sequential(_Scaled(), _Scaled())
    probe = Probe((torch.randn(16, 8),))
    assert find_sites(model, LayerStack.find(model), probe, ("attention",))["attention"].names[1] == "1.attention"
    with pytest.raises(ValueError, match=r"in layer '0' the output of none of mlp is what its mlp adds"):
        find_sites(model, LayerStack.find(model), probe, ("mlp",))
    # The remedy.
    by_hand = ProfileRecorder(torch.randn(16, 8), layers="*.mlp", measures=("cosine",), name="mlp")
    by_hand.prepare(model)
    assert by_hand.measure(0)["cosine"].layer_names == ("0.mlp", "1.mlp")


@pytest.mark.parametrize("sites", ["block", (), ("attention",), ("block", "head2"), ("block", "mlp", "mlp")])
def test_wrong_sites_are_refused_at_once(sites: Any) -> None:
    with pytest.raises(ValueError, match=r"sites=.*pass 'block' and any of"):
        DepthProfile(sites=sites)


class Squares(pl.LightningModule):
    """Makes the activations of a tiny GPT-2 small."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids).last_hidden_state
        return output

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self(**batch).square().mean()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, callbacks: list[pl.Callback]) -> pl.LightningModule:
    data = DataLoader([{"input_ids": ids} for ids in IDS], 6)
    module = seeded(Squares)
    fit(module, callbacks, (data, data), val_check_interval=2, logger=CSVLogger(folder))
    return module


def test_in_a_trainer(tmp_path: Path) -> None:
    """Training is what it was; records, reports and checkpoints have the sites."""
    watch = DepthProfile({"input_ids": IDS}, sites=("block", "attention", "mlp", "head"))
    plain, watched = train(tmp_path / "plain", []), train(tmp_path / "watched", [watch])
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    (run,) = read_runs(tmp_path / "watched")
    assert [p.step for p in run.sites["attention"]["cka"]] == [p.step for p in run.profiles["cka"]] == [1, 3]
    assert run.sites["mlp"]["cka"][-1].layer_names == ("model.h.0.mlp", "model.h.1.mlp", "model.h.2.mlp")
    assert run.sites["mlp"]["cka"][-1].title == "change of what the MLP writes"
    write_html([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Where in the layers" in page
    assert "Latest change of each head" in page
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    again = DepthProfile({"input_ids": IDS}, sites=("block", "mlp", "head"))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.recorder.profiles_by_site["mlp"]["cka"] == run.sites["mlp"]["cka"]
    assert again.recorder.site_references.keys() == {"mlp", "head00", "head01", "head02", "head03"}


def test_a_checkpoint_without_the_sites_is_refused() -> None:
    watch, again = (DepthProfile({"input_ids": IDS}, sites=sites) for sites in (("block",), ("block", "mlp")))
    watch.recorder.prepare(gpt2())
    with pytest.raises(ValueError, match="no reference of the site mlp: leave it out of sites="):
        again.load_state_dict(watch.state_dict())
