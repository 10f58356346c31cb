// Products of a processor's registers alone, with nothing read from memory: what no program exceeds.

#include <immintrin.h>
#include <cstdint>

namespace {

constexpr int kSums = 24;  // independent sums: enough that none waits for itself

}  // namespace

extern "C" {

// Operations that were done: of bfloat16 products (vdpbf16ps), on all threads.
double danqing_peak_bf16(int64_t rounds) {
  double done = 0;
#ifdef __AVX512BF16__
#pragma omp parallel reduction(+ : done)
  {
    __m512 sum[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
    const __m512i one = _mm512_set1_epi32(0x3f803f80);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i)
        asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum[i]) : "v"(one));
    done += 64.0 * kSums * rounds;
  }
#endif
  return done;
}

// The same of bytes (vpdpbusd).
double danqing_peak_int8(int64_t rounds) {
  double done = 0;
#ifdef __AVX512VNNI__
#pragma omp parallel reduction(+ : done)
  {
    __m512i sum[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi32(0x01010101);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i)
        asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum[i]) : "v"(one));
    done += 128.0 * kSums * rounds;
  }
#endif
  return done;
}

}
