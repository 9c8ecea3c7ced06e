// The work on a batch, for (n, c, hw) values of NCHW or channels last: cut into images or less, then into blocks, and
// these into strips of up to four vectors; a lane of a vector is a channel in channels last and a position in NCHW. The
// order of every sum depends on the shape and the number of lanes alone, not on the number of threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "_cpu_vectors.h"

namespace {

constexpr int GROUP = 4 * LANES;  // values at most in a row of a strip
constexpr int64_t BLOCK = 4096;  // values in a block, which the first cache holds; few enough to be added up one by one

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

    // Covers a block with strips, of a few rows only, because memory that is not taken in order is twice as slow; or of
    // `all_rows`, where the block is in the cache, or much is to be loaded for each strip.
    template <class Body>
    void walk_image(const Block& b, const Body& body, bool all_rows = false) const {
        const int64_t step = all_rows || c <= GROUP ? b.size : std::max<int64_t>(1, 256 / c), end = b.start + b.size;
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
    void sums(const Block& b, float* const (&per_channel)[K], const Term& term, bool all_rows = false) const {
        if (channels_last) {
            for (float* out : per_channel) std::fill(out + b.begin, out + b.end, 0.0f);
            walk_image(b, [&](auto strip) { strip.sums(per_channel, term(strip)); }, all_rows);
        } else {
            Vec of_lanes[K] = {};
            walk_plane(b, [&](auto strip) { strip.sums(of_lanes, term(strip)); });
            for (int k = 0; k < K; ++k) per_channel[k][b.begin] = sum(of_lanes[k]);
        }
    }
};

}  // namespace
