// Paged attention: prefill chunks and decodes of one step in one call.
//
// A unit is a block of consecutive rows of one sequence with one KV head. Its lines are the rows'
// query heads of that KV head, at most kUnitLines of them (or one row's), so keys and values are
// read once for all of them. A unit walks its keys in tiles of kTile positions, as flash attention
// does (Dao 2023):
//
//   keys     a tile's keys are transposed into words of one lane each, [head_dim / kDepth][kTile],
//            so that a score is a lane and needs no sum over lanes; bf16 stays in pairs
//   scores   lines x tile = queries times keys, float32
//   weights  scale, soft-cap, slopes, mask; running maximum and sum of each line; exp in place
//   values   the tile's values as float32, [kTile][head_dim]; lines x head_dim += weights times
//            values, over exactly the keys that the row sees
//
// What a row gets depends on its own keys alone, bit for bit: tiles begin at multiples of kTile,
// whichever rows share the unit; each line's sums run in the order of the keys; and after each
// kSplit positions a line's sum is closed and merged into the row's result in ascending order.
// A long unit's splits can therefore be handed to different threads without a change in the bits.

#include "attention.h"

#include <stdlib.h>

#include "parallel.h"
#include "simd.h"
#include "vector_math.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kSplit = 512;
constexpr int64_t kUnitLines = 64;
constexpr int64_t kTasksPerThread = 8;
constexpr int kBlockLines = kManyRegisters ? 6 : 4;
constexpr int kBlockVecs = kManyRegisters ? 4 : 2;

MANYLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MANYLORA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
MANYLORA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MANYLORA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The element type of a transposed tile of keys.
template <class T>
struct TileOf {
  using type = float;
};
template <>
struct TileOf<bf16> {
  using type = bf16;
};

// c [lines][columns] = keep[line] * c + a b; without keep, c = a b.
// a: [lines][depth], b: [depth / kDepth][columns][kDepth].
template <class E, int M, int N>
MANYLORA_INLINE void product_block(const Hidden<E>* a, int64_t a_stride, const E* b,
                                   int64_t b_stride, int64_t depth, const float* keep, float* c,
                                   int64_t c_stride) {
  Vec acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      acc[m][n] = keep ? mul(splat(keep[m]), load(c + m * c_stride + n * kLanes)) : zero();
    }
  }
  for (int64_t k = 0; k < depth; k += kDepth<E>) {
    Operand<E> right[N];
    for (int n = 0; n < N; ++n) right[n] = load_operand<E>(b + n * kStep<E>);
    for (int m = 0; m < M; ++m) {
      const Operand<E> left = broadcast<E>(a + m * a_stride + k);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], left, right[n]);
    }
    b += b_stride;
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, acc[m][n]);
  }
}

template <class E, int N>
static void product_lines(int64_t lines, const Hidden<E>* a, int64_t a_stride, const E* b,
                          int64_t b_stride, int64_t depth, const float* keep, float* c,
                          int64_t c_stride) {
  for (int64_t m = 0; m < lines; m += kBlockLines) {
    const Hidden<E>* am = a + m * a_stride;
    const float* km = keep ? keep + m : nullptr;
    float* cm = c + m * c_stride;
    switch (smaller(lines - m, kBlockLines)) {
      case 1: product_block<E, 1, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride); break;
      case 2: product_block<E, 2, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride); break;
      case 3: product_block<E, 3, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride); break;
      case 4: product_block<E, 4, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride); break;
      default:
        if constexpr (kBlockLines == 6) {
          if (lines - m == 5) {
            product_block<E, 5, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride);
          } else {
            product_block<E, 6, N>(am, a_stride, b, b_stride, depth, km, cm, c_stride);
          }
        }
    }
  }
}

template <class E>
static void product(int64_t lines, int64_t vecs, const Hidden<E>* a, int64_t a_stride, const E* b,
                    int64_t b_stride, int64_t depth, const float* keep, float* c,
                    int64_t c_stride) {
  int64_t n = 0;
  for (; n + kBlockVecs <= vecs; n += kBlockVecs) {
    product_lines<E, kBlockVecs>(lines, a, a_stride, b + n * kStep<E>, b_stride, depth, keep,
                                 c + n * kLanes, c_stride);
  }
  for (; n < vecs; ++n) {
    product_lines<E, 1>(lines, a, a_stride, b + n * kStep<E>, b_stride, depth, keep,
                        c + n * kLanes, c_stride);
  }
}

