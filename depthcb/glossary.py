"""What the columns and verdicts of a report mean; a measure brings its own words."""

from __future__ import annotations

_HALVES = "over random halves of the probe: it covers which rows the probe happened to hold, not training seeds."
#: By the titles of a report's columns.
RUN_COLUMNS = {
    "layer": "Position in the stack, 0 at the input side, and the module's name.",
    "step ratio": "Length of the optimizer's step over the length of the layer's weights, ‖ΔW‖ / ‖W‖, mean over the "
    "logged steps. No unit.",
    "effective rank": "How many directions of the layer's activations CKA really sees. Below 5 (marked !) its change "
    "rests on a handful of them. Unit: directions.",
    "run": "Folder of the run.",
    "control": "standard: the optimizer's own steps. equal-step: the same relative step in every layer.",
    "measure": "What the change is measured by, at the last validation.",
    "slope": "Locality gradient: least-squares slope of change on relative depth. Unit: change per whole depth, input "
    "to output side.",
    "95 % interval": f"Of the slope, {_HALVES}",
    "relative slope": "Slope over mean change. Unit: mean changes per whole depth.",
    "95 % interval, relative": f"Of the relative slope, {_HALVES}",
    "Spearman": "Rank correlation of change with depth, from -1 to 1.",
    "centre": "Centre of mass of the change in relative depth: 0 is the input side, 1 the output side.",
    "width": "How many layers share the change: 1 if all do equally, 1/L if a single one of L does.",
    "mean": "Mean change over the layers. Unit: the measure's.",
    "null relative slope": "Relative slope after random noise of the same size was added to the pretrained weights "
    "instead of training, mean over seeds. A run with no more slope than this shows nothing about training.",
}
VERDICTS = {
    "none": "The standard run shows no slope that could be explained.",
    "collapses": "With equal steps in every layer the slope is not distinguishable from 0.",
    "reverses": "With equal steps in every layer the slope has the opposite sign.",
    "weakens": "With equal steps in every layer part of the slope remains.",
    "persists": "With equal steps in every layer the slope stays.",
}
RATIO_UNIT = "‖ΔW‖ / ‖W‖ per step"
#: A layer whose effective rank is lower than this has a change that rests on a handful of directions [ours].
LOW_RANK = 5.0
