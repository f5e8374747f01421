"""`depthcb fit`: every bundled YAML runs with one command on any backbone, and errors are one line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import seed_everything
from recipes_families import tiny

from depthcb.cli import main
from depthcb_recipes.backbones.loading import load_tokenizer
from depthcb_recipes.fit import _bundled

# Warnings of Lightning and jsonargparse that users would see too.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
CONFIGS = Path(__file__).parents[2] / "recipes" / "depthcb_recipes" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.log_every_n_steps=1",
         "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=4"]  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random networks saved to folders, with a tokenizer that has all special tokens."""
    tokenizer, folders = load_tokenizer("minilm"), {}
    for family, head in (("bert", "ForMaskedLM"), ("neox", "ForCausalLM")):
        folder = tmp_path_factory.mktemp(family)
        tiny(family, head, vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[family] = str(folder)
    return folders


def fit(config: str, folder: Path, *options: str) -> int:
    """A fit with short rows, since the objective distance is computed on many of them."""
    length = "max_length" if config in ("completion_lm", "sequence_classification", "token_classification",
                                        "contrastive", "dpo") else "block_size"  # fmt: skip
    return main(["fit", "--config", config, *SHORT, f"--data.{length}=32",
                 f"--trainer.logger.init_args.save_dir={folder}", *options])  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    (found,) = folder.glob("*/version_0/metrics.csv")
    with open(found, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "name",
    [n if n in ("causal_lm", "contrastive") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_every_config_runs_on_another_backbone(name: str, backbone: dict[str, str], tmp_path: Path) -> None:
    model = backbone["bert" if name in ("masked_lm", "contrastive") else "neox"]
    assert fit(name, tmp_path, f"--model.backbone={model}", "--data.val_rows=64", "--data.batch_size=8") == 0
    found = rows(tmp_path)
    seen = {key for row in found for key, value in row.items() if value}
    assert {"train/loss", "val/loss", "depth/cka/slope", "update_ratio/L00"} <= seen
    distances = [float(row["depth/objective_distance"]) for row in found if row.get("depth/objective_distance")]
    assert len(distances) <= 1, "once a run"
    if name in ("causal_lm", "masked_lm"):
        assert distances == [0.0], "the objective it was pretrained by"
        assert {"depth/objective_distance_low", "depth/objective_distance_high"} <= seen
    (kept,) = tmp_path.glob("*/version_0/config.yaml")
    assert yaml.safe_load(kept.read_text())["model"]["init_args"]["backbone"] == model


@pytest.mark.slow
def test_the_control_is_one_more_option_and_a_seed_repeats(backbone: dict[str, str], tmp_path: Path) -> None:
    options = (f"--model.backbone={backbone['neox']}", "--trainer.callbacks+=depthcb.EqualStep", "--data.val_rows=64",
               "--model.optimizer=sgd", "--model.lr=0.1", "--data.batch_size=8")  # fmt: skip
    results = []
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert fit("causal_lm", tmp_path / run, *options, f"--seed_everything={seed}", f"--data.seed={seed}") == 0
        results.append([row["val/loss"] for row in rows(tmp_path / run) if row["val/loss"]])
    assert results[0] == results[1] != results[2]
    ratios = [[float(v) for k, v in row.items() if k.startswith("equal_step/realised") and v] for row in
              rows(tmp_path / "a")]  # fmt: skip
    assert [max(r) / min(r) for r in ratios if r] == pytest.approx([1, 1], rel=1e-4)
    seed_everything(0, verbose=False)


BAD: list[tuple[list[str], str]] = [
    (["--model.backbone=./nowhere"], "./nowhere"),
    (["--model.lr=-1"], "lr must be positive, not -1"),
    (["--model.no_such=1"], "Option 'no_such' is not accepted"),
    (["--data.kind=poetry"], "Expected a typing.Literal['code', 'prose']. Got value: poetry"),
    (["--data.dataset=./nowhere.csv"], "There is no file or folder './nowhere.csv'"),
    (["--trainer.max_steps=many"], "max_steps"),
    (["--trainer.accelerator=tpuu"], "invalid accelerator name"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_one_line(
    options: list[str], message: str, backbone: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    assert fit("causal_lm", tmp_path, f"--model.backbone={backbone['neox']}", *options) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("depthcb fit: ")]
    assert message in error
    assert len(error) < 400


def test_a_config_is_a_file_too(backbone: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((CONFIGS / "causal_lm.yaml").read_text().replace("smollm2-135m", backbone["neox"]))
    assert fit(str(own), tmp_path, "--data.val_rows=64", "--trainer.max_steps=1", "--data.batch_size=8") == 0
    assert rows(tmp_path)


def test_a_missing_config_is_one_line(capsys: Any) -> None:
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_differ_only_where_they_must(name: str) -> None:
    """The same callbacks, steps and logging in each: a comparison of objectives compares objectives."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]
    assert config == {"logger": {"init_args": {"name": name}}}, "all else is in fit_defaults.yaml"


def test_only_a_configuration_is_looked_up_by_its_name() -> None:
    """The name of a logger is not one, although it is that of an objective."""
    named = ["--config", "dpo", "--config=causal_lm", "--trainer.logger.init_args.name", "contrastive"]
    paths = [str(CONFIGS / f"{name}.yaml") for name in ("dpo", "causal_lm")]
    assert list(_bundled(named)) == ["--config", paths[0], f"--config={paths[1]}", *named[3:]]
