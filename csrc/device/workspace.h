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
#include "mixers/delta.h"
#include "mixers/latent.h"
#include "mixers/mamba.h"

namespace edgemoe {

/// The scratch of one engine on a device. One caller at a time.
class DeviceWorkspace {
 public:
  /// `max_routed` is the most pairs of a token and an expert of a chunk; `corrected` says that matrices may have
  /// corrections. Throws std::invalid_argument for heads that its attention does not know, OutOfBudget.
  DeviceWorkspace(std::shared_ptr<DeviceSpace> space, const WorkspaceShape& shape, int max_routed, bool corrected);

  /// What it takes of a device.
  static size_t bytes(const WorkspaceShape& shape, int max_routed, bool corrected);

  DeviceSpace& space() { return *space_; }
  Device& device() { return space_->device(); }

  /// outs[i] [T, rows_i] = x [T, cols] times each matrix.
  void linear(const float* x, int T, const std::vector<const NestedMatrix*>& matrices, const std::vector<float*>& outs);

  /// See linear_heads.
  void linear_heads(const HeadRows& x, const NestedMatrix& w, int T, int heads, float* out, int out_stride);

  /// See run_ffns; the uses' tokens are the host's. Gates and ups whose corrections have no V of their own take that of
  /// `basis`.
  void ffns(const float* x, int T, Activation activation, const std::vector<FfnUse>& uses,
            const int8_t* basis = nullptr);

  /// See attention.h. What a key or value that does not fit throws is thrown by `download`.
  void attention(float* q, float* k, float* v, int T, int pos, const AttentionParts& parts, const KvLayer& kv,
                 float* out);

  /// See latent.h; likewise.
  void latent_attention(const float* q, float* absorbed, float* keys, int T, int pos, const LatentParts& parts,
                        const KvLayer& kv, float* out);

  /// See delta.h. The state before is another than that after.
  void delta_rule(const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride, float* decay,
                  float* beta, int T, const float* before, float* state, float* out);

  /// See mamba.h.
  void mamba2(const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride, float* step,
              float* decay, int T, const float* before, float* state, float* out);

  /// out [T, cols] = x times gates [T], which are the host's.
  void weigh(const float* x, const float* gates, int T, int cols, float* out);

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
  void ffn_batch(const float* x, int T, Activation activation, const std::vector<Piece>& pieces, const int8_t* basis);
  /// Rows for the corrections of what comes next; throws std::invalid_argument when there are too few.
  RankRow* take_ranks(int n);
  /// Of all queries of a pass, as the host computes it: what each is multiplied with at last. Null for nothing.
  const float* grown(int T, int pos, int late, float growth, int every);
  /// Attends with queries that were prepared, as many at once as scratch has room for.
  void attend(AttendCall call, int T);
  /// Copies a host's array to `to`, for kernels that are queued from now on.
  template <class T>
  const T* lend(const DeviceMemory& to, const T* from, size_t n);
  static QuantizedBuffer buffer(const DeviceMemory& memory, int n, int cols);

  std::shared_ptr<DeviceSpace> space_;
  WorkspaceShape shape_;
  size_t parts_floats_;
  int max_ranks_, ranks_taken_ = 0;
  DeviceMemory activations_, hidden_, gate_, up_, parts_, rows_, gates_, misfit_, ranks_;
  KvType key_type_ = KvType::kF16, value_type_ = KvType::kF16;  ///< of the last attention, for errors
};

}  // namespace edgemoe
