"""``depthcb study compare-paper``: what the paper reports beside what a study found, and how their methods differ.

The marks are those of docs/method.md: [paper] is its abstract, [second-hand] are public summaries of its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from depthcb.style import show_interval
from depthcb_recipes.studies.claims import claims, within_models
from depthcb_recipes.studies.grid import RunConfig, measures_of
from depthcb_recipes.studies.page import claim_lines
from depthcb_recipes.studies.runner import configuration
from depthcb_recipes.studies.tables import CELL, cells_table

#: What the paper reports, by claim.
REPORTS = {
    "C1": "189 of 190 standard runs have a positive slope [second-hand]; all but one change most near the output "
    "[paper].",
    "C2": "At 125M-350M under equal step, sequential blocks (BERT, OPT, GPT-2) keep the slope across objectives, "
    "parallel blocks (Pythia, CodeGen) only for causal language modelling [paper]; contrastive collapses in them "
    "[second-hand].",
    "C3": "At 1.3B-1.4B the distinction narrows [paper]; contrastive was not run there under equal step [second-hand].",
    "C4": "Steepness tracks the distance between objectives at initialisation [paper]; the rank correlation is high "
    "over all and not significant for some models, such as CodeGen [second-hand].",
    "C5": "The width of the profile is dominated by the architecture [paper]; sequential blocks put nearly all change "
    "into the last layers, parallel blocks and encoders are wider [second-hand].",
}
#: What the paper itself says it does not show [second-hand].
LIMITS = (
    "The control equalises steps in parameter space, not their influence on the function.",
    "Parallel blocks are of two families only.",
    "All text is Wikipedia's.",
    "There are no instruction-tuned, RLHF or multimodal models.",
    "Nothing follows on where to place trainable layers.",
)


@dataclass(frozen=True)
class Difference:
    """One point of method.

    Args:
        what: What it is about.
        paper: What the paper does, with its mark; "not known" where nothing at hand says it.
        here: What this study does.
        same: Whether the two agree; None where that is not known.
    """

    what: str
    paper: str
    here: str
    same: bool | None


def comparison(runs: pd.DataFrame, configs: Sequence[RunConfig], deciding: str | None = None) -> Iterator[str]:
    """Yields the lines of the comparison.

    Args:
        runs: `runs_table` of the study's results.
        configs: All runs of the study.
        deciding: The measure that decides; None for the first one.
    """
    for optimizer, own in runs.groupby("optimizer", sort=False):
        yield f"Claims, {optimizer}, {len(own)} finished runs"
        for claim in claims(own):
            yield ""
            yield f"{claim.name} paper: {REPORTS[claim.name]}"
            first, *rest = claim_lines(claim)
            yield f"   here: {first.partition(' ')[2]}"
            yield from rest
            yield from (f"   {line}" for line in _more(claim.name, own))
        yield ""
    yield "Limits that the paper states [second-hand], and this study"
    yield from (f"   {limit} {here}" for limit, here in zip(LIMITS, _limits(runs, configs), strict=True))
    yield ""
    yield "Method"
    words = {True: "same", False: "differs", None: "not known"}
    for each in differences(configs, deciding):
        yield f"   {words[each.same]}: {each.what}. Paper: {each.paper}. Here: {each.here}."


def _more(name: str, runs: pd.DataFrame) -> Iterator[str]:
    """Yields the figures that stand beside the paper's own, where `claims` has none of that form."""
    if name == "C1":
        standard = runs[(runs["control"] == "standard") & runs["relative_slope"].notna()]
        positive, total = int((standard["relative_slope"] > 0).sum()), len(standard)
        if total:
            low, high = stats.binomtest(positive, total).proportion_ci(0.95)
            here = f"{positive} of {total} standard runs, {positive / total:.3f}{show_interval((low, high))}"
            yield f"{here} if runs were independent; the paper's 189 of 190 is 0.995"
    if name == "C4":
        measured = runs[(runs["control"] == "standard") & runs["distance_procrustes"].notna()]
        by_cell = measured.groupby(CELL)["distance_procrustes"].mean().rename("distance")
        found = within_models(cells_table(runs).drop(columns="distance").merge(by_cell.reset_index(), on=CELL))
        if found is not None:
            yield f"by the Procrustes distance, not corrected for noise: {found[0]:+.2f}, p = {found[1]:.3g}"


def _limits(runs: pd.DataFrame, configs: Sequence[RunConfig]) -> list[str]:
    """Says for each of `LIMITS` whether this study goes further."""
    parallel = sorted(runs[runs["block"] == "parallel"]["model"].map(lambda name: Path(name).name).unique())
    return [
        "This study: the same control.",
        f"This study: {', '.join(parallel) or 'none'}.",
        f"This study: {_text(configs)}.",
        "This study: those that its models are.",
        "This study: nor here.",
    ]


