/* Products of few rows: a weight's codes are unpacked in registers. */
#pragma once
#include "avx512_codes.h"

#define FEW 4  /* rows that share what was unpacked */
#define SIDE 4 /* channels side by side, for independent sums */
#define UNROLL _Pragma("GCC unroll 8")

INLINE float bias_of(const lq_linear_args *a, int64_t n) { return a->bias ? lq_load(a->bias, a->bias_dtype, n) : 0.0f; }

INLINE void put_float(const lq_linear_args *a, int64_t m, int64_t n, float sum) {
  lq_store(a->y, a->y_dtype, m * a->weight.n + n, (a->x_scale ? sum * a->x_scale[m] : sum) + bias_of(a, n));
}

/* 64 codes of a width that is known when this is compiled (0: it is not) */
INLINE __m512i cut64(const unpacker *u, const int bits, const uint8_t *at, __mmask64 some) {
  if (bits == 8) return _mm512_maskz_loadu_epi8(some, at);
  __m512i v = _mm512_maskz_loadu_epi8(some, at);
  v = _mm512_permutexvar_epi8(u->bytes, v);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(u->shifts, v), u->mask);
}

/* the same where all of them are in the row; the row `ahead` bytes on is fetched, as rows are too short for the machine to do it */
INLINE __m512i whole64(const unpacker *u, const int bits, const uint8_t *at, __mmask64 some, int64_t ahead) {
  _mm_prefetch((const char *)at + ahead, _MM_HINT_T0);
  if (bits == 8) return _mm512_loadu_si512(at);
  if (bits != 4) return cut64(u, bits, at, some);
  __m512i v = _mm512_permutexvar_epi8(u->bytes, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(u->shifts, v), u->mask);
}

INLINE __mmask64 bytes_mask(int64_t size) {
  return size >= 64 ? ~(__mmask64)0 : size <= 0 ? 0 : ((__mmask64)1 << size) - 1;
}

/* zero points times scales of 16 groups of a channel */
INLINE __m512 zeros16(const lq_weight *w, int64_t n, int64_t group, int64_t groups) {
  const __mmask16 some = first(groups - group);
  __m512 scale = w->scale_stride ? _mm512_maskz_loadu_ps(some, w->scale + n * w->scale_stride + group)
                                 : _mm512_maskz_mov_ps(some, _mm512_set1_ps(w->scale[0]));
  if (w->zero_kind == LQ_ZERO_ONE) return _mm512_mul_ps(scale, _mm512_set1_ps((float)w->zero[0]));
  const int64_t bit = n * w->bits;
  const int shift = (int)(bit & 31);
  const int32_t *at = w->zero + (bit >> 5) * w->zero_stride + group;
  __m512i v = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(some, at), _mm_cvtsi32_si128(shift));
  if (shift + w->bits > 32) {
    __m512i more = _mm512_maskz_loadu_epi32(some, at + w->zero_stride);
    v = _mm512_or_si512(v, _mm512_sll_epi32(more, _mm_cvtsi32_si128(32 - shift)));
  }
  v = _mm512_add_epi32(_mm512_and_si512(v, _mm512_set1_epi32((1 << w->bits) - 1)), _mm512_set1_epi32(w->low));
  return _mm512_mul_ps(scale, _mm512_cvtepi32_ps(v));
}

/* `channels` x `rows` products of a weight whose groups are whole runs of 64; `x` has rows of whole runs of 64, and
   `group_sums` the sums of its groups where there are zero points */
