// gemm.inl's product on AMX. Tiles 0 to 3 hold a square of sums (see attention_amx.inl). The next strip is dequantised between
// the tiles' products, since the unit that multiplies tiles is apart from the one that looks numbers up.

// Tile `sums` += tile `left` x tile `right`, of which the weights' bytes have no sign. A macro, since the intrinsics want
// literal tile numbers.
#define ET_TILE_PRODUCT(sums, left, right)                       \
    do {                                                         \
        if (sizeof(L) == 2) _tile_dpbf16ps(sums, left, right);   \
        else if (PANEL_LEFT) _tile_dpbsud(sums, left, right);    \
        else _tile_dpbusd(sums, left, right);                    \
    } while (0)

// Tiles 0 to 3 (2 x 2 blocks of sums) += one left square x one right square. Tiles 4 and 5 hold the left square's two halves,
// 6 and 7 the right one's; loads are spread between products, so that each has time to arrive.
// PANEL_LEFT: the left square is the panel's, not the strip's. A panel comes from the second cache and is used once, so it is
// loaded past the first cache (stream_loadd), which the strips need.
template <bool PANEL_LEFT, class L, class R>
ET_INLINE void multiply_square(const L* left, const R* right) {
    constexpr int64_t tile = Form<L>::tile;
    if (PANEL_LEFT) {
        _tile_loadd(6, right, 64);
        _tile_stream_loadd(4, left, 64);
        ET_TILE_PRODUCT(0, 4, 6);
        _tile_loadd(7, right + tile, 64);
        ET_TILE_PRODUCT(1, 4, 7);
        _tile_stream_loadd(5, left + tile, 64);
    } else {
        _tile_stream_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        ET_TILE_PRODUCT(0, 4, 6);
        _tile_stream_loadd(7, right + tile, 64);
        ET_TILE_PRODUCT(1, 4, 7);
        _tile_loadd(5, left + tile, 64);
    }
    ET_TILE_PRODUCT(2, 5, 6);
    ET_TILE_PRODUCT(3, 5, 7);
}

// c (32, 32) = or, if `add`, += the products of `main` and then of `more`: fp32, or 32-bit integers.
// After every square of main, `next` (a strip that is being dequantised) gets `chunks` chunks further.
template <bool PANEL_LEFT, class L, class R, class Next>
ET_INLINE void multiply(float* c, const Squares<L, R>& main, const Squares<L, R>& more, bool add, Next& next, int64_t chunks,
                        const Ahead& ahead) {
    ET_MEMORY_BARRIER();
    if (add) {
        _tile_loadd(0, c, 128);
        _tile_loadd(1, c + 16, 128);
        _tile_loadd(2, c + 512, 128);
        _tile_loadd(3, c + 528, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < main.count; s++) {
        multiply_square<PANEL_LEFT>(main.left + s * Form<L>::square, main.right + s * Form<L>::square);
        ahead.fetch(s);
        for (int64_t i = 0; i < chunks && next.more(); i++) next.chunk();
    }
    for (int64_t s = 0; s < more.count; s++)
        multiply_square<PANEL_LEFT>(more.left + s * Form<L>::square, more.right + s * Form<L>::square);
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
    ET_MEMORY_BARRIER();
}