struct Call {
  const Batch* batch;
  const AttentionLayer* layer;
  const void* q;
  int64_t q_row_stride;
  int64_t q_head_stride;
  const void* k_cache;
  const void* v_cache;
  void* out;
};

// Consecutive rows of one sequence; the head is the task's.
struct Unit {
  int64_t sequence;
  int64_t row, rows;  // in the flat batch
  int64_t position;   // of the first row
  int64_t lo, hi;     // keys that some row sees
  int64_t first_split, splits;
  int64_t tasks;       // that share the unit
  int64_t part;        // floats of a split's result
  float* partials;     // [kv_heads][splits][part], if several tasks share it
  int64_t* remaining;  // [kv_heads], its tasks that have not finished
};

struct Task {
  Unit* unit;
  int64_t first_split, splits;
};

// A softmax under way: highest score, sum of weights, weighted sum of values of each line.
struct Part {
  float* top;    // [lines]
  float* sum;    // [lines]
  float* acc;    // [lines][width]
};

// Sizes of one call, in elements; width and depth are head_dim padded to whole vectors and pairs.
struct Sizes {
  int64_t group;  // query heads of a KV head
  int64_t lines;  // of the largest unit
  int64_t depth;
  int64_t width;
};

MANYLORA_INLINE int64_t part_floats(int64_t lines, int64_t width) {
  return round_up(lines * (width + 2), 16);
}
MANYLORA_INLINE Part part_at(float* memory, int64_t lines, int64_t width) {
  float* const top = memory + lines * width;
  return {top, top + lines, memory};
}

static void clear(const Part& part, int64_t lines, int64_t width) {
  for (int64_t i = 0; i < lines; ++i) {
    part.top[i] = -kInfinity;
    part.sum[i] = 0.0f;
  }
  memset(part.acc, 0, static_cast<size_t>(lines * width) * sizeof(float));
}

// A score of -inf weighs 0, and a line of nothing but such scores must not become NaN by it.
MANYLORA_INLINE float shift_of(float top) { return top == -kInfinity ? 0.0f : top; }
MANYLORA_INLINE float exp_of(float x) {
  float y;
  store(&y, exp(splat(x)), 1);
  return y;
}

static void merge(const Part& from, const Part& into, int64_t lines, int64_t width) {
  for (int64_t i = 0; i < lines; ++i) {
    const float top = from.top[i] > into.top[i] ? from.top[i] : into.top[i];
    const float old_share = exp_of(into.top[i] - shift_of(top));
    const float new_share = exp_of(from.top[i] - shift_of(top));
    into.top[i] = top;
    into.sum[i] = into.sum[i] * old_share + from.sum[i] * new_share;
    float* acc = into.acc + i * width;
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec added = mul(load(from.acc + i * width + j), splat(new_share));
      store(acc + j, fma(load(acc + j), splat(old_share), added));
    }
  }
}

// In whole cache lines.
static void* allocate(int64_t count, size_t size) {
  const size_t line = 64, bytes = (static_cast<size_t>(count) * size + line) / line * line;
  void* memory = aligned_alloc(line, bytes);
  if (memory == nullptr) abort();
  return memory;
}

// Memory that a thread keeps for its next unit.
struct Scratch {
  void* q;        // Hidden<E> [lines][depth]
  float* keys;    // words of E [depth / kDepth][kTile]
  float* values;  // [kTile][width]
  float* scores;  // [lines][kTile]
  float* keep;    // [lines]
  Part part;
  Part total;
};

static Scratch scratch_of(const Sizes& sizes) {
  static thread_local float* memory = nullptr;
  static thread_local int64_t held = 0;
  const int64_t part = part_floats(sizes.lines, sizes.width);
  const int64_t floats = sizes.lines * (sizes.depth + kTile + 1) +
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
  s.keep = next, next += sizes.lines;
  s.q = next;
  return s;
}

// Where a tile's keys and values lie, in elements from the start of the cache.
struct Places {
  int64_t at[kTile];
};

static void find(const Call& call, int64_t sequence, int64_t head, int64_t lo, int64_t hi,
                 Places* places) {
  const AttentionLayer& layer = *call.layer;
  const int32_t* table = call.batch->block_table + sequence * call.batch->table_stride;
  const int64_t block_stride = layer.kv_heads * layer.block_size * layer.head_dim;
  const int64_t head_start = head * layer.block_size * layer.head_dim;
  int64_t block = lo / layer.block_size, offset = lo % layer.block_size;
  for (int64_t j = 0; j < hi - lo; ++block, offset = 0) {
    int64_t at = table[block] * block_stride + head_start + offset * layer.head_dim;
    for (; offset < layer.block_size && j < hi - lo; ++offset, ++j, at += layer.head_dim) {
      places->at[j] = at;
    }
  }
}

