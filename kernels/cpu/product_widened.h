// Panels of the product where no instruction multiplies bfloat16: x is widened to float32 before,
// for all panels; W in registers, for every row tile. Included by product.cpp only.
//
// A register tile holds rows x 16 or 32 outputs. A part of the rows and a run of panels lie in the
// second-level cache, so W is read from memory once for as many rows as are widened at once.

constexpr int kRows = 4;             // on AVX2 8 vectors of sums, just enough to never wait for one
constexpr int kPairRows = 3;         // up to here two panels at once: one would leave sums waiting
constexpr int64_t kBytes = 1 << 17;  // of a part, and of a run
constexpr int64_t kMostBytes = 4 << 20;  // of x, widened at once

// Rows of a power of 2 would share their lines' places in the cache.
MANYLORA_INLINE int64_t wide_stride(int64_t in) { return in + 16; }

// Rows, in whole tiles, that have at least so many bytes when widened.
MANYLORA_INLINE int64_t rows_of(int64_t bytes, int64_t in) {
  return round_up(bytes / (wide_stride(in) * static_cast<int64_t>(sizeof(float))) + 1, kRows);
}

// In memory that the calling thread keeps.
static const float* widen(const bf16* x, int64_t x_stride, int64_t rows, int64_t in) {
  float* const wide = scratch<float>(rows * wide_stride(in));
  each_row(rows, in, [&](int64_t row) {
    const bf16* const from = x + row * x_stride;
    float* const to = wide + row * wide_stride(in);
    for (int64_t i = 0; i < in; i += kLanes) store(to + i, load(from + i));
  });
  return wide;
}

template <int Rows, int Panels, bool First>
static void tile(const Operands& o, int64_t row, int64_t panel) {
  constexpr int kPanelVecs = kPanel / kLanes, kVecs = Panels * kPanelVecs;
  const float* const x = o.x + row * o.x_stride;
  const bf16* const w = o.weight + panel * kPanel * o.in;
  const int64_t next = o.in * kPanel;
  Vec sums[Rows][kVecs];
  for (auto& line : sums) {
    for (Vec& v : line) v = zero();
  }
  const auto add_products = [&](const Vec* weights, int64_t k) {
    for (int r = 0; r < Rows; ++r) {
      const Vec a = splat(x[r * o.x_stride + k]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(weights[v], a, sums[r][v]);
    }
  };
  for (int64_t k = 0; k < o.in; k += 2) {
    Vec even[kVecs], odd[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const bf16* const at = w + v / kPanelVecs * next + k * kPanel + v % kPanelVecs * 2 * kLanes;
      if (First && v % kPanelVecs == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
      }
      load_pairs(at, &even[v], &odd[v]);
    }
    // All evens before all odds: a sum's next product needs its last one.
    add_products(even, k);
    add_products(odd, k + 1);
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      finish(o, row + r, panel * kPanel + v * kLanes, sums[r][v]);
    }
  }
}

template <int Rows, int Panels>
static void one_tile(const Operands& o, int64_t rows, int64_t row, int64_t panel) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return one_tile<Rows - 1, Panels>(o, rows, row, panel);
    row == 0 ? tile<Rows, Panels, true>(o, row, panel) : tile<Rows, Panels, false>(o, row, panel);
  }
}

// Rows [row, end), in tiles of about the same size.
template <int MostRows, int Panels>
static void some_rows(const Operands& o, int64_t row, int64_t end, int64_t panel) {
  while (row < end) {
    const int64_t rows = ceil_div(end - row, ceil_div(end - row, MostRows));
    one_tile<MostRows, Panels>(o, rows, row, panel);
    row += rows;
  }
}

// Outputs of panels [begin, end).
static void panels(const Operands& o, int64_t begin, int64_t end) {
  if (o.rows <= kPairRows) {
    for (; begin + 2 <= end; begin += 2) some_rows<kPairRows, 2>(o, 0, o.rows, begin);
  }
  const int64_t part = rows_of(kBytes, o.in);
  const int64_t run = kBytes / (kPanel * o.in * static_cast<int64_t>(sizeof(bf16))) + 1;
  for (; begin < end; begin += run) {
    for (int64_t row = 0; row < o.rows; row += part) {
      for (int64_t panel = begin; panel < least(end, begin + run); ++panel) {
        some_rows<kRows, 1>(o, row, least(o.rows, row + part), panel);
      }
    }
  }
}
