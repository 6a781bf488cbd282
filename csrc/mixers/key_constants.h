// What keys in 8 bits or fewer leave out: large biases, which would take the precision of the values beside them.
//
// A key is turn(position, W x + b). Where b is large it is split, b = c + rest: the cache holds the codes of
// turn(position, W x + rest), and q · turn(position, c) is added to the score in float. With q turned already, a pair
// of columns (i, i + half) adds
//
//   cos * (q[i] * c[i] + q[i + half] * c[i + half]) + sin * (q[i + half] * c[i] - q[i] * c[i + half])
//
// so that a query needs two numbers per pair, and a position the cosine and the sine that turned its key.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace edgemoe {

/// The constants c of one layer. Immutable.
struct KeyConstants {
  std::vector<float> rest;    ///< [kv_heads * head_dim], what is left of the bias
  std::vector<int> begins;    ///< [kv_heads + 1], where each head begins in the next two
  std::vector<int> pairs;     ///< first column of each pair that has a constant, ascending within a head
  std::vector<float> values;  ///< [pairs, 2]: the constants of its two columns

  int count(int kv_head) const { return begins[kv_head + 1] - begins[kv_head]; }
};

/// Splits a bias [kv_heads * head_dim]: c takes over the bias of every pair of columns that is longer than twice the
/// spread of the head's columns of W x, for inputs that are `norm` times a vector of unit mean square. Columns that are
/// not turned keep their bias.
KeyConstants split_bias(const NestedMatrix& k, const float* norm, const float* bias, int kv_heads, int head_dim,
                        int rope_dim);

/// Writes the two numbers per pair of a turned query to lacking [count, 2].
void lacking_of(const KeyConstants& constants, int kv_head, const float* q, int rope_dim, float* lacking);

}  // namespace edgemoe
