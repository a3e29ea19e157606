// (the decode engineer's)
#define ET_DECODE_KERNELS(X)
