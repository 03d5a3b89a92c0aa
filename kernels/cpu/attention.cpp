// Paged attention: prefill chunks and decodes of one step in one call.
//
// A unit is a block of consecutive rows of one sequence with one or more KV heads. Its lines are
// the rows' query heads, so keys and values are read once for all of them. A unit walks its keys in
// tiles of kTile positions, as flash attention does (Dao 2023):
//
//   keys     a tile's keys are transposed into words of one lane each, [head_dim / kDepth][kTile],
//            so that a score is a lane and needs no sum over lanes; bf16 stays in pairs
//   scores   lines x tile = queries times keys, float32
//   weights  scale, soft-cap, slopes, mask; running maximum and sum of each line; exp in place
//   values   the tile's values as [kTile / kDepth][head_dim] words, which for bf16 pair two keys;
//            lines x head_dim += weights times values, over exactly the keys that the row sees
//
// What a row gets depends on its own keys alone, bit for bit: tiles begin at multiples of kTile,
// whichever rows share the unit; each line's sums run in the order of the keys; and after each
// kSplit positions a line's sum is closed and merged into the row's result in ascending order.
// A long unit's splits can therefore be handed to different threads without a change in the bits.

#include "attention_softmax.h"
#include "attention_tile.h"
#include "attention_work.h"
#include "tile_product.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// The element type of a tile of keys or values.
template <class T>
struct TileOf {
  using type = float;
};
template <>
struct TileOf<bf16> {
  using type = bf16;
};

// Memory that a thread keeps for its next task.
struct Scratch {
  void* q;        // Hidden<E> [lines][depth]
  float* keys;    // words of E [depth / kDepth][kTile]
  float* values;  // words of E [kTile / kDepth][width]
  float* edge;    // [width], one row of values
  float* scores;  // [lines of a head][kTile], then Hidden<E> weights [lines of a head][kTile]
  float* keep;    // [lines of a head], what a tile leaves of the sums before it
  float* ones;    // [lines of a head]
  Part part;
  Part total;
};

static Scratch scratch_of(const Sizes& sizes) {
  static thread_local float* memory = nullptr;
  static thread_local int64_t held = 0;
  const int64_t part = part_floats(sizes.lines, sizes.width);
  const int64_t floats = sizes.lines * (sizes.depth + kTile + 2) + sizes.width +
                         kTile * (sizes.depth + sizes.width) + 2 * part;
  if (held < floats) {
    free(memory);
    memory = static_cast<float*>(allocate(floats, sizeof(float)));
    held = floats;
  }
  Scratch s;
  float* next = memory;
  s.keys = next, next += kTile * sizes.depth;
  s.values = next, next += kTile * sizes.width;
  s.scores = next, next += sizes.lines * kTile;
  s.part = part_at(next, sizes.lines, sizes.width), next += part;
  s.total = part_at(next, sizes.lines, sizes.width), next += part;
  s.edge = next, next += sizes.width;
  s.keep = next, next += sizes.lines;
  s.ones = next, next += sizes.lines;
  s.q = next;
  for (int64_t i = 0; i < sizes.lines; ++i) s.ones[i] = 1.0f;
  return s;
}

// acc [lines][width] = keep * acc + weights times the values of keys [lo, hi) of a tile. Of a pair
// of which only one key is seen, the other's value is taken as 0: were it NaN, 0 * NaN is NaN.
template <class E>
static void add_values(const Sizes& sizes, int64_t lines, const Hidden<E>* weights, int64_t stride,
                       int64_t lo, int64_t hi, const float* keep, const Scratch& s, float* acc) {
  const int64_t width = sizes.width, vecs = width / kLanes;
  const auto add = [&](int64_t key, const float* values, int64_t depth) {
    product<E>(lines, vecs, weights + key, stride, reinterpret_cast<const E*>(values),
               width * kDepth<E>, depth, keep, acc, width);
    keep = s.ones;
  };
  const auto add_one = [&](int64_t key) {
    const int64_t pair = key / 2;
    const uint32_t mask = key % 2 ? 0xffff0000u : 0x0000ffffu;
    for (int64_t d = 0; d < width; ++d) {
      s.edge[d] = bits_to_float(float_to_bits(s.values[pair * width + d]) & mask);
    }
    add(pair * 2, s.edge, 2);
  };
  if constexpr (kDepth<E> == 1) return add(lo, s.values + lo * width, hi - lo);
  if (lo % 2) add_one(lo++);
  if (hi - lo > 1) add(lo, s.values + lo / 2 * width, (hi - lo) / 2 * 2);
  if ((hi - lo) % 2) add_one(hi - 1);
}

