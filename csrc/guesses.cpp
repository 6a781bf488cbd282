#include "guesses.h"

#include <algorithm>

namespace edgemoe {
namespace {

/// The positions of the highest `most` of the values that were offered, in order; among equals the first.
class Highest {
 public:
  Highest(const float* values, int32_t* out, int most) : values_(values), out_(out), most_(most) {}

  void take(int i) {
    if (count_ == most_ && !(values_[i] > values_[out_[most_ - 1]])) return;
    int at = count_ < most_ ? count_++ : most_ - 1;
    for (; at > 0 && values_[i] > values_[out_[at - 1]]; --at) out_[at] = out_[at - 1];
    out_[at] = i;
  }
  int count() const { return count_; }

 private:
  const float* values_;
  int32_t* out_;
  int most_, count_ = 0;
};

/// out [n] += the sum of the rows `which` [k] of `table` [., n], each divided by its `uses`; added in this order.
void add_shares(const float* table, const float* uses, int n, const int32_t* which, int k, float* out) {
  constexpr int kPiece = 64;     // sums that stay in registers
  for (int i = 0; i < k; ++i) {  // the rows lie apart: more than a hardware prefetcher follows
    for (int e = 0; e < n; e += 16) __builtin_prefetch(table + int64_t(which[i]) * n + e);
  }
  for (int first = 0; first < n; first += kPiece) {
    const int here = std::min(kPiece, n - first);
    float sums[kPiece] = {};
    for (int i = 0; i < k; ++i) {
      const float* row = table + int64_t(which[i]) * n + first;
      const float weight = 1.0f / uses[which[i]];
      for (int e = 0; e < here; ++e) sums[e] += weight * row[e];
    }
    for (int e = 0; e < here; ++e) out[first + e] += sums[e];
  }
}

}  // namespace

void decay_uses(double* uses, int n, const int32_t* chosen, int k, double left) {
  for (int e = 0; e < n; ++e) uses[e] *= left;
  for (int i = 0; i < k; ++i) uses[chosen[i]] += 1.0 - left;
}

void renew_records(double* records, double* last, const int32_t* chosen, const int8_t* bits, int k, const double* worth,
                   double now) {
  for (int i = 0; i < k; ++i) {
    records[chosen[i]] += worth[bits[i]] - last[chosen[i]];
    last[chosen[i]] = now;
  }
}

int PathRow::follow(const int32_t* chosen, int k, const double* odds, double now, double round, double penalty) const {
  int right = 0;
  for (int i = 0; i < k; ++i) {
    right += late[chosen[i]] != 0;
    late[chosen[i]] = 0;
  }
  const double base = now + 2 * round;
  kernels().moments(odds, num_experts, round, base, scores);
  for (int i = 0; i < count; ++i) {
    const int e = path[i];
    if (late[e] == 0) continue;
    scores[e] = (odds[e] + late[e]) * -round - base;
    late[e] = 0;
  }
  predict(odds, round + now, penalty);
  return right;
}

void PathRow::foresee(const double* odds, double then, double round, double penalty) const {
  for (int i = 0; i < count; ++i) {
    const int e = path[i];
    if (late[e] > 0) scores[e] -= 2 * round;
    late[e] = 0;
  }
  predict(odds, then, penalty);
}

void PathRow::predict(const double* odds, double moment, double penalty) const {
  kernels().least(odds, num_experts, count, path);
  for (int i = 0; i < count; ++i) {
    scores[path[i]] = -moment;
    late[path[i]] = penalty;
  }
}

void PathTable::count(const int32_t* path, int k) const {
  const auto pair = [&](float* table, int layer, int distance) {
    if (!table || layer < distance) return;
    const int32_t *chosen = path + layer * k, *earlier = chosen - distance * k;
    for (int j = 0; j < k; ++j) {
      float* row = table + (int64_t(layer) * experts + earlier[j]) * experts;
      for (int i = 0; i < k; ++i) row[chosen[i]] += 1;
    }
  };
  for (int layer = 0; layer < layers; ++layer) {
    const int64_t first = int64_t(layer) * experts;
    for (int i = 0; i < k; ++i) {
      const int64_t e = first + path[layer * k + i];
      uses[e] = totals[e] += 1;
    }
    pair(pairs, layer, 1);
    pair(far, layer, 2);
  }
}

bool PathTable::follow(int layer, const int32_t* last, int k, const int32_t* before, int m, float* out) const {
  const int64_t at = int64_t(layer) * experts, square = at * experts;
  std::fill_n(out, experts, 0.0f);
  add_shares(pairs + square, uses + at - experts, experts, last, k, out);
  if (m > 0) add_shares(far + square, uses + at - 2 * int64_t(experts), experts, before, m, out);
  return std::any_of(out, out + experts, [](float x) { return x != 0; });
}

void PrecisionRule::choose(const float* gates, int k, const int32_t* experts, int n, const int8_t* has,
                           int8_t* out) const {
  double total = 0, before = 0;
  for (int i = 0; i < k; ++i) total += double(gates[i]);
  for (int i = 0; i < n; ++i) {
    const int wanted = before <= t1 * total ? high : before <= t2 * total ? low : 0;
    const int here = bits_of[size_t(has[experts[i]])];
    const bool is_hit = here > 0 && here >= (strict || wanted < low ? wanted : low);
    out[i] = int8_t(is_hit ? here : wanted);
    before += double(gates[i]);
  }
}

int likeliest(const float* scores, const int8_t* has, const int8_t* wanted, int n, int32_t* out, int most) {
  if (most == 0) return 0;
  Highest best(scores, out, most);
  float above = 0;  // what a score must exceed; compared first, as few do
  for (int e = 0; e < n; ++e) {
    if (!(scores[e] > above) || has[e] >= wanted[e]) continue;
    best.take(e);
    if (best.count() == most) above = scores[out[most - 1]];
  }
  return best.count();
}

}  // namespace edgemoe
