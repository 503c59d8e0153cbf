// SPDX-License-Identifier: Apache-2.0
// Up-sampling, filtering and down-sampling of images, with strides for any layout.
//   out[o] = gain * sum_k f[k] * x[(o * down + k - pad) / up]      over the k that divide, along y and x
// Two kernels. `upfirdn2d_tile` knows factors and filter size at compile time: a thread reads the patch of x that a
// tile of results needs once, each value going to all the results it belongs to, and every index is a constant.
// `upfirdn2d_any` takes them as arguments, one result a thread. Traffic: x once (neighbouring threads share the
// patches' rims through the caches), the result once.
#include "scalar.cuh"

struct Layout { long long samples, channels, height, width, sn, sc, sy, sx; };

// filter: float [fh, fw]; reversed where flip is 0, since the sum above correlates.
template <class T, class I>
__device__ __forceinline__ void upfirdn2d_point(
    const T* x, const float* filter, T* result, Layout in, Layout out, int upx, int upy, int downx, int downy,
    long long padx, long long pady, int fw, int fh, int flip, int channels_last, double gain)
{
    typedef typename Compute<T>::type F;
    I id = (I)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= (I)(out.samples * out.channels * out.height * out.width))
        return;
    I c = 0;
    if (channels_last) {
        c = id % (I)out.channels;
        id /= (I)out.channels;
    }
    const I ox = id % (I)out.width, rest = id / (I)out.width;
    const I oy = rest % (I)out.height;
    I n = rest / (I)out.height;
    if (!channels_last) {
        c = n % (I)out.channels;
        n /= (I)out.channels;
    }
    const I px = ox * downx - (I)padx, py = oy * downy - (I)pady;  // of the first tap, on the up-sampled image
    const int kx0 = (int)((upx - px % upx) % upx), ky0 = (int)((upy - py % upy) % upy);  // first tap on a sample
    F sum = 0;
    const T* image = x + (n * (I)in.sn + c * (I)in.sc);
    for (int ky = ky0; ky < fh; ky += upy) {
        const I iy = (py + ky) / upy;
        if (py + ky < 0 || iy >= (I)in.height)
            continue;
        for (int kx = kx0; kx < fw; kx += upx) {
            const I ix = (px + kx) / upx;
            if (px + kx < 0 || ix >= (I)in.width)
                continue;
            const int tap = ky * fw + kx;
            sum += F(filter[flip ? tap : fw * fh - 1 - tap]) * widen(image[iy * (I)in.sy + ix * (I)in.sx]);
        }
    }
    result[n * (I)out.sn + c * (I)out.sc + oy * (I)out.sy + ox * (I)out.sx] = narrow<T>(sum * F(gain));
}

#ifdef SCALAR  // one variant, chosen by macros
#ifdef TX
// Tiles of TY x TX results of VEC channels; TY * DOWNY is a multiple of UPY, likewise x, so that all tiles see the
// same pattern. startx, starty: the column and row of x where the patch of the first tile begins; PHASEX, PHASEY:
// how many positions of the up-sampled image that is after the first tap: pad = UP * -start - PHASE.
extern "C" __global__ void __launch_bounds__(256) upfirdn2d_tile(
    const SCALAR* x, const float* filter, SCALAR* result, Layout in, Layout out, long long startx, long long starty,
    double gain)
{
    typedef Compute<SCALAR>::type F;
    typedef INDEX I;
    const int rows = ((TY - 1) * DOWNY + FH - 1 + PHASEY) / UPY + 1;
    const int columns = ((TX - 1) * DOWNX + FW - 1 + PHASEX) / UPX + 1;
    const I across = ((I)out.width + TX - 1) / TX, down = ((I)out.height + TY - 1) / TY;
    const I packs = (I)out.channels / VEC;
    I id = (I)blockIdx.x * blockDim.x + threadIdx.x;
    if (id >= (I)out.samples * packs * across * down)
        return;
    I c = 0;
    if (CHANNELS_LAST) {
        c = id % packs * VEC;
        id /= packs;
    }
    const I tx = id % across, rest = id / across;
    const I ty = rest % down;
    I n = rest / down;
    if (!CHANNELS_LAST) {
        c = n % packs * VEC;
        n /= packs;
    }
    const I firstx = tx * (TX * DOWNX / UPX) + (I)startx, firsty = ty * (TY * DOWNY / UPY) + (I)starty;
    const SCALAR* image = x + (n * (I)in.sn + c * (I)in.sc);
    F sums[TY][TX][VEC] = {};
#pragma unroll
    for (int r = 0; r < rows; r++) {
#pragma unroll
        for (int s = 0; s < columns; s++) {
            const I iy = firsty + r, ix = firstx + s;
            const bool inside = iy >= 0 && iy < (I)in.height && ix >= 0 && ix < (I)in.width;
            F values[VEC] = {};
            if (inside)
                load(values, image + (iy * (I)in.sy + ix * (I)in.sx));
#pragma unroll
            for (int j = 0; j < TY; j++) {
#pragma unroll
                for (int i = 0; i < TX; i++) {
                    const int ky = r * UPY - j * DOWNY - PHASEY, kx = s * UPX - i * DOWNX - PHASEX;
                    if (ky < 0 || ky >= FH || kx < 0 || kx >= FW)
                        continue;
                    const int tap = ky * FW + kx;
                    const F weight = F(filter[FLIP ? tap : FW * FH - 1 - tap]);
#pragma unroll
                    for (int v = 0; v < VEC; v++)
                        sums[j][i][v] += weight * values[v];
                }
            }
        }
    }
    SCALAR* target = result + (n * (I)out.sn + c * (I)out.sc);
#pragma unroll
    for (int j = 0; j < TY; j++) {
#pragma unroll
        for (int i = 0; i < TX; i++) {
            const I oy = ty * TY + j, ox = tx * TX + i;
            if (oy >= (I)out.height || ox >= (I)out.width)
                continue;
#pragma unroll
            for (int v = 0; v < VEC; v++)
                sums[j][i][v] *= F(gain);
            store(target + (oy * (I)out.sy + ox * (I)out.sx), sums[j][i]);
        }
    }
}
#else
extern "C" __global__ void __launch_bounds__(256) upfirdn2d_any(
    const SCALAR* x, const float* filter, SCALAR* result, Layout in, Layout out, long long upx, long long upy,
    long long downx, long long downy, long long padx, long long pady, long long fw, long long fh, long long flip,
    double gain)
{
    upfirdn2d_point<SCALAR, INDEX>(
        x, filter, result, in, out, (int)upx, (int)upy, (int)downx, (int)downy, padx, pady, (int)fw, (int)fh,
        (int)flip, CHANNELS_LAST, gain);
}
#endif
#endif
