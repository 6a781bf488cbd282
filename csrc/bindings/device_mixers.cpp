// A device's mixers whose state does not grow, and gates; see bindings/mixers.cpp.
#include <string>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "device/workspace.h"

namespace edgemoe {
namespace {

using py::ssize_t;

void short_conv_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceArray& weight, const DeviceArray* bias,
                   const DeviceArray* before, const DeviceArray& tail, bool silu, const DeviceArray& out) {
  const ssize_t T = x.at(0), C = x.at(1), taps = weight.at(0);
  expect_device(x, "short_conv x", {-1, -1});
  expect_device(weight, "weight", {-1, C});
  expect_within("short_conv taps", taps, 1, kMaxTaps);
  float* const next = expect_device(tail, "tail", {taps - 1, C});
  float* const o = expect_device(out, "out", {T, C});
  const float* const past = maybe_device(before, "before", {taps - 1, C});
  const float* const b = maybe_device(bias, "bias", {C});
  py::gil_scoped_release release;
  ws.device().short_conv({int(C), int(taps), silu, size_t(C), size_t(C)}, x.data, weight.data, b, past, next, int(T),
                         o);
}

void delta_rule_on(DeviceWorkspace& ws, const DeviceArray& qkv, const DeviceArray& decay, const DeviceArray& beta,
                   const DeviceArray& rate, const DeviceArray& bias, int key_heads, bool bounded,
                   const DeviceArray* before, const DeviceArray& state, const DeviceArray& out) {
  expect_device(state, "state", {-1, -1, -1});
  const ssize_t T = qkv.at(0), Hv = state.at(0), dk = state.at(1), dv = state.at(2);
  if (key_heads < 1 || Hv < 1 || Hv % key_heads || dk < 1) {
    throw std::invalid_argument("delta_rule: expected value heads that are a multiple of the key heads");
  }
  expect_device(qkv, "qkv", {-1, 2 * key_heads * dk + Hv * dv});
  const bool per_channel = decay.at(1) != Hv;
  float* const a = expect_device(decay, "decay", {T, per_channel ? Hv * dk : Hv});
  float* const b = expect_device(beta, "beta", {T, Hv});
  float* const o = expect_device(out, "out", {T, Hv * dv});
  const float* const past = maybe_device(before, "before", {Hv, dk, dv});
  const DeltaParts parts{
      {key_heads, int(Hv), int(dk), int(dv), per_channel, bounded ? Decay::kBounded : Decay::kSoftplus},
      expect_device(rate, "rate", {Hv}),
      expect_device(bias, "bias", {decay.at(1)})};
  float *q = qkv.data, *k = q + key_heads * dk, *v = k + key_heads * dk;
  py::gil_scoped_release release;
  ws.delta_rule(parts, q, k, v, size_t(qkv.at(1)), a, b, int(T), past, state.data, o);
}

void mamba2_on(DeviceWorkspace& ws, const DeviceArray& xbc, const DeviceArray& step, const DeviceArray& decay,
               const DeviceArray& rate, const DeviceArray& step_bias, const DeviceArray& skip, int groups,
               const DeviceArray* before, const DeviceArray& state, const DeviceArray& out) {
  expect_device(state, "state", {-1, -1, -1});
  const ssize_t T = xbc.at(0), H = state.at(0), N = state.at(1), P = state.at(2);
  if (groups < 1 || H < 1 || H % groups || N < 1) {
    throw std::invalid_argument("mamba2: expected heads that are a multiple of the groups");
  }
  expect_device(xbc, "xbc", {-1, H * P + 2 * groups * N});
  float* const d = expect_device(step, "step", {T, H});
  float* const a = expect_device(decay, "decay", {T, H});
  float* const o = expect_device(out, "out", {T, H * P});
  const float* const past = maybe_device(before, "before", {H, N, P});
  const MambaParts parts{{int(H), int(P), groups, int(N)},
                         expect_device(rate, "rate", {H}),
                         expect_device(step_bias, "step_bias", {H}),
                         expect_device(skip, "skip", {H})};
  const float *x = xbc.data, *b = x + H * P, *c = b + groups * N;
  py::gil_scoped_release release;
  ws.mamba2(parts, x, b, c, size_t(xbc.at(1)), d, a, int(T), past, state.data, o);
}

void gated_norm_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceArray& gate, const DeviceArray& weight,
                   float eps, int groups, const std::string& kind) {
  expect_device(x, "gated_norm x", {-1, -1});
  const ssize_t T = x.at(0), C = x.at(1);
  if (groups < 1 || C % groups) throw std::invalid_argument("gated_norm: expected whole groups");
  const float* const z = expect_device(gate, "gate", {T, C});
  const bool per_group = ssize_t(weight.size()) == C;
  const float* const w = expect_device(weight, "weight", {per_group ? C : C / groups});
  ws.device().gated_norm(x.data, z, w, per_group, eps, gate_named(kind), int(T), groups, int(C / groups));
}

void gate_attention_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceArray& gate, const std::string& kind) {
  expect_device(x, "gate_attention x", {-1, -1});
  const ssize_t T = x.at(0), C = x.at(1);
  const bool by_element = kind == "sigmoid", softplus = kind == "softplus_head";
  if (!by_element && !softplus && kind != "sigmoid_head") {
    throw std::invalid_argument("gate_attention: expected sigmoid, sigmoid_head or softplus_head, got " + kind);
  }
  const float* const g = expect_device(gate, "gate", {T, by_element ? C : -1});
  const ssize_t heads = gate.at(1);
  if (heads < 1 || C % heads) throw std::invalid_argument("gate_attention: expected whole heads");
  const HeadGate how = by_element ? HeadGate::kSigmoid : softplus ? HeadGate::kSoftplusHead : HeadGate::kSigmoidHead;
  ws.device().gate_heads(x.data, g, how, int(T), int(heads), int(C / heads));
}

}  // namespace

void bind_device_mixers(py::module_& m) {
  m.def("device_short_conv", &short_conv_on, py::arg("ws"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("before"), py::arg("tail"), py::arg("silu"), py::arg("out"));
  m.def("device_delta_rule", &delta_rule_on, py::arg("ws"), py::arg("qkv"), py::arg("decay"), py::arg("beta"),
        py::arg("rate"), py::arg("bias"), py::arg("key_heads"), py::arg("bounded"), py::arg("before"), py::arg("state"),
        py::arg("out"));
  m.def("device_mamba2", &mamba2_on, py::arg("ws"), py::arg("xbc"), py::arg("step"), py::arg("decay"), py::arg("rate"),
        py::arg("step_bias"), py::arg("skip"), py::arg("groups"), py::arg("before"), py::arg("state"), py::arg("out"));
  m.def("device_gated_norm", &gated_norm_on, py::arg("ws"), py::arg("x"), py::arg("gate"), py::arg("weight"),
        py::arg("eps"), py::arg("groups"), py::arg("kind"));
  m.def("device_gate_attention", &gate_attention_on, py::arg("ws"), py::arg("x"), py::arg("gate"), py::arg("kind"));
}

}  // namespace edgemoe
