"""A self-contained HTML report on one or more runs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from depthcb.glossary import RUN_COLUMNS
from depthcb.plain import dumps, loads
from depthcb.report.charts import (
    MOST_VALUES,
    head_heatmaps,
    heatmaps,
    measured_steps,
    profile_chart,
    progress_chart,
    ratio_heatmaps,
    shape_chart,
    sites_chart,
    unit_heatmaps,
    worth_chart,
)
from depthcb.report.freezing import freezing_lines
from depthcb.report.groups import (
    UNRESOLVED_NOTE,
    Group,
    Replicates,
    context,
    definition_of,
    groups,
    has_unresolved,
    headline,
    label,
    last,
    layer_rows,
    replicates,
    run_line,
    show_draws,
    title_of,
    verdict_lines,
    worth_line,
)
from depthcb.report.panels import has_null, ratio_decades
from depthcb.report.plain_words import pair_sentence, verdict_sentence
from depthcb.run import NULLS, Run
from depthcb.site_names import is_head
from depthcb.style import MISSING, show, show_interval, thinned

#: Maximum number of rows of a record in a page's data, and size of the page in bytes.
MOST_ROWS, MOST_BYTES = 10_000, 9_500_000
_CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
_SLOPES = list(RUN_COLUMNS)[list(RUN_COLUMNS).index("run") :]
# Blocks all network requests from the page; plotly needs inline scripts, inline styles and data images.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
NULL_NOTE = (
    '<p class="soft">Change divided by its mean over the layers, whose slope is the relative slope. Dashed: noise on '
    "the pretrained weights, in random directions, of the size that changes the representations as much as training "
    "did (where that was measured); the band is the range over its draws.</p>"
)
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
.verdict p { margin: .3rem 0 0; font-weight: 600; }
.wide { overflow: auto; margin-bottom: 1.2rem; } .wide > div { min-width: 820px; } .tall { max-height: 34rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
.tall { scrollbar-gutter: stable; scrollbar-width: auto; scrollbar-color: var(--soft) var(--card); }
th { position: sticky; top: 0; background: var(--card); vertical-align: bottom; white-space: normal; }
th[title] { text-decoration: underline dotted; cursor: help; }
th.text, td.text { text-align: left; } tr.differs td { font-weight: 600; }
tr.differs td:first-child::after { content: " *"; }
.settings td { max-width: 30rem; overflow-wrap: anywhere; white-space: normal; }
.settings td:first-child { white-space: nowrap; }
caption { text-align: left; padding: .3rem 0; }
.js-plotly-plot svg text:not(.hoverlayer *) { fill: var(--ink) !important; }
.js-plotly-plot .spikeline { stroke: var(--soft) !important; stroke-width: 1px !important; }
.js-plotly-plot .gridlayer path { stroke: var(--line) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { fill: var(--card) !important; }
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-grip-rect { stroke: var(--soft) !important; }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important; }
"""


def write_html(runs: Sequence[Run], path: str | Path, title: str = "") -> None:
    """Writes a self-contained page that includes the runs' data and makes no network requests.

    Long runs are thinned to evenly spaced rows, which the page says, so that it stays below 10 MB: what the charts
    draw, and the rows of the data. The numbers in text and tables are those of all rows.

    Args:
        runs: The runs to show; `read_html` reads them back.
        path: The output file; its folder must exist.
        title: The page's title; defaults to the run's name or the number of runs.

    Example:
        >>> from depthcb.run import read_runs
        >>> write_html(read_runs("lightning_logs"), "depthcb-report.html")  # doctest: +SKIP
    """
    named = title or (f"Depth profile of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} depth profiles")
    sections = _sections(runs)
    data, note = _data(runs, MOST_BYTES - sum(len(section.encode()) for section in sections))
    html_page(named, [*sections, note], data, "depthcb-runs", path)


