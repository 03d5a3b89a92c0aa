"""Paged attention: prefill chunks and decodes of one step, over the KV cache's blocks.

A program has a tile of queries (some positions of one sequence times all query heads of one KV
head) and walks the keys they see in tiles, with the running maximum and sum of the softmax
(Milakov & Gimelshein 2018; Dao et al. 2022). Scores are kept in base 2. Key tiles lie at multiples
of their size from the sequence's start, and a tile of which a row sees nothing changes nothing in
that row; so a row's bits do not depend on its neighbours, nor on how its prompt was cut, but for a
piece of one row, which is rounded as a decode is.

Sequences with several rows (`chunk`): all keys in one program, 64 rows of queries times heads.
Sequences with one row (decode): 16 rows, as the matrix units want, of which the query heads of a
KV head are the real ones; what costs is reading the keys. A long context is cut at multiples of
`split` keys, and `_combine` adds the parts up in their order; where there is one part it is
already the result.

Grids depend on the batch's shapes alone: rows, sequences, width of the block table.

A NaN in a key or value reaches only rows of sequences that see its block; within a chunk it may
reach the sequence's earlier rows, as in transformers' own attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.triton import tiles
from manylora.kernels.triton.dot import dot

_LOG2E = tl.constexpr(math.log2(math.e))


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `manylora.kernels.reference_attention.paged_attention`.

    q may have any strides but the last, which is 1; the caches are contiguous.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    rows, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    check_fit(q, k_cache, v_cache, batch)
    for name, values in (("slopes", slopes), ("sinks", sinks)):
        if values is not None and (values.shape != (heads,) or values.dtype != torch.float32):
            raise ValueError(f"{name}: found {values.shape} {values.dtype}; wanted float32 [heads]")
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    seqs, max_blocks = batch.block_table.shape
    on, group = tiles.target(), heads // kv_heads
    decode = tiles.decode_tiles(group, head_dim, q.dtype, on)
    chunk = tiles.chunk_tiles(group, head_dim, q.dtype, on)
    splits = max(1, triton.cdiv(max_blocks * block_size, decode.split))
    in_parts = batch.decodes != 0 and splits > 1
    shape = (seqs, heads, splits if in_parts else 0, decode.dim + 2)
    parts = torch.empty(shape, dtype=torch.float32, device=q.device)
    runs: list[tuple[tiles.AttentionTiles, tuple[int, ...]]] = []
    if batch.decodes != 0:
        runs.append((decode, (seqs, kv_heads, splits)))
    if batch.chunks != 0:
        runs.append((chunk, (rows // chunk.queries + seqs, kv_heads)))
    for plan_of, grid in runs:
        _attend[grid](
            out,
            q,
            k_cache,
            v_cache,
            parts,
            batch.seq_starts,
            batch.context,
            batch.block_table,
            slopes,
            sinks,
            q.stride(0),
            q.stride(1),
            seqs,
            max_blocks,
            splits,
            scale,
            softcap,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK=block_size,
            WINDOW=window,
            CAPPED=softcap > 0,
            QUERIES=plan_of.queries,
            GROUP=plan_of.group,
            KEYS=plan_of.keys,
            DIM=plan_of.dim,
            SPLIT=plan_of.split,
            num_warps=plan_of.warps,
            num_stages=plan_of.stages,
        )
    if in_parts:
        _combine[(seqs, heads)](
            out,
            parts,
            batch.seq_starts,
            batch.context,
            splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WINDOW=window,
            DIM=decode.dim,
            SPLIT=decode.split,
            PARTS=16,
        )
    return out


def check_fit(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch
) -> None:
    """Raises ValueError for queries (or keys), caches and a batch that do not fit together."""
    rows, heads, head_dim = q.shape
    if (
        rows != batch.rows
        or (rows > 0 and q.stride(2) != 1)
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
        or k_cache.shape != v_cache.shape
        or heads % k_cache.shape[1]
        or head_dim != k_cache.shape[3]
        or not q.dtype == k_cache.dtype == v_cache.dtype
    ):
        raise ValueError(
            "attention: wanted rows as in the batch, [rows, heads, head_dim] with contiguous "
            "heads, two equal contiguous caches [blocks, kv_heads, block_size, head_dim], heads a "
            f"multiple of kv_heads, one dtype; found {tuple(q.shape)} {q.stride()} {q.dtype}, "
            f"caches {tuple(k_cache.shape)} {k_cache.dtype} and {tuple(v_cache.shape)} "
            f"{v_cache.dtype}, a batch of {batch.rows} rows"
        )


@triton.jit(do_not_specialize=["seqs", "max_blocks", "splits"])
def _attend(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    parts: tl.tensor,
    seq_starts: tl.tensor,
    contexts: tl.tensor,
    block_table: tl.tensor,
    slopes: tl.tensor,
    sinks: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    seqs: tl.tensor,
    max_blocks: tl.tensor,
    splits: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    kv_head = tl.program_id(1)
    if SPLIT:
        seq, first_query = tl.program_id(0), 0
    else:
        seq, first_query = _find_tile(seq_starts, seqs, tl.program_id(0), QUERIES)
    begin = tl.load(seq_starts + seq)
    count = tl.load(seq_starts + seq + 1) - begin
    if (count == 1) != (SPLIT > 0):
        return
    if first_query >= count:
        return
    context = tl.load(contexts + seq)

    # The tile's rows: query first_query + m // GROUP, head m % GROUP of the KV head's.
    m = tl.arange(0, QUERIES * GROUP)
    query, head = first_query + m // GROUP, kv_head * (HEADS // KV_HEADS) + m % GROUP
    row_ok = (query < count) & (m % GROUP < HEADS // KV_HEADS)
    position = context - count + query

    # The keys that any of them sees, cut to this program's part.
    low, high, first_split = _seen(context, count, first_query, QUERIES, WINDOW, SPLIT)
    if SPLIT:
        split = tl.program_id(2)
        is_first = split == first_split
        is_whole = (context - 1) // SPLIT == first_split
        low, high = tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT)
        if low >= high:
            return
    else:
        is_first = True

    d = tl.arange(0, DIM)
    row = (begin + query).to(tl.int64)
    q_tile = tl.load(
        q + (row * q_stride + head * q_head_stride)[:, None] + d[None, :],
        mask=row_ok[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    top, total = _start(sinks, head, row_ok, is_first, QUERIES * GROUP)
    slope = tl.zeros((QUERIES * GROUP,), tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=row_ok, other=0.0)
    mixed = tl.zeros((QUERIES * GROUP, DIM), tl.float32)

    for first_key in range(low // KEYS * KEYS, high, KEYS):
        key = first_key + tl.arange(0, KEYS)
        key_ok = (key >= low) & (key < high)
        block = tl.load(block_table + seq * max_blocks + key // BLOCK, mask=key_ok, other=0)
        place = ((block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK + key % BLOCK) * HEAD_DIM
        k_tile = tl.load(
            k_cache + place[None, :] + d[:, None],
            mask=key_ok[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
        v_tile = tl.load(
            v_cache + place[:, None] + d[None, :],
            mask=key_ok[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        score = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * _tanh(score / softcap)
        distance = key[None, :] - position[:, None]
        if slopes is not None:
            score += slope[:, None] * distance
        seen = key_ok[None, :] & (distance <= 0)
        if WINDOW:
            seen = seen & (distance > -WINDOW)
        score = tl.where(seen, score * _LOG2E, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - finite[:, None])
        shrunk = tl.exp2(top - finite)
        total = total * shrunk + tl.sum(weight, 1)
        mixed = dot(weight.to(v_tile.dtype), v_tile, mixed * shrunk[:, None])
        top = new_top

    out_at = out + ((row * HEADS + head) * HEAD_DIM)[:, None] + d[None, :]
    out_ok = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    if SPLIT:
        if not is_whole:
            part = ((seq.to(tl.int64) * HEADS + head) * splits + split) * (DIM + 2)
            tl.store(parts + part[:, None] + d[None, :], mixed, mask=row_ok[:, None])
            tl.store(parts + part + DIM, top, mask=row_ok)
            tl.store(parts + part + DIM + 1, total, mask=row_ok)
            return
    tl.store(out_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    out: tl.tensor,
    parts: tl.tensor,
    seq_starts: tl.tensor,
    contexts: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Adds up the parts of one row and head, PARTS at a time."""
    seq, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(seq_starts + seq)
    context = tl.load(contexts + seq)
    _, high, first = _seen(context, 1, 0, 1, WINDOW, SPLIT)
    last = (high - 1) // SPLIT
    if (tl.load(seq_starts + seq + 1) - row != 1) | (first == last):
        return
    d = tl.arange(0, DIM)
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros((DIM,), tl.float32)
    for begin in range(first, last + 1, PARTS):
        split = begin + tl.arange(0, PARTS)
        ok = split <= last
        part = parts + ((seq.to(tl.int64) * HEADS + head) * splits + split) * (DIM + 2)
        part_top = tl.load(part + DIM, mask=ok, other=float("-inf"))
        part_total = tl.load(part + DIM + 1, mask=ok, other=0.0)
        part_mixed = tl.load(part[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.where(ok, tl.exp2(part_top - finite), 0.0)
        shrunk = tl.exp2(top - finite)
        total = total * shrunk + tl.sum(part_total * factor, 0)
        mixed = mixed * shrunk + tl.sum(part_mixed * factor[:, None], 0)
        top = new_top
    at = out + (row.to(tl.int64) * HEADS + head) * HEAD_DIM + d
    tl.store(at, (mixed / total).to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _find_tile(
    seq_starts: tl.tensor, seqs: tl.tensor, tile: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """The sequence of a tile and its first query.

    Sequence s has the tiles from seq_starts[s] // QUERIES + s on: enough for its rows, and
    computed without knowing how many the sequences before it need.
    """
    low, high = 0, seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(seq_starts + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low, (tile - tl.load(seq_starts + low) // QUERIES - low) * QUERIES


@triton.jit
def _seen(
    context: tl.tensor,
    count: tl.tensor,
    first_query: tl.tensor,
    QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """The first key that the tile's queries see, the end of their keys, the first key's part."""
    first_position = context - count + first_query
    high = tl.minimum(first_position + QUERIES, context)
    low = first_position * 0
    if WINDOW:
        low = tl.maximum(low, first_position - WINDOW + 1)
    part = low
    if SPLIT:
        part = low // SPLIT
    return low, high, part


@triton.jit
def _start(
    sinks: tl.tensor, head: tl.tensor, row_ok: tl.tensor, is_first: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """Maximum and sum before the first key: a sink is a logit that was already seen."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=row_ok & is_first, other=float("-inf"))
        top = sink * _LOG2E
        total = tl.where(sink == float("-inf"), 0.0, 1.0)
    return top, total


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
