#include "device/workspace.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "error.h"
#include "kv.h"
#include "mixers/kv_store.h"

namespace edgemoe {
namespace {

constexpr size_t kPartsFloats = size_t(1) << 18;  ///< floats of attention's scratch beyond what one token needs

size_t quantized_bytes(int rows, int cols) {
  return size_t(rows) * blocks(cols, kTileCols) * (kTileCols + (kScales + kSums) * sizeof(float));
}

int most_rows(const WorkspaceShape& s) { return std::max(s.max_rows, Workspace::kFfnRows); }

size_t parts_floats(const WorkspaceShape& s) {
  const size_t part = size_t(s.num_heads) * (blocks(s.head_dim, 16) * 16 + 2);
  return part * size_t(blocks(s.max_context, kKeyBlock) + 1) + kPartsFloats;
}

/// The most rows for corrections at once: those of a few matrices with the same input, or those of all heads.
int most_ranks(const WorkspaceShape& s) {
  constexpr int kTogether = 5;
  return std::max(kTogether * most_rows(s), s.max_rows * s.num_heads);
}

/// Bytes of each scratch array.
std::vector<size_t> sizes(const WorkspaceShape& s, int max_routed, bool corrected) {
  const size_t ffn = size_t(Workspace::kFfnRows) * s.max_hidden * sizeof(float);
  return {quantized_bytes(most_rows(s), s.max_cols),
          quantized_bytes(Workspace::kFfnRows, s.max_hidden),
          ffn,
          ffn,
          parts_floats(s) * sizeof(float),
          size_t(std::max(2 * max_routed, Workspace::kFfnRows)) * sizeof(int32_t),
          size_t(std::max(max_routed, s.max_rows)) * sizeof(float),
          2 * sizeof(uint64_t),  // the misfit, and the position
          corrected ? size_t(most_ranks(s)) * sizeof(RankRow) : 0};
}

/// Throws std::invalid_argument for a matrix that devices have no kernels for.
void check_known(const NestedMatrix& w) {
  if (w.scheme != Scheme::kNested && w.scheme != Scheme::kMwq) {
    throw std::invalid_argument("device: matrices of this scheme are supported on the CPU only");
  }
}

RowsCall plain(const float* x, int n, int cols) { return {x, n, cols, size_t(cols)}; }

RanksCall ranks_of(const NestedMatrix& w, const int8_t* basis, const RowsCall& x, RankRow* out) {
  return {w.basis ? w.basis : basis, rank_of(w), correction_of(w), x, out};
}

}  // namespace

DeviceWorkspace::DeviceWorkspace(std::shared_ptr<DeviceSpace> space, const WorkspaceShape& shape, int max_routed,
                                 bool corrected)
    : space_(std::move(space)),
      shape_(shape),
      parts_floats_(parts_floats(shape)),
      max_ranks_(corrected ? most_ranks(shape) : 0) {
  if (shape.head_dim > kMostHeadDim) {
    throw std::invalid_argument("device attention: expected heads of at most " + std::to_string(kMostHeadDim) +
                                " columns, got " + std::to_string(shape.head_dim));
  }
  const std::vector<size_t> all = sizes(shape, max_routed, corrected);
  DeviceMemory* const to[] = {&activations_, &hidden_, &gate_, &up_, &parts_, &rows_, &gates_, &misfit_, &ranks_};
  for (size_t i = 0; i < all.size(); ++i) *to[i] = DeviceMemory(space_, all[i]);
  device().fill(misfit_.as(), 0xff, sizeof(uint64_t));
}

size_t DeviceWorkspace::bytes(const WorkspaceShape& shape, int max_routed, bool corrected) {
  size_t total = 0;
  for (size_t n : sizes(shape, max_routed, corrected)) total += DeviceSpace::taken(n);
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

RankRow* DeviceWorkspace::take_ranks(int n) {
  if (ranks_taken_ + n > max_ranks_) {
    throw std::invalid_argument("device: expected at most " + std::to_string(max_ranks_) +
                                " rows for corrections, got " + std::to_string(ranks_taken_ + n));
  }
  RankRow* const out = ranks_.as<RankRow>() + ranks_taken_;
  ranks_taken_ += n;
  return out;
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
  device().quantize_rows(plain(x, T, cols), q);
  std::vector<Product> list;
  std::vector<RanksCall> ranks;
  ranks_taken_ = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const NestedMatrix& w = *matrices[i];
    check_known(w);
    Product p{w, q.rows(), outs[i], T, w.rows};
    if (rank_of(w)) {
      RankRow* const z = take_ranks(T);
      ranks.push_back(ranks_of(w, nullptr, plain(x, T, cols), z));
      p.ranks = z;
    }
    list.push_back(p);
  }
  if (!ranks.empty()) device().ranks(ranks.data(), int(ranks.size()));
  device().products(list.data(), int(list.size()));
}

void DeviceWorkspace::linear_heads(const HeadRows& x, const NestedMatrix& w, int T, int heads, float* out,
                                   int out_stride) {
  check_known(w);
  if (quantized_bytes(T * heads, w.cols) > activations_.size()) {
    throw std::invalid_argument("device linear_heads: expected fewer than " + std::to_string(T * heads) + " rows of " +
                                std::to_string(w.cols));
  }
  const QuantizedBuffer q = buffer(activations_, T * heads, w.cols);
  const RowsCall rows{x.x, T * heads, w.cols, size_t(x.stride), nullptr, heads};
  device().quantize_rows(rows, q);
  Product p{w, q.rows(), out, T, heads * out_stride};
  p.heads = heads;
  p.head_stride = out_stride;
  ranks_taken_ = 0;
  if (rank_of(w)) {
    RankRow* const z = take_ranks(rows.n);
    const RanksCall call = ranks_of(w, nullptr, rows, z);
    device().ranks(&call, 1);
    p.ranks = z;
  }
  device().products(&p, 1);
}

void DeviceWorkspace::ffn_batch(const float* x, int T, Activation activation, const std::vector<Piece>& pieces,
                                const int8_t* basis) {
  const NestedMatrix& any = pieces[0].use->w.up;
  const int hidden = any.rows, cols = any.cols, total = pieces.back().row + pieces.back().count;
  if (hidden > shape_.max_hidden || cols > shape_.max_cols) {
    throw std::invalid_argument("device ffn: expected at most " + std::to_string(shape_.max_hidden) +
                                " hidden values, got " + std::to_string(hidden));
  }
  // A single token is quantised once for all its experts; rows that follow each other need no list.
  const bool shared = T == 1, straight = pieces.size() == 1 && !pieces[0].use->tokens;
  RowsCall rows = plain(straight ? x + size_t(pieces[0].first) * cols : x, shared ? 1 : total, cols);
  if (!shared && !straight) {
    std::vector<int32_t> list;
    for (const Piece& p : pieces) {
      for (int i = 0; i < p.count; ++i) list.push_back(p.use->tokens ? p.use->tokens[p.first + i] : p.first + i);
    }
    rows.rows = lend(rows_, list.data(), list.size());
  }
  const QuantizedBuffer q = buffer(activations_, rows.n, cols);
  device().quantize_rows(rows, q);
  std::vector<Product> list;
  std::vector<RanksCall> ranks;
  ranks_taken_ = 0;
  const auto add = [&](Product p, const RowsCall& inputs, const int8_t* v) {
    if (rank_of(p.w)) {
      RankRow* const z = take_ranks(inputs.n);
      ranks.push_back(ranks_of(p.w, v, inputs, z));
      p.ranks = z;
    }
    list.push_back(p);
  };
  const auto run = [&] {
    if (!ranks.empty()) device().ranks(ranks.data(), int(ranks.size()));
    device().products(list.data(), int(list.size()));
    ranks.clear();
    list.clear();
  };
  for (const Piece& p : pieces) {
    const FfnUse& use = *p.use;
    const QuantizedRows mine = rows_from(q.rows(), shared ? 0 : p.row);
    const size_t at = size_t(p.row) * hidden;
    RowsCall inputs = rows;
    inputs.n = p.count;
    if (inputs.rows) inputs.rows += p.row;
    if (activation != Activation::kRelu2) {
      add({use.w.gate, mine, gate_.as<float>() + at, p.count, hidden, use.biases.gate}, inputs, basis);
    }
    add({use.w.up, mine, up_.as<float>() + at, p.count, hidden, use.biases.up}, inputs, basis);
  }
  run();
  const bool corrected =
      std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return rank_of(p.use->w.down) > 0; });
  const QuantizedBuffer h = buffer(hidden_, total, hidden);
  auto* const values = up_.as<float>();
  device().quantize_hidden(activation, gate_.as<float>(), values, total, hidden, h, corrected ? values : nullptr);
  for (const Piece& p : pieces) {
    const FfnUse& use = *p.use;
    const int d = use.w.down.rows;
    add({use.w.down, rows_from(h.rows(), p.row), use.out + size_t(p.first) * d, p.count, d, use.biases.down},
        plain(values + size_t(p.row) * hidden, p.count, hidden), nullptr);
  }
  run();
}

