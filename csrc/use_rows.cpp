#include "use_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/kernels.h"

namespace edgemoe {
namespace {

enum { kOne, kUsed, kFrequency, kMargin, kAverage, kRows };

}  // namespace

void UseRows::keep() const { std::memcpy(before, now, sizeof(double) * kRows * size_t(num_experts)); }

void UseRows::token(const int32_t* chosen, int n, const float* scores, double left, double share, const double* weights,
                    double* odds) const {
  // An expert that was not chosen keeps `left` of its frequency: log(left) is added to its logarithm.
  double* frequency = now + kFrequency * size_t(num_experts);
  kernels().pass_token(scores, num_experts, left, std::log(left), raw, frequency);
  for (int i = 0; i < n; ++i) raw[chosen[i]] += 1.0 - left;
  for (int i = 0; i < n; ++i) frequency[chosen[i]] = std::log(raw[chosen[i]]);
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
  double *used = now + kUsed * size, *margin = now + kMargin * size;
  std::fill_n(used, size, 0.0);
  for (int i = 0; i < n; ++i) used[chosen[i]] = 1.0;
  double base = margin[against[0]];
  for (int i = 1; i < m; ++i) base = std::min(base, margin[against[i]]);
  kernels().weigh_rows(margin, now + kAverage * size, used, now + kFrequency * size, num_experts, base, share, weights,
                       odds);
}

}  // namespace edgemoe
