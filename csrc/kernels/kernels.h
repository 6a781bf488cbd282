// What every instruction set implements: one table of function pointers. Call it per matrix, never per row.
//
// Layout of a nested matrix (docs/format.md specifies it). Rows come in blocks of 16 and columns in blocks of 64, both
// padded with zeros; a tile is 16 x 64 weights. A rung holds its tiles row block by row block. Rung 0 starts with one
// float16 scale per row, and so may later rungs, whose scales apply from there on. A tile of rung 0 starts with one
// byte per row and group of 16 columns: byte 16 * group + row has a relative scale in its lower half and a middle in
// its upper one. A step of a tile is 64 bytes: byte 4 * row + j belongs to column 4 * step + j, so that one 8-bit
// dot-product instruction covers 16 rows. A plane of w bits (1, 2, 4 or 8) packs 8 / w consecutive steps into the same
// 64 bytes, the first step in the lowest bits; other widths are stored as two or three such planes, widest first.
//
// At b bits a code c (the top b bits of the 8-bit code) stands for
//   row scale / 4096 * (4 + a % 4) * 2^(a / 4) * ((c + 0.5) * 2^(8-b) - 128 + 12 * (m - 8)),  a, m the byte's halves.
//
// After its tiles a rung may have a low-rank correction: 32 float16 u and then, per 16 rows and 8 columns, 64 bytes
// like a plane of 4 bits. A matrix whose last rung this is stands for W + A V, with A[row, j] = row scale / 4096 *
// 2^(8-b) * u[j] * (code - 7.5). V [rank, cols], in signed bytes whose rows are padded to whole tiles, lies at the end
// of rung 0, or is shared by several matrices.
//
// The scheme MWQ has the same tiles of codes, but other scales: float16, one per row, 128 columns and rung. In rung 0
// each group of 128 columns starts with its 16 scales and the 16 weights that code 0 stands for; in later rungs, whose
// planes are signs, every two groups start with 16 scales for each of them. w = scale * code + lowest, plus or minus
// the scale of each later rung. A rung is read sequentially.
//
// The schemes MXFP4 and NVFP4 have the same tiles of codes of 4 bits, which are floats E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6
// and, from code 8 on, the same below zero. In a row block, 64 bytes of scales come before the tiles of each 128
// columns in MXFP4, 4 * 16 rows of E8M0, and before each tile in NVFP4, 4 * 16 rows of E4M3. NVFP4's row block starts
// with 16 float32, one per row, by which all scales of the row are multiplied.
//
// Numerics: every float operation is done in the same order on 16 lanes by every instruction set, so that results
// are bit-identical between them, and a row's result does not depend on the rows computed with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgemoe {

constexpr int kTileRows = 16;
constexpr int kTileCols = 64;
constexpr int kGroup = 16;        ///< columns that share a scale and a middle
constexpr int kScaleBytes = 64;   ///< of scales and middles at the start of a tile of rung 0, or where MWQ has scales
constexpr int kMiddleStep = 12;   ///< unit of a middle, in steps of the 8-bit code
constexpr int kScaleUnit = 4096;  ///< a row scale is this many times the step of a code with relative scale 1
constexpr int kActivations = 32;  ///< columns of activations that share a scale
constexpr int kMaxRungs = 8;
constexpr int kMwqGroup = 128;  ///< columns that share each rung's scale in MWQ
constexpr int kRankStep = 8;    ///< ranks of corrections are multiples of this
constexpr int kMaxRank = 32;

// Functions of the layout are static, because a shared copy compiled with wide instructions could replace the
// baseline's, and constexpr, because a device's kernels call them too.
static constexpr int blocks(int n, int size) { return (n + size - 1) / size; }

/// What the planes mean: prefixes of one code, D2MoE's base and planes of signs (arXiv 2504.15299), or floats of 4
/// bits.
enum class Scheme : uint8_t { kNested, kMwq, kMxfp4, kNvfp4 };

static constexpr bool is_float4(Scheme scheme) { return scheme == Scheme::kMxfp4 || scheme == Scheme::kNvfp4; }

