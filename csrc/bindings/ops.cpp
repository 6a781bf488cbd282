#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cache.h"
#include "dense.h"
#include "expert.h"
#include "kv.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// Data of an array [n], or null for None.
const float* optional(const py::object& array, const char* name, py::ssize_t n) {
  return array.is_none() ? nullptr : floats(array, name, {n});
}

Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "geglu") return Activation::kGeglu;
  if (name == "clamped_swiglu") return Activation::kClampedSwiglu;
  if (name == "relu2") return Activation::kRelu2;
  throw std::invalid_argument("activation: expected swiglu, geglu, clamped_swiglu or relu2, got " + name);
}

/// What an FFN's matrices must be for each other, and without a gate only for an activation that needs none.
void check_ffn(const ExpertView& w, Activation activation) {
  const bool gated = activation != Activation::kRelu2;
  if (w.gate.rows != (gated ? w.up.rows : 0) || (gated && w.gate.cols != w.up.cols) || w.down.cols != w.up.rows) {
    throw std::invalid_argument("ffn: the matrices do not fit each other or the activation");
  }
}

/// Biases of an expert among those of all, arrays [E, H], [E, H] and [E, D], or None for no gate's.
class ExpertBiases {
 public:
  ExpertBiases(const py::object& arrays, int d, int h) : d_(d), h_(h) {
    if (arrays.is_none()) return;
    const auto parts = arrays.cast<std::vector<py::object>>();
    if (parts.size() != 3) throw std::invalid_argument("biases: expected those of gate, up and down");
    for (int i = 0; i < 3; ++i) {
      if (!parts[size_t(i)].is_none()) all_[i] = floats(parts[size_t(i)], "biases", {-1, i < 2 ? h : d});
      if (all_[i]) count_ = std::min(count_, py::reinterpret_borrow<Array<float>>(parts[size_t(i)]).shape(0));
    }
  }

  FfnBiases of(py::ssize_t expert) const {
    if (expert >= count_) throw std::invalid_argument("biases: there is no such expert");
    const size_t e = size_t(expert);
    return {all_[0] ? all_[0] + e * size_t(h_) : nullptr, all_[1] ? all_[1] + e * size_t(h_) : nullptr,
            all_[2] ? all_[2] + e * size_t(d_) : nullptr};
  }

 private:
  int d_, h_;
  py::ssize_t count_ = PY_SSIZE_T_MAX;
  const float* all_[3] = {};
};

