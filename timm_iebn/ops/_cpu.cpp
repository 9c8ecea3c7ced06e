// The four passes of IEBN on CPU, for float32 and bfloat16, NCHW and channels last, and inference in one. `cpu.py` calls
// them, and says what their arguments are.
//
// The work is cut into images or less, then into blocks, and these into strips of up to four vectors; a lane of a vector
// is a channel in channels last and a position in NCHW. The order of every sum depends on the shape and the number of
// lanes alone, not on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

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
constexpr int GROUP = 4 * LANES;  // values at most in a row of a strip
constexpr int64_t BLOCK = 4096;  // values in a block, which the first cache holds; few enough to be added up one by one

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

// `WHOLE` strips have LANES lanes in every vector, others fewer: then the lanes beyond are read as zero.
template <int V, bool WHOLE, bool CHANNELS_LAST>
struct Strip {
    int64_t offset, rows, stride, c;
    int lanes;

    template <class T>
    Vec load(const T* p) const {
        if constexpr (!WHOLE) return widen(load_part<Raw<T>>(p, lanes));
        Raw<T> raw;
        std::memcpy(&raw, p, sizeof raw);
        return widen(raw);
    }

    template <class T>
    void store(Vec value, T* p) const {
        Raw<T> raw;
        narrow(value, raw);
        if constexpr (WHOLE)
            std::memcpy(p, &raw, sizeof raw);
        else
            store_part(raw, p, lanes);
    }

    template <class T>
    Vec at(const T* x, int64_t row, int v) const {
        return load(x + offset + row * stride + v * LANES);
    }

    template <class T>
    void put(Vec value, T* y, int64_t row, int v) const {
        store(value, y + offset + row * stride + v * LANES);
    }

    struct Coefficients {
        Vec v[V];
    };

    Coefficients spread(const float* per_channel) const {
        Coefficients out;
        unroll<V>([&](int v) {
            if constexpr (CHANNELS_LAST) {
                out.v[v] = load(per_channel + c + v * LANES);
            } else {
                out.v[v] = Vec{} + per_channel[c];
                if constexpr (!WHOLE) {
                    Ints lane;
                    for (int i = 0; i < LANES; ++i) lane[i] = i;
                    out.v[v] = lane < lanes ? out.v[v] : Vec{};
                }
            }
        });
        return out;
    }

    // Adds the K results of term(row, v) over the rows of the strip to `total`.
    template <int K, class Term>
    void add_up(Vec (&total)[K][V], Term term) const {
        for (int64_t row = 0; row < rows; ++row)
            unroll<V>([&](int v) {
                Vec result[K];
                term(row, v, result);
                unroll<K>([&](int k) { total[k][v] += result[k]; });
            });
    }

    // The same in channels last, to the K arrays `per_channel`.
    template <int K, class Term>
    void sums(float* const (&per_channel)[K], Term term) const {
        Vec total[K][V] = {};
        add_up(total, term);
        unroll<K>([&](int k) {
            float* out = per_channel[k] + c;
            unroll<V>([&](int v) { store(load(out + v * LANES) + total[k][v], out + v * LANES); });
        });
    }

    // The same in NCHW, where the sum over the lanes is still to be taken.
    template <int K, class Term>
    void sums(Vec (&of_lanes)[K], Term term) const {
        Vec total[K][V] = {};
        add_up(total, term);
        unroll<K>([&](int k) { unroll<V>([&](int v) { of_lanes[k] += total[k][v]; }); });
    }

    template <class Body>
    void each(Body body) const {
        for (int64_t row = 0; row < rows; ++row) unroll<V>([&](int v) { body(row, v); });
    }
};

// Some channels at some positions of an image; in NCHW one channel.
struct Block {
    int64_t image, start, size, begin, end;
};

struct Shape {
    int64_t n, c, hw;
    bool channels_last;
    int threads;

