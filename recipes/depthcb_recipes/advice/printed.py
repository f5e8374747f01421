"""Proposals and their test in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthcb.advice import Proposal, sizes
from depthcb.advice_formats import frozen, layers_argument, lora_config, schedule
from depthcb.run import Run
from depthcb.style import printable
from depthcb_recipes.advice.arms import MODES
from depthcb_recipes.advice.trained import Trained

#: What is said of every list of proposals.
NO_RULE = (
    "These are proposals, not advice to trust: a slope of change is no placement rule. The same command with "
    "--test trains them."
)


def print_proposals(run: Run, found: Sequence[Proposal], share: float, console: Console) -> None:
    """Prints a table of the rules, what is missing, and each set of layers in the form that each ecosystem takes."""
    parameters = sizes(run)
    total = sum(parameters)
    console.print(_text(f"{run.name}: {len(parameters)} layers of {total:,} parameters; budget {100 * share:g} %"))
    table = Table(box=SIMPLE_HEAD)
    for title in ("rule", "needs", "layers", "share"):
        table.add_column(title)
    for proposal in found:
        rule, sets = proposal.rule, proposal.sets or ((),)
        chosen = "; ".join(_shown(own) for own in sets)
        shares = ", ".join(dict.fromkeys(f"{sum(parameters[i] for i in own) / total:.1%}" for own in sets))
        table.add_row(rule.name, rule.cost, *(("-", "-") if proposal.missing else (chosen, shares)))
    console.print(table)
    for proposal in found:
        if proposal.missing:
            console.print(_text(f"{proposal.rule.name}: {proposal.missing}."), soft_wrap=True)
    for own, names in _by_set(found).items():
        _print_set(run, own, names, console)
    console.print(_text(NO_RULE), soft_wrap=True)


def _print_set(run: Run, own: Sequence[int], rules: Sequence[str], console: Console) -> None:
    """Prints one set of layers in all forms."""
    depth = run.record("DepthProfile")
    assert depth is not None
    console.print(_text(f"\nlayers {_shown(own)} ({', '.join(rules)})", "bold"), soft_wrap=True)
    lines = schedule(run.layers, own).splitlines()
    for title, text in (
        ("peft", lora_config(run.layers, own, depth.settings["linear"])),
        ("freeze", ", ".join(frozen(run.layers, own)) or "nothing"),
        ("layers=", repr(layers_argument(run.layers, own))),
        ("finetuning-scheduler", lines[0]),
        *(("", line) for line in lines[1:]),
    ):
        console.print(_text(f"  {title:21}{text}"), soft_wrap=True)


def _by_set(found: Sequence[Proposal]) -> dict[tuple[int, ...], list[str]]:
    """Returns the rules by the set that they choose."""
    rules: dict[tuple[int, ...], list[str]] = {}
    for proposal in found:
        for own in dict.fromkeys(proposal.sets):
            rules.setdefault(own, []).append(proposal.rule.name)
    return rules


def print_trained(tables: Sequence[Trained], console: Console) -> None:
    """Prints one table per mode, with its conclusion."""
    for trained in tables:
        title = f"\nTrained: {MODES[trained.mode]}, {len(trained.seeds)} seeds"
        lacking = f"; {trained.missing} trainings have no figures, and their seeds are left out" * bool(trained.missing)
        console.print(_text(title + lacking, "bold"), soft_wrap=True)
        console.print(_table(trained))
        console.print(_text(str(trained.conclusion)), soft_wrap=True)
    console.print(
        _text(
            "Loss: validation loss at the end, nats. Differences are paired by seed, with intervals that hold at 95 % "
            "for all rules of a table together; below 0 is better. Seconds and GB: medians of a training."
        ),
        soft_wrap=True,
    )


def _table(trained: Trained) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for title in ("rule", "needs", "layers", "trained", "loss", "minus random", "minus last k", "seconds", "GB"):
        table.add_column(title, justify="left" if title in ("rule", "needs", "layers") else "right", no_wrap=True)
    compared = {c.rule: (str(c.random), str(c.last)) for c in trained.conclusion.comparisons}
    for row in trained.rows:
        chosen = _shown(row.sets[0]) if len(row.sets) == 1 else f"{len(row.sets)} sets"
        differences = compared.get(row.rule, ("", ""))
        table.add_row(
            row.rule, row.cost, chosen, f"{row.parameters:,.0f}", f"{row.loss:.4f}", *differences, f"{row.seconds:.1f}",
            f"{row.memory / 1e9:.2f}",
        )  # fmt: skip
    return table


def _shown(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)
