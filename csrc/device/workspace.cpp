#include "device/workspace.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "error.h"
#include "kv.h"
#include "mixers/kv_store.h"

namespace edgemoe {
namespace {

constexpr size_t kPartsFloats = size_t(1) << 18;  ///< of attention's scratch, beside what one token needs

size_t quantized_bytes(int rows, int cols) {
  return size_t(rows) * blocks(cols, kTileCols) * (kTileCols + (kScales + kSums) * sizeof(float));
}

int most_rows(const WorkspaceShape& s) { return std::max(s.max_rows, Workspace::kFfnRows); }

size_t parts_floats(const WorkspaceShape& s) {
  const size_t part = size_t(s.num_heads) * (blocks(s.head_dim, 16) * 16 + 2);
  return part * size_t(blocks(s.max_context, kKeyBlock) + 1) + kPartsFloats;
}

/// What each of the scratch arrays takes.
std::vector<size_t> sizes(const WorkspaceShape& s, int max_routed) {
  const size_t ffn = size_t(Workspace::kFfnRows) * s.max_hidden * sizeof(float);
  return {quantized_bytes(most_rows(s), s.max_cols),
          quantized_bytes(Workspace::kFfnRows, s.max_hidden),
          ffn,
          ffn,
          parts_floats(s) * sizeof(float),
          size_t(std::max(max_routed, Workspace::kFfnRows)) * sizeof(int32_t),
          size_t(max_routed) * sizeof(float),
          sizeof(uint64_t)};
}

}  // namespace

DeviceWorkspace::DeviceWorkspace(std::shared_ptr<DeviceSpace> space, const WorkspaceShape& shape, int max_routed)
    : space_(std::move(space)), shape_(shape), parts_floats_(parts_floats(shape)) {
  if (shape.head_dim > kMostHeadDim) {
    throw std::invalid_argument("device attention: expected heads of at most " + std::to_string(kMostHeadDim) +
                                " columns, got " + std::to_string(shape.head_dim));
  }
  const std::vector<size_t> all = sizes(shape, max_routed);
  DeviceMemory* const to[] = {&activations_, &hidden_, &gate_, &up_, &parts_, &rows_, &gates_, &misfit_};
  for (size_t i = 0; i < all.size(); ++i) *to[i] = DeviceMemory(space_, all[i]);
  device().fill(misfit_.as(), 0xff, sizeof(uint64_t));
}

size_t DeviceWorkspace::bytes(const WorkspaceShape& shape, int max_routed) {
  size_t total = 0;
  for (size_t n : sizes(shape, max_routed)) total += DeviceSpace::taken(n);
  return total;
}

template <class T>
const T* DeviceWorkspace::lend(const DeviceMemory& to, const T* from, size_t n) {
  if (n * sizeof(T) > to.size()) {
    throw std::invalid_argument("device: expected at most " + std::to_string(to.size() / sizeof(T)) +
                                " routed pairs, got " + std::to_string(n));
  }
  space_->upload(to.as(), from, n * sizeof(T));
  return to.as<T>();
}

QuantizedBuffer DeviceWorkspace::buffer(const DeviceMemory& memory, int n, int cols) {
  const int tiles = blocks(cols, kTileCols);
  auto* scales = reinterpret_cast<float*>(memory.as() + size_t(n) * tiles * kTileCols);
  return {memory.as<int8_t>(), scales, scales + size_t(n) * tiles * kScales, tiles};
}

void DeviceWorkspace::linear(const float* x, int T, const std::vector<const NestedMatrix*>& matrices,
                             const std::vector<float*>& outs) {
  const int cols = matrices[0]->cols;
  if (T > most_rows(shape_) || cols > shape_.max_cols) {
    throw std::invalid_argument("device linear: expected at most [" + std::to_string(shape_.max_rows) + ", " +
                                std::to_string(shape_.max_cols) + "] activations, got [" + std::to_string(T) + ", " +
                                std::to_string(cols) + "]");
  }
  const QuantizedBuffer q = buffer(activations_, T, cols);
  device().quantize_rows(x, nullptr, nullptr, T, cols, q);
  std::vector<Product> list;
  for (size_t i = 0; i < matrices.size(); ++i) list.push_back({*matrices[i], q.rows(), outs[i], T, matrices[i]->rows});
  device().products(list.data(), int(list.size()));
}

void DeviceWorkspace::ffn_batch(const float* x, int T, const std::vector<Piece>& pieces) {
  const NestedMatrix& any = pieces[0].use->w.gate;
  const int hidden = any.rows, cols = any.cols, total = pieces.back().row + pieces.back().count;
  if (hidden > shape_.max_hidden || cols > shape_.max_cols) {
    throw std::invalid_argument("device ffn: expected at most " + std::to_string(shape_.max_hidden) +
                                " hidden values, got " + std::to_string(hidden));
  }
  // A single token is quantised once for all its experts; rows that follow each other need no list.
  const bool shared = T == 1, straight = pieces.size() == 1 && !pieces[0].use->tokens;
  const int32_t* rows = nullptr;
  if (!shared && !straight) {
    std::vector<int32_t> list;
    for (const Piece& p : pieces) {
      for (int i = 0; i < p.count; ++i) list.push_back(p.use->tokens ? p.use->tokens[p.first + i] : p.first + i);
    }
    rows = lend(rows_, list.data(), list.size());
  }
  const QuantizedBuffer q = buffer(activations_, shared ? 1 : total, cols);
  device().quantize_rows(straight ? x + size_t(pieces[0].first) * cols : x, nullptr, rows, shared ? 1 : total, cols, q);
  std::vector<Product> list;
  for (const Piece& p : pieces) {
    const QuantizedRows mine = rows_from(q.rows(), shared ? 0 : p.row);
    const size_t at = size_t(p.row) * hidden;
    list.push_back({p.use->w.gate, mine, gate_.as<float>() + at, p.count, hidden});
    list.push_back({p.use->w.up, mine, up_.as<float>() + at, p.count, hidden});
  }
  device().products(list.data(), int(list.size()));
  const QuantizedBuffer h = buffer(hidden_, total, hidden);
  device().quantize_rows(gate_.as<float>(), up_.as<float>(), nullptr, total, hidden, h);
  list.clear();
  for (const Piece& p : pieces) {
    const int d = p.use->w.down.rows;
    list.push_back({p.use->w.down, rows_from(h.rows(), p.row), p.use->out + size_t(p.first) * d, p.count, d});
  }
  device().products(list.data(), int(list.size()));
}

void DeviceWorkspace::ffns(const float* x, int T, const std::vector<FfnUse>& uses) {
  std::vector<Piece> pieces;
  int filled = 0;
  const auto run = [&] {
    if (!pieces.empty()) ffn_batch(x, T, pieces);
    pieces.clear();
    filled = 0;
  };
  for (const FfnUse& use : uses) {
    if (use.w.gate.rows == 0 || use.biases.gate || use.biases.up || use.biases.down || use.hidden) {
      throw std::invalid_argument("device ffn: what has no gate, or biases, is the CPU's");
    }
    for (int first = 0; first < use.count;) {
      const int n = std::min(use.count - first, Workspace::kFfnRows - filled);
      pieces.push_back({&use, first, n, filled});
      filled += n;
      first += n;
      if (filled == Workspace::kFfnRows) run();
    }
  }
  run();
}

void DeviceWorkspace::attention(float* q, float* k, float* v, int T, int pos, const AttentionParts& p,
                                const KvLayer& kv, float* out) {
  const AttentionShape& s = p.shape;
  check_positions(kv, s.window, pos, T, shape_.max_context);
  if (s.num_heads > shape_.num_heads || s.head_dim > shape_.head_dim) {
    throw std::invalid_argument("device attention: expected at most " + std::to_string(shape_.num_heads) +
                                " heads of " + std::to_string(shape_.head_dim));
  }
  if (!kv.values || p.sinks || p.v_norm || (p.constants && !p.constants->pairs.empty())) {
    throw std::invalid_argument("device attention: latents, sinks, norms of values and lacking biases are the CPU's");
  }
  Device& d = device();
  const int q_cols = s.num_heads * s.head_dim, kv_cols = s.num_kv_heads * s.head_dim;
  HeadsCall heads{{q, p.q_bias, p.q_norm, s.num_heads, true},
                  {k, p.k_bias, p.k_norm, s.num_kv_heads, true},
                  {v, p.v_bias, nullptr, s.num_kv_heads, false},
                  p.cos,
                  p.sin,
                  s.head_dim,
                  s.rope_dim,
                  p.norm_after_rope,
                  p.norm_eps,
                  p.clip,
                  kv,
                  pos,
                  p.layer,
                  misfit_.as<uint64_t>()};
  for (HeadChange* change : {&heads.q, &heads.k}) {  // a norm of the whole row comes first
    if (!change->norm || p.norm_per_head) continue;
    const int cols = change == &heads.q ? q_cols : kv_cols;
    if (change->bias) d.add_bias(change->bias, T, cols, change->x);
    d.norm_rows(change->x, nullptr, 0, change->norm, p.norm_eps, T, cols, change->x);
    change->bias = change->norm = nullptr;
  }
  const float* out_bias = nullptr;  // what values in 8 bits lack; their weights sum to 1
  if (kv.value_type == KvType::kQ8 && !(p.clip > 0)) std::swap(heads.v.bias, out_bias);
  key_type_ = kv.key_type;
  value_type_ = kv.value_type;
  d.prepare_heads(heads, T);
  const size_t part = size_t(s.num_heads) * (kv.head_stride + 2);
  const auto num_blocks = [&](int first, int n) {
    const int begin = s.window > 0 ? std::max(0, first + 1 - s.window) : 0;
    return (first + n - 1) / kKeyBlock - begin / kKeyBlock + 1;
  };
  for (int t = 0; t < T;) {  // as many tokens at once as scratch has room for
    int n = T - t;
    while (n > 1 && part * size_t(n) * size_t(num_blocks(pos + t, n)) > parts_floats_) n /= 2;
    const size_t at = size_t(t) * q_cols;
    d.attend({q + at, kv, s, pos + t, out_bias, parts_.as<float>(), out + at}, n, num_blocks(pos + t, n));
    t += n;
  }
}

void DeviceWorkspace::download(std::vector<DeviceSpace::Fetch> what) {
  uint64_t code;
  what.push_back({&code, misfit_.as(), sizeof code});
  space_->download(what);
  if (code == Misfit::kNone) return;
  device().fill(misfit_.as(), 0xff, sizeof code);
  const Misfit m = Misfit::from(code);
  float x;
  std::memcpy(&x, &m.magnitude, sizeof x);
  throw RangeError("layer " + std::to_string(m.layer) + ": " +
                   misfit(&x, 1, m.is_value ? value_type_ : key_type_, !m.is_value));
}

void DeviceWorkspace::combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                              float* out) {
  const auto* r = lend(rows_, rows, size_t(T) * K);
  const auto* g = lend(gates_, gates, size_t(T) * K);
  device().combine(parts, r, g, T, K, cols, out);
}

}  // namespace edgemoe
