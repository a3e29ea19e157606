// Any CPU: plain C++, vectorised with whatever the compiler's default flags allow.
#define ET_ISA scalar
#define ET_SCALAR 1
#include "kernels.inl"