/// A view of a resident matrix [rows, cols] at its first `num_rungs` rungs. Owns nothing. Immutable.
struct NestedMatrix {
  Scheme scheme = Scheme::kNested;
  int rows = 0;
  int cols = 0;
  int num_rungs = 0;
  uint8_t row_scales = 1;          ///< bit r: rung r starts with row scales
  uint8_t widths[kMaxRungs] = {};  ///< bits that each rung adds
  uint8_t ranks[kMaxRungs] = {};   ///< of each rung's correction, 0 for none; only the last rung's is used
  uint8_t basis_rank = 0;          ///< rows of V at the end of rung 0, 0 for none
  const int8_t* basis = nullptr;   ///< V, wherever it lies
  const uint8_t* rungs[kMaxRungs] = {};
};

static constexpr int rank_of(const NestedMatrix& w) { return w.num_rungs ? w.ranks[w.num_rungs - 1] : 0; }

static constexpr int bits_of(const NestedMatrix& w) {
  int b = 0;
  for (int i = 0; i < w.num_rungs; ++i) b += w.widths[i];
  return b;
}

/// Bytes of one tile in a rung.
static constexpr size_t tile_bytes(int width, bool is_base) {
  return size_t(128) * width + (is_base ? kScaleBytes : 0);
}

/// Bytes of the row scales before the tiles of rung 0; a multiple of 64, so that tiles are aligned.
static constexpr size_t row_scale_bytes(int rows) { return size_t(blocks(rows, 2 * kTileRows)) * 64; }

/// Bytes of a row block in a rung of MWQ.
static constexpr size_t mwq_block_bytes(int cols, int width, bool is_base) {
  return size_t(blocks(cols, is_base ? kMwqGroup : 2 * kMwqGroup)) * kScaleBytes +
         size_t(blocks(cols, kTileCols)) * tile_bytes(width, false);
}

/// Bytes of a row block of floats of 4 bits.
static constexpr size_t float4_block_bytes(Scheme scheme, int cols) {
  const bool has_row_scales = scheme == Scheme::kNvfp4;
  return (has_row_scales ? kTileRows * sizeof(float) : 0) +
         size_t(blocks(cols, has_row_scales ? kTileCols : 2 * kTileCols)) * kScaleBytes +
         size_t(blocks(cols, kTileCols)) * tile_bytes(4, false);
}

/// What a rung holds.
struct RungForm {
  int width;  ///< bits that it adds
  bool is_base;
  bool has_row_scales;
  int rank = 0;
  int basis_rank = 0;
};

static constexpr RungForm form_of(const NestedMatrix& w, int rung) {
  return {w.widths[rung], rung == 0, (w.row_scales >> rung & 1) != 0, w.ranks[rung], rung == 0 ? w.basis_rank : 0};
}

/// Bytes of one rung's correction of a matrix with `rows` rows.
static constexpr size_t correction_bytes(int rows, int rank) {
  return rank ? kMaxRank * 2 + size_t(blocks(rows, kTileRows)) * kTileRows * rank / 2 : 0;
}

/// Bytes of a row of V.
static constexpr size_t basis_stride(int cols) { return size_t(blocks(cols, kTileCols)) * kTileCols; }

/// Bytes of a rung of a matrix [rows, cols].
static constexpr size_t rung_bytes(Scheme scheme, int rows, int cols, RungForm form) {
  if (scheme == Scheme::kMwq) {
    return size_t(blocks(rows, kTileRows)) * mwq_block_bytes(cols, form.width, form.is_base);
  }
  if (is_float4(scheme)) return size_t(blocks(rows, kTileRows)) * float4_block_bytes(scheme, cols);
  return size_t(blocks(rows, kTileRows)) * blocks(cols, kTileCols) * tile_bytes(form.width, form.is_base) +
         (form.has_row_scales ? row_scale_bytes(rows) : 0) + correction_bytes(rows, form.rank) +
         form.basis_rank * basis_stride(cols);
}

/// Where the correction of the last rung starts.
static constexpr const uint8_t* correction_of(const NestedMatrix& w) {
  RungForm form = form_of(w, w.num_rungs - 1);
  form.rank = form.basis_rank = 0;
  return w.rungs[w.num_rungs - 1] + rung_bytes(w.scheme, w.rows, w.cols, form);
}

