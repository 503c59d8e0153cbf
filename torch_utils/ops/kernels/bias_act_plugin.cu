// SPDX-License-Identifier: Apache-2.0
// bias_act.cu for a build ahead of use: all types, the activation chosen at run time. No PyTorch in here.
#include "bias_act.cu"

template <class T, int grad, int N>
__global__ void __launch_bounds__(256) bias_act_kernel(
    const T* x, const T* b, const T* xref, const T* yref, const T* dy, T* y, long long count, long long step,
    long long channels, int act, double alpha, double gain, double clamp)
{
    bias_act_element<T, unsigned long long, grad, N>(
        x, b, xref, yref, dy, y, count, step, channels, act, alpha, gain, clamp);
}

template <class T, int grad>
static void launch(
    const void* x, const void* b, const void* xref, const void* yref, const void* dy, void* y, long long count,
    long long step, long long channels, int act, double alpha, double gain, double clamp, cudaStream_t stream)
{
    const int wide = 16 / sizeof(T);
    unsigned long long bits = 0;
    for (const void* pointer : {x, xref, yref, dy, (const void*)y})
        bits |= (unsigned long long)pointer;
    const bool aligned = bits % 16 == 0;
    const auto kernel = aligned ? bias_act_kernel<T, grad, wide> : bias_act_kernel<T, grad, 1>;
    const long long threads = aligned ? (count + wide - 1) / wide : count;
    kernel<<<(unsigned int)((threads + 255) / 256), 256, 0, stream>>>(
        (const T*)x, (const T*)b, (const T*)xref, (const T*)yref, (const T*)dy, (T*)y, count, step, channels, act,
        alpha, gain, clamp);
}

// Returns null, or what went wrong. type: see plugin.h.
const char* launch_bias_act(
    int type, int grad, const void* x, const void* b, const void* xref, const void* yref, const void* dy, void* y,
    long long count, long long step, long long channels, int act, double alpha, double gain, double clamp, void* stream)
{
#define ROW(T) { launch<T, 0>, launch<T, 1>, launch<T, 2> }
    static decltype(&launch<float, 0>) const table[4][3] = {ROW(float16), ROW(bfloat16), ROW(float), ROW(double)};
#undef ROW
    table[type][grad](
        x, b, xref, yref, dy, y, count, step, channels, act, alpha, gain, clamp, (cudaStream_t)stream);
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
