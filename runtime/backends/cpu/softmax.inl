// The softmax of attention, over one tile of scores at a time. The products around it are torch's.
//
// scores (batch, groups * rows, cols), groups query heads stacked over one key head: row r stands for query r % rows of the
// tile, which sees the columns up to first + r % rows, and of these the last `window` only (window <= 0: all of them).

struct Tile {
    int64_t batch, stacked, rows, cols, first, window;

    ET_MEMBER Range visible(int64_t row) const {
        int64_t end = first + row % rows + 1;
        int64_t begin = window > 0 && end > window ? end - window : 0;
        end = end < cols ? end : cols;
        return {begin < end ? begin : end, end > 0 ? end : 0};
    }
};

template <class T>
void clear(T* x, int64_t begin, int64_t end) {
    if (begin < end) memset(static_cast<void*>(x + begin), 0, size_t(end - begin) * sizeof(T));
}

// Scores become probabilities; lse (batch, stacked) gets the logarithm of each row's sum of exponentials.
template <class T>
void softmax_tile(T* scores, Tile tile, float scale, float* lse, int threads) {
    parallel_for(threads, tile.batch * tile.stacked, 8, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            T* x = scores + row * tile.cols;
            Range see = tile.visible(row % tile.stacked);
            const int64_t width = see.end - see.begin;
            T* seen = x + see.begin;
            const float lowest = from_bits(0xff800000), most = largest(seen, width) * scale;
            Floats sums = {};
            each(width, [&](int64_t i, auto part) { sums += exponential(fused(get(seen + i, part, lowest), all(scale), all(-most))); });
            const float log_z = width > 0 ? most + logf(sum(sums)) : lowest;
            each(width, [&](int64_t i, auto part) {
                put(seen + i, exponential(fused(get(seen + i, part), all(scale), all(-log_z))), part);
            });
            clear(x, 0, see.begin);
            clear(x, see.end, tile.cols);
            lse[row] = log_z;
        }
    });
}

// Scores become the probabilities P again (from lse), and dP becomes dS = P (dP - delta) scale; delta (batch, stacked).
template <class T>
void softmax_backward_tile(T* scores, T* gradients, Tile tile, float scale, const float* lse, const float* delta, int threads) {
    parallel_for(threads, tile.batch * tile.stacked, 8, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            T *x = scores + row * tile.cols, *g = gradients + row * tile.cols;
            Range see = tile.visible(row % tile.stacked);
            const float log_z = lse[row], mean = delta[row];
            each(see.end - see.begin, [&](int64_t j, auto part) {
                const int64_t i = see.begin + j;
                Floats p = exponential(fused(get(x + i, part), all(scale), all(-log_z)));
                put(x + i, p, part);
                put(g + i, p * (get(g + i, part) - mean) * scale, part);
            });
            clear(x, 0, see.begin);
            clear(x, see.end, tile.cols);
            clear(g, 0, see.begin);
            clear(g, see.end, tile.cols);
        }
    });
}

// a and b (N, heads, hd), each row and head contiguous -> out (heads, N): the dot product of each pair. Attention's delta.
template <class T>
void head_dots(const T* a, int64_t a_row, int64_t a_head, const T* b, int64_t b_row, int64_t b_head, int64_t rows, int64_t heads,
               int64_t size, float* out, int threads) {
    parallel_for(threads, rows, 16, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            for (int64_t head = 0; head < heads; head++) {
                const T *x = a + row * a_row + head * a_head, *y = b + row * b_row + head * b_head;
                Floats sums = {};
                each(size, [&](int64_t i, auto part) { sums = fused(get(x + i, part), get(y + i, part), sums); });
                out[head * rows + row] = sum(sums);
            }
    });
}

#define ET_FOR_SCORES(suffix, T)                                                                                              \
    void softmax_tile_##suffix(T* scores, int64_t batch, int64_t stacked, int64_t rows, int64_t cols, int64_t first,          \
                               int64_t window, float scale, float* lse, int t) {                                              \
        softmax_tile(scores, {batch, stacked, rows, cols, first, window}, scale, lse, t);                                     \
    }                                                                                                                         \
    void softmax_backward_tile_##suffix(T* scores, T* gradients, int64_t batch, int64_t stacked, int64_t rows, int64_t cols,  \
                                        int64_t first, int64_t window, float scale, const float* lse, const float* delta,     \
                                        int t) {                                                                              \
        softmax_backward_tile(scores, gradients, {batch, stacked, rows, cols, first, window}, scale, lse, delta, t);          \
    }                                                                                                                         \
    void head_dots_##suffix(const T* a, int64_t ar, int64_t ah, const T* b, int64_t br, int64_t bh, int64_t n, int64_t heads, \
                            int64_t size, float* out, int t) {                                                                \
        head_dots(a, ar, ah, b, br, bh, n, heads, size, out, t);                                                              \
    }
ET_FOR_SCORES(bf16, Bf16)
ET_FOR_SCORES(f32, float)

#define ET_SOFTMAX_KERNELS(X)                                                                                             \
    X(softmax_tile_bf16) X(softmax_tile_f32) X(softmax_backward_tile_bf16) X(softmax_backward_tile_f32) X(head_dots_bf16) \
    X(head_dots_f32)
