// `_cpu.cpp` in vectors of 512 bits, which `cpu.py` takes where the processor has them.

#if defined(__x86_64__)
#define IEBN_AVX512
#include "_cpu.cpp"
#endif
