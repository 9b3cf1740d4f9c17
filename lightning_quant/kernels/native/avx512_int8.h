/* Inputs as codes, and their products of few rows with a weight's codes, by vpdpbusd. */
#pragma once
#include "avx512_few.h"

/* inputs as codes: row m has `segments` sums, and the row past the last one stands for an input of ones */
typedef struct {
  lq_codes input;
  int32_t *sums;
  int64_t segment, segments, rows;
} coded;

/* Codes, scales and sums of segments, in which products of codes are summed as integers. */
static int encode(const lq_linear_args *a, coded *c, int64_t segment) {
  const lq_weight *w = &a->weight;
  c->segment = segment;
  c->segments = (w->k + segment - 1) / segment;
  int64_t stride = (w->k + WIDE - 1) / WIDE * WIDE, rows = a->m + 1;
  if (stride % 1024 == 0) stride += WIDE; /* rows of a tile in different sets of the cache */
  size_t codes = (size_t)(rows * stride + WIDE);
  char *memory = lq_scratch(0, codes + (size_t)(rows * (8 + 4 * c->segments)));
  if (!memory) return LQ_NO_MEMORY;
  c->input.codes = (int8_t *)memory;
  c->input.stride = stride;
  c->input.scale = (float *)(memory + codes);
  c->input.zero = (int32_t *)c->input.scale + rows;
  c->sums = c->input.zero + rows;
  quantize(a, &c->input);
  c->rows = a->m + (c->input.any_zero != 0);
  if (c->input.any_zero) {
    memset(memory + a->m * stride, 1, (size_t)w->k);
    memset(memory + a->m * stride + w->k, 0, (size_t)(stride - w->k));
  }
#pragma omp parallel for num_threads(lq_threads(a->m *w->k * 4))
  for (int64_t m = 0; m < c->rows; m++)
    for (int64_t s = 0; s < c->segments; s++) {
      int64_t start = s * segment, size = w->k - start < segment ? w->k - start : segment;
      c->sums[m * c->segments + s] = sum_codes(c->input.codes + m * stride + start, size);
    }
  return LQ_OK;
}

INLINE float segment_scale(const lq_weight *w, int64_t n, int64_t s) {
  return w->scale[n * w->scale_stride + (w->group < w->k ? s : 0)];
}

/* the code that stands for 0 */
INLINE int32_t segment_zero(const lq_weight *w, int64_t n, int64_t s) {
  if (w->zero_kind == LQ_ZERO_NONE) return -w->low;
  if (w->zero_kind == LQ_ZERO_ONE) return w->zero[0] - w->low;
  return (int32_t)lq_field((const uint32_t *)w->zero + (w->group < w->k ? s : 0), w->zero_stride, n, w->bits);
}

INLINE void few_codes(
    const lq_weight *w, const unpacker *unpack, const coded *c, int64_t n0, int64_t m0, const int bits, const int channels,
    const int rows, float *out
) {
  const int64_t row_bytes = w->row_words * 4, stride = c->input.stride;
  const int64_t size = bits ? 8 * bits : unpack->size, ahead = channels * row_bytes;
  const unpacker u = *unpack;
  const uint8_t *at[SIDE];
  const int8_t *x = c->input.codes + m0 * stride;
  __m512 totals[SIDE][FEW];
  UNROLL for (int i = 0; i < channels; i++) {
    at[i] = (const uint8_t *)(w->words + (n0 + i) * w->row_words);
    UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < c->segments; s++) {
    const int64_t start = s * c->segment, stop = start + c->segment < w->k ? start + c->segment : w->k;
    __m512i sums[SIDE][FEW];
    UNROLL for (int i = 0; i < channels; i++) {
      int32_t zero = segment_zero(w, n0 + i, s);
      UNROLL for (int m = 0; m < rows; m++)
        sums[i][m] = _mm512_maskz_set1_epi32(1, -zero * c->sums[(m0 + m) * c->segments + s]);
    }
    int64_t k = start;
    const __mmask64 whole = bytes_mask(size);
    for (; k + WIDE <= stop; k += WIDE) {
      const int64_t offset = (k >> 3) * (size >> 3);
      __m512i in[FEW];
      UNROLL for (int m = 0; m < rows; m++) in[m] = _mm512_loadu_si512(x + m * stride + k);
      UNROLL for (int i = 0; i < channels; i++) {
        __m512i v = whole64(&u, bits, at[i] + offset, whole, ahead);
        UNROLL for (int m = 0; m < rows; m++) sums[i][m] = dot_int8(sums[i][m], v, in[m]);
      }
    }
    if (k < stop) { /* the codes past a segment's end meet zeros */
      const int64_t offset = (k >> 3) * (size >> 3);
      const __mmask64 some = bytes_mask(row_bytes - offset < size ? row_bytes - offset : size);
      UNROLL for (int i = 0; i < channels; i++) {
        __m512i v = cut64(&u, bits, at[i] + offset, some);
        UNROLL for (int m = 0; m < rows; m++)
          sums[i][m] = dot_int8(sums[i][m], v, _mm512_maskz_loadu_epi8(bytes_mask(stop - k), x + m * stride + k));
      }
    }
    if (c->segments == 1) { /* as the integers are */
      UNROLL for (int i = 0; i < channels; i++)
        UNROLL for (int m = 0; m < rows; m++)
          out[i * FEW + m] = (float)_mm512_reduce_add_epi32(sums[i][m]) * segment_scale(w, n0 + i, 0);
      return;
    }
    UNROLL for (int i = 0; i < channels; i++) {
      __m512 scale = _mm512_set1_ps(segment_scale(w, n0 + i, s));
      UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][m]), scale, totals[i][m]);
    }
  }
  UNROLL for (int i = 0; i < channels; i++)
    UNROLL for (int m = 0; m < rows; m++) out[i * FEW + m] = _mm512_reduce_add_ps(totals[i][m]);
}

