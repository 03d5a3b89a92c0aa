// y = x W^T + b in bfloat16, for the skinny x of decoding and for prefill alike.
//
// W [out, in] is packed in panels of 16 outputs, a panel as [in / 2][16 outputs][2]: 32 inputs of a
// panel are one AMX tile of B (16 rows of 64 bytes), and each of its rows one operand of vdpbf16ps.
// Decoding is bound by the reading of W, so a task is a run of panels, two of them read side by side
// and each weight once for every 32 rows of x; for prefill the two panels lie in the cache while
// the rows pass by.
//
// An element of y is one accumulator's sum over ascending inputs, whatever the number of rows and
// threads, so a row's bits do not depend on its neighbours.

#include "parallel.h"
#include "product.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kPanel = 16;       // outputs
constexpr int64_t kTasksEach = 6;    // for each thread, where there are panels enough
constexpr int64_t kAhead = 1024;     // bytes that prefetches run ahead within a panel

struct Operands {
  const bf16* x;
  int64_t x_stride, rows, in;
  const bf16 *weight, *bias;
  bf16* y;
  int64_t y_stride, out;
};

#if defined(__AVX512BF16__)
// One row of 16 sums into y, with the bias.
MANYLORA_INLINE void finish(const Operands& o, int64_t row, int64_t column, Vec sums) {
  const int64_t left = o.out - column;
  bf16* const y = o.y + row * o.y_stride + column;
  if (left >= kPanel) {
    if (o.bias) sums = add(sums, load(o.bias + column));
    store(y, sums);
  } else {
    if (o.bias) sums = add(sums, load(o.bias + column, left));
    store(y, sums, left);
  }
}
#endif

#if defined(__AMX_BF16__)
#include "product_amx.h"
#elif defined(__AVX512BF16__)
#include "product_avx512bf16.h"
#else
// Right, not quick: here `packs` says no, and torch's own product is used.
void panels(const Operands& o, int64_t begin, int64_t end) {
  const int64_t last = end * kPanel < o.out ? end * kPanel : o.out;
  for (int64_t n = begin * kPanel; n < last; ++n) {
    const bf16* const w = o.weight + n / kPanel * kPanel * o.in + n % kPanel * 2;
    for (int64_t row = 0; row < o.rows; ++row) {
      float sum = 0;
      for (int64_t k = 0; k < o.in; ++k) {
        sum += to_float(o.x[row * o.x_stride + k]) * to_float(w[k / 2 * 2 * kPanel + k % 2]);
      }
      from_float(o.bias ? sum + to_float(o.bias[n]) : sum, o.y + row * o.y_stride + n);
    }
  }
}
#endif

}  // namespace

void linear(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
            const void* weight, const void* bias, int64_t in, int64_t out) {
  const Operands operands{static_cast<const bf16*>(x), x_stride, rows, in,
                          static_cast<const bf16*>(weight), static_cast<const bf16*>(bias),
                          static_cast<bf16*>(y), y_stride, out};
  if (rows == 0) return;
  const int64_t pairs = (out + 2 * kPanel - 1) / (2 * kPanel);
  const int64_t workers = threads(), count = (out + kPanel - 1) / kPanel;
  const int64_t step = (pairs + workers * kTasksEach - 1) / (workers * kTasksEach) * 2;
  parallel_tasks((count + step - 1) / step, workers, [&](int64_t task) {
    const int64_t begin = task * step, end = begin + step;
    panels(operands, begin, end < count ? end : count);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
