"""One self-contained page."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from depthcb.report.charts import heatmaps, profile_chart, training_chart
from depthcb.report.summary import (
    MEASURES,
    MISSING,
    Arm,
    Pair,
    Summary,
    arm_line,
    context,
    headline,
    layer_rows,
    read_pairs,
    show,
    show_interval,
)

_MEANINGS = {
    "none": "The standard run shows no slope that could be explained.",
    "collapses": "With equal steps in every layer the slope is not told from 0.",
    "reverses": "With equal steps in every layer the slope has the opposite sign.",
    "weakens": "With equal steps in every layer part of the slope remains.",
    "persists": "With equal steps in every layer the slope stays.",
}
_CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}

_HALVES = "over random halves of the probe: it covers which rows the probe happened to hold, not training seeds."
_DEFINITIONS = {
    "layer": "Position in the stack, 0 at the input side, and the module's name.",
    "change": "1 - linear CKA of the layer's activations on the probe, pretrained model against now. 0 is unchanged, "
    "about 1 unrelated. No unit.",
    "normalised change": "The change after every row is centred and scaled to length 1, so that one large direction "
    "cannot rule it. No unit.",
    "step ratio": "Length of the optimizer's step over the length of the layer's weights, mean over the fit. No unit.",
    "effective rank": "How many directions of the layer's activations CKA really sees. Below 5 (marked !) its change "
    "rests on a handful of them. Unit: directions.",
    "arm": "Optimizer and control of the run.",
    "measure": "Plain or normalised change, at the last validation.",
    "slope": "Least-squares slope of change on relative depth. Unit: change per whole depth, input to output side.",
    "95 % interval": f"Of the slope, {_HALVES}",
    "relative slope": "Slope over mean change. Unit: mean changes per whole depth.",
    "95 % interval, relative": f"Of the relative slope, {_HALVES}",
    "Spearman": "Rank correlation of change with depth, from -1 to 1.",
    "centre": "Centre of mass of the change in relative depth: 0 is the input side, 1 the output side.",
    "width": "How many layers share the change: 1 if all do alike, 1/L if a single one of L does.",
    "null relative slope": "Relative slope after random noise of the same size was added to the pretrained weights "
    "instead of training, mean over seeds. A run with no more slope than this shows nothing about training.",
}
# No request can leave the page, whatever a script in it may try; plotly needs inline scripts, styles and data images.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1b1b1b; --soft: #595959; --line: #d9d9d9; --card: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --back: #111111; --ink: #e8e8e8; --soft: #a8a8a8; --line: #383838; --card: #1c1c1c; } }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p.soft, caption { color: var(--soft); }
.verdict { background: var(--card); border-left: 4px solid #0072B2; padding: .6rem 1rem; margin: 1rem 0; }
.verdict h3 { margin: 0 0 .3rem; } .verdict ul { margin: .3rem 0; padding-left: 1.2rem; }
.wide { overflow: auto; margin-bottom: 1.2rem; } .wide > div { min-width: 820px; } .tall { max-height: 34rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); vertical-align: bottom; white-space: normal; }
th[title] { text-decoration: underline dotted; cursor: help; }
th.text, td.text { text-align: left; } caption { text-align: left; padding: .3rem 0; }
.js-plotly-plot svg text:not(.hoverlayer *) { fill: var(--ink) !important; }
.js-plotly-plot .spikeline { stroke: var(--soft) !important; stroke-width: 1px !important; }
.js-plotly-plot .gridlayer path { stroke: var(--line) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { fill: var(--card) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { stroke: var(--soft) !important; }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important; }
"""


def write_html(summary: Summary, path: str | Path) -> None:
    """Writes one page that holds everything, the summary included, and asks the network for nothing.

    Args:
        summary: What the demo writes to ``summary.json``; `read_summary` gives it back.
        path: The file; its folder must exist.
    """
    title = html.escape(f"Depth profile of {summary.get('backbone')}")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    # No "<" at all: a script element ends at "</script", but "<!--" would change where the browser looks for it.
    data = json.dumps(summary).replace("<", "\\u003c")
    origin = html.escape(f"depthcb {summary.get('depthcb')}, {summary.get('created')}")
    body = "\n".join([f'<h1>{title}</h1><p class="soft">{origin}</p>', *_sections(summary)])
    page = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        f'<script type="application/json" id="depthcb-summary">{data}</script>\n'
        f"<main>{body}</main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary that `write_html` put into a page (as JSON has it: tuples come back as lists).

    Raises:
        ValueError: The page carries none.
    """
    page = Path(path).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="depthcb-summary">([^<]*)</script>', page)
    if found is None:
        raise ValueError(f"{path} is not a depthcb report: no embedded summary was found in it.")
    summary: dict[str, Any] = json.loads(found[1])
    return summary


def _sections(summary: Summary) -> list[str]:
    pairs, layers = read_pairs(summary), list(summary.get("layers") or ())
    charts = _Charts()
    verdicts = "".join(map(_verdict_card, pairs)) or "<p>No arm was started.</p>"
    optimizers = [_optimizer_section(pair, layers, summary, charts) for pair in pairs]
    facts = ("settings", "versions", "corpus")
    tables = "".join(_facts_table(name, summary.get(name) or {}) for name in facts) + _times_table(summary)
    return [
        f"<h2>Verdict</h2>{verdicts}",
        *optimizers,
        f"<h2>Slopes at the last validation</h2>{_slopes_table(pairs)}",
        f"<h2>Settings and provenance</h2>{tables}",
    ]


class _Charts:
    """Turns plotly figures into page fragments; the first one brings the library."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, fig: go.Figure, title: str) -> str:
        self.count += 1
        config = _CONFIG | {"toImageButtonOptions": {"filename": f"depthcb-{self.count}", "scale": 2}}
        options = {"include_plotlyjs": self.count == 1, "full_html": False, "validate": False}
        chart = plotly.io.to_html(fig, config=config, div_id=f"chart-{self.count}", **options)
        return f'<h3>{html.escape(title)}</h3><div class="wide">{chart}</div>'


