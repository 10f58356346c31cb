// Weights in fewer bits widened to float32 or bfloat16, as their formats define them.
//
// The blocks are those of ggml (https://github.com/ggml-org/ggml, ggml-common.h); each number is
// computed in float32 in the order of the library gguf, so that both give the same bits.
// Compiled without contraction of products and sums for that reason.

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLong = 256;
constexpr int kShort = 32;

float half(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  uint32_t wide;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&wide, &value, 4);
    wide |= sign;
  } else {
    wide = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13;
  }
  std::memcpy(&value, &wide, 4);
  return value;
}

void q4_0(const uint8_t* from, float* to) {
  const float d = half(from);
  for (int i = 0; i < 16; ++i) {
    to[i] = d * static_cast<float>((from[2 + i] & 15) - 8);
    to[16 + i] = d * static_cast<float>((from[2 + i] >> 4) - 8);
  }
}

void q4_1(const uint8_t* from, float* to) {
  const float d = half(from), m = half(from + 2);
  for (int i = 0; i < 16; ++i) {
    to[i] = d * static_cast<float>(from[4 + i] & 15) + m;
    to[16 + i] = d * static_cast<float>(from[4 + i] >> 4) + m;
  }
}

void q5_0(const uint8_t* from, float* to) {
  const float d = half(from);
  uint32_t high;
  std::memcpy(&high, from + 2, 4);
  for (int i = 0; i < 16; ++i) {
    const int low = (from[6 + i] & 15) | (high >> i & 1) << 4;
    const int next = (from[6 + i] >> 4) | (high >> (i + 16) & 1) << 4;
    to[i] = d * static_cast<float>(low - 16);
    to[16 + i] = d * static_cast<float>(next - 16);
  }
}

void q5_1(const uint8_t* from, float* to) {
  const float d = half(from), m = half(from + 2);
  uint32_t high;
  std::memcpy(&high, from + 4, 4);
  for (int i = 0; i < 16; ++i) {
    const int low = (from[8 + i] & 15) | (high >> i & 1) << 4;
    const int next = (from[8 + i] >> 4) | (high >> (i + 16) & 1) << 4;
    to[i] = d * static_cast<float>(low) + m;
    to[16 + i] = d * static_cast<float>(next) + m;
  }
}

void q8_0(const uint8_t* from, float* to) {
  const float d = half(from);
  const int8_t* values = reinterpret_cast<const int8_t*>(from + 2);
  for (int i = 0; i < kShort; ++i) to[i] = static_cast<float>(values[i]) * d;
}

void q2_k(const uint8_t* from, float* to) {
  const uint8_t* quants = from + 16;
  const float d = half(from + 80), least = half(from + 82);
  for (int group = 0; group < 16; ++group) {
    const float by = d * static_cast<float>(from[group] & 15);
    const float minus = least * static_cast<float>(from[group] >> 4);
    const uint8_t* q = quants + group / 8 * 32 + group % 2 * 16;
    const int shift = group / 2 % 4 * 2;
    for (int i = 0; i < 16; ++i)
      to[16 * group + i] = by * static_cast<float>(q[i] >> shift & 3) - minus;
  }
}

void q3_k(const uint8_t* from, float* to) {
  const uint8_t* quants = from + 32;
  const uint8_t* packed = from + 96;
  const float d = half(from + 108);
  for (int group = 0; group < 16; ++group) {
    const int low = packed[group % 8] >> (group / 8 * 4) & 15;
    const int high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
    const float by = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t* q = quants + group / 8 * 32 + group % 2 * 16;
    const uint8_t* mask = from + group % 2 * 16;
    const int shift = group / 2 % 4 * 2;
    for (int i = 0; i < 16; ++i) {
      const int value = (q[i] >> shift & 3) - ((mask[i] >> (group / 2) & 1) ? 0 : 4);
      to[16 * group + i] = by * static_cast<float>(value);
    }
  }
}

// Six bits of a scale and six of a minimum for each of eight groups.
void scale_and_least(const uint8_t* packed, int group, int* scale, int* least) {
  if (group < 4) {
    *scale = packed[group] & 63;
    *least = packed[4 + group] & 63;
  } else {
    *scale = (packed[4 + group] & 15) | (packed[group - 4] >> 2 & 48);
    *least = (packed[4 + group] >> 4) | (packed[group] >> 2 & 48);
  }
}

