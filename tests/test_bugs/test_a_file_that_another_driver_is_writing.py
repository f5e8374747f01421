"""A restarted run removed a temporary file of its configuration while another driver was writing it."""

from __future__ import annotations

import threading
from pathlib import Path

from depthcb_recipes.studies.grid import RunConfig
from depthcb_recipes.studies.store import CONFIG, Store, start_afresh


def test_two_drivers_at_one_folder_leave_each_others_files(tmp_path: Path) -> None:
    store, config = Store(tmp_path), RunConfig("a", "causal_lm", "sgd", "standard", 0)
    folder, ended, failed = store.prepare(config), threading.Event(), []

    def keep_starting() -> None:
        while not ended.is_set():
            (folder / "half.ckpt").touch()
            try:
                start_afresh(folder)
            except OSError as error:
                failed.append(error)

    other = threading.Thread(target=keep_starting)
    other.start()
    try:
        for _ in range(200):
            assert store.prepare(config) == folder
    finally:
        ended.set()
        other.join()
    assert not failed
    start_afresh(folder)
    assert [path.name for path in folder.iterdir()] == [CONFIG]
