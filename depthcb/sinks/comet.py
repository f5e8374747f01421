"""Comet: plots as images with a step, and the control under the experiment's "Other" values.

``CometLogger(online=False)`` of Lightning 2.6 turns the experiment off instead of saving it. To train offline, set
the environment variable ``COMET_START_ONLINE=false``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import CometLogger

from depthcb.profile import Profile
from depthcb.sinks.base import LoggerSink, register
from depthcb.unit_grid import UnitGrid


@register(CometLogger)
class CometSink(LoggerSink):
    """Logs ``depthcb_control`` as an "Other" value and the images ``<name>/heatmap``, ``curves`` and ``units``."""

    draws = True

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        self.logger.experiment.log_other("depthcb_control", control)

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        from PIL import Image  # lazy, as matplotlib, which requires it: everything else works without either

        from depthcb.curves import curves_image, heatmap_image

        # As PIL images: Comet stretches an array's values to the full range, which changes its colours.
        for key, picture in (("heatmap", heatmap_image(by_measure)), ("curves", curves_image(by_measure))):
            self.logger.experiment.log_image(Image.fromarray(picture), name=f"{name}/{key}", step=step)

    def units(self, name: str, grid: UnitGrid, step: int) -> None:
        from PIL import Image

        from depthcb.curves import units_image

        self.logger.experiment.log_image(Image.fromarray(units_image(grid, step)), name=f"{name}/units", step=step)

    def sites(self, name: str, latest: Mapping[str, Profile], step: int) -> None:
        from PIL import Image

        from depthcb.curves import sites_image

        self.logger.experiment.log_image(Image.fromarray(sites_image(latest)), name=f"{name}/sites", step=step)
