// SPDX-License-Identifier: Apache-2.0
// upfirdn2d.cu for a build ahead of use: all types, the general kernel. No PyTorch in here.
#include "upfirdn2d.cu"

struct Factors { int upx, upy, downx, downy; };

template <class T>
__global__ void __launch_bounds__(256) upfirdn2d_kernel(
    const T* x, const float* filter, T* y, Layout in, Layout out, Factors by, long long padx, long long pady,
    int taps_x, int taps_y, int flip, int channels_last, double gain)
{
    upfirdn2d_point<T, long long>(
        x, filter, y, in, out, by.upx, by.upy, by.downx, by.downy, padx, pady, taps_x, taps_y, flip, channels_last,
        gain);
}

template <class T>
static void launch(
    const void* x, const float* filter, void* y, Layout in, Layout out, Factors by, long long padx, long long pady,
    int taps_x, int taps_y, int flip, int channels_last, double gain, cudaStream_t stream)
{
    const long long count = out.samples * out.channels * out.height * out.width;
    upfirdn2d_kernel<T><<<(unsigned int)((count + 255) / 256), 256, 0, stream>>>(
        (const T*)x, filter, (T*)y, in, out, by, padx, pady, taps_x, taps_y, flip, channels_last, gain);
}

// Returns null, or what went wrong. type: see plugin.h.
const char* launch_upfirdn2d(
    int type, const void* x, const float* filter, void* y, const long long in[8], const long long out[8],
    const int factors[4], long long padx, long long pady, int taps_x, int taps_y, int flip, int channels_last,
    double gain, void* stream)
{
    static decltype(&launch<float>) const table[4] = {
        launch<float16>, launch<bfloat16>, launch<float>, launch<double>};
    const Layout from = {in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]};
    const Layout to = {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
    const Factors by = {factors[0], factors[1], factors[2], factors[3]};
    table[type](
        x, filter, y, from, to, by, padx, pady, taps_x, taps_y, flip, channels_last, gain, (cudaStream_t)stream);
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
