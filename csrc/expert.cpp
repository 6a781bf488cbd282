#include "expert.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace edgemoe {
namespace {

/// Some rows of one use, few enough for the scratch memory.
struct Piece {
  const FfnUse* use;
  int first;  ///< row of the use
  int count;
  int row;  ///< row of scratch
};

constexpr int kFewRows = 16;  ///< up to here, hidden values take less time than a loop over threads for them would

/// Items that a thread takes at a time in a loop over `total` of them; at least `least`.
int grain_of(const Workspace& ws, int total, int least) { return std::max(least, total / (ws.pool.size() * 32)); }

/// Calls body(piece, begin, end) for every piece's `per_piece(piece)` items, split over the threads.
template <class Count, class Body>
void over_pieces(Workspace& ws, const std::vector<Piece>& pieces, Count per_piece, int least, Body body) {
  int total = 0;
  for (const Piece& p : pieces) total += per_piece(p);
  ws.pool.run(total, grain_of(ws, total, least), [&](int begin, int end) {
    int first = 0;
    for (const Piece& p : pieces) {
      const int count = per_piece(p);
      const int a = std::max(begin - first, 0), b = std::min(end - first, count);
      if (a < b) body(p, a, b);
      first += count;
    }
  });
}

/// The inputs of the corrections of a batch's matrices, for each of its rows.
class Corrections {
 public:
  Corrections(Workspace& ws, const float* x, const std::vector<int32_t>& rows, const std::vector<Piece>& pieces) {
    const auto room = [&](size_t which, NestedMatrix ExpertView::* part) -> RankRow* {
      const auto has = [part](const Piece& p) { return rank_of(p.use->w.*part) > 0; };
      return std::any_of(pieces.begin(), pieces.end(), has) ? ws.ranks(which, int(rows.size())) : nullptr;
    };
    gate_ = room(0, &ExpertView::gate);
    up_ = room(1, &ExpertView::up);
    down_ = room(2, &ExpertView::down);
    if (!gate_ && !up_) return;
    for (const Piece& p : pieces) {  // corrections lie scattered, with their experts
      for (const NestedMatrix* w : {&p.use->w.gate, &p.use->w.up, &p.use->w.down}) {
        if (rank_of(*w)) __builtin_prefetch(correction_of(*w));
      }
    }
    // For few rows this takes less time than a loop over threads.
    over_pieces(
        ws, pieces, [](const Piece& p) { return p.count; }, 16,
        [&](const Piece& p, int begin, int end) {
          const NestedMatrix &gate = p.use->w.gate, &up = p.use->w.up;
          for (int i = p.row + begin; i < p.row + end; ++i) {
            const size_t row = size_t(rows[size_t(i)]);
            const float* given = p.use->z ? p.use->z + row * kMaxRank : nullptr;
            Projection z;
            const float* at = x + row * size_t(up.cols);
            if (rank_of(gate)) quantize_ranks(gate, given ? given : z.of(gate, at), gate_ + i);
            if (rank_of(up)) quantize_ranks(up, given ? given : z.of(up, at), up_ + i);
          }
        });
  }

  const RankRow* gate(const Piece& p) const { return gate_ ? gate_ + p.row : nullptr; }
  const RankRow* up(const Piece& p) const { return up_ ? up_ + p.row : nullptr; }
  const RankRow* down(const Piece& p) const { return down_ ? down_ + p.row : nullptr; }

  /// Computes the input of the down matrix's correction from a row of hidden values. Several threads may call this, for
  /// different rows.
  void take_hidden(const Piece& p, int row, const float* hidden) const {
    const NestedMatrix& down = p.use->w.down;
    if (rank_of(down)) quantize_ranks(down, Projection().of(down, hidden), down_ + row);
  }

