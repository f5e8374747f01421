"""``depthcb fit --config FILE``: any objective on any backbone from a YAML file, through LightningCLI."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import recipes
from recipes.catalogue import CONFIGS
from recipes.objective import Objective


class FitCLI(LightningCLI):
    """The objective's backbone is also the one whose tokenizer the data module uses."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.backbone", "data.init_args.backbone")


def run_fit(argv: Sequence[str]) -> None:
    """Fits what the command line describes.

    Args:
        argv: ``--config FILE``, or the name of a bundled one (``causal_lm``), and options of LightningCLI, such as
            ``--model.backbone minilm``.

    Raises:
        ValueError: A file or an option that cannot be used, in one line.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    fit_cli(["fit", *map(_bundled, argv)], exit_on_error=False, fit={"exit_on_error": False})


def fit_cli(args: Sequence[str], run: bool = True, **parser_kwargs: Any) -> FitCLI:
    """The command line's objects: Trainer, objective and data.

    Args:
        args: Options of LightningCLI; the command ``fit`` first if it is to run.
        run: Whether to run the command, or to make the objects alone.
        **parser_kwargs: As LightningCLI takes them.

    Raises:
        ValueError: A file or an option that cannot be used, in one line.
    """
    for name in recipes.__all__:
        getattr(recipes, name)  # imported, so that a class is found by its bare name
    try:
        with warnings.catch_warnings():
            # It takes our own command line for a second one.
            warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended.*")
            return FitCLI(
                Objective,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=list(args),
                run=run,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},  # the same folder again is no reason to stop
                parser_kwargs=parser_kwargs,
            )
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        raise ValueError(_brief(str(error))) from error


def _bundled(argument: str) -> str:
    """The path of a bundled configuration in place of its name; anything else as it is."""
    flag, name = argument[: argument.find("=") + 1], argument[argument.find("=") + 1 :]
    path = CONFIGS / f"{name}.yaml"
    return f"{flag}{path}" if flag in ("", "--config=") and path.is_file() else argument


def _brief(message: str) -> str:
    """One line of what jsonargparse says: of a class that it could not make, the reason alone."""
    reason = re.search(r"Errors:\s*- (.*?)\s*- Expected a <class 'NoneType'>", message, re.DOTALL)
    told = reason[1] if reason and not reason[1].startswith("Expected a") else message
    return " ".join(told.split())


if __name__ == "__main__":
    run_fit(sys.argv[1:])
