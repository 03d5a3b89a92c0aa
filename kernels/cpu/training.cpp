// The low-rank part for training: y += scale * B (A x) for each row by its own adapter, and dx, dA,
// dB. Factors lie stacked along their ranks (kernels/stack.py), A [ranks, in] and Bᵀ [ranks, out].
//
// Two products do everything. project: h[i][j] = scale * <row i, factor row j>, which makes h = A x
// and g = Bᵀ dy. combine: line i = sum over d of c[i][d] * line d, which makes y += h Bᵀ and
// dx += g A (over ranks), dA = gᵀ x and dBᵀ = hᵀ dy (over the adapter's rows). Everything is read
// along contiguous rows. h and g are float32, by the row's place in the plan's order.
//
// A task has some rows of one segment; then, for the factors' gradients, some columns of one slot,
// over all of its rows. Every number is one accumulator's sum in a fixed order: neither the other
// adapters' rows nor the number of threads matter, and nothing is added up atomically.

#include "edit_job.h"
#include "parallel.h"
#include "rows.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kTaskRows = 16, kTaskColumns = 256;
constexpr int64_t kSerialCost = 100000;  // multiply-adds
constexpr int64_t kSegmentTasks = kMaxSegment / kTaskRows;

// Rows of a matrix, or of some of its rows by index.
template <class E>
struct Lines {
  E* base;
  int64_t stride;
  const int32_t* index;

  E* at(int64_t i) const { return base + (index ? index[i] : i) * stride; }
};

struct Stack {
  int64_t slots, max_rank;
  const int32_t* starts;
  const float* scale;

  int64_t rank(int64_t slot) const { return starts[slot + 1] - starts[slot]; }
};

// Threads for a product of all edited rows with factors n wide; little work wakes none.
static int64_t workers(const Plan& plan, const Stack& stack, int64_t n) {
  return plan.edited * stack.max_rank * n < kSerialCost ? 1 : threads();
}

template <class X, class F, int R, int J>
MANYLORA_INLINE void project_tile(const Lines<const X>& x, int64_t row, const F* factor, int64_t n,
                                  float scale, float* h, int64_t h_stride) {
  const X* rows[R];
  Vec acc[R][J];
  for (int i = 0; i < R; ++i) {
    rows[i] = x.at(row + i);
    for (int j = 0; j < J; ++j) acc[i][j] = zero();
  }
  each_vec(n, [&](int64_t k, auto part) {
    Vec xs[R];
    for (int i = 0; i < R; ++i) xs[i] = load(rows[i] + k, part);
    for (int j = 0; j < J; ++j) {
      const Vec fs = load(factor + j * n + k, part);
      for (int i = 0; i < R; ++i) acc[i][j] = fma(xs[i], fs, acc[i][j]);
    }
  });
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < J; ++j) h[i * h_stride + j] = scale * sum(acc[i][j]);
  }
}

template <class X, class F, int R>
static void project_ranks(const Lines<const X>& x, int64_t row, const F* factor, int64_t rank,
                          int64_t n, float scale, float* h, int64_t h_stride) {
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    project_tile<X, F, R, 4>(x, row, factor + j * n, n, scale, h + j, h_stride);
  }
  for (; j < rank; ++j) project_tile<X, F, R, 1>(x, row, factor + j * n, n, scale, h + j, h_stride);
}

// h [count][rank] = scale * x factorᵀ; factor row-major [rank][n].
template <class X, class F>
static void project(const Lines<const X>& x, int64_t count, const F* factor, int64_t rank,
                    int64_t n, float scale, float* h, int64_t h_stride) {
  int64_t i = 0;
  for (; i + kTileRows <= count; i += kTileRows) {
    project_ranks<X, F, kTileRows>(x, i, factor, rank, n, scale, h + i * h_stride, h_stride);
  }
  for (; i < count; ++i) {
    project_ranks<X, F, 1>(x, i, factor, rank, n, scale, h + i * h_stride, h_stride);
  }
}

// The coefficients of a combination: of line i and source d.
struct Coefficients {
  const float* base;
  int64_t line, source;
};

