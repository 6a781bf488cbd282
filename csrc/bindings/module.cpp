// The Python module edgemoe._core: the only file that knows Python. Arrays are lent for one call and never copied:
// a wrong dtype or a strided array is an error. The GIL is released around the work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "cache.h"
#include "crc32c.h"
#include "dense.h"
#include "error.h"
#include "expert.h"
#include "mixers/attention.h"
#include "quantize.h"
#include "roof.h"

namespace py = pybind11;
using namespace edgemoe;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::string shape_text(const Array<T>& a) {
  std::string s = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) s += (i ? ", " : "") + std::to_string(a.shape(i));
  return s + "]";
}

/// Throws unless `a` has the shape; -1 matches anything.
template <class T>
void expect(const Array<T>& a, const char* name, std::initializer_list<py::ssize_t> shape) {
  bool ok = a.ndim() == py::ssize_t(shape.size());
  py::ssize_t axis = 0;
  std::string wanted = "[";
  for (py::ssize_t n : shape) {
    if (ok && n >= 0) ok = a.shape(axis) == n;
    wanted += (axis ? ", " : "") + (n < 0 ? std::string("any") : std::to_string(n));
    ++axis;
  }
  if (!ok) throw std::invalid_argument(std::string(name) + ": expected shape " + wanted + "], got " + shape_text(a));
}

/// Data of an array that may not be converted; valid while the object lives.
const float* floats(const py::object& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  if (!py::isinstance<Array<float>>(array)) {
    throw py::type_error(std::string(name) + ": expected a contiguous float32 array");
  }
  const auto a = py::reinterpret_borrow<Array<float>>(array);
  expect(a, name, shape);
  return a.data();
}

/// A policy by name, or by the array of somebody else's scores, which is kept alive.
Policy policy_from(const py::object& policy, size_t num_experts) {
  if (py::isinstance<py::str>(policy)) return Policy(policy.cast<std::string>(), num_experts);
  if (!py::isinstance<Array<double>>(policy)) {
    throw py::type_error("policy: expected a name or a contiguous float64 array");
  }
  const auto scores = py::reinterpret_borrow<Array<double>>(policy);
  expect(scores, "policy", {py::ssize_t(num_experts)});
  const auto release = [](void* object) {
    py::gil_scoped_acquire gil;
    delete static_cast<py::object*>(object);
  };
  return Policy(scores.data(), num_experts, {static_cast<void*>(new py::object(policy)), release});
}

/// The same for an array that is written.
float* writable(const py::object& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  floats(array, name, shape);
  return py::reinterpret_borrow<Array<float>>(array).mutable_data();
}

/// Deletes an object, but not in a forked child: its threads and its memory did not come along.
template <class T>
struct InItsProcess {
  pid_t pid = getpid();

  void operator()(T* object) const {
    if (getpid() == pid) delete object;
  }
};

template <class T>
using Held = std::unique_ptr<T, InItsProcess<T>>;

/// A resident matrix and the memory that holds it. Immutable.
struct Nested {
  NestedMatrix matrix;
  Memory memory;

  size_t bytes() const { return memory.size(); }
};

Scheme scheme_named(const std::string& name) {
  if (name == "nested") return Scheme::kNested;
  if (name == "mwq") return Scheme::kMwq;
  throw std::invalid_argument("scheme: expected nested or mwq, got " + name);
}

void check_widths(Scheme scheme, const std::vector<uint8_t>& widths) {
  int bits = 0;
  for (uint8_t w : widths) bits += w == 0 ? 99 : w;
  if (widths.empty() || widths.size() > kMaxRungs || bits > 8) {
    throw std::invalid_argument("nested: a ladder has 1 to 8 rungs of at least 1 and together at most 8 bits");
  }
  if (scheme == Scheme::kMwq) {
    bool ok = widths[0] == 2 || widths[0] == 5;
    for (size_t r = 1; r < widths.size(); ++r) ok = ok && widths[r] == 1;
    if (!ok) throw std::invalid_argument("nested: a ladder of mwq has a base of 2 or 5 bits and rungs of 1 bit");
  }
}

