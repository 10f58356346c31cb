// Kernels in bfloat16 for processors with AVX-512 and its bfloat16 products (AVX512_BF16).
//
// Plain functions over pointers, called through ctypes: no header of torch is needed, so this
// compiles in two seconds. Threads are those of torch: processor.py links its own OpenMP.
// All sums are kept in float32; results are rounded once.

#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using bf16 = uint16_t;

inline __m512 load16(const bf16* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline void store16(bf16* to, __m512 values) {
  const __m256bh rounded = _mm512_cvtneps_pbh(values);
  __m256i raw;
  std::memcpy(&raw, &rounded, sizeof(raw));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), raw);
}

inline __m512bh as_pairs(__m512i raw) {
  __m512bh pairs;
  std::memcpy(&pairs, &raw, sizeof(pairs));
  return pairs;
}

// 2^n times a polynomial of the rest: relative error below 2e-7 (Cody and Waite, 1980).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 gelu_tanh16(__m512 x) {
  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_mul_ps(
      _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(-1.5957691216057308f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(u)));
}

// --- attention ----------------------------------------------------------------------------------

constexpr int kQueries = 24;  // rows of queries computed together
constexpr int kKeys = 192;    // keys of a block: scores stay in the nearest cache
constexpr int kRows = 6;      // rows of one product: 6 x 4 sums in registers

struct Strides {
  int64_t batch, head, row;
};

// Keys as pairs of channels, 16 keys side by side: (D / 2, keys, 2).
template <int D>
void pack_keys(const bf16* keys, int64_t row, int count, int padded, bf16* to) {
  for (int k = 0; k < padded; ++k) {
    for (int pair = 0; pair < D / 2; ++pair) {
      uint32_t two = 0;
      if (k < count) std::memcpy(&two, keys + k * row + 2 * pair, 4);
      std::memcpy(to + (static_cast<int64_t>(pair) * padded + k) * 2, &two, 4);
    }
  }
}

// Values as pairs of keys: (keys / 2, D, 2).
template <int D>
void pack_values(const bf16* values, int64_t row, int count, int padded, bf16* to) {
  for (int pair = 0; pair < padded / 2; ++pair) {
    const bf16* even = values + 2 * pair * row;
    bf16* out = to + static_cast<int64_t>(pair) * D * 2;
    for (int d = 0; d < D; ++d) {
      out[2 * d] = 2 * pair < count ? even[d] : 0;
      out[2 * d + 1] = 2 * pair + 1 < count ? even[row + d] : 0;
    }
  }
}

template <int D>
void scores(const bf16* const* queries, const bf16* keys, int padded, int first, int width,
            float* to) {
  for (int column = 0; column < width; column += 64) {
    __m512 sums[kRows][4];
    for (auto& row : sums)
      for (auto& one : row) one = _mm512_setzero_ps();
    const bf16* from = keys + static_cast<int64_t>(first + column) * 2;
    for (int pair = 0; pair < D / 2; ++pair) {
      const bf16* line = from + static_cast<int64_t>(pair) * padded * 2;
      __m512bh here[4];
      for (int i = 0; i < 4; ++i) here[i] = as_pairs(_mm512_loadu_si512(line + 32 * i));
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        std::memcpy(&two, queries[r] + 2 * pair, 4);
        const __m512bh query = as_pairs(_mm512_set1_epi32(two));
        for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], query, here[i]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 4; ++i)
        _mm512_store_ps(to + r * kKeys + column + 16 * i, sums[r][i]);
  }
}