def differences(configs: Sequence[RunConfig], deciding: str | None = None) -> list[Difference]:
    """Compares a study's method with what is known of the paper's.

    Args:
        configs: The study's runs.
        deciding: The measure that decides; None for the first one.
    """
    standard = sum(config.control == "standard" for config in configs)
    optimizers, seeds = sorted({c.optimizer for c in configs}), sorted({c.seed for c in configs})
    objectives = sorted({c.objective for c in configs})
    measures = list(dict.fromkeys(m for c in configs for m in measures_of(c)))
    probes = _values(configs, _probe)
    pairs = _values([c for c in configs if c.objective == "contrastive"], _contrastive)
    steps = _values(configs, lambda o: f"{o['trainer'].get('max_steps')} steps")
    distances = _values(configs, _distance)
    models = len({c.model for c in configs})
    return [
        Difference("runs", "190 standard [second-hand] and about 50 equal-step of 240 [paper]",
                   f"{standard} standard and {len(configs) - standard} equal-step",
                   (standard, len(configs)) == (190, 240)),
        Difference("models", "15 of four families, 125M to 6.9B [paper]; the full list is not known",
                   f"{models} models", None if models == 15 else False),
        Difference("objectives", "four: causal LM, sequence and token classification, contrastive [paper: four]",
                   ", ".join(objectives), len(objectives) == 4),
        Difference("measures", "Procrustes distance and linear CKA [second-hand]",
                   f"{', '.join(measures)}; {deciding or measures[0]} decides; CKA debiased [ours]",
                   {"procrustes", "cka"} <= set(measures)),
        Difference("probe", "290 fixed inputs, the same for all models [second-hand]", "; ".join(probes),
                   all(probe.startswith("290 fixed texts") for probe in probes)),
        Difference("text", "Wikipedia, fine-tuned and evaluated on [second-hand]", _text(configs),
                   None if "wiki" in _text(configs) else False),
        Difference("contrastive", "SimCSE [second-hand]", "; ".join(pairs) or "not in this study",
                   all(pair.startswith("SimCSE") for pair in pairs) if pairs else False),
        Difference("optimizer", "AdamW [second-hand]", ", ".join(optimizers), optimizers == ["adamw"]),
        Difference("control", "a trust ratio per layer after the optimizer's step, direction kept [second-hand]",
                   "the same, to the mean ratio of the layers [ours: which target]", None),
        Difference("budget", "encoders have one of their own in epochs [second-hand]; its size is not known",
                   "; ".join(steps), None if len(steps) > 1 else False),
        Difference("seeds", "not known", f"{len(seeds)}", None),
        Difference("learning rate, schedule, epochs", "not known",
                   "; ".join(_values(configs, lambda o: f"lr {o['model']['init_args']['lr']:g}")), None),
        Difference("objective distance", "Procrustes or cosine distance of gradients at initialisation [second-hand]",
                   "; ".join(distances), None),
        Difference("slope and width", "standardised curves [second-hand]; the formulas are not known",
                   "least squares on relative depth over the mean change; participation ratio [ours]", None),
        Difference("inference", "not known", "cells of model x objective, exact and t tests, undecided where the runs "
                   "cannot carry a word, and a null of random changes of the same size [ours]", None),
    ]  # fmt: skip


def _values(configs: Sequence[RunConfig], of: Any) -> list[str]:
    """Returns the distinct values of a function of a run's whole configuration, in the runs' order."""
    unique = {(c.objective, c.optimizer, repr(sorted(c.options.items(), key=str))): c for c in configs}
    return list(dict.fromkeys(of(configuration(c, Path())) for c in unique.values()))


def _probe(options: Mapping[str, Any]) -> str:
    probe = options.get("probe")
    if probe:
        return f"{probe.get('rows', 290)} fixed texts of {Path(probe['dataset']).name}, the same for all models"
    watch = next(c for c in options["trainer"]["callbacks"] if c["class_path"].endswith("DepthProfile"))
    rows = watch.get("init_args", {}).get("probe_rows", 256)
    return f"{rows} rows of each objective's own validation set, which differ between models"


def _contrastive(options: Mapping[str, Any]) -> str:
    own = options["data"]["init_args"]
    if own.get("second", "second") is not None:
        return "pairs of a docstring and its function" if own.get("dataset", "python") == "python" else "pairs of texts"
    return f"SimCSE, dropout {options['model']['init_args'].get('dropout', 0)} where a network has none"


def _distance(options: Mapping[str, Any]) -> str:
    for callback in options["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ObjectiveDistanceMonitor"):
            both = callback.get("init_args", {}).get("procrustes", False)
            return "1 - cos, corrected for batch noise [ours]" + (" and Procrustes, uncorrected" if both else "")
    return "not measured"


def _text(configs: Sequence[RunConfig]) -> str:
    sets = _values(configs, lambda o: o["data"]["init_args"].get("dataset", "python"))
    return ", ".join("the Python library" if name == "python" else Path(name).name for name in sets)
