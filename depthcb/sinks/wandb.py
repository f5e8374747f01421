"""Weights & Biases: the run's configuration, an image of layer x validation, and a panel with all curves.

Scalars travel in Lightning's own row of the validation. The pictures follow as one row with the same
``trainer/global_step``, committed at once. No tables: each makes an artifact, which blocks training and is lost when an
offline run is synced without its staging folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from depthcb.profile import Profile, layer_key
from depthcb.run import plain
from depthcb.sinks.base import LoggerSink, register


@register(WandbLogger)
class WandbSink(LoggerSink):
    """Configures the run and logs ``<name>/heatmap``, a `wandb.Image`, and ``<name>/curves``, a `wandb.Html`.

    A callback's settings become ``depthcb.<name>`` in the configuration, its layers by the index in the logged keys;
    ``depthcb_control`` is what runs can be grouped by.
    """

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        layers = {layer_key(i): layer for i, layer in enumerate(settings["layers"])}
        config: Any = self.logger.experiment.config
        ours = dict(config.get("depthcb") or {}) | {name: plain(settings) | {"layers": layers}}
        config.update({"depthcb": ours, "depthcb_control": control}, allow_val_change=True)

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        from depthcb.curves import curves_page, heatmap_image  # not above: the rest works without matplotlib

        row = {
            f"{name}/heatmap": wandb.Image(heatmap_image(by_measure), file_type="png"),
            f"{name}/curves": wandb.Html(curves_page(by_measure), inject=False),
        }
        self.logger.log_metrics(row, step=step)