template <int D, int R>
void weigh(const bf16* weights, const bf16* values, int width, float* out) {
  constexpr int kLanes = 4;
  for (int d = 0; d < D; d += 16 * kLanes) {
    __m512 sums[R][kLanes];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kLanes; ++i) sums[r][i] = _mm512_load_ps(out + r * D + d + 16 * i);
    for (int pair = 0; pair < width / 2; ++pair) {
      const bf16* line = values + (static_cast<int64_t>(pair) * D + d) * 2;
      __m512bh here[kLanes];
      for (int i = 0; i < kLanes; ++i) here[i] = as_pairs(_mm512_loadu_si512(line + 32 * i));
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, weights + r * kKeys + 2 * pair, 4);
        const __m512bh weight = as_pairs(_mm512_set1_epi32(two));
        for (int i = 0; i < kLanes; ++i)
          sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weight, here[i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kLanes; ++i) _mm512_store_ps(out + r * D + d + 16 * i, sums[r][i]);
  }
}

// One head: softmax(q k' scale) v, block by block (Dao et al., FlashAttention, 2022).
template <int D>
void attend(const bf16* q, int64_t q_row, const bf16* keys, const bf16* values, bf16* out,
            int64_t out_row, int queries, int count, int padded, float scale) {
  alignas(64) float score[kQueries * kKeys];
  alignas(64) bf16 weight[kQueries * kKeys];
  alignas(64) float sum[kQueries * D];
  alignas(64) float highest[kQueries], total[kQueries];
  const __m512 factor = _mm512_set1_ps(scale);
  for (int start = 0; start < queries; start += kQueries) {
    const int rows = std::min(kQueries, queries - start);
    std::memset(sum, 0, sizeof(sum));
    std::fill(highest, highest + kQueries, -INFINITY);
    std::fill(total, total + kQueries, 0.0f);
    for (int key = 0; key < count; key += kKeys) {
      const int width = std::min(kKeys, padded - key);
      const int real = std::min(width, count - key);
      for (int r = 0; r < rows; r += kRows) {
        const bf16* some[kRows];
        for (int i = 0; i < kRows; ++i)
          some[i] = q + static_cast<int64_t>(start + std::min(r + i, rows - 1)) * q_row;
        scores<D>(some, keys, padded, key, width, score + r * kKeys);
      }
      for (int r = 0; r < rows; ++r) {
        float* row = score + r * kKeys;
        for (int k = real; k < width; ++k) row[k] = -INFINITY;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int k = 0; k < width; k += 16) most = _mm512_max_ps(most, _mm512_load_ps(row + k));
        const float peak = std::max(highest[r], _mm512_reduce_max_ps(most) * scale);
        const float shrink = std::exp(highest[r] - peak);
        const __m512 shift = _mm512_set1_ps(peak);
        __m512 sums = _mm512_setzero_ps();
        for (int k = 0; k < width; k += 16) {
          const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(row + k), factor, shift);
          const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
          const __m512 e = _mm512_maskz_mov_ps(there, exponential(x));
          sums = _mm512_add_ps(sums, e);
          store16(weight + r * kKeys + k, e);
        }
        total[r] = total[r] * shrink + _mm512_reduce_add_ps(sums);
        highest[r] = peak;
        if (shrink != 1.0f) {
          const __m512 by = _mm512_set1_ps(shrink);
          for (int d = 0; d < D; d += 16)
            _mm512_store_ps(sum + r * D + d, _mm512_mul_ps(by, _mm512_load_ps(sum + r * D + d)));
        }
      }
      const bf16* here = values + static_cast<int64_t>(key) * D;
      int r = 0;
      for (; r + kRows <= rows; r += kRows)
        weigh<D, kRows>(weight + r * kKeys, here, width, sum + r * D);
      for (; r < rows; ++r) weigh<D, 1>(weight + r * kKeys, here, width, sum + r * D);
    }
    for (int r = 0; r < rows; ++r) {
      const __m512 by = _mm512_set1_ps(1.0f / total[r]);
      bf16* to = out + static_cast<int64_t>(start + r) * out_row;
      for (int d = 0; d < D; d += 16)
        store16(to + d, _mm512_mul_ps(by, _mm512_load_ps(sum + r * D + d)));
    }
  }
}