/// Points the matrix at rungs that follow each other in memory.
void point_at_rungs(NestedMatrix* m, Scheme scheme, int rows, int cols, const std::vector<uint8_t>& widths,
                    const uint8_t* p) {
  m->scheme = scheme;
  m->rows = rows;
  m->cols = cols;
  m->num_rungs = int(widths.size());
  for (size_t r = 0; r < widths.size(); ++r) {
    m->widths[r] = widths[r];
    m->rungs[r] = p;
    p += rung_bytes(scheme, rows, cols, widths[r], r == 0);
  }
}

Held<Nested> nested_from_rungs(const std::vector<Array<uint8_t>>& rungs, int rows, int cols,
                               const std::vector<uint8_t>& widths, const std::string& scheme_name) {
  const Scheme scheme = scheme_named(scheme_name);
  check_widths(scheme, widths);
  if (rungs.size() != widths.size()) throw std::invalid_argument("nested: expected one array per rung");
  size_t total = 0;
  for (size_t r = 0; r < widths.size(); ++r) {
    const size_t bytes = rung_bytes(scheme, rows, cols, widths[r], r == 0);
    expect(rungs[r], "nested rung", {py::ssize_t(bytes)});
    total += bytes;
  }
  Held<Nested> n(new Nested);
  n->memory = Memory(total);
  uint8_t* p = n->memory.bytes();
  for (const auto& r : rungs) p = std::copy_n(r.data(), r.size(), p);
  point_at_rungs(&n->matrix, scheme, rows, cols, widths, n->memory.bytes());
  return n;
}

/// Reads [offset, offset + length) of a file, page-aligned, in pieces of 8 MiB.
Memory read_range(const File& file, uint64_t offset, size_t length) {
  if (offset % kPage) throw std::invalid_argument("read: offset must be a multiple of 4096");
  Memory memory(length);
  if (length >= (size_t(4) << 20)) memory.prefer_huge_pages();
  constexpr size_t kPiece = size_t(8) << 20;
  for (size_t at = 0; at < memory.size(); at += kPiece) {
    file.read_pages(offset + at, std::min(kPiece, memory.size() - at), memory.bytes() + at);
  }
  return memory;
}

Held<Nested> nested_from_file(const std::shared_ptr<File>& file, uint64_t offset, const std::vector<uint64_t>& lengths,
                              const std::vector<uint32_t>& crcs, int rows, int cols, const std::vector<uint8_t>& widths,
                              bool verify, const std::string& name, const std::string& scheme_name) {
  const Scheme scheme = scheme_named(scheme_name);
  check_widths(scheme, widths);
  if (lengths.size() != widths.size() || crcs.size() != widths.size()) {
    throw std::invalid_argument("nested: expected one length and one checksum per rung");
  }
  size_t total = 0;
  for (size_t r = 0; r < widths.size(); ++r) {
    if (lengths[r] != rung_bytes(scheme, rows, cols, widths[r], r == 0))
      throw std::invalid_argument("nested: wrong length");
    total += lengths[r];
  }
  Held<Nested> n(new Nested);
  py::gil_scoped_release release;
  n->memory = read_range(*file, offset, total);
  point_at_rungs(&n->matrix, scheme, rows, cols, widths, n->memory.bytes());
  for (size_t r = 0; verify && r < widths.size(); ++r) {
    const uint32_t crc = crc32c(n->matrix.rungs[r], lengths[r]);
    if (crc == crcs[r]) continue;
    char text[96];
    std::snprintf(text, sizeof text, ", rung %d, is %08x; expected %08x", int(r), crc, crcs[r]);
    throw FormatError(file->path() + ": checksum of tensor " + name + text);
  }
  return n;
}

py::array_t<float> read_f32(const std::shared_ptr<File>& file, uint64_t offset, const std::vector<py::ssize_t>& shape,
                            uint32_t crc, bool verify, const std::string& name) {
  py::array_t<float> out(shape);
  const size_t length = size_t(out.nbytes());
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  const Memory memory = read_range(*file, offset, length);
  const uint32_t got = crc32c(memory.bytes(), length);
  if (verify && got != crc) {
    char text[64];
    std::snprintf(text, sizeof text, " is %08x; expected %08x", got, crc);
    throw FormatError(file->path() + ": checksum of tensor " + name + text);
  }
  std::copy_n(reinterpret_cast<const float*>(memory.bytes()), length / sizeof(float), to);
  return out;
}

/// The parts of attention that stay the same for a layer, with the arrays that they point into.
struct AttentionLayer {
  AttentionParts parts{};
  std::vector<py::object> arrays;

