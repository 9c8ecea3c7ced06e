// What `cpu.py` calls: the passes of `_cpu_passes.h` for either type.

#include <cstdint>
#include <new>

#include "_cpu_passes.h"

namespace {

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

extern const int iebn_interface = 7;  // cpu.py asks for it: a library of other arguments must not be called

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
        reduce(s, (const T*)g, (const T*)x, mean_nc, gate_nc, mean, var, eps, weight, Behind<T, None>{}, dz_nc, dweight,
               dbias, dgate_weight, dgate_bias, sums);
    });
}

int iebn_grad_input(SHAPE, const void* g, const void* x, const float* gate_nc, const float* dz_nc, const float* mean,
                    const float* var, double eps, const float* weight, const float* gate_weight, const float* sums,
                    double count, void* dx) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        grad_input(s, (const T*)g, (const T*)x, scales(s, gate_nc, var, eps, weight).data(), dz_nc, mean, var, eps,
                   gate_weight, sums, count, (T*)dx);
    });
}

int iebn_backward(SHAPE, const void* g, const void* x, const float* mean_nc, const float* gate_nc, const float* mean,
                  const float* var, double eps, const float* weight, const float* bias, const float* gate_weight,
                  const void* kept, int act, void* found, float* dz_nc, float* dweight, float* dbias,
                  float* dgate_weight, float* dgate_bias, float* sums, double count, void* dx) {
    const Shape s{n, c, hw, bool(channels_last), threads};
    return choose(bf16, [&](auto t) {
        typedef decltype(t) T;
        backward(s, (const T*)g, (const T*)x, mean_nc, gate_nc, mean, var, eps, weight, bias, gate_weight,
                 (const T*)kept, act, (T*)found, dz_nc, dweight, dbias, dgate_weight, dgate_bias, sums, count, (T*)dx);
    });
}
}
