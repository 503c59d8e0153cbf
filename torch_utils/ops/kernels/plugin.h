// SPDX-License-Identifier: Apache-2.0
// Shared by the two bindings: all that they need from PyTorch.
#pragma once
#include <torch/extension.h>

namespace plugin {

// PyTorch's current CUDA stream, asked for through Python, whose interface is the same in every release.
inline void* current_stream()
{
    return reinterpret_cast<void*>(
        pybind11::module_::import("torch.cuda").attr("current_stream")().attr("cuda_stream").cast<uintptr_t>());
}

// The number by which the launchers know a type.
inline int type_number(const at::Tensor& x)
{
    switch (x.scalar_type()) {
    case at::kHalf: return 0;
    case at::kBFloat16: return 1;
    case at::kFloat: return 2;
    case at::kDouble: return 3;
    default: TORCH_CHECK(false, "x is ", x.scalar_type(), "; accepted: float16, bfloat16, float32, float64");
    }
}

// An empty tensor stands for none.
inline const void* pointer(const at::Tensor& t) { return t.numel() ? t.const_data_ptr() : nullptr; }

inline void check(const char* error) { TORCH_CHECK(!error, "launch failed: ", error); }

}  // namespace plugin
