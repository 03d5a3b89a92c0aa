"""As much of a CUDA graph as there is without a GPU: what a step did, done again at its addresses.

`capture` records torch's operations and Triton's launches, with the very tensors they were given,
and refuses what a stream in capture refuses, or what makes a graph wrong: reading a tensor on the
host, a result whose shape depends on data, a tensor made from host memory. `Graph.replay` runs the
records: everything that Python decided in the captured step stays decided. For one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

READ_BACK = {
    *("tolist", "item", "cpu", "numpy", "__array__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
}
_MASKS = (torch.bool, torch.uint8)
_FROM_HOST = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


@dataclass
class Graph:
    """launches: the Triton kernels by name, operations: torch's, in their order."""

    launches: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    _records: list[Callable[[], object]] = field(default_factory=list)

    def replay(self) -> None:
        with torch.inference_mode():
            for run in self._records:
                run()

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.operations.append(str(func))
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        results = [leaf for leaf in tree_leaves(out) if _is_tensor(leaf)]
        if func.is_view and all(_memory(result) in given for result in results):
            return  # they show what is there anyway

        def run() -> None:
            again = filter(_is_tensor, tree_leaves(func(*args, **kwargs)))
            for result, new in zip(results, again, strict=True):
                if _memory(result) not in given:
                    result.copy_(new)

        self._records.append(run)

    def _launch(self, executor: GridExecutor, args: Any, kwargs: Any) -> None:
        self.launches.append(executor.fn.__name__)
        self._records.append(lambda: executor(*args, **kwargs))


@contextmanager
def capture() -> Iterator[Graph]:
    """Records what runs within. Raises AssertionError where a graph could not have it."""
    graph = Graph()
    run = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            run(self, *args, **kwargs)
            graph._launch(self, args, kwargs)

    GridExecutor.__call__ = launch
    try:
        with _NoReadBack(), _Recorder(graph):
            yield graph
    finally:
        GridExecutor.__call__ = run


class _NoReadBack(TorchFunctionMode):
    """Python's ways to a tensor's numbers that torch does not dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in READ_BACK, f"Tensor.{name}: the host reads the device"
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not _depends_on_data(func, args), f"{func}: the host waits for the device"
        assert func not in _FROM_HOST, f"{func}: copies from the host"
        out = func(*args, **(kwargs or {}))
        self._graph._operation(func, args, kwargs or {}, out)
        return out


def _depends_on_data(func: Any, args: Any) -> bool:
    """Whether the host must see numbers before it can go on: a result, or its shape."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func is torch.ops.aten.index.Tensor:  # by masks, not by numbers
        return any(index is not None and index.dtype in _MASKS for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
