// What each file of this folder adds to the module `edgemoe._core`.
#pragma once

#include <pybind11/pybind11.h>

namespace edgemoe {

void bind_matrix(pybind11::module_& m);                         ///< File, Nested, StoredRows, read_f32
void bind_quantize(pybind11::module_& m);                       ///< quantize
void bind_cache(pybind11::module_& m);                          ///< Cache
void bind_cache_requests(const pybind11::object& cache_class);  ///< its requests; bind_cache calls this
void bind_use_rows(pybind11::module_& m);                       ///< UseRows
void bind_guesses(pybind11::module_& m);                        ///< what schedulers compute for all experts of a layer
void bind_ops(pybind11::module_& m);                            ///< Workspace, products, operations on rows
void bind_routing(pybind11::module_& m);                        ///< RouteRule, routers
void bind_ffn(pybind11::module_& m);                            ///< FFNs, experts
void bind_chosen_ffn(pybind11::module_& m);                     ///< experts that run without a request
void bind_attention(pybind11::module_& m);                      ///< Rope, AttentionLayer, KvLayer, attention
void bind_latent(pybind11::module_& m);                         ///< LatentLayer, latent_attention

void bind_mixers(pybind11::module_& m);  ///< recurrent mixers, gates

void bind_device(pybind11::module_& m);            ///< Device, DeviceArray, DeviceMatrix, DeviceKvLayer
void bind_device_ops(pybind11::module_& m);        ///< DeviceWorkspace, products, operations on rows
void bind_device_attention(pybind11::module_& m);  ///< DeviceAttention, DeviceLatents, attention to both
void bind_device_mixers(pybind11::module_& m);     ///< recurrent mixers, gates
void bind_device_experts(pybind11::module_& m);    ///< DeviceTable, experts

}  // namespace edgemoe