  const float* keep(const py::object& array, const char* name, py::ssize_t size) {
    if (array.is_none()) return nullptr;
    arrays.push_back(array);
    return floats(array, name, {size});
  }
};

/// Keys and values of one layer, and the memory that holds them.
struct Kv {
  KvLayer layer{};
  int num_heads = 0, head_dim = 0;
  size_t bytes = 0;
  Memory memory;
};

KvType kv_type(const std::string& name) {
  if (name == "f16") return KvType::kF16;
  if (name == "q8_0") return KvType::kQ8;
  throw std::invalid_argument("KV cache: expected f16 or q8_0, got " + name);
}

/// Bytes of one layer's keys or values, rounded so that both start on a cache line.
size_t kv_bytes(const std::string& type, int num_heads, int capacity, int head_dim) {
  return round_up(num_heads * kv_head_bytes(kv_type(type), capacity, blocks(head_dim, 16) * 16), 64);
}

Held<Kv> make_kv(const std::string& key_type, const std::string& value_type, int num_heads, int capacity,
                 int head_dim) {
  if (num_heads < 1 || capacity < 1 || head_dim < 1) throw std::invalid_argument("KV cache: expected a size above 0");
  Held<Kv> kv(new Kv);
  const size_t keys = kv_bytes(key_type, num_heads, capacity, head_dim);
  kv->num_heads = num_heads;
  kv->head_dim = head_dim;
  kv->bytes = keys + kv_bytes(value_type, num_heads, capacity, head_dim);
  kv->memory = Memory(kv->bytes);
  if (kv->bytes >= (size_t(4) << 20)) kv->memory.prefer_huge_pages();
  kv->layer = {kv->memory.bytes(), kv->memory.bytes() + keys, kv_type(key_type), kv_type(value_type),
               capacity,           blocks(head_dim, 16) * 16};
  return kv;
}