    // Runs task(i) for 0 <= i < count.
    template <class Task>
    void parallel(int64_t count, const Task& task) const {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * c * hw > 16384)
        for (int64_t i = 0; i < count; ++i) task(i);
    }

    // Runs task(image, first channel, last channel + 1) for all; in NCHW for `planes` channels at once.
    template <class Task>
    void each_image(const Task& task, int64_t planes = 1) const {
        if (n == 0) return;
        // in channels last all channels at once, whose memory is in order, unless images are too few
        const int64_t groups = (c + GROUP - 1) / GROUP, wanted = 1 + (int64_t(2) * threads - 1) / n;
        const int64_t step = channels_last ? (groups + wanted - 1) / wanted * GROUP : planes;
        const int64_t steps = (c + step - 1) / step;
        parallel(n * steps, [&](int64_t i) { task(i / steps, i % steps * step, std::min(c, (i % steps + 1) * step)); });
    }

    // Runs task(block) for blocks that cover everything.
    template <class Task>
    void each_part(const Task& task) const {
        if (n * hw == 0) return;
        const int64_t wanted = channels_last ? std::min(hw, 1 + (int64_t(2) * threads - 1) / n) : 1;
        const int64_t size = (hw + wanted - 1) / wanted, sizes = (hw + size - 1) / size, planes = channels_last ? 1 : c;
        parallel(n * sizes * planes, [&](int64_t i) {
            const int64_t image = i / (sizes * planes), channel = i % planes, start = i / planes % sizes * size;
            task(Block{image, start, std::min(size, hw - start), channel, channels_last ? c : channel + 1});
        });
    }

    template <class Body>
    void each_block(int64_t image, int64_t begin, int64_t end, const Body& body) const {
        const int64_t size = channels_last ? std::clamp<int64_t>(BLOCK / c, 4, BLOCK / GROUP) : BLOCK;
        for (int64_t i = 0; i < hw; i += size) body(Block{image, i, std::min(size, hw - i), begin, end});
    }

    template <class Body>
    void walk(const Block& b, const Body& body) const {
        channels_last ? walk_image(b, body) : walk_plane(b, body);
    }

    // Covers a block with strips, of a few rows only, because memory that is not taken in order is twice as slow, or of
    // all rows where the block is in the `cached` memory.
    template <class Body>
    void walk_image(const Block& b, const Body& body, bool cached = false) const {
        const int64_t step = cached || c <= GROUP ? b.size : std::max<int64_t>(1, 256 / c), end = b.start + b.size;
        for (int64_t row = b.start; row < end; row += step) walk_rows(b, row, std::min(step, end - row), body);
    }

    template <class Body>
    void walk_rows(const Block& b, int64_t row, int64_t rows, const Body& body) const {
        const int64_t start = (b.image * hw + row) * c;
        int64_t c0 = b.begin;
        for (; c0 + GROUP <= b.end; c0 += GROUP) body(Strip<GROUP / LANES, true, true>{start + c0, rows, c, c0, LANES});
        for (; c0 + 2 * LANES <= b.end; c0 += 2 * LANES) body(Strip<2, true, true>{start + c0, rows, c, c0, LANES});
        for (; c0 + LANES <= b.end; c0 += LANES) body(Strip<1, true, true>{start + c0, rows, c, c0, LANES});
        if (c0 < b.end) body(Strip<1, false, true>{start + c0, rows, c, c0, int(b.end - c0)});
    }

    template <class Body>
    void walk_plane(const Block& b, const Body& body) const {
        const int64_t c0 = b.begin, start = (b.image * c + c0) * hw + b.start;
        const int64_t wide = b.size / GROUP * GROUP, whole = b.size / LANES * LANES;
        if (wide) body(Strip<GROUP / LANES, true, false>{start, wide / GROUP, GROUP, c0, LANES});
        if (wide < whole) body(Strip<1, true, false>{start + wide, (whole - wide) / LANES, LANES, c0, LANES});
        if (whole < b.size) body(Strip<1, false, false>{start + whole, 1, 0, c0, int(b.size - whole)});
    }

    // Sets the K arrays `per_channel` to the sums over the block of what `term(strip)` gives for a row and a vector.
    template <int K, class Term>
    void sums(const Block& b, float* const (&per_channel)[K], const Term& term, bool cached = false) const {
        if (channels_last) {
            for (float* out : per_channel) std::fill(out + b.begin, out + b.end, 0.0f);
            walk_image(b, [&](auto strip) { strip.sums(per_channel, term(strip)); }, cached);
        } else {
            Vec of_lanes[K] = {};
            walk_plane(b, [&](auto strip) { strip.sums(of_lanes, term(strip)); });
            for (int k = 0; k < K; ++k) per_channel[k][b.begin] = sum(of_lanes[k]);
        }
    }
};

