"""Regenerates the README's picture from the demo's own files: ``make pictures``.

The pair of runs that it shows is kept beside it as a small JSON file, from which a test draws the same picture again.

    python tests/pictures.py DEMO_FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from depthcb.report import write_figure
from depthcb.run import NULLS, Record, Run, read_runs

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
DATA, PICTURE = PICTURES / "depth_profile.json", PICTURES / "depth_profile.png"
MEASURE = "cka"


def draw(data: Path, picture: Path) -> Path:
    """Draws the picture of a pair from its data; returns the CSV file beside it."""
    runs = [Run.from_dict(fields) for fields in json.loads(data.read_text(encoding="utf-8"))]
    beside = write_figure(runs, "pair", picture, columns=2, measure=MEASURE)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64).save(picture, optimize=True)  # a third of the size
    return beside


def kept(run: Run) -> Run:
    """What the picture needs of a run: the last profile, the draws of the matched null, and the step ratios."""
    records = {name: found for name, record in run.records.items() if (found := _kept(record))}
    return replace(run, records=records)


def _kept(record: Record) -> Record | None:
    if record.callback == NULLS[1] or record.callback == "DepthProfile":
        rows = record.rows if record.callback == NULLS[1] else record.rows[-1:]
        lean = [{"step": r["step"], "profiles": {MEASURE: _lean(r["profiles"][MEASURE])}} for r in rows]
        return replace(record, rows=tuple(lean))
    if record.callback in ("EqualStep", "UpdateRatioMonitor"):
        wanted = ("realised/L", "ratio/L")
        rows = [{k: v for k, v in r.items() if k == "step" or any(w in k for w in wanted)} for r in record.rows]
        return replace(record, rows=tuple(rows))
    return None


def _lean(profile: dict[str, object]) -> dict[str, object]:
    names = ("change", "layer_names", "measure", "step", "rows", "band", "title", "unit", "floor")
    return {name: profile[name] for name in names if name in profile}


def main(demo: Path) -> None:
    runs = [kept(run) for run in read_runs(demo) if run.name.startswith("sgd-")]
    PICTURES.mkdir(exist_ok=True)
    DATA.write_text(json.dumps([run.to_dict() for run in runs], separators=(",", ":")) + "\n", encoding="utf-8")
    draw(DATA, PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1000} kB, {DATA}: {DATA.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
