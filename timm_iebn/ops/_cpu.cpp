// The four passes of IEBN on CPU, for float32 and bfloat16, NCHW and channels last, and inference in one. `cpu.py` calls
// them, and says what their arguments are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "_cpu_strips.h"

namespace {

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

    // The output, `residual` added if there is one, and then `act`.
    template <class T, class Act>
    void apply(const Shape& s, const Block& block, const T* x, const T* residual, Act act, T* y) const {
        s.walk(block, [&](auto strip) {
            const auto scale = strip.spread(scale_nc + block.image * s.c), center = strip.spread(mean);
            const auto shift = bias ? strip.spread(bias) : decltype(center){};
            const auto affine = [&](int64_t row, int v) {
                return (strip.at(x, row, v) - center.v[v]) * scale.v[v] + shift.v[v];
            };
            if (residual)
                strip.each([&](int64_t row, int v) {
                    strip.put(act(affine(row, v) + strip.at(residual, row, v)), y, row, v);
                });
            else
                strip.each([&](int64_t row, int v) { strip.put(act(affine(row, v)), y, row, v); });
        });
    }
};

template <class T>
void normalize(const Shape& s, const T* x, const float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               const T* residual, int act, T* y) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c);
    const Affine affine{mean, slope.data(), bias, gate_weight, gate_bias, gate_nc, scale_nc.data()};
    s.parallel(s.n, [&](int64_t n) { affine.gates(s, n, 0, s.c, mean_nc); });
    with_activation(act, [&](auto activation) {
        s.each_part([&](const Block& block) { affine.apply(s, block, x, residual, activation, y); });
    });
}

// Statistics are given: each image is read from memory once, and from the cache when its means are known. Means and
// gates are optional results.
template <class T>
void infer(const Shape& s, const T* x, float* mean_nc, const float* mean, const float* var, double eps,
           const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
           const T* residual, int act, T* y) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c), block_sum_nc(s.n * s.c), means_nc(mean_nc ? 0 : s.n * s.c);
    if (!mean_nc) mean_nc = means_nc.data();
    const Affine affine{mean, slope.data(), bias, gate_weight, gate_bias, gate_nc, scale_nc.data()};
    with_activation(act, [&](auto activation) {
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
                s.each_block(n, c0, c0 + step,
                             [&](const Block& block) { affine.apply(s, block, x, residual, activation, y); });
        };
        s.each_image(task, GROUP);
    });
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

extern const int iebn_interface = 6;  // cpu.py asks for it: a library of other arguments must not be called

int iebn_statistics(SHAPE, const void* x, float* mean_nc, float* mean, float* var) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) { statistics(s, (const decltype(t)*)x, mean_nc, mean, var); });
}

int iebn_normalize(SHAPE, const void* x, const float* mean_nc, const float* mean, const float* var, double eps,
                   const float* weight, const float* bias, const float* gate_weight, const float* gate_bias,
                   float* gate_nc, const void* residual, int act, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        normalize(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc,
                  (const T*)residual, act, (T*)y);
    });
}

int iebn_forward(SHAPE, const void* x, float* mean_nc, float* mean, float* var, double eps, const float* weight,
                 const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
                 const void* residual, int act, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        statistics(s, (const T*)x, mean_nc, mean, var);
        normalize(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc,
                  (const T*)residual, act, (T*)y);
    });
}

int iebn_infer(SHAPE, const void* x, float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               const void* residual, int act, void* y) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        infer(s, (const T*)x, mean_nc, mean, var, eps, weight, bias, gate_weight, gate_bias, gate_nc,
              (const T*)residual, act, (T*)y);
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