INLINE void few_grouped(
    const lq_linear_args *a, const reader *r, int64_t n0, const float *x, int64_t stride, const float *group_sums, int64_t groups,
    int64_t m0, const int bits, const int by, const int channels, const int rows
) {
  const lq_weight *w = &a->weight;
  const uint8_t *at[SIDE];
  __m512 totals[SIDE][FEW];
  const unpacker u = r->u;
  const reader values = *r;
  UNROLL for (int i = 0; i < channels; i++) {
    at[i] = (const uint8_t *)(w->words + (n0 + i) * w->row_words);
    UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_setzero_ps();
  }
  const int64_t size = bits ? 8 * bits : u.size, row_bytes = w->row_words * 4, ahead = channels * row_bytes;
  const __mmask64 whole = bytes_mask(size);
  for (int64_t group = 0, k = 0; group < groups; group++) {
    const int64_t stop = k + w->group < stride ? k + w->group : stride;
    __m512 sums[SIDE][FEW];
    UNROLL for (int i = 0; i < channels; i++)
      UNROLL for (int m = 0; m < rows; m++) sums[i][m] = _mm512_setzero_ps();
    for (; k < stop; k += WIDE) {
      const int64_t offset = (k >> 6) * size;
      __m512i codes[SIDE];
      if (offset + size <= row_bytes) {
        UNROLL for (int i = 0; i < channels; i++) codes[i] = whole64(&u, bits, at[i] + offset, whole, ahead);
      } else {
        UNROLL for (int i = 0; i < channels; i++) codes[i] = cut64(&u, bits, at[i] + offset, bytes_mask(row_bytes - offset));
      }
      UNROLL for (int t = 0; t < 4; t++) {
        __m512 in[FEW];
        UNROLL for (int m = 0; m < rows; m++) in[m] = _mm512_loadu_ps(x + (m0 + m) * stride + k + LANES * t);
        UNROLL for (int i = 0; i < channels; i++) {
          __m512 v = raw(&values, by, codes[i], t);
          UNROLL for (int m = 0; m < rows; m++) sums[i][m] = _mm512_fmadd_ps(v, in[m], sums[i][m]);
        }
      }
    }
    UNROLL for (int i = 0; i < channels; i++) {
      float scale = w->scale[(n0 + i) * w->scale_stride + group];
      UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_fmadd_ps(sums[i][m], _mm512_set1_ps(scale), totals[i][m]);
    }
  }
  if (w->zero_kind)
    UNROLL for (int i = 0; i < channels; i++)
      for (int64_t group = 0; group < groups; group += LANES) {
        __m512 zero = zeros16(w, n0 + i, group, groups);
        UNROLL for (int m = 0; m < rows; m++) {
          __m512 sum = _mm512_maskz_loadu_ps(first(groups - group), group_sums + (m0 + m) * groups + group);
          totals[i][m] = _mm512_fnmadd_ps(zero, sum, totals[i][m]);
        }
      }
  UNROLL for (int i = 0; i < channels; i++)
    UNROLL for (int m = 0; m < rows; m++) put_float(a, m0 + m, n0 + i, _mm512_reduce_add_ps(totals[i][m]));
}

/* any groups: scaled values */
INLINE void few_scaled(const lq_linear_args *a, reader *r, int64_t n, const float *x, int64_t stride, int64_t m0, const int rows) {
  const lq_weight *w = &a->weight;
  __m512 sums[FEW];
  UNROLL for (int m = 0; m < rows; m++) sums[m] = _mm512_setzero_ps();
  at_row(r, n);
  for (int64_t k = 0; k < w->k; k += WIDE) {
    __m512 v[4];
    values64(r, k, v);
    UNROLL for (int m = 0; m < rows; m++)
      UNROLL for (int t = 0; t < 4; t++) sums[m] = _mm512_fmadd_ps(v[t], _mm512_loadu_ps(x + (m0 + m) * stride + k + 16 * t), sums[m]);
  }
  UNROLL for (int m = 0; m < rows; m++) put_float(a, m0 + m, n, _mm512_reduce_add_ps(sums[m]));
}

/* CALL with the number of rows as a constant */
#define BY_ROWS(ROWS, CALL)      \
  switch (ROWS) {                \
    case 1: { CALL(1); break; }  \
    case 2: { CALL(2); break; }  \
    case 3: { CALL(3); break; }  \
    default: { CALL(4); }        \
  }

