// What the core asks of a device. Nothing of CUDA in here: a plug-in implements it, see device/backend.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "mixers/shapes.h"
#include "route_rule.h"

namespace edgemoe {

/// Grows with every change of this file or of kernels.h that a plug-in can see.
constexpr int kBackendAbi = 4;

enum class Room : uint8_t { kDevice, kPinned };  ///< pinned memory is the host's, and copies from it need no waiting

constexpr int kCompute = 0, kCopy = 1, kNumQueues = 2;  ///< queues: kernels run on the first
constexpr int kMostHeadDim = 640;                       ///< that a device's attention knows, latents too

/// A point in a queue that others can wait for.
using Fence = uint32_t;

struct DeviceInfo {
  char name[128];
  int major, minor;  ///< compute capability
  int num_processors;
  size_t total_bytes, free_bytes;
  bool is_unified;  ///< its memory is the host's
};

/// Rows of activations in 8 bits that a kernel writes; see QuantizedRows.
struct QuantizedBuffer {
  int8_t* codes;
  float* scales;
  float* sums;
  int tiles;

  QuantizedRows rows() const { return {codes, scales, sums, tiles}; }
};

/// Rows [n, cols] of activations. Row i is row rows[i] of x, where `rows` is given; x is [tokens, heads] rows and n all
/// of them, head after head, where there are several; else it is row i.
struct RowsCall {
  const float* x;
  int n, cols;
  size_t stride;  ///< floats from one row of x to the next
  const int32_t* rows = nullptr;
  int heads = 1;

  constexpr size_t at(int i) const {
    const int tokens = n / heads;
    return size_t(rows ? rows[i] : heads > 1 ? i % tokens * heads + i / tokens : i) * stride;
  }
};

/// y [n, stride] = x [n] times a matrix.
struct Product {
  NestedMatrix w;
  QuantizedRows x;
  float* y;
  int n;
  int stride;
  const float* bias = nullptr;     ///< [rows], added at last
  const RankRow* ranks = nullptr;  ///< [n], where the matrix has a correction
  /// Matrices that are stacked: that of head h is for rows h * n on of x, and makes y[token, h * head_stride] on.
  int heads = 1;
  int head_stride = 0;
};

/// out [n] = what `quantize_ranks` makes of u and V x.
struct RanksCall {
  const int8_t* basis;
  int rank;
  const uint8_t* u;  ///< float16
  RowsCall x;
  RankRow* out;
};

/// What becomes of the queries, keys or values of one head; null pointers where there is nothing to do.
struct HeadChange {
  float* x;           ///< [T, num_heads * head_dim], changed in place
  const float* bias;  ///< [num_heads * head_dim]
  const float* norm;  ///< [head_dim]
  int num_heads;
  bool rotate;
  bool norm_last;  ///< after the rotation, and not before the clip
};

/// Of a layer's attention, all that is done before scores are computed.
struct HeadsCall {
  HeadChange q, k, v;
  const float *cos, *sin;  ///< [T, rope_dim / 2]
  const float* grown;      ///< [T]: what queries are multiplied with at last, or null
  int head_dim, rope_dim;
  float norm_eps, clip;  ///< 0 for no clip
  KvLayer kv;            ///< keys and values are stored at positions [pos, pos + T)
  int pos;
  int layer;
  uint64_t* misfit;              ///< lowered to `Misfit::code` of a key or value that the cache cannot hold
  const int32_t* now = nullptr;  ///< added to `pos`, if given: what work that is repeated is told anew
};

struct AttendCall {
  const float* q;  ///< [T, heads * head_dim]
  KvLayer kv;
  AttentionShape shape;
  int pos;
  const float* out_bias;         ///< [kv_heads * head_dim] or null: what values lack
  const float* sinks;            ///< [heads] or null
  float* parts;                  ///< scratch [T, blocks, heads, value_stride + 2]
  float* out;                    ///< [T, heads * head_dim], of latents [T, heads * value_stride]
  const int32_t* now = nullptr;  ///< as in `HeadsCall`
};

/// The first position that a query at `position` sees.
static constexpr int first_seen(const AttentionShape& s, int position) {
  const int begin = s.chunk > 0 ? position / s.chunk * s.chunk : 0, window = s.window > 0 ? position + 1 - s.window : 0;
  return begin > window ? begin : window;
}

/// Of latent attention, the same as `HeadsCall`.
struct LatentsCall {
  LatentShape shape;
  const float* q;   ///< [T, heads * (nope + rope)]
  float* absorbed;  ///< [T, heads * (latent + rope)], gets the last columns
  float* keys;      ///< [T, latent + rope], changed in place
  const float* norm;
  float norm_eps;
  const float *cos, *sin;
  const float* grown;
  KvLayer kv;
  int pos;
  int layer;
  uint64_t* misfit;
  const int32_t* now = nullptr;
};

/// The gated delta rule; see mixers/delta.h.
struct DeltaCall {
  DeltaShape shape;
  const float *rate, *bias;
  float *q, *k;
  const float* v;
  size_t stride;
  float *decay, *beta;
  float q_weight, k_weight, norm_eps;  ///< of their norm
  const float* before;                 ///< or null
  float* state;
  float* out;
};

/// Mamba-2; see mixers/mamba.h.
struct MambaCall {
  MambaShape shape;
  const float *rate, *step_bias, *skip;
  const float *x, *b, *c;
  size_t stride;
  float *step, *decay;
  const float* before;  ///< or null
  float* state;
  float* out;
};

constexpr int kMostPosted = 4;

/// What a kernel sends to the host's pinned memory: words of some arrays, one after the other, and at last a number
/// that says that they are there.
struct PostCall {
  const uint32_t* from[kMostPosted];
  int sizes[kMostPosted];  ///< 0 for none
  uint32_t* to;
  uint32_t* turn;
  const uint32_t* number;  ///< the host's too, read when the kernel runs
};

constexpr int kMostRouted = 1024, kMostChosen = 32, kMostGroups = 32;  ///< that `choose` knows

/// Whether `choose` knows a rule.
constexpr bool is_known(const RouteRule& r) {
  return r.num_experts <= kMostRouted && r.top_k <= kMostChosen && r.groups <= kMostGroups &&
         r.scoring != Scoring::kSparseMixer;
}

/// See choose in dense.h; scores are what is left of logits.
struct ChooseCall {
  RouteRule rule;
  const float* logits;  ///< [T, num_experts]
  const float* bias;
  const float* choice_bias;
  int32_t* experts;  ///< [T, top_k]
  float* gates;
};

/// Products of one token with matrices of the experts that were chosen for it.
struct ChosenCall {
  const NestedMatrix* table;  ///< [num_experts, 3]: gate, up and down, of which `parts` from the `first` on
  const int32_t* experts;     ///< [count]
  int count, first, parts;
  QuantizedRows x;  ///< one row for all, or one for each
  bool is_shared;
  int rows;              ///< of each matrix
  float* y[2];           ///< of each part [count, rows]
  const float* bias[2];  ///< of each part [num_experts, rows], or null
};

/// What multiplies the heads of attention: sigmoid by element; sigmoid or softplus by head.
enum class HeadGate : uint8_t { kSigmoid, kSigmoidHead, kSoftplusHead };

/// A key or value that did not fit, as one number: the first layer, row, key before value, largest magnitude is lowest.
struct Misfit {
  int layer, row;
  bool is_value;
  uint32_t magnitude;  ///< bits of a float

