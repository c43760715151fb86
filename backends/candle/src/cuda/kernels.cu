// The kernels that candle has none for. All arrays are contiguous.

#include <cuda_bf16.h>

// NF4 in 4.127 bits a weight: `codes` has two values a byte, the first in the high half; a block of 64 values has
// an 8-bit scale; 256 of those share an f32.
struct Nf4 {
    const unsigned char *codes;
    const unsigned char *scale_codes;
    const float *nested;
    // Of the 16 codes, and of the 256 scales.
    const float *levels;
    const float *scales;
    float offset;
};

constexpr unsigned BLOCK = 64;
constexpr unsigned NESTED_BLOCK = 256;
// Values that a thread takes at a time: 8 bytes of codes.
constexpr unsigned VALUES = 16;

__device__ __forceinline__ float scale_of(const Nf4 &nf4, size_t block) {
    return __ldg(nf4.scales + nf4.scale_codes[block]) * __ldg(nf4.nested + block / NESTED_BLOCK) + nf4.offset;
}

// The 16 values whose first one is `start`, a multiple of 16.
__device__ __forceinline__ void decode(const Nf4 &nf4, const float *levels, size_t start, float (&values)[VALUES]) {
    const float scale = scale_of(nf4, start / BLOCK);
    const uint2 packed = *reinterpret_cast<const uint2 *>(nf4.codes + start / 2);
    const unsigned words[2] = {packed.x, packed.y};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const unsigned byte = words[i / 4] >> (8 * (i % 4));
        values[2 * i] = levels[(byte >> 4) & 15] * scale;
        values[2 * i + 1] = levels[byte & 15] * scale;
    }
}

__device__ __forceinline__ void store(float *out, const float (&values)[VALUES]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        reinterpret_cast<float4 *>(out)[i] =
            make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
}

__device__ __forceinline__ void store(__nv_bfloat16 *out, const float (&values)[VALUES]) {
    alignas(16) __nv_bfloat162 pairs[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
    const uint4 *words = reinterpret_cast<const uint4 *>(pairs);
    reinterpret_cast<uint4 *>(out)[0] = words[0];
    reinterpret_cast<uint4 *>(out)[1] = words[1];
}

__device__ __forceinline__ void set(float *out, float value) { *out = value; }
__device__ __forceinline__ void set(__nv_bfloat16 *out, float value) { *out = __float2bfloat16_rn(value); }

// Writes `len` values.
template <typename T> __device__ void decode_all(const Nf4 &nf4, T *out, size_t len) {
    __shared__ float levels[16];
    if (threadIdx.x < 16) {
        levels[threadIdx.x] = nf4.levels[threadIdx.x];
    }
    __syncthreads();
    const size_t start = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * VALUES;
    if (start >= len) {
        return;
    }
    float values[VALUES];
    decode(nf4, levels, start, values);
    if (start + VALUES <= len) {
        store(out + start, values);
        return;
    }
    for (size_t i = 0; start + i < len; i++) {
        set(out + start + i, values[i]);
    }
}

#define NF4_PARAMETERS                                                                                               \
    const unsigned char *codes, const unsigned char *scale_codes, const float *nested, const float *levels,         \
        const float *scales, float offset
#define NF4 Nf4{codes, scale_codes, nested, levels, scales, offset}

extern "C" __global__ void nf4_decode_f32(NF4_PARAMETERS, float *out, size_t len) { decode_all(NF4, out, len); }

extern "C" __global__ void nf4_decode_bf16(NF4_PARAMETERS, __nv_bfloat16 *out, size_t len) {
    decode_all(NF4, out, len);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(0xffffffff, value, step);
    }
    return value;
}

