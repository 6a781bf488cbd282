// CPU operations outside the routed experts, and the scratch memory that all operations share.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "notes.h"
#include "order.h"
#include "route_rule.h"
#include "threads.h"

namespace edgemoe {

/// The sizes for which an engine's scratch memory is made.
struct WorkspaceShape {
  int max_rows;     ///< tokens of a chunk
  int max_cols;     ///< widest input of a matrix
  int max_hidden;   ///< widest FFN
  int max_context;  ///< positions that attention sees
  int head_dim;
  int num_heads;  ///< of queries
};

/// The compute threads and the scratch memory of one engine, resident from the start. One caller at a time.
class Workspace {
 public:
  Workspace(int num_threads, const WorkspaceShape& shape);

  static constexpr int kFfnRows = 256;  ///< rows of an FFN batch; bounds the scratch, does not affect results

  /// Bytes that a workspace takes.
  static size_t bytes(int num_threads, const WorkspaceShape& shape);

  /// Quantises n rows of x in parallel. `rows` (may be null) picks rows of x, which are `stride` floats apart; 0 means
  /// cols. Valid until the next call.
  QuantizedRows quantize(const float* x, const int32_t* rows, int n, int cols, int stride = 0);
  /// Computes the inputs of the matrices' corrections for the same rows: [n] per matrix, null for a matrix without a
  /// correction. Valid until the next product.
  std::vector<const RankRow*> project(const std::vector<const NestedMatrix*>& matrices, const float* x,
                                      const int32_t* rows, int n, int stride = 0);
  /// Room for these inputs of n rows, for matrix number `which` of a product.
  RankRow* ranks(size_t which, int n);
  /// Where `quantize_hidden` puts n rows, at most kFfnRows.
  QuantizedRows hidden_rows(int n, int hidden) const;
  /// Quantises rows [begin, end) of the n in gate(); by one thread.
  void quantize_hidden(int begin, int end, int n, int hidden);

  float* gate() const { return reinterpret_cast<float*>(gate_.bytes()); }
  float* up() const { return reinterpret_cast<float*>(up_.bytes()); }
  int max_hidden() const { return shape_.max_hidden; }
  const WorkspaceShape& shape() const { return shape_; }

  /// Scratch of attention, which divides it itself; see attention.h.
  float* attention() const { return reinterpret_cast<float*>(attention_.bytes()); }

 private:
  QuantizedRows view(const Memory& memory, int n, int tiles, int8_t** codes, float** scales, float** sums) const;

  WorkspaceShape shape_;
  Memory activations_, hidden_, gate_, up_, attention_;
  /// 40 bytes per row and matrix, for files with corrections only: not in `bytes`, but left to the budget's margin.
  std::vector<std::vector<RankRow>> ranks_;

 public:
  ThreadPool pool;  // after the scratch: its threads end before the scratch is destroyed
  ProductOrder order{pool};
  Notes notes;

  /// Begins to record steps in `notes`. Until the end, a loop that would run throws std::logic_error, so that no step
  /// is lost.
  void begin_noting();
  /// Ends the recording. Returns its number, for `Notes::repeat`.
  int end_noting();
};

/// V x of one row, computed once for matrices with the same V.
class Projection {
 public:
  /// Returns V x [kMaxRank] for a matrix with a correction; x is the same in every call. Valid until the next call.
  const float* of(const NestedMatrix& w, const float* x);

