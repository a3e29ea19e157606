// multiply_squares on AMX: one instruction adds the product of two bf16 tiles, 32 deep, to a tile of 16 x 16 fp32 sums. Its
// operands are exactly attention_tiles.inl's forms.
//
// A CPU has eight tile registers of 1 KB. Here and in gemm.inl, 0 to 3 are the 2 x 2 blocks of a square of sums, 4 and 5 the
// left square's two halves, 6 and 7 the right one's: four products for four loads.

// The operand of ldtilecfg (Intel's manual, "TILECFG"): palette 1 has tiles of up to 16 rows of 64 bytes, and all are used
// whole.
struct TileShapes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Every thread configures its tile registers before its first product, and releases them after its last: as long as they are in
// use, a thread switch saves 8 KiB more.
ET_INLINE void products_begin() {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
#if !defined(_MSC_VER)
    __asm__ volatile("" ::"r"(&shapes) : "memory");  // gcc 12 takes ldtilecfg to read 8 bytes, and would drop the other stores
#endif
    _tile_loadconfig(&shapes);
}
ET_INLINE void products_end() { _tile_release(); }

#if defined(_MSC_VER)
#define ET_MEMORY_BARRIER() _ReadWriteBarrier()
#else
#define ET_MEMORY_BARRIER() __asm__ volatile("" ::: "memory")  // gcc does not know that tile loads and stores touch memory
#endif

// c (32, 32) fp32, rows ldc apart, = or += the sum over n squares; see attention_tiles.inl, whose bf16 template it replaces.
static void multiply_squares(float* c, int64_t ldc, const Bf16* left, int64_t left_step, const Bf16* right, int64_t right_step,
                             int64_t n, bool add) {
    const int64_t stride = ldc * 4;
    float* lower = c + 16 * ldc;
    ET_MEMORY_BARRIER();
    if (add) {
        _tile_loadd(0, c, stride);
        _tile_loadd(1, c + 16, stride);
        _tile_loadd(2, lower, stride);
        _tile_loadd(3, lower + 16, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < n; s++, left += left_step, right += right_step) {
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16, stride);
    _tile_stored(2, lower, stride);
    _tile_stored(3, lower + 16, stride);
    ET_MEMORY_BARRIER();
}
