#include "guesses.h"

#include <algorithm>

namespace edgemoe {
namespace {

/// Keeps the best `most` of what it is told in order: by value, where `better` is strict, and of equals the first.
template <typename T, typename Better>
class Best {
 public:
  Best(const T* values, int32_t* out, int most, Better better)
      : values_(values), out_(out), most_(most), better_(better) {}

  void take(int i) {
    if (count_ == most_ && (most_ == 0 || !better_(values_[i], values_[out_[most_ - 1]]))) return;
    int at = count_ < most_ ? count_++ : most_ - 1;
    for (; at > 0 && better_(values_[i], values_[out_[at - 1]]); --at) out_[at] = out_[at - 1];
    out_[at] = i;
  }
  int count() const { return count_; }

 private:
  const T* values_;
  int32_t* out_;
  int most_, count_ = 0;
  Better better_;
};

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

int PathRow::follow(const int32_t* chosen, int k, const double* odds, int32_t* path, int count, double now,
                    double round, double penalty) const {
  int right = 0;
  for (int i = 0; i < k; ++i) {
    right += late[chosen[i]] != 0;
    late[chosen[i]] = 0;
  }
  Best least(odds, path, count, [](double a, double b) { return a < b; });
  const double base = now + 2 * round;
  for (int e = 0; e < num_experts; ++e) {
    least.take(e);
    scores[e] = (odds[e] + late[e]) * -round - base;
    late[e] = 0;
  }
  for (int i = 0; i < count; ++i) {
    scores[path[i]] = -round - now;
    late[path[i]] = penalty;
  }
  return right;
}

void PathRow::foresee(const double* odds, int32_t* path, int count, double then, double round, double penalty) const {
  Best least(odds, path, count, [](double a, double b) { return a < b; });
  for (int e = 0; e < num_experts; ++e) {
    least.take(e);
    if (late[e] > 0) scores[e] -= 2 * round;
    late[e] = 0;
  }
  for (int i = 0; i < count; ++i) {
    scores[path[i]] = -then;
    late[path[i]] = penalty;
  }
}

bool weigh_rows(const float* rows, int n, const int32_t* which, const float* weights, int k, float* out) {
  std::fill_n(out, n, 0.0f);
  for (int i = 0; i < k; ++i) {
    const float* row = rows + int64_t(which[i]) * n;
    for (int e = 0; e < n; ++e) out[e] += weights[i] * row[e];
  }
  return std::any_of(out, out + n, [](float x) { return x != 0; });
}

void count_path(float* pairs, float* totals, float* uses, const int32_t* path, int layers, int experts, int k) {
  for (int layer = 0; layer < layers; ++layer, path += k) {
    const int64_t first = int64_t(layer) * experts;
    for (int i = 0; i < k; ++i) uses[first + path[i]] = totals[first + path[i]] += 1;
    for (int before = layer ? -k : 0; before < 0; ++before) {
      float* row = pairs + (first + path[before]) * experts;
      for (int i = 0; i < k; ++i) row[path[i]] += 1;
    }
  }
}

int likeliest(const float* scores, const int8_t* has, const int8_t* wanted, int n, int32_t* out, int most) {
  Best best(scores, out, most, [](float a, float b) { return a > b; });
  for (int e = 0; e < n; ++e) {
    if (scores[e] > 0 && has[e] < wanted[e]) best.take(e);
  }
  return best.count();
}

}  // namespace edgemoe
