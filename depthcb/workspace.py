"""The W&B workspace view of depth profiles that ``depthcb workspace`` saves."""

from __future__ import annotations

import wandb_workspaces.workspaces as ws
from pydantic import TypeAdapter
from wandb_workspaces.reports.v2 import BarPlot, Layout, LinePlot, MediaBrowser  # type: ignore[attr-defined]  # a star import

from depthcb.glossary import RATIO_UNIT
from depthcb.similarity import MEASURES

NAME = "Depth profiles"
STEP = "trainer/global_step"


def workspace(entity: str, project: str) -> ws.Workspace:
    """Builds the view: plots and slopes, then layers, then step ratios; grouped by standard and equal-step runs.

    Panels match the keys that `DepthProfile`, `EqualStep` and `UpdateRatioMonitor` log under their default names by
    regular expression, so the view works for any number of layers.

    Args:
        entity: The W&B user or team.
        project: The W&B project.
    """
    curves = [
        MediaBrowser(
            title=title, media_keys=[f"depth/{key}"], mode="gallery", gallery_axis="step", layout=Layout(w=12, h=12)
        )
        for key, title in (("curves", "Depth profile"), ("heatmap", "Layer x validation"))
    ]
    slopes = [_lines("Slope", rf"^depth/({'|'.join(MEASURES)})/slope$", "change per whole depth", width=24)]
    layers = [
        _lines(f"{term.title} of each layer", rf"^depth/{name}/L\d+$", term.unit)
        for name, term in MEASURES.items()
        if name in ("cka", "cka_normalized")
    ]
    shape = [_lines(name, rf"^depth/\w+/{name}$", "") for name in ("relative_slope", "width", "centre", "mean")]
    ratios = [
        _lines("Step ratio of each layer", r"^update_ratio/L\d+$", RATIO_UNIT, log=True),
        _lines("Spread of the step ratios (max / min)", r"^(update_ratio|equal_step)/spread$", "", log=True),
        _lines("Equal-step: what the optimizer wanted", r"^equal_step/ratio/L\d+$", RATIO_UNIT, log=True),
        _lines("Equal-step: what each layer got", r"^equal_step/realised/L\d+$", RATIO_UNIT, log=True),
    ]
    study = [
        BarPlot(title=title, metrics=[f"study/{key}"], layout=Layout(w=12, h=10))
        for key, title in (
            ("slope", "Relative slope of the standard runs"),
            ("share", "Share of the slope left under equal step"),
        )
    ]
    sections = [
        ws.Section("Depth profiles", panels=[*curves, *slopes], is_open=True),
        ws.Section("Change of each layer", panels=layers, is_open=True),
        ws.Section("Step ratios", panels=ratios, is_open=True),
        ws.Section("Shape of the profile", panels=shape),
        ws.Section("Studies: one run per model and objective", panels=study),
    ]
    grouped = ws.RunsetSettings(groupby=[ws.Config("depthcb_control")])
    return ws.Workspace(entity, project, NAME, sections, ws.WorkspaceSettings(x_axis=STEP), grouped)


def specification(entity: str, project: str) -> str:
    """Returns the view as JSON, without contacting a server."""
    return TypeAdapter(ws.Workspace).dump_json(workspace(entity, project), indent=1).decode()


def save(entity: str, project: str) -> str:
    """Saves the view in an existing project.

    Returns:
        The URL of the view.

    Raises:
        ValueError: The server rejected the view, for example because of a missing login or project.
    """
    try:
        return str(workspace(entity, project).save().url)  # type: ignore[no-untyped-call]
    except Exception as error:  # requests, wandb and GraphQL each raise their own exceptions
        raise ValueError(
            f"the view was not saved in {entity}/{project} ({' '.join(str(error).split())}): log in with "
            "`wandb login`, and use a project that exists."
        ) from error


def _lines(title: str, regex: str, unit: str, log: bool = False, width: int = 12) -> LinePlot:
    """Returns a line plot over steps of all metrics that match ``regex``."""
    return LinePlot(
        title=title, x=STEP, metric_regex=regex, log_y=log, title_y=unit or None, layout=Layout(w=width, h=10)
    )