/* groups are whole runs of 64, and channels are two or four */
#define FEW_GROUPED(NAME, BITS, BY)                                                                                             \
  static void NAME(                                                                                                             \
      const lq_linear_args *a, const reader *r, int64_t n, int64_t channels, const float *x, int64_t stride, const float *sums, \
      int64_t groups, int64_t m, int64_t rows                                                                                   \
  ) {                                                                                                                           \
    if (channels == SIDE && rows == 1) {                                                                                        \
      few_grouped(a, r, n, x, stride, sums, groups, m, BITS, BY, SIDE, 1);                                                      \
      return;                                                                                                                   \
    }                                                                                                                           \
    for (; channels > 0; channels -= 2, n += 2) switch (rows) {                                                                 \
        case 1: few_grouped(a, r, n, x, stride, sums, groups, m, BITS, BY, 2, 1); break;                                        \
        case 2: few_grouped(a, r, n, x, stride, sums, groups, m, BITS, BY, 2, 2); break;                                        \
        case 3: few_grouped(a, r, n, x, stride, sums, groups, m, BITS, BY, 2, 3); break;                                        \
        default: few_grouped(a, r, n, x, stride, sums, groups, m, BITS, BY, 2, 4);                                              \
      }                                                                                                                         \
  }
FEW_GROUPED(few_2, 2, BY_TABLE)
FEW_GROUPED(few_3, 3, BY_TABLE)
FEW_GROUPED(few_4, 4, BY_TABLE)
FEW_GROUPED(few_8, 8, BY_INT)
FEW_GROUPED(few_e4m3, 8, BY_E4M3)
FEW_GROUPED(few_e5m2, 8, BY_E5M2)
FEW_GROUPED(few_other, 0, BY_INT)

typedef void (*few_kernel)(
    const lq_linear_args *, const reader *, int64_t, int64_t, const float *, int64_t, const float *, int64_t, int64_t, int64_t
);

static few_kernel few_of(const lq_weight *w) {
  switch (way(w)) {
    case BY_TABLE: return w->bits == 4 ? few_4 : w->bits == 3 ? few_3 : few_2;
    case BY_INT: return w->bits == 8 ? few_8 : few_other;
    case BY_E4M3: return few_e4m3;
    default: return few_e5m2;
  }
}

static int linear_few(const lq_linear_args *a) {
  const lq_weight *w = &a->weight;
  const int64_t stride = (w->k + WIDE - 1) / WIDE * WIDE, groups = (w->k + w->group - 1) / w->group;
  float *x = lq_scratch(0, (size_t)(a->m * (stride + groups)) * sizeof(float)), *sums = x + a->m * stride;
  if (!x) return LQ_NO_MEMORY;
  for (int64_t m = 0; m < a->m; m++) {
    for (int64_t k = 0; k < stride; k += LANES)
      _mm512_storeu_ps(x + m * stride + k, load16(a->x, a->dtype, m * a->x_stride + k, first(w->k - k)));
    for (int64_t g = 0; w->zero_kind && g < groups; g++) {
      float sum = 0;
      for (int64_t k = g * w->group; k < w->k && k < (g + 1) * w->group; k++) sum += x[m * stride + k];
      sums[m * groups + g] = sum;
    }
  }
#pragma omp parallel num_threads(lq_threads(w->n *w->k *a->m))
  {
    reader r = make_reader(w);
    const few_kernel kernel = few_of(w);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < w->n; n += SIDE) {
      const int64_t channels = w->n - n < SIDE ? w->n - n : SIDE;
      for (int64_t m = 0; m < a->m; m += FEW) {
        const int64_t rows = a->m - m < FEW ? a->m - m : FEW;
        const int64_t paired = r.uniform < WIDE ? 0 : channels & ~(int64_t)1;
        if (paired) kernel(a, &r, n, paired, x, stride, sums, groups, m, rows);
        for (int64_t i = paired; i < channels; i++) {
#define SCALED(R) few_scaled(a, &r, n + i, x, stride, m, R)
          BY_ROWS(rows, SCALED)
        }
      }
    }
  }
  return LQ_OK;
}