 private:
  float z_[kMaxRank];
  const int8_t* basis_ = nullptr;
  int rank_ = 0;
};

/// Computes the input of a matrix's correction for a row whose V x is z.
void quantize_ranks(const NestedMatrix& w, const float* z, RankRow* out);

/// out [T, kMaxRank] = x [T, cols] times V [rank, cols] transposed, the rest zeros; for `FfnUse::z`.
void project(Workspace& ws, const float* x, int T, const int8_t* basis, int rank, int cols, float* out);

/// outs[i][T, rows_i] = x [T, cols] times each matrix; all have the same number of columns.
void linear(Workspace& ws, const float* x, int T, const std::vector<const NestedMatrix*>& matrices,
            const std::vector<float*>& outs);

/// The same for a float32 matrix [rows, cols], with inputs that are not quantised: out [T, rows].
void linear_f32(Workspace& ws, const float* x, int T, const float* matrix, int rows, int cols, float* out);

/// A row per token and head: x [T, heads, stride], of which the first columns are used.
struct HeadRows {
  const float* x;
  int stride;
};

/// A matrix for each head, stacked: out[t, h, :rows / heads] = w[rows of h] x[t, h, :cols]. w [heads * a multiple of
/// 16, cols]; out [T, heads, out_stride], whose other columns are left as they are.
void linear_heads(Workspace& ws, const HeadRows& x, const NestedMatrix& w, int T, int heads, float* out,
                  int out_stride);

/// One layer's router.
struct Router {
  const float* weight;       ///< [num_experts, cols]
  const float* bias;         ///< [num_experts], of the logits, or null
  const float* choice_bias;  ///< [num_experts], or null
};

/// Computes a router's logits for x [T, cols] and chooses experts by them.
/// scores [T, num_experts] receives the scores of all experts (for kSoftmaxTopK and kSparseMixer a softmax over all,
/// too), experts int32 [T, K] the chosen ones in descending order of the value that they are chosen by, and gates
/// float32 [T, K] their gates. Where a logit of a token is not finite, all its scores and gates are NaN.
void route(Workspace& ws, const float* x, const Router& router, int T, int cols, const RouteRule& rule, float* scores,
           int32_t* experts, float* gates);

/// The second half of `route`: scores holds the products with the router's weight, which is not used here.
void choose(Workspace& ws, const Router& router, int T, const RouteRule& rule, float* scores, int32_t* experts,
            float* gates);

/// A linear layer of each expert: weight [num_experts, outputs, cols], bias and gate_weight [num_experts, outputs].
struct SlotLayers {
  const float* weight;
  const float* gate_weight;
  const float* bias;
  int outputs;
  int cols;
};

/// scores[T, top_k, outputs]: for each of a token's chosen experts, that expert's own layer on x [T, cols] and its
/// gate. experts and gates: [T, top_k].
void slot_scores(Workspace& ws, const float* x, const SlotLayers& layers, const int32_t* experts, const float* gates,
                 int T, int top_k, float* scores);

/// A later layer's router and the norm before it.
struct NextRouter {
  const float* norm;  ///< [cols]
  Router router;
};

/// Chooses experts by later layers' routers for x [T, cols] as it is now, each after its own norm: the look-ahead of
/// HOBBIT (arXiv 2411.01433, section 3.3), except that the paper's gates take this layer's normed input.
/// normed [p, T, cols] and scores [p, T, num_experts] are scratch; experts and gates [p, T, K].
void look_ahead(Workspace& ws, const float* x, const std::vector<NextRouter>& routers, int T, int cols, float eps,
                const RouteRule& rule, float* normed, float* scores, int32_t* experts, float* gates);

void rms_norm(Workspace& ws, const float* x, const float* weight, float eps, int T, int cols, float* out);

/// x [T, cols] += scale * added, and out = its RMS norm.
void add_norm(Workspace& ws, const float* added, float scale, float* x, const float* weight, float eps, int T, int cols,
              float* out);

/// out [T, cols] += bias [cols].
void add_bias(Workspace& ws, const float* bias, int T, int cols, float* out);

/// Factors for the elements of a matrix: those of row t begin at data + t * per_row, and are `step` floats apart.
struct Factors {
  const float* data;
  size_t per_row;
  size_t step;
};

/// out [T, cols] *= factors.
void multiply(Workspace& ws, const Factors& factors, int T, int cols, float* out);

/// x [n] = cap * tanh(x / cap), in place; a value that is not finite becomes NaN.
void soft_cap(Workspace& ws, float cap, int64_t n, float* x);

/// out [T, cols] += scale * x, and, if `gate_weight` is given, x[t] is scaled by sigmoid(gate_weight · gate_input[t]).
void add_rows(Workspace& ws, const float* x, float scale, const float* gate_weight, const float* gate_input, int T,
              int cols, float* out);

}  // namespace edgemoe
