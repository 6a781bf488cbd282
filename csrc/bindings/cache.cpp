#include "cache.h"

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "device/slots.h"
#include "matrix.h"
#include "roof.h"

namespace edgemoe {
namespace {

/// One of the live arrays of `edgemoe.plan.Priorities`.
template <class T>
Array<T> live(const py::object& priorities, const char* name, std::initializer_list<py::ssize_t> shape) {
  const py::object array = py::getattr(priorities, name, py::none());
  if (!py::isinstance<Array<T>>(array)) {
    const char* type = std::is_same_v<T, double> ? "float64" : std::is_same_v<T, uint8_t> ? "uint8" : "uint32";
    throw py::type_error(std::string("policy: expected a name or priorities whose ") + name + " is a contiguous " +
                         type + " array");
  }
  const auto found = py::reinterpret_borrow<Array<T>>(array);
  expect(found, name, shape);
  return found;
}

/// A policy by name, or by `edgemoe.plan.Priorities`, whose arrays are kept alive.
Policy policy_from(const py::object& policy, int num_layers, int num_experts) {
  if (py::isinstance<py::str>(policy)) return Policy(policy.cast<std::string>(), num_layers, num_experts);
  const auto scores = live<double>(policy, "scores", {num_layers, num_experts});
  const auto scale = live<double>(policy, "scale", {num_layers}), shift = live<double>(policy, "shift", {num_layers});
  const auto version = live<uint32_t>(policy, "version", {num_layers});
  const auto decides = live<uint8_t>(policy, "decides", {1});
  const auto release = [](void* object) {
    py::gil_scoped_acquire gil;
    delete static_cast<py::object*>(object);
  };
  void* owner = new py::object(py::make_tuple(scores, scale, shift, version, decides));
  return Policy({scores.data(), scale.data(), shift.data(), version.data(), decides.data(), {owner, release}},
                num_layers, num_experts);
}

/// A view of live counters.
py::object counts(const std::vector<Relaxed<uint32_t>>& of, const py::object& owner) {
  return lend(reinterpret_cast<const uint32_t*>(of.data()), of.size(), owner);
}

using Class = py::class_<Cache, Held<Cache>>;

void bind_making(Class& cache) {
  cache
      .def(py::init([](const std::shared_ptr<File>& file, int num_experts, int hidden, int expert_hidden,
                       const std::vector<std::array<uint8_t, 3>>& rung_widths, const std::vector<uint32_t>& ends,
                       const Array<uint64_t>& offsets, const Array<uint32_t>& crcs, const Array<uint8_t>& rungs,
                       const std::vector<int>& layers, int max_level, size_t budget_bytes, bool verify, int num_readers,
                       const py::object& policy, const std::string& scheme_name, size_t most_bytes, bool gated,
                       const std::vector<uint8_t>& row_scales, const std::array<std::vector<uint8_t>, 3>& ranks,
                       const std::vector<std::shared_ptr<File>>& others, const std::optional<Array<uint8_t>>& file_of,
                       const std::optional<Array<int32_t>>& names, const std::shared_ptr<DeviceSpace>& device) {
             expect(offsets, "offsets", {-1});
             expect(crcs, "crcs", {offsets.size(), py::ssize_t(ends.size())});
             expect(rungs, "rungs", {offsets.size()});
             std::unique_ptr<Backing> backing;
             if (file) {
               ExpertTable table{{offsets.data(), offsets.data() + offsets.size()},
                                 {crcs.data(), crcs.data() + crcs.size()},
                                 ends,
                                 layers,
                                 {others.begin(), others.end()},
                                 {},
                                 {}};
               if (file_of) table.file_of.assign(file_of->data(), file_of->data() + file_of->size());
               if (names) table.names.assign(names->data(), names->data() + names->size());
               backing = make_host_backing(file, std::move(table), verify, num_readers);
               if (device) {
                 expect_within("Cache max_level", max_level, 1, int(ends.size()));
                 const size_t window = round_up(ends[size_t(max_level) - 1], backing->granule());
                 backing = make_shared_backing(device, std::move(backing), ends, window);
               }
             } else {
               backing = make_dry_backing();
             }
             const Scheme scheme = scheme_named(scheme_name);
             ExpertShape shape{scheme,
                               int(layers.size()),
                               num_experts,
                               hidden,
                               expert_hidden,
                               rung_widths,
                               ends,
                               gated,
                               check_row_scales(scheme, row_scales),
                               ranks};
             return Held<Cache>(new Cache(std::move(backing), std::move(shape),
                                          {rungs.data(), rungs.data() + rungs.size()}, max_level, budget_bytes,
                                          policy_from(policy, int(layers.size()), num_experts), most_bytes));
           }),
           py::kw_only(), py::arg("file"), py::arg("num_experts"), py::arg("hidden"), py::arg("expert_hidden"),
           py::arg("rung_widths"), py::arg("ends"), py::arg("offsets").noconvert(), py::arg("crcs").noconvert(),
           py::arg("rungs").noconvert(), py::arg("layers"), py::arg("max_level"), py::arg("budget_bytes"),
           py::arg("verify"), py::arg("num_readers"), py::arg("policy"), py::arg("scheme") = "nested",
           py::arg("most_bytes") = 0, py::arg("gated") = true, py::arg("row_scales") = std::vector<uint8_t>{1},
           py::arg("ranks") = std::array<std::vector<uint8_t>, 3>{},
           py::arg("others") = std::vector<std::shared_ptr<File>>{}, py::arg("file_of").noconvert() = py::none(),
           py::arg("names").noconvert() = py::none(), py::arg("device") = py::none())
      .def_static(
          "on_device",
          [](const std::shared_ptr<DeviceSpace>& device, const Cache& host, size_t budget_bytes) {
            const ExpertShape& shape = host.shape();
            const size_t window = round_up(shape.ends[size_t(host.max_level()) - 1], kPage);
            return Held<Cache>(new Cache(make_device_backing(device, host, window), shape, host.rungs(),
                                         host.max_level(), budget_bytes,
                                         Policy("lfu", shape.num_layers, shape.num_experts)));
          },
          py::arg("device").none(false), py::arg("host"), py::arg("budget_bytes"), py::keep_alive<0, 2>(),
          "A cache of the same experts in a device's memory, which is filled from `host`.")
      .def(
          "set_policy",
          [](Cache& c, const py::object& policy) {
            c.set_policy(policy_from(policy, c.shape().num_layers, c.shape().num_experts));
          },
          py::arg("policy"));
}

void bind_figures(Class& cache) {
  cache.def("check_integrity", &Cache::check_integrity)
      .def("slot_bytes", &Cache::slot_bytes, py::arg("level"))
      .def_property_readonly("max_level", &Cache::max_level)
      .def_property_readonly(
          "levels",
          [](const Cache& c) {
            Array<int8_t> levels(9);
            for (int bits = 0; bits <= 8; ++bits) levels.mutable_data()[bits] = c.level_of_bits(bits);
            return levels;
          },
          "int8 [9]: the level that has 0, 1, … 8 bits; 0 where none has.")
      .def_property_readonly("taken_slots", &Cache::taken_slots, "How many slots hold an expert or are read into.")
      .def_property_readonly(
          "content",
          [](const py::object& self) {
            const Cache& cache = self.cast<const Cache&>();
            return lend(cache.slots(), cache.slots_bytes(), self);
          },
          "uint8 view of all slots, for tests. Reading it touches all of its pages.")
      .def(
          "read_rate",
          [](const Cache& c, int threads) {
            const auto pieces = c.resident();
            py::gil_scoped_release release;
            return read_rate(pieces, threads);
          },
          py::arg("threads"), "Bytes per second that `threads` threads read of resident experts; 0 without any.")
      .def_property_readonly("residency",
                             [](py::object self) {
                               const auto& r = self.cast<Cache&>().residency();
                               return lend(reinterpret_cast<const int8_t*>(r.data()), r.size(), self);
                             })
      .def_property_readonly(
          "reads", [](const py::object& self) { return counts(self.cast<Cache&>().reads(), self); },
          "uint32 [n], a live view: how often each expert was read since the start.")
      .def_property_readonly(
          "runs", [](const py::object& self) { return counts(self.cast<Cache&>().runs(), self); },
          "uint32 [n], a live view: how many tokens each expert ran since the start.")
      .def_property_readonly(
          "lacks", [](const py::object& self) { return counts(self.cast<Cache&>().lacks(), self); },
          "uint32 [n], a live view: how often each expert was wanted but not in memory, since the start.")
      .def_property(
          "uses",
          [](const Cache& c) {
            const std::vector<double> uses = c.uses();
            return Array<double>(py::ssize_t(uses.size()), uses.data());
          },
          [](Cache& c, const Array<double>& uses) {
            expect(uses, "uses", {c.num_experts()});
            c.set_uses({uses.data(), uses.data() + uses.size()});
          },
          "float64 [n]: how much each expert was used. A use counts 1, and half as much after every 64 tokens.")
      .def_property_readonly(
          "progress", [](const Cache& c) { return py::make_tuple(c.loader_stats().bytes, double(c.stats().wait_s)); },
          "(bytes read, seconds waited for reads) since the start; a trace asks for it after every layer.")
      .def_property_readonly("stats", [](const Cache& c) {
        const CacheStats s = c.stats();
        const LoaderStats l = c.loader_stats();
        py::dict d;
        d["hits"] = uint64_t(s.hits);
        d["misses"] = uint64_t(s.misses);
        d["evictions"] = uint64_t(s.evictions);
        d["bits"] = uint64_t(s.bits);
        d["ahead_reads"] = uint64_t(s.ahead_reads);
        d["ahead_used"] = uint64_t(s.ahead_used);
        d["ahead_late"] = uint64_t(s.ahead_late);
        d["wait_s"] = double(s.wait_s);
        d["resident_bytes"] = size_t(s.resident_bytes);
        d["resident_experts"] = int(s.resident_experts);
        d["committed_bytes"] = size_t(s.committed_bytes);
        d["peak_bytes"] = size_t(s.peak_bytes);
        d["budget_bytes"] = size_t(s.budget_bytes);
        d["bytes_read"] = l.bytes;
        d["reads"] = l.reads;
        d["read_s"] = l.busy_s;
        return d;
      });
}

void bind_decode(Class& cache) {
  cache.def(
      "decode",
      [](Cache& c, int expert, int level, const std::optional<Array<int8_t>>& basis) {
        const int32_t e = expert;
        if (level < 1 || level > kMaxRungs) throw std::invalid_argument("decode: no such level");
        const int8_t l = int8_t(level);
        const int32_t offsets[] = {0, 1};
        std::vector<int> group;
        c.begin({&e, &l, 1}, offsets, 1, {nullptr, nullptr, 0});
        const auto close = [](Cache* open) { open->close(); };
        const std::unique_ptr<Cache, decltype(close)> request(&c, close);
        c.next(&group);
        ExpertView v = c.view(expert, level);
        v.gate.basis = v.up.basis = shared_basis(basis, std::max(rank_of(v.gate), rank_of(v.up)), v.up.cols);
        std::vector<py::array_t<float>> out;
        for (const NestedMatrix* w : {&v.gate, &v.up, &v.down}) {
          py::array_t<float> a({py::ssize_t(w->rows), py::ssize_t(w->cols)});
          for (int r = 0; r < w->rows; ++r) decode_row(kernels(), *w, r, a.mutable_data() + size_t(r) * w->cols);
          out.push_back(std::move(a));
        }
        return out;
      },
      py::arg("expert"), py::arg("level"), py::arg("basis").noconvert() = py::none(),
      "Loads an expert and returns gate, up and down as floats. basis: V of gate and up where they have corrections.");
}

}  // namespace

void bind_cache(py::module_& m) {
  Class cache(m, "Cache", "The expert cache; see csrc/cache.h.");
  bind_making(cache);
  bind_cache_requests(cache);
  bind_figures(cache);
  bind_decode(cache);
}

}  // namespace edgemoe