/// Where V starts in a matrix that has its own.
static inline const int8_t* own_basis_of(const NestedMatrix& w) {
  const RungForm form = form_of(w, 0);
  return reinterpret_cast<const int8_t*>(w.rungs[0] + rung_bytes(w.scheme, w.rows, w.cols, form) -
                                         form.basis_rank * basis_stride(w.cols));
}

/// Where a rung's tiles start.
static constexpr const uint8_t* tiles_of(const NestedMatrix& w, int rung) {
  return w.rungs[rung] + (form_of(w, rung).has_row_scales ? row_scale_bytes(w.rows) : 0);
}

/// The scales of the rows, float16: those of the last rung that has any.
static constexpr const uint8_t* row_scales_of(const NestedMatrix& w) {
  int rung = w.num_rungs - 1;
  while (rung > 0 && !form_of(w, rung).has_row_scales) --rung;
  return w.rungs[rung];
}

constexpr int kScales = kTileCols / kActivations;  ///< scales of activations per row and tile
constexpr int kSums = kTileCols / kGroup;          ///< sums of activations per row and tile

/// Activations in 8 bits, one scale per row and 32 columns. `codes` is [num_rows, tiles * 64], zero padded.
struct QuantizedRows {
  const int8_t* codes;
  const float* scales;  ///< [num_rows, tiles * kScales]
  const float* sums;    ///< [num_rows, tiles * kSums]: sum of the codes of 16 columns
  int tiles;
};

/// The rows from `row` on.
static constexpr QuantizedRows rows_from(const QuantizedRows& q, int row) {
  const size_t at = size_t(row) * q.tiles;
  return {q.codes + at * kTileCols, q.scales + at * kScales, q.sums + at * kSums, q.tiles};
}

/// u times V x of one row in 8 bits: what the factor A of a matrix's correction is multiplied with.
struct RankRow {
  int8_t codes[kMaxRank];
  float scale;
  float sum;  ///< of codes
};

/// How an FFN's hidden values are computed from its gates and ups.
enum class Activation : uint8_t {
  kSwiglu,         ///< silu(gate) * up
  kGeglu,          ///< gelu(gate) * up, with the tanh form of gelu
  kClampedSwiglu,  ///< gate * sigmoid(1.702 gate) * (up + 1), with gate clamped to at most 7 and up to ±7
  kRelu2,          ///< max(up, 0)^2, without gates
};

/// How keys or values are stored. `kQ8` is 8 bits with a float16 scale per 32 values of a head, llama.cpp's q8_0. The
/// packed types after it have the same groups, with 4, 3 and 2 bits (packed-inl.h).
enum class KvType : uint8_t { kF16, kF32, kQ8, kQ4, kQ3, kQ2 };

constexpr int kKvGroup = 32;      ///< values of a head that share a scale in kQ8 and the packed types
constexpr int kKeyBlock = 256;    ///< positions that share a softmax; blocks are merged in their order
constexpr int kQueries = 4;       ///< queries that share each load of a key or value
constexpr int kPartPadding = 16;  ///< floats after a part's values: the highest score, the sum, padding

/// Keys and values lie in tiles of positions of one head; the last tile is padded.
/// kF16: tiles of 32, so that a column of keys is a cache line: keys [head_stride, 32], values [32, head_stride]. kF32
/// likewise.
/// kQ8: tiles of 16, the codes and then float16 scales [groups, 16]. Keys have the layout of a weight tile, so that one
/// 8-bit dot product covers 16 positions: byte 64 * step + 4 * position + j is the code of column 4 * step + j, plus
/// 128. Values are [16, head_stride] signed codes.
/// Packed: tiles of 16, one group of 32 columns after the other, then the scales as in kQ8. A group is eight steps of
/// 64 codes. For keys, a step has columns 4 * step + j at 4 * position + j; for values, positions 4 * (step % 4) + i of
/// columns 16 * (step / 4) + j at 16 * i + j. A plane of w bits has 8 / w consecutive steps in each 64 bytes, the first
/// in the lowest bits; in kQ3 the plane of 2 bits comes before that of 1. Latents have one head and keys only.
static constexpr bool kv_is_coded(KvType type) { return type >= KvType::kQ8; }

/// Bits of a packed type, 0 for others.
static constexpr int kv_packed_bits(KvType type) {
  return type == KvType::kQ4 ? 4 : type == KvType::kQ3 ? 3 : type == KvType::kQ2 ? 2 : 0;
}