  static constexpr uint64_t kNone = ~uint64_t(0);
  constexpr uint64_t code() const {
    return uint64_t(layer) << 52 | uint64_t(row) << 33 | uint64_t(is_value) << 32 | (0xffffffffu - magnitude);
  }
  static constexpr Misfit from(uint64_t code) {
    return {int(code >> 52), int(code >> 33 & 0x7ffff), (code >> 32 & 1) != 0, 0xffffffffu - uint32_t(code)};
  }
};

/// One device. Calls come from one thread at a time and return before the work is done, unless they say that they
/// wait; work that failed is thrown as DeviceError by a later call. Addresses are the device's, unless a name says
/// otherwise. Shapes and numerics are those of kernels.h, dense.h and mixers/attention.h, bit for bit.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceInfo info() const = 0;

  /// Throws OutOfBudget when there is no room.
  virtual void* alloc(size_t bytes, Room room) = 0;
  /// Waits for all work.
  virtual void free(void* p, Room room) noexcept = 0;
  /// Lets kernels read memory that is the host's, all of it resident, until it is taken back; returns where it is for
  /// them. Only where both have one memory is that as fast as the device's own.
  virtual const void* lend(void* host, size_t) { return host; }
  /// Waits for all work.
  virtual void take_back(void*) noexcept {}
  virtual void fill(void* to, int byte, size_t n) = 0;
  virtual void copy_in(int queue, void* to, const void* pinned, size_t n) = 0;
  virtual void copy_out(int queue, void* pinned, const void* from, size_t n) = 0;
  /// On the queue kCompute.
  virtual void copy(void* to, const void* from, size_t n) = 0;

