"""All loggers get scalars, loggers that support pictures get them, and the progress bar only gets the slope."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from support import TinyLM, fit, logged, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthcb import DepthProfile, EqualStep, UpdateRatioMonitor
from depthcb.run import read_runs
from depthcb.sinks import LoggerSink, register


def three() -> list[Any]:
    return [EqualStep(), UpdateRatioMonitor(), DepthProfile()]


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    callbacks = three()
    fit(seeded(TinyLM), callbacks, logger=TensorBoardLogger(tmp_path, name="tb"), val_check_interval=2)
    (folder,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    profiles = callbacks[-1].profiles
    slopes = events.Scalars("depth/cka/slope")
    assert [event.step for event in slopes] == [p.step for p in profiles] == [1, 3]
    assert [event.value for event in slopes] == pytest.approx([p.slope for p in profiles], rel=1e-6)
    assert [event.step for event in events.Scalars("equal_step/realised/L00")] == [0, 1, 2, 3]
    for key in ("depth/heatmap", "depth/curves"):
        images = events.Images(key)
        assert [image.step for image in images] == [1, 3]
        assert all((image.width, image.height) == (1120, 420) for image in images)
        assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
    (run,) = read_runs(folder)
    assert run.profiles == callbacks[-1].profiles_by_measure


def test_mlflow_gets_scalars_pictures_and_the_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger, watch = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}"), DepthProfile()
    fit(seeded(TinyLM), [EqualStep(), watch], logger=logger, val_check_interval=2, default_root_dir=tmp_path)
    assert logger.run_id is not None
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.tags["depthcb_control"] == "equal-step"
    slopes = logger.experiment.get_metric_history(logger.run_id, "depth/cka/slope")
    assert [(m.step, m.value) for m in slopes] == [(p.step, pytest.approx(p.slope, rel=1e-6)) for p in watch.profiles]
    pictures = sorted(path.name for path in tmp_path.rglob("images/*.png"))
    assert [name.partition("+timestamp")[0] for name in pictures] == [
        f"depth~{key}+step+{step}" for key in ("curves", "heatmap") for step in (1, 3)
    ]
    with Image.open(next(tmp_path.rglob("images/*.png"))) as picture:
        assert picture.size == (1120, 420)


def test_comet_gets_scalars_pictures_and_the_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_START_ONLINE", "false")  # Lightning 2.6's `online=False` also turns the experiment off
    monkeypatch.setenv("COMET_ERROR_TRACKING_ENABLE", "false")  # or it sends its own errors to a server
    logger = CometLogger(
        offline_directory=str(tmp_path), log_env_details=False, log_code=False, log_git_metadata=False,
        auto_output_logging=False, display_summary_level=0,
    )  # fmt: skip
    watch = DepthProfile()
    fit(seeded(TinyLM), [EqualStep(), watch], logger=logger, val_check_interval=2, default_root_dir=tmp_path)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as saved:
        messages = [json.loads(line) for line in saved.read("messages.json").splitlines()]
        uploads = [m["payload"] for m in messages if m["type"] == "file_upload"]
        pictures = {
            (about["figName"], about["step"]): saved.read(upload["file_path"])
            for upload in uploads
            if "figName" in (about := upload["additional_params"])
        }
    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
    assert others["depthcb_control"] == "equal-step"
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    slopes = [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == "depth/cka/slope"]
    assert slopes == [(p.step, pytest.approx(p.slope, rel=1e-6)) for p in watch.profiles]
    assert sorted(pictures) == [(f"depth/{key}", step) for key in ("curves", "heatmap") for step in (1, 3)]
    for content in pictures.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == (1120, 420)


class Shouting(CSVLogger):
    """A custom logger that supports pictures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[Any] = []


def test_a_sink_of_ones_own_serves_its_logger_and_those_that_inherit(tmp_path: Path) -> None:
    @register(Shouting)
    class Shout(LoggerSink):
        def configure(self, name: str, settings: Any, control: str) -> None:
            self.logger.heard.append((name, control))

        def pictures(self, name: str, by_measure: Any, step: int) -> None:
            self.logger.heard.append((name, list(by_measure), step))

    class Louder(Shouting):
        pass

    logger = Louder(tmp_path)
    fit(seeded(TinyLM), [DepthProfile(measures=("cosine",))], logger=logger, val_check_interval=4)
    assert logger.heard == [("depth", "standard"), ("depth", ["cosine"], 3)]


class Remote(Logger):
    """A logger without pictures and without a local folder."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "remote"

    @property
    def version(self) -> int:
        return 7

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.rows.append({"step": step, **metrics})


def test_another_logger_gets_the_scalars(tmp_path: Path) -> None:
    remote, csv = Remote(), CSVLogger(tmp_path, name="", version="")
    fit(seeded(TinyLM), three(), logger=[remote, csv], default_root_dir=tmp_path)
    rows = [{key: value for key, value in row.items() if key != "epoch"} for row in logged(csv)]
    assert [{k: v for k, v in row.items() if k != "epoch"} for row in remote.rows] == rows
    (run,) = read_runs(tmp_path)
    assert run.name == "remote/version_7", "the first logger's name and version, in the Trainer's folder"


class Bucket(Remote):
    """A logger whose files are in a bucket."""

    @property
    def save_dir(self) -> str:
        return "s3://bucket/logs"


def test_a_logger_in_a_bucket_leaves_the_record_here(tmp_path: Path) -> None:
    fit(seeded(TinyLM), three(), logger=Bucket(), default_root_dir=tmp_path)
    assert (tmp_path / "remote" / "version_7" / "depthcb" / "depth.jsonl").is_file()


def test_the_checkpoint_lies_beside_the_record(tmp_path: Path) -> None:
    keep = ModelCheckpoint()
    logger = TensorBoardLogger(tmp_path, name="tb")
    fit(seeded(TinyLM), [*three(), keep], logger=logger, enable_checkpointing=True)
    assert (Path(keep.best_model_path).parents[1] / "depthcb" / "depth.jsonl").is_file()


class Bar(TQDMProgressBar):
    """Records what it is given to show."""

    shown: dict[str, Any]

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.shown = dict(trainer.progress_bar_metrics)
        super().on_train_end(trainer, *args)


def test_the_progress_bar_shows_the_slope_and_nothing_more() -> None:
    bar = Bar()
    callbacks = [*three(), bar]
    fit(seeded(TinyLM), callbacks, enable_progress_bar=True)
    assert bar.shown == {"depth/cka/slope": pytest.approx(callbacks[2].profiles[-1].slope, rel=1e-6)}