RouteRule route_rule(int num_experts, int top_k, const std::string& scoring, bool renormalise, float gate_scale,
                     int groups, int used_groups, bool group_by_two) {
  if (top_k < 1 || top_k > num_experts) {
    throw std::invalid_argument("RouteRule: expected 1 to " + std::to_string(num_experts) + " experts");
  }
  if (groups < 1 || num_experts % groups || used_groups < 1 || used_groups > groups ||
      int64_t(used_groups) * (num_experts / groups) < top_k) {
    throw std::invalid_argument("RouteRule: expected groups of as many experts each, and enough of them in those used");
  }
  Scoring how{};
  if (scoring == "softmax") {
    how = Scoring::kSoftmax;
  } else if (scoring == "softmax_topk") {
    how = Scoring::kSoftmaxTopK;
  } else if (scoring == "sigmoid") {
    how = Scoring::kSigmoid;
  } else if (scoring == "sparsemixer") {
    how = Scoring::kSparseMixer;
  } else {
    throw std::invalid_argument("RouteRule scoring: expected softmax, softmax_topk, sigmoid or sparsemixer, got " +
                                scoring);
  }
  if ((how == Scoring::kSoftmaxTopK || how == Scoring::kSparseMixer) && groups > 1) {
    throw std::invalid_argument("RouteRule: " + scoring + " is not for groups");
  }
  return {num_experts, top_k, how, renormalise, gate_scale, groups, used_groups, group_by_two};
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Workspace, Held<Workspace>>(m, "Workspace", "Compute threads and scratch of one engine.")
      .def(py::init([](int threads, int max_rows, int max_cols, int max_hidden, int max_context, int head_dim,
                       int num_heads) {
             return Held<Workspace>(new Workspace(
                 threads, WorkspaceShape{max_rows, max_cols, max_hidden, max_context, head_dim, num_heads}));
           }),
           py::arg("threads"), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"),
           py::arg("head_dim"), py::arg("num_heads") = 1)
      .def_static(
          "bytes",
          [](int threads, int max_rows, int max_cols, int max_hidden, int max_context, int head_dim, int num_heads) {
            return Workspace::bytes(threads, {max_rows, max_cols, max_hidden, max_context, head_dim, num_heads});
          },
          py::arg("threads"), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"),
          py::arg("head_dim"), py::arg("num_heads") = 1, "What such a workspace takes once all of it was used.");

  m.def(
      "linear",
      [](Workspace& ws, const Array<float>& x, const std::vector<const Nested*>& matrices,
         std::vector<Array<float>> outs) {
        expect(x, "linear x", {-1, -1});
        if (matrices.empty() || matrices.size() != outs.size())
          throw std::invalid_argument("linear: one out per matrix");
        std::vector<const NestedMatrix*> ms;
        std::vector<float*> ys;
        for (size_t i = 0; i < matrices.size(); ++i) {
          if (!matrices[i]) throw py::type_error("linear: expected matrices, got None");
          ms.push_back(&matrices[i]->matrix);
          if (ms[i]->cols != x.shape(1))
            throw std::invalid_argument("linear: x " + shape_text(x) + " does not fit a matrix of " +
                                        std::to_string(ms[i]->cols) + " columns");
          expect(outs[i], "linear out", {x.shape(0), ms[i]->rows});
          ys.push_back(outs[i].mutable_data());
        }
        const float* p = x.data();
        const int T = int(x.shape(0));
        py::gil_scoped_release release;
        linear(ws, p, T, ms, ys);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("matrices"), py::arg("outs").noconvert(),
      "outs[i] [T, rows_i] = x [T, cols] times matrices[i] transposed.");

  m.def(
      "project",
      [](Workspace& ws, const Array<float>& x, const Array<int8_t>& basis, Array<float> out) {
        expect(x, "project x", {-1, -1});
        expect(basis, "basis", {-1, py::ssize_t(basis_stride(int(x.shape(1))))});
        expect(out, "project out", {x.shape(0), kMaxRank});
        const int T = int(x.shape(0)), cols = int(x.shape(1)), rank = int(basis.shape(0));
        if (rank % kRankStep || rank > kMaxRank) throw std::invalid_argument("basis: expected 8, 16, 24 or 32 rows");
        const float* a = x.data();
        const int8_t* v = basis.data();
        float* o = out.mutable_data();
        py::gil_scoped_release release;
        project(ws, a, T, v, rank, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("basis").noconvert(), py::arg("out").noconvert(),
      "out [T, 32] = x [T, cols] times V [rank, cols padded to 64] transposed, and zeros.");

  m.def(
      "linear_f32",
      [](Workspace& ws, const Array<float>& x, const Array<float>& matrix, Array<float> out) {
        expect(x, "linear_f32 x", {-1, -1});
        expect(matrix, "linear_f32 matrix", {-1, x.shape(1)});
        expect(out, "linear_f32 out", {x.shape(0), matrix.shape(0)});
        const float *p = x.data(), *w = matrix.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), rows = int(matrix.shape(0)), cols = int(x.shape(1));
        py::gil_scoped_release release;
        linear_f32(ws, p, T, w, rows, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("matrix").noconvert(), py::arg("out").noconvert(),
      "out [T, rows] = x [T, cols] times a float32 matrix transposed.");

  m.def(
      "linear_heads",
      [](Workspace& ws, const Array<float>& x, const Nested& w, int heads, Array<float> out) {
        expect(x, "linear_heads x", {-1, -1});
        expect(out, "linear_heads out", {x.shape(0), -1});
        expect_within("linear_heads heads", heads, 1, kMaxHeads);
        expect_within("linear_heads rows of all heads", int64_t(x.shape(0)) * heads, 0, kMaxSize);
        const NestedMatrix& m = w.matrix;
        const int per_head = m.rows / heads;
        if (m.rows % heads || per_head % kTileRows) {
          throw std::invalid_argument("linear_heads: expected a multiple of 16 rows for each head, got " +
                                      std::to_string(m.rows) + " for " + std::to_string(heads) + " heads");
        }
        for (const auto& [a, least] : {std::pair{x, m.cols}, std::pair{out, per_head}}) {
          if (a.shape(1) % heads || a.shape(1) / heads < least) {
            throw std::invalid_argument("linear_heads: expected at least " + std::to_string(least) +
                                        " columns for each of " + std::to_string(heads) + " heads, got " +
                                        std::to_string(a.shape(1)));
          }
        }
        const float* a = x.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), x_stride = int(x.shape(1)) / heads, out_stride = int(out.shape(1)) / heads;
        py::gil_scoped_release release;
        linear_heads(ws, {a, x_stride}, m, T, heads, o, out_stride);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("w"), py::arg("heads"), py::arg("out").noconvert(),
      "A matrix for each head: out [T, heads * n][t, h, :rows / heads] = w[rows of h] x [T, heads * m][t, h, :cols].");

  m.def(
      "rms_norm",
      [](Workspace& ws, const Array<float>& x, const Array<float>& weight, float eps, Array<float> out) {
        expect(x, "rms_norm x", {-1, -1});
        expect(weight, "rms_norm weight", {x.shape(1)});
        expect(out, "rms_norm out", {x.shape(0), x.shape(1)});
        const float *a = x.data(), *w = weight.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        py::gil_scoped_release release;
        rms_norm(ws, a, w, eps, T, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("eps"),
      py::arg("out").noconvert());

  py::class_<RouteRule>(m, "RouteRule", "How a router's logits become a choice; see dense.h.")
      .def(py::init(&route_rule), py::kw_only(), py::arg("num_experts"), py::arg("top_k"), py::arg("scoring"),
           py::arg("renormalise"), py::arg("gate_scale") = 1.0f, py::arg("groups") = 1, py::arg("used_groups") = 1,
           py::arg("group_by_two") = false);

  m.def(
      "route",
      [](Workspace& ws, const Array<float>& x, const Array<float>& router, const py::object& bias,
         const py::object& choice_bias, const RouteRule& rule, Array<float> scores, Array<int32_t> experts,
         Array<float> gates) {
        const py::ssize_t E = rule.num_experts, K = rule.top_k;
        expect(x, "route x", {-1, -1});
        expect(router, "router", {E, x.shape(1)});
        expect(experts, "experts", {x.shape(0), K});
        expect(gates, "gates", {x.shape(0), K});
        expect(scores, "scores", {x.shape(0), E});
        const Router r{router.data(), optional(bias, "router bias", E), optional(choice_bias, "choice_bias", E)};
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        const float* a = x.data();
        int32_t* e = experts.mutable_data();
        float *g = gates.mutable_data(), *s = scores.mutable_data();
        py::gil_scoped_release release;
        route(ws, a, r, T, cols, rule, s, e, g);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("router").noconvert(), py::arg("bias"), py::arg("choice_bias"),
      py::arg("rule"), py::arg("scores").noconvert(), py::arg("experts").noconvert(), py::arg("gates").noconvert());

  m.def(
      "choose",
      [](Workspace& ws, const py::object& bias, const py::object& choice_bias, const RouteRule& rule,
         Array<float> scores, Array<int32_t> experts, Array<float> gates) {
        const py::ssize_t E = rule.num_experts, K = rule.top_k;
        expect(scores, "scores", {-1, E});
        expect(experts, "experts", {scores.shape(0), K});
        expect(gates, "gates", {scores.shape(0), K});
        const auto of = [E](const py::object& a, const char* name) {
          return a.is_none() ? nullptr : floats(a, name, {E});
        };
        const Router router{nullptr, of(bias, "router_bias"), of(choice_bias, "choice_bias")};
        int32_t* e = experts.mutable_data();
        float *g = gates.mutable_data(), *s = scores.mutable_data();
        const int T = int(scores.shape(0));
        py::gil_scoped_release release;
        choose(ws, router, T, rule, s, e, g);
      },
      py::arg("ws"), py::arg("bias"), py::arg("choice_bias"), py::arg("rule"), py::arg("scores").noconvert(),
      py::arg("experts").noconvert(), py::arg("gates").noconvert(),
      "The second half of `route`: scores [T, E] are the products with its weight.");

  m.def(
      "slot_scores",
      [](Workspace& ws, const Array<float>& x, const Array<float>& weight, const Array<float>& gate_weight,
         const Array<float>& bias, const Array<int32_t>& experts, const Array<float>& gates, Array<float> scores) {
        expect(x, "slot_scores x", {-1, -1});
        expect(weight, "weight", {-1, -1, x.shape(1)});
        expect(gate_weight, "gate_weight", {weight.shape(0), weight.shape(1)});
        expect(bias, "bias", {weight.shape(0), weight.shape(1)});
        expect(experts, "experts", {x.shape(0), -1});
        expect(gates, "gates", {x.shape(0), experts.shape(1)});
        expect(scores, "scores", {x.shape(0), experts.shape(1), weight.shape(1)});
        expect_within("slot_scores experts", experts.size(), 0, INT32_MAX);
        const int32_t* e = experts.data();
        for (py::ssize_t i = 0; i < experts.size(); ++i) {
          if (e[i] < 0 || e[i] >= weight.shape(0)) throw std::invalid_argument("slot_scores: there is no such expert");
        }
        const SlotLayers layers{weight.data(), gate_weight.data(), bias.data(), int(weight.shape(1)), int(x.shape(1))};
        const float *a = x.data(), *g = gates.data();
        float* s = scores.mutable_data();
        const int T = int(x.shape(0)), K = int(experts.shape(1));
        py::gil_scoped_release release;
        slot_scores(ws, a, layers, e, g, T, K, s);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("gate_weight").noconvert(),
      py::arg("bias").noconvert(), py::arg("experts").noconvert(), py::arg("gates").noconvert(),
      py::arg("scores").noconvert());

  m.def(
      "look_ahead",
      [](Workspace& ws, const Array<float>& x, const std::vector<Array<float>>& norms,
         const std::vector<Array<float>>& routers, const std::vector<py::object>& biases,
         const std::vector<py::object>& choice_biases, float eps, const RouteRule& rule, Array<float> normed,
         Array<float> scores, Array<int32_t> experts, Array<float> gates) {
        const py::ssize_t p = py::ssize_t(routers.size()), E = rule.num_experts, K = rule.top_k;
        expect(x, "look_ahead x", {-1, -1});
        const py::ssize_t T = x.shape(0), cols = x.shape(1);
        expect(scores, "scores", {p, T, E});
        expect(experts, "experts", {p, T, K});
        expect(gates, "gates", {p, T, K});
        expect(normed, "normed", {p, T, cols});
        expect_within("look_ahead scores", scores.size(), 0, INT32_MAX);
        if (norms.size() != routers.size() || biases.size() != routers.size() ||
            choice_biases.size() != routers.size()) {
          throw std::invalid_argument("look_ahead: expected a norm, and biases or None, per router");
        }
        std::vector<NextRouter> next;
        for (size_t i = 0; i < routers.size(); ++i) {
          expect(norms[i], "norm", {cols});
          expect(routers[i], "router", {E, cols});
          next.push_back({norms[i].data(),
                          {routers[i].data(), optional(biases[i], "router bias", E),
                           optional(choice_biases[i], "choice_bias", E)}});
        }
        const float* a = x.data();
        int32_t* e = experts.mutable_data();
        float *g = gates.mutable_data(), *s = scores.mutable_data(), *n = normed.mutable_data();
        py::gil_scoped_release release;
        look_ahead(ws, a, next, int(T), int(cols), eps, rule, n, s, e, g);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("norms").noconvert(), py::arg("routers").noconvert(),
      py::arg("biases"), py::arg("choice_biases"), py::arg("eps"), py::arg("rule"), py::arg("normed").noconvert(),
      py::arg("scores").noconvert(), py::arg("experts").noconvert(), py::arg("gates").noconvert());

  m.def(
      "ffn",
      [](Workspace& ws, const Array<float>& x, const Nested* gate, const Nested& up, const Nested& down,
         Array<float> out, const py::object& hidden, const std::string& activation) {
        const Activation kind = activation_of(activation);
        FfnUse use{{gate ? gate->matrix : NestedMatrix{}, up.matrix, down.matrix}, nullptr, int(x.shape(0)), nullptr};
        check_ffn(use.w, kind);
        expect(x, "ffn x", {-1, up.matrix.cols});
        expect(out, "ffn out", {x.shape(0), down.matrix.rows});
        use.out = out.mutable_data();
        if (!hidden.is_none()) use.hidden = writable(hidden, "ffn hidden", {x.shape(0), up.matrix.rows});
        const float* a = x.data();
        py::gil_scoped_release release;
        run_ffns(ws, a, use.count, kind, {use});
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate"), py::arg("up"), py::arg("down"),
      py::arg("out").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      "out [T, D] = down(activation(gate x, up x)); hidden [T, H], if given, gets what down is applied to.");

  m.def(
      "soft_cap",
      [](Workspace& ws, float cap, Array<float> x) {
        if (!(cap > 0)) throw std::invalid_argument("soft_cap: expected a positive cap");
        float* p = x.mutable_data();
        const int64_t n = x.size();
        py::gil_scoped_release release;
        soft_cap(ws, cap, n, p);
      },
      py::arg("ws"), py::arg("cap"), py::arg("x").noconvert(), "x = cap * tanh(x / cap), in place.");

  m.def(
      "combine",
      [](Workspace& ws, const Array<float>& parts, const Array<int32_t>& rows, const Array<float>& gates,
         Array<float> out) {
        expect(parts, "parts", {-1, -1});
        expect(rows, "rows", {-1, -1});
        expect(gates, "gates", {rows.shape(0), rows.shape(1)});
        expect(out, "combine out", {rows.shape(0), parts.shape(1)});
        const int32_t* r = rows.data();
        for (py::ssize_t i = 0; i < rows.size(); ++i) {
          if (r[i] >= parts.shape(0)) throw std::invalid_argument("combine: a row is outside parts");
        }
        const float *p = parts.data(), *g = gates.data();
        float* o = out.mutable_data();
        const int T = int(rows.shape(0)), K = int(rows.shape(1)), cols = int(parts.shape(1));
        py::gil_scoped_release release;
        combine(ws, p, r, g, T, K, cols, o);
      },
      py::arg("ws"), py::arg("parts").noconvert(), py::arg("rows").noconvert(), py::arg("gates").noconvert(),
      py::arg("out").noconvert(), "out[t] = sum over k of gates[t, k] * parts[rows[t, k]]; rows below 0 are skipped.");

  m.def(
      "add_norm",
      [](Workspace& ws, const Array<float>& added, float scale, Array<float> x, const Array<float>& weight, float eps,
         Array<float> out) {
        expect(x, "add_norm x", {-1, -1});
        expect(added, "add_norm added", {x.shape(0), x.shape(1)});
        expect(weight, "add_norm weight", {x.shape(1)});
        expect(out, "add_norm out", {x.shape(0), x.shape(1)});
        const float *a = added.data(), *w = weight.data();
        float *to = x.mutable_data(), *o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        py::gil_scoped_release release;
        add_norm(ws, a, scale, to, w, eps, T, cols, o);
      },
      py::arg("ws"), py::arg("added").noconvert(), py::arg("scale"), py::arg("x").noconvert(),
      py::arg("weight").noconvert(), py::arg("eps"), py::arg("out").noconvert(),
      "x += scale * added, and out = its RMS norm.");

  m.def(
      "add_rows",
      [](Workspace& ws, const Array<float>& x, float scale, const py::object& gate_weight, const py::object& gate_input,
         Array<float> out) {
        expect(x, "add_rows x", {-1, -1});
        expect(out, "add_rows out", {x.shape(0), x.shape(1)});
        const float *w = nullptr, *in = nullptr;
        if (!gate_weight.is_none()) {
          w = floats(gate_weight, "gate_weight", {x.shape(1)});
          in = floats(gate_input, "gate_input", {x.shape(0), x.shape(1)});
        }
        const float* a = x.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        py::gil_scoped_release release;
        add_rows(ws, a, scale, w, in, T, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("scale"), py::arg("gate_weight"), py::arg("gate_input"),
      py::arg("out").noconvert(), "out += scale * sigmoid(gate_weight · gate_input) * x; no sigmoid when None.");

  m.def(
      "expert_ffn",
      [](Workspace& ws, const Array<float>& x, const Cache& cache, const Array<int32_t>& experts,
         const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
         const std::vector<int>& group, Array<float> parts, const py::object& hidden, const std::string& activation,
         const py::object& biases, const std::optional<Array<int8_t>>& basis, const py::object& projected) {
        const int d = cache.shape().hidden, h = cache.shape().expert_hidden;
        const Activation kind = activation_of(activation);
        const ExpertBiases all(biases, d, h);
        expect(x, "expert_ffn x", {-1, d});
        expect(experts, "experts", {-1});
        expect(levels, "levels", {experts.size()});
        expect(offsets, "offsets", {experts.size() + 1});
        expect(parts, "parts", {-1, d});
        const int32_t *o = offsets.data(), *t = tokens.data();
        const py::ssize_t T = x.shape(0), n = experts.size();
        int rank = 0;  // of what `basis` must have
        const float* z = projected.is_none() ? nullptr : floats(projected, "projected", {T, kMaxRank});
        float* inner = hidden.is_none() ? nullptr : writable(hidden, "hidden", {parts.shape(0), h});
        std::vector<FfnUse> uses;
        for (int i : group) {
          if (i < 0 || i >= n || o[i] < 0 || o[i + 1] <= o[i] || o[i + 1] > tokens.size() ||
              o[i + 1] > parts.shape(0)) {
            throw std::invalid_argument("expert_ffn: offsets do not fit tokens and parts");
          }
          for (int32_t j = o[i]; j < o[i + 1]; ++j) {
            if (t[j] < 0 || t[j] >= T) throw std::invalid_argument("expert_ffn: a token is outside x");
          }
          const int32_t e = experts.data()[i];
          uses.push_back({cache.view(e, levels.data()[i]), t + o[i], o[i + 1] - o[i],
                          parts.mutable_data() + size_t(o[i]) * d, inner ? inner + size_t(o[i]) * h : nullptr,
                          all.of(e % cache.shape().num_experts)});
          check_ffn(uses.back().w, kind);
          rank = std::max({rank, rank_of(uses.back().w.gate), rank_of(uses.back().w.up)});
        }
        const float* a = x.data();
        const int8_t* v = z ? nullptr : shared_basis(basis, rank, d);
        py::gil_scoped_release release;
        std::vector<float> own(v ? size_t(T) * kMaxRank : 0);
        if (v) project(ws, a, int(T), v, rank, d, own.data());
        for (FfnUse& use : uses) use.z = v ? own.data() : z;
        run_ffns(ws, a, int(T), kind, uses);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("experts").noconvert(),
      py::arg("levels").noconvert(), py::arg("offsets").noconvert(), py::arg("tokens").noconvert(), py::arg("group"),
      py::arg("parts").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      py::arg("biases") = py::none(), py::arg("basis").noconvert() = py::none(), py::arg("projected") = py::none(),
      "Runs the experts at positions `group` of a plan on their tokens; part rows are those of `offsets`, as are those "
      "of hidden [m, H], which gets what each w_down is applied to. biases: of all experts of the layer, gates' [E, "
      "H], "
      "ups' [E, H] and downs' [E, D]. basis: V [rank, padded columns] of gates and ups where they have corrections; "
      "projected: what `project` makes of x with it, if that was done before.");
}

}  // namespace edgemoe
