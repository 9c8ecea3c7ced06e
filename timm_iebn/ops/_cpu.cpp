// The four passes of IEBN on CPU, for float32 and bfloat16, NCHW and channels last. `cpu.py` calls them, and says what
// their arguments are.
//
// A task is one image and one group of channels: 32 neighbours in channels last, one channel in NCHW. It walks its data
// in strips of up to four vectors of 8 lanes; a lane is a channel in channels last and a position in NCHW. The order of
// every sum depends on the shape alone, not on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

namespace {

constexpr int LANES = 8, GROUP = 32;
constexpr long RUN = 128;  // rows added up before they join a total, which keeps long sums exact

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

Vec widen(Vec v) { return v; }
Vec widen(Half v) { return (Vec)(__builtin_convertvector(v, Bits) << 16); }

void narrow(Vec v, Vec& out) { out = v; }
void narrow(Vec v, Half& out) {  // to the nearest, ties to even; NaN stays NaN
    Bits bits = (Bits)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out = __builtin_convertvector(v == v ? bits : Bits{} + 0x7fc0, Half);
}

template <class T>
using Raw = std::conditional_t<std::is_same_v<T, float>, Vec, Half>;

// `WHOLE` strips have LANES lanes in every vector, others fewer: then the lanes beyond are read as zero.
template <int V, bool WHOLE>
struct Strip {
    long offset, rows, stride, c;
    int lanes;
    bool channels_last;

    template <class T>
    Vec load(const T* p) const {
        Raw<T> raw{};
        std::memcpy(&raw, p, WHOLE ? sizeof raw : lanes * sizeof(T));
        return widen(raw);
    }

    template <class T>
    void store(Vec value, T* p) const {
        Raw<T> raw;
        narrow(value, raw);
        std::memcpy(p, &raw, WHOLE ? sizeof raw : lanes * sizeof(T));
    }

    template <class T>
    Vec at(const T* x, long row, int v) const {
        return load(x + offset + row * stride + v * LANES);
    }

    template <class T>
    void put(Vec value, T* y, long row, int v) const {
        store(value, y + offset + row * stride + v * LANES);
    }

    struct Coefficients {
        Vec v[V];
    };

    Coefficients spread(const float* per_channel) const {
        Coefficients out;
        for (int v = 0; v < V; ++v) {
            if (channels_last) {
                out.v[v] = load(per_channel + c + v * LANES);
            } else {
                out.v[v] = Vec{} + per_channel[c];
                for (int i = lanes; i < LANES; ++i) out.v[v][i] = 0;
            }
        }
        return out;
    }

    // Adds the sums over the strip of the K results of term(row, v) to the K arrays `per_channel`.
    template <int K, class Term>
    void sums(float* const (&per_channel)[K], Term term) const {
        Vec total[K][V] = {};
        for (long row = 0; row < rows;) {
            Vec part[K][V] = {};
            for (const long stop = std::min(rows, row + RUN); row < stop; ++row)
                for (int v = 0; v < V; ++v) {
                    Vec result[K];
                    term(row, v, result);
                    for (int k = 0; k < K; ++k) part[k][v] += result[k];
                }
            for (int k = 0; k < K; ++k)
                for (int v = 0; v < V; ++v) total[k][v] += part[k][v];
        }
        for (int k = 0; k < K; ++k)
            for (int v = 0; v < V; ++v) {
                float* out = per_channel[k] + c;
                if (channels_last) {
                    store(load(out + v * LANES) + total[k][v], out + v * LANES);
                } else {
                    for (int i = 0; i < LANES; ++i) *out += total[k][v][i];
                }
            }
    }

    template <class Body>
    void each(Body body) const {
        for (long row = 0; row < rows; ++row)
            for (int v = 0; v < V; ++v) body(row, v);
    }
};

struct Shape {
    long n, c, hw;
    bool channels_last;
    int threads;

    // Runs task(image, first channel, last channel + 1) for all.
    template <class Task>
    void each_task(Task task) const {
        const long step = channels_last ? GROUP : 1, groups = (c + step - 1) / step, tasks = n * groups;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * c * hw > 16384)
        for (long i = 0; i < tasks; ++i) task(i / groups, i % groups * step, std::min(c, (i % groups + 1) * step));
    }

