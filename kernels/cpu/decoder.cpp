// One step through a stack of decoder layers: the other kernels in a row, without going back to
// Python in between, and in one parallel region.

#include "decoder.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace manylora {
namespace MANYLORA_ISA {

namespace {

void project(const DecoderStep& s, const DecoderProjection& p, const void* x, void* y) {
  linear(y, p.out, x, p.in, s.rows, p.weight, p.bias, p.in, p.out);
  if (s.plan == nullptr) return;
  apply_edits(y, p.out, x, p.in, p.in, kBFloat16, s.pool, p.group, s.table, s.plan);
}

// y = its norm, where there is a weight.
void norm(const DecoderStep& s, void* y, const void* weight, int64_t size) {
  if (weight == nullptr) return;
  rms_norm(y, y, size, nullptr, weight, s.rows, size, s.eps, s.offset, kBFloat16);
}

// q and k of the packed rows.
void norm_heads(const DecoderStep& s, const DecoderLayer& l) {
  if (l.q_norm == nullptr) return;
  const int64_t d = l.attention->head_dim, heads = l.attention->heads;
  bf16* const q = static_cast<bf16*>(s.qkv);
  rms_norm_heads(q, l.qkv.out, l.q_norm, s.rows, heads, d, s.eps, s.offset, kBFloat16);
  rms_norm_heads(q + heads * d, l.qkv.out, l.k_norm, s.rows, l.attention->kv_heads, d, s.eps,
                 s.offset, kBFloat16);
}

// x += y, rounded once.
void add_rows(const DecoderStep& s, const void* y, int64_t size) {
  bf16* const to = static_cast<bf16*>(s.x);
  const bf16* const from = static_cast<const bf16*>(y);
  each_row(s.rows, size, [&](int64_t row) {
    each_vec(size, [&](int64_t i, auto part) {
      const int64_t at = row * size + i;
      store(to + at, add(load(to + at, part), load(from + at, part)), part);
    });
  });
}

void run_layer(const DecoderStep& s, const DecoderLayer& l) {
  const int64_t hidden = l.qkv.in, d = l.attention->head_dim;
  rms_norm(s.normed, s.x, hidden, nullptr, l.before_attention, s.rows, hidden, s.eps, s.offset,
           kBFloat16);
  project(s, l.qkv, s.normed, s.qkv);
  norm_heads(s, l);
  const int64_t angles = l.rotary * s.rows * s.half;
  rotary_write_kv(s.qkv, l.qkv.out, s.cos + angles, s.sin + angles, s.half, l.k_cache, l.v_cache,
                  s.batch, l.attention);
  paged_attention(s.mixed, s.qkv, l.qkv.out, d, l.k_cache, l.v_cache, s.batch, l.attention);
  project(s, l.o, s.mixed, s.y);
  norm(s, s.y, l.after_attention, hidden);
  rms_norm(s.normed, s.y, hidden, s.x, l.before_mlp, s.rows, hidden, s.eps, s.offset, kBFloat16);
  project(s, l.gate_up, s.normed, s.gate_up);
  act_mul(s.gated, s.gate_up, l.gate_up.out, s.rows, l.down.in, s.activation, kBFloat16);
  project(s, l.down, s.gated, s.y);
  norm(s, s.y, l.after_mlp, hidden);
  add_rows(s, s.y, hidden);
}

}  // namespace

void decoder_layers(const DecoderStep* step, const DecoderLayer* layers, int64_t count) {
  as_team([&] {
    for (int64_t i = 0; i < count; ++i) run_layer(*step, layers[i]);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
