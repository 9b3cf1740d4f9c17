/* The kernels in portable C, compiled once for any machine and once for AVX2: simple loops that compilers vectorize. */
#include "lq.h"

#include <math.h>
#include <string.h>

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef LQ_TABLE
#define LQ_TABLE lq_base
#endif

#define STEP 256 /* codes that are unpacked at once; whole words for every width */

static void unpack(const lq_weight *w, int64_t n, int64_t k0, int64_t count, uint8_t *out) {
  const uint8_t *row = (const uint8_t *)(w->words + n * w->row_words);
  int64_t i = 0;
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (w->bits == 8) {
    memcpy(out, row + k0, (size_t)count);
    return;
  }
  if (w->bits == 4) {
    const uint8_t *at = row + k0 / 2;
    int first = w->swapped ? 4 : 0, second = 4 - first;
#ifdef __AVX2__
    for (; i + 32 <= count; i += 32) {
      __m128i v = _mm_loadu_si128((const __m128i *)(at + i / 2)), mask = _mm_set1_epi8(15);
      __m128i low = _mm_and_si128(v, mask), high = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
      __m128i even = w->swapped ? high : low, odd = w->swapped ? low : high;
      _mm_storeu_si128((__m128i *)(out + i), _mm_unpacklo_epi8(even, odd));
      _mm_storeu_si128((__m128i *)(out + i + 16), _mm_unpackhi_epi8(even, odd));
    }
#endif
    for (; i + 1 < count; i += 2) {
      out[i] = at[i / 2] >> first & 15;
      out[i + 1] = at[i / 2] >> second & 15;
    }
  } else if (w->bits == 2) {
    const uint8_t *at = row + k0 / 4;
#ifdef __AVX2__
    for (; i + 32 <= count; i += 32) {
      __m128i v = _mm_loadl_epi64((const __m128i *)(at + i / 4)), mask = _mm_set1_epi8(3);
      __m128i a = _mm_and_si128(v, mask), b = _mm_and_si128(_mm_srli_epi16(v, 2), mask);
      __m128i c = _mm_and_si128(_mm_srli_epi16(v, 4), mask), d = _mm_and_si128(_mm_srli_epi16(v, 6), mask);
      __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
      _mm_storeu_si128((__m128i *)(out + i), _mm_unpacklo_epi16(ab, cd));
      _mm_storeu_si128((__m128i *)(out + i + 16), _mm_unpackhi_epi16(ab, cd));
    }
#endif
    for (; i + 3 < count; i += 4) {
      uint8_t four = at[i / 4];
      out[i] = four & 3, out[i + 1] = four >> 2 & 3, out[i + 2] = four >> 4 & 3, out[i + 3] = four >> 6;
    }
  } else if (w->bits == 3) {
    const uint8_t *at = row + k0 / 8 * 3;
    for (; i + 7 < count; i += 8, at += 3) {
      uint32_t eight = at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16;
      for (int j = 0; j < 8; j++) out[i + j] = eight >> 3 * j & 7;
    }
  }
#endif
  for (; i < count; i++) out[i] = (uint8_t)lq_code(w, n, k0 + i);
}

/* values of one row, k0 a multiple of STEP */
static void decode(const lq_weight *w, int64_t n, int64_t k0, int64_t count, float *out) {
  uint8_t codes[STEP];
  for (int64_t start = 0; start < count; start += STEP) {
    int64_t size = count - start < STEP ? count - start : STEP;
    unpack(w, n, k0 + start, size, codes);
    for (int64_t i = 0; i < size;) {
      int64_t k = k0 + start + i, offset = w->flat ? n * w->k + k : k;
      int64_t stop = i + w->group - offset % w->group;
      if (stop > size) stop = size;
      float scale = lq_scale(w, n, k);
      float *at = out + start;
      if (w->kind == LQ_INT) {
        int32_t zero = lq_zero(w, n, k);
        for (; i < stop; i++) at[i] = (float)((int32_t)codes[i] - zero) * scale;
      } else if (w->kind == LQ_CODEBOOK) {
#ifdef __AVX2__
        __m256 low = _mm256_loadu_ps(w->table), high = _mm256_loadu_ps(w->table + 8), factor = _mm256_set1_ps(scale);
        for (; i + 8 <= stop; i += 8) {
          __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
          __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* the sign is the code's bit of 8 */
          __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), upper);
          _mm256_storeu_ps(at + i, _mm256_mul_ps(v, factor));
        }
#endif
        for (; i < stop; i++) at[i] = w->table[codes[i]] * scale;
      } else {
        const float *values = lq_fp8_values[w->kind == LQ_E5M2];
        for (; i < stop; i++) at[i] = values[codes[i]] * scale;
      }
    }
  }
}

