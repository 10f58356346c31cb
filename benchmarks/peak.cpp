// Products of a processor's registers alone, with nothing read from memory: what no program exceeds.

#include <immintrin.h>
#include <cstdint>

namespace {

constexpr int kSums = 24;  // independent sums: enough that none waits for itself

// Operations that were done on all threads, `each` by an instruction that adds products to a sum.
template <class Sum, class Add>
double run(int64_t rounds, double each, Sum zero, Add add) {
  double done = 0;
#pragma omp parallel reduction(+ : done)
  {
    Sum sums[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = zero;
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) add(sums[i]);
    done += each * kSums * rounds;
  }
  return done;
}

}  // namespace

extern "C" {

// Products of bfloat16; 0 where the processor has none.
double danqing_peak_bf16(int64_t rounds) {
#ifdef __AVX512BF16__
  const __m512i one = _mm512_set1_epi32(0x3f803f80);
  return run(rounds, 64, _mm512_setzero_ps(), [one](__m512& sum) {
    asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(one));
  });
#else
  return 0;
#endif
}

// The same of bytes.
double danqing_peak_int8(int64_t rounds) {
#ifdef __AVX512VNNI__
  const __m512i one = _mm512_set1_epi32(0x01010101);
  return run(rounds, 128, _mm512_setzero_si512(), [one](__m512i& sum) {
    asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(one));
  });
#else
  return 0;
#endif
}

}
