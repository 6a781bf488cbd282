#include "mixers/latent.h"

#include <algorithm>
#include <cmath>

#include "mixers/attention.h"

namespace edgemoe {

void latent_attention(Workspace& ws, const float* q, float* absorbed, float* keys, int T, int pos, const LatentParts& p,
                      const KvLayer& kv, float* out) {
  const Kernels& kn = kernels();
  const LatentShape& s = p.shape;
  const int width = s.latent_dim + s.rope_dim, half = s.rope_dim / 2;
  ws.pool.run(T, 4, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const auto turn = [&](float* x) {
        if (s.rotates) kn.rope(x, p.cos + size_t(t) * half, p.sin + size_t(t) * half, s.rope_dim);
      };
      float* key = keys + size_t(t) * width;
      kn.rms_norm(key, p.norm, p.norm_eps, s.latent_dim, key);
      turn(key + s.latent_dim);
      const double grown = s.growth > 0 ? 1 + double(s.growth) * std::log1p((pos + t) / s.grow_every) : 1;
      for (int h = 0; h < s.num_heads; ++h) {
        const size_t head = size_t(t) * s.num_heads + h;
        float* query = absorbed + head * width;
        std::copy_n(q + head * (s.nope_dim + s.rope_dim) + s.nope_dim, s.rope_dim, query + s.latent_dim);
        turn(query + s.latent_dim);
        for (int c = 0; grown != 1 && c < width; ++c) query[c] *= float(grown);
      }
    }
  });
  AttentionParts parts{};
  parts.layer = p.layer;
  parts.shape = {s.num_heads, 1, width, 0, s.scale, 0};
  attention(ws, absorbed, keys, nullptr, T, pos, parts, kv, out);
}

void attend_latents(Workspace& ws, const float* x, int T, int pos, const LatentParts& p, const LatentMatrices& m,
                    const LatentRows& r, const KvLayer& kv, float* out) {
  const LatentShape& s = p.shape;
  linear(ws, x, T, {m.kv_a, m.q_a}, {r.keys, m.q_b ? r.q_a : r.q});
  if (m.q_b) {
    rms_norm(ws, r.q_a, m.q_norm, m.eps, T, m.q_b->cols, r.q_a);
    linear(ws, r.q_a, T, {m.q_b}, {r.q});
  }
  linear_heads(ws, {r.q, s.nope_dim + s.rope_dim}, *m.k_b, T, s.num_heads, r.absorbed, s.latent_dim + s.rope_dim);
  latent_attention(ws, r.q, r.absorbed, r.keys, T, pos, p, kv, r.latents);
  linear_heads(ws, {r.latents, s.latent_dim}, *m.v_b, T, s.num_heads, r.values, m.v_b->rows / s.num_heads);
  linear(ws, r.values, T, {m.out}, {out});
}

}  // namespace edgemoe
