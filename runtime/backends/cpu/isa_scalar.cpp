// Any processor: plain C++, whatever the compiler's defaults vectorise.
#define ET_ISA scalar
#define ET_SCALAR 1
#include "kernels.inl"
