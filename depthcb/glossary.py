"""Explanations of a report's columns and verdicts; each measure defines its own."""

from __future__ import annotations

_HALVES = "over random halves of the probe: it covers the choice of probe rows, not training seeds."
#: Explanations by column title.
RUN_COLUMNS = {
    "layer": "Position in the stack, counted from 0 at the input side, and the module's name.",
    "step ratio": "Norm of the optimizer's step divided by the norm of the layer's weights, ‖ΔW‖ / ‖W‖, averaged over "
    "the logged steps. A tensor that several layers share counts for the first of them. Dimensionless.",
    "matrix spread": "Largest divided by smallest step ratio of the matrices inside the layer, averaged over the "
    "logged steps. Steps that are equal in all layers can differ in it. Dimensionless.",
    "effective rank": "Number of directions of the layer's activations that CKA effectively sees. Below 5 (marked !) "
    "the layer's change rests on a few directions. Unit: directions.",
    "run": "Folder of the run.",
    "control": "standard: the optimizer's own steps. equal-step: the same relative step in every layer.",
    "measure": "The measure of change, at the last validation.",
    "slope": "Locality gradient: least-squares slope of change on relative depth. Unit: change over the whole depth, "
    "from input to output side.",
    "95 % interval": f"95 % interval of the slope {_HALVES}",
    "relative slope": "Slope divided by mean change. Unit: mean changes over the whole depth.",
    "95 % interval, relative": f"95 % interval of the relative slope {_HALVES}",
    "Spearman": "Rank correlation of change with depth, from -1 to 1.",
    "centre": "Centre of mass of the change in relative depth: 0 is the input side, 1 the output side.",
    "width": "Fraction of the layers that share the change: 1 if all L layers change equally, 1/L if only one changes.",
    "mean": "Mean change over the layers. Unit: that of the measure.",
    "null, same weight change": "Relative slope after adding random noise with the norm of each parameter's net change "
    "to the pretrained weights instead of training: mean and range over the draws.",
    "null, same change": "The same with the noise scaled until it changes the representations as much as training did. "
    "A run whose slope is no larger is no evidence about training.",
}
VERDICTS = {
    "undecided": "The pairs do not carry a word: more seeds would narrow the interval.",
    "emerges": "The standard runs show no slope; with equal steps in every layer there is one.",
    "no more than noise": "Random weight changes that change the representations as much have most of the slope.",
    "reverses": "With equal steps in every layer the slope has the opposite sign.",
    "collapses": "With equal steps in every layer less than a fifth of the slope is left.",
    "weakens": "With equal steps in every layer part of the slope is left.",
    "persists": "With equal steps in every layer the slope is about the same.",
    "strengthens": "With equal steps in every layer the slope is larger.",
}
RATIO_UNIT = "‖ΔW‖ / ‖W‖ per step"
#: Below this effective rank, a layer's change rests on a few directions [ours].
LOW_RANK = 5.0
