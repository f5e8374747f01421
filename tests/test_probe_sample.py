"""Where the probe's examples come from: a seeded sample, read without a trace."""

from __future__ import annotations

import random
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support import TinyLM
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, get_worker_info

from depthcb import LayerStack
from depthcb.engine import ProfileRecorder
from depthcb.probe import Probe
from depthcb.profile import Profile
from depthcb.reference import Reference, halves_of
from depthcb.similarity import find_measures


class Noisy(Dataset[tuple[Tensor, int]]):
    """Augments at random, as image data sets do."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return i + torch.rand(3) + random.random() + np.random.rand(), i


class Counting(Dataset[Tensor]):
    """Counts what it served, and caches it."""

    def __init__(self) -> None:
        self.cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Tensor:
        return self.cache.setdefault(i, torch.rand(3))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(3000.0).view(1000, 3))


class OnlyHere(Noisy):
    """Cannot be read in a worker, as data sets of CUDA tensors."""

    def __init__(self) -> None:
        self.served = 0

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if get_worker_info() is not None:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        self.served += 1
        return super().__getitem__(i)


def chosen(probe: Probe) -> list[int]:
    indices: list[int] = torch.cat([batch[1] for batch in probe.batches]).tolist()
    return indices


@pytest.mark.slow
def test_the_probe_is_a_seeded_sample_of_the_whole_set() -> None:
    loader = DataLoader(Noisy(), batch_size=8)
    probe, again = Probe.collect(loader, limit=20), Probe.collect(DataLoader(Noisy(), batch_size=8), limit=20)
    assert [len(b[0]) for b in probe.batches] == [8, 8, 4]
    indices = chosen(probe)
    assert indices == sorted(set(indices))
    assert indices[0] > 0
    assert max(indices) > 400
    assert probe.hash == again.hash, "random augmentation is seeded too"
    assert chosen(Probe.collect(loader, limit=20, seed=1)) != indices
    assert chosen(Probe.collect(loader, limit=600)) == list(range(500))
    counts = np.zeros(500)
    for seed in range(60):
        counts[chosen(Probe.collect(Noisy(), limit=50, seed=seed))] += 1
    halves = counts[:250].sum(), counts[250:].sum()
    assert abs(halves[0] - halves[1]) < 4 * np.sqrt(60 * 50 * 0.9 / 4) * 2, "no part of the set is preferred"


def test_reading_leaves_no_trace() -> None:
    dataset = Counting()
    dataset[7]
    generator, batch_order = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)
    random.seed(1)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    probe = Probe.collect(loader, limit=30)
    assert sum(map(len, probe.batches)) == 30
    assert list(dataset.cache) == [7]
    assert torch.equal(generator.get_state(), batch_order.get_state()), "the loader was not iterated"
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert states[2] == np.random.get_state()[1].tolist()


def test_the_loaders_own_functions_are_used() -> None:
    def seed_worker(number: int) -> None:
        random.seed(100 + number)

    def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in rows]), "drawn": torch.full((len(rows),), random.random())}

    probe = Probe.collect(DataLoader(Noisy(), batch_size=4, collate_fn=collate, worker_init_fn=seed_worker), limit=8)
    random.seed(100)
    assert probe.batches[0]["drawn"][0].item() != 0
    assert list(probe.batches[0]) == ["x", "drawn"]
    sampler = BatchSampler(SequentialSampler(Noisy()), batch_size=5, drop_last=False)
    assert sum(len(b[0]) for b in Probe.collect(DataLoader(Noisy(), batch_sampler=sampler), limit=8).batches) == 8


def test_a_stream_gives_its_first_examples_with_a_warning() -> None:
    stream = Endless()
    with pytest.warns(UserWarning, match="first 8 examples of Endless, which can only be iterated: they are no random"):
        probe = Probe.collect(DataLoader(stream, batch_size=4), limit=8)
    assert torch.cat(probe.batches)[:, 0].tolist() == [0, 3, 6, 9, 12, 15, 18, 21]


def test_what_no_worker_can_read_is_copied_and_said() -> None:
    dataset = OnlyHere()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"from a copy of OnlyHere in this process.*\(.*Cannot re-initialize CUDA"):
        probe = Probe.collect(DataLoader(dataset, batch_size=8), limit=20)
    assert chosen(probe) == chosen(Probe.collect(Noisy(), limit=20))
    assert dataset.served == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_what_can_be_neither_read_elsewhere_nor_copied_names_the_way_out() -> None:
    class OnlyThis(OnlyHere):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    match = (
        r"OnlyThis, neither in another process .*CUDA.* nor from a copy .*lock.*: pass probe= with a batch or a list"
    )
    with pytest.raises(ValueError, match=match):
        Probe.collect(DataLoader(OnlyThis(), batch_size=8), limit=20)
    batches = list(DataLoader(OnlyThis(), batch_size=8))[:2]
    assert len(Probe.collect(batches, limit=16).batches) == 2


def test_an_error_of_the_dataset_is_the_users_to_see() -> None:
    class Broken(Noisy):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        Probe.collect(Broken(), limit=20)


def test_halves_are_drawn_over_documents() -> None:
    """Rows of one document are in the same half, and the model never sees the numbers."""
    model = TinyLM().model
    rows = torch.randint(1, 61, (48, 8), generator=torch.Generator().manual_seed(0))
    document = torch.arange(48) // 3
    batches = [{"input_ids": rows[i : i + 16], "document": document[i : i + 16]} for i in range(0, 48, 16)]
    stack, measures = LayerStack.find(model), find_measures(["cka"])
    plain = Probe(tuple({"input_ids": b["input_ids"]} for b in batches)).record(model, stack)
    named = Probe(tuple(batches)).record(model, stack)
    assert all(torch.equal(a, b) for a, b in zip(plain.rows, named.rows, strict=True))
    assert named.examples.tolist() == document.tolist()
    assert plain.examples.tolist() == list(range(48))
    reference = Reference.record(Probe(tuple(batches)), model, stack, measures)
    assert reference.distinct == 16
    for half in reference.halves.mT.bool():
        assert sorted(set(document[half].tolist())) == sorted(document[half].tolist()[::3])
        assert int(half.sum()) == 24


def test_a_document_that_is_an_input_is_one() -> None:
    class Retrieval(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])

        def forward(self, document: Tensor) -> Tensor:
            out: Tensor = self.blocks(document)
            return out

    model = Retrieval()
    recording = Probe(({"document": torch.randn(8, 4)},)).record(model, LayerStack.find(model))
    assert recording.examples.tolist() == list(range(8))


def test_few_distinct_examples_are_a_warning() -> None:
    model = TinyLM().model
    for count, told in ((29, True), (30, False)):
        rows = {"input_ids": torch.randint(1, 61, (60, 8)), "document": torch.arange(60) % count}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ProfileRecorder(rows).prepare(model)
        assert any(f"only {count} distinct examples or documents" in str(w.message) for w in found) == told


@pytest.mark.slow
def test_intervals_by_document_cover_the_truth() -> None:
    """Clustered rows, as in packed text: 3 rows of each of 40 documents share most of their change."""
    rng = np.random.default_rng(0)
    hits = {"documents": 0, "rows": 0}
    weights = np.linspace(0, 1, 6)
    for _ in range(300):
        shared = np.repeat(rng.normal(0, 1, (40, 1)), 3, axis=0) + 0.3 * rng.normal(0, 1, (120, 1))
        changes = 1 + weights + 0.5 * shared * weights + 0.1 * rng.normal(0, 1, (120, 6))
        for kind, numbers in (("documents", torch.arange(120) // 3), ("rows", torch.arange(120))):
            halves = np.stack([changes[half].mean(axis=0) for half in halves_of(numbers).mT.bool().numpy()])
            profile = Profile.from_halves(
                changes.mean(axis=0).tolist(), halves, layer_names=tuple("abcdef"), measure="cka"
            )
            low, high = profile.slope_interval or (0.0, 0.0)
            hits[kind] += low <= 1.0 <= high
    assert hits["documents"] / 300 >= 0.91, "0.93 to 0.95 over many more runs"
    assert hits["rows"] / 300 < 0.85, "the cluster matters here"
