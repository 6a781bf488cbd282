// The operations of dense.h, expert.h and mixers/ on a device, as queued kernels.
//
// All arrays are in device memory unless a comment says otherwise. An array in host memory may change as soon as the
// call returns.
#pragma once

#include <memory>
#include <utility>
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
  /// `max_routed` is the most pairs of a token and an expert in a chunk; `corrected` says that matrices may have
  /// corrections. Throws std::invalid_argument for heads wider than kMostHeadDim, and OutOfBudget.
  DeviceWorkspace(std::shared_ptr<DeviceSpace> space, const WorkspaceShape& shape, int max_routed, bool corrected);

  /// Bytes that it takes of a device.
  static size_t bytes(const WorkspaceShape& shape, int max_routed, bool corrected);

  DeviceSpace& space() { return *space_; }
  Device& device() { return space_->device(); }

  /// outs[i] [T, rows_i] = x [T, cols] times each matrix.
  void linear(const float* x, int T, const std::vector<const NestedMatrix*>& matrices, const std::vector<float*>& outs);

  /// See linear_heads.
  void linear_heads(const HeadRows& x, const NestedMatrix& w, int T, int heads, float* out, int out_stride);

  /// See run_ffns; the uses' tokens are in host memory. Gates and ups whose corrections have no V of their own use
  /// `basis`.
  void ffns(const float* x, int T, Activation activation, const std::vector<FfnUse>& uses,
            const int8_t* basis = nullptr);

  /// See attention.h. The error for a key or value that does not fit is thrown by `download`.
  void attention(float* q, float* k, float* v, int T, int pos, const AttentionParts& parts, const KvLayer& kv,
                 float* out);

  /// See latent.h; likewise.
  void latent_attention(const float* q, float* absorbed, float* keys, int T, int pos, const LatentParts& parts,
                        const KvLayer& kv, float* out);

  /// See delta.h; `before` and `state` must not be the same.
  void delta_rule(const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride, float* decay,
                  float* beta, int T, const float* before, float* state, float* out);

  /// See mamba.h.
  void mamba2(const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride, float* step,
              float* decay, int T, const float* before, float* state, float* out);

  /// out [T, cols] = x times gates [T], which are in host memory.
  void weigh(const float* x, const float* gates, int T, int cols, float* out);

  /// `DeviceSpace::download`; throws RangeError if a key or value did not fit since the last time.
  void download(std::vector<DeviceSpace::Fetch> what);

  /// The halves of `download`, for what fits the mailbox: see DeviceSpace.
  bool post(std::vector<DeviceSpace::Fetch> what);
  void collect(std::vector<DeviceSpace::Fetch> what);

  /// Sets the position of the token for which work is recorded or repeated from now on.
  void place(int pos);
  /// See DeviceSpace. Recorded attention runs at the position of each repetition, which must be in the same block of
  /// positions, and see as many blocks.
  void begin_noting();
  int end_noting();

  /// The experts that `choose` chose for one token.
  struct Chosen {
    const NestedMatrix* table;  ///< [num_experts, 3], without corrections
    const int32_t* experts;     ///< [count]
    const float* gates;         ///< [count]
    int count, hidden, cols;
    const float* biases[3];  ///< of gate, up and down [num_experts, hidden or cols], or null
  };
  /// out [cols] = the FFNs of these experts on x [cols], weighted by their gates; parts [count, cols] is scratch.
  void chosen_ffn(const float* x, Activation activation, const Chosen& chosen, float* parts, float* out);

  /// See `combine` in expert.h; parts is in device memory, rows and gates are in host memory.
  void combine(const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols, float* out);

 private:
  struct Piece {
    const FfnUse* use;
    int first, count;  ///< rows of the use
    int row;           ///< of scratch
  };
  void ffn_batch(const float* x, int T, Activation activation, const std::vector<Piece>& pieces, const int8_t* basis);
  /// Takes scratch for the corrections of n rows; throws std::invalid_argument when too little is left.
  RankRow* take_ranks(int n);
  /// The factors [T] by which a pass's queries are multiplied last, computed by the host as on a CPU; null for none.
  const float* grown(int T, int pos, int late, float growth, int every);
  /// Attends with queries that were prepared, as many at once as the scratch has room for.
  void attend(AttendCall call, int T);
  /// Copies an array in host memory to `to`, for kernels that are queued from now on.
  template <class T>
  const T* lend(const DeviceMemory& to, const T* from, size_t n);
  static QuantizedBuffer buffer(const DeviceMemory& memory, int n, int cols);

  std::shared_ptr<DeviceSpace> space_;
  WorkspaceShape shape_;
  size_t parts_floats_;
  int max_ranks_, ranks_taken_ = 0;
  DeviceMemory activations_, hidden_, gate_, up_, parts_, rows_, gates_, misfit_, ranks_;
  bool is_noting_ = false;
  /// Throws RangeError if `code` is of a key or value that did not fit.
  void look_at_misfit(uint64_t code);
  const int32_t* now() const { return is_noting_ ? reinterpret_cast<const int32_t*>(misfit_.as() + 8) : nullptr; }
  /// Keeps a layer's types. Throws std::invalid_argument for a layer or a number of tokens that `Misfit` has no room
  /// for.
  void note_types(int layer, int T, const KvLayer& kv);
  std::vector<std::pair<KvType, KvType>> types_;  ///< of each layer's keys and values, for errors
};

}  // namespace edgemoe
