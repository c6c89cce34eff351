// partune._C: what this build is and what this machine has. Tensor work goes through torch.ops.partune.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "schema.h"

#ifdef PARTUNE_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

py::list schemas() {
  py::list list;
  for (int i = 0; i < partune::kSchemaCount; ++i) {
    list.append(py::make_tuple(partune::kSchemas[i].family, partune::kSchemas[i].text));
  }
  return list;
}

// What was decided when this module was compiled.
py::dict build_info() {
  py::dict info;
  info["version"] = PARTUNE_VERSION;
  info["compiler"] = __VERSION__;
#ifdef PARTUNE_WITH_CUDA
  info["cuda"] = partune::cuda_compiled_version();
  info["cuda_archs"] = PARTUNE_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(partune, library) {
  for (int i = 0; i < partune::kSchemaCount; ++i) library.def(partune::kSchemas[i].text);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "partune's native core: build facts and devices. Its ops are torch.ops.partune.*";
  module.def("schemas", &schemas, "(family, schema) of every op.");
  module.def("build_info", &build_info, "What was decided when this module was compiled.");
  module.def(
      "cpu_isa", [] { return partune::isa_name(partune::cpu_isa()); },
      "Instruction set that the CPU kernels run with.");
  module.def(
      "best_cpu_isa", [] { return partune::isa_name(partune::best_isa()); },
      "Best instruction set that this machine has.");
  module.def("cpu_is_amd", &partune::cpu_is_amd, "Whether AMD made this machine's processor.");
#ifdef PARTUNE_WITH_CUDA
  module.def(
      "cuda_probe",
      [] {
        const partune::CudaProbe probe = partune::cuda_probe();
        py::list devices;
        for (const partune::CudaDevice& device : probe.devices) {
          devices.append(py::make_tuple(device.name, device.major, device.minor,
                                        partune::has_cuda_binary(device.major, device.minor)));
        }
        py::dict result;
        result["driver"] = probe.driver_version;
        result["error"] = probe.error;
        result["devices"] = devices;
        return result;
      },
      "Driver, devices (name, major, minor, whether this build has a binary for it), or why there are none.");
  module.def("has_cuda_binary", &partune::has_cuda_binary, py::arg("major"), py::arg("minor"),
             "Whether this build has a binary, or PTX, for a compute capability.");
  module.def("register_cuda", &partune::register_cuda,
             "Registers the CUDA kernels with torch's dispatcher. Called once, by partune._native.");
#endif
}
