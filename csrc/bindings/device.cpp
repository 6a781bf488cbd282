// A device's memory, and what Python keeps in it.
#include <memory>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "device/backend.h"
#include "device/stream.h"
#include "error.h"

namespace edgemoe {
namespace {

py::dict probed(const std::string& path) {
  const BackendProbe p = probe_backend(path);
  py::dict out;
  out["num_devices"] = p.num_devices;
  out["driver"] = p.driver;
  out["runtime"] = p.runtime;
  out["why_not"] = std::string(p.why_not);
  return out;
}

py::dict info_of(DeviceSpace& space) {
  const DeviceInfo info = space.device().info();
  py::dict out;
  out["name"] = std::string(info.name);
  out["capability"] = py::make_tuple(info.major, info.minor);
  out["num_processors"] = info.num_processors;
  out["total_bytes"] = info.total_bytes;
  out["free_bytes"] = info.free_bytes;
  out["is_unified"] = info.is_unified;
  return out;
}

/// Whether the device is lost: then it answers every call with its error.
bool is_lost(DeviceSpace& space) {
  try {
    space.device().progress();
    return false;
  } catch (const DeviceError&) {
    return true;
  }
}

py::dict stats_of(const DeviceSpace& space) {
  const SpaceStats s = space.stats();
  py::dict out;
  out["used_bytes"] = size_t(s.used_bytes);
  out["peak_bytes"] = size_t(s.peak_bytes);
  out["budget_bytes"] = size_t(s.budget_bytes);
  out["bytes_in"] = uint64_t(s.bytes_in);
  out["bytes_out"] = uint64_t(s.bytes_out);
  return out;
}

DeviceArray make_array(std::shared_ptr<DeviceSpace> space, const std::vector<py::ssize_t>& shape) {
  if (shape.empty()) throw std::invalid_argument("DeviceArray: expected a shape");
  DeviceArray out{nullptr, nullptr, shape};
  for (py::ssize_t n : shape) expect_within("DeviceArray", n, 0, INT32_MAX);
  auto memory = std::make_shared<DeviceMemory>(std::move(space), out.size() * sizeof(float));
  out.data = memory->as<float>();
  out.memory = std::move(memory);
  return out;
}

/// A slice of rows, as in numpy.
DeviceArray rows_of(const DeviceArray& a, const py::slice& rows) {
  py::ssize_t start, stop, step, count;
  if (!rows.compute(a.shape[0], &start, &stop, &step, &count)) throw py::error_already_set();
  if (step != 1) throw std::invalid_argument("DeviceArray: expected rows that follow each other");
  DeviceArray out = a;
  out.data += size_t(start) * (a.shape[0] ? a.size() / size_t(a.shape[0]) : 0);
  out.shape[0] = count;
  return out;
}

/// The part at an index of the first axis.
DeviceArray item_of(const DeviceArray& a, py::ssize_t index) {
  if (a.shape.size() < 2 || index < 0 || index >= a.shape[0]) throw py::index_error("DeviceArray: no such item");
  DeviceArray out{a.memory, a.data, {a.shape.begin() + 1, a.shape.end()}};
  out.data += size_t(index) * out.size();
  return out;
}

py::array_t<float> copied(const DeviceArray& a) {
  py::array_t<float> out(a.shape);
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  a.memory->space().download({{to, a.data, a.size() * sizeof(float)}});
  return out;
}

/// Copies the rungs of a matrix in host memory.
Held<DeviceMatrix> matrix_of(const std::shared_ptr<DeviceSpace>& space, const Nested& n) {
  py::gil_scoped_release release;
  Held<DeviceMatrix> out(new DeviceMatrix{n.matrix, {}});
  NestedMatrix& m = out->matrix;
  const auto bytes = [&m](int r) { return rung_bytes(m.scheme, m.rows, m.cols, form_of(m, r)); };
  size_t total = 0;
  for (int r = 0; r < m.num_rungs; ++r) total += bytes(r);
  const bool is_apart = m.basis && !m.basis_rank;  // V is not in rung 0
  const size_t basis_bytes =
      is_apart ? size_t(*std::max_element(m.ranks, m.ranks + m.num_rungs)) * basis_stride(m.cols) : 0;
  out->memory = DeviceMemory(space, total + basis_bytes);
  uint8_t* to = out->memory.as();
  for (int r = 0; r < m.num_rungs; to += bytes(r), ++r) {
    space->upload(to, m.rungs[r], bytes(r));
    m.rungs[r] = to;
  }
  if (is_apart) {
    space->upload(to, m.basis, basis_bytes);
    m.basis = reinterpret_cast<const int8_t*>(to);
  } else if (m.basis) {
    m.basis = own_basis_of(m);
  }
  return out;
}

/// Throws std::invalid_argument for a type that devices do not support.
KvType known_type(const std::string& name) {
  const KvType type = kv_type(name);
  if (kv_packed_bits(type)) throw std::invalid_argument("device KV cache: " + name + " is supported on the CPU only");
  return type;
}

/// A layer of latents: keys of one head, whose leading `value_dim` columns are the values too.
Held<DeviceKv> latents_of(const std::shared_ptr<DeviceSpace>& space, const std::string& type, int capacity,
                          int head_dim, int value_dim) {
  expect_within("KV cache value_dim", value_dim, 1, head_dim);
  const KvType kind = known_type(type);
  const size_t total = kv_bytes(kind, 1, capacity, head_dim);
  Held<DeviceKv> out(new DeviceKv{{}, 1, head_dim, DeviceMemory(space, total)});
  uint8_t* p = out->memory.as();
  space->device().fill(p, 0, total);
  out->layer = {p, nullptr, kind, kind, capacity, blocks(head_dim, 16) * 16, value_dim};
  return out;
}

Held<DeviceKv> device_kv_of(const std::shared_ptr<DeviceSpace>& space, const std::string& keys,
                            const std::string& values, int num_heads, int capacity, int head_dim) {
  const KvType key_type = known_type(keys), value_type = known_type(values);
  const size_t of_keys = kv_bytes(key_type, num_heads, capacity, head_dim);
  const size_t total = of_keys + kv_bytes(value_type, num_heads, capacity, head_dim);
  Held<DeviceKv> out(new DeviceKv{{}, num_heads, head_dim, DeviceMemory(space, total)});
  uint8_t* p = out->memory.as();
  space->device().fill(p, 0, total);  // padding is multiplied by zeros, so it must be finite
  const int stride = blocks(head_dim, 16) * 16;
  out->layer = {p, p + of_keys, key_type, value_type, capacity, stride, stride};
  return out;
}

void bind_space(py::module_& m) {
  m.def("probe_device", &probed, py::arg("path"), "What a plug-in for devices reports about itself and the machine.");

  py::class_<DeviceSpace, std::shared_ptr<DeviceSpace>>(m, "Device", "An open device, with a memory budget.")
      .def(py::init([](const std::string& path, int ordinal, size_t budget_bytes) {
             py::gil_scoped_release release;
             return std::shared_ptr<DeviceSpace>(new DeviceSpace(open_device(path, ordinal), budget_bytes),
                                                 InItsProcess<DeviceSpace>());
           }),
           py::arg("path"), py::arg("ordinal"), py::arg("budget_bytes"))
      .def_property_readonly("info", &info_of)
      .def_property_readonly("stats", &stats_of)
      .def_property_readonly("is_lost", &is_lost, "Whether the device has failed, so that every call is an error.")
      .def(
          "measure",
          [](DeviceSpace& space, size_t bytes) {
            DeviceRates rates{};
            {
              py::gil_scoped_release release;
              rates = space.measure(bytes);
            }
            return py::make_tuple(rates.link, rates.memory);
          },
          py::arg("bytes"),
          "(link, memory): bytes per second of copies to the device, and of reads and writes within its memory.")
      .def("use_mailbox", &DeviceSpace::use_mailbox, py::arg("yes"),
           "Whether small results come through memory that both host and device see. Results are the same.")
      .def("limit", &DeviceSpace::limit, py::arg("budget_bytes"), "Changes the budget; what is taken already stays.")
      .def_static("taken", &DeviceSpace::taken, py::arg("bytes"), "Bytes of the budget that an allocation takes.");

  py::class_<DeviceStream, Held<DeviceStream>>(m, "DeviceStream", "Two places for experts that pass through a device.")
      .def(py::init([](const std::shared_ptr<DeviceSpace>& device, size_t window) {
             return Held<DeviceStream>(new DeviceStream(device, window));
           }),
           py::arg("device").none(false), py::arg("window"))
      .def_static("bytes", &DeviceStream::bytes, py::arg("window"), "Bytes of device memory that it takes.")
      .def("measure", &DeviceStream::measure, py::call_guard<py::gil_scoped_release>(),
           "Measures how many bytes per second it copies.")
      .def_property_readonly("bytes_in", &DeviceStream::bytes_in);
}

void bind_arrays(py::module_& m) {
  py::class_<DeviceArray>(m, "DeviceArray", "float32 in a device's memory.")
      .def(py::init(&make_array), py::arg("device").none(false), py::arg("shape"))
      .def_property_readonly("shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("nbytes", [](const DeviceArray& a) { return a.size() * sizeof(float); })
      .def("__len__", [](const DeviceArray& a) { return a.shape[0]; })
      .def("__getitem__", &rows_of, py::arg("rows"))
      .def("item", &item_of, py::arg("index"), "A view of what lies at an index of the first axis.")
      .def(
          "upload",
          [](const DeviceArray& a, const Array<float>& from) {
            if (std::vector<py::ssize_t>(from.shape(), from.shape() + from.ndim()) != a.shape) {
              throw std::invalid_argument("DeviceArray: expected an array of its shape, got " + shape_text(from));
            }
            const float* p = from.data();
            py::gil_scoped_release release;
            a.memory->space().upload(a.data, p, a.size() * sizeof(float));
          },
          py::arg("array").noconvert())
      .def("numpy", &copied, "Returns a copy; waits for what was queued before.");

  py::class_<DeviceMatrix, Held<DeviceMatrix>>(m, "DeviceMatrix", "A matrix [rows, cols] in a device's memory.")
      .def(py::init(&matrix_of), py::arg("device").none(false), py::arg("matrix"))
      .def_property_readonly("rows", [](const DeviceMatrix& d) { return d.matrix.rows; })
      .def_property_readonly("cols", [](const DeviceMatrix& d) { return d.matrix.cols; })
      .def_property_readonly("bits", [](const DeviceMatrix& d) { return bits_of(d.matrix); })
      .def_property_readonly("bytes", [](const DeviceMatrix& d) { return d.memory.size(); });
}

void bind_device_kv(py::module_& m) {
  py::class_<DeviceKv, Held<DeviceKv>>(m, "DeviceKvLayer", "Keys and values of one layer in a device's memory.")
      .def(py::init(&device_kv_of), py::kw_only(), py::arg("device").none(false), py::arg("key_type"),
           py::arg("value_type"), py::arg("num_heads"), py::arg("capacity"), py::arg("head_dim"))
      .def_static("latents", &latents_of, py::kw_only(), py::arg("device").none(false), py::arg("type"),
                  py::arg("capacity"), py::arg("head_dim"), py::arg("value_dim"), "See KvLayer.latents.")
      .def(
          "take",
          [](DeviceKv& kv, const DeviceKv& from, int begin, int end) {
            check_copy(from.layer, kv.layer, begin, end);
            if (from.num_heads != kv.num_heads) throw std::invalid_argument("take: expected as many heads");
            Device& device = kv.memory.space().device();
            copy_positions(from.layer, kv.layer, kv.num_heads, begin, end,
                           [&](void* to, const void* p, size_t n) { device.copy(to, p, n); });
          },
          py::arg("source"), py::arg("begin"), py::arg("end"),
          "Copies positions of another layer to the same positions of this one.")
      .def_property_readonly("content", [](const DeviceKv& kv) {
        py::array_t<uint8_t> out(py::ssize_t(kv.memory.size()));
        kv.memory.space().download({{out.mutable_data(), kv.memory.as(), kv.memory.size()}});
        return out;
      });
}

}  // namespace

void bind_device(py::module_& m) {
  bind_space(m);
  bind_arrays(m);
  bind_device_kv(m);
}

}  // namespace edgemoe