template <class To, class From, int M, int C, class Part>
MANYLORA_INLINE void combine_tile(const Lines<To>& to, int64_t line, const Lines<const From>& from,
                                  int64_t depth, const Coefficients& c, int64_t column, bool add_to,
                                  Part part) {
  Vec acc[M][C];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < C; ++v) acc[i][v] = zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    const From* source = from.at(d) + column;
    Vec vs[C];
    for (int v = 0; v < C; ++v) vs[v] = load(source + v * kLanes, part);
    for (int i = 0; i < M; ++i) {
      const Vec factor = splat(c.base[(line + i) * c.line + d * c.source]);
      for (int v = 0; v < C; ++v) acc[i][v] = fma(factor, vs[v], acc[i][v]);
    }
  }
  for (int i = 0; i < M; ++i) {
    To* out = to.at(line + i) + column;
    for (int v = 0; v < C; ++v) {
      To* p = out + v * kLanes;
      store(p, add_to ? add(load(p, part), acc[i][v]) : acc[i][v], part);
    }
  }
}

template <class To, class From, int M>
static void combine_columns(const Lines<To>& to, int64_t line, const Lines<const From>& from,
                            int64_t depth, const Coefficients& c, int64_t column, int64_t end,
                            bool add_to) {
  for (; column + 4 * kLanes <= end; column += 4 * kLanes) {
    combine_tile<To, From, M, 4>(to, line, from, depth, c, column, add_to, Whole());
  }
  for (; column + kLanes <= end; column += kLanes) {
    combine_tile<To, From, M, 1>(to, line, from, depth, c, column, add_to, Whole());
  }
  if (column < end) {
    combine_tile<To, From, M, 1>(to, line, from, depth, c, column, add_to, Tail{end - column});
  }
}

// Columns [column, end) of to[i] = sum over d of c[i][d] * from[d], or added to what is there.
template <class To, class From>
static void combine(const Lines<To>& to, int64_t lines, const Lines<const From>& from,
                    int64_t depth, const Coefficients& c, int64_t column, int64_t end,
                    bool add_to) {
  int64_t i = 0;
  for (; i + kTileRows <= lines; i += kTileRows) {
    combine_columns<To, From, kTileRows>(to, i, from, depth, c, column, end, add_to);
  }
  for (; i < lines; ++i) combine_columns<To, From, 1>(to, i, from, depth, c, column, end, add_to);
}

// Some rows of one adapter.
struct Piece {
  const int32_t* rows;
  int64_t place, count;  // in the plan's order
  int64_t slot, first_rank, rank;
};

// Calls visit(piece) for every few rows of every segment whose adapter has a rank. n: see workers.
template <class Visit>
static void each_piece(const Plan& plan, const Stack& stack, int64_t n, const Visit& visit) {
  parallel_tasks(plan.segments * kSegmentTasks, workers(plan, stack, n), [&](int64_t task) {
    const int64_t segment = task / kSegmentTasks;
    const int64_t begin = plan.starts[segment] + task % kSegmentTasks * kTaskRows;
    const int64_t left = plan.starts[segment + 1] - begin;
    const int64_t slot = plan.slots[segment];
    if (left <= 0 || stack.rank(slot) == 0) return;
    visit(Piece{plan.order + begin, begin, left < kTaskRows ? left : kTaskRows, slot,
                stack.starts[slot], stack.rank(slot)});
  });
}

template <class F>
struct Factors {
  const F *a, *bt;
  int64_t in, out;
};

template <class T, class F>
static void forward(T* y, int64_t y_stride, const T* x, int64_t x_stride, const Factors<F>& f,
                    float* hidden, const Stack& stack, const Plan& plan) {
  each_piece(plan, stack, f.in + f.out, [&](const Piece& p) {
    float* const h = hidden + p.place * stack.max_rank;
    project(Lines<const T>{x, x_stride, p.rows}, p.count, f.a + p.first_rank * f.in, p.rank, f.in,
            stack.scale[p.slot], h, stack.max_rank);
    combine(Lines<T>{y, y_stride, p.rows}, p.count,
            Lines<const F>{f.bt + p.first_rank * f.out, f.out, nullptr}, p.rank,
            Coefficients{h, stack.max_rank, 1}, 0, f.out, true);
  });
}