template <int Width>
constexpr int kKvPlane = 64 * Width;  ///< bytes of a plane of a group

static constexpr int kv_tile_rows(KvType type) { return kv_is_coded(type) ? 16 : 32; }

/// Bytes of a tile's codes, or floats.
static constexpr size_t kv_codes_bytes(KvType type, int head_stride) {
  if (const int bits = kv_packed_bits(type)) return size_t(64) * bits * blocks(head_stride, kKvGroup);
  return type == KvType::kQ8 ? size_t(16) * head_stride : size_t(32) * (type == KvType::kF16 ? 2 : 4) * head_stride;
}

static constexpr size_t kv_tile_bytes(KvType type, int head_stride) {
  const size_t scales = kv_is_coded(type) ? size_t(16) * 2 * blocks(head_stride, kKvGroup) : 0;
  return kv_codes_bytes(type, head_stride) + scales;
}

static constexpr size_t kv_head_bytes(KvType type, int capacity, int head_stride) {
  return blocks(capacity, kv_tile_rows(type)) * kv_tile_bytes(type, head_stride);
}

/// One sequence's keys and values of one layer, head after head.
struct KvLayer {
  uint8_t* keys;
  uint8_t* values;
  KvType key_type;
  KvType value_type;
  int capacity;      ///< positions
  int head_stride;   ///< head_dim rounded up to 16; the rest is zero
  int value_stride;  ///< the same; for latents, where values is null, how many leading columns of a key are its value
};

/// One query and the positions [begin, end) that it sees of a block.
struct AttendQuery {
  const float* q;       ///< [head_stride], zero padded
  const int8_t* codes;  ///< the same in 8 bits, [groups, 32]; this and the next two only for keys in codes
  const float* scales;  ///< [groups]
  const int32_t* sums;  ///< [groups], of codes
  const float*
      lacking;  ///< [num_pairs, 2]: what scores with keys in codes lack, as factors of a position's cosine and sine
  const int* pairs;  ///< [num_pairs]: the frequency of each; the same for all queries of a call, as the next two are
  int num_pairs;
  const float* turns;  ///< tiles of 16 positions [half][cosines, sines][16], see mixers/rope.h
  int half;
  float* scores;  ///< scratch [kKeyBlock]
  float* part;    ///< out: [value_stride] values, the highest score, the sum of e^(score - highest)
  int begin;
  int end;
  bool is_cold;  ///< the block has not just been read; only a hint
};

struct AttentionShape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int window;  ///< how many of the last positions a query sees; 0 for all
  float scale;
  int rope_dim;   ///< leading columns of a head that are rotated; 0 for none
  int chunk = 0;  ///< a query sees only positions in its own chunk of this length; 0 for all
};

/// One head of a gated delta rule over some tokens; strides are floats from one token to the next.
struct DeltaHead {
  const float* before;  ///< [key_dim, value_dim], the state before the tokens
  float* state;         ///< after them; may be `before`
  const float* q;       ///< [key_dim] per token, scaled
  const float* k;       ///< [key_dim]
  const float* v;       ///< [value_dim]
  const float* decay;   ///< one per token, or key_dim of them: the share of the state that is kept, 0 to 1
  const float* beta;    ///< one per token: how much of the change is written
  float* out;           ///< [value_dim] per token; may not be v
  int key_dim;
  int value_dim;  ///< a multiple of 16
  size_t key_stride;
  size_t value_stride;
  size_t out_stride;
  size_t decay_stride;
  size_t beta_stride;
  bool decay_per_channel;
};

/// One head of Mamba-2 over some tokens, likewise.
struct MambaHead {
  const float* before;  ///< [state_dim, head_dim], the state before the tokens
  float* state;         ///< after them; may be `before`
  const float* x;       ///< [head_dim] per token
  const float* b;       ///< [state_dim], the group's
  const float* c;       ///< [state_dim]
  const float* decay;   ///< exp(step * A)
  const float* step;
  float* out;  ///< [head_dim] per token; may not be x
  float skip;  ///< D: the factor of x in the skip connection
  int state_dim;
  int head_dim;  ///< a multiple of 16
  size_t x_stride;
  size_t group_stride;
  size_t step_stride;
  size_t out_stride;
};