// Weights and values of one head's lines, in runs of rows that see the same keys of a tile.
template <class E>
static void weigh_and_add(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                          int64_t tile, int64_t lo, int64_t hi, const Scratch& s,
                          const Part& part) {
  const AttentionLayer& layer = *call.layer;
  const int64_t group = sizes.group;
  Hidden<E>* const weights = reinterpret_cast<Hidden<E>*>(s.scores);
  constexpr int64_t kStride = kTile * sizeof(float) / sizeof(Hidden<E>);
  for (int64_t r = 0, next; r < unit.rows; r = next) {
    const Span span = seen(layer, unit.position + r, lo, hi);
    for (next = r; next < unit.rows; ++next) {
      const Span same = seen(layer, unit.position + next, lo, hi);
      if (same.lo != span.lo || same.hi != span.hi) break;
    }
    if (span.lo >= span.hi) continue;
    for (int64_t i = r * group; i < next * group; ++i) {
      const float slope = layer.slopes ? layer.slopes[head * group + i % group] : 0.0f;
      const int64_t distance = tile - (unit.position + i / group);
      weigh(layer, slope, distance, span.lo - tile, span.hi - tile, s.scores + i * kTile,
            weights + i * kStride, part.top + i, part.sum + i, s.keep + i);
    }
    add_values<E>(sizes, (next - r) * group, weights + r * group * kStride, kStride,
                  span.lo - tile, span.hi - tile, s.keep + r * group, s,
                  part.acc + r * group * sizes.width);
  }
}

// One tile, of which some row sees the keys [lo, hi), with one head of the unit.
template <class T>
static void attend_tile(const Call& call, const Sizes& sizes, const Unit& unit, int64_t j,
                        int64_t lo, int64_t hi, const Places& here, const Places& ahead,
                        const Scratch& s, const Part& part) {
  using E = typename TileOf<T>::type;
  const int64_t head_dim = call.layer->head_dim, first_line = j * unit.head_lines;
  const int64_t shift = j * call.layer->block_size * head_dim, tile = lo / kTile * kTile;
  const T* const k_cache = static_cast<const T*>(call.k_cache) + shift;
  const T* const v_cache = static_cast<const T*>(call.v_cache) + shift;
  const int64_t from = (lo - tile) / kLanes * kLanes, to = round_up(hi - tile, kLanes);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    if (from <= i && i < to) pack_keys(k_cache, here.at + i, head_dim, s.keys + i);
    prefetch(k_cache, ahead.at + i, head_dim);
  }
  product<E>(unit.head_lines, (to - from) / kLanes,
             static_cast<const Hidden<E>*>(s.q) + first_line * sizes.depth, sizes.depth,
             reinterpret_cast<const E*>(s.keys + from), kTile * kDepth<E>, sizes.depth, nullptr,
             s.scores + from, kTile);
  for (int64_t i = 0; i < kTile; i += kLanes) {
    float* const words = s.values + i / kDepth<E> * sizes.width;
    if (from <= i && i < to) pack_values(v_cache, here.at + i, head_dim, sizes.width, words);
    prefetch(v_cache, ahead.at + i, head_dim);
  }
  const Part lines = {part.top + first_line, part.sum + first_line,
                      part.acc + first_line * sizes.width};
  weigh_and_add<E>(call, sizes, unit, unit.head + j, tile, lo, hi, s, lines);
}

// The keys of one split, [lo, hi). next: the unit that this thread will probably come to then.
template <class T>
static void attend_split(const Call& call, const Sizes& sizes, const Unit& unit, const Unit& next,
                         int64_t lo, int64_t hi, const Scratch& s, const Part& part) {
  clear(part, unit.lines(), sizes.width);
  Places here, ahead;
  for (int64_t key = lo, end; key < hi; key = end) {
    end = find(call, unit.sequence, unit.head, key, hi, &here);
    if (end < unit.hi) {
      find(call, unit.sequence, unit.head, end, unit.hi, &ahead);
    } else {
      find(call, next.sequence, next.head, next.lo, next.hi, &ahead);
    }
    for (int64_t j = 0; j < unit.heads; ++j) {
      attend_tile<T>(call, sizes, unit, j, key, end, here, ahead, s, part);
    }
  }
}

[[maybe_unused]] MANYLORA_INLINE void copy_query(const bf16* p, int64_t n, int64_t depth,
                                                 bf16* to) {
  memcpy(to, p, static_cast<size_t>(n) * sizeof(bf16));
  for (int64_t d = n; d < depth; ++d) to[d].bits = 0;
}
template <class T>
MANYLORA_INLINE void copy_query(const T* p, int64_t n, int64_t depth, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load(p + d));
  if (d < n) store(to + d, load(p + d, n - d), smaller(depth - d, kLanes));
}