template <int D>
void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, Strides qs, Strides ks,
               Strides vs, Strides os, int batches, int heads, int queries, int keys,
               float scale) {
  const int padded = (keys + 63) / 64 * 64;
  const int64_t each = static_cast<int64_t>(padded) * D;
#pragma omp parallel
  {
    std::unique_ptr<bf16, decltype(&std::free)> memory(
        static_cast<bf16*>(std::aligned_alloc(64, 2 * each * sizeof(bf16))), &std::free);
    bf16* packed_keys = memory.get();
    bf16* packed_values = packed_keys + each;
#pragma omp for schedule(dynamic)
    for (int item = 0; item < batches * heads; ++item) {
      const int b = item / heads, h = item % heads;
      pack_keys<D>(k + b * ks.batch + h * ks.head, ks.row, keys, padded, packed_keys);
      pack_values<D>(v + b * vs.batch + h * vs.head, vs.row, keys, padded, packed_values);
      attend<D>(q + b * qs.batch + h * qs.head, qs.row, packed_keys, packed_values,
                out + b * os.batch + h * os.head, os.row, queries, keys, padded, scale);
    }
  }
}

// One row to int8 around `offset`, its largest number being 127; returns what it was divided by.
float quantise_row(const bf16* from, uint8_t* to, int64_t width, int offset) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(load16(from + i)));
  const float scale = std::max(_mm512_reduce_max_ps(most), 1e-30f) / 127.0f;
  const __m512 by = _mm512_set1_ps(1.0f / scale);
  for (int64_t i = 0; i < width; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load16(from + i), by));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(offset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
  }
  return scale;
}

#ifdef __AVX512VNNI__

constexpr int kPanel = 64;      // output channels that are computed together
constexpr int kDepth = 4096;    // inputs whose weights stay in the second cache meanwhile
constexpr int kTokens = 6;      // rows whose sums stay in registers

// Sums of products of bytes for up to six rows and one panel, added to what is there. The loops
// are unrolled before g++ decides what stays in registers, and the sum is added to in place: else
// it copies sums to the stack and back, at half the speed.
template <int R>
void multiply(const uint8_t* from, int64_t row, const int8_t* weights, int64_t groups,
              int32_t* sums) {
  __m512i total[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[r][i] = _mm512_loadu_si512(sums + r * kPanel + 16 * i);
  for (int64_t group = 0; group < groups; ++group) {
    __m512i here[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      here[i] = _mm512_loadu_si512(weights + (group * kPanel + 16 * i) * 4);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, from + r * row + group * 4, 4);
      const __m512i each = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        asm("vpdpbusd %2, %1, %0" : "+v"(total[r][i]) : "v"(each), "v"(here[i]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(sums + r * kPanel + 16 * i, total[r][i]);
}

void multiply_some(int rows, const uint8_t* from, int64_t row, const int8_t* weights,
                   int64_t groups, int32_t* sums) {
  switch (rows) {
    case 1: return multiply<1>(from, row, weights, groups, sums);
    case 2: return multiply<2>(from, row, weights, groups, sums);
    case 3: return multiply<3>(from, row, weights, groups, sums);
    case 4: return multiply<4>(from, row, weights, groups, sums);
    case 5: return multiply<5>(from, row, weights, groups, sums);
    default: return multiply<6>(from, row, weights, groups, sums);
  }
}

// Rows of bytes, which `fill(row, to)` gives, in panels: of each four inputs, those of 64 outputs
// together. `offsets` are 128 times the sums of each output's numbers.
template <class Fill>
void pack(int8_t* to, int32_t* offsets, int64_t outputs, int64_t inputs, const Fill& fill) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel
  {
    std::vector<uint8_t> rows(kPanel * inputs);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * kPanel;
      const int count = static_cast<int>(std::min<int64_t>(kPanel, outputs - first));
      for (int r = 0; r < kPanel; ++r) {
        uint8_t* row = rows.data() + r * inputs;
        if (r >= count) {
          std::memset(row, 0, inputs);
          continue;
        }
        fill(first + r, row);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < inputs; i += 16)
          sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(_mm_loadu_si128(
                                          reinterpret_cast<const __m128i*>(row + i))));
        offsets[first + r] = 128 * _mm512_reduce_add_epi32(sum);
      }
      int8_t* out = to + first * inputs;
      const __m512i steps = _mm512_mullo_epi32(
          _mm512_set1_epi32(static_cast<int>(inputs)),
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      for (int64_t i = 0; i < inputs; i += 4)
        for (int part = 0; part < 4; ++part)
          _mm512_storeu_si512(
              out + i * kPanel + part * 64,
              _mm512_i32gather_epi32(steps, rows.data() + part * 16 * inputs + i, 1));
    }
  }
}

#endif

}  // namespace

