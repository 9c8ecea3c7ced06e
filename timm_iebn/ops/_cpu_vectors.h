// Vectors of float32: read from and written to memory as float32 or bfloat16, and what is computed with one alone.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(IEBN_AVX512)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#elif defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

namespace {

#if defined(IEBN_AVX512)
constexpr int LANES = 16;  // values in a vector
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

#if defined(IEBN_AVX512)  // GCC converts vectors of 512 bits in halves; masked forms, because the others make it warn
Bits extend(Half v) { return (Bits)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)v); }
Half truncate(Bits v) { return (Half)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)v); }
#else
Bits extend(Half v) { return __builtin_convertvector(v, Bits); }
Half truncate(Bits v) { return __builtin_convertvector(v, Half); }
#endif

Vec widen(Vec v) { return v; }
Vec widen(Half v) { return (Vec)(extend(v) << 16); }

void narrow(Vec v, Vec& out) { out = v; }
void narrow(Vec v, Half& out) {  // to the nearest, ties to even; NaN stays NaN
    Bits bits = (Bits)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out = truncate(v == v ? bits : Bits{} + 0x7fc0);
}

template <class T>
using Raw = std::conditional_t<std::is_same_v<T, float>, Vec, Half>;

float sum(Vec v) {
    Quad q[LANES / 4], total{};
    std::memcpy(q, &v, sizeof v);
    for (const Quad& part : q) total += part;
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// Reads or writes the first `lanes` values of a vector; those beyond are read as zero.
template <class R>
R load_part(const void* p, int lanes) {
    R raw{};
    std::memcpy(&raw, p, lanes * (sizeof raw / LANES));
    return raw;
}
template <class R>
void store_part(R raw, void* p, int lanes) {
    std::memcpy(p, &raw, lanes * (sizeof raw / LANES));
}
#if defined(IEBN_AVX512)  // which can without a call
template <>
Vec load_part<Vec>(const void* p, int lanes) {
    return (Vec)_mm512_maskz_loadu_ps((1 << lanes) - 1, p);
}
template <>
Half load_part<Half>(const void* p, int lanes) {
    return (Half)_mm256_maskz_loadu_epi16((1 << lanes) - 1, p);
}
template <>
void store_part<Vec>(Vec raw, void* p, int lanes) {
    _mm512_mask_storeu_ps(p, (1 << lanes) - 1, (__m512)raw);
}
template <>
void store_part<Half>(Half raw, void* p, int lanes) {
    _mm256_mask_storeu_epi16(p, (1 << lanes) - 1, (__m256i)raw);
}
#endif

// Calls body(0) .. body(V - 1), unrolled early enough for arrays of vectors to become registers, as loops are not.
template <class Body, int... v>
void unroll(std::integer_sequence<int, v...>, Body body) {
    (body(v), ...);
}
template <int V, class Body>
void unroll(Body body) {
    unroll(std::make_integer_sequence<int, V>{}, body);
}

// 1 / (1 + exp(-z)), to about one unit in the last place of the exponential, and never 0. NaN stays NaN.
Vec sigmoid(Vec z) {
    const Vec low = Vec{} - 87, high = Vec{} + 87, half_even = Vec{} + 12582912;  // 1.5 * 2^23 rounds what is added
    Vec t = -z;
    t = t < low ? low : t;
    t = t > high ? high : t;
    const Vec shifted = t * 1.44269504f + half_even, power = shifted - half_even;
    const Vec r = t - power * 0.693359375f + power * 2.12194440e-4f;  // the rest, |r| <= log(2) / 2
    Vec e = r * (1.f / 5040) + 1.f / 720;
    for (const float a : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) e = e * r + a;
    return z == z ? 1 / (1 + (Vec)((Bits)e + ((Bits)shifted << 23))) : z;
}

// What may stand behind the layer, in the order of ACTIVATIONS in `activations.py`, and its gradient at an input `z`, or at
// a result where FROM_RESULT there has it. A result that is NaN stays it.
struct None {
    static constexpr bool FROM_RESULT = false;
    Vec operator()(Vec z) const { return z; }
    Vec grad(Vec g, Vec) const { return g; }
};
struct ReLU {
    static constexpr bool FROM_RESULT = true;
    Vec operator()(Vec z) const { return z < 0 ? Vec{} : z; }
    Vec grad(Vec g, Vec z) const { return z <= 0 ? Vec{} : g; }
};
struct ReLU6 {
    static constexpr bool FROM_RESULT = true;
    Vec operator()(Vec z) const { return z < 0 ? Vec{} : z > 6 ? Vec{} + 6 : z; }
    Vec grad(Vec g, Vec z) const { return z <= 0 ? Vec{} : z >= 6 ? Vec{} : g; }
};
struct HardSwish {
    static constexpr bool FROM_RESULT = false;
    Vec operator()(Vec z) const { return z * ReLU6{}(z + 3) * (1.f / 6); }
    Vec grad(Vec g, Vec z) const { return z <= -3 ? Vec{} : z >= 3 ? g : g * (z * (1.f / 3) + 0.5f); }
};
struct SiLU {
    static constexpr bool FROM_RESULT = false;
    Vec operator()(Vec z) const { return z < -87 ? z * 0 : z * sigmoid(z); }  // where `sigmoid` stays above 0
    Vec grad(Vec g, Vec z) const {
        const Vec s = sigmoid(z);
        return z < -87 ? g * 0 : g * (s * (1 + z * (1 - s)));
    }
};

template <class Body>
void with_activation(int act, const Body& body) {
    switch (act) {
        case 1: return body(ReLU{});
        case 2: return body(ReLU6{});
        case 3: return body(HardSwish{});
        case 4: return body(SiLU{});
        default: return body(None{});
    }
}

}  // namespace