// Calls visit(line, row, query head) for each line of the unit.
template <class Visit>
MANYLORA_INLINE void visit_lines(const Sizes& sizes, const Unit& unit, const Visit& visit) {
  int64_t line = 0;
  for (int64_t head = unit.head; head < unit.head + unit.heads; ++head) {
    for (int64_t row = unit.row; row < unit.row + unit.rows; ++row) {
      for (int64_t g = 0; g < sizes.group; ++g) visit(line++, row, head * sizes.group + g);
    }
  }
}

template <class T>
static void load_queries(const Call& call, const Sizes& sizes, const Unit& unit, void* to) {
  using E = typename TileOf<T>::type;
  const T* const q = static_cast<const T*>(call.q);
  visit_lines(sizes, unit, [&](int64_t line, int64_t row, int64_t head) {
    copy_query(q + row * call.q_row_stride + head * call.q_head_stride, call.layer->head_dim,
               sizes.depth, static_cast<Hidden<E>*>(to) + line * sizes.depth);
  });
}

// The softmax before any key: nothing, or the sink, which has a weight but no value.
static void begin_total(const Call& call, const Sizes& sizes, const Unit& unit, const Part& total) {
  clear(total, unit.lines(), sizes.width);
  if (call.layer->sinks == nullptr) return;
  visit_lines(sizes, unit, [&](int64_t line, int64_t, int64_t head) {
    total.top[line] = call.layer->sinks[head];
    total.sum[line] = 1.0f;
  });
}

template <class T>
static void write_out(const Call& call, const Sizes& sizes, const Unit& unit, const Part& total) {
  const int64_t head_dim = call.layer->head_dim;
  visit_lines(sizes, unit, [&](int64_t line, int64_t row, int64_t head) {
    T* const to = static_cast<T*>(call.out) + (row * call.layer->heads + head) * head_dim;
    const float* const acc = total.acc + line * sizes.width;
    const Vec share = splat(1.0f / total.sum[line]);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, mul(load(acc + d), share));
    if (d < head_dim) store(to + d, mul(load(acc + d), share), head_dim - d);
  });
}

template <class T>
static void attend(const Call& call, const Sizes& sizes, const Task& task, const Unit& next) {
  Unit& unit = *task.unit;
  const int64_t lines = unit.lines();
  const Scratch s = scratch_of(sizes);
  load_queries<T>(call, sizes, unit, s.q);
  const auto partial = [&](int64_t split) {
    const int64_t before = (split - unit.first_split) * part_floats(lines, sizes.width);
    return part_at(unit.partials + before, lines, sizes.width);
  };
  const bool whole = unit.tasks == 1;
  if (whole) begin_total(call, sizes, unit, s.total);
  for (int64_t i = task.first_split; i < task.first_split + task.splits; ++i) {
    const int64_t lo = larger(unit.lo, i * kSplit), hi = smaller(unit.hi, (i + 1) * kSplit);
    const Part part = whole ? s.part : partial(i);
    attend_split<T>(call, sizes, unit, next, lo, hi, s, part);
    if (whole) merge(part, s.total, lines, sizes.width);
  }
  if (!whole) {
    // The last of the unit's tasks merges, in the order in which one task would have.
    if (__atomic_sub_fetch(&unit.remaining, 1, __ATOMIC_ACQ_REL) != 0) return;
    begin_total(call, sizes, unit, s.total);
    for (int64_t i = unit.first_split; i < unit.first_split + unit.splits; ++i) {
      merge(partial(i), s.total, lines, sizes.width);
    }
  }
  write_out<T>(call, sizes, unit, s.total);
}

template <class T>
static void run(const Call& call) {
  const AttentionLayer& layer = *call.layer;
  Sizes sizes;
  sizes.group = layer.heads / layer.kv_heads;
  sizes.unit_rows = larger(1, kUnitLines / sizes.group);
  sizes.lines = larger(kUnitLines, sizes.group);
  sizes.depth = round_up(layer.head_dim, kDepth<typename TileOf<T>::type>);
  sizes.width = round_up(layer.head_dim, kLanes);
  const Work work = make_work(call, sizes);
  const int64_t workers = threads();
  parallel_tasks(work.task_count, workers, [&](int64_t i) {
    const int64_t next = smaller(i + workers, work.task_count - 1);
    attend<T>(call, sizes, work.tasks[i], *work.tasks[next].unit);
  });
  release(work);
}

}  // namespace

void paged_attention(void* out, const void* q, int64_t q_row_stride, int64_t q_head_stride,
                     const void* k_cache, const void* v_cache, const Batch* batch,
                     const AttentionLayer* layer) {
  const Call call = {batch, layer, q, q_row_stride, q_head_stride, k_cache, v_cache, out};
  switch (layer->dtype) {
    case kFloat32: return run<float>(call);
    case kFloat16: return run<f16>(call);
    default: return run<bf16>(call);
  }
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