constexpr int kMaxTaps = 8;  ///< of a short convolution

struct ConvShape {
  int channels;
  int taps;  ///< 1 to kMaxTaps; the last one multiplies the newest value
  bool silu;
  size_t x_stride;  ///< floats from one token to the next
  size_t out_stride;
};

/// A level that codes are fitted to.
struct FitLevel {
  float step;    ///< of its code, in steps of the 8-bit code
  float weight;  ///< how much its squared error counts
};

/// The value that the top `bits` bits of a code stand for, in steps of the 8-bit code.
static inline float position_of(int code, int bits) {
  const int shift = 8 - bits;
  return (float(code >> shift) + 0.5f) * float(1 << shift);
}

/// A level that the codes of 16 rows are chosen for, in one group of columns.
struct CodeLevel {
  int bits;
  const float* moments;      ///< [cols, cols], by which the level's error is measured
  float weights[kTileRows];  ///< how much each row's squared error counts, in steps of a code
  float scales[kTileRows];   ///< the step of a code with 8 bits, for each row
};

/// A matrix in codes of 4 bits with a scale per row: w = scale * (code - 7.5). A block of kTileRows rows has 64 bytes
/// for every 8 columns, four per row; their lower halves are the first four columns.
struct RoundedTiles {
  const uint8_t* codes;  ///< [blocks, steps, 64]
  const float* scales;   ///< [blocks * kTileRows]
  const float* bias;     ///< likewise, added to the rows' products
  int blocks, steps;
};

/// The table of one instruction set.
struct Kernels {
  const char* name;

  /// Chooses the bytes of scale and middle of 16 rows, for groups of 16 columns: those with the least sum, over levels
  /// and weights, of the level's weight * importance * squared error. `columns` [groups * 16, 16] has the rows of a
  /// column together, and `importance` is [groups * 16], 0 for padding. `units` [16] is the step of a code with
  /// relative scale 1. Tries 8 bytes of each group, or 25 if it `is_thorough`. Writes `bytes` [groups, 16] and `errors`
  /// [16], sums over the groups.
  void (*fit_scales)(const float* columns, int groups, const float* importance, const FitLevel* levels, int num_levels,
                     const float* units, bool is_thorough, uint8_t* bytes, float* errors);

  /// Sets each of 16 codes to the one of 8 bits with the least sum of weight * (target - position)^2 over the levels;
  /// of several such codes to the lowest. The position of a code at b bits is the middle of what its first b bits leave
  /// open. Weights and targets are [num_levels, 16], and the levels' bits ascend.
  void (*best_codes)(const CodeLevel* levels, int num_levels, const float* weights, const float* targets, int* codes);

  /// Coordinate descent through columns [first, first + count) of one group: sets the code of each column in turn to
  /// the best, given the gradients, which follow within the group. `codes` are [16, cols]; `gradients` [num_levels, 16,
  /// cols] are only read. `moves` [num_levels, 16, 16] gets how far the weight of each row and column moved; columns
  /// from `count` on are left as they are. Rows with a bit in `skipped` stay. Returns the rows whose codes changed.
  unsigned (*descend_group)(const CodeLevel* levels, int num_levels, int cols, int first, int count, unsigned skipped,
                            const float* gradients, uint8_t* codes, float* moves);

  /// Writes the nearest codes for these scales, in the layout of tiles: `codes` [groups * 4, 64].
  void (*round_codes)(const float* columns, int groups, const float* units, const uint8_t* bytes, uint8_t* codes);

  /// Writes the planes of one rung of a tile of codes [16, 64]: the `width` bits from `shift` on.
  void (*pack_rung)(const uint8_t* codes, int width, int shift, uint8_t* out);

  /// Quantises a row of activations to 8 bits. A group with a value that is not finite gets the scale NaN, so that it
  /// shows in the logits.
  void (*quantize_row)(const float* x, int cols, int8_t* codes, float* scales, float* sums);

  /// y[i, r] = sum_c w[r, c] * x[i, c] for i < n and the rows r of blocks [begin, end). Rows of y are `stride` floats
  /// apart. If w has a correction, sum_j A[r, j] * z[i, j] / u[j] is added, with z [n] from `quantize_ranks`.
  void (*matmul_nested)(const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int n, int begin, int end,
                        float* y, size_t stride);

