// The interface of a device. It knows nothing of CUDA: a plug-in implements it, see device/backend.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "mixers/shapes.h"
#include "route_rule.h"

namespace edgemoe {

/// Incremented with every change of this file or of kernels.h that a plug-in can see.
constexpr int kBackendAbi = 4;

enum class Room : uint8_t { kDevice, kPinned };  ///< pinned memory is the host's; its copies are asynchronous

constexpr int kCompute = 0, kCopy = 1, kNumQueues = 2;  ///< queues: kernels run on the first
constexpr int kMostHeadDim = 640;                       ///< that a device's attention supports, also for latents

/// A point in a queue that others can wait for.
using Fence = uint32_t;

struct DeviceInfo {
  char name[128];
  int major, minor;  ///< compute capability
  int num_processors;
  size_t total_bytes, free_bytes;
  bool is_unified;  ///< whether device and host share one memory
};

/// Rows of activations in 8 bits that a kernel writes; see QuantizedRows.
struct QuantizedBuffer {
  int8_t* codes;
  float* scales;
  float* sums;
  int tiles;

  QuantizedRows rows() const { return {codes, scales, sums, tiles}; }
};

/// Rows [n, cols] of activations. If `rows` is given, row i is row rows[i] of x. With several heads, x has a row per
/// token and head, and the n rows are all of these, ordered by head. Else row i is row i of x.
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
  const float* bias = nullptr;     ///< [rows], added at the end
  const RankRow* ranks = nullptr;  ///< [n], where the matrix has a correction
  /// With several heads, w is their matrices stacked: that of head h takes rows h * n on of x and writes columns h *
  /// head_stride on of y.
  int heads = 1;
  int head_stride = 0;
};

/// out [n] = `quantize_ranks` of u and V x.
struct RanksCall {
  const int8_t* basis;
  int rank;
  const uint8_t* u;  ///< float16
  RowsCall x;
  RankRow* out;
};

/// How the heads of queries, keys or values are prepared; null pointers for steps that are left out.
struct HeadChange {
  float* x;           ///< [T, num_heads * head_dim], changed in place
  const float* bias;  ///< [num_heads * head_dim]
  const float* norm;  ///< [head_dim]
  int num_heads;
  bool rotate;
  bool norm_last;  ///< the norm comes after the rotation, not before the clip
};

/// All that a layer's attention does before scores are computed.
struct HeadsCall {
  HeadChange q, k, v;
  const float *cos, *sin;  ///< [T, rope_dim / 2]
  const float* grown;      ///< [T]: factors by which queries are multiplied last, or null
  int head_dim, rope_dim;
  float norm_eps, clip;  ///< 0 for no clip
  KvLayer kv;            ///< keys and values are stored at positions [pos, pos + T)
  int pos;
  int layer;
  uint64_t* misfit;              ///< lowered to `Misfit::code` of a key or value that the cache cannot hold
  const int32_t* now = nullptr;  ///< added to `pos`, if given: so that recorded work can be repeated at other positions
};

/// Attention to stored keys and values.
struct AttendCall {
  const float* q;  ///< [T, heads * head_dim]
  KvLayer kv;
  AttentionShape shape;
  int pos;
  const float* out_bias;         ///< [kv_heads * head_dim] or null: the bias that stored values leave out
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

/// The same as `HeadsCall` for latent attention.
struct LatentsCall {
  LatentShape shape;
  const float* q;   ///< [T, heads * (nope + rope)]
  float* absorbed;  ///< [T, heads * (latent + rope)], whose last columns are written
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

/// What a kernel sends to the host's pinned memory: the words of some arrays, one array after the other, and last a
/// number that says that they have arrived.
struct PostCall {
  const uint32_t* from[kMostPosted];
  int sizes[kMostPosted];  ///< 0 for none
  uint32_t* to;
  uint32_t* turn;
  const uint32_t* number;  ///< also in the host's memory, read when the kernel runs
};

constexpr int kMostRouted = 1024, kMostChosen = 32, kMostGroups = 32;  ///< limits of `Device::choose`

/// Whether `Device::choose` supports a rule.
constexpr bool is_known(const RouteRule& r) {
  return r.num_experts <= kMostRouted && r.top_k <= kMostChosen && r.groups <= kMostGroups &&
         r.scoring != Scoring::kSparseMixer;
}

/// See choose in dense.h; here the logits are left as they are.
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
  const NestedMatrix* table;  ///< [num_experts, 3]: gate, up and down, of which `parts` from `first` on are used
  const int32_t* experts;     ///< [count]
  int count, first, parts;
  QuantizedRows x;  ///< one row for all experts if `is_shared`, else one for each
  bool is_shared;
  int rows;              ///< of each matrix
  float* y[2];           ///< of each part [count, rows]
  const float* bias[2];  ///< of each part [num_experts, rows], or null
};

/// The gate that multiplies the heads of attention: sigmoid per element, or sigmoid or softplus per head.
enum class HeadGate : uint8_t { kSigmoid, kSigmoidHead, kSoftplusHead };

/// A key or value that did not fit. `code` orders them: the lowest is of the first layer, then of the first row, then a
/// key rather than a value, then of the largest magnitude.
struct Misfit {
  int layer, row;
  bool is_value;
  uint32_t magnitude;  ///< bits of a float