template <class T>
void statistics(const Shape& s, const T* x, float* mean_nc, float* mean, float* var) {
    std::vector<float> block_mean_nc(s.n * s.c), block_deviation_nc(s.n * s.c), deviation_nc(s.n * s.c);
    s.each_image([&](int64_t n, int64_t begin, int64_t end) {
        float *sums = mean_nc + n * s.c, *deviations = deviation_nc.data() + n * s.c;
        float *block_mean = block_mean_nc.data() + n * s.c, *block_deviation = block_deviation_nc.data() + n * s.c;
        std::fill(sums + begin, sums + end, 0.0f);
        s.each_block(n, begin, end, [&](const Block& block) {
            s.sums(block, {block_mean}, [&](auto strip) {
                return [=](int64_t row, int v, Vec* result) { result[0] = strip.at(x, row, v); };
            });
            // a block joins those before it as in Chan et al., Updating formulae for computing sample variances (1979)
            for (int64_t c = begin; c < end; ++c) {
                sums[c] += block_mean[c];
                block_mean[c] /= block.size;
            }
            if (var) {
                const auto square = [&](auto strip) {
                    return [=, center = strip.spread(block_mean)](int64_t row, int v, Vec* result) {
                        const Vec d = strip.at(x, row, v) - center.v[v];
                        result[0] = d * d;
                    };
                };
                s.sums(block, {block_deviation}, square, true);
                const float before = block.start, weight = before * block.size / (before + block.size);
                for (int64_t c = begin; c < end; ++c) {
                    const float d = before ? block_mean[c] - (sums[c] - block_mean[c] * block.size) / before : 0;
                    deviations[c] += block_deviation[c] + weight * d * d;
                }
            }
        });
        for (int64_t c = begin; c < end; ++c) sums[c] /= s.hw;
    });
    if (!var) return;
    std::vector<double> mean_c(s.c), deviation_c(s.c);
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t c = 0; c < s.c; ++c) mean_c[c] += mean_nc[n * s.c + c];
    for (int64_t c = 0; c < s.c; ++c) mean[c] = mean_c[c] /= s.n;
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t c = 0; c < s.c; ++c) {
            const double d = mean_nc[n * s.c + c] - mean_c[c];
            deviation_c[c] += deviation_nc[n * s.c + c] + s.hw * d * d;
        }
    for (int64_t c = 0; c < s.c; ++c) var[c] = deviation_c[c] / (double(s.n) * s.hw);
}

// By what batch norm multiplies the centred input; without `weight`, 1 / sqrt(var + eps).
std::vector<float> slopes(const Shape& s, const float* var, double eps, const float* weight) {
    std::vector<float> out(s.c);
    for (int64_t c = 0; c < s.c; ++c) out[c] = (weight ? weight[c] : 1.0f) / std::sqrt(var[c] + float(eps));
    return out;
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

// What an output is computed with: the vectors (C,), with `slope` those of `slopes`, and what they give for (N, C).
struct Affine {
    const float *mean, *slope, *bias, *gate_weight, *gate_bias;
    float *gate_nc, *scale_nc;

    // Fills in gate and scale of some channels of image n.
    void gates(const Shape& s, int64_t n, int64_t begin, int64_t end, const float* mean_nc) const {
        const auto some = [&](auto part) {
            const int64_t c = part.c;
            const Vec under = part.load(gate_weight + c) * part.load(mean_nc + n * s.c + c) + part.load(gate_bias + c);
            const Vec gate = sigmoid(under);
            if (gate_nc) part.store(gate, gate_nc + n * s.c + c);
            part.store(gate * part.load(slope + c), scale_nc + n * s.c + c);
        };
        int64_t c = begin;
        for (; c + LANES <= end; c += LANES) some(Strip<1, true, true>{0, 1, 0, c, LANES});
        if (c < end) some(Strip<1, false, true>{0, 1, 0, c, int(end - c)});
    }

    template <class T>
    void apply(const Shape& s, const Block& block, const T* x, T* y) const {
        s.walk(block, [&](auto strip) {
            const auto scale = strip.spread(scale_nc + block.image * s.c), center = strip.spread(mean);
            const auto shift = bias ? strip.spread(bias) : decltype(center){};
            strip.each([&](int64_t row, int v) {
                strip.put((strip.at(x, row, v) - center.v[v]) * scale.v[v] + shift.v[v], y, row, v);
            });
        });
    }
};

template <class T>
void normalize(const Shape& s, const T* x, const float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               T* y) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c);
    const Affine affine{mean, slope.data(), bias, gate_weight, gate_bias, gate_nc, scale_nc.data()};
    s.parallel(s.n, [&](int64_t n) { affine.gates(s, n, 0, s.c, mean_nc); });
    s.each_part([&](const Block& block) { affine.apply(s, block, x, y); });
}

