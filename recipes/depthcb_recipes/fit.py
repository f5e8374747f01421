"""``depthcb fit --config FILE``: any objective on any backbone from a YAML file, through LightningCLI."""

from __future__ import annotations

import itertools
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_only

import depthcb_recipes
from depthcb import DepthProfile
from depthcb.callbacks.logging import callbacks_of, run_folder, write_record
from depthcb.run import write_header
from depthcb_recipes import configuration_file
from depthcb_recipes.backbones.pretraining import pretrain_if_missing
from depthcb_recipes.data.probe_texts import ProbeTexts
from depthcb_recipes.fit_progress import FitProgress
from depthcb_recipes.objectives.objective import Objective
from depthcb_recipes.precision import Precision, choose, device_of, settle
from depthcb_recipes.stopping import Stop, stoppable

#: What every fit starts from: the Trainer's options that a configuration does not give.
DEFAULTS = Path(__file__).with_name("fit_defaults.yaml")


class PrecisionTrainer(pl.Trainer):
    """A Trainer whose precision may be ``"auto"``.

    Args:
        precision: As Lightning takes it, or ``"auto"``: bfloat16 autocast where the device computes it natively,
            float32 elsewhere.
        **options: As `lightning.pytorch.Trainer` takes them.
    """

    def __init__(self, *, precision: str | int | None = "auto", **options: Any) -> None:
        if precision == "auto":
            precision = choose(device_of(options.get("accelerator", "auto"))).precision
        super().__init__(precision=precision, **options)  # type: ignore[arg-type]  # Lightning checks it


class PrecisionRecord(pl.Callback):
    """Writes the precision of a fit, and why it was chosen, beside the other callbacks' records.

    Args:
        choice: What was chosen.
    """

    name = "precision"

    def __init__(self, choice: Precision) -> None:
        self.choice = choice

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_record(self, trainer, lambda folder: write_header(folder, self.name, self.name, 0, self.choice.to_dict()))


class FitCLI(LightningCLI):
    """Settles the precision before the Trainer is made; the objective's backbone is also the data module's."""

    #: What the fit is trained in, known once the options are read, and what writes it down.
    precision: Precision
    precision_record: PrecisionRecord

    def __init__(self, *args: Any, stop: Stop | None = None, **options: Any) -> None:
        self.stop = stop
        super().__init__(*args, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.backbone", "data.init_args.backbone")
        about = "texts that DepthProfile measures on, instead of a sample of the validation set"
        parser.add_argument("--probe", type=ProbeTexts | None, default=None, help=about)

    def before_instantiate_classes(self) -> None:
        own = self._own(self.config)
        backbone = own.model.init_args.get("backbone")
        if isinstance(backbone, str):
            pretrain_if_missing(backbone)  # several processes wait for the first one
        options = own.trainer
        self.precision = settle(options.precision, device_of(options.accelerator))
        if options.precision == "auto":
            rank_zero_only(print)(self.precision, flush=True)
        options.precision = self.precision.precision  # what config.yaml keeps

    def instantiate_trainer(self, **options: Any) -> pl.Trainer:
        asked = self._own(self.config_init).trainer
        named = asked.callbacks if isinstance(asked.callbacks, list) else [asked.callbacks] if asked.callbacks else []
        self.precision_record = PrecisionRecord(self.precision)
        callbacks: list[pl.Callback] = [*named, self.precision_record]
        if asked.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in named):
            callbacks.append(FitProgress("fit"))
        return super().instantiate_trainer(**options, callbacks=callbacks)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        texts = self._own(self.config_init).probe
        if texts is None:
            return
        batches = texts.batches(self.datamodule.tokenizer)
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, DepthProfile) and callback.recorder.probe is None:
                callback.recorder.probe = batches

    def _own(self, config: Any) -> Any:
        """What a configuration holds for the command that runs."""
        return config[self.subcommand] if self.subcommand else config

    def before_fit(self) -> None:
        """What is said when the fit is asked to stop."""
        folder = run_folder(self.trainer)
        if self.stop is not None and folder is not None:
            told = f"Stopped. `depthcb report {folder}` shows what was measured."
            self.stop.last_words = lambda: print(told, flush=True)


def run_fit(argv: Sequence[str]) -> None:
    """Fits what the command line describes.

    Args:
        argv: ``--config FILE``, or the name of a bundled one (``causal_lm``), and options of LightningCLI, such as
            ``--model.backbone minilm``.

    Raises:
        ValueError: A file or an option that cannot be used, in one line.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    with stoppable(lambda: print("Stopped before the first step.", flush=True)) as stop:
        own = {"exit_on_error": False, "default_config_files": [str(DEFAULTS)]}
        fit_cli(["fit", *_bundled(argv)], stop=stop, exit_on_error=False, fit=own)


def fit_cli(
    args: Sequence[str] | Mapping[str, Any], run: bool = True, stop: Stop | None = None, **parser_kwargs: Any
) -> FitCLI:
    """The command line's objects: Trainer, objective and data.

    Args:
        args: Options of LightningCLI, as strings or as a nested mapping; the command ``fit`` first if it is to run.
        run: Whether to run the command, or to make the objects alone.
        stop: Told what to say when the command is asked to stop.
        **parser_kwargs: As LightningCLI takes them.

    Raises:
        ValueError: A file or an option that cannot be used, in one line.
    """
    depthcb_recipes.import_all()
    try:
        with warnings.catch_warnings():
            # It takes our own command line for a second one.
            warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended.*")
            return FitCLI(
                Objective,
                LightningDataModule,
                trainer_class=PrecisionTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=dict(args) if isinstance(args, Mapping) else list(args),
                run=run,
                stop=stop,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},  # the same folder again is no reason to stop
                parser_kwargs=parser_kwargs,
            )
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise ValueError(_brief(str(error))) from error


def _bundled(argv: Sequence[str]) -> Iterator[str]:
    """Yields the arguments with the paths of bundled configurations in place of their names.

    Raises:
        ValueError: A configuration is neither bundled nor a file.
    """
    for before, argument in itertools.pairwise(["", *argv]):
        named = before == "--config" or argument.startswith("--config=")
        flag, name = argument[: argument.find("=") + 1], argument[argument.find("=") + 1 :]
        yield f"{flag}{configuration_file(name)}" if named else argument


def _brief(message: str) -> str:
    """One line of what jsonargparse says: of a class that it could not make, the reason alone."""
    moved = re.search(r"class_path '(recipes\.([\w.]+))'", message)
    if moved and _exists(f"depthcb_recipes.{moved[2]}"):
        return f"The class path {moved[1]} is now depthcb_recipes.{moved[2]}: write that one."
    reason = re.search(r"Errors:\s*- (.*?)\s*- Expected a <class 'NoneType'>", message, re.DOTALL)
    told = reason[1] if reason and not reason[1].startswith("Expected a") else message
    return " ".join(told.split())


def _exists(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (AttributeError, ImportError):
        return False
    return True


if __name__ == "__main__":
    run_fit(sys.argv[1:])