def _verdict_card(pair: Pair) -> str:
    meaning = _MEANINGS.get(str(pair.verdict["verdict"]), "") if pair.verdict else ""
    lines = [*context(pair), *(arm_line(pair, arm) for arm in pair.arms)]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines if line)
    return f'<div class="verdict"><h3>{html.escape(headline(pair))}</h3>{html.escape(meaning)}<ul>{items}</ul></div>'


def _optimizer_section(pair: Pair, layers: Sequence[str], summary: Summary, charts: _Charts) -> str:
    parts = [f"<h2>{html.escape(pair.title)}</h2>"]
    if pair.measured:
        note = "The axes rescale with the slider, so that each shape can be seen; the colours below do not."
        parts += [charts(profile_chart(pair, layers), "Depth profile, with 95 % band"), f'<p class="soft">{note}</p>']
        parts += [charts(heatmaps(pair, layers), "Change of each layer over training")]
    else:
        parts += ["<p>No depth profile was measured.</p>"]
    if any(arm.step_ratio or arm.val_loss for arm in pair.arms):
        parts += [charts(training_chart(pair, layers), "Step ratios and loss")]
    return "".join([*parts, "<h3>Layers</h3>", _layers_table(pair, layers, summary.get("effective_rank"))])


def _table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], text: int = 1, caption: str = "") -> str:
    """A table whose first ``text`` columns hold words; ``head`` pairs each title with a name in the definitions."""

    def cell(tag: str, i: int, content: str, hover: str = "") -> str:
        marks = (' class="text"' if i < text else "") + (f' title="{html.escape(hover)}"' if hover else "")
        return f"<{tag}{marks}>{html.escape(content)}</{tag}>"

    top = "".join(cell("th", i, title, _DEFINITIONS.get(name, "")) for i, (title, name) in enumerate(head))
    lines = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    named = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide tall"><table>{named}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _layers_table(pair: Pair, layers: Sequence[str], ranks: Sequence[float] | None) -> str:
    paired = [(f"{name}, {arm.name}", name) for name in (*MEASURES.values(), "step ratio") for arm in pair.arms]
    head = [("", ""), ("layer", "layer"), *paired, ("effective rank", "effective rank")]
    return _table(head, layer_rows(pair, layers, ranks), text=2)


def _slopes_table(pairs: Sequence[Pair]) -> str:
    names = [name for name in _DEFINITIONS if list(_DEFINITIONS).index(name) >= list(_DEFINITIONS).index("arm")]
    rows = [_slope_row(pair, arm, measure) for pair in pairs for arm in pair.arms for measure in MEASURES]
    return _table([(name, name) for name in names], rows, text=2)


def _slope_row(pair: Pair, arm: Arm, measure: str) -> list[str]:
    start, p = [f"{pair.title} {arm.label}", MEASURES[measure]], arm.last(measure)
    if p is None:
        return [start[0], f"{start[1]}: not measured", *[MISSING] * 8]
    null = pair.null_slope(arm) if measure == "cka" else arm.null_relative_slope(measure)
    signed = [show(v, "+.3g") for v in (p.slope, p.relative_slope, p.spearman, null)]
    intervals = [show_interval(i).strip() or MISSING for i in (p.slope_interval, p.relative_slope_interval)]
    shape = [show(p.centre), show(p.width)]
    return [*start, signed[0], intervals[0], signed[1], intervals[1], signed[2], *shape, signed[3]]


def _facts_table(name: str, facts: Summary) -> str:
    return _table([(name, ""), ("value", "")], [[str(key), str(value)] for key, value in facts.items()], text=2)


def _times_table(summary: Summary) -> str:
    names = ("run_dir", "finished", "seconds", "probe_seconds")
    head = [("arm", "arm"), ("folder", ""), ("finished", ""), ("seconds", ""), ("of which probe, seconds", "")]
    rows = [[str(a.get("name")), *(str(a.get(n, MISSING)) for n in names)] for a in summary.get("arms") or ()]
    return _table(head, rows, text=3)