// Statistics are given: each image is read from memory once, and from the cache when its means are known. Means and
// gates are optional results.
template <class T>
void infer(const Shape& s, const T* x, float* mean_nc, const float* mean, const float* var, double eps,
           const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
           T* y) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c), block_sum_nc(s.n * s.c), means_nc(mean_nc ? 0 : s.n * s.c);
    if (!mean_nc) mean_nc = means_nc.data();
    const Affine affine{mean, slope.data(), bias, gate_weight, gate_bias, gate_nc, scale_nc.data()};
    const auto task = [&](int64_t n, int64_t begin, int64_t end) {
        float *means = mean_nc + n * s.c, *block_sum = block_sum_nc.data() + n * s.c;
        const int64_t step = s.channels_last ? end - begin : 1;
        std::fill(means + begin, means + end, 0.0f);
        for (int64_t c0 = begin; c0 < end; c0 += step)
            s.each_block(n, c0, c0 + step, [&](const Block& block) {
                s.sums(block, {block_sum}, [&](auto strip) {
                    return [=](int64_t row, int v, Vec* result) { result[0] = strip.at(x, row, v); };
                });
                for (int64_t c = c0; c < c0 + step; ++c) means[c] += block_sum[c];
            });
        for (int64_t c = begin; c < end; ++c) means[c] /= s.hw;
        affine.gates(s, n, begin, end, mean_nc);
        for (int64_t c0 = begin; c0 < end; c0 += step)
            s.each_block(n, c0, c0 + step, [&](const Block& block) { affine.apply(s, block, x, y); });
    };
    s.each_image(task, GROUP);
}

template <class T>
void reduce(const Shape& s, const T* g, const T* x, const float* mean_nc, const float* gate_nc, const float* mean,
            const float* var, double eps, const float* weight, float* dz_nc, float* dweight, float* dbias,
            float* dgate_weight, float* dgate_bias, float* sums) {
    std::vector<float> block_sum_nc(s.n * s.c), block_product_nc(s.n * s.c), sum_nc(s.n * s.c);
    s.each_image([&](int64_t n, int64_t begin, int64_t end) {
        float *sum = sum_nc.data() + n * s.c, *product = dz_nc + n * s.c;
        std::fill(product + begin, product + end, 0.0f);
        float *block_sum = block_sum_nc.data() + n * s.c, *block_product = block_product_nc.data() + n * s.c;
        s.each_block(n, begin, end, [&](const Block& block) {
            s.sums(block, {block_sum, block_product}, [&](auto strip) {
                return [=, center = strip.spread(mean)](int64_t row, int v, Vec* result) {
                    result[0] = strip.at(g, row, v);
                    result[1] = result[0] * (strip.at(x, row, v) - center.v[v]);
                };
            });
            for (int64_t c = begin; c < end; ++c) {
                sum[c] += block_sum[c];
                product[c] += block_product[c];
            }
        });
    });
    const std::vector<float> inv = slopes(s, var, eps, nullptr), slope = slopes(s, var, eps, weight);
    std::vector<double> totals(5 * s.c);
    double *const P_c = totals.data(), *const Q_c = P_c + s.c, *const dz_c = Q_c + s.c;
    double *const dz_mean_c = dz_c + s.c, *const gated_c = dz_mean_c + s.c;
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t c = 0; c < s.c; ++c) {
            const int64_t i = n * s.c + c;
            const float P = sum_nc[i], Q = dz_nc[i], gate = gate_nc[i];
            const float dz = dz_nc[i] = Q * gate * (1 - gate) * slope[c];
            P_c[c] += P;
            Q_c[c] += gate * Q;
            dz_c[c] += dz;
            dz_mean_c[c] += dz * mean_nc[i];
            gated_c[c] += gate * P;
        }
    for (int64_t c = 0; c < s.c; ++c) {
        dweight[c] = Q_c[c] * inv[c];
        dbias[c] = P_c[c];
        dgate_weight[c] = dz_mean_c[c];
        dgate_bias[c] = dz_c[c];
        sums[c] = slope[c] * gated_c[c];
        sums[s.c + c] = slope[c] * dweight[c];
    }
}

