// Paged attention: prefill chunks and decodes of one step in one call.
//
// A unit is a block of consecutive rows of one sequence with one or more KV heads. Its lines are
// the rows' query heads, so keys and values are read once for all of them. A unit walks its keys in
// tiles of kTile positions, as flash attention does (Dao 2023):
//
//   scores   lines x tile = queries times keys, float32, straight from the cache, which holds keys
//            and values as the products take them (attention_layout.h)
//   weights  scale, soft-cap, slopes, mask; running maximum and sum of each line; exp in place
//   values   lines x head_dim += weights times values, over exactly the keys that the row sees:
//            whole groups of keys for many rows at once (on AMX where there is), the keys of a group
//            that the row sees in part by themselves
//
// What a row gets depends on its own keys alone, bit for bit: tiles begin at multiples of kTile,
// whichever rows share the unit; each line's sums run in the order of the keys, or of
// every second one; and after each
// kSplit positions a line's sum is closed and merged into the row's result in ascending order.
// A long unit's splits can therefore be handed to different threads without a change in the bits.

#include "attention_values.h"
#include "kernels.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// One tile, of which some row sees the keys [lo, hi).
template <class E>
static void attend_tile(const Call& call, const Sizes& sizes, const Unit& unit, int64_t lo,
                        int64_t hi, const Places& here, Fetch* fetch, const Scratch& s,
                        const Part& part) {
  const AttentionLayer& layer = *call.layer;
  const int64_t tile = lo / kTile * kTile, head_size = layer.block_size * layer.head_dim;
  const E* const k_cache = static_cast<const E*>(call.k_cache);
  const E* const v_cache = static_cast<const E*>(call.v_cache);
  for (int64_t j = 0; j < unit.heads; ++j) {
    const int64_t line = j * unit.head_lines;
    score<E>(sizes, unit.head_lines, static_cast<const Hidden<E>*>(s.q) + line * sizes.head_dim,
             groups_of(k_cache + j * head_size, here), here.first, here.end,
             s.scores + line * kTile, fetch);
  }
  const auto keys_of = [&](int64_t row) {
    const Span span = seen(layer, unit.position + row, lo, hi);
    return Span{span.lo - tile, span.hi - tile};
  };
  int64_t begin = 0, end = unit.rows;  // rows that see something of the tile
  while (keys_of(begin).lo >= keys_of(begin).hi) ++begin;
  while (keys_of(end - 1).lo >= keys_of(end - 1).hi) --end;
  weigh<Hidden<E>>(layer, sizes, unit, tile, here, begin, end, keys_of, s, part);
  for (int64_t j = 0; j < unit.heads; ++j) {
    const int64_t line = j * unit.head_lines;
    const Weighed<E> weighed = {reinterpret_cast<Hidden<E>*>(s.scores) + line * kWeightStride<E>,
                                s.keep + line, part.acc + line * sizes.width, unit.head_lines,
                                groups_of(v_cache + j * head_size, here)};
    add_values(sizes, weighed, begin, end, keys_of, s, fetch);
  }
  while (fetch->heads > 0) fetch_bytes(fetch, kFetchBytes);
}

// The keys of one split of the task, [lo, hi). next: what this thread will probably come to then.
template <class E>
static void attend_split(const Call& call, const Sizes& sizes, const Task& task, const Task& next,
                         int64_t lo, int64_t hi, const Scratch& s, const Part& part) {
  const Unit& unit = *task.unit;
  const int64_t lines = unit.lines(), task_end = keys_of(task).hi;
  clear(part, lines, sizes.width);
  memset(s.sums, 0, static_cast<size_t>(lines * kLanes) * sizeof(float));
  Places here;
  for (int64_t key = lo, end; key < hi; key = end) {
    end = find(call, unit.sequence, unit.head, key, hi, &here);
    Fetch fetch = end < task_end ? fetch_of<E>(call, unit, {end, task_end})
                                 : fetch_of<E>(call, *next.unit, keys_of(next));
    attend_tile<E>(call, sizes, unit, key, end, here, &fetch, s, part);
  }
  for (int64_t i = 0; i < lines; ++i) part.sum[i] = sum(load(s.sums + i * kLanes));
}

[[maybe_unused]] MANYLORA_INLINE void copy_query(const bf16* p, int64_t n, bf16* to) {
  memcpy(to, p, static_cast<size_t>(n) * sizeof(bf16));
}
template <class T>
MANYLORA_INLINE void copy_query(const T* p, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load(p + d));
  if (d < n) store(to + d, load(p + d, n - d), n - d);
}

