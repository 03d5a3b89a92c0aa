// y = x W^T + b in bfloat16, for the skinny x of decoding and for prefill alike.
//
// W [out, in] is packed in panels of 16 outputs, a panel as [in / 2][16 outputs][2]: 32 inputs of a
// panel are one AMX tile of B (16 rows of 64 bytes), each of its rows is one operand of vdpbf16ps,
// and a shift and a mask make float32 of the evens and odds of any part of it.
// Decoding is bound by the reading of W, so a task is a run of panels, and each weight is read once
// for all rows of a decoding batch (of very long rows, for as many as are widened at once); for
// prefill panels lie in the cache while the rows pass by.
//
// An element of y is one accumulator's sum over ascending inputs, whatever the number of rows and
// threads, so a row's bits do not depend on its neighbours.

#include "kernels.h"
#include "rows.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif
#if !defined(__AVX512BF16__)
#include "scratch.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kPanel = 16;     // outputs
constexpr int64_t kTasksEach = 6;  // for each thread, where there are panels enough
constexpr int64_t kAhead = 1024;   // bytes that prefetches run ahead within a panel

#if defined(__AVX512BF16__)
using Input = bf16;
#else
using Input = float;
#endif

struct Operands {
  const Input* x;
  int64_t x_stride, rows, in;
  const bf16 *weight, *bias;
  bf16* y;
  int64_t y_stride, out;
};

// Sums of one row, of kLanes outputs from `column` on, into y, with the bias.
MANYLORA_INLINE void finish(const Operands& o, int64_t row, int64_t column, Vec sums) {
  const int64_t left = o.out - column;
  bf16* const y = o.y + row * o.y_stride + column;
  if (left >= kLanes) {
    if (o.bias) sums = add(sums, load(o.bias + column));
    store(y, sums);
  } else if (left > 0) {
    if (o.bias) sums = add(sums, load(o.bias + column, left));
    store(y, sums, left);
  }
}

#if defined(__AMX_BF16__)
#include "product_amx.h"
#elif defined(__AVX512BF16__)
#include "product_avx512bf16.h"
#else
#include "product_widened.h"
#endif

void multiply(const Operands& operands) {
  const int64_t pairs = ceil_div(operands.out, 2 * kPanel), workers = threads();
  const int64_t count = ceil_div(operands.out, kPanel);
  const int64_t step = ceil_div(pairs, workers * kTasksEach) * 2;
  parallel_tasks(ceil_div(count, step), workers, [&](int64_t task) {
    panels(operands, task * step, least((task + 1) * step, count));
  });
}

}  // namespace

void linear(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
            const void* weight, const void* bias, int64_t in, int64_t out) {
  const bf16* const from = static_cast<const bf16*>(x);
  const bf16* const w = static_cast<const bf16*>(weight);
  const bf16* const b = static_cast<const bf16*>(bias);
  bf16* const to = static_cast<bf16*>(y);
#if defined(__AVX512BF16__)
  if (rows > 0) multiply({from, x_stride, rows, in, w, b, to, y_stride, out});
#else
  const int64_t most = rows_of(kMostBytes, in);
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = least(rows - row, most);
    const float* const wide = widen(from + row * x_stride, x_stride, count, in);
    multiply({wide, wide_stride(in), count, in, w, b, to + row * y_stride, y_stride, out});
  }
#endif
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