def html_page(title: str, sections: Sequence[str], data: Any, name: str, path: str | Path) -> None:
    """Writes a page that contains its data and cannot load anything else.

    Args:
        title: The page's title.
        sections: The page's sections, as HTML.
        data: JSON-serialisable data.
        name: The ``id`` of the element that contains the data.
        path: The output file.
    """
    title = html.escape(title)
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    # Escape every "<": "</script" would end the script element, and "<!--" would change where the browser looks for it.
    text = dumps(data).replace("<", "\\u003c")
    body = "\n".join([f"<h1>{title}</h1>", *sections])
    page = (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        f'<script type="application/json" id="{name}">{text}</script>\n'
        f"<main>{body}</main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def read_html(path: str | Path) -> list[Run]:
    """Reads the runs from a page written by `write_html`, in full precision; of long runs, the rows that it kept.

    Raises:
        ValueError: The page contains no runs.
    """
    page = Path(path).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="depthcb-runs">([^<]*)</script>', page)
    if found is None:
        raise ValueError(f"{path} is not a depthcb report: no runs were found in it.")
    return [Run.from_dict(fields) for fields in loads(found[1])]


def _data(runs: Sequence[Run], room: int) -> tuple[list[dict[str, Any]], str]:
    """Returns the runs as data of at most ``room`` bytes, with a note in HTML on the rows that were left out."""
    rows = max((len(record.rows) for run in runs for record in run.records.values()), default=0)
    most = min(rows, MOST_ROWS)
    while True:
        data = [_thinned(run, most).to_dict() for run in runs]
        size = len(dumps(data))
        if size <= room or most <= 2:
            break
        most = max(2, min(most - 1, most * room // size))
    left_out = f"This page's data have at most {most:,} evenly spaced rows of each record, of up to {rows:,}."
    return data, f'<p class="soft">{left_out} The records have them all.</p>' if most < rows else ""


def _thinned(run: Run, most: int) -> Run:
    """Returns a run with at most so many rows of each record; the draws of nulls are kept."""
    records = {
        name: record if record.callback in NULLS else replace(record, rows=tuple(thinned(record.rows, most)))
        for name, record in run.records.items()
    }
    return replace(run, records=records)


def _sections(runs: Sequence[Run]) -> list[str]:
    found, charts = groups(runs), Charts()
    span = ratio_decades(found)
    words = replicates(found)
    cards = "".join([*map(_verdict_card, words), *map(_group_card, found)]) or "<p>No run was started.</p>"
    return [
        f"<h2>{'Verdict' if words else 'Summary'}</h2>{cards}",
        *_freezing_section(runs),
        *(_group_section(group, charts, MOST_VALUES // len(found), span) for group in found),
        f"<h2>Slopes at the last validation</h2>{_slopes_table(found)}" if found else "",
        f"<h2>Settings and provenance</h2>{_settings_table(runs)}" if found else "",
    ]


def _freezing_section(runs: Sequence[Run]) -> list[str]:
    lines = freezing_lines(runs)
    return ["<h2>Layers frozen during the fit</h2>", _card("", lines, "")] if lines else []


class Charts:
    """Converts plotly figures to HTML fragments; the first one includes plotly.js."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, fig: go.Figure, title: str) -> str:
        self.count += 1
        config = _CONFIG | {"toImageButtonOptions": {"filename": f"depthcb-{self.count}", "scale": 2}}
        options = {"include_plotlyjs": self.count == 1, "full_html": False, "validate": False}
        chart = plotly.io.to_html(fig, config=config, div_id=f"chart-{self.count}", **options)
        return f'<h3>{html.escape(title)}</h3><div class="wide">{chart}</div>'


def _verdict_card(found: Replicates) -> str:
    title, *lines = verdict_lines(found)
    return _card(title, lines, verdict_sentence(found))


def _group_card(group: Group) -> str:
    title = "" if len(group.runs) == 1 else headline(group)  # the page's own title names a single run
    return _card(title, [*context(group), *(run_line(run, group) for run in group.runs)], pair_sentence(group))


def _card(title: str, lines: Sequence[str], closing: str) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    last = f"<p>{html.escape(closing)}</p>" if closing else ""
    return f'<div class="verdict">{heading}<ul>{items}</ul>{last}</div>'


def _group_section(group: Group, charts: Charts, values: int, span: tuple[int, int] | None) -> str:
    parts = [f"<h2>{html.escape('Profile' if len(group.runs) == 1 else group.title)}</h2>"]
    if group.measures:
        fig, steps = profile_chart(group, values), len(measured_steps(group))
        shown = len(fig.layout.sliders[0].steps)
        note = "The axes rescale with the slider to show each profile's shape; the heatmap colours below do not."
        if steps == 1:
            note = "The slider has a single step, because there is only one validation so far."
        elif shown < steps:
            note += f" Charts of long runs are thinned evenly: the slider has {shown:,} of {steps:,} validations."
        parts += [charts(fig, "Depth profile, with 95 % band"), f'<p class="soft">{note}</p>']
        if has_null(group):
            parts += [charts(shape_chart(group), "Shape of the latest profile, with the null"), NULL_NOTE]
        parts += [charts(heatmaps(group, values), "Change of each layer over training")]
        if any(run.sites for run in group.runs):
            parts += [charts(sites_chart(group), "Where in the layers: latest change of what each part writes")]
        if known := [run for run in group.runs if run.worth is not None]:
            told = "".join(f'<p class="soft">{html.escape(worth_line(run, group.measures[0]))}</p>' for run in known)
            parts += [charts(worth_chart(group), "What each layer's change is worth to the loss"), told]
        if any(is_head(site) for run in group.runs for site in run.sites):
            parts += [charts(head_heatmaps(group), "Latest change of each head of attention")]
    else:
        parts += ["<p>No depth profile was measured.</p>"]
    ratios = [run for run in group.runs if run.layer_ratio.steps]
    if ratios or group.measures or any(run.validation_loss for run in group.runs):
        parts += [charts(progress_chart(group, span), "Slope, step ratios and loss")]
    if ratios:
        fig = ratio_heatmaps(group, values)
        parts += [charts(fig, "Step ratio of each layer over training")]
        shown, steps = (max(counts) for counts in zip(*_columns(fig, ratios), strict=True))
        if shown < steps:
            parts += [f'<p class="soft">Thinned evenly: {shown:,} of {steps:,} logged steps.</p>']
    if any(run.unit_ratio.units for run in group.runs):
        parts += [charts(unit_heatmaps(group), "Mean step ratio inside the layers, as the optimizer wanted it")]
    if group.layers:
        parts += ["<h3>Layers</h3>", _layers_table(group)]
    return "".join(parts)


def _columns(fig: go.Figure, runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Returns the numbers of drawn and of logged steps of each heatmap."""
    return [(len(trace.x), len(run.layer_ratio.steps)) for trace, run in zip(fig.data, runs, strict=True)]


def html_table(
    head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], text: int = 1, differs: Sequence[bool] = ()
) -> str:
    """Returns an HTML table whose first ``text`` columns are text; ``head`` has (title, explanation) pairs."""

    def cell(tag: str, i: int, content: str, hover: str = "") -> str:
        marks = (' class="text"' if i < text else "") + (f' title="{html.escape(hover)}"' if hover else "")
        return f"<{tag}{marks}>{html.escape(content)}</{tag}>"

    top = "".join(cell("th", i, title, hover) for i, (title, hover) in enumerate(head))
    kind = ' class="settings"' if differs else ""
    marks = [' class="differs"' if marked else "" for marked in differs] or [""] * len(rows)
    lines = [
        f"<tr{mark}>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    ]
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide tall"><table{kind}>{body}</table></div>'


def _layers_table(group: Group) -> str:
    names = [label(run, group) for run in group.runs]
    head = [("", ""), ("layer", RUN_COLUMNS["layer"])]
    head += [(f"{title_of(group, m)}, {name}", definition_of(group, m)) for m in group.measures for name in names]
    head += [(f"step ratio, {name}", RUN_COLUMNS["step ratio"]) for name in names]
    spreads = any(run.matrix_spread for run in group.runs)
    head += [(f"matrix spread, {name}", RUN_COLUMNS["matrix spread"]) for name in names if spreads]
    head += [("effective rank", RUN_COLUMNS["effective rank"])]
    rows = layer_rows(group, group.measures, spreads)
    note = f'<p class="soft">{html.escape(UNRESOLVED_NOTE)}</p>' if has_unresolved(rows) else ""
    return html_table(head, rows, text=2) + note


def _slopes_table(found: Sequence[Group]) -> str:
    rows = [_slope_row(group, run, m) for group in found for run in group.runs for m in group.measures or ["cka"]]
    return html_table([(name, RUN_COLUMNS[name]) for name in _SLOPES], rows, text=3)


def _slope_row(group: Group, run: Run, measure: str) -> list[str]:
    start, p = [run.name, run.control, title_of(group, measure)], last(run, measure)
    if p is None:
        return [*start[:2], f"{start[2]}: not measured", *[MISSING] * (len(_SLOPES) - 3)]
    signed = [show(v, "+.3g") for v in (p.slope, p.relative_slope, p.spearman)]
    nulls = [show_draws(draws.get(measure)) for draws in (run.null, run.matched_null)]
    intervals = [show_interval(i).strip() or MISSING for i in (p.slope_interval, p.relative_slope_interval)]
    shape = [show(p.centre), show(p.width), show(p.mean)]
    return [*start, signed[0], intervals[0], signed[1], intervals[1], signed[2], *shape, *nulls]


def _settings_table(runs: Sequence[Run]) -> str:
    """Returns a table with one row per setting and one column per run; settings that differ are marked."""
    columns = [dict(_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, MISSING) for column in columns)] for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)  # differing settings first
    head = [("setting", "Rows marked * differ between the runs."), *((run.name, "") for run in runs)]
    return html_table(head, rows, text=1 + len(runs), differs=[len(set(row[1:])) > 1 for row in rows])


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    if run.record("DepthProfile"):
        yield "finished", "yes" if run.finished else "no"
    for record in run.records.values():
        if record.fit:  # the same in all records of a run
            yield from _flat("", record.fit)
            yield from _flat("", record.provenance)
            break
    for name, record in run.records.items():
        yield from _flat(name, {k: v for k, v in record.settings.items() if k not in ("effective_rank", "measures")})
        yield from _flat(name, record.end or {})


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    """Yields nested settings as pairs of a dotted name and text."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, (list, tuple)) and any(isinstance(inner, Mapping) for inner in value):
        for i, inner in enumerate(value):
            yield from _flat(f"{prefix}[{i}]" if len(value) > 1 else prefix, inner)
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
