// Panels of the product on AMX tiles: C 0 to 3 (rows 0-15 and 16-31 by two panels), A 4 and 5, B 6
// and 7. Included by product.cpp only.

// Rows of the two halves of a row block; B and whole halves have 16.
MANYLORA_INLINE void configure(int64_t first, int64_t second) {
  const int64_t lower = second ? second : kTileLines;
  TileShapes shapes;
  for (int i = 0; i < 2; ++i) {
    shapes.set(i, first, kTileBytes);
    shapes.set(2 + i, lower, kTileBytes);
    shapes.set(6 + i, kTileLines, kTileBytes);
  }
  shapes.set(4, first, kTileBytes);
  shapes.set(5, lower, kTileBytes);
  shapes.use();
}

MANYLORA_INLINE void prefetch_tile(const bf16* tile) {
  const char* const at = reinterpret_cast<const char*>(tile) + kAhead;
  for (int i = 0; i < 16; ++i) _mm_prefetch(at + i * 64, _MM_HINT_T0);
}

// sums[half * 2 + panel][row][output] for `Halves` halves of a row block and `Panels` panels.
template <int Halves, int Panels, bool First>
static void tiles(const Operands& o, const bf16* x, const bf16* w, float (*sums)[16][16]) {
  const int64_t x_bytes = o.x_stride * 2, panel = o.in * kPanel;
  _tile_zero(0);
  if (Panels == 2) _tile_zero(1);
  if (Halves == 2) _tile_zero(2);
  if (Halves == 2 && Panels == 2) _tile_zero(3);
  for (int64_t k = 0; k < o.in; k += 32) {
    const bf16* const b = w + k * kPanel;
    if (First) prefetch_tile(b);
    if (First && Panels == 2) prefetch_tile(b + panel);
    _tile_loadd(6, b, 64);
    _tile_loadd(4, x + k, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (Panels == 2) {
      _tile_loadd(7, b + panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Halves == 2) {
      _tile_loadd(5, x + k + 16 * o.x_stride, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  if (Panels == 2) _tile_stored(1, sums[1], 64);
  if (Halves == 2) _tile_stored(2, sums[2], 64);
  if (Halves == 2 && Panels == 2) _tile_stored(3, sums[3], 64);
}

template <int Panels>
static void all_rows(const Operands& o, int64_t panel) {
  alignas(64) float sums[4][16][16];
  const bf16* const w = o.weight + panel * kPanel * o.in;
  int64_t configured = 0;
  for (int64_t row = 0; row < o.rows; row += 32) {
    const int64_t left = o.rows - row;
    const int64_t first = left < 16 ? left : 16, both = left < 32 ? left : 32;
    if (configured != both) configure(first, both - first);
    configured = both;
    const bf16* const x = o.x + row * o.x_stride;
    if (both > 16) {
      row == 0 ? tiles<2, Panels, true>(o, x, w, sums) : tiles<2, Panels, false>(o, x, w, sums);
    } else {
      row == 0 ? tiles<1, Panels, true>(o, x, w, sums) : tiles<1, Panels, false>(o, x, w, sums);
    }
    for (int64_t i = 0; i < both; ++i) {
      for (int64_t p = 0; p < Panels; ++p) {
        finish(o, row + i, (panel + p) * kPanel, load(sums[i / 16 * 2 + p][i % 16]));
      }
    }
  }
}

// Outputs of panels [begin, end).
static void panels(const Operands& o, int64_t begin, int64_t end) {
  for (; begin + 2 <= end; begin += 2) all_rows<2>(o, begin);
  if (begin < end) all_rows<1>(o, begin);
  _tile_release();
}