MANYLORA_INLINE Vec load_words(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
MANYLORA_INLINE Vec load_words(const float* p) { return load(p); }
MANYLORA_INLINE Vec load_words(const f16* p) { return load(p); }
template <class T>
MANYLORA_INLINE Vec load_words(const T* p, int64_t n) {
  T whole[kStep<T>] = {};
  memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load_words(whole);
}

// Transposes `count` keys, which belong at `first` of the tile; columns beside them repeat a key.
template <class T>
static void pack_keys(const T* cache, const Places& places, int64_t first, int64_t count,
                      int64_t head_dim, float* words) {
  for (int64_t column = first / kLanes * kLanes; column < first + count; column += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kStep<T>) {
      Vec rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t key = column + i - first;
        const T* p = cache + places.at[key < 0 ? 0 : smaller(key, count - 1)] + d;
        rows[i] = d + kStep<T> <= head_dim ? load_words(p) : load_words(p, head_dim - d);
      }
      transpose(rows);
      const int64_t filled = smaller(kLanes, ceil_div(head_dim - d, kDepth<T>));
      float* to = words + d / kDepth<T> * kTile + column;
      for (int64_t i = 0; i < filled; ++i) store(to + i * kTile, rows[i]);
    }
  }
}

template <class T>
static void pack_values(const T* cache, const Places& places, int64_t first, int64_t count,
                        int64_t head_dim, int64_t width, float* values) {
  for (int64_t j = 0; j < count; ++j) {
    const T* p = cache + places.at[j];
    float* to = values + (first + j) * width;
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(p + d));
    if (d < head_dim) store(to + d, load(p + d, head_dim - d));
  }
}

MANYLORA_INLINE void copy_query(const bf16* p, int64_t n, int64_t depth, bf16* to) {
  memcpy(to, p, static_cast<size_t>(n) * sizeof(bf16));
  for (int64_t d = n; d < depth; ++d) to[d].bits = 0;
}
template <class T>
MANYLORA_INLINE void copy_query(const T* p, int64_t n, int64_t depth, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load(p + d));
  if (d < n) store(to + d, load(p + d, n - d), smaller(depth - d, kLanes));
}

// Turns the scores of keys [lo, hi) of a tile into weights and brings the line's softmax forward.
// distance: position of the tile's first key less the row's.
static void weigh(const AttentionLayer& layer, float slope, int64_t distance, int64_t lo, int64_t hi,
                  float* scores, float* top, float* weight_sum, float* keep) {
  static const float kRamp[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t from = lo / kLanes * kLanes, to = round_up(hi, kLanes);
  for (int64_t i = from; i < to; i += kLanes) {
    Vec x = mul(load(scores + i), splat(layer.scale));
    if (layer.softcap > 0.0f) {
      x = mul(tanh(mul(x, splat(1.0f / layer.softcap))), splat(layer.softcap));
    }
    if (layer.slopes != nullptr) {
      const Vec away = add(splat(static_cast<float>(distance + i)), load(kRamp));
      x = fma(splat(slope), away, x);
    }
    store(scores + i, x);
  }
  for (int64_t i = from; i < lo; ++i) scores[i] = -kInfinity;
  for (int64_t i = hi; i < to; ++i) scores[i] = -kInfinity;
  Vec highest = splat(*top);
  for (int64_t i = from; i < to; i += kLanes) highest = max(highest, load(scores + i));
  const float new_top = max_lane(highest), shift = shift_of(new_top);
  Vec weights = zero();
  for (int64_t i = from; i < to; i += kLanes) {
    const Vec weight = exp(sub(load(scores + i), splat(shift)));
    store(scores + i, weight);
    weights = add(weights, weight);
  }
  *keep = exp_of(*top - shift);
  *weight_sum = *weight_sum * *keep + sum(weights);
  *top = new_top;
}

// The keys that the row at `position` sees, within [lo, hi).
struct Span {
  int64_t lo, hi;
};
MANYLORA_INLINE Span seen(const AttentionLayer& layer, int64_t position, int64_t lo, int64_t hi) {
  const int64_t begin = layer.window > 0 ? position - layer.window + 1 : 0;
  return {larger(lo, begin), smaller(hi, position + 1)};
}

// One tile, whose keys [lo, hi) some row of the unit sees: into s.part.
template <class T>
static void attend_tile(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                        int64_t tile, int64_t lo, int64_t hi, const Scratch& s) {
  using E = typename TileOf<T>::type;
  const AttentionLayer& layer = *call.layer;
  const int64_t group = sizes.group;
  Places places;
  find(call, unit.sequence, head, lo, hi, &places);
  pack_keys(static_cast<const T*>(call.k_cache), places, lo - tile, hi - lo, layer.head_dim,
            s.keys);
  product<E>(unit.rows * group, ceil_div(hi - tile, kLanes), static_cast<const Hidden<E>*>(s.q),
             sizes.depth, reinterpret_cast<const E*>(s.keys), kTile * kDepth<E>, sizes.depth,
             nullptr, s.scores, kTile);
  pack_values(static_cast<const T*>(call.v_cache), places, lo - tile, hi - lo, layer.head_dim,
              sizes.width, s.values);
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
            s.part.top + i, s.part.sum + i, s.keep + i);
    }
    product<float>((next - r) * group, sizes.width / kLanes,
                   s.scores + r * group * kTile + span.lo - tile, kTile,
                   s.values + (span.lo - tile) * sizes.width, sizes.width, span.hi - span.lo,
                   s.keep + r * group, s.part.acc + r * group * sizes.width, sizes.width);
  }
}

