"""Which measure decides a study's tables and claims, and whether the others agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from depthcb_recipes.studies.claims import claims
from depthcb_recipes.studies.page import all_cells
from depthcb_recipes.studies.result import Result
from depthcb_recipes.studies.tables import runs_table

_CELL = ["model", "objective", "optimizer"]


def tables_by_measure(results: Sequence[Result], deciding: str | None = None) -> dict[str, pd.DataFrame]:
    """Returns `runs_table` by each measure that all finished runs have, the deciding one first.

    Args:
        results: The runs' results.
        deciding: The measure that decides; None for the first one of the runs.

    Raises:
        ValueError: Not all finished runs have it.
    """
    measured = [list(result.figures.profiles) for result in results if result.figures is not None]
    if not measured:
        return {}
    shared = [m for m in measured[0] if all(m in each for each in measured)]
    if deciding is not None and deciding not in shared:
        raise ValueError(f"{deciding!r} was not measured in all runs: name one of {', '.join(shared)}.")
    first = deciding or shared[0]
    return {m: runs_table(results, m) for m in [first, *(m for m in shared if m != first)]}


def agreement_lines(tables: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """Yields which measure decided, and what each other one would say instead.

    Args:
        tables: What `tables_by_measure` gives.
    """
    (first, runs), *others = tables.items()
    yield f"Decided by {first}."
    words, verdicts = _words(runs), _verdicts(runs)
    for measure, other in others:
        apart = [f"{' '.join(cell)} {word} instead of {words[cell]}" for cell, word in _words(other).items()
                 if words.get(cell) != word]  # fmt: skip
        claimed = [f"{' '.join(claim)} {said} instead of {verdicts[claim]}" for claim, said in _verdicts(other).items()
                   if verdicts[claim] != said]  # fmt: skip
        same = f"the same in {len(words) - len(apart)} of {len(words)} cells and {len(verdicts) - len(claimed)} of"
        told = "; ".join([*claimed, *apart])
        yield f"By {measure}: {same} {len(verdicts)} claims{f': {told}' if told else ''}."


def _words(runs: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """Returns each cell's verdict, or whether it keeps its slope where there are too few seeds for one."""
    cells = all_cells(runs)
    told = cells["word"].where(~cells["word"].str.endswith("seeds"), cells["keeps"])
    return {tuple(map(str, cell)): word for cell, word in zip(cells[_CELL].to_numpy(), told, strict=True)}


def _verdicts(runs: pd.DataFrame) -> dict[tuple[str, ...], str]:
    found = {optimizer: claims(own) for optimizer, own in runs.groupby("optimizer", sort=False)}
    return {(str(optimizer), claim.name): claim.verdict for optimizer, own in found.items() for claim in own}