// h and g of every row, scaled, and dx.
template <class T, class F>
static void row_gradients(T* dx, int64_t dx_stride, const T* dy, int64_t dy_stride, const T* x,
                          int64_t x_stride, const Factors<F>& f, float* hidden, float* d_hidden,
                          const Stack& stack, const Plan& plan) {
  each_piece(plan, stack, f.in + f.out, [&](const Piece& p) {
    const F* const a = f.a + p.first_rank * f.in;
    const float scale = stack.scale[p.slot];
    float* const g = d_hidden + p.place * stack.max_rank;
    project(Lines<const T>{x, x_stride, p.rows}, p.count, a, p.rank, f.in, scale,
            hidden + p.place * stack.max_rank, stack.max_rank);
    project(Lines<const T>{dy, dy_stride, p.rows}, p.count, f.bt + p.first_rank * f.out, p.rank,
            f.out, scale, g, stack.max_rank);
    combine(Lines<T>{dx, dx_stride, p.rows}, p.count, Lines<const F>{a, f.in, nullptr}, p.rank,
            Coefficients{g, stack.max_rank, 1}, 0, f.in, true);
  });
}

// gradient [ranks][n] = coefficientsᵀ x for every slot over its rows; zeros where it has none.
template <class T, class F>
static void factor_gradient(F* gradient, const T* x, int64_t x_stride, int64_t n,
                            const float* coefficients, const Stack& stack, const Plan& plan) {
  const int64_t parts = (n + kTaskColumns - 1) / kTaskColumns;
  parallel_tasks(stack.slots * parts, workers(plan, stack, n), [&](int64_t task) {
    const int64_t slot = task / parts, column = task % parts * kTaskColumns;
    int64_t segment = 0;
    while (segment < plan.segments && plan.slots[segment] < slot) ++segment;
    const int64_t begin = plan.starts[segment];
    while (segment < plan.segments && plan.slots[segment] == slot) ++segment;
    combine(Lines<F>{gradient + stack.starts[slot] * n, n, nullptr}, stack.rank(slot),
            Lines<const T>{x, x_stride, plan.order + begin}, plan.starts[segment] - begin,
            Coefficients{coefficients + begin * stack.max_rank, 1, stack.max_rank}, column,
            column + kTaskColumns < n ? column + kTaskColumns : n, false);
  });
}

// Calls visit(T(), F()) for the element types of rows and of factors, which are those or float.
template <class Visit>
static void with_types(int64_t dtype, int64_t factor_dtype, const Visit& visit) {
  const bool wide = factor_dtype == kFloat32;
  if (dtype == kFloat32) return visit(float(), float());
  if (dtype == kFloat16) return wide ? visit(f16(), float()) : visit(f16(), f16());
  return wide ? visit(bf16(), float()) : visit(bf16(), bf16());
}

}  // namespace

// y [rows, out], x [rows, in], strides in elements; hidden: float [edited, max_rank], scratch. See
// kernels/reference_training.py.
void add_low_rank(void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a,
                  const void* bt, int64_t in, int64_t out, float* hidden, int64_t slots,
                  int64_t max_rank, const int32_t* starts, const float* scale, const int32_t* plan,
                  int64_t dtype, int64_t factor_dtype) {
  with_types(dtype, factor_dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    forward(static_cast<T*>(y), y_stride, static_cast<const T*>(x), x_stride,
            Factors<F>{static_cast<const F*>(a), static_cast<const F*>(bt), in, out}, hidden,
            Stack{slots, max_rank, starts, scale}, Plan(plan));
  });
}

// hidden: float [2, edited, max_rank], scratch.
void low_rank_backward(void* dx, int64_t dx_stride, void* da, void* dbt, const void* dy,
                       int64_t dy_stride, const void* x, int64_t x_stride, const void* a,
                       const void* bt, int64_t in, int64_t out, float* hidden, int64_t slots,
                       int64_t max_rank, const int32_t* starts, const float* scale,
                       const int32_t* plan_words, int64_t dtype, int64_t factor_dtype) {
  with_types(dtype, factor_dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    const Plan plan(plan_words);
    const Stack stack{slots, max_rank, starts, scale};
    const Factors<F> factors{static_cast<const F*>(a), static_cast<const F*>(bt), in, out};
    const T* const rows = static_cast<const T*>(x);
    const T* const d_rows = static_cast<const T*>(dy);
    float* const d_hidden = hidden + plan.edited * max_rank;
    row_gradients(static_cast<T*>(dx), dx_stride, d_rows, dy_stride, rows, x_stride, factors,
                  hidden, d_hidden, stack, plan);
    factor_gradient(static_cast<F*>(da), rows, x_stride, in, d_hidden, stack, plan);
    factor_gradient(static_cast<F*>(dbt), d_rows, dy_stride, out, hidden, stack, plan);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
