#include "use_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "guesses.h"
#include "kernels/kernels.h"

namespace edgemoe {
namespace {

constexpr double kTiny = 1e-9;  // a probability that is nothing
enum { kOne, kUsed, kFrequency, kMargin, kAverage, kRows };

}  // namespace

void UseRows::keep() const { std::memcpy(before, now, sizeof(double) * kRows * size_t(num_experts)); }

void UseRows::token(const int32_t* chosen, int n, const float* scores, double left, double share, const double* weights,
                    double* odds) const {
  decay_uses(raw, num_experts, chosen, n, left);
  // What was not chosen has `left` of its frequency: a number less in its logarithm.
  double* frequency = now + kFrequency * size_t(num_experts);
  const double less = std::log(left);
  for (int e = 0; e < num_experts; ++e) frequency[e] += less;
  for (int i = 0; i < n; ++i) frequency[chosen[i]] = std::log(raw[chosen[i]]);
  double* to = raw + num_experts;
  for (int e = 0; e < num_experts; ++e) to[e] = double(scores[e]) + kTiny;
  kernels().logs(to, num_experts, now + kMargin * size_t(num_experts));
  margins(chosen, n, chosen + n - 1, 1, share, weights, odds);
}

void UseRows::weigh(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
                    double* odds) const {
  kernels().logs(raw, 2 * num_experts, now + kFrequency * size_t(num_experts));
  margins(chosen, n, against, m, share, weights, odds);
}

void UseRows::margins(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
                      double* odds) const {
  const size_t size = size_t(num_experts);
  double* used = now + kUsed * size;
  double* __restrict margin = now + kMargin * size;
  double* __restrict average = now + kAverage * size;
  double* __restrict out = odds;
  const double* frequency = now + kFrequency * size;
  const double one = weights[kOne], of_used = weights[kUsed], of_frequency = weights[kFrequency],
               of_margin = weights[kMargin], of_average = weights[kAverage];
  std::fill_n(used, size, 0.0);
  for (int i = 0; i < n; ++i) used[chosen[i]] = 1.0;
  double base = margin[against[0]];
  for (int i = 1; i < m; ++i) base = std::min(base, margin[against[i]]);
  for (size_t e = 0; e < size; ++e) {
    margin[e] -= base;
    average[e] += (margin[e] - average[e]) * share;
    out[e] = one + of_used * used[e] + of_frequency * frequency[e] + of_margin * margin[e] + of_average * average[e];
  }
}

}  // namespace edgemoe