template <class T>
static void load_queries(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                         void* to) {
  using E = typename TileOf<T>::type;
  const T* q = static_cast<const T*>(call.q);
  for (int64_t i = 0; i < unit.rows * sizes.group; ++i) {
    const int64_t row = unit.row + i / sizes.group, query_head = head * sizes.group + i % sizes.group;
    copy_query(q + row * call.q_row_stride + query_head * call.q_head_stride, call.layer->head_dim,
               sizes.depth, static_cast<Hidden<E>*>(to) + i * sizes.depth);
  }
}

// The softmax before any key: nothing, or the sink, which has a weight but no value.
static void begin_total(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                        const Part& total) {
  const int64_t lines = unit.rows * sizes.group;
  clear(total, lines, sizes.width);
  if (call.layer->sinks == nullptr) return;
  for (int64_t i = 0; i < lines; ++i) {
    total.top[i] = call.layer->sinks[head * sizes.group + i % sizes.group];
    total.sum[i] = 1.0f;
  }
}

template <class T>
static void finish(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                   const Part& total) {
  const int64_t head_dim = call.layer->head_dim;
  for (int64_t i = 0; i < unit.rows * sizes.group; ++i) {
    const int64_t row = unit.row + i / sizes.group, query_head = head * sizes.group + i % sizes.group;
    T* to = static_cast<T*>(call.out) + (row * call.layer->heads + query_head) * head_dim;
    const float* acc = total.acc + i * sizes.width;
    const Vec share = splat(1.0f / total.sum[i]);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, mul(load(acc + d), share));
    if (d < head_dim) store(to + d, mul(load(acc + d), share), head_dim - d);
  }
}

// The keys of one split, [lo, hi): into s.part.
template <class T>
static void attend_split(const Call& call, const Sizes& sizes, const Unit& unit, int64_t head,
                         int64_t lo, int64_t hi, const Scratch& s) {
  clear(s.part, unit.rows * sizes.group, sizes.width);
  for (int64_t tile = lo / kTile * kTile; tile < hi; tile += kTile) {
    attend_tile<T>(call, sizes, unit, head, tile, larger(lo, tile), smaller(hi, tile + kTile), s);
  }
}

template <class T>
static void attend(const Call& call, const Sizes& sizes, const Task& task, int64_t head) {
  const Unit& unit = *task.unit;
  const int64_t lines = unit.rows * sizes.group;
  const bool whole = unit.tasks == 1;
  float* const partials = whole ? nullptr : unit.partials + head * unit.splits * unit.part;
  Scratch s = scratch_of(sizes);
  load_queries<T>(call, sizes, unit, head, s.q);
  if (whole) begin_total(call, sizes, unit, head, s.total);
  for (int64_t i = task.first_split; i < task.first_split + task.splits; ++i) {
    const int64_t lo = larger(unit.lo, i * kSplit), hi = smaller(unit.hi, (i + 1) * kSplit);
    if (!whole) {
      s.part = part_at(partials + (i - unit.first_split) * unit.part, lines, sizes.width);
    }
    attend_split<T>(call, sizes, unit, head, lo, hi, s);
    if (whole) merge(s.part, s.total, lines, sizes.width);
  }
  if (!whole) {
    // The last of the unit's tasks merges, in the order in which one task would have.
    if (__atomic_sub_fetch(unit.remaining + head, 1, __ATOMIC_ACQ_REL) != 0) return;
    begin_total(call, sizes, unit, head, s.total);
    for (int64_t i = 0; i < unit.splits; ++i) {
      merge(part_at(partials + i * unit.part, lines, sizes.width), s.total, lines, sizes.width);
    }
  }
  finish<T>(call, sizes, unit, head, s.total);
}