template <class T>
static void load_queries(const Call& call, const Sizes& sizes, const Unit& unit, void* to) {
  const T* const q = static_cast<const T*>(call.q) + unit.row * call.q_row_stride;
  visit_lines(sizes, unit, 0, unit.rows, [&](int64_t line, int64_t row, int64_t head) {
    copy_query(q + row * call.q_row_stride + head * call.q_head_stride, sizes.head_dim,
               static_cast<Hidden<T>*>(to) + line * sizes.head_dim);
  });
}

// The softmax before any key: nothing, or the sink, which has a weight but no value.
static void begin_total(const Call& call, const Sizes& sizes, const Unit& unit, const Part& total) {
  clear(total, unit.lines(), sizes.width);
  if (call.layer->sinks == nullptr) return;
  visit_lines(sizes, unit, 0, unit.rows, [&](int64_t line, int64_t, int64_t head) {
    total.top[line] = call.layer->sinks[head];
    total.sum[line] = 1.0f;
  });
}

template <class T>
static void write_out(const Call& call, const Sizes& sizes, const Unit& unit, const Part& total) {
  const int64_t head_dim = sizes.head_dim, heads = call.layer->heads;
  T* const out = static_cast<T*>(call.out) + unit.row * heads * head_dim;
  visit_lines(sizes, unit, 0, unit.rows, [&](int64_t line, int64_t row, int64_t head) {
    T* const to = out + (row * heads + head) * head_dim;
    const float* const acc = total.acc + line * sizes.width;
    const Vec share = splat(1.0f / total.sum[line]);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, mul(load(acc + d), share));
    if (d < head_dim) store(to + d, mul(load(acc + d), share), head_dim - d);
  });
}

template <class T>
static void attend(const Call& call, const Sizes& sizes, const Task& task, const Task& next) {
  Unit& unit = *task.unit;
  const int64_t lines = unit.lines();
  const Scratch s = scratch_of(sizes);
  load_queries<T>(call, sizes, unit, s.q);
  const auto partial = [&](int64_t split) {
    const int64_t before = (split - unit.first_split) * part_floats(lines, sizes.width);
    return part_at(unit.partials + before, lines);
  };
  const bool whole = unit.tasks == 1;
  if (whole) begin_total(call, sizes, unit, s.total);
#if defined(__AMX_BF16__)
  if (sizes.amx) configure(unit.head_lines);
#endif
  for (int64_t i = task.first_split; i < task.first_split + task.splits; ++i) {
    const int64_t lo = larger(unit.lo, i * kSplit), hi = least(unit.hi, (i + 1) * kSplit);
    const Part part = whole ? s.part : partial(i);
    attend_split<T>(call, sizes, task, next, lo, hi, s, part);
    if (whole) merge(part, s.total, lines, sizes.width, s.keep, s.top);
  }
#if defined(__AMX_BF16__)
  if (sizes.amx) _tile_release();
#endif
  if (!whole) {
    // The last of the unit's tasks merges, in the order in which one task would have.
    if (__atomic_sub_fetch(&unit.remaining, 1, __ATOMIC_ACQ_REL) != 0) return;
    begin_total(call, sizes, unit, s.total);
    for (int64_t i = unit.first_split; i < unit.first_split + unit.splits; ++i) {
      merge(partial(i), s.total, lines, sizes.width, s.keep, s.top);
    }
  }
  write_out<T>(call, sizes, unit, s.total);
}

template <class T>
static void run(const Call& call) {
  const AttentionLayer& layer = *call.layer;
  Sizes sizes = {};
  sizes.group = layer.heads / layer.kv_heads;
  sizes.unit_rows = larger(1, kUnitLines / sizes.group);
  sizes.lines = larger(kUnitLines, sizes.group);
  sizes.head_dim = layer.head_dim;
  sizes.width = round_up(layer.head_dim, kLanes);
#if defined(__AMX_BF16__)
  sizes.amx = kDepth<T> == 2 && layer.head_dim % 16 == 0;
#endif
  const Work work = make_work(call, sizes);
  const int64_t workers = threads();
  parallel_tasks(work.task_count, workers, [&](int64_t i) {
    const int64_t next = least(i + workers, work.task_count - 1);
    attend<T>(call, sizes, work.tasks[i], work.tasks[next]);
  });
  release(work);
}

}  // namespace

void paged_attention(void* out, const void* q, int64_t q_row_stride, int64_t q_head_stride,
                     const void* k_cache, const void* v_cache, const Batch* batch,
                     const AttentionLayer* layer) {
  const Call call = {batch, layer, q, q_row_stride, q_head_stride, k_cache, v_cache, out};
  with_type(layer->dtype, [&](auto t) { run<decltype(t)>(call); });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
