"""Loading of state: no pickle, no network access, and damaged files raise errors that name the callback."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import TinyLM, fit, loaders, seeded

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*", "ignore:.*fewer than 5 directions.*")


def callbacks() -> list[pl.Callback]:
    return [EqualStep(), UpdateRatioMonitor(), DepthProfile(measures=("cka", "cosine"))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    trainer = fit(seeded(TinyLM), callbacks())
    trainer.save_checkpoint(folder / "full.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder / "full.ckpt"


def resume(path: Path, *watchers: pl.Callback) -> None:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=8, enable_checkpointing=False, callbacks=list(watchers), **options)
    trainer.fit(seeded(TinyLM), *loaders(), ckpt_path=path)


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_hostile_state_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key in content["callbacks"]:
        spoilt = copy.deepcopy(content)
        spoilt["callbacks"][key]["more"] = Hostile(tmp_path / "executed")
        torch.save(spoilt, tmp_path / "hostile.ckpt")
        with pytest.raises(Exception, match="Weights only load failed"):
            resume(tmp_path / "hostile.ckpt", *callbacks())
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "hostile.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists(), "it does nothing anyway: a weak test"


def test_half_a_file_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError, match="failed reading zip archive"):
        resume(tmp_path / "half.ckpt", *callbacks())


def reference(state: dict[str, Any]) -> Any:
    return state["reference"]


def grams(state: dict[str, Any]) -> Any:
    return state["reference"]["sketches"]["gram"]


@pytest.mark.parametrize(
    ("damage", "of"),
    [
        (lambda s: s.pop("reference"), "DepthProfile"),
        (lambda s: reference(s).pop("sketches"), "DepthProfile"),
        (lambda s: reference(s).update(sketches=3), "DepthProfile"),
        (lambda s: reference(s).update(examples=torch.arange(3)), "DepthProfile"),
        (lambda s: reference(s).update(layer_names=["a", "b"]), "DepthProfile"),
        (lambda s: reference(s)["sketches"].update(gram=[k[:5, :5] for k in grams(s)]), "DepthProfile"),
        (lambda s: reference(s)["sketches"]["rows"].pop(), "DepthProfile"),
        (lambda s: grams(s)[1].fill_(float("nan")), "DepthProfile"),
        (lambda s: s["profiles"].update(cka=["nonsense"]), "DepthProfile"),
        (lambda s: s["profiles"].update(cka=["{}"]), "DepthProfile"),
        (lambda s: s.update(validations="x"), "DepthProfile"),
        (lambda s: s.pop("steps_made"), "EqualStep"),
        (lambda s: s["mean_wanted"].update(sums=[1.0]), "EqualStep"),
        (lambda s: s["mean_realised"].update(counts=["a"] * 4), "EqualStep"),
        (lambda s: s.update(mean=[1.0]), "UpdateRatioMonitor"),
    ],
)
def test_a_damaged_state_names_its_callback(
    damage: Callable[[Any], Any], of: str, checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    damage(next(state for key, state in content["callbacks"].items() if key.startswith(of)))
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=rf"state of {of}.* is damaged .*resume from another checkpoint"):
        resume(tmp_path / "damaged.ckpt", *callbacks())


@pytest.mark.parametrize("make", [DepthProfile, EqualStep, UpdateRatioMonitor])
def test_a_checkpoint_of_weights_only_is_refused(make: Callable[[], pl.Callback], checkpoint: Path) -> None:
    """Rejected by Lightning, before a reference could be computed from weights that are no longer the pretrained ones."""
    callback = make()
    with pytest.raises(KeyError, match=r"checkpoint contains only the model.*save_weights_only"):
        resume(checkpoint.with_name("weights.ckpt"), callback)
    assert getattr(callback, "reference", None) is None


def test_two_profiles_resume_each_with_its_own_reference(tmp_path: Path) -> None:
    def watches() -> list[DepthProfile]:
        tokens = torch.randint(1, 60, (12, 9), generator=torch.Generator().manual_seed(4))
        return [DepthProfile(), DepthProfile(probe={"input_ids": tokens}, name="other", measures=("cosine",))]

    first, second = watches(), watches()
    fit(seeded(TinyLM), list(first)).save_checkpoint(tmp_path / "a.ckpt")
    resume(tmp_path / "a.ckpt", *reversed(second))
    for before, after in zip(first, second, strict=True):
        assert after.profiles[0] == before.profiles[0]
        assert len(after.profiles) > 1
        a, b = before.reference, after.reference
        assert a is not None
        assert b is not None
        assert a.probe_hash == b.probe_hash
        torch.testing.assert_close(a.sketches, b.sketches, rtol=0, atol=0)
    assert [w.profiles[-1].rows for w in second] == [16, 12]


OFFLINE = """
import sys

def forbid(event, arguments):
    if event == "socket.connect" and isinstance(arguments[-1], str):
        return  # between processes of this machine
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {arguments[-1]}")

sys.addaudithook(forbid)
from support import TinyLM, fit, seeded
from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb_recipes.backbones.loading import load_backbone

watch = DepthProfile()
fit(seeded(TinyLM), [EqualStep(), UpdateRatioMonitor(), watch])
load_backbone("minilm")
assert watch.profiles
if len(sys.argv) > 1:
    import socket
    socket.create_connection(("127.0.0.1", 9))
"""


@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_reaches_the_network(asks: bool) -> None:
    """There are no DNS lookups and no connections, even if the hub's offline mode is not set."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", OFFLINE, *(["ask"] if asks else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == int(asks), done.stderr[-4000:]
    assert ("socket.getaddrinfo" in done.stderr) == asks
