// The four passes of IEBN on CPU, for float32 and bfloat16, NCHW and channels last, and inference in one. `cpu.py` says
// what their arguments are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
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

// The gates, with `slope` those of `slopes`: fills in `scale_nc`, and `gate_nc` if it is wanted.
struct Gates {
    const float *weight, *bias, *slope;
    float *gate_nc, *scale_nc;

    // For some channels of image n.
    void find(const Shape& s, int64_t n, int64_t begin, int64_t end, const float* mean_nc) const {
        const auto some = [&](auto part) {
            const int64_t c = part.c;
            const Vec gate = sigmoid(part.load(weight + c) * part.load(mean_nc + n * s.c + c) + part.load(bias + c));
            if (gate_nc) part.store(gate, gate_nc + n * s.c + c);
            part.store(gate * part.load(slope + c), scale_nc + n * s.c + c);
        };
        int64_t c = begin;
        for (; c + LANES <= end; c += LANES) some(Strip<1, true, true>{0, 1, 0, c, LANES});
        if (c < end) some(Strip<1, false, true>{0, 1, 0, c, int(end - c)});
    }
};

struct Affine {
    const float *mean, *bias, *scale_nc;

    // What the layer gives for x, as a function of row and vector.
    template <class T, class Strip>
    auto output(const Shape& s, const Block& block, Strip strip, const T* x) const {
        const auto scale = strip.spread(scale_nc + block.image * s.c), center = strip.spread(mean);
        const auto shift = bias ? strip.spread(bias) : decltype(center){};
        return [=](int64_t row, int v) { return (strip.at(x, row, v) - center.v[v]) * scale.v[v] + shift.v[v]; };
    }

    // The output, `residual` added if there is one, and then `act`.
    template <class T, class Act>
    void apply(const Shape& s, const Block& block, const T* x, const T* residual, Act act, T* y) const {
        s.walk(block, [&](auto strip) {
            const auto z = output(s, block, strip, x);
            if (residual)
                strip.each([&](int64_t row, int v) {
                    strip.put(act(z(row, v) + strip.at(residual, row, v)), y, row, v);
                });
            else
                strip.each([&](int64_t row, int v) { strip.put(act(z(row, v)), y, row, v); });
        });
    }
};

template <class T>
void normalize(const Shape& s, const T* x, const float* mean_nc, const float* mean, const float* var, double eps,
               const float* weight, const float* bias, const float* gate_weight, const float* gate_bias, float* gate_nc,
               const T* residual, int act, T* y) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c);
    const Gates gates{gate_weight, gate_bias, slope.data(), gate_nc, scale_nc.data()};
    const Affine affine{mean, bias, scale_nc.data()};
    s.parallel(s.n, [&](int64_t n) { gates.find(s, n, 0, s.c, mean_nc); });
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
    const Gates gates{gate_weight, gate_bias, slope.data(), gate_nc, scale_nc.data()};
    const Affine affine{mean, bias, scale_nc.data()};
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
            gates.find(s, n, begin, end, mean_nc);
            for (int64_t c0 = begin; c0 < end; c0 += step)
                s.each_block(n, c0, c0 + step,
                             [&](const Block& block) { affine.apply(s, block, x, residual, activation, y); });
        };
        s.each_image(task, GROUP);
    });
}

// An activation behind the layer, as backward needs it. What went into it is found from x and `kept`, a residual that
// was added, or from `kept` alone, what it has made of the sum. Its gradient goes to `found`.
template <class T, class Act, bool KEPT = false>
struct Behind {
    Affine affine;
    const T* kept;
    T* found;

    // The gradient of what the layer gives, as a function of row and vector.
    template <class Strip>
    auto gradient(const Shape& s, const Block& block, Strip strip, const T* g, const T* x) const {
        if constexpr (std::is_same_v<Act, None>) {
            return [=](int64_t row, int v) { return strip.at(g, row, v); };
        } else {
            return [=, z = affine.output(s, block, strip, x), kept = kept, found = found](int64_t row, int v) {
                Vec input;
                if constexpr (!KEPT)
                    input = z(row, v);
                else if constexpr (Act::FROM_RESULT)
                    input = strip.at(kept, row, v);
                else
                    input = z(row, v) + strip.at(kept, row, v);
                const Vec result = Act{}.grad(strip.at(g, row, v), input);
                strip.put(result, found, row, v);
                return result;
            };
        }
    }
};