#define FEW_CODES(NAME, BITS)                                                                                                    \
  static void NAME(                                                                                                              \
      const lq_weight *w, const unpacker *u, const coded *c, int64_t n, int64_t m, int64_t channels, int64_t rows, float *out    \
  ) {                                                                                                                            \
    if (channels == SIDE) BY_ROWS(rows, NAME##_ALL) else for (int64_t i = 0; i < channels; i++) BY_ROWS(rows, NAME##_ONE)         \
  }
#define few_codes_4_ALL(R) few_codes(w, u, c, n, m, 4, SIDE, R, out)
#define few_codes_4_ONE(R) few_codes(w, u, c, n + i, m, 4, 1, R, out + i * FEW)
#define few_codes_8_ALL(R) few_codes(w, u, c, n, m, 8, SIDE, R, out)
#define few_codes_8_ONE(R) few_codes(w, u, c, n + i, m, 8, 1, R, out + i * FEW)
#define few_codes_any_ALL(R) few_codes(w, u, c, n, m, 0, SIDE, R, out)
#define few_codes_any_ONE(R) few_codes(w, u, c, n + i, m, 0, 1, R, out + i * FEW)
FEW_CODES(few_codes_4, 4)
FEW_CODES(few_codes_8, 8)
FEW_CODES(few_codes_any, 0)

static int codes_few(const lq_linear_args *a, const coded *c) {
  const lq_weight *w = &a->weight;
#pragma omp parallel num_threads(lq_threads(w->n *w->k *c->rows))
  {
    const unpacker u = make_unpacker(w);
    float out[SIDE * FEW], whole[SIDE * FEW];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < w->n; n += SIDE) {
      const int64_t channels = w->n - n < SIDE ? w->n - n : SIDE;
      for (int64_t m0 = c->input.any_zero ? a->m : 0, end = 0; !end; m0 = m0 == a->m ? 0 : m0 + FEW) {
        int64_t rows = m0 == a->m ? 1 : a->m - m0 < FEW ? a->m - m0 : FEW;
        float *into = m0 == a->m ? whole : out;
        (w->bits == 4 ? few_codes_4 : w->bits == 8 ? few_codes_8 : few_codes_any)(w, &u, c, n, m0, channels, rows, into);
        if (m0 == a->m) continue;
        for (int64_t i = 0; i < channels; i++)
          for (int64_t m = 0; m < rows; m++) {
            float v = out[i * FEW + m];
            if (c->input.any_zero) v -= (float)c->input.zero[m0 + m] * whole[i * FEW];
            lq_store(a->y, a->y_dtype, (m0 + m) * w->n + n + i, c->input.scale[m0 + m] * v + bias_of(a, n + i));
          }
        end = m0 + rows >= a->m;
      }
    }
  }
  return LQ_OK;
}