void q4_k(const uint8_t* from, float* to) {
  const float d = half(from), under = half(from + 2);
  for (int group = 0; group < 8; ++group) {
    int scale, least;
    scale_and_least(from + 4, group, &scale, &least);
    const float by = d * static_cast<float>(scale), minus = under * static_cast<float>(least);
    const uint8_t* q = from + 16 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i)
      to[32 * group + i] = by * static_cast<float>(q[i] >> shift & 15) - minus;
  }
}

void q5_k(const uint8_t* from, float* to) {
  const float d = half(from), under = half(from + 2);
  const uint8_t* high = from + 16;
  for (int group = 0; group < 8; ++group) {
    int scale, least;
    scale_and_least(from + 4, group, &scale, &least);
    const float by = d * static_cast<float>(scale), minus = under * static_cast<float>(least);
    const uint8_t* q = from + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int value = (q[i] >> shift & 15) | (high[i] >> group & 1) << 4;
      to[32 * group + i] = by * static_cast<float>(value) - minus;
    }
  }
}

void q6_k(const uint8_t* from, float* to) {
  const uint8_t* high = from + 128;
  const int8_t* scales = reinterpret_cast<const int8_t*>(from + 192);
  const float d = half(from + 208);
  for (int group = 0; group < 16; ++group) {
    const float by = d * static_cast<float>(scales[group]);
    const int part = group / 8, within = group % 8;  // of 128 numbers; of 16 in these
    const uint8_t* l = from + part * 64 + within % 4 * 16;
    const uint8_t* h = high + part * 32 + within % 2 * 16;
    const int low_shift = within / 4 * 4, high_shift = within / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      const int value = (l[i] >> low_shift & 15) | (h[i] >> high_shift & 3) << 4;
      to[16 * group + i] = by * static_cast<float>(value - 32);
    }
  }
}

struct Format {
  void (*unpack)(const uint8_t*, float*);
  int elements, bytes;
};

// By ggml's numbers of the types.
bool format_of(int type, Format* found) {
  switch (type) {
    case 2: *found = {q4_0, kShort, 18}; return true;
    case 3: *found = {q4_1, kShort, 20}; return true;
    case 6: *found = {q5_0, kShort, 22}; return true;
    case 7: *found = {q5_1, kShort, 24}; return true;
    case 8: *found = {q8_0, kShort, 34}; return true;
    case 10: *found = {q2_k, kLong, 84}; return true;
    case 11: *found = {q3_k, kLong, 110}; return true;
    case 12: *found = {q4_k, kLong, 144}; return true;
    case 13: *found = {q5_k, kLong, 176}; return true;
    case 14: *found = {q6_k, kLong, 210}; return true;
    default: return false;
  }
}

void put(const float* from, float* to, int count) { std::memcpy(to, from, 4 * count); }

uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool odd = (bits & 0x7fffffff) > 0x7f800000;  // not a number
  return odd ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void put(const float* from, uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = rounded(from[i]);
}

template <typename Out>
void blocks(const Format& format, const uint8_t* from, Out* to, int64_t count) {
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < count; ++block) {
    alignas(64) float values[kLong];
    format.unpack(from + block * format.bytes, values);
    put(values, to + block * format.elements, format.elements);
  }
}

template <typename Out>
void bytes(const uint8_t* from, const float* table, const float* scales, int64_t apart, Out* to,
           int64_t rows, int64_t width) {
#pragma omp parallel
  {
    float scaled[256];
    Out found[256];
    int64_t made = -1;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      if (made < 0 || apart) {
        for (int i = 0; i < 256; ++i) scaled[i] = table[i] * scales[row * apart];
        put(scaled, found, 256);
        made = row;
      }
      for (int64_t i = row * width; i < (row + 1) * width; ++i) to[i] = found[from[i]];
    }
  }
}

}  // namespace

extern "C" {

// Blocks of a type of ggml; returns 0 if it is one of those above.
int danqing_unpack_blocks(int type, const uint8_t* from, void* to, int to_bfloat16,
                          int64_t count) {
  Format format;
  if (!format_of(type, &format)) return 1;
  if (to_bfloat16)
    blocks(format, from, static_cast<uint16_t*>(to), count);
  else
    blocks(format, from, static_cast<float*>(to), count);
  return 0;
}

// table[byte] times the scale of the row; the rows' scales lie `apart`, 0 if there is one for all.
void danqing_unpack_bytes(const uint8_t* from, const float* table, const float* scales,
                          int64_t apart, void* to, int to_bfloat16, int64_t rows, int64_t width) {
  if (to_bfloat16)
    bytes(from, table, scales, apart, static_cast<uint16_t*>(to), rows, width);
  else
    bytes(from, table, scales, apart, static_cast<float*>(to), rows, width);
}
}
