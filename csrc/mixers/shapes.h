// Shapes and variants of mixer layers, for the CPU and devices.
#pragma once

#include <cstdint>

namespace edgemoe {

/// How a gate and an RMS norm are combined.
enum class Gate : uint8_t {
  kSilu,      ///< norm(x) * silu(gate): Gated DeltaNet
  kSigmoid,   ///< norm(x) * sigmoid(gate): Kimi Delta Attention
  kSiluFirst  ///< norm(x * silu(gate)): Mamba-2
};

/// How the decay a of a step is computed from x, which a layer gives per step, and the layer's parameters.
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

constexpr float kLengthEps = 1e-6f;  ///< added to the sum of squares of a query or key

struct MambaShape {
  int num_heads;
  int head_dim;  ///< a multiple of 16
  int groups;    ///< head h uses group h / (num_heads / groups)
  int state_dim;
};

struct LatentShape {
  int num_heads;
  int nope_dim;    ///< columns of a head's query that are not turned by the position
  int rope_dim;    ///< the columns after these, which are; also those of a position's key
  int latent_dim;  ///< a multiple of 16
  float scale;     ///< multiplies q · k
  bool rotates;    ///< whether the rope_dim columns are turned at all; else they stay as they are
  int grow_every;  ///< scores at position p are multiplied by 1 + growth * log(1 + floor(p / grow_every))
  float growth;    ///< 0 for never
};

}  // namespace edgemoe
