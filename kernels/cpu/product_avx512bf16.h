// Panels of the product with vdpbf16ps: a register tile holds rows x two panels. Included by
// product.cpp only.

constexpr int kRows = 12;  // 24 sums, 2 operands of W; x comes as a broadcast from memory

template <int Rows, int Panels, bool First>
static void tile(const Operands& o, int64_t row, int64_t panel) {
  const bf16* const x = o.x + row * o.x_stride;
  const bf16* const w = o.weight + panel * kPanel * o.in;
  const int64_t next = o.in * kPanel;
  Vec sums[Rows][Panels];
  for (auto& line : sums) {
    for (Vec& v : line) v = zero();
  }
  for (int64_t k = 0; k < o.in; k += 2) {
    Operand<bf16> b[Panels];
    for (int p = 0; p < Panels; ++p) {
      const bf16* const at = w + p * next + k * kPanel;
      if (First) _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
      b[p] = load_operand<bf16>(at);
    }
    for (int r = 0; r < Rows; ++r) {
      const Operand<bf16> a = broadcast<bf16>(x + r * o.x_stride + k);
      for (int p = 0; p < Panels; ++p) sums[r][p] = dot(sums[r][p], a, b[p]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int p = 0; p < Panels; ++p) finish(o, row + r, (panel + p) * kPanel, sums[r][p]);
  }
}

template <int Panels, int Rows>
static void rest(const Operands& o, int64_t row, int64_t panel) {
  if constexpr (Rows > 0) {
    if (o.rows - row != Rows) return rest<Panels, Rows - 1>(o, row, panel);
    row == 0 ? tile<Rows, Panels, true>(o, row, panel) : tile<Rows, Panels, false>(o, row, panel);
  }
}

template <int Panels>
static void all_rows(const Operands& o, int64_t panel) {
  int64_t row = 0;
  for (; row + kRows <= o.rows; row += kRows) {
    row == 0 ? tile<kRows, Panels, true>(o, row, panel) : tile<kRows, Panels, false>(o, row, panel);
  }
  rest<Panels, kRows - 1>(o, row, panel);
}

// Outputs of panels [begin, end).
static void panels(const Operands& o, int64_t begin, int64_t end) {
  for (; begin + 2 <= end; begin += 2) all_rows<2>(o, begin);
  if (begin < end) all_rows<1>(o, begin);
}
