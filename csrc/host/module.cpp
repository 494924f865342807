// fused_ops._host: what was built, and the planners, as plain functions (no tensors, no torch).
#include <pybind11/pybind11.h>

#include <string>

#include "attention/decode_plan.h"
#include "facts.h"
#include "rnn/layer_plan.h"

namespace py = pybind11;

namespace {

py::dict plan_rnn_layer(const std::string& mode, bool backward, int64_t hidden, int64_t batch, int64_t directions,
                        int64_t element_bytes, int64_t multiprocessors, int64_t shared_bytes, int64_t capability,
                        int64_t projected, bool layer_norm) {
  using namespace fused_ops::layers;
  const bool rnn = mode == "rnn_tanh" || mode == "rnn_relu";
  if (!rnn && mode != "gru" && mode != "lstm") {
    throw py::value_error("mode must be rnn_tanh, rnn_relu, gru or lstm, got " + mode);
  }
  const Kind kind = rnn ? Kind::rnn : mode == "gru" ? Kind::gru : Kind::lstm;
  const bool projects = projected > 0;
  if (projects && (kind != Kind::lstm || projected > hidden)) {
    throw py::value_error("projected must be 0, or of an lstm at most hidden, got " + std::to_string(projected));
  }
  const Shape shape{kind, hidden, projects ? projected : hidden, element_bytes, projects, layer_norm};
  const LayerPlan plan = plan_rnn_layer(shape, backward ? Pass::backward : Pass::forward, batch, directions,
                                        {multiprocessors, shared_bytes, capability});
  constexpr const char* kDesigns[] = {"none", "grid", "cluster"};
  py::dict found;
  found["design"] = kDesigns[static_cast<int>(plan.design)];
  found["units"] = plan.units, found["features"] = plan.features;
  found["rows"] = plan.rows, found["slices"] = plan.slices;
  found["groups"] = plan.groups, found["at_once"] = plan.at_once, found["launches"] = plan.launches();
  found["splits"] = plan.splits, found["shared_bytes"] = plan.shared_bytes, found["blocks"] = plan.blocks;
  return found;
}

}  // namespace

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

  m.def("plan_rnn_layer", plan_rnn_layer, py::arg("mode"), py::arg("backward"), py::arg("hidden"), py::arg("batch"),
        py::arg("directions"), py::arg("element_bytes"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("capability"), py::arg("projected") = 0, py::arg("layer_norm") = false,
        "How the CUDA kernels spread one RNN layer's recurrence over a chip, as a dict. design: \"cluster\", \"grid\" or\n"
        "\"none\" (it does not fit); units, and features of h, of a block and rows of the batch of a group; slices: blocks of\n"
        "a group; groups in all, at_once in one launch, and launches; splits: in how many parts a product is summed;\n"
        "shared_bytes of a block, blocks of the largest launch. multiprocessors, shared_bytes (of one block) and capability\n"
        "(90 for 9.0) are the chip's. projected: features that an LSTM projects its state to, or 0. design and splits do not\n"
        "depend on batch, with a layer norm neither do units.");
}
