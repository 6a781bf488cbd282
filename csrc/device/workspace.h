// A device's operations: what dense.h, expert.h and mixers/attention.h are on a CPU, as queues of kernels.
//
// All arrays are the device's unless a name says otherwise. What is given as a host's array may change as soon as the
// call returns.
#pragma once

#include <memory>
#include <vector>

#include "dense.h"
#include "device/space.h"
#include "expert.h"
#include "mixers/attention.h"

namespace edgemoe {

/// The scratch of one engine on a device. One caller at a time.
class DeviceWorkspace {
 public:
  /// `max_routed` is the most pairs of a token and an expert of a chunk. Throws std::invalid_argument for heads that
  /// its attention does not know, OutOfBudget.
  DeviceWorkspace(std::shared_ptr<DeviceSpace> space, const WorkspaceShape& shape, int max_routed);

  /// What it takes of a device.
  static size_t bytes(const WorkspaceShape& shape, int max_routed);

  DeviceSpace& space() { return *space_; }
  Device& device() { return space_->device(); }

  /// outs[i] [T, rows_i] = x [T, cols] times each matrix.
  void linear(const float* x, int T, const std::vector<const NestedMatrix*>& matrices, const std::vector<float*>& outs);

  /// See run_ffns, with silu(gate) * up and no biases; the uses' tokens are the host's.
  void ffns(const float* x, int T, const std::vector<FfnUse>& uses);

  /// See attention.h. What a key or value that does not fit throws is thrown by `download`.
  void attention(float* q, float* k, float* v, int T, int pos, const AttentionParts& parts, const KvLayer& kv,
                 float* out);

  /// `download`, and throws RangeError if a key or value did not fit since the last time.
  void download(std::vector<DeviceSpace::Fetch> what);

  /// parts is the device's, rows and gates the host's.
  void combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols, float* out);

 private:
  struct Piece {
    const FfnUse* use;
    int first, count;  ///< rows of the use
    int row;           ///< of scratch
  };
  void ffn_batch(const float* x, int T, const std::vector<Piece>& pieces);
  /// Copies a host's array to `to`, for kernels that are queued from now on.
  template <class T>
  const T* lend(const DeviceMemory& to, const T* from, size_t n);
  static QuantizedBuffer buffer(const DeviceMemory& memory, int n, int cols);

  std::shared_ptr<DeviceSpace> space_;
  WorkspaceShape shape_;
  size_t parts_floats_;
  DeviceMemory activations_, hidden_, gate_, up_, parts_, rows_, gates_, misfit_;
  KvType key_type_ = KvType::kF16, value_type_ = KvType::kF16;  ///< of the last attention, for errors
};

}  // namespace edgemoe