extern "C" {

int danqing_attention(const bf16* q, const bf16* k, const bf16* v, bf16* out,
                      const int64_t* strides, int batches, int heads, int queries, int keys,
                      int width, float scale) {
  Strides s[4];
  for (int i = 0; i < 4; ++i) s[i] = {strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  if (width == 64)
    attention<64>(q, k, v, out, s[0], s[1], s[2], s[3], batches, heads, queries, keys, scale);
  else if (width == 128)
    attention<128>(q, k, v, out, s[0], s[1], s[2], s[3], batches, heads, queries, keys, scale);
  else
    return 1;
  return 0;
}

// Rows of `width`, a multiple of 16; what comes out may lie in wider rows.
void danqing_gelu_tanh(const bf16* from, bf16* to, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * width; i < (row + 1) * width; i += 16)
      store16(to + i, gelu_tanh16(load16(from + i)));
}

// Layer norm without weights, then times (1 + scale) plus shift, both of the row's picture.
void danqing_modulated_norm(const bf16* from, const bf16* scale, const bf16* shift, bf16* to,
                            int64_t pictures, int64_t rows, int64_t width, int64_t stride,
                            float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < pictures * rows; ++row) {
    const bf16* x = from + row * width;
    const bf16* by = scale + row / rows * stride;
    const bf16* plus = shift + row / rows * stride;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, load16(x + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 d = _mm512_sub_ps(load16(x + i), mean);
      square = _mm512_fmadd_ps(d, d, square);
    }
    const float variance = _mm512_reduce_add_ps(square) / width;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + eps));
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(load16(x + i), mean), inverse);
      const __m512 factor = _mm512_add_ps(load16(by + i), _mm512_set1_ps(1.0f));
      store16(to + row * width + i, _mm512_fmadd_ps(normal, factor, load16(plus + i)));
    }
  }
}

// Rows of `width` (a head's, a multiple of 16) divided by their root mean square, times a weight.
void danqing_rms_norm(const bf16* from, const bf16* weight, bf16* to, int64_t rows, int64_t width,
                      float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const bf16* x = from + row * width;
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 one = load16(x + i);
      square = _mm512_fmadd_ps(one, one, square);
    }
    const float mean = _mm512_reduce_add_ps(square) / width;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 normal = _mm512_mul_ps(load16(x + i), inverse);
      store16(to + row * width + i, _mm512_mul_ps(normal, load16(weight + i)));
    }
  }
}

// Pairs of neighbours turned: (batch, tokens, heads, width) by (tokens, width) cosines and sines.
void danqing_rope(const bf16* from, const float* cosine, const float* sine, bf16* to,
                  int64_t batches, int64_t tokens, int64_t heads, int64_t width) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi64(0x0000000080000000LL));
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < batches * tokens; ++row) {
    const float* c = cosine + row % tokens * width;
    const float* s = sine + row % tokens * width;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t start = (row * heads + head) * width;
      for (int64_t i = 0; i < width; i += 16) {
        const __m512 x = load16(from + start + i);
        const __m512 other = _mm512_xor_ps(_mm512_permute_ps(x, 0xB1), sign);
        const __m512 turned = _mm512_mul_ps(other, _mm512_loadu_ps(s + i));
        store16(to + start + i, _mm512_fmadd_ps(x, _mm512_loadu_ps(c + i), turned));
      }
    }
  }
}

