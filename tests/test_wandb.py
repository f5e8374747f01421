"""The real W&B client: offline, live with a local backend, with a slow or dead backend, and synced later."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from offline import WANDB, history, summary
from PIL import Image
from support import TinyLM, fit, loaders, seeded
from wandb_server import backend

import depthcb
from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.profile import DERIVED, Profile
from depthcb.run import read_runs
from depthcb.workspace import specification, workspace
from depthcb_recipes.studies.wandb_summary import FIGURES

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*legacy license classifiers.*",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*dataloader is not resumable.*",
)


def offline_logger(folder: Path, **options: Any) -> WandbLogger:
    folder.mkdir(exist_ok=True)
    silent = wandb.Settings(silent=True, console="off", mode="offline")
    return WandbLogger(
        project="p", save_dir=folder, settings=silent, **options
    )  # offline=True would stay in os.environ


def three() -> list[Any]:
    return [EqualStep(), UpdateRatioMonitor(), DepthProfile()]


def finish(logger: WandbLogger) -> None:
    logger.experiment.finish()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DepthProfile]:
    """A finished offline run: 4 epochs of 4 steps, 2 validations each."""
    folder = tmp_path_factory.mktemp("offline")
    logger = offline_logger(folder)
    callbacks = three()
    fit(seeded(TinyLM), callbacks, logger=logger, max_steps=16, val_check_interval=2, log_every_n_steps=3)
    finish(logger)
    return folder, callbacks[-1]


def test_offline_rows_are_the_computed_profiles(offline: tuple[Path, DepthProfile]) -> None:
    folder, watch = offline
    rows = history(folder)
    validations = [row for row in rows if "val/loss" in row]
    assert [row["trainer/global_step"] for row in validations] == [1, 3, 5, 7, 9, 11, 13, 15]
    for measure, profiles in watch.profiles_by_measure.items():
        assert [p.step for p in profiles] == [row["trainer/global_step"] for row in validations]
        for profile, row in zip(profiles, validations, strict=True):
            logged = [row[f"depth/{measure}/L{i:02d}"] for i in range(4)]
            assert logged == pytest.approx(list(profile.change), rel=1e-6)  # Lightning's metrics are fp32
            assert profile.slope_interval is not None
            expected = {key: getattr(profile, key) for key in DERIVED}
            expected |= {"slope_low": profile.slope_interval[0], "slope_high": profile.slope_interval[1]}
            for key, value in expected.items():
                assert row[f"depth/{measure}/{key}"] == pytest.approx(value, rel=1e-6)
    ratios = [row["trainer/global_step"] for row in rows if "update_ratio/L00" in row]
    assert ratios == [row["trainer/global_step"] for row in rows if "equal_step/target" in row] == [2, 5, 8, 11, 14]


def test_pictures_follow_each_validation_in_one_row(offline: tuple[Path, DepthProfile]) -> None:
    folder, watch = offline
    rows = [row for row in history(folder) if "depth/heatmap._type" in row]
    assert [row["trainer/global_step"] for row in rows] == [p.step for p in watch.profiles]
    (run,) = folder.glob("wandb/offline-run-*")
    for i, row in enumerate(rows):
        assert row["depth/heatmap._type"] == "image-file"
        with Image.open(run / "files" / row["depth/heatmap.path"]) as image:
            assert image.size == (row["depth/heatmap.width"], row["depth/heatmap.height"]) == (1120, 420)
        page = (run / "files" / row["depth/curves.path"]).read_text()
        assert row["depth/curves._type"] == "html-file"
        assert f"change at step {watch.profiles[i].step}" in page
        assert page.count("currentColor") > 10, "text follows the reader's light or dark mode"
        assert "<script" not in page
    files = [path for path in (run / "files" / "media").rglob("*") if path.is_file()]
    assert len(files) == 2 * len(rows), "two files a validation, and no tables"


def test_the_configuration_says_what_was_measured(offline: tuple[Path, DepthProfile]) -> None:
    folder, watch = offline
    (run,) = folder.glob("wandb/offline-run-*")
    config = summary(run)["config"]
    assert config["depthcb_control"] == "equal-step"
    depth = config["depthcb"]["depth"]
    assert watch.reference is not None
    assert depth["layers"] == {f"L{i:02d}": name for i, name in enumerate(watch.reference.layer_names)}
    assert depth["probe_hash"] == watch.reference.probe_hash
    assert depth["probe_rows"] == 16
    assert "debiased" in depth["measures"]["cka"]
    assert set(config["depthcb"]) == {"depth", "equal_step", "update_ratio"}


def test_the_record_lies_where_the_checkpoints_do(offline: tuple[Path, DepthProfile]) -> None:
    folder, watch = offline
    (run,) = read_runs(folder / "p")
    assert run.profiles == watch.profiles_by_measure
    (path,) = folder.glob("wandb/offline-run-*")
    assert path.name.endswith(f"-{run.name}")


def test_the_workspace_matches_the_keys_of_a_run(offline: tuple[Path, DepthProfile]) -> None:
    folder, _ = offline
    keys = {key for row in history(folder) for key in row}
    found: Counter[str] = Counter()
    *sections, study = workspace("me", "p").sections
    assert {m for panel in study.panels for m in panel.metrics} <= {f"study/{figure}" for figure in FIGURES}
    for section in sections:
        for panel in section.panels:
            regex = getattr(panel, "metric_regex", None)
            for key in panel.media_keys if regex is None else []:
                assert f"{key}._type" in keys
            if regex is not None:
                matched = [key for key in keys if re.search(regex, key)]
                assert matched, f"{panel.title}: {regex} finds no key of a run"
                found[panel.title] = len(matched)
                assert panel.x == "trainer/global_step"
                assert bool(panel.log_y) == ("step" in panel.title.lower())
    assert found["Slope"] == 2
    assert found["change of each layer"] == found["normalised change of each layer"] == 4
    assert found["Equal-step: what each layer got"] == found["Step ratio of each layer"] == 4


def test_a_dry_run_prints_the_specification() -> None:
    spec = json.loads(specification("me", "p"))
    assert (spec["entity"], spec["project"], spec["name"]) == ("me", "p", "Depth profiles")
    first = [panel.get("media_keys") or panel["metric_regex"] for panel in spec["sections"][0]["panels"]]
    assert first[:2] == [["depth/curves"], ["depth/heatmap"]]
    assert "slope" in first[2]
    assert "depthcb_control" in json.dumps(spec["runset_settings"]["groupby"])


def test_a_view_that_cannot_be_saved_is_one_clear_sentence() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"NETRC": "/dev/null"}
    command = [str(Path(sys.executable).with_name("depthcb")), "workspace", "--entity", "me", "--project", "p"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "the view was not saved in me/p" in done.stderr
    assert "wandb login" in done.stderr
    assert "Traceback" not in done.stderr


class Waits(pl.Callback):
    """Waits after each validation until the backend has received its row and pictures."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.arrived: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (2, 4):
            step, count = trainer.global_step - 1, trainer.global_step // 2
            there = self.kept.wait(
                lambda: (
                    (step in [s for s, _ in self.kept.history("depth/cka/slope")])
                    and step in [s for s, _ in self.kept.history("depth/heatmap")]
                    and sum(name.startswith("media/") for name in self.kept.files) == 2 * count
                )
            )
            self.arrived.append(there)


