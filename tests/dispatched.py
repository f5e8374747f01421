"""Counts what torch's operations do to memory, whatever device they run on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatched(TorchDispatchMode):
    """Counts operations, the bytes of given tensors that they read and write, and the memory of their results.

    Args:
        tensors: Tensors whose memory is watched, also through views.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        #: Operations so far.
        self.count = 0
        #: Bytes read from and written to the watched memory.
        self.traffic = 0
        #: Size of each new block of memory, and the most that was in use of them at once, in bytes.
        self.allocated: list[int] = []
        self.peak = 0
        self._in_use: list[tuple[StorageWeakRef, int]] = []
        self._watched = {_memory(t) for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {_memory(t) for t in _tensors((args, kwargs))}
        found = func(*args, **kwargs)
        self.count += 1
        new = {_memory(t): t.untyped_storage() for t in _tensors(found) if _memory(t) not in before}
        self.allocated += [storage.nbytes() for storage in new.values()]
        self._in_use = [(ref, size) for ref, size in self._in_use if not ref.expired()]
        self._in_use += [(StorageWeakRef(storage), storage.nbytes()) for storage in new.values()]
        self.peak = max(self.peak, sum(size for _, size in self._in_use))
        if not func.is_view:
            self.traffic += sum(self._bytes(func, args, kwargs))
        return found

    def _bytes(self, func: Any, args: Any, kwargs: Any) -> Iterable[int]:
        """Yields the bytes that each argument's memory is read and written for."""
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            only_written = written and (argument.is_out or "copy_" in func._schema.name)
            for tensor in _tensors(value):
                if _memory(tensor) in self._watched:
                    yield tensor.nbytes * (1 if only_written or not written else 2)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
