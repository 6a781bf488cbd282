#include <optional>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/work.h"
#include "mixers/conv.h"
#include "mixers/delta.h"
#include "mixers/gated_norm.h"
#include "mixers/mamba.h"

namespace edgemoe {
namespace {

using py::ssize_t;

void check_columns(const char* name, ssize_t width) {
  if (width < 16 || width % 16) {
    throw std::invalid_argument(std::string(name) + ": expected a head of a multiple of 16 values, got " +
                                std::to_string(width));
  }
}

void bind_convolution(py::module_& m) {
  m.def(
      "short_conv",
      [](Workspace& ws, const Array<float>& x, const Array<float>& weight, const py::object& bias,
         const py::object& before, Array<float> tail, bool silu, Array<float> out) {
        expect(x, "short_conv x", {-1, -1});
        const ssize_t T = x.shape(0), C = x.shape(1);
        expect(weight, "weight", {-1, C});
        const ssize_t taps = weight.shape(0);
        if (taps < 1 || taps > kMaxTaps) {
          throw std::invalid_argument("short_conv: expected 1 to " + std::to_string(kMaxTaps) + " taps, got " +
                                      std::to_string(taps));
        }
        expect(tail, "tail", {taps - 1, C});
        const float* past = before.is_none() ? nullptr : floats(before, "before", {taps - 1, C});
        expect(out, "out", {T, C});
        const float* b = bias.is_none() ? nullptr : floats(bias, "bias", {C});
        const float *a = x.data(), *w = weight.data();
        float *next = tail.mutable_data(), *o = out.mutable_data();
        run(ws, [=, &ws] {
          short_conv(ws, {int(C), int(taps), silu, size_t(C), size_t(C)}, a, w, b, past, next, int(T), o);
        });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("bias"), py::arg("before"),
      py::arg("tail").noconvert(), py::arg("silu"), py::arg("out").noconvert(),
      "out [T, C]: a causal convolution of each channel over time. before [taps - 1, C] has the inputs before x, None "
      "for zeros, and tail gets those before the next call's. They may be the same; out may be x.");
}

void bind_delta_rule(py::module_& m) {
  m.def(
      "delta_rule",
      [](Workspace& ws, Array<float> qkv, Array<float> decay, Array<float> beta, const Array<float>& rate,
         const Array<float>& bias, int key_heads, bool bounded, const py::object& before, Array<float> state,
         Array<float> out) {
        expect(state, "state", {-1, -1, -1});
        const ssize_t Hv = state.shape(0), dk = state.shape(1), dv = state.shape(2);
        if (key_heads < 1 || Hv < 1 || Hv % key_heads || dk < 1) {
          throw std::invalid_argument("delta_rule: expected value heads that are a multiple of the key heads");
        }
        check_columns("delta_rule", dv);
        expect(qkv, "qkv", {-1, 2 * key_heads * dk + Hv * dv});
        const ssize_t T = qkv.shape(0);
        expect(decay, "decay", {T, -1});
        const bool per_channel = decay.shape(1) != Hv;
        expect(decay, "decay", {T, per_channel ? Hv * dk : Hv});
        expect(beta, "beta", {T, Hv});
        expect(rate, "rate", {Hv});
        expect(bias, "bias", {decay.shape(1)});
        expect(out, "out", {T, Hv * dv});
        const DeltaParts parts{
            {key_heads, int(Hv), int(dk), int(dv), per_channel, bounded ? Decay::kBounded : Decay::kSoftplus},
            rate.data(),
            bias.data()};
        const float* past = before.is_none() ? nullptr : floats(before, "before", {Hv, dk, dv});
        float *q = qkv.mutable_data(), *k = q + key_heads * dk, *v = k + key_heads * dk;
        float *a = decay.mutable_data(), *b = beta.mutable_data(), *s = state.mutable_data(), *o = out.mutable_data();
        const auto stride = size_t(qkv.shape(1));
        run(ws, [=, &ws] { delta_rule(ws, parts, q, k, v, stride, a, b, int(T), past, s, o); });
      },
      py::arg("ws"), py::arg("qkv").noconvert(), py::arg("decay").noconvert(), py::arg("beta").noconvert(),
      py::arg("rate").noconvert(), py::arg("bias").noconvert(), py::arg("key_heads"), py::arg("bounded"),
      py::arg("before"), py::arg("state").noconvert(), py::arg("out").noconvert(),
      "out [T, Hv * dv]: the gated delta rule on qkv [T, 2 * Hk * dk + Hv * dv] (all q, all k, all v). qkv, decay [T, "
      "Hv] or [T, Hv * dk] and beta [T, Hv] are changed. before [Hv, dk, dv] is the state before the tokens, None for "
      "zeros, and state gets that after them. They may be the same.");
}

void bind_mamba2(py::module_& m) {
  m.def(
      "mamba2",
      [](Workspace& ws, const Array<float>& xbc, Array<float> step, Array<float> decay, const Array<float>& rate,
         const Array<float>& step_bias, const Array<float>& skip, int groups, const py::object& before,
         Array<float> state, Array<float> out) {
        expect(state, "state", {-1, -1, -1});
        const ssize_t H = state.shape(0), N = state.shape(1), P = state.shape(2);
        if (groups < 1 || H < 1 || H % groups || N < 1) {
          throw std::invalid_argument("mamba2: expected heads that are a multiple of the groups");
        }
        check_columns("mamba2", P);
        expect(xbc, "xbc", {-1, H * P + 2 * groups * N});
        const ssize_t T = xbc.shape(0);
        expect(step, "step", {T, H});
        expect(decay, "decay", {T, H});
        expect(rate, "rate", {H});
        expect(step_bias, "step_bias", {H});
        expect(skip, "skip", {H});
        expect(out, "out", {T, H * P});
        const MambaParts parts{{int(H), int(P), groups, int(N)}, rate.data(), step_bias.data(), skip.data()};
        const float* past = before.is_none() ? nullptr : floats(before, "before", {H, N, P});
        const float *x = xbc.data(), *b = x + H * P, *c = b + groups * N;
        const auto stride = size_t(xbc.shape(1));
        float *d = step.mutable_data(), *a = decay.mutable_data(), *s = state.mutable_data(), *o = out.mutable_data();
        run(ws, [=, &ws] { mamba2(ws, parts, x, b, c, stride, d, a, int(T), past, s, o); });
      },
      py::arg("ws"), py::arg("xbc").noconvert(), py::arg("step").noconvert(), py::arg("decay").noconvert(),
      py::arg("rate").noconvert(), py::arg("step_bias").noconvert(), py::arg("skip").noconvert(), py::arg("groups"),
      py::arg("before"), py::arg("state").noconvert(), py::arg("out").noconvert(),
      "out [T, H * P]: Mamba-2 on xbc [T, H * P + 2 * groups * N]. step [T, H] is changed, decay [T, H] is scratch. "
      "before [H, N, P] is the state before the tokens, None for zeros, and state gets that after them. They may be "
      "the same.");
}

void bind_gates(py::module_& m) {
  m.def(
      "gated_norm",
      [](Workspace& ws, Array<float> x, const Array<float>& gate, const Array<float>& weight, float eps, int groups,
         const std::string& kind) {
        expect(x, "gated_norm x", {-1, -1});
        const ssize_t T = x.shape(0), C = x.shape(1);
        if (groups < 1 || C % groups) throw std::invalid_argument("gated_norm: expected whole groups");
        expect(gate, "gate", {T, C});
        const bool per_group = weight.size() == C;
        expect(weight, "weight", {per_group ? C : C / groups});
        const Gate how = gate_named(kind);
        const float *z = gate.data(), *w = weight.data();
        float* v = x.mutable_data();
        run(ws, [=, &ws] { gated_norm(ws, v, z, size_t(C), w, per_group, eps, how, int(T), groups, int(C / groups)); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate").noconvert(), py::arg("weight").noconvert(),
      py::arg("eps"), py::arg("groups"), py::arg("kind"),
      "x [T, C], in place: RMS norm of each group with a gate [T, C]: norm(x) * silu(gate) (\"silu\"), norm(x) * "
      "sigmoid(gate) (\"sigmoid\") or norm(x * silu(gate)) (\"silu_first\"). weight [C] or [C / groups].");

  m.def(
      "gate_attention",
      [](Workspace& ws, Array<float> x, const Array<float>& gate, const std::string& kind) {
        expect(x, "gate_attention x", {-1, -1});
        const ssize_t T = x.shape(0), C = x.shape(1);
        const bool by_element = kind == "sigmoid", softplus = kind == "softplus_head";
        if (!by_element && !softplus && kind != "sigmoid_head") {
          throw std::invalid_argument("gate_attention: expected sigmoid, sigmoid_head or softplus_head, got " + kind);
        }
        expect(gate, "gate", {T, by_element ? C : -1});
        const ssize_t heads = gate.shape(1);
        if (heads < 1 || C % heads) throw std::invalid_argument("gate_attention: expected whole heads");
        const float* g = gate.data();
        float* v = x.mutable_data();
        run(ws, [=, &ws] {
          if (by_element) return sigmoid_gate(ws, v, g, int(T), int(C));
          head_gate(ws, v, g, softplus, int(T), int(heads), int(C / heads));
        });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate").noconvert(), py::arg("kind"),
      "x [T, heads * head_dim] *= sigmoid of gate [T, heads * head_dim] (\"sigmoid\"), or sigmoid or softplus of gate "
      "[T, heads] (\"sigmoid_head\", \"softplus_head\").");
}

}  // namespace

void bind_mixers(py::module_& m) {
  bind_convolution(m);
  bind_delta_rule(m);
  bind_mamba2(m);
  bind_gates(m);
}

}  // namespace edgemoe