    // Covers the channels begin .. end of an image with strips.
    template <class Body>
    void walk(long image, long begin, long end, Body body) const {
        if (channels_last) {
            const long start = image * hw * c;
            if (end - begin == GROUP) return body(Strip<GROUP / LANES, true>{start + begin, hw, c, begin, LANES, true});
            if (begin + 2 * LANES <= end) {
                body(Strip<2, true>{start + begin, hw, c, begin, LANES, true});
                begin += 2 * LANES;
            }
            for (; begin + LANES <= end; begin += LANES) body(Strip<1, true>{start + begin, hw, c, begin, LANES, true});
            if (begin < end) body(Strip<1, false>{start + begin, hw, c, begin, int(end - begin), true});
        } else {
            const long start = (image * c + begin) * hw, wide = hw / GROUP * GROUP, whole = hw / LANES * LANES;
            body(Strip<GROUP / LANES, true>{start, wide / GROUP, GROUP, begin, LANES, false});
            body(Strip<1, true>{start + wide, (whole - wide) / LANES, LANES, begin, LANES, false});
            body(Strip<1, false>{start + whole, whole < hw, 0, begin, int(hw - whole), false});
        }
    }
};

template <class T>
void statistics(const Shape& s, const T* x, float* mean_nc, float* mean, float* var) {
    std::vector<float> deviation_nc(var ? s.n * s.c : 0);
    s.each_task([&](long n, long begin, long end) {
        float* means = mean_nc + n * s.c;
        std::fill(means + begin, means + end, 0.0f);
        s.walk(n, begin, end, [&](auto strip) {
            strip.sums({means}, [&](long row, int v, Vec* result) { result[0] = strip.at(x, row, v); });
        });
        for (long c = begin; c < end; ++c) means[c] /= s.hw;
        if (!var) return;
        float* deviations = deviation_nc.data() + n * s.c;
        s.walk(n, begin, end, [&](auto strip) {
            const auto center = strip.spread(means);
            strip.sums({deviations}, [&](long row, int v, Vec* result) {
                const Vec d = strip.at(x, row, v) - center.v[v];
                result[0] = d * d;
            });
        });
    });
    if (!var) return;
    std::vector<double> mean_c(s.c), deviation_c(s.c);
    for (long n = 0; n < s.n; ++n)
        for (long c = 0; c < s.c; ++c) mean_c[c] += mean_nc[n * s.c + c];
    for (long c = 0; c < s.c; ++c) mean[c] = mean_c[c] /= s.n;
    for (long n = 0; n < s.n; ++n)
        for (long c = 0; c < s.c; ++c) {
            const double d = mean_nc[n * s.c + c] - mean_c[c];
            deviation_c[c] += deviation_nc[n * s.c + c] + s.hw * d * d;
        }
    for (long c = 0; c < s.c; ++c) var[c] = deviation_c[c] / (double(s.n) * s.hw);
}

float value(const float* parameter, long c, float missing) { return parameter ? parameter[c] : missing; }

template <class T>
void normalize(const Shape& s, const T* x, const float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               float* scale_nc, T* y) {
    s.each_task([&](long n, long begin, long end) {
        const long row0 = n * s.c;
        for (long c = begin; c < end; ++c) {
            gate_nc[row0 + c] = 1 / (1 + std::exp(-(gate_weight[c] * mean_nc[row0 + c] + gate_bias[c])));
            scale_nc[row0 + c] = gate_nc[row0 + c] * value(weight, c, 1) / std::sqrt(var[c] + float(eps));
        }
        s.walk(n, begin, end, [&](auto strip) {
            const auto scale = strip.spread(scale_nc + row0), center = strip.spread(mean);
            auto shift = center;
            if (bias) {
                shift = strip.spread(bias);
            } else {
                shift = {};
            }
            strip.each([&](long row, int v) {
                strip.put((strip.at(x, row, v) - center.v[v]) * scale.v[v] + shift.v[v], y, row, v);
            });
        });
    });
}

