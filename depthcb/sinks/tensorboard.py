"""TensorBoard: plots in addition to scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import TensorBoardLogger

from depthcb.profile import Profile
from depthcb.sinks.base import LoggerSink, register
from depthcb.unit_grid import UnitGrid


@register(TensorBoardLogger)
class TensorBoardSink(LoggerSink):
    """Logs the images ``<name>/heatmap``, ``<name>/curves`` and ``<name>/units``."""

    draws = True

    def pictures(self, name: str, by_measure: Mapping[str, Sequence[Profile]], step: int) -> None:
        from depthcb.curves import curves_image, heatmap_image  # lazy: everything else works without matplotlib

        for key, picture in (("heatmap", heatmap_image(by_measure)), ("curves", curves_image(by_measure))):
            self.logger.experiment.add_image(f"{name}/{key}", picture, step, dataformats="HWC")

    def units(self, name: str, grid: UnitGrid, step: int) -> None:
        from depthcb.curves import units_image

        self.logger.experiment.add_image(f"{name}/units", units_image(grid, step), step, dataformats="HWC")

    def sites(self, name: str, latest: Mapping[str, Profile], step: int) -> None:
        from depthcb.curves import sites_image

        self.logger.experiment.add_image(f"{name}/sites", sites_image(latest), step, dataformats="HWC")