// out[row] = sum over i of W[row, i] x[i], a warp for each row; `width` is a multiple of 64.
extern "C" __global__ void nf4_matvec(NF4_PARAMETERS, const float *x, float *out, unsigned height, unsigned width) {
    const Nf4 nf4 = NF4;
    __shared__ float table[16];
    if (threadIdx.x < 16) {
        table[threadIdx.x] = nf4.levels[threadIdx.x];
    }
    __syncthreads();
    const unsigned row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const unsigned lane = threadIdx.x % 32;
    if (row >= height) {
        return;
    }
    float sum = 0;
    for (unsigned column = lane * VALUES; column < width; column += 32 * VALUES) {
        float values[VALUES];
        decode(nf4, table, size_t(row) * width + column, values);
        const float4 *input = reinterpret_cast<const float4 *>(x + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 part = __ldg(input + i);
            sum += values[4 * i] * part.x + values[4 * i + 1] * part.y + values[4 * i + 2] * part.z +
                   values[4 * i + 3] * part.w;
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        out[row] = sum;
    }
}

// The same for a dense matrix in bf16; `width` is a multiple of 8.
extern "C" __global__ void bf16_matvec(const __nv_bfloat16 *weight, const float *x, float *out, unsigned height,
                                       unsigned width) {
    const unsigned row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const unsigned lane = threadIdx.x % 32;
    if (row >= height) {
        return;
    }
    const __nv_bfloat16 *of_row = weight + size_t(row) * width;
    float sum = 0;
    for (unsigned column = lane * 8; column < width; column += 32 * 8) {
        const uint4 packed = *reinterpret_cast<const uint4 *>(of_row + column);
        const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&packed);
        const float2 *input = reinterpret_cast<const float2 *>(x + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 values = __bfloat1622float2(pairs[i]);
            const float2 part = __ldg(input + i);
            sum += values.x * part.x + values.y * part.y;
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        out[row] = sum;
    }
}

__device__ __forceinline__ unsigned mix(unsigned value) {
    value = (value ^ (value >> 16)) * 0x85EBCA6Bu;
    value = (value ^ (value >> 13)) * 0xC2B2AE35u;
    return value ^ (value >> 16);
}

// out = mask ⊙ x, with the masks of evalfw's contract (`MaskKey`).
extern "C" __global__ void dropout(const float *x, float *out, size_t len, unsigned low, unsigned high,
                                   unsigned threshold, float kept) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < len) {
        const unsigned hash = mix(mix(unsigned(i) * 0x9E3779B9u ^ low) ^ high);
        out[i] = hash < threshold ? 0.0f : x[i] * kept;
    }
}

// The gradients of silu(gate) · up.
extern "C" __global__ void swiglu_backward(const float *gate, const float *up, const float *grad, float *of_gate,
                                           float *of_up, size_t len) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < len) {
        const float sigmoid = 1.0f / (1.0f + expf(-gate[i]));
        const float silu = gate[i] * sigmoid;
        of_up[i] = grad[i] * silu;
        of_gate[i] = grad[i] * up[i] * sigmoid * (1.0f + gate[i] - silu);
    }
}

__device__ float block_sum(float value) {
    __shared__ float parts[32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = value;
    }
    __syncthreads();
    const float sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
    // `parts` may be written again after this.
    __syncthreads();
    return sum;
}

// The gradient of x / sqrt(mean(x²) + eps) · weight, a block for each row.
extern "C" __global__ void rms_norm_backward(const float *x, const float *weight, const float *grad, float *out,
                                             unsigned width, float eps) {
    const size_t start = size_t(blockIdx.x) * width;
    float squares = 0, along = 0;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        const float value = x[start + i];
        squares += value * value;
        along += value * grad[start + i] * weight[i];
    }
    squares = block_sum(squares);
    along = block_sum(along);
    const float inverse = 1.0f / sqrtf(squares / width + eps);
    along *= inverse * inverse / width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        out[start + i] = inverse * (grad[start + i] * weight[i] - along * x[start + i]);
    }
}

// One step of AdamW on one tensor, in place; `rate` and `second_correction` hold the bias corrections:
// rate = lr / (1 − β1ᵗ), second_correction = 1 / (1 − β2ᵗ).
extern "C" __global__ void adamw(float *theta, float *first, float *second, const float *grad, size_t len,
                                 float keep, float rate, float second_correction, float beta1, float beta2,
                                 float epsilon) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < len) {
        const float g = grad[i];
        const float m = beta1 * first[i] + (1.0f - beta1) * g;
        const float v = beta2 * second[i] + (1.0f - beta2) * g * g;
        first[i] = m;
        second[i] = v;
        theta[i] = theta[i] * keep - rate * m / (sqrtf(v * second_correction) + epsilon);
    }
}
