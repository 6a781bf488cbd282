#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/work.h"
#include "dense.h"

namespace edgemoe {
namespace {

/// Data of an array [n], or null for None.
const float* optional(const py::object& array, const char* name, py::ssize_t n) {
  return array.is_none() ? nullptr : floats(array, name, {n});
}

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

void bind_choices(py::module_& m) {
  py::class_<RouteRule>(m, "RouteRule", "How a router's logits become a choice; see route_rule.h.")
      .def(py::init(&route_rule), py::kw_only(), py::arg("num_experts"), py::arg("top_k"), py::arg("scoring"),
           py::arg("renormalise"), py::arg("gate_scale") = 1.0f, py::arg("groups") = 1, py::arg("used_groups") = 1,
           py::arg("group_by_two") = false)
      .def_readonly("num_experts", &RouteRule::num_experts)
      .def_readonly("top_k", &RouteRule::top_k);

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
        run(ws, [=, &ws] { route(ws, a, r, T, cols, rule, s, e, g); });
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
}

void bind_slot_scores(py::module_& m) {
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
}

void bind_look_ahead(py::module_& m) {
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
}

}  // namespace

void bind_routing(py::module_& m) {
  bind_choices(m);
  bind_slot_scores(m);
  bind_look_ahead(m);
}

}  // namespace edgemoe
