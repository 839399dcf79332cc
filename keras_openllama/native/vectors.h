/* Vectors of the processor that this is compiled for: 16 lanes with AVX-512, else 8. */

#ifndef VECTORS_H
#define VECTORS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The smallest multiple that is at least x. */
INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

#define LANES 16
#define MAX_ROWS 8 /* Rows whose sums are in registers at once. */
typedef __m512i Words;
typedef __m512 Floats;

INLINE Words load_words(const uint32_t *words) { return _mm512_loadu_si512(words); }
INLINE Words fill_word(int32_t word) { return _mm512_set1_epi32(word); }
INLINE Words low_nibbles(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE Words high_nibbles(Words w) { return low_nibbles(_mm512_srli_epi16(w, 4)); }
INLINE Floats to_floats(Words w) { return _mm512_cvtepi32_ps(w); }
INLINE Floats load_float16(const uint16_t *x, int64_t count) { /* Zeros after `count`. */
  return _mm512_cvtph_ps(
      _mm256_maskz_loadu_epi16(count < LANES ? (1u << count) - 1 : 0xffff, x));
}
INLINE Floats fill_float(float x) { return _mm512_set1_ps(x); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}

INLINE Floats load_floats(const float *x) { return _mm512_loadu_ps(x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
/* The second one if either is not a number. */
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats nearest_integers(Floats x) { return _mm512_roundscale_ps(x, 0); }
/* `power` are integers. */
INLINE Floats times_power_of_two(Floats x, Floats power) {
  return _mm512_scalef_ps(x, power);
}
/* `a` in the lanes whose bit is set, else `b`. */
INLINE Floats select_lanes(uint32_t bits, Floats a, Floats b) {
  return _mm512_mask_blend_ps((__mmask16)bits, b, a);
}
/* A bit for each of 64 bytes, set if the byte is not 0. */
INLINE uint64_t nonzero_bytes(const uint8_t *bytes) {
  __m512i x = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(x, x);
}

/* Adds the products of the four bytes of each lane. `w` are 0 to 15, `x` are signed. */
INLINE Words dot_nibbles(Words sum, Words w, Words x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}

/* The same for `w` of 0 to 255, from which `BYTE_ZERO` is yet to be subtracted. */
#define BYTE_ZERO 128
INLINE Words dot_bytes(Words sum, Words w, Words x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}

INLINE void store(float *to, Floats x, int64_t count) {
  _mm512_mask_storeu_ps(to, count < LANES ? (1u << count) - 1 : 0xffff, x);
}
INLINE Floats load_int8(const int8_t *x, int64_t count) { /* Zeros after `count`. */
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
      _mm_maskz_loadu_epi8(count < LANES ? (1u << count) - 1 : 0xffff, x)));
}
INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }
INLINE void store_float16(uint16_t *to, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(to, count < LANES ? (1u << count) - 1 : 0xffff,
                           _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Floats load_some(const float *x, int64_t count) {
  return _mm512_maskz_loadu_ps(count < LANES ? (1u << count) - 1 : 0xffff, x);
}
INLINE Floats load_bfloat16(const uint16_t *x, int64_t count) {
  __m256i half = _mm256_maskz_loadu_epi16(count < LANES ? (1u << count) - 1 : 0xffff, x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE Words as_words(Floats x) { return _mm512_castps_si512(x); }
INLINE Floats as_floats(Words w) { return _mm512_castsi512_ps(w); }
INLINE Words join_halves(Words low, Words high) { /* The upper 16 bits of both. */
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats at_most(Floats most, Floats x) { return _mm512_min_ps(most, x); } /* x, if NaN */
INLINE float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

INLINE void store_words(uint32_t *to, Words w) { _mm512_storeu_si512(to, w); }
INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

#if defined(__AVX512BF16__)
#define INPUTS_PER_WORD 2
INLINE void store_bfloat16(uint16_t *to, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(to, count < LANES ? (1u << count) - 1 : 0xffff,
                           (__m256i)_mm512_cvtneps_pbh(x));
}
INLINE Words load_weights(const uint16_t *w, int64_t count) { /* Zeros after `count`. */
  if (count >= 32) return _mm512_loadu_si512(w);
  return _mm512_maskz_loadu_epi16((1u << count) - 1, w);
}
INLINE Floats add_products(Floats sum, Words w, Words x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
#else
#define INPUTS_PER_WORD 1
INLINE Words load_weights(const uint16_t *w, int64_t count) {
  return as_words(load_bfloat16(w, count));
}
INLINE Floats add_products(Floats sum, Words w, Words x) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
}
#endif

/* Exchanges rows and columns, in four steps of twice the distance. */
INLINE void transpose(Words *w) {
  Words t[LANES];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      w[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      w[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(w[i + j], w[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(w[i + j], w[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    w[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    w[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define LANES 8
#define MAX_ROWS 4
typedef __m256i Words;
typedef __m256 Floats;

INLINE Words load_words(const uint32_t *words) {
  return _mm256_loadu_si256((const __m256i *)words);
}
INLINE Words fill_word(int32_t word) { return _mm256_set1_epi32(word); }
INLINE Words low_nibbles(Words w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
INLINE Words high_nibbles(Words w) { return low_nibbles(_mm256_srli_epi16(w, 4)); }
INLINE Floats to_floats(Words w) { return _mm256_cvtepi32_ps(w); }
INLINE Floats load_float16(const uint16_t *x, int64_t count) { /* Zeros after `count`. */
  uint16_t values[LANES] = {0};
  if (count < LANES) x = memcpy(values, x, count * sizeof *values);
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
INLINE Floats fill_float(float x) { return _mm256_set1_ps(x); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}

INLINE Floats load_floats(const float *x) { return _mm256_loadu_ps(x); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats nearest_integers(Floats x) { return _mm256_round_ps(x, 8); }
/* Results below the smallest normal number are 0. */
INLINE Floats times_power_of_two(Floats x, Floats power) {
  __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23);
  Floats product = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), exponent));
  Floats is_normal = _mm256_cmp_ps(power, _mm256_set1_ps(-125), _CMP_NLT_UQ);
  return _mm256_and_ps(product, is_normal);
}
INLINE Floats select_lanes(uint32_t bits, Floats a, Floats b) {
  __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), lanes);
  __m256i is_set = _mm256_cmpeq_epi32(set, lanes);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(is_set));
}
INLINE uint64_t nonzero_bytes(const uint8_t *bytes) {
  uint64_t bits = 0;
  for (int half = 0; half < 2; half++) {
    __m256i x = _mm256_loadu_si256((const __m256i *)bytes + half);
    __m256i is_zero = _mm256_cmpeq_epi8(x, _mm256_setzero_si256());
    bits |= (uint64_t)~(uint32_t)_mm256_movemask_epi8(is_zero) << (32 * half);
  }
  return bits;
}

INLINE Words dot_nibbles(Words sum, Words w, Words x) {
  Words pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* `maddubs` saturates at 16 bits, so bytes are subtracted from first: their absolute
   values, of up to 128, times values of up to 127 fit in. */
#define BYTE_ZERO 0
INLINE Words dot_bytes(Words sum, Words w, Words x) {
  Words v = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return dot_nibbles(sum, _mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
}

INLINE void store(float *to, Floats x, int64_t count) {
  float values[LANES];
  _mm256_storeu_ps(values, x);
  memcpy(to, values, (count < LANES ? count : LANES) * sizeof(float));
}
INLINE Floats load_int8(const int8_t *x, int64_t count) {
  int64_t bytes = 0;
  memcpy(&bytes, x, count < LANES ? count : LANES);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
}
INLINE Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE void store_float16(uint16_t *to, Floats x, int64_t count) {
  __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &halves, (count < LANES ? count : LANES) * sizeof *to);
}
INLINE Floats load_some(const float *x, int64_t count) {
  if (count >= LANES) return _mm256_loadu_ps(x);
  float values[LANES] = {0};
  memcpy(values, x, count * sizeof(float));
  return _mm256_loadu_ps(values);
}
INLINE Floats load_bfloat16(const uint16_t *x, int64_t count) {
  uint16_t values[LANES] = {0};
  if (count < LANES) x = memcpy(values, x, count * sizeof *values);
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE Words as_words(Floats x) { return _mm256_castps_si256(x); }
INLINE Floats as_floats(Words w) { return _mm256_castsi256_ps(w); }
INLINE Words join_halves(Words low, Words high) { /* The upper 16 bits of both. */
  return _mm256_or_si256(_mm256_srli_epi32(low, 16), high);
}
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Floats at_most(Floats most, Floats x) { return _mm256_min_ps(most, x); } /* x, if NaN */
INLINE float largest_of(Floats x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

INLINE void store_words(uint32_t *to, Words w) { _mm256_storeu_si256((__m256i *)to, w); }
INLINE float sum_of(Floats x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#define INPUTS_PER_WORD 1
INLINE Words load_weights(const uint16_t *w, int64_t count) {
  return as_words(load_bfloat16(w, count));
}
INLINE Floats add_products(Floats sum, Words w, Words x) {
  return _mm256_fmadd_ps(_mm256_castsi256_ps(w), _mm256_castsi256_ps(x), sum);
}

/* Exchanges rows and columns, in three steps of twice the distance. */
INLINE void transpose(Words *w) {
  Words t[LANES];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(w[i], w[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      w[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      w[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm256_permute2x128_si256(w[j], w[4 + j], 0x20);
    t[4 + j] = _mm256_permute2x128_si256(w[j], w[4 + j], 0x31);
  }
  memcpy(w, t, sizeof t);
}

#else
#error "The products need a processor with AVX2, FMA and F16C."
#endif

#if INPUTS_PER_WORD == 1
/* Rounds to the nearest, and to the even one of two. */
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
INLINE void store_bfloat16(uint16_t *to, Floats x, int64_t count) {
  float values[LANES];
  store(values, x, LANES);
  for (int64_t i = 0; i < LANES && i < count; i++) to[i] = to_bfloat16(values[i]);
}
#endif

/* Copies a row to words as `add_products` reads them: two of bfloat16, or one. */
INLINE void store_row(uint32_t *to, const float *from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    Floats x = load_some(from + i, count - i);
    if (INPUTS_PER_WORD == 2)
      store_bfloat16((uint16_t *)to + i, x, count - i);
    else
      store((float *)to + i, x, count - i);
  }
}

/* 2 to the power of x, within a unit in the last place and 0 far below. `x` is at most
   126. The polynomial is 2^f for f from -0.5 to 0.5, with a relative error of 2e-9. */
INLINE Floats power_of_two(Floats x) {
  x = larger(fill_float(-200), x); /* Not a number stays so. */
  Floats integer = nearest_integers(x), f = subtract(x, integer);
  Floats y = fill_float(1.5353362e-4f);
  y = multiply_add(y, f, fill_float(1.3398875e-3f));
  y = multiply_add(y, f, fill_float(9.6184369e-3f));
  y = multiply_add(y, f, fill_float(5.5503324e-2f));
  y = multiply_add(y, f, fill_float(0.24022648f));
  y = multiply_add(y, f, fill_float(0.69314718f));
  y = multiply_add(y, f, fill_float(1));
  return times_power_of_two(y, integer);
}

#endif