  /// Writes row `row` of w as floats.
  void (*decode_nested)(const NestedMatrix& w, int row, float* out);

  /// z[j] = sum_c basis[j, c] * x[c] for j < rank, a multiple of kRankStep; the rest of z [kMaxRank] becomes 0.
  void (*project)(const int8_t* basis, int rank, const float* x, int cols, float* z);

  /// Quantises z [kMaxRank], each value times its float16 u, to 8 bits with one scale, like `quantize_row`.
  void (*quantize_ranks)(const uint16_t* u, const float* z, RankRow* out);

  /// out [cols] += row `row` of A V.
  void (*decode_correction)(const NestedMatrix& w, int row, float* out);

  /// `matmul_nested` and `decode_nested` for a matrix of the scheme MWQ, whose base has 2 or 5 bits.
  void (*matmul_mwq)(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y, size_t stride);
  void (*decode_mwq)(const NestedMatrix& w, int row, float* out);

  /// The same for floats of 4 bits.
  void (*matmul_float4)(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y,
                        size_t stride);
  void (*decode_float4)(const NestedMatrix& w, int row, float* out);

  /// y[i, r] = sum_c w[r, c] * x[i, c], float32, rows r in [begin, end).
  void (*matmul_f32)(const float* w, const float* x, int n, int rows, int cols, int begin, int end, float* y);

  /// out = x / sqrt(mean(x^2) + eps) * weight over `cols` values.
  void (*rms_norm)(const float* x, const float* weight, float eps, int cols, float* out);

  /// out[i] = the activation `kind` of gate[i] and up[i]; out may be either. gate may be null if `kind` has no gates.
  void (*activate)(Activation kind, const float* gate, const float* up, int n, float* out);

  /// x[i] = cap * tanh(x[i] / cap), in place; a value that is not finite becomes NaN.
  void (*soft_cap)(float* x, float cap, int n);

  /// x[i] = exp(x[i] - max x) / sum, in place, n >= 1.
  void (*softmax)(float* x, int n);

  /// out[i] += scale * x[i].
  void (*add_scaled)(const float* x, float scale, int n, float* out);

  /// The same for several rows x[rows[k]], `stride` floats apart, one after the other.
  void (*add_scaled_rows)(const float* x, size_t stride, const uint8_t* rows, const float* scales, int count, int n,
                          float* out);

  /// Rotates one head of `head_dim` values in place (half-split layout).
  void (*rope)(float* x, const float* cos, const float* sin, int head_dim);

  /// Stores n floats as float16.
  void (*to_f16)(const float* x, int n, uint16_t* out);

  /// The reverse.
  void (*from_f16)(const uint16_t* x, int n, float* out);

  /// Reads n bytes, a multiple of 4096, and returns something that depends on all of them, to measure bandwidth.
  uint8_t (*read_all)(const uint8_t* bytes, size_t n);

  /// Quantises n values of a head to 8 bits with one scale per 32 values, which float16 holds exactly. `codes` is
  /// [groups, 32], zero padded. A group with a value that is not finite gets the scale NaN.
  void (*quantize_head)(const float* x, int n, int8_t* codes, float* scales, int32_t* sums);

  /// Likewise rounds n values of a head to `bits` bits, 2 to 4: the codes of packed keys and values, one per byte.
  void (*pack_head)(const float* x, int n, int bits, int8_t* codes, float* scales);

  /// Attention of n <= kQueries queries, of heads that share a kv head, to positions of the block that starts at
  /// `base`, a multiple of kKeyBlock. A query's result does not depend on the others.
  void (*attend)(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int kv_head, int base);

  /// The same where a key's leading columns are its value: `kv` has no values.
  void (*attend_latent)(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int base);

  /// Merges two parts of a query's result: `into`, of earlier blocks, and `part`, of the next.
  void (*merge_parts)(float* into, const float* part, int value_stride);

  /// For each of T tokens in turn, columns [begin, end) of the values, multiples of 16:
  ///   S = decay S;  d = beta (v - S^T k);  S = S + k d^T;  out = S^T q.
  void (*delta_rule)(const DeltaHead& head, int T, int begin, int end);

