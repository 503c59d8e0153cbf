// SPDX-License-Identifier: Apache-2.0
// y = clamp(f(x + b) * gain), its gradient and the gradient of that, for the nine activations f.
// A thread handles N neighbours in memory. Traffic: the operands once, the result once.
#include "scalar.cuh"

enum Activation { LINEAR = 1, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

#define SELU_SCALE 1.0507009873554804934193349852946
#define SELU_ALPHA 1.6732632423543772848170429916717

template <class F> __device__ __forceinline__ F logistic(F t) { return F(1) / (F(1) + exp(-t)); }

// f(t)
template <class F> __device__ __forceinline__ F activation(int act, F t, F alpha)
{
    switch (act) {  // comparisons are such that NaN stays NaN
    case RELU: return t < 0 ? F(0) : t;
    case LRELU: return t < 0 ? alpha * t : t;
    case TANH: return tanh(t);
    case SIGMOID: return logistic(t);
    case ELU: return t < 0 ? expm1(t) : t;
    case SELU: return F(SELU_SCALE) * (t < 0 ? F(SELU_ALPHA) * expm1(t) : t);
    case SOFTPLUS: return (t < 0 ? F(0) : t) + log1p(exp(-fabs(t)));
    case SWISH: return t * logistic(t);
    default: return t;
    }
}

// f'(t), from f = f(t); only SWISH reads t, and it does not read f.
template <class F> __device__ __forceinline__ F first_derivative(int act, F t, F f, F alpha)
{
    switch (act) {
    case RELU: return f > 0 ? F(1) : F(0);
    case LRELU: return f > 0 ? F(1) : alpha;
    case TANH: return F(1) - f * f;
    case SIGMOID: return f * (F(1) - f);
    case ELU: return f > 0 ? F(1) : f + F(1);
    case SELU: return f > 0 ? F(SELU_SCALE) : f + F(SELU_SCALE * SELU_ALPHA);
    case SOFTPLUS: return -expm1(-f);
    case SWISH: {
        const F s = logistic(t);
        return s * (F(1) + t * (F(1) - s));
    }
    default: return F(1);
    }
}

// f''(t), likewise.
template <class F> __device__ __forceinline__ F second_derivative(int act, F t, F f)
{
    switch (act) {
    case TANH: return F(-2) * f * (F(1) - f * f);
    case SIGMOID: return f * (F(1) - f) * (F(1) - F(2) * f);
    case ELU: return f < 0 ? f + F(1) : F(0);
    case SELU: return f < 0 ? f + F(SELU_SCALE * SELU_ALPHA) : F(0);
    case SOFTPLUS: return -expm1(-f) * exp(-f);
    case SWISH: {
        const F s = logistic(t);
        return s * (F(1) - s) * (F(2) + t * (F(1) - F(2) * s));
    }
    default: return F(0);
    }
}

// grad 0: y. grad 1: x is dy, the result x * dy/dt. grad 2: x is the gradient of that, the result
// x * dy * d2y/dt2. b may be null; xref (read if act is SWISH), yref (otherwise, may be null for LINEAR without
// clamp) and dy may be null where they are not read. Element i has the bias (i / step) % channels.
// clamp < 0: none. All of x, xref, yref, dy and result have `count` elements in one order.
template <class T, class I, int grad, int N>
__device__ __forceinline__ void bias_act_element(
    const T* x, const T* b, const T* xref, const T* yref, const T* dy, T* result, long long count, long long step,
    long long channels, int act, double alpha, double gain, double clamp)
{
    typedef typename Compute<T>::type F;
    const I first = ((I)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (first >= (I)count)
        return;
    const int valid = (I)count - first < N ? (int)((I)count - first) : N;
    const bool from_input = act == SWISH;
    F in[N], inner[N], outer[N], upper[N], out[N];
    load(in, x + first, valid);
    if (grad > 0 && from_input)
        load(inner, xref + first, valid);
    if (grad > 0 && !from_input && yref)
        load(outer, yref + first, valid);
    if (grad == 2)
        load(upper, dy + first, valid);

    const F limit = widen(narrow<T>(F(clamp)));  // as stored: what was clamped compares equal
    I row = 0, left = 1;
    if (b) {
        row = first / (I)step;
        left = (I)step - (first - row * (I)step);  // elements until the next channel
        row %= (I)channels;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        F bias = 0;
        if (b) {
            bias = widen(b[row]);
            if (--left == 0) {
                left = (I)step;
                row = row + 1 == (I)channels ? 0 : row + 1;
            }
        }
        if (grad == 0) {
            const F y = activation(act, in[i] + bias, F(alpha)) * F(gain);
            out[i] = clamp < 0 ? y : y > F(clamp) ? F(clamp) : y < -F(clamp) ? -F(clamp) : y;
        } else {
            const F t = from_input ? inner[i] + bias : F(0);
            const F y = from_input ? activation(act, t, F(alpha)) * F(gain) : yref ? outer[i] : F(0);
            const F f = from_input ? F(0) : y / F(gain);
            const F slope = grad == 1 ? first_derivative(act, t, f, F(alpha)) : upper[i] * second_derivative(act, t, f);
            out[i] = clamp < 0 || fabs(y) < limit ? in[i] * slope * F(gain) : F(0);
        }
    }
    store(result + first, out, valid);
}

#ifdef SCALAR  // one variant, chosen by macros
extern "C" __global__ void __launch_bounds__(256) bias_act(
    const SCALAR* x, const SCALAR* b, const SCALAR* xref, const SCALAR* yref, const SCALAR* dy, SCALAR* result,
    long long count, long long step, long long channels, double alpha, double gain, double clamp)
{
    bias_act_element<SCALAR, INDEX, GRAD, VEC>(
        x, b, xref, yref, dy, result, count, step, channels, ACT, alpha, gain, clamp);
}
#endif