/// Gives a numpy view of memory that `owner` keeps alive.
template <class T>
py::array_t<T> lend(const T* p, size_t n, py::handle owner) {
  py::array_t<T> a({py::ssize_t(n)}, {py::ssize_t(sizeof(T))}, p, owner);
  py::detail::array_proxy(a.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return a;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of edgemoe: kernels, reads and the expert cache.";

  py::register_exception_translator([](std::exception_ptr p) {
    const auto raise = [](const char* type, const char* what) {
      py::object e = py::module_::import("edgemoe.errors").attr(type);
      PyErr_SetString(e.ptr(), what);
    };
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FormatError& e) {
      raise("FormatError", e.what());
    } catch (const OutOfBudget& e) {
      raise("OutOfBudget", e.what());
    } catch (const ReadError& e) {
      raise("ReadError", e.what());
    }
  });

  m.def(
      "crc32c",
      [](const py::buffer& b, uint32_t crc) {
        const py::buffer_info info = b.request();
        py::ssize_t packed = info.itemsize;
        for (size_t axis = info.shape.size(); axis-- > 0; packed *= info.shape[axis]) {
          if (info.shape[axis] > 1 && info.strides[axis] != packed) {
            throw std::invalid_argument("crc32c: expected a contiguous buffer");
          }
        }
        py::gil_scoped_release release;
        return crc32c(static_cast<const uint8_t*>(info.ptr), size_t(info.size * info.itemsize), crc);
      },
      py::arg("data"), py::arg("crc") = 0, "CRC-32C of a contiguous buffer, continuing from `crc`.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("system_page", &system_page, "Unit in which the system gives memory, at least 4096.");
  m.def("usable_isas", [] { return std::string(usable_isas()); }, "What this CPU can run, best first, by spaces.");
  m.def("use_isa", [](const std::string& name) { use_isa(name.c_str()); }, py::arg("name"));

  py::class_<File, std::shared_ptr<File>>(m, "File", "A file opened for positioned, direct reads.")
      .def(py::init<std::string>(), py::arg("path"))
      .def_property_readonly("path", &File::path)
      .def_property_readonly("size", &File::size)
      .def_property_readonly("is_direct", &File::is_direct)
      .def("fileno", &File::fileno);

  py::class_<Nested, Held<Nested>>(m, "Nested", "A resident nested matrix [rows, cols].")
      .def_static("from_rungs", &nested_from_rungs, py::arg("rungs").noconvert(), py::arg("rows"), py::arg("cols"),
                  py::arg("widths"), py::arg("scheme") = "nested", "Copies rungs as `quantize` returns them.")
      .def_static("from_file", &nested_from_file, py::arg("file"), py::arg("offset"), py::arg("lengths"),
                  py::arg("crcs"), py::arg("rows"), py::arg("cols"), py::arg("widths"), py::arg("verify"),
                  py::arg("name"), py::arg("scheme") = "nested", "Reads the rungs of a tensor into memory of its own.")
      .def_property_readonly("rows", [](const Nested& n) { return n.matrix.rows; })
      .def_property_readonly("cols", [](const Nested& n) { return n.matrix.cols; })
      .def_property_readonly("bits", [](const Nested& n) { return bits_of(n.matrix); })
      .def_property_readonly("bytes", &Nested::bytes)
      .def(
          "decode_rows",
          [](const Nested& n, const Array<int32_t>& ids, Array<float> out, float scale) {
            expect(ids, "ids", {-1});
            expect(out, "out", {ids.size(), n.matrix.cols});
            for (py::ssize_t i = 0; i < ids.size(); ++i) {
              if (ids.data()[i] < 0 || ids.data()[i] >= n.matrix.rows) {
                throw std::invalid_argument("decode_rows: row " + std::to_string(ids.data()[i]) + " is outside [0, " +
                                            std::to_string(n.matrix.rows) + ")");
              }
            }
            float* o = out.mutable_data();
            const int32_t* id = ids.data();
            py::gil_scoped_release release;
            for (py::ssize_t i = 0; i < ids.size(); ++i, o += n.matrix.cols) {
              decode_row(kernels(), n.matrix, id[i], o);
              for (int c = 0; scale != 1.0f && c < n.matrix.cols; ++c) o[c] *= scale;
            }
          },
          py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("scale") = 1.0f,
          "Writes rows `ids` [n] int32, times scale, to out [n, cols] float32.");

  m.def("read_f32", &read_f32, py::arg("file"), py::arg("offset"), py::arg("shape"), py::arg("crc"), py::arg("verify"),
        py::arg("name"), "Reads a float32 tensor.");

  m.def(
      "quantize",
      [](const Array<float>& w, const std::vector<uint8_t>& widths, const Array<float>& level_weights,
         const Array<float>& squares, const std::optional<Array<float>>& moments, int sweeps, int threads) {
        expect(w, "quantize", {-1, -1});
        expect(level_weights, "level_weights", {8});
        check_widths(Scheme::kNested, widths);
        const int rows = int(w.shape(0)), cols = int(w.shape(1));
        expect(squares, "squares", {cols});
        if (moments) expect(*moments, "moments", {cols, cols});
        std::vector<py::array_t<uint8_t>> rungs;
        std::vector<uint8_t*> outs;
        for (size_t r = 0; r < widths.size(); ++r) {
          rungs.emplace_back(py::ssize_t(rung_bytes(Scheme::kNested, rows, cols, widths[r], r == 0)));
          outs.push_back(rungs.back().mutable_data());
        }
        bool ok;
        {
          const float* data = w.data();
          const Objective objective{level_weights.data(), moments ? moments->data() : nullptr, squares.data(), sweeps};
          py::gil_scoped_release release;
          ThreadPool pool(threads);
          ok = quantize_nested(pool, data, rows, cols, widths, objective, outs);
        }
        if (!ok) throw std::invalid_argument("quantize: a weight is not finite, or too large for float16 scales");
        return rungs;
      },
      py::arg("w").noconvert(), py::arg("widths"), py::arg("level_weights").noconvert(), py::arg("squares").noconvert(),
      py::arg("moments").noconvert(), py::arg("sweeps"), py::arg("threads"),
      "Quantises w [rows, cols] float32 and returns its rungs, one uint8 array each; see quantize.h.");

  m.def(
      "memory_rate",
      [](size_t bytes, int threads) {
        py::gil_scoped_release release;
        return memory_rate(bytes, threads);
      },
      py::arg("bytes"), py::arg("threads"), "Bytes per second that `threads` threads read from memory together.");
  m.def(
      "disk_rate",
      [](const std::shared_ptr<File>& file, const std::vector<uint64_t>& offsets, size_t length, int num_readers) {
        py::gil_scoped_release release;
        return disk_rate(file, offsets, length, num_readers);
      },
      py::arg("file"), py::arg("offsets"), py::arg("length"), py::arg("num_readers"),
      "Bytes per second of reads of `length` at `offsets`, several at a time; both multiples of 4096.");

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

  m.def(
      "rope_table",
      [](const Array<float>& inv_freq, int pos, float scale, Array<float> cos, Array<float> sin) {
        expect(inv_freq, "inv_freq", {-1});
        expect(cos, "cos", {-1, inv_freq.size()});
        expect(sin, "sin", {cos.shape(0), inv_freq.size()});
        rope_table(inv_freq.data(), int(inv_freq.size()), pos, int(cos.shape(0)), scale, cos.mutable_data(),
                   sin.mutable_data());
      },
      py::arg("inv_freq").noconvert(), py::arg("pos"), py::arg("scale"), py::arg("cos").noconvert(),
      py::arg("sin").noconvert(), "cos and sin [T, half] for positions pos, pos + 1, …");

  py::class_<AttentionLayer>(m, "AttentionLayer", "Shape, biases and norms of one layer's attention.")
      .def(py::init([](int num_heads, int num_kv_heads, int head_dim, int window, float scale, const py::object& q_bias,
                       const py::object& k_bias, const py::object& v_bias, const py::object& q_norm,
                       const py::object& k_norm, bool norm_per_head, float norm_eps, float clip) {
             if (num_kv_heads < 1 || num_heads % num_kv_heads || head_dim < 1) {
               throw std::invalid_argument("AttentionLayer: expected heads that are a multiple of the kv heads");
             }
             auto a = std::make_unique<AttentionLayer>();
             const py::ssize_t q = num_heads * head_dim, kv = num_kv_heads * head_dim;
             a->parts.shape = {num_heads, num_kv_heads, head_dim, window, scale};
             a->parts.q_bias = a->keep(q_bias, "q_bias", q);
             a->parts.k_bias = a->keep(k_bias, "k_bias", kv);
             a->parts.v_bias = a->keep(v_bias, "v_bias", kv);
             a->parts.q_norm = a->keep(q_norm, "q_norm", norm_per_head ? head_dim : q);
             a->parts.k_norm = a->keep(k_norm, "k_norm", norm_per_head ? head_dim : kv);
             a->parts.norm_per_head = norm_per_head;
             a->parts.norm_eps = norm_eps;
             a->parts.clip = clip;
             return a;
           }),
           py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("window"),
           py::arg("scale"), py::arg("q_bias"), py::arg("k_bias"), py::arg("v_bias"), py::arg("q_norm"),
           py::arg("k_norm"), py::arg("norm_per_head"), py::arg("norm_eps"), py::arg("clip"));

  py::class_<Kv, Held<Kv>>(m, "KvLayer",
                           "Keys and values of one layer, of type f16 or q8_0; memory is taken as it is touched.")
      .def(py::init(&make_kv), py::kw_only(), py::arg("key_type"), py::arg("value_type"), py::arg("num_heads"),
           py::arg("capacity"), py::arg("head_dim"))
      .def_static("bytes", &kv_bytes, py::arg("type"), py::arg("num_heads"), py::arg("capacity"), py::arg("head_dim"),
                  "Bytes of the keys or the values of one layer.")
      .def_property_readonly(
          "content",
          [](const py::object& self) {
            const auto& kv = self.cast<const Kv&>();
            return lend(kv.memory.bytes(), kv.bytes, self);
          },
          "uint8 view of the keys and then the values, as kernels.h says.");

  m.def(
      "attention",
      [](Workspace& ws, const AttentionLayer& layer, Array<float> q, Array<float> k, Array<float> v, int pos,
         const Array<float>& cos, const Array<float>& sin, Kv& kv, Array<float> out) {
        AttentionParts parts = layer.parts;
        const AttentionShape& s = parts.shape;
        const py::ssize_t T = q.shape(0), half = s.head_dim / 2;
        expect(q, "q", {T, s.num_heads * s.head_dim});
        expect(k, "k", {T, s.num_kv_heads * s.head_dim});
        expect(v, "v", {T, s.num_kv_heads * s.head_dim});
        expect(out, "out", {T, s.num_heads * s.head_dim});
        expect(cos, "cos", {T, half});
        expect(sin, "sin", {T, half});
        if (kv.num_heads != s.num_kv_heads || kv.head_dim != s.head_dim) {
          throw std::invalid_argument("attention: the KV cache is of another shape");
        }
        parts.cos = cos.data();
        parts.sin = sin.data();
        float *qp = q.mutable_data(), *kp = k.mutable_data(), *vp = v.mutable_data(), *o = out.mutable_data();
        py::gil_scoped_release release;
        attention(ws, qp, kp, vp, int(T), pos, parts, kv.layer, o);
      },
      py::arg("ws"), py::arg("layer"), py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
      py::arg("pos"), py::arg("cos").noconvert(), py::arg("sin").noconvert(), py::arg("kv"), py::arg("out").noconvert(),
      "Stores k and v at pos, attends causally; q, k and v are changed.");

  m.def(
      "route",
      [](Workspace& ws, const Array<float>& x, const Array<float>& router, bool softmax_over_top_k, bool renormalise,
         Array<float> scores, Array<int32_t> experts, Array<float> gates) {
        expect(x, "route x", {-1, -1});
        expect(router, "router", {-1, x.shape(1)});
        expect(experts, "experts", {x.shape(0), -1});
        expect(gates, "gates", {x.shape(0), experts.shape(1)});
        expect(scores, "scores", {x.shape(0), router.shape(0)});
        const int T = int(x.shape(0)), cols = int(x.shape(1)), E = int(router.shape(0)), K = int(experts.shape(1));
        if (K < 1 || K > E) throw std::invalid_argument("route: expected 1 to " + std::to_string(E) + " experts");
        const float *a = x.data(), *w = router.data();
        int32_t* e = experts.mutable_data();
        float *g = gates.mutable_data(), *s = scores.mutable_data();
        py::gil_scoped_release release;
        route(ws, a, w, T, cols, {E, K, softmax_over_top_k, renormalise}, s, e, g);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("router").noconvert(), py::arg("softmax_over_top_k"),
      py::arg("renormalise"), py::arg("scores").noconvert(), py::arg("experts").noconvert(),
      py::arg("gates").noconvert());

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
         const std::vector<Array<float>>& routers, float eps, bool softmax_over_top_k, bool renormalise,
         Array<float> normed, Array<float> scores, Array<int32_t> experts, Array<float> gates) {
        expect(x, "look_ahead x", {1, -1});
        const py::ssize_t p = py::ssize_t(routers.size()), cols = x.shape(1), E = scores.shape(1), K = experts.shape(1);
        if (py::ssize_t(norms.size()) != p) throw std::invalid_argument("look_ahead: expected a norm per router");
        expect(normed, "normed", {p, cols});
        expect(scores, "scores", {p, -1});
        expect(experts, "experts", {p, -1});
        expect(gates, "gates", {p, K});
        if (K < 1 || K > E) throw std::invalid_argument("look_ahead: expected 1 to " + std::to_string(E) + " experts");
        std::vector<NextRouter> next;
        for (py::ssize_t i = 0; i < p; ++i) {
          expect(norms[size_t(i)], "norm", {cols});
          expect(routers[size_t(i)], "router", {E, cols});
          next.push_back({norms[size_t(i)].data(), routers[size_t(i)].data()});
        }
        const float* a = x.data();
        int32_t* e = experts.mutable_data();
        float *g = gates.mutable_data(), *s = scores.mutable_data(), *n = normed.mutable_data();
        py::gil_scoped_release release;
        look_ahead(ws, a, next, int(cols), eps, {int(E), int(K), softmax_over_top_k, renormalise}, n, s, e, g);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("norms"), py::arg("routers"), py::arg("eps"),
      py::arg("softmax_over_top_k"), py::arg("renormalise"), py::arg("normed").noconvert(),
      py::arg("scores").noconvert(), py::arg("experts").noconvert(), py::arg("gates").noconvert());

  m.def(
      "ffn",
      [](Workspace& ws, const Array<float>& x, const Nested& gate, const Nested& up, const Nested& down,
         Array<float> out, const py::object& hidden) {
        expect(x, "ffn x", {-1, gate.matrix.cols});
        expect(out, "ffn out", {x.shape(0), down.matrix.rows});
        if (up.matrix.rows != gate.matrix.rows || up.matrix.cols != gate.matrix.cols ||
            down.matrix.cols != gate.matrix.rows) {
          throw std::invalid_argument("ffn: the three matrices do not fit each other");
        }
        const float* a = x.data();
        const int T = int(x.shape(0));
        FfnUse use{{gate.matrix, up.matrix, down.matrix}, nullptr, T, out.mutable_data()};
        if (!hidden.is_none()) use.hidden = writable(hidden, "ffn hidden", {x.shape(0), gate.matrix.rows});
        py::gil_scoped_release release;
        run_ffns(ws, a, T, {use});
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate"), py::arg("up"), py::arg("down"),
      py::arg("out").noconvert(), py::arg("hidden") = py::none(),
      "out [T, D] = down(silu(gate x) * (up x)); hidden [T, H], if given, gets what down is applied to.");

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

  py::class_<Cache, Held<Cache>>(m, "Cache", "The expert cache; see csrc/cache.h.")
      .def(py::init([](const std::shared_ptr<File>& file, int num_experts, int hidden, int expert_hidden,
                       const std::vector<std::array<uint8_t, 3>>& rung_widths, const std::vector<uint32_t>& ends,
                       const Array<uint64_t>& offsets, const Array<uint32_t>& crcs, const Array<uint8_t>& rungs,
                       const std::vector<int>& layers, int max_level, size_t budget_bytes, bool verify, int num_readers,
                       const py::object& policy, const std::string& scheme_name) {
             const Scheme scheme = scheme_named(scheme_name);
             for (size_t m = 0; m < 3; ++m) {
               std::vector<uint8_t> widths;
               for (const auto& rung : rung_widths) widths.push_back(rung[m]);
               check_widths(scheme, widths);
             }
             expect(offsets, "offsets", {-1});
             expect(crcs, "crcs", {offsets.size(), py::ssize_t(ends.size())});
             expect(rungs, "rungs", {offsets.size()});
             ExpertTable table{{offsets.data(), offsets.data() + offsets.size()},
                               {crcs.data(), crcs.data() + crcs.size()},
                               {rungs.data(), rungs.data() + rungs.size()},
                               layers};
             ExpertShape shape{scheme, int(layers.size()), num_experts, hidden, expert_hidden, rung_widths, ends};
             return Held<Cache>(new Cache(file, std::move(shape), std::move(table), max_level, budget_bytes, verify,
                                          num_readers, policy_from(policy, size_t(offsets.size()))));
           }),
           py::kw_only(), py::arg("file"), py::arg("num_experts"), py::arg("hidden"), py::arg("expert_hidden"),
           py::arg("rung_widths"), py::arg("ends"), py::arg("offsets").noconvert(), py::arg("crcs").noconvert(),
           py::arg("rungs").noconvert(), py::arg("layers"), py::arg("max_level"), py::arg("budget_bytes"),
           py::arg("verify"), py::arg("num_readers"), py::arg("policy"), py::arg("scheme") = "nested")
      .def(
          "begin",
          [](Cache& c, const Array<int32_t>& experts, const Array<int8_t>& levels, const Array<int32_t>& offsets,
             int num_tokens, const std::optional<Array<int32_t>>& ahead,
             const std::optional<Array<int8_t>>& ahead_levels) {
            expect(experts, "experts", {-1});
            expect(levels, "levels", {experts.size()});
            expect(offsets, "offsets", {experts.size() + 1});
            Wish later{nullptr, nullptr, 0};
            if (ahead.has_value() != ahead_levels.has_value()) {
              throw std::invalid_argument("begin: expected experts ahead and their levels together");
            }
            if (ahead) {
              expect(*ahead, "ahead", {-1});
              expect(*ahead_levels, "ahead_levels", {ahead->size()});
              later = {ahead->data(), ahead_levels->data(), int(ahead->size())};
            }
            const Wish now{experts.data(), levels.data(), int(experts.size())};
            const int32_t* o = offsets.data();
            py::gil_scoped_release release;
            c.begin(now, o, num_tokens, later);
          },
          py::arg("experts").noconvert(), py::arg("levels").noconvert(), py::arg("offsets").noconvert(),
          py::arg("num_tokens"), py::arg("ahead").noconvert() = py::none(),
          py::arg("ahead_levels").noconvert() = py::none())
      .def("next",
           [](Cache& c) {
             std::vector<int> group;
             {
               py::gil_scoped_release release;
               c.next(&group);
             }
             return group;
           })
      .def("close", &Cache::close, py::call_guard<py::gil_scoped_release>())
      .def("shrink", &Cache::shrink, py::arg("expert"), py::arg("level"))
      .def("check_integrity", &Cache::check_integrity)
      .def("slot_bytes", &Cache::slot_bytes, py::arg("level"))
      .def_property_readonly("residency",
                             [](py::object self) {
                               const auto& r = self.cast<Cache&>().residency();
                               return lend(r.data(), r.size(), self);
                             })
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
          "How much each expert was used, float64 [n]; one use of now counts 1, one of 64 tokens ago half.")
      .def_property_readonly(
          "progress", [](const Cache& c) { return py::make_tuple(c.loader_stats().bytes, c.stats().wait_s); },
          "Bytes read and seconds waited since the start: what a trace asks for after every layer.")
      .def_property_readonly("stats",
                             [](const Cache& c) {
                               const CacheStats s = c.stats();
                               const LoaderStats l = c.loader_stats();
                               py::dict d;
                               d["hits"] = s.hits;
                               d["misses"] = s.misses;
                               d["evictions"] = s.evictions;
                               d["bits"] = s.bits;
                               d["ahead_reads"] = s.ahead_reads;
                               d["ahead_used"] = s.ahead_used;
                               d["ahead_late"] = s.ahead_late;
                               d["wait_s"] = s.wait_s;
                               d["resident_bytes"] = s.resident_bytes;
                               d["resident_experts"] = s.resident_experts;
                               d["committed_bytes"] = s.committed_bytes;
                               d["peak_bytes"] = s.peak_bytes;
                               d["budget_bytes"] = s.budget_bytes;
                               d["bytes_read"] = l.bytes;
                               d["reads"] = l.reads;
                               d["read_s"] = l.busy_s;
                               return d;
                             })
      .def(
          "decode",
          [](Cache& c, int expert, int level) {
            const int32_t e = expert;
            if (level < 1 || level > kMaxRungs) throw std::invalid_argument("decode: no such level");
            const int8_t l = int8_t(level);
            const int32_t offsets[] = {0, 1};
            std::vector<int> group;
            c.begin({&e, &l, 1}, offsets, 1, {nullptr, nullptr, 0});
            const auto close = [](Cache* open) { open->close(); };
            const std::unique_ptr<Cache, decltype(close)> request(&c, close);
            c.next(&group);
            const ExpertView v = c.view(expert, level);
            std::vector<py::array_t<float>> out;
            for (const NestedMatrix* w : {&v.gate, &v.up, &v.down}) {
              py::array_t<float> a({py::ssize_t(w->rows), py::ssize_t(w->cols)});
              for (int r = 0; r < w->rows; ++r) decode_row(kernels(), *w, r, a.mutable_data() + size_t(r) * w->cols);
              out.push_back(std::move(a));
            }
            return out;
          },
          py::arg("expert"), py::arg("level"), "Loads an expert and returns gate, up and down as floats.");

  m.def(
      "expert_ffn",
      [](Workspace& ws, const Array<float>& x, const Cache& cache, const Array<int32_t>& experts,
         const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
         const std::vector<int>& group, Array<float> parts, const py::object& hidden) {
        const int d = cache.shape().hidden, h = cache.shape().expert_hidden;
        expect(x, "expert_ffn x", {-1, d});
        expect(experts, "experts", {-1});
        expect(levels, "levels", {experts.size()});
        expect(offsets, "offsets", {experts.size() + 1});
        expect(parts, "parts", {-1, d});
        const int32_t *o = offsets.data(), *t = tokens.data();
        const py::ssize_t T = x.shape(0), n = experts.size();
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
          uses.push_back({cache.view(experts.data()[i], levels.data()[i]), t + o[i], o[i + 1] - o[i],
                          parts.mutable_data() + size_t(o[i]) * d, inner ? inner + size_t(o[i]) * h : nullptr});
        }
        const float* a = x.data();
        py::gil_scoped_release release;
        run_ffns(ws, a, int(T), uses);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("experts").noconvert(),
      py::arg("levels").noconvert(), py::arg("offsets").noconvert(), py::arg("tokens").noconvert(), py::arg("group"),
      py::arg("parts").noconvert(), py::arg("hidden") = py::none(),
      "Runs the experts at positions `group` of a plan on their tokens; part rows are those of `offsets`, as are those "
      "of hidden [m, H], which gets what each w_down is applied to.");
}