  /// Likewise: S = decay S + b (step x)^T;  out = S^T c + skip x.
  void (*mamba2)(const MambaHead& head, int T, int begin, int end);

  /// A causal convolution of each of the channels [begin, end), begin a multiple of 16: out = sum_j weight[j] x[t -
  /// taps + 1 + j] + bias, and then silu if the shape says so. weight [taps, channels], bias [channels] or null.
  /// `before`, [taps - 1, channels] or null for zeros, has the inputs before x, and `tail` gets those before the next
  /// call's; they may be the same. out may be x.
  void (*short_conv)(const ConvShape& shape, const float* x, const float* weight, const float* bias,
                     const float* before, float* tail, int T, int begin, int end, float* out);

  /// x[i] = sigmoid(x[i]), in place.
  void (*sigmoid)(float* x, int n);

  /// out[i] = sigmoid(gate[i]) * x[i].
  void (*sigmoid_mul)(const float* gate, const float* x, int n, float* out);

  /// x[i] = log(1 + exp(x[i] + bias[i])), in place; bias may be null.
  void (*softplus)(float* x, const float* bias, int n);

  /// out[i] = exp(-rate step[i]) with rate[0], or with rate[i] if `rate_each`. Both are at least 0. out may be step.
  void (*decays)(const float* step, const float* rate, bool rate_each, int n, float* out);

  /// out [blocks * kTileRows] = w x + bias, with x given by its codes [steps * 8]: x = `x_scale` * codes, and `x_sum`
  /// is the sum of the codes.
  void (*matmul_rounded)(const RoundedTiles& w, const int8_t* x, float x_scale, float x_sum, float* out);

  /// out[i] = log x[i], for normal numbers above 0. out may be x.
  void (*logs)(const double* x, int n, double* out);

  /// x[i] = e^x[i], in place, with x[i] clamped to -700 to 20.
  void (*powers)(double* x, int n);

  /// Updates a layer's `UseRows` for one token: raw [2, n] are the uses, which are multiplied by `left`, and the
  /// router's scores, which become `scores` [n]; logs [2, n] are their logarithms, `less` = log(left) being added to
  /// the uses'.
  void (*pass_token)(const float* scores, int n, double left, double less, double* raw, double* logs);

  /// Updates a layer's `UseRows`, see there: margin [n] -= base, average [n] goes `share` of the way to it, and out
  /// [n] = weights [5] times one, used, frequency, margin, average.
  void (*weigh_rows)(double* margin, double* average, const double* used, const double* frequency, int n, double base,
                     double share, const double* weights, double* out);

  /// out[i] = weights [3] times one, habit[i] and text[i].
  void (*mix_odds)(const double* habit, const float* text, int n, const double* weights, double* out);

  /// out[i] = -round odds[i] - base.
  void (*moments)(const double* odds, int n, double round, double base, double* out);

  /// Writes to `out` the indices of the `most` <= n least of x, the least first and among equals the first.
  void (*least)(const double* x, int n, int most, int32_t* out);
};

/// y = w x, as `matmul_nested` says, with w's correction if it has one; then z [n] is from `quantize_ranks`.
static inline void matmul(const Kernels& k, const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int n,
                          int begin, int end, float* y, size_t stride) {
  if (w.scheme == Scheme::kNested) return k.matmul_nested(w, x, z, n, begin, end, y, stride);
  (is_float4(w.scheme) ? k.matmul_float4 : k.matmul_mwq)(w, x, n, begin, end, y, stride);
}

/// Writes row `row` of w as floats, with its correction if it has one; then w.basis must be set.
static inline void decode_row(const Kernels& k, const NestedMatrix& w, int row, float* out) {
  const auto decode = w.scheme == Scheme::kMwq ? k.decode_mwq : is_float4(w.scheme) ? k.decode_float4 : k.decode_nested;
  decode(w, row, out);
  if (rank_of(w)) k.decode_correction(w, row, out);
}

/// Returns the active table; the best usable one unless `use_isa` chose another. Thread-safe.
const Kernels& kernels();

/// Names of the tables that this CPU can run, best first, joined by spaces.
const char* usable_isas();

/// Makes `name` active for the whole process. Throws std::invalid_argument when this CPU cannot run it.
void use_isa(const char* name);

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace edgemoe