void DeviceWorkspace::ffns(const float* x, int T, Activation activation, const std::vector<FfnUse>& uses,
                           const int8_t* basis) {
  std::vector<Piece> pieces;
  int filled = 0;
  const auto run = [&] {
    if (!pieces.empty()) ffn_batch(x, T, activation, pieces, basis);
    pieces.clear();
    filled = 0;
  };
  for (const FfnUse& use : uses) {
    for (const NestedMatrix* w : {&use.w.gate, &use.w.up, &use.w.down}) check_known(*w);
    if ((use.w.gate.rows == 0) != (activation == Activation::kRelu2)) {
      throw std::invalid_argument("device ffn: the matrices do not fit the activation");
    }
    if (use.hidden) throw std::invalid_argument("device ffn: the input of down is returned on the CPU only");
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

const float* DeviceWorkspace::grown(int T, int pos, int late, float growth, int every) {
  if (!(growth > 0)) return nullptr;
  std::vector<float> times;
  for (int t = 0; t < T; ++t) times.push_back(float(1 + double(growth) * std::log1p((pos + t + late) / every)));
  return lend(gates_, times.data(), times.size());
}

void DeviceWorkspace::attention(float* q, float* k, float* v, int T, int pos, const AttentionParts& p,
                                const KvLayer& kv, float* out) {
  const AttentionShape& s = p.shape;
  check_positions(kv, s.window, pos, T, shape_.max_context);
  if (s.num_heads > shape_.num_heads || s.head_dim > shape_.head_dim) {
    throw std::invalid_argument("device attention: expected at most " + std::to_string(shape_.num_heads) +
                                " heads of " + std::to_string(shape_.head_dim));
  }
  if (!kv.values || (p.constants && !p.constants->pairs.empty())) {
    throw std::invalid_argument("device attention: keys stored without their biases are supported on the CPU only");
  }
  Device& d = device();
  const int q_cols = s.num_heads * s.head_dim, kv_cols = s.num_kv_heads * s.head_dim;
  HeadsCall heads{{q, p.q_bias, p.q_norm, s.num_heads, true, p.norm_after_rope},
                  {k, p.k_bias, p.k_norm, s.num_kv_heads, true, p.norm_after_rope},
                  {v, p.v_bias, p.v_norm, s.num_kv_heads, false, false},
                  p.cos,
                  p.sin,
                  grown(T, pos, 1, p.growth, p.grow_every),
                  s.head_dim,
                  s.rope_dim,
                  p.norm_eps,
                  p.clip,
                  kv,
                  is_noting_ ? 0 : pos,
                  p.layer,
                  misfit_.as<uint64_t>(),
                  now()};
  for (HeadChange* change : {&heads.q, &heads.k}) {  // a norm of the whole row comes first
    if (!change->norm || p.norm_per_head) continue;
    const int cols = change == &heads.q ? q_cols : kv_cols;
    if (change->bias) d.add_bias(change->bias, T, cols, change->x);
    d.norm_rows(change->x, nullptr, 0, change->norm, p.norm_eps, T, cols, change->x);
    change->bias = change->norm = nullptr;
  }
  const float* out_bias = nullptr;  // left out of values in 8 bits and added to the result: weights sum to 1
  if (kv.value_type == KvType::kQ8 && !(p.clip > 0) && !p.v_norm) std::swap(heads.v.bias, out_bias);
  note_types(p.layer, T, kv);
  d.prepare_heads(heads, T);
  attend({q, kv, s, pos, out_bias, p.sinks, parts_.as<float>(), out}, T);
}

void DeviceWorkspace::attend(AttendCall call, int T) {
  const AttentionShape& s = call.shape;
  const int pos = call.pos, q_cols = s.num_heads * s.head_dim;
  const int out_cols = call.kv.values ? q_cols : s.num_heads * call.kv.value_stride;
  const size_t part = size_t(s.num_heads) * (call.kv.value_stride + 2);
  const auto num_blocks = [&](int first, int n) {
    return (first + n - 1) / kKeyBlock - first_seen(s, first) / kKeyBlock + 1;
  };
  const float* const q = call.q;
  float* const out = call.out;
  for (int t = 0; t < T;) {
    int n = T - t;
    while (n > 1 && part * size_t(n) * size_t(num_blocks(pos + t, n)) > parts_floats_) n /= 2;
    call.q = q + size_t(t) * q_cols;
    call.out = out + size_t(t) * out_cols;
    call.pos = is_noting_ ? t : pos + t;
    call.now = now();
    device().attend(call, n, num_blocks(pos + t, n));
    t += n;
  }
}

void DeviceWorkspace::latent_attention(const float* q, float* absorbed, float* keys, int T, int pos,
                                       const LatentParts& p, const KvLayer& kv, float* out) {
  const LatentShape& s = p.shape;
  const int width = s.latent_dim + s.rope_dim;
  check_positions(kv, 0, pos, T, shape_.max_context);
  if (s.num_heads > shape_.num_heads || width > shape_.head_dim) {
    throw std::invalid_argument("device attention: expected at most " + std::to_string(shape_.num_heads) +
                                " heads of " + std::to_string(shape_.head_dim));
  }
  note_types(p.layer, T, kv);
  device().prepare_latents(
      {s, q, absorbed, keys, p.norm, p.norm_eps, p.cos, p.sin, grown(T, pos, 0, s.growth, s.grow_every), kv,
       is_noting_ ? 0 : pos, p.layer, misfit_.as<uint64_t>(), now()},
      T);
  const AttentionShape shape{s.num_heads, 1, width, 0, s.scale, 0};
  attend({absorbed, kv, shape, pos, nullptr, nullptr, parts_.as<float>(), out}, T);
}

void DeviceWorkspace::delta_rule(const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride,
                                 float* decay, float* beta, int T, const float* before, float* state, float* out) {
  const float root = std::sqrt(float(parts.shape.key_dim));
  device().delta_rule({parts.shape, parts.rate, parts.bias, q, k, v, qkv_stride, decay, beta, 1 / root / root, 1 / root,
                       kLengthEps / float(parts.shape.key_dim), before, state, out},
                      T);
}

void DeviceWorkspace::mamba2(const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride,
                             float* step, float* decay, int T, const float* before, float* state, float* out) {
  device().mamba2(
      {parts.shape, parts.rate, parts.step_bias, parts.skip, x, b, c, stride, step, decay, before, state, out}, T);
}

void DeviceWorkspace::weigh(const float* x, const float* gates, int T, int cols, float* out) {
  device().weigh(x, lend(gates_, gates, size_t(T)), T, cols, out);
}

void DeviceWorkspace::download(std::vector<DeviceSpace::Fetch> what) {
  uint64_t code;
  what.push_back({&code, misfit_.as(), sizeof code});
  space_->download(what);
  look_at_misfit(code);
}

bool DeviceWorkspace::post(std::vector<DeviceSpace::Fetch> what) {
  what.push_back({nullptr, misfit_.as(), sizeof(uint64_t)});
  return space_->post(what);
}

void DeviceWorkspace::collect(std::vector<DeviceSpace::Fetch> what) {
  uint64_t code;
  what.push_back({&code, nullptr, sizeof code});
  space_->collect(what);
  look_at_misfit(code);
}

void DeviceWorkspace::place(int pos) { space_->upload(misfit_.as() + sizeof(uint64_t), &pos, sizeof pos); }

void DeviceWorkspace::begin_noting() {
  space_->begin_noting();
  is_noting_ = true;
}

int DeviceWorkspace::end_noting() {
  is_noting_ = false;
  return space_->end_noting();
}

void DeviceWorkspace::chosen_ffn(const float* x, Activation activation, const Chosen& c, float* parts, float* out) {
  if (c.count > Workspace::kFfnRows || c.hidden > shape_.max_hidden || c.cols > shape_.max_cols) {
    throw std::invalid_argument("device chosen_ffn: more than there is scratch for");
  }
  Device& d = device();
  const QuantizedBuffer q = buffer(activations_, 1, c.cols), h = buffer(hidden_, c.count, c.hidden);
  d.quantize_rows(plain(x, 1, c.cols), q);
  auto *const gate = gate_.as<float>(), *const up = up_.as<float>();
  if (activation == Activation::kRelu2) {
    d.chosen_products({c.table, c.experts, c.count, 1, 1, q.rows(), true, c.hidden, {up}, {c.biases[1]}});
  } else {
    d.chosen_products(
        {c.table, c.experts, c.count, 0, 2, q.rows(), true, c.hidden, {gate, up}, {c.biases[0], c.biases[1]}});
  }
  d.quantize_hidden(activation, gate, up, c.count, c.hidden, h, nullptr);
  d.chosen_products({c.table, c.experts, c.count, 2, 1, h.rows(), false, c.cols, {parts}, {c.biases[2]}});
  d.combine(parts, nullptr, c.gates, 1, c.count, c.cols, out);
}

void DeviceWorkspace::note_types(int layer, int T, const KvLayer& kv) {
  expect_within("device attention layer", layer, 0, Misfit::kMostLayers - 1);
  expect_within("device attention tokens", T, 0, Misfit::kMostRows);
  types_.resize(std::max(types_.size(), size_t(layer) + 1));
  types_[size_t(layer)] = {kv.key_type, kv.value_type};
}

void DeviceWorkspace::look_at_misfit(uint64_t code) {
  if (code == Misfit::kNone) return;
  device().fill(misfit_.as(), 0xff, sizeof code);
  const Misfit m = Misfit::from(code);
  const auto at = size_t(m.layer);
  float x;
  std::memcpy(&x, &m.magnitude, sizeof x);
  throw RangeError("layer " + std::to_string(m.layer) + ": " +
                   misfit(&x, 1, m.is_value ? types_[at].second : types_[at].first, !m.is_value));
}

void DeviceWorkspace::combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                              float* out) {
  const size_t n = size_t(T) * K;
  std::vector<int32_t> both(2 * n);  // in one copy
  std::memcpy(both.data(), rows, n * sizeof(int32_t));
  std::memcpy(both.data() + n, gates, n * sizeof(float));
  const int32_t* r = lend(rows_, both.data(), both.size());
  device().combine(parts, r, reinterpret_cast<const float*>(r + n), T, K, cols, out);
}

}  // namespace edgemoe
