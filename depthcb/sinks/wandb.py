"""Weights & Biases: the run's configuration, a heatmap of layer x validation, and a panel with all curves.

Scalars are part of Lightning's own row for the validation. The plots follow in a second row with the same
``trainer/global_step``, committed immediately. Tables are not used: each creates an artifact, which blocks training and
is lost when an offline run is synced without its staging folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from depthcb.plain import plain
from depthcb.profile import Profile, layer_key
from depthcb.sinks.base import LoggerSink, register
from depthcb.unit_grid import UnitGrid


@register(WandbLogger)
class WandbSink(LoggerSink):
    """Configures the run and logs ``<name>/heatmap`` and ``units``, `wandb.Image`, and ``curves``, a `wandb.Html`.

    A callback's settings are stored as ``depthcb.<name>`` in the configuration, with layers keyed by the index used in
    the logged keys; ``depthcb_control`` is meant for grouping runs.
    """

    draws = True

    def run_name(self) -> str:
        return str(self.logger.experiment.name or "")  # its folder has the run's id

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        layers = {layer_key(i): layer for i, layer in enumerate(settings["layers"])}
        config: Any = self.logger.experiment.config
        callbacks = dict(config.get("depthcb") or {}) | {name: plain(settings) | {"layers": layers}}
        config.update({"depthcb": callbacks, "depthcb_control": control}, allow_val_change=True)

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        from depthcb.curves import curves_page, heatmap_image  # lazy: everything else works without matplotlib

        row = {
            f"{name}/heatmap": wandb.Image(heatmap_image(by_measure), file_type="png"),
            f"{name}/curves": wandb.Html(curves_page(by_measure), inject=False),
        }
        self.logger.log_metrics(row, step=step)

    def units(self, name: str, grid: UnitGrid, step: int) -> None:
        from depthcb.curves import units_image

        self.logger.log_metrics({f"{name}/units": wandb.Image(units_image(grid, step), file_type="png")}, step=step)

    def sites(self, name: str, latest: Mapping[str, Profile], step: int) -> None:
        from depthcb.curves import sites_image

        self.logger.log_metrics({f"{name}/sites": wandb.Image(sites_image(latest), file_type="png")}, step=step)
