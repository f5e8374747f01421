"""The checkpoints of a run in the order of their training steps."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from depthcb.run import natural
from depthcb_recipes.backbones.checkpoints import SUFFIXES, load_ckpt


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run.

    Args:
        source: A name, hub id or folder as `load_backbone` takes it, or a ``.ckpt`` or ``.safetensors`` file.
        step: Its training step; None if nothing tells it.
    """

    source: str
    step: int | None

    @property
    def file(self) -> Path | None:
        """The file, if it is one without a configuration."""
        return Path(self.source) if self.source.endswith(SUFFIXES) else None


def series(sources: list[str]) -> list[Checkpoint]:
    """Returns the checkpoints in the order of their steps; without steps they are numbered from 1 as they were given.

    A folder without a ``config.json`` stands for the checkpoints in it: folders of models such as ``checkpoint-500``,
    and ``.ckpt`` and ``.safetensors`` files; of these, a ``last.ckpt`` of the same step as another is left out. The
    step is the ``global_step`` in a ``.ckpt`` or in ``trainer_state.json``, or in the name: ``checkpoint-500``,
    ``step=500``. It counts completed steps, so it is one more than the step that Lightning logs the same weights under.

    Args:
        sources: Names, hub ids, folders and files.

    Raises:
        ValueError: Only some have a step, two have the same one, or a file cannot be read.
    """
    found = [checkpoint for source in sources for checkpoint in _inside(source)]
    unknown = [c.source for c in found if c.step is None]
    if len(unknown) == len(found):
        return found if len(found) == 1 else [Checkpoint(c.source, i) for i, c in enumerate(found, start=1)]
    if unknown:
        raise ValueError(
            f"Nothing tells the training step of {unknown[0]}, but of others it is known: put it in the name, such as "
            "step=500."
        )
    found.sort(key=lambda c: c.step or 0)
    for before, after in itertools.pairwise(found):
        if before.step == after.step:
            raise ValueError(f"{before.source} and {after.source} are both of step {after.step}: leave out one.")
    return found


def _inside(source: str) -> list[Checkpoint]:
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return [Checkpoint(source, _step(folder))]
    below = [path for path in folder.iterdir() if path.suffix in SUFFIXES or (path / "config.json").is_file()]
    found = [Checkpoint(str(path), _step(path)) for path in sorted(below, key=natural)]
    steps = [c.step for c in found]
    repeated = [c for c in found if Path(c.source).stem == "last" and c.step is not None and steps.count(c.step) > 1]
    return [c for c in found if c not in repeated] or [Checkpoint(source, None)]


def _step(path: Path) -> int | None:
    """Returns the training step of an existing checkpoint, if it is told anywhere."""
    if path.suffix == ".ckpt":
        step = load_ckpt(path).get("global_step") if path.is_file() else None
        if isinstance(step, int):
            return step
    if (path / "trainer_state.json").is_file():
        return int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    named = re.search(r"(?:checkpoint|step)[-_=]?(\d+)", path.name) if path.exists() else None
    return int(named[1]) if named else None