template <class T>
void reduce(const Shape& s, const T* g, const T* x, const float* mean_nc, const float* gate_nc, const float* scale_nc,
            const float* mean, const float* var, double eps, const float* weight, float* dz_nc, float* dweight,
            float* dbias, float* dgate_weight, float* dgate_bias, float* k1, float* k2) {
    std::vector<float> sum_nc(s.n * s.c);
    s.each_task([&](long n, long begin, long end) {
        float *sum = sum_nc.data() + n * s.c, *product = dz_nc + n * s.c;
        std::fill(product + begin, product + end, 0.0f);
        s.walk(n, begin, end, [&](auto strip) {
            const auto center = strip.spread(mean);
            strip.sums({sum, product}, [&](long row, int v, Vec* result) {
                result[0] = strip.at(g, row, v);
                result[1] = result[0] * (strip.at(x, row, v) - center.v[v]);
            });
        });
    });
    float* const outputs[] = {dweight, dbias, dgate_weight, dgate_bias, k1, k2};
    for (float* out : outputs) std::fill(out, out + s.c, 0.0f);
    std::vector<float> inv(s.c);
    for (long c = 0; c < s.c; ++c) inv[c] = 1 / std::sqrt(var[c] + float(eps));
    for (long n = 0; n < s.n; ++n)
        for (long c = 0; c < s.c; ++c) {
            const long i = n * s.c + c;
            const float P = sum_nc[i], Q = dz_nc[i] * inv[c], gate = gate_nc[i];
            const float dz = dz_nc[i] = Q * gate * (1 - gate) * value(weight, c, 1);
            dweight[c] += gate * Q;
            dbias[c] += P;
            dgate_weight[c] += dz * mean_nc[i];
            dgate_bias[c] += dz;
            k1[c] += scale_nc[i] * P;
            k2[c] += scale_nc[i] * Q;
        }
}

template <class T>
void grad_input(const Shape& s, const T* g, const T* x, const float* scale_nc, const float* dz_nc, const float* mean,
                const float* var, double eps, const float* gate_weight, const float* k1, const float* k2, double count,
                T* dx) {
    std::vector<float> shift_nc(s.n * s.c), slope_c(s.c);
    if (count)
        for (long c = 0; c < s.c; ++c) slope_c[c] = k2[c] / (-count * std::sqrt(var[c] + float(eps)));
    s.each_task([&](long n, long begin, long end) {
        float* shifts = shift_nc.data() + n * s.c;
        for (long c = begin; c < end; ++c)
            shifts[c] = dz_nc[n * s.c + c] * gate_weight[c] / s.hw - (count ? k1[c] / float(count) : 0);
        s.walk(n, begin, end, [&](auto strip) {
            const auto scale = strip.spread(scale_nc + n * s.c), shift = strip.spread(shifts);
            if (count) {
                const auto slope = strip.spread(slope_c.data()), center = strip.spread(mean);
                strip.each([&](long row, int v) {
                    const Vec centered = strip.at(x, row, v) - center.v[v];
                    strip.put(strip.at(g, row, v) * scale.v[v] + (centered * slope.v[v] + shift.v[v]), dx, row, v);
                });
            } else {
                strip.each([&](long row, int v) { strip.put(strip.at(g, row, v) * scale.v[v] + shift.v[v], dx, row, v); });
            }
        });
    });
}

template <class Run>
void choose(int bf16, Run run) {
    if (bf16)
        run(BFloat16{});
    else
        run(0.0f);
}

}  // namespace

extern "C" {

extern const int iebn_interface = 1;  // cpu.py asks for it: a library of other arguments must not be called

void iebn_statistics(long n, long c, long hw, int channels_last, int bf16, int threads, const void* x, float* mean_nc,
                     float* mean, float* var) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    choose(bf16, [&](auto t) { statistics(s, (const decltype(t)*)x, mean_nc, mean, var); });
}

void iebn_normalize(long n, long c, long hw, int channels_last, int bf16, int threads, const void* x,
                    const float* mean_nc, const float* mean, const float* var, double eps, const float* weight,
                    const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
                    float* scale_nc, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        normalize(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc, scale_nc, (T*)y);
    });
}

void iebn_reduce(long n, long c, long hw, int channels_last, int bf16, int threads, const void* g, const void* x,
                 const float* mean_nc, const float* gate_nc, const float* scale_nc, const float* mean, const float* var,
                 double eps, const float* weight, float* dz_nc, float* dweight, float* dbias, float* dgate_weight,
                 float* dgate_bias, float* k1, float* k2) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        reduce(s, (const T*)g, (const T*)x, mean_nc, gate_nc, scale_nc, mean, var, eps, weight, dz_nc, dweight, dbias,
               dgate_weight, dgate_bias, k1, k2);
    });
}

void iebn_grad_input(long n, long c, long hw, int channels_last, int bf16, int threads, const void* g, const void* x,
                     const float* scale_nc, const float* dz_nc, const float* mean, const float* var, double eps,
                     const float* gate_weight, const float* k1, const float* k2, double count, void* dx) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        grad_input(s, (const T*)g, (const T*)x, scale_nc, dz_nc, mean, var, eps, gate_weight, k1, k2, count, (T*)dx);
    });
}
}