// Rows to int8 with a scale each; activations as unsigned numbers around 128, weights signed.
static void quantise_rows(const bf16* from, uint8_t* to, float* scales, int64_t rows,
                          int64_t width, int offset) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    scales[row] = quantise_row(from + row * width, to + row * width, width, offset);
}

void danqing_quantise_activations(const bf16* from, uint8_t* to, float* scales, int64_t rows,
                                  int64_t width) {
  quantise_rows(from, to, scales, rows, width, 128);
}

void danqing_quantise_weights(const bf16* from, uint8_t* to, float* scales, int64_t rows,
                              int64_t width) {
  quantise_rows(from, to, scales, rows, width, 0);
}

// Rows times a scale each, plus a bias; in place.
void danqing_scale_rows(bf16* states, const float* scales, const bf16* bias, int64_t rows,
                        int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const __m512 by = _mm512_set1_ps(scales[row]);
    bf16* x = states + row * width;
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 plus = bias ? load16(bias + i) : _mm512_setzero_ps();
      store16(x + i, _mm512_fmadd_ps(load16(x + i), by, plus));
    }
  }
}

#ifdef __AVX512VNNI__

// Weights (outputs, inputs) to int8 with a scale for each output, packed.
void danqing_int8_pack(const bf16* from, int8_t* to, float* scales, int32_t* offsets,
                       int64_t outputs, int64_t inputs) {
  pack(to, offsets, outputs, inputs, [=](int64_t row, uint8_t* bytes) {
    scales[row] = quantise_row(from + row * inputs, bytes, inputs, 0);
  });
}

// Weights that are bytes already, packed; their scales are left as they are.
void danqing_int8_pack_bytes(const int8_t* from, int8_t* to, const float*, int32_t* offsets,
                             int64_t outputs, int64_t inputs) {
  pack(to, offsets, outputs, inputs, [=](int64_t row, uint8_t* bytes) {
    std::memcpy(bytes, from + row * inputs, inputs);
  });
}

// (tokens, inputs) of bytes around 128, with a scale each, times packed weights, plus a bias.
void danqing_int8_linear(const uint8_t* from, const float* by, const int8_t* packed,
                         const float* scales, const int32_t* offsets, const bf16* bias, bf16* to,
                         int64_t tokens, int64_t inputs, int64_t outputs) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel
  {
    std::vector<int32_t> sums(tokens * kPanel);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * kPanel;
      const int8_t* weights = packed + first * inputs;
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t depth = 0; depth < inputs; depth += kDepth) {
        const int64_t groups = std::min<int64_t>(kDepth, inputs - depth) / 4;
        for (int64_t token = 0; token < tokens; token += kTokens)
          multiply_some(static_cast<int>(std::min<int64_t>(kTokens, tokens - token)),
                        from + token * inputs + depth, inputs, weights + depth * kPanel, groups,
                        sums.data() + token * kPanel);
      }
      const int64_t count = std::min<int64_t>(kPanel, outputs - first);
      for (int64_t token = 0; token < tokens; ++token) {
        const __m512 own = _mm512_set1_ps(by[token]);
        for (int64_t i = 0; i < count; i += 16) {
          const int64_t at = first + i;
          const __m512i whole =
              _mm512_sub_epi32(_mm512_loadu_si512(sums.data() + token * kPanel + i),
                               _mm512_loadu_si512(offsets + at));
          const __m512 factor = _mm512_mul_ps(own, _mm512_loadu_ps(scales + at));
          const __m512 plus = bias ? load16(bias + at) : _mm512_setzero_ps();
          store16(to + token * outputs + at,
                  _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, plus));
        }
      }
    }
  }
}

#endif
}