template <class T>
void grad_input(const Shape& s, const T* g, const T* x, const float* gate_nc, const float* dz_nc, const float* mean,
                const float* var, double eps, const float* weight, const float* gate_weight, const float* sums,
                double count, T* dx) {
    const std::vector<float> inv = slopes(s, var, eps, nullptr), slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c), shift_nc(s.n * s.c), pull(s.c), push(s.c);
    if (count)
        for (int64_t c = 0; c < s.c; ++c) {
            push[c] = sums[c] / float(count);
            pull[c] = sums[s.c + c] * inv[c] / float(-count);
        }
    s.parallel(s.n, [&](int64_t n) {
        for (int64_t c = 0, i = n * s.c; c < s.c; ++c, ++i) {
            scale_nc[i] = gate_nc[i] * slope[c];
            shift_nc[i] = dz_nc[i] * gate_weight[c] / s.hw - push[c];
        }
    });
    s.each_part([&](const Block& block) {
        s.walk(block, [&](auto strip) {
            const auto scale = strip.spread(scale_nc.data() + block.image * s.c);
            const auto shift = strip.spread(shift_nc.data() + block.image * s.c);
            if (count) {
                const auto slope = strip.spread(pull.data()), center = strip.spread(mean);
                strip.each([&](int64_t row, int v) {
                    const Vec centered = strip.at(x, row, v) - center.v[v];
                    strip.put(strip.at(g, row, v) * scale.v[v] + (centered * slope.v[v] + shift.v[v]), dx, row, v);
                });
            } else {
                strip.each([&](int64_t row, int v) {
                    strip.put(strip.at(g, row, v) * scale.v[v] + shift.v[v], dx, row, v);
                });
            }
        });
    });
}

// Returns whether there was memory enough.
template <class Run>
int choose(int bf16, Run run) {
    try {
        if (bf16)
            run(BFloat16{});
        else
            run(0.0f);
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

}  // namespace

#define SHAPE int64_t n, int64_t c, int64_t hw, int channels_last, int bf16, int threads

extern "C" {

extern const int iebn_interface = 5;  // cpu.py asks for it: a library of other arguments must not be called

int iebn_statistics(SHAPE, const void* x, float* mean_nc, float* mean, float* var) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) { statistics(s, (const decltype(t)*)x, mean_nc, mean, var); });
}

int iebn_normalize(SHAPE, const void* x, const float* mean_nc, const float* mean, const float* var, double eps,
                   const float* weight, const float* bias, const float* gate_weight, const float* gate_bias,
                   float* gate_nc, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        normalize(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc, (T*)y);
    });
}

int iebn_forward(SHAPE, const void* x, float* mean_nc, float* mean, float* var, double eps, const float* weight,
                 const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        statistics(s, (const T*)x, mean_nc, mean, var);
        normalize(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc, (T*)y);
    });
}

int iebn_infer(SHAPE, const void* x, float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        infer(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc, (T*)y);
    });
}

int iebn_reduce(SHAPE, const void* g, const void* x, const float* mean_nc, const float* gate_nc, const float* mean,
                const float* var, double eps, const float* weight, float* dz_nc, float* dweight, float* dbias,
                float* dgate_weight, float* dgate_bias, float* sums) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        reduce(s, (const T*)g, (const T*)x, mean_nc, gate_nc, mean, var, eps, weight, dz_nc, dweight, dbias,
               dgate_weight, dgate_bias, sums);
    });
}

int iebn_grad_input(SHAPE, const void* g, const void* x, const float* gate_nc, const float* dz_nc, const float* mean,
                    const float* var, double eps, const float* weight, const float* gate_weight, const float* sums,
                    double count, void* dx) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        grad_input(s, (const T*)g, (const T*)x, gate_nc, dz_nc, mean, var, eps, weight, gate_weight, sums, count,
                   (T*)dx);
    });
}

int iebn_backward(SHAPE, const void* g, const void* x, const float* mean_nc, const float* gate_nc, const float* mean,
                  const float* var, double eps, const float* weight, const float* gate_weight, float* dz_nc,
                  float* dweight, float* dbias, float* dgate_weight, float* dgate_bias, float* sums, double count,
                  void* dx) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        reduce(s, (const T*)g, (const T*)x, mean_nc, gate_nc, mean, var, eps, weight, dz_nc, dweight, dbias,
               dgate_weight, dgate_bias, sums);
        grad_input(s, (const T*)g, (const T*)x, gate_nc, dz_nc, mean, var, eps, weight, gate_weight, sums, count,
                   (T*)dx);
    });
}
}
