"""What every number is called, its unit and its definition: the words that reports, notebooks and W&B share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A measure's words.

    Args:
        title: What it is called.
        unit: The label of an axis that shows it.
        definition: What it is, estimator included.
    """

    title: str
    unit: str
    definition: str


#: By the names in `depthcb.similarity.MEASURES`.
MEASURES = {
    "cka": Term(
        "change",
        "1 - CKA  (0 = unchanged)",
        "1 - linear CKA of the layer's activations on the probe, pretrained model against now, debiased (U-centred "
        "Grams of all rows at once). 0 is unchanged, about 1 unrelated. No unit.",
    ),
    "cka_normalized": Term(
        "normalised change",
        "1 - CKA, rows normalised",
        "The same after every row is centred and scaled to length 1, so that one large direction cannot rule it. "
        "No unit.",
    ),
    "cosine": Term(
        "cosine change",
        "1 - cosine  (0 = unchanged)",
        "1 - cosine of a row before and now, mean over the rows. 0 is unchanged, 1 orthogonal. No unit.",
    ),
    "relative_l2": Term(
        "relative L2 change",
        "‖ΔH‖ / ‖H‖",
        "Distance of the activations before and now over their length before. No unit.",
    ),
    "procrustes": Term(
        "Procrustes change",
        "Procrustes change  (0 = unchanged)",
        "What no rotation explains of the move: halved squared distance of the activations, centred and scaled to "
        "length 1, after the best rotation. 0 is unchanged, 1 the most. No unit.",
    ),
}
_HALVES = "over random halves of the probe: it covers which rows the probe happened to hold, not training seeds."
#: By the titles of a report's columns.
COLUMNS = {
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
    "width": "How many layers share the change: 1 if all do alike, 1/L if a single one of L does.",
    "mean": "Mean change over the layers. Unit: the measure's.",
    "null relative slope": "Relative slope after random noise of the same size was added to the pretrained weights "
    "instead of training, mean over seeds. A run with no more slope than this shows nothing about training.",
}
VERDICTS = {
    "none": "The standard run shows no slope that could be explained.",
    "collapses": "With equal steps in every layer the slope is not told from 0.",
    "reverses": "With equal steps in every layer the slope has the opposite sign.",
    "weakens": "With equal steps in every layer part of the slope remains.",
    "persists": "With equal steps in every layer the slope stays.",
}
RATIO_UNIT = "‖ΔW‖ / ‖W‖ per step"
#: A layer whose effective rank is lower than this has a change that rests on a handful of directions [ours].
LOW_RANK = 5.0