template <class T, class Act, bool KEPT>
void reduce(const Shape& s, const T* g, const T* x, const float* mean_nc, const float* gate_nc, const float* mean,
            const float* var, double eps, const float* weight, const Behind<T, Act, KEPT>& behind, float* dz_nc,
            float* dweight, float* dbias, float* dgate_weight, float* dgate_bias, float* sums) {
    std::vector<float> block_sum_nc(s.n * s.c), block_product_nc(s.n * s.c), sum_nc(s.n * s.c);
    s.each_image([&](int64_t n, int64_t begin, int64_t end) {
        float *sum = sum_nc.data() + n * s.c, *product = dz_nc + n * s.c;
        std::fill(product + begin, product + end, 0.0f);
        float *block_sum = block_sum_nc.data() + n * s.c, *block_product = block_product_nc.data() + n * s.c;
        s.each_block(n, begin, end, [&](const Block& block) {
            const auto terms = [&](auto strip) {
                const auto gradient = behind.gradient(s, block, strip, g, x);
                return [=, center = strip.spread(mean)](int64_t row, int v, Vec* result) {
                    result[0] = gradient(row, v);
                    result[1] = result[0] * (strip.at(x, row, v) - center.v[v]);
                };
            };
            s.sums(block, {block_sum, block_product}, terms, true);
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

// `dx` may be `g`.
template <class T>
void grad_input(const Shape& s, const T* g, const T* x, const float* scale_nc, const float* dz_nc, const float* mean,
                const float* var, double eps, const float* gate_weight, const float* sums, double count, T* dx) {
    const std::vector<float> inv = slopes(s, var, eps, nullptr);
    std::vector<float> shift_nc(s.n * s.c), pull(s.c), push(s.c);
    if (count)
        for (int64_t c = 0; c < s.c; ++c) {
            push[c] = sums[c] / float(count);
            pull[c] = sums[s.c + c] * inv[c] / float(-count);
        }
    s.parallel(s.n, [&](int64_t n) {
        for (int64_t c = 0, i = n * s.c; c < s.c; ++c, ++i) shift_nc[i] = dz_nc[i] * gate_weight[c] / s.hw - push[c];
    });
    s.each_part([&](const Block& block) {
        s.walk(block, [&](auto strip) {
            const auto scale = strip.spread(scale_nc + block.image * s.c);
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

// `scale` of `Affine` once more, from the gates that were kept.
std::vector<float> scales(const Shape& s, const float* gate_nc, const float* var, double eps, const float* weight) {
    const std::vector<float> slope = slopes(s, var, eps, weight);
    std::vector<float> scale_nc(s.n * s.c);
    s.parallel(s.n, [&](int64_t n) {
        for (int64_t c = 0, i = n * s.c; c < s.c; ++c, ++i) scale_nc[i] = gate_nc[i] * slope[c];
    });
    return scale_nc;
}

// Both passes; without `dx` the first alone. With an `act`, see `Behind`, its gradient goes to `found`, which may be `dx`.
template <class T>
void backward(const Shape& s, const T* g, const T* x, const float* mean_nc, const float* gate_nc, const float* mean,
              const float* var, double eps, const float* weight, const float* bias, const float* gate_weight,
              const T* kept, int act, T* found, float* dz_nc, float* dweight, float* dbias, float* dgate_weight,
              float* dgate_bias, float* sums, double count, T* dx) {
    const std::vector<float> scale_nc = scales(s, gate_nc, var, eps, weight);
    const Affine affine{mean, bias, scale_nc.data()};
    const auto first = [&](const auto& behind) {
        reduce(s, g, x, mean_nc, gate_nc, mean, var, eps, weight, behind, dz_nc, dweight, dbias, dgate_weight,
               dgate_bias, sums);
    };
    with_activation(act, [&](auto activation) {
        typedef decltype(activation) Act;
        if constexpr (std::is_same_v<Act, None>)
            first(Behind<T, Act>{});
        else if (kept)
            first(Behind<T, Act, true>{affine, kept, found});
        else
            first(Behind<T, Act>{affine, nullptr, found});
    });
    if (dx)
        grad_input(s, act ? found : g, x, scale_nc.data(), dz_nc, mean, var, eps, gate_weight, sums, count, dx);
}

}  // namespace