 private:
  RankRow *gate_, *up_, *down_;
};

/// Lets threads that wait for the last gates and ups prefetch the down matrices, which come next.
void expect_downs(Workspace& ws, const std::vector<Piece>& pieces) {
  static thread_local std::vector<const NestedMatrix*> downs;
  downs.clear();
  int total = 0;
  for (const Piece& p : pieces) {
    downs.push_back(&p.use->w.down);
    total += blocks(p.use->w.down.rows, kTileRows);
  }
  ws.order.tell(downs, grain_of(ws, total, 1));
}

void run_batch(Workspace& ws, const float* x, int T, Activation activation, const std::vector<Piece>& pieces) {
  const Kernels& k = kernels();
  const NestedMatrix& any = pieces[0].use->w.up;
  const int hidden = any.rows, cols = any.cols;
  const int up_blocks = blocks(hidden, kTileRows), gate_blocks = activation == Activation::kRelu2 ? 0 : up_blocks;
  const int total = pieces.back().row + pieces.back().count;
  if (hidden > ws.max_hidden()) {
    throw std::invalid_argument("ffn: expected at most " + std::to_string(ws.max_hidden()) + " hidden values, got " +
                                std::to_string(hidden));
  }
  // A single token is quantised once for all its experts.
  const bool shared = T == 1;
  static thread_local std::vector<int32_t> rows;
  rows.clear();
  for (const Piece& p : pieces) {
    for (int i = 0; i < p.count; ++i) rows.push_back(p.use->tokens ? p.use->tokens[p.first + i] : p.first + i);
  }
  const QuantizedRows q = ws.quantize(x, rows.data(), shared ? 1 : total, cols);
  const Corrections corrections(ws, x, rows, pieces);
  // With few rows, the thread that finishes an expert's gates and ups goes on with its hidden values, while the others
  // read the next expert.
  const bool few = total <= kFewRows;
  std::vector<std::atomic<int>> left(few ? pieces.size() : 0);
  for (auto& l : left) l.store(gate_blocks + up_blocks, std::memory_order_relaxed);
  const auto finish = [&](const Piece& p, int begin, int end) {  // rows of the piece
    const FfnBiases& b = p.use->biases;
    for (int i = p.row + begin; i < p.row + end; ++i) {
      float *gate = ws.gate() + size_t(i) * hidden, *up = ws.up() + size_t(i) * hidden;
      if (b.gate) k.add_scaled(b.gate, 1.0f, hidden, gate);
      if (b.up) k.add_scaled(b.up, 1.0f, hidden, up);
      k.activate(activation, gate, up, hidden, gate);
      corrections.take_hidden(p, i, gate);
    }
    ws.quantize_hidden(p.row + begin, p.row + end, total, hidden);
  };
  if (few) expect_downs(ws, pieces);
  over_pieces(
      ws, pieces, [&](const Piece&) { return gate_blocks + up_blocks; }, 1,
      [&](const Piece& p, int begin, int end) {
        const QuantizedRows mine = rows_from(q, shared ? 0 : p.row);
        const size_t at = size_t(p.row) * hidden;
        if (begin < gate_blocks) {
          matmul(k, p.use->w.gate, mine, corrections.gate(p), p.count, begin, std::min(end, gate_blocks),
                 ws.gate() + at, size_t(hidden));
        }
        if (end > gate_blocks) {
          matmul(k, p.use->w.up, mine, corrections.up(p), p.count, std::max(begin - gate_blocks, 0), end - gate_blocks,
                 ws.up() + at, size_t(hidden));
        }
        if (few && left[size_t(&p - pieces.data())].fetch_sub(end - begin, std::memory_order_acq_rel) == end - begin) {
          finish(p, 0, p.count);
        }
      });
  if (!few) over_pieces(ws, pieces, [&](const Piece& p) { return p.count; }, 1, finish);
  const QuantizedRows h = ws.hidden_rows(total, hidden);
  for (const Piece& p : pieces) {
    if (!p.use->hidden) continue;
    std::copy_n(ws.gate() + size_t(p.row) * hidden, size_t(p.count) * hidden, p.use->hidden + size_t(p.first) * hidden);
  }
  if (few) ws.order.tell_next();
  over_pieces(
      ws, pieces, [&](const Piece& p) { return blocks(p.use->w.down.rows, kTileRows); }, 1,
      [&](const Piece& p, int begin, int end) {
        const int d = p.use->w.down.rows;
        float* out = p.use->out + size_t(p.first) * d;
        matmul(k, p.use->w.down, rows_from(h, p.row), corrections.down(p), p.count, begin, end, out, size_t(d));
        if (!p.use->biases.down) return;
        const int first = begin * kTileRows, n = std::min(end * kTileRows, d) - first;
        for (int i = 0; i < p.count; ++i)
          k.add_scaled(p.use->biases.down + first, 1.0f, n, out + size_t(i) * d + first);
      });
}

}  // namespace

void run_ffns(Workspace& ws, const float* x, int T, Activation activation, const std::vector<FfnUse>& uses) {
  ws.order.choose();
  std::vector<Piece> pieces;
  int filled = 0;
  const auto run = [&] {
    if (!pieces.empty()) run_batch(ws, x, T, activation, pieces);
    pieces.clear();
    filled = 0;
  };
  for (const FfnUse& use : uses) {
    if (!pieces.empty() && pieces.back().use->w.up.rows != use.w.up.rows) run();
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

void expect_experts(Workspace& ws, const Cache& cache, int first, const int32_t* experts, int n, int beside) {
  const int hidden = cache.shape().expert_hidden, up_blocks = blocks(hidden, kTileRows);
  const int each = cache.shape().gated ? 2 * up_blocks : up_blocks;
  const int total = (beside == hidden ? n + 1 : n) * each;
  for (int i = 0; i < ws.pool.size(); ++i) {
    const int begin = ws.pool.first(total, grain_of(ws, total, 1), i);
    if (begin >= n * each) return;
    const auto w = cache.glance(first + experts[begin / each], cache.max_level(), false);
    if (w) ws.pool.expect(i, ahead_of({&w->gate, &w->up}, begin % each));
  }
}

void combine(Workspace& ws, const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
             float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      float* o = out + size_t(t) * cols;
      std::memset(o, 0, size_t(cols) * sizeof(float));
      for (int i = 0; i < K; ++i) {
        const int32_t row = rows[size_t(t) * K + i];
        if (row >= 0) k.add_scaled(parts + size_t(row) * cols, gates[size_t(t) * K + i], cols, o);
      }
    }
  });
}

}  // namespace edgemoe
