// What the core asks of a device. Nothing of CUDA in here: a plug-in implements it, see device/backend.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgemoe {

/// Grows with every change of this file or of kernels.h that a plug-in can see.
constexpr int kBackendAbi = 2;

enum class Room : uint8_t { kDevice, kPinned };  ///< pinned memory is the host's, and copies from it need no waiting

constexpr int kCompute = 0, kCopy = 1, kNumQueues = 2;  ///< queues: kernels run on the first
constexpr int kMostHeadDim = 256;                       ///< that a device's attention knows

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

/// y [n, stride] = x [n] times a matrix.
struct Product {
  NestedMatrix w;
  QuantizedRows x;
  float* y;
  int n;
  int stride;
};

/// What becomes of the queries, keys or values of one head; null pointers where there is nothing to do.
struct HeadChange {
  float* x;           ///< [T, num_heads * head_dim], changed in place
  const float* bias;  ///< [num_heads * head_dim]
  const float* norm;  ///< [head_dim]
  int num_heads;
  bool rotate;
};

/// Of a layer's attention, all that is done before scores are computed.
struct HeadsCall {
  HeadChange q, k, v;
  const float *cos, *sin;  ///< [T, rope_dim / 2]
  int head_dim, rope_dim;
  bool norm_after_rope;
  float norm_eps, clip;  ///< 0 for no clip
  KvLayer kv;            ///< keys and values are stored at positions [pos, pos + T)
  int pos;
  int layer;
  uint64_t* misfit;  ///< lowered to `Misfit::code` of a key or value that the cache cannot hold
};

struct AttendCall {
  const float* q;  ///< [T, heads * head_dim]
  KvLayer kv;
  AttentionShape shape;
  int pos;
  const float* out_bias;  ///< [kv_heads * head_dim] or null: what values lack
  float* parts;           ///< scratch [T, blocks, heads, head_stride + 2]
  float* out;             ///< [T, heads * head_dim]
};

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

  // ---------------------------------------------------------------- kernels, on the queue kCompute

  /// Of rows of x, or of silu(x) * up where `up` is given. `rows` (may be null) picks rows of both.
  virtual void quantize_rows(const float* x, const float* up, const int32_t* rows, int n, int cols,
                             const QuantizedBuffer& out) = 0;
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
  virtual void combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
                       float* out) = 0;
  /// out += scale * x; each row times sigmoid(gate_weight · gate_input), if given.
  virtual void add_rows(const float* x, float scale, const float* gate_weight, const float* gate_input, int T, int cols,
                        float* out) = 0;
  virtual void add_bias(const float* bias, int T, int cols, float* out) = 0;
  virtual void scale(float factor, size_t n, float* out) = 0;
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