def test_each_validation_arrives_before_training_goes_on(tmp_path: Path) -> None:
    with backend() as kept:
        settings = wandb.Settings(
            base_url=kept.url, api_key="0" * 40, silent=True, console="off", init_timeout=30,
            x_file_stream_transmit_interval=1,
        )  # fmt: skip
        logger = WandbLogger(project="p", save_dir=tmp_path, settings=settings)
        waits, watch = Waits(kept), DepthProfile()
        fit(seeded(TinyLM), [watch, waits], logger=logger, max_steps=6, val_check_interval=2)
        finish(logger)
        wandb.teardown()
    assert waits.arrived == [True] * 2
    slopes = kept.history("depth/cka/slope")
    assert [step for step, _ in slopes] == [p.step for p in watch.profiles] == [1, 3, 5]
    assert [value for _, value in slopes] == pytest.approx([p.slope for p in watch.profiles], rel=1e-6)
    assert kept.config["depthcb"]["value"]["depth"]["probe_rows"] == 16
    paths = [kept.files[media["path"]] for _, media in kept.history("depth/heatmap")]
    assert all(content.startswith(b"\x89PNG") for content in paths)
    assert not any("artifact" in name.lower() for name in kept.other), kept.other


@pytest.mark.slow
@pytest.mark.parametrize("server", ["slow", "dead"])
def test_a_bad_server_does_not_hold_training_up(server: str, tmp_path: Path) -> None:
    """Runs in a separate process, since W&B would wait for a dead server at the end."""
    script = str(Path(__file__).with_name("slow_server_fit.py"))
    done = subprocess.run([sys.executable, script, server, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["validations"] == 6
    assert seen["rows"] == 12, "a row of scalars and one of pictures each"
    assert max(seen["seconds"]) < 0.2, "at most 0.2 s a validation"


def test_an_offline_run_is_synced_without_its_staging_folder(
    offline: tuple[Path, DepthProfile], tmp_path: Path
) -> None:
    folder, watch = offline
    (run,) = folder.glob("wandb/offline-run-*")
    moved = tmp_path / run.name
    shutil.copytree(run, moved)
    shutil.rmtree(Path(wandb.env.get_data_dir()) / "artifacts" / "staging", ignore_errors=True)
    with backend() as kept:
        environment = os.environ | {
            "WANDB_BASE_URL": kept.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_DATA_DIR": str(tmp_path),
        }
        command = [WANDB, "sync", "--yes", str(moved)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for measure, profiles in watch.profiles_by_measure.items():
        slopes = kept.history(f"depth/{measure}/slope")
        assert [step for step, _ in slopes] == [p.step for p in profiles]
        assert [value for _, value in slopes] == pytest.approx([p.slope for p in profiles], rel=1e-6)
    for key in ("depth/heatmap", "depth/curves"):
        media = kept.history(key)
        assert len(media) == len(watch.profiles)
        assert all(len(kept.files[m["path"]]) == m["size"] for _, m in media)


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "last", save_on_train_epoch_end=False, enable_version_counter=False)
    first = offline_logger(tmp_path / "runs", id="one")
    options: dict[str, Any] = {"val_check_interval": 2}
    fit(seeded(TinyLM), [*three(), keep], logger=first, enable_checkpointing=True, **options)
    finish(first)
    second = offline_logger(tmp_path / "runs", id="one", resume="allow")
    trainer = pl.Trainer(
        max_steps=10, callbacks=three(), logger=second, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(seeded(TinyLM), *loaders(), ckpt_path=tmp_path / "kept" / "last.ckpt", weights_only=True)
    finish(second)
    rows = history(tmp_path / "runs")
    for key, steps in (("depth/cka/slope", [1, 3, 5, 7, 9]), ("depth/heatmap._type", [1, 3, 5, 7, 9]),
                       ("equal_step/target", list(range(10))), ("update_ratio/L00", list(range(10)))):  # fmt: skip
        assert [row["trainer/global_step"] for row in rows if key in row] == steps
    (run,) = read_runs(tmp_path / "runs" / "p")
    assert [p.step for p in run.profiles["cka"]] == [1, 3, 5, 7, 9]
    assert run.step_ratio.steps == tuple(range(10))


def test_pictures_stay_under_the_file_limit() -> None:
    """W&B supports about 1,000 files per run."""
    watch = DepthProfile()
    drawn = [n for n in range(1, 100_001) if watch.deserves_pictures(n)]
    assert drawn[:32] == list(range(1, 33))
    assert 2 * len(drawn) < 500
    gaps = [b / a for a, b in itertools.pairwise(drawn[32:])]
    assert max(gaps) < 1.07, "never far behind"


class Sparing(DepthProfile):
    def deserves_pictures(self, measurements: int) -> bool:
        return measurements in (1, 3)


def test_the_last_profile_is_drawn_whatever_its_number(tmp_path: Path) -> None:
    logger = offline_logger(tmp_path)
    watch = Sparing()
    fit(seeded(TinyLM), [watch], logger=logger, max_steps=5, val_check_interval=1)
    finish(logger)
    drawn = [row["trainer/global_step"] for row in history(tmp_path) if "depth/heatmap._type" in row]
    assert drawn == [0, 2, 4], "the last one comes at the end of the fit"
    assert len(watch.profiles) == 5


@pytest.mark.filterwarnings("ignore:.*what it leaves is incomplete.*")
def test_without_matplotlib_the_scalars_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "depthcb.curves", "depthcb.report"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("curves", "report"):
        monkeypatch.delattr(depthcb, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = offline_logger(tmp_path)
    with pytest.warns(
        UserWarning, match=r"cannot log plots to the WandbLogger .*matplotlib.* is not installed: pip install"
    ):
        fit(seeded(TinyLM), [DepthProfile()], logger=logger)
    finish(logger)
    rows = history(tmp_path)
    assert [row["trainer/global_step"] for row in rows if "depth/cka/slope" in row] == [3]
    profile = Profile((0.0, 0.1), ("a", "b"), "cka")
    assert "&lt;Profile cka at step 0" in profile._repr_html_()


def test_a_run_has_its_display_name_in_reports(tmp_path: Path) -> None:
    for _ in range(2):
        logger = offline_logger(tmp_path, name="warm lake")
        fit(seeded(TinyLM), [DepthProfile()], logger=logger)
        finish(logger)
    both = read_runs(tmp_path)
    folders = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert [run.name for run in both] == [f"warm lake ({folder})" for folder in folders], "two of one name"
    assert [run.name for run in read_runs(tmp_path / "p" / folders[0])] == ["warm lake"]
