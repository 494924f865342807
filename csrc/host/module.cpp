// fused_ops._host: what was built, and the planners, as plain functions (no tensors, no torch).
#include <pybind11/pybind11.h>

#include "attention/decode_plan.h"
#include "facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.attr("compiler") = FUSED_OPS_COMPILER;
  m.attr("nvcc_version") = FUSED_OPS_NVCC;
  m.attr("arch_list") = FUSED_OPS_ARCH_LIST;
  m.attr("flags") = FUSED_OPS_FLAGS;
  m.attr("torch_version") = FUSED_OPS_TORCH;

  m.def("plan_decode", [](int64_t batch, int64_t kv_heads, int64_t capacity, int64_t multiprocessors) {
    const auto plan = fused_ops::plan_decode(batch, kv_heads, capacity, multiprocessors);
    return py::make_tuple(plan.splits, plan.keys_per_split);
  }, py::arg("batch"), py::arg("kv_heads"), py::arg("capacity"), py::arg("multiprocessors"),
     "(splits, keys per split) of the split-KV decode kernel.");
}
