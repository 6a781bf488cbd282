// Arrays, matrices and caches in a device's memory, as Python holds them.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "device/space.h"
#include "kv.h"
#include "matrix.h"

namespace edgemoe {

/// A float32 array in device memory, or a part of one; keeps the memory alive.
struct DeviceArray {
  std::shared_ptr<const DeviceMemory> memory;
  float* data;
  std::vector<py::ssize_t> shape;

  size_t size() const {
    size_t n = 1;
    for (py::ssize_t s : shape) n *= size_t(s);
    return n;
  }
  py::ssize_t at(size_t axis) const { return axis < shape.size() ? shape[axis] : -1; }
};

/// A resident matrix whose rungs lie in device memory.
struct DeviceMatrix {
  NestedMatrix matrix;
  DeviceMemory memory;
};

/// Keys and values of one layer.
struct DeviceKv {
  KvLayer layer;
  int num_heads, head_dim;
  DeviceMemory memory;
};

/// Views of the matrices of a layer's experts, all of which are on the device: [num_experts, 3].
struct DeviceTable {
  DeviceMemory memory;
  std::vector<NestedMatrix> matrices;  ///< the host's copy
  int hidden, cols;
};

/// Throws unless a device array has the shape, where -1 matches anything.
inline float* expect_device(const DeviceArray& a, const char* name, std::initializer_list<py::ssize_t> shape) {
  bool ok = a.shape.size() == shape.size();
  size_t axis = 0;
  std::string wanted = "[", got = "[";
  for (py::ssize_t n : shape) {
    ok = ok && (n < 0 || a.shape[axis] == n);
    wanted += (axis++ ? ", " : "") + (n < 0 ? std::string("any") : std::to_string(n));
  }
  if (ok) return a.data;
  for (size_t i = 0; i < a.shape.size(); ++i) got += (i ? ", " : "") + std::to_string(a.shape[i]);
  throw std::invalid_argument(std::string(name) + ": expected shape " + wanted + "], got " + got + "]");
}

/// The same, but None gives null.
inline float* maybe_device(const DeviceArray* a, const char* name, std::initializer_list<py::ssize_t> shape) {
  return a ? expect_device(*a, name, shape) : nullptr;
}

}  // namespace edgemoe
