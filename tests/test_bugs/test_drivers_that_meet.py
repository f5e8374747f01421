"""A driver that gave a run up replaced the figures that another one had just got, or failed as its file was removed."""

from __future__ import annotations

from pathlib import Path

from studies import FIGURES

from depthcb_recipes.publish import published
from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.pool import Pool, _Driver
from depthcb_recipes.studies.process import RunProcess
from depthcb_recipes.studies.result import RESULT, Result, write_result
from depthcb_recipes.studies.store import Store, start_afresh

CONFIG = RunConfig("a", "causal_lm", "sgd", "standard", 0)


def test_giving_up_keeps_the_figures_of_another_driver(tmp_path: Path) -> None:
    store, finished = Store(tmp_path), Result("finished", CONFIG, FIGURES)
    driver = _Driver([CONFIG], store, Pool(1), lambda progress: None)
    folder = store.prepare(CONFIG)
    RunProcess(folder, CONFIG, runner="nowhere").wait()
    write_result(folder, finished)  # after the driver has looked for one
    assert driver._give_up(CONFIG, -9) == finished == store.result(CONFIG)
    (folder / RESULT).unlink()
    given_up = driver._give_up(CONFIG, -9)
    assert given_up.status == "killed"
    assert given_up == store.result(CONFIG)


def test_a_restarted_run_leaves_the_result_that_a_driver_is_writing(tmp_path: Path) -> None:
    with published(tmp_path / RESULT) as fresh:
        fresh.write_text("{}")
        start_afresh(tmp_path)
    assert (tmp_path / RESULT).read_text() == "{}"