static int64_t list_units(const Call& call, const Sizes& sizes, int64_t rows_per_unit,
                          Unit* units) {
  const Batch& batch = *call.batch;
  Unit* next = units;
  for (int64_t s = 0; s < batch.seqs; ++s) {
    const int64_t begin = batch.seq_starts[s], end = batch.seq_starts[s + 1];
    for (int64_t row = begin; row < end; row += rows_per_unit) {
      Unit& unit = *next++;
      unit.sequence = s;
      unit.row = row;
      unit.rows = smaller(rows_per_unit, end - row);
      unit.position = batch.context[s] - (end - row);
      unit.lo = seen(*call.layer, unit.position, 0, 1).lo;
      unit.hi = unit.position + unit.rows;
      unit.first_split = unit.lo / kSplit;
      unit.splits = ceil_div(unit.hi, kSplit) - unit.first_split;
      unit.part = part_floats(unit.rows * sizes.group, sizes.width);
    }
  }
  return next - units;
}

// One call's tasks and the memory that they share.
struct Work {
  Unit* units;
  Task* tasks;
  int64_t task_count;
  float* partials;
  int64_t* remaining;
};

// A unit is one task; one that is much longer than a thread's fair share becomes several.
static Work make_work(const Call& call, const Sizes& sizes) {
  const int64_t kv_heads = call.layer->kv_heads;
  const int64_t rows_per_unit = larger(1, kUnitLines / sizes.group);
  const int64_t most_units = call.batch->seqs + call.batch->rows / rows_per_unit;
  Work work = {};
  work.units = static_cast<Unit*>(allocate(most_units, sizeof(Unit)));
  const int64_t count = list_units(call, sizes, rows_per_unit, work.units);

  int64_t splits = 0, tasks = 0, shared = 0;
  for (int64_t u = 0; u < count; ++u) splits += work.units[u].splits;
  const int64_t fair = ceil_div(splits * kv_heads, threads() * kTasksPerThread);
  for (int64_t u = 0; u < count; ++u) {
    Unit& unit = work.units[u];
    unit.tasks = ceil_div(unit.splits, fair);
    tasks += unit.tasks;
    if (unit.tasks > 1) shared += kv_heads * unit.splits * unit.part;
  }
  work.tasks = static_cast<Task*>(allocate(tasks, sizeof(Task)));
  work.remaining = static_cast<int64_t*>(allocate(count * kv_heads, sizeof(int64_t)));
  work.partials = static_cast<float*>(allocate(shared, sizeof(float)));

  float* next = work.partials;
  for (int64_t u = 0; u < count; ++u) {
    Unit& unit = work.units[u];
    unit.remaining = work.remaining + u * kv_heads;
    for (int64_t h = 0; h < kv_heads; ++h) unit.remaining[h] = unit.tasks;
    unit.partials = next;
    if (unit.tasks > 1) next += kv_heads * unit.splits * unit.part;
    for (int64_t done = 0; done < unit.splits; done += fair) {
      work.tasks[work.task_count++] = {&unit, unit.first_split + done,
                                       smaller(fair, unit.splits - done)};
    }
  }
  return work;
}

static void release(const Work& work) {
  free(work.units);
  free(work.tasks);
  free(work.remaining);
  free(work.partials);
}

template <class T>
static void run(const Call& call) {
  const AttentionLayer& layer = *call.layer;
  Sizes sizes;
  sizes.group = layer.heads / layer.kv_heads;
  sizes.lines = larger(kUnitLines, sizes.group);
  sizes.depth = round_up(layer.head_dim, kDepth<typename TileOf<T>::type>);
  sizes.width = round_up(layer.head_dim, kLanes);
  const Work work = make_work(call, sizes);
  parallel_tasks(work.task_count * layer.kv_heads, threads(), [&](int64_t i) {
    attend<T>(call, sizes, work.tasks[i / layer.kv_heads], i % layer.kv_heads);
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
