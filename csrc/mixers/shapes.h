// What the layers of a mixer are like, as processors and devices see it.
#pragma once

#include <cstdint>

namespace edgemoe {

/// A gate beside an RMS norm.
enum class Gate : uint8_t {
  kSilu,      ///< norm(x) * silu(gate): Gated DeltaNet
  kSigmoid,   ///< norm(x) * sigmoid(gate): Kimi Delta Attention
  kSiluFirst  ///< norm(x * silu(gate)): Mamba-2
};

/// How the decay a of a step comes from what a layer says of it, x, and its parameters.
enum class Decay : uint8_t {
  kSoftplus,  ///< a = exp(-rate * softplus(x + bias))
  kBounded,   ///< a = exp(-5 * sigmoid(rate * (x + bias))), "safe gate" of Ling 3
};

constexpr float kDecayBound = 5;

struct DeltaShape {
  int key_heads;  ///< value head j uses key head j / (value_heads / key_heads)
  int value_heads;
  int key_dim;
  int value_dim;  ///< a multiple of 16
  bool decay_per_channel;
  Decay decay;
};

constexpr float kLengthEps = 1e-6f;  ///< beside the squares of a query's or key's values

struct MambaShape {
  int num_heads;
  int head_dim;  ///< a multiple of 16
  int groups;    ///< head h uses group h / (num_heads / groups)
  int state_dim;
};

struct LatentShape {
  int num_heads;
  int nope_dim;    ///< columns of a head's query that no position turns
  int rope_dim;    ///< those behind, of a position's key too
  int latent_dim;  ///< a multiple of 16
  float scale;     ///< multiplies q · k
  bool rotates;    ///< the parts for it are turned; else they are what they are
  int grow_every;  ///< from every so many positions on, scores are scaled by 1 + growth * log(1 + how many times)
  float growth;    ///< 0 for never
};

}  // namespace edgemoe
