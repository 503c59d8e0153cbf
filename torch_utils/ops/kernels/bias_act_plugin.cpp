// SPDX-License-Identifier: Apache-2.0
// bias_act_plugin.bias_act: the binding of bias_act.cu.
#include "plugin.h"

const char* launch_bias_act(
    int type, int grad, const void* x, const void* b, const void* xref, const void* yref, const void* dy, void* y,
    long long count, long long step, long long channels, int act, double alpha, double gain, double clamp, void* stream);

// x, xref, yref and dy are dense, in one layout; an empty b, xref, yref or dy stands for none. What grad and the
// references mean is said in bias_act.cu. clamp < 0: none.
static at::Tensor bias_act(
    at::Tensor x, at::Tensor b, at::Tensor xref, at::Tensor yref, at::Tensor dy, int64_t grad, int64_t dim, int64_t act,
    double alpha, double gain, double clamp)
{
    TORCH_CHECK(x.is_cuda() && x.is_non_overlapping_and_dense(), "x must be a dense CUDA tensor");
    TORCH_CHECK(grad >= 0 && grad <= 2, "grad is ", grad, "; accepted: 0, 1, 2");
    TORCH_CHECK(act >= 1 && act <= 9, "act is ", act, "; accepted: 1 to 9");
    for (const at::Tensor& t : {xref, yref, dy})
        TORCH_CHECK(
            !t.numel() || (t.sizes() == x.sizes() && t.dtype() == x.dtype() && t.device() == x.device()
                           && t.strides() == x.strides()),
            "xref, yref and dy must be like x, or empty");
    long long step = 1, channels = 1;
    if (b.numel()) {
        TORCH_CHECK(dim >= -x.dim() && dim < x.dim(), "dim ", dim, " does not exist in x");
        TORCH_CHECK(
            b.dim() == 1 && b.numel() == x.size(dim) && b.is_contiguous() && b.dtype() == x.dtype()
                && b.device() == x.device(),
            "b must be a contiguous vector of x's type, with as many values as x has along dim");
        channels = b.numel();
        step = std::max<long long>(x.stride(dim), 1);
    }
    c10::DeviceGuard guard(x.device());
    at::Tensor y = at::empty_like(x);
    if (x.numel())
        plugin::check(launch_bias_act(
            plugin::type_number(x), (int)grad, plugin::pointer(x), plugin::pointer(b), plugin::pointer(xref),
            plugin::pointer(yref), plugin::pointer(dy), y.data_ptr(), x.numel(), step, channels, (int)act, alpha, gain,
            clamp, plugin::current_stream()));
    return y;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("bias_act", &bias_act); }
