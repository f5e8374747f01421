"""MLflow: plots as images with a step, and the control as a tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from depthcb.profile import Profile
from depthcb.sinks.base import LoggerSink, register
from depthcb.unit_grid import UnitGrid


@register(MLFlowLogger)
class MLflowSink(LoggerSink):
    """Tags the run with ``depthcb_control`` and logs the images ``<name>/heatmap``, ``curves`` and ``units``."""

    draws = True

    def configure(self, name: str, settings: Mapping[str, Any], control: str) -> None:
        self.logger.experiment.set_tag(self.logger.run_id, "depthcb_control", control)

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        from depthcb.curves import curves_image, heatmap_image  # lazy: everything else works without matplotlib

        for key, picture in (("heatmap", heatmap_image(by_measure)), ("curves", curves_image(by_measure))):
            self.logger.experiment.log_image(self.logger.run_id, picture, key=f"{name}/{key}", step=step)

    def units(self, name: str, grid: UnitGrid, step: int) -> None:
        from depthcb.curves import units_image

        self.logger.experiment.log_image(self.logger.run_id, units_image(grid, step), key=f"{name}/units", step=step)

    def sites(self, name: str, latest: Mapping[str, Profile], step: int) -> None:
        from depthcb.curves import sites_image

        self.logger.experiment.log_image(self.logger.run_id, sites_image(latest), key=f"{name}/sites", step=step)
