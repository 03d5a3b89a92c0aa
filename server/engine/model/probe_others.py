"""Which norms, and whether the input embedding, treat each row of the batch by itself: seen in one
forward pass, so that any class of them will do that computes what ours would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.server.engine.model.adapt import embedding_factor

_SOME = slice(3, 7)  # rows of the probe's
_TOLERANCE = 0.02  # relative: other rows would change a result by far more than rounding


@contextmanager
def watch_others(model: PreTrainedModel, rows: int) -> Iterator[Callable[[], list[str]]]:
    """Meanwhile, watches norms and the input embedding in a pass over `rows` rows; its result
    names, in the tree's order, those that ran once and gave each row what it gets alone."""
    embedding = model.get_input_embeddings()
    calls: Counter[str] = Counter()
    good: set[str] = set()

    def watch(name: str, check: Callable[[nn.Module, Tensor, Tensor, int], bool]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            calls[name] += 1
            if len(args) == 1 and not kwargs and check(module, args[0], output, rows):
                good.add(name)

        return hook

    handles = [
        module.register_forward_hook(
            watch(name, _embeds if module is embedding else _is_rowwise), with_kwargs=True
        )
        for name, module in model.named_modules()
        if module is embedding or _may_be_norm(module)
    ]
    try:
        yield lambda: [n for n, _ in model.named_modules() if n in good and calls[n] == 1]
    finally:
        for handle in handles:
            handle.remove()


def _may_be_norm(module: nn.Module) -> bool:
    """A weight of one dimension and perhaps a bias, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.shape == own["weight"].shape for parameter in own.values())
        and own["weight"].dim() == 1
        and next(module.children(), None) is None
        and next(module.buffers(), None) is None
    )


def _is_rowwise(module: Any, x: Tensor, y: Tensor, rows: int) -> bool:
    """x: [rows, n], [1, rows, n] or [1, rows, heads, n]; with as many heads as rows none can say
    which is which."""
    axis = 0 if x.dim() == 2 else 1
    if y.shape != x.shape or y is x or x.shape[-1] != len(module.weight):
        return False
    if x.shape[: axis + 1] not in ((rows,), (1, rows)) or rows in x.shape[axis + 1 : -1]:
        return False
    at = (slice(None),) * axis + (_SOME,)
    return torch.allclose(module.forward(x[at].clone()), y[at], rtol=_TOLERANCE, atol=1e-3)


def _embeds(module: Any, ids: Tensor, y: Tensor, rows: int) -> bool:
    """ids: int64 [1, rows]; a table of rows, perhaps times a factor."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    wanted = F.embedding(ids, module.weight) * embedding_factor(module)
    return ids.shape == (1, rows) and torch.equal(wanted, y)
