"""What a Weights & Biases run is given beside the scalars: its configuration, and pictures of the profiles.

Scalars travel in Lightning's own row of the validation. The pictures follow as one row with the same
``trainer/global_step``, committed at once: an image of layer x validation, and a panel with the curves of all
validations.
No tables: each makes an artifact, which blocks training and is lost when an offline run is synced without its staging
folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import wandb

from depthcb.profile import Profile
from depthcb.run import plain

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


def pictures(name: str, by_measure: Mapping[str, Sequence[Profile]]) -> dict[str, Any]:
    """The pictures of a row.

    Args:
        name: First part of the keys.
        by_measure: The profiles so far of each measure, oldest first.

    Returns:
        ``<name>/heatmap``, a `wandb.Image` of layer x validation, and ``<name>/curves``, a `wandb.Html` with the curves
        of all validations, the last one emphasised.
    """
    from depthcb.report.curves import curves_page, heatmap_image  # not above: the rest works without matplotlib

    return {
        f"{name}/heatmap": wandb.Image(heatmap_image(by_measure), file_type="png"),
        f"{name}/curves": wandb.Html(curves_page(by_measure), inject=False),
    }


def configure(run: Run, name: str, settings: Mapping[str, Any], control: str) -> None:
    """Puts what a callback measures by, or does, into the run's configuration.

    Args:
        run: The run.
        name: The callback's name: its settings become ``depthcb.<name>``, its layers by the index in the logged keys.
        settings: As the callback's record has them.
        control: ``"standard"`` or ``"equal-step"``: becomes ``depthcb_control``, by which runs can be grouped.
    """
    layers = {f"L{i:02d}": layer for i, layer in enumerate(settings["layers"])}
    config: Any = run.config
    ours = dict(config.get("depthcb") or {}) | {name: plain(settings) | {"layers": layers}}
    config.update({"depthcb": ours, "depthcb_control": control}, allow_val_change=True)
