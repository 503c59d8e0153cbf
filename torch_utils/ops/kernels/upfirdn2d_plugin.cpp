// SPDX-License-Identifier: Apache-2.0
// upfirdn2d_plugin.upfirdn2d: the binding of upfirdn2d.cu.
#include "plugin.h"

// in, out: samples, channels, height, width and their strides. factors: up x, up y, down x, down y.
const char* launch_upfirdn2d(
    int type, const void* x, const float* filter, void* y, const long long in[8], const long long out[8],
    const int factors[4], long long padx, long long pady, int taps_x, int taps_y, int flip, int channels_last,
    double gain, void* stream);

// x: [N,C,H,W] in any layout. f: float32 [taps_y,taps_x]. The rest as in ops/upfirdn2d.py.
static at::Tensor upfirdn2d(
    at::Tensor x, at::Tensor f, int64_t upx, int64_t upy, int64_t downx, int64_t downy, int64_t padx0, int64_t padx1,
    int64_t pady0, int64_t pady1, bool flip, double gain)
{
    TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x must be a CUDA tensor [N,C,H,W]");
    TORCH_CHECK(
        f.dim() == 2 && f.dtype() == at::kFloat && f.device() == x.device() && f.numel(),
        "f must be a float32 tensor [height,width] on x's device");
    TORCH_CHECK(upx >= 1 && upy >= 1 && downx >= 1 && downy >= 1, "up and down must be at least 1");
    f = f.contiguous();
    const int64_t room_x = x.size(3) * upx + padx0 + padx1 - f.size(1);
    const int64_t room_y = x.size(2) * upy + pady0 + pady1 - f.size(0);
    TORCH_CHECK(room_x >= 0 && room_y >= 0, "the filter does not fit into the padded image");
    const bool channels_last = x.size(1) > 1 && x.stride(1) == 1;
    c10::DeviceGuard guard(x.device());
    at::Tensor y = at::empty(
        {x.size(0), x.size(1), room_y / downy + 1, room_x / downx + 1}, x.options(),
        channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
    if (!y.numel())
        return y;
    long long in[8], out[8];
    for (int i = 0; i < 4; i++) {
        in[i] = x.size(i);
        in[i + 4] = x.stride(i);
        out[i] = y.size(i);
        out[i + 4] = y.stride(i);
    }
    const int factors[4] = {(int)upx, (int)upy, (int)downx, (int)downy};
    plugin::check(launch_upfirdn2d(
        plugin::type_number(x), x.const_data_ptr(), f.const_data_ptr<float>(), y.data_ptr(), in, out, factors, padx0,
        pady0, (int)f.size(1), (int)f.size(0), flip, channels_last, gain, plugin::current_stream()));
    return y;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("upfirdn2d", &upfirdn2d); }
