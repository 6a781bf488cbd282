// The Python module edgemoe._core: this folder is the only one that knows Python. Arrays are lent for one call and
// never copied: a wrong dtype or a strided array is an error. The GIL is released around the work.
#include <memory>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "crc32c.h"
#include "error.h"
#include "file.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "roof.h"

using namespace edgemoe;

namespace {

std::string compiler() {
#ifdef __clang__
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#else
  return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#endif
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of edgemoe: kernels, reads and the expert cache.";

  py::register_exception_translator([](std::exception_ptr p) {
    const auto raise = [](const char* type, const char* what) {
      py::object e = py::module_::import("edgemoe.errors").attr(type);
      // A file's name may not be valid UTF-8.
      PyErr_SetObject(e.ptr(), py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(what)).ptr());
    };
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FormatError& e) {
      raise("FormatError", e.what());
    } catch (const OutOfBudget& e) {
      raise("OutOfBudget", e.what());
    } catch (const ReadError& e) {
      raise("ReadError", e.what());
    } catch (const RangeError& e) {
      raise("RangeError", e.what());
    } catch (const DeviceError& e) {
      raise("DeviceError", e.what());
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
  m.def("compiler", &compiler, "The compiler that built this module.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("system_page", &system_page, "The unit in which the system gives memory, at least 4096 bytes.");
  m.def(
      "usable_isas", [] { return std::string(usable_isas()); },
      "The instruction sets that this CPU can run, best first, joined by spaces.");
  m.def("use_isa", [](const std::string& name) { use_isa(name.c_str()); }, py::arg("name"));

  bind_matrix(m);
  bind_quantize(m);
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
      py::arg("file").none(false), py::arg("offsets"), py::arg("length"), py::arg("num_readers"),
      "Bytes per second of reads of `length` bytes at `offsets`, several at once; all multiples of 4096.");

  bind_device(m);  // before the cache, whose signatures name its classes
  bind_cache(m);
  bind_use_rows(m);
  bind_guesses(m);
  bind_ops(m);
  bind_routing(m);
  bind_ffn(m);
  bind_chosen_ffn(m);
  bind_attention(m);
  bind_latent(m);
  bind_mixers(m);
  bind_device_ops(m);
  bind_device_attention(m);
  bind_device_mixers(m);
  bind_device_experts(m);
}