static float dot(const float *a, const float *b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

static int32_t dot_codes(const uint8_t *a, const int8_t *b, int64_t count) {
  int32_t sum = 0;
  int64_t i = 0;
#ifdef __ARM_FEATURE_DOTPROD
  /* signed by signed: a - 128, and 128 times the sum of b */
  int32x4_t products = vdupq_n_s32(0), sums = vdupq_n_s32(0);
  for (; i + 16 <= count; i += 16) {
    int8x16_t right = vld1q_s8(b + i);
    products = vdotq_s32(products, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a + i), vdupq_n_u8(0x80))), right);
    sums = vdotq_s32(sums, vdupq_n_s8(1), right);
  }
  sum = vaddvq_s32(products) + 128 * vaddvq_s32(sums);
#endif
  for (; i < count; i++) sum += (int32_t)(int16_t)((int16_t)a[i] * (int16_t)b[i]);
  return sum;
}

/* Section 2.1 of arXiv:1712.05877, with numerics.py's operations in its order, so that the codes are the same. */
static void quantize(const lq_linear_args *a, lq_codes *out) {
  const int64_t k = a->weight.k;
  const int32_t low = a->in_low, high = a->in_high;
  int any = 0;
#pragma omp parallel for num_threads(lq_threads(a->m *k * 4)) reduction(| : any)
  for (int64_t m = 0; m < a->m; m++) {
    int8_t *codes = out->codes + m * out->stride;
    float scale;
    int32_t zero = 0;
    if (a->input == LQ_INPUT_STATIC) {
      scale = a->in_scale[0], zero = a->in_zero[0];
    } else {
      float smallest = 0, largest = 0, wrong = 0;
      for (int64_t i = 0; i < k; i++) {
        float v = lq_load(a->x, a->dtype, m * a->x_stride + i);
        smallest = v < smallest ? v : smallest;
        largest = v > largest ? v : largest;
        wrong += v * 0; /* nan for what is not finite */
      }
      if (a->in_symmetric) {
        float bound = low == 0 || largest > -smallest ? largest : -smallest;
        scale = bound / (float)high;
      } else {
        scale = largest / (float)(high - low) - smallest / (float)(high - low);
      }
      if (scale < LQ_MIN_SCALE) scale = LQ_MIN_SCALE;
      if (!a->in_symmetric) {
        float at = low - rintf(smallest / scale);
        zero = (int32_t)(at < low ? low : at > high ? high : at);
      }
      if (smallest == 0 && largest == 0) scale = 1;
      if (wrong != 0 || wrong != wrong) scale = NAN;
    }
    const int32_t shift = lq_shift(a, zero);
    float inverse = 1.0f / scale;
    for (int64_t i = 0; i < k; i++) {
      float v = rintf(lq_load(a->x, a->dtype, m * a->x_stride + i) * inverse) + zero;
      v = v >= low ? v : low; /* nan too */
      v = v <= high ? v : high;
      codes[i] = (int8_t)((int32_t)v - shift);
    }
    memset(codes + k, 0, (size_t)(out->stride - k));
    out->scale[m] = scale;
    out->zero[m] = zero - shift;
    any |= zero != shift;
  }
  out->any_zero = any;
}

static float bias_of(const lq_linear_args *a, int64_t n) { return a->bias ? lq_load(a->bias, a->bias_dtype, n) : 0.0f; }

static int linear_float(const lq_linear_args *a) {
  const lq_weight *w = &a->weight;
  const int64_t k = w->k, n_rows = w->n, m_rows = a->m;
  float *x = lq_scratch(0, (size_t)(m_rows * k + 1) * sizeof(float));
  if (!x) return LQ_NO_MEMORY;
  for (int64_t m = 0; m < m_rows; m++)
    for (int64_t i = 0; i < k; i++) x[m * k + i] = lq_load(a->x, a->dtype, m * a->x_stride + i);
  int failed = 0;
#pragma omp parallel num_threads(lq_threads(n_rows *k *m_rows)) reduction(| : failed)
  {
    float *row = lq_scratch(1, (size_t)(k + 1) * sizeof(float));
    failed = !row;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; n++) {
      if (!row) continue;
      decode(w, n, 0, k, row);
      for (int64_t m = 0; m < m_rows; m++) {
        float sum = dot(row, x + m * k, k);
        lq_store(a->y, a->y_dtype, m * n_rows + n, (a->x_scale ? sum * a->x_scale[m] : sum) + bias_of(a, n));
      }
    }
  }
  return failed ? LQ_NO_MEMORY : LQ_OK;
}