  virtual Fence make_fence() = 0;
  virtual void record(Fence fence, int queue) = 0;
  /// The queue waits for what was recorded last, the caller does not.
  virtual void wait(int queue, Fence fence) = 0;
  virtual bool is_done(Fence fence) = 0;
  /// Waits.
  virtual void sync(Fence fence) = 0;
  /// Between looks at pinned memory that a kernel writes: finds a fault, and lets a simulated device go on. Returns
  /// whether the queue kCompute has work left. A host must never look without it.
  virtual bool progress() = 0;

  /// Between the two, kernels of kCompute are noted instead of run, and nothing else may be asked for. Returns a
  /// number for `repeat`.
  virtual void begin_noting() = 0;
  virtual int end_noting() = 0;
  /// Queues what was noted, as it was told then.
  virtual void repeat(int noted) = 0;
  virtual void forget(int noted) noexcept = 0;

  // ---------------------------------------------------------------- kernels, on the queue kCompute

  virtual void quantize_rows(const RowsCall& x, const QuantizedBuffer& out) = 0;
  /// Of what `kind` makes of gate and up [n, cols], which `hidden` gets too if it is given; it may be up.
  virtual void quantize_hidden(Activation kind, const float* gate, const float* up, int n, int cols,
                               const QuantizedBuffer& out, float* hidden) = 0;
  /// `list` is the host's.
  virtual void ranks(const RanksCall* list, int count) = 0;
  /// `list` is the host's.
  virtual void products(const Product* list, int count) = 0;
  /// y [n, rows] = x [n, cols] times w [rows, cols], float32.
  virtual void matmul_f32(const float* w, const float* x, int n, int rows, int cols, float* y) = 0;
  /// out = RMS norm of x, to which scale * added is added first, if given. out may be x without `added`.
  virtual void norm_rows(float* x, const float* added, float scale, const float* weight, float eps, int n, int cols,
                         float* out) = 0;
  virtual void prepare_heads(const HeadsCall& call, int T) = 0;
  /// `call.parts` has room for `blocks` of the positions that any of the T queries sees.
  virtual void attend(const AttendCall& call, int T, int blocks) = 0;
  virtual void choose(const ChooseCall& call, int T) = 0;
  virtual void chosen_products(const ChosenCall& call) = 0;
  /// Without `rows` a token's parts follow each other.
  virtual void combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                       float* out) = 0;
  /// out += scale * x; each row times sigmoid(gate_weight · gate_input), if given.
  virtual void add_rows(const float* x, float scale, const float* gate_weight, const float* gate_input, int T, int cols,
                        float* out) = 0;
  virtual void add_bias(const float* bias, int T, int cols, float* out) = 0;
  virtual void scale(float factor, size_t n, float* out) = 0;
  /// out [n] *= factors [size], over and over.
  virtual void multiply(const float* factors, size_t size, size_t n, float* out) = 0;
  /// out [T, cols] = x times gates [T].
  virtual void weigh(const float* x, const float* gates, int T, int cols, float* out) = 0;
  /// x [T, heads * width]; gate [T, heads], or as x.
  virtual void gate_heads(float* x, const float* gate, HeadGate kind, int T, int heads, int width) = 0;
  /// See mixers/gated_norm.h.
  virtual void gated_norm(float* x, const float* gate, const float* weight, bool weight_per_group, float eps, Gate kind,
                          int T, int groups, int width) = 0;
  /// See `Kernels::short_conv`.
  virtual void short_conv(const ConvShape& shape, const float* x, const float* weight, const float* bias,
                          const float* before, float* tail, int T, float* out) = 0;
  virtual void delta_rule(const DeltaCall& call, int T) = 0;
  virtual void mamba2(const MambaCall& call, int T) = 0;
  virtual void prepare_latents(const LatentsCall& call, int T) = 0;
  virtual void post(const PostCall& call) = 0;
};

/// What a plug-in says of itself and of the machine.
struct BackendProbe {
  int abi;
  int num_devices;
  int driver, runtime;  ///< versions as CUDA numbers them, 12020 for 12.2; 0 for no driver
  char why_not[256];    ///< why there are no devices; empty if there are some
};

extern "C" {
/// Needs no driver and throws nothing.
using ProbeBackend = void(BackendProbe*);
/// Null when it fails, and the reason in `error`.
using OpenDevice = Device*(int ordinal, char* error, size_t size);
}
constexpr char kProbeName[] = "edgemoe_backend_probe", kOpenName[] = "edgemoe_backend_open";

}  // namespace edgemoe