  static constexpr uint64_t kNone = ~uint64_t(0);
  static constexpr int kMostLayers = 1 << 12, kMostRows = 1 << 19;  ///< that `code` has room for
  constexpr uint64_t code() const {
    return uint64_t(layer) << 52 | uint64_t(row) << 33 | uint64_t(is_value) << 32 | (0xffffffffu - magnitude);
  }
  static constexpr Misfit from(uint64_t code) {
    return {int(code >> 52), int(code >> 33 & 0x7ffff), (code >> 32 & 1) != 0, 0xffffffffu - uint32_t(code)};
  }
};

/// One device. Calls come from one thread at a time and return before the work is done, unless they say that they
/// wait; if work fails, a later call throws DeviceError. Addresses are of device memory, unless a name says otherwise.
/// Shapes and numerics are those of kernels.h, dense.h and mixers/attention.h, bit for bit.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceInfo info() const = 0;

  /// Throws OutOfBudget when there is no room.
  virtual void* alloc(size_t bytes, Room room) = 0;
  /// Waits for all work.
  virtual void free(void* p, Room room) noexcept = 0;
  /// Lets kernels read host memory, all of it resident, until `take_back`. Returns its address for kernels. As fast as
  /// device memory only where device and host share one memory.
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
  /// Makes the queue wait for what the fence recorded last; the caller does not wait.
  virtual void wait(int queue, Fence fence) = 0;
  virtual bool is_done(Fence fence) = 0;
  /// Waits.
  virtual void sync(Fence fence) = 0;
  /// Must be called whenever the host polls pinned memory that a kernel writes: it reports faults, and lets a simulated
  /// device go on. Returns whether the queue kCompute has work left.
  virtual bool progress() = 0;

  /// Between these two, kernels on kCompute are recorded instead of run, and nothing else may be called. The second
  /// returns a number for `repeat`.
  virtual void begin_noting() = 0;
  virtual int end_noting() = 0;
  /// Queues what was recorded, with the arguments that it had then.
  virtual void repeat(int noted) = 0;
  virtual void forget(int noted) noexcept = 0;

  // ---------------------------------------------------------------- kernels, on the queue kCompute

  virtual void quantize_rows(const RowsCall& x, const QuantizedBuffer& out) = 0;
  /// Quantises the activation `kind` of gate and up [n, cols]. `hidden`, if given, gets it unrounded; it may be up.
  virtual void quantize_hidden(Activation kind, const float* gate, const float* up, int n, int cols,
                               const QuantizedBuffer& out, float* hidden) = 0;
  /// `list` is in host memory.
  virtual void ranks(const RanksCall* list, int count) = 0;
  /// `list` is in host memory.
  virtual void products(const Product* list, int count) = 0;
  /// y [n, rows] = x [n, cols] times w [rows, cols], float32.
  virtual void matmul_f32(const float* w, const float* x, int n, int rows, int cols, float* y) = 0;
  /// out = RMS norm of x, to which scale * added is added first, if given. Without `added`, out may be x.
  virtual void norm_rows(float* x, const float* added, float scale, const float* weight, float eps, int n, int cols,
                         float* out) = 0;
  virtual void prepare_heads(const HeadsCall& call, int T) = 0;
  /// `blocks` is the number of blocks of positions that any of the T queries sees; `call.parts` has room for them.
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
  /// out [n] *= factors [size], which are repeated over and over.
  virtual void multiply(const float* factors, size_t size, size_t n, float* out) = 0;
  /// out [T, cols] = x times gates [T].
  virtual void weigh(const float* x, const float* gates, int T, int cols, float* out) = 0;
  /// Multiplies x [T, heads * width] by its gate, see `HeadGate`; gate is [T, heads], or has the shape of x.
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

/// What a plug-in reports about itself and the machine.
struct BackendProbe {
  int abi;
  int num_devices;
  int driver, runtime;  ///< versions as CUDA numbers them, 12020 for 12.2; 0 for no driver
  char why_not[256];    ///< why there are no devices; empty if there are any
};

extern "C" {
/// Needs no driver and throws nothing.
using ProbeBackend = void(BackendProbe*);
/// Returns null when it fails, with the reason in `error`.
using OpenDevice = Device*(int ordinal, char* error, size_t size);
}
constexpr char kProbeName[] = "edgemoe_backend_probe", kOpenName[] = "edgemoe_backend_open";

}  // namespace edgemoe