static int linear_codes(const lq_linear_args *a) {
  const lq_weight *w = &a->weight;
  const int64_t k = w->k, n_rows = w->n, m_rows = a->m;
  /* a sum of 2^15 products of 8 bits fits an int32 */
  const int64_t segment = w->group < 32768 ? w->group : 32768, segments = (k + segment - 1) / segment;
  if (w->kind != LQ_INT || w->flat || (w->group < k && w->group % segment)) return LQ_REFUSED;
  int8_t *codes = lq_scratch(0, (size_t)(m_rows * (k + 8 + segments * 4) + 64));
  if (!codes) return LQ_NO_MEMORY;
  float *scale = (float *)(codes + ((m_rows * k + 63) & ~(int64_t)63));
  int32_t *zero = (int32_t *)(scale + m_rows), *sums = zero + m_rows;
  lq_codes input = {codes, k, scale, zero, 0};
  quantize(a, &input);
  for (int64_t m = 0; m < m_rows; m++)
    for (int64_t s = 0; s < segments; s++) {
      int32_t sum = 0;
      for (int64_t i = s * segment; i < (s + 1) * segment && i < k; i++) sum += codes[m * k + i];
      sums[m * segments + s] = sum;
    }
  int failed = 0;
#pragma omp parallel num_threads(lq_threads(n_rows *k *m_rows)) reduction(| : failed)
  {
    uint8_t *row = lq_scratch(1, (size_t)(k + STEP));
    failed = !row;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; n++) {
      if (!row) continue;
      unpack(w, n, 0, k, row);
      float whole = 0; /* the sum of the row's values, for inputs whose zero point is not 0 */
      for (int64_t s = 0; input.any_zero && s < segments; s++) {
        int64_t start = s * segment, size = k - start < segment ? k - start : segment;
        int32_t sum = 0;
        for (int64_t i = 0; i < size; i++) sum += row[start + i];
        whole += (float)(sum - (int32_t)size * lq_zero(w, n, start)) * lq_scale(w, n, start);
      }
      for (int64_t m = 0; m < m_rows; m++) {
        float total = 0;
        for (int64_t s = 0; s < segments; s++) {
          int64_t start = s * segment, size = k - start < segment ? k - start : segment;
          int32_t sum = dot_codes(row + start, codes + m * k + start, size) - lq_zero(w, n, start) * sums[m * segments + s];
          total += (float)sum * lq_scale(w, n, start);
        }
        lq_store(a->y, a->y_dtype, m * n_rows + n, scale[m] * (total - (float)zero[m] * whole) + bias_of(a, n));
      }
    }
  }
  return failed ? LQ_NO_MEMORY : LQ_OK;
}

/* more rows are faster by dequantized tiles and torch's GEMM */
static int linear(const lq_linear_args *a) {
  if (a->m > 4) return LQ_REFUSED;
  return a->input == LQ_INPUT_FLOAT ? linear_float(a) : linear_codes(a);
}

static void dequantize(const lq_weight *w, const int64_t *rows, int64_t count, int32_t dtype, void *out) {
#pragma omp parallel for num_threads(lq_threads(count *w->k)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    int64_t n = rows ? rows[i] : i;
    if (dtype == LQ_F32) {
      decode(w, n, 0, w->k, (float *)out + i * w->k);
      continue;
    }
    float values[STEP];
    for (int64_t k = 0; k < w->k; k += STEP) {
      int64_t size = w->k - k < STEP ? w->k - k : STEP;
      decode(w, n, k, size, values);
      for (int64_t j = 0; j < size; j++) lq_store(out, dtype, i * w->k + k + j, values[j]);
    }
  }
}

static void quantize_tensor(
    const void *x, int32_t dtype, int64_t count, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *out
) {
  const float inverse = 1.0f / scale;
#pragma omp parallel for num_threads(lq_threads(count * 4))
  for (int64_t i = 0; i < count; i++) {
    float v = rintf(lq_load(x, dtype, i) * inverse) + zero;
    v = v >= low ? v : low; /* nan too */
    out[i] = (uint8_t)(v <= high ? v : high);
  }
}

const lq_kernels LQ_TABLE = {linear, dequantize, quantize_tensor};
