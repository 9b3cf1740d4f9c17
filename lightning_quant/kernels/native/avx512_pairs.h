/* Products of few rows of bfloat16, by vdpbf16ps. */
#pragma once
#include "avx512_few.h"

/* What the codes of a vector of words mean, in words' order: 16-bit lane t has the codes 16 / bits * t and on, one for each
   `part`, and 32-bit lane i those of one group. The input is laid out alike: [block][part][32]. */
INLINE int64_t pair_block(const lq_weight *w) { return 512 / w->bits; }

/* channels x rows; `scales` has for each block how many groups are before it, and where each lane's is from there */
INLINE void few_pairs(
    const lq_linear_args *a, __m512i table, int64_t n0, const uint16_t *x, int64_t stride, const float *group_sums, int64_t groups,
    int64_t m0, const int bits, const int channels, const int rows
) {
  const lq_weight *w = &a->weight;
  const int64_t block = 512 / bits, row_bytes = w->row_words * 4, ahead = channels * row_bytes;
  const int64_t inside = w->group < w->k && w->group < block ? block / w->group : 1; /* groups in a block */
  __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  lanes = _mm512_srli_epi32(lanes, inside > 1 ? __builtin_ctzll((unsigned long long)(LANES / inside)) : 4);
  const uint8_t *at[SIDE];
  __m512 totals[SIDE][FEW];
  UNROLL for (int i = 0; i < channels; i++) {
    at[i] = (const uint8_t *)(w->words + (n0 + i) * w->row_words);
    UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_setzero_ps();
  }
  int64_t group = 0, left = w->group; /* of blocks inside of a group */
  for (int64_t byte = 0; byte < row_bytes; byte += 64) {
    const __mmask64 some = bytes_mask(row_bytes - byte);
    __m512i v[SIDE];
    __m512 sums[SIDE][FEW];
    UNROLL for (int i = 0; i < channels; i++) {
      _mm_prefetch((const char *)at[i] + byte + ahead, _MM_HINT_T0);
      v[i] = _mm512_maskz_loadu_epi8(some, at[i] + byte);
      UNROLL for (int m = 0; m < rows; m++) sums[i][m] = _mm512_setzero_ps();
    }
    UNROLL for (int part = 0; part < 16 / bits; part++) {
      __m512i in[FEW];
      UNROLL for (int m = 0; m < rows; m++) in[m] = _mm512_loadu_si512(x + (m0 + m) * stride + byte * 8 / bits + part * 32);
      UNROLL for (int i = 0; i < channels; i++) {
        __m512i value = _mm512_permutexvar_epi16(_mm512_srli_epi16(v[i], (unsigned)(part * bits)), table);
        UNROLL for (int m = 0; m < rows; m++) sums[i][m] = dot_bf16(sums[i][m], value, in[m]);
      }
    }
    UNROLL for (int i = 0; i < channels; i++) {
      const float *from = w->scale + (n0 + i) * w->scale_stride + group;
      __m512 scale = _mm512_set1_ps(*from);
      if (inside == 2) scale = _mm512_mask_mov_ps(scale, 0xFF00, _mm512_set1_ps(from[group + 1 < groups]));
      else if (inside > 2)
        scale = _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(first(groups - group < inside ? groups - group : inside), from));
      UNROLL for (int m = 0; m < rows; m++) totals[i][m] = _mm512_fmadd_ps(sums[i][m], scale, totals[i][m]);
    }
    if (inside > 1) group += inside;
    else if ((left -= block) <= 0) group++, left = w->group;
  }
  if (w->zero_kind)
    UNROLL for (int i = 0; i < channels; i++)
      for (int64_t g = 0; g < groups; g += LANES) {
        __m512 zero = zeros16(w, n0 + i, g, groups);
        UNROLL for (int m = 0; m < rows; m++) {
          __m512 sum = _mm512_maskz_loadu_ps(first(groups - g), group_sums + (m0 + m) * groups + g);
          totals[i][m] = _mm512_fnmadd_ps(zero, sum, totals[i][m]);
        }
      }
  UNROLL for (int i = 0; i < channels; i++)
    UNROLL for (int m = 0; m < rows; m++) put_float(a, m0 + m, n0 + i, _mm512_reduce_add_ps(totals[i][m]));
}

#define FEW_PAIRS(NAME, BITS)                                                                                            \
  static void NAME(                                                                                                      \
      const lq_linear_args *a, __m512i table, int64_t n, int64_t channels, const uint16_t *x, int64_t stride,            \
      const float *sums, int64_t groups, int64_t m, int64_t rows                                                         \
  ) {                                                                                                                    \
    if (channels == SIDE && rows == 1) {                                                                                 \
      few_pairs(a, table, n, x, stride, sums, groups, m, BITS, SIDE, 1);                                                 \
      return;                                                                                                            \
    }                                                                                                                    \
    for (; channels >= 2; channels -= 2, n += 2) switch (rows) {                                                         \
        case 1: few_pairs(a, table, n, x, stride, sums, groups, m, BITS, 2, 1); break;                                   \
        case 2: few_pairs(a, table, n, x, stride, sums, groups, m, BITS, 2, 2); break;                                   \
        case 3: few_pairs(a, table, n, x, stride, sums, groups, m, BITS, 2, 3); break;                                   \
        default: few_pairs(a, table, n, x, stride, sums, groups, m, BITS, 2, 4);                                         \
      }                                                                                                                  \
    for (int64_t i = 0; channels && i < rows; i++) few_pairs(a, table, n, x, stride, sums, groups, m + i, BITS, 1, 1);   \
  }
FEW_PAIRS(few_pairs_4, 4)
FEW_PAIRS(few_pairs_2, 2)

/* whether each 32-bit lane of words lies in one group */
static int pairs_fit(const lq_weight *w) {
  if (w->flat || (w->bits != 4 && w->bits != 2)) return 0;
  const int64_t block = pair_block(w), lane = block / LANES;
  return w->group >= w->k || w->group % block == 0 || (w->group % lane == 0 && block % w->group == 0);
}

static int linear_pairs(const lq_linear_args *a) {
  const lq_weight *w = &a->weight;
  const int64_t block = pair_block(w), parts = 16 / w->bits, stride = (w->k + block - 1) / block * block;
  const int64_t groups = (w->k + w->group - 1) / w->group;
  float *sums = lq_scratch(0, (size_t)(a->m * (stride * 2 + groups * 4) + 64));
  if (!sums) return LQ_NO_MEMORY;
  uint16_t *x = (uint16_t *)(sums + a->m * groups);
  const uint16_t *from = a->x;
  for (int64_t m = 0; m < a->m; m++, from += a->x_stride) {
    for (int64_t g = 0; w->zero_kind && g < groups; g++) {
      float sum = 0;
      for (int64_t k = g * w->group; k < w->k && k < (g + 1) * w->group; k++) sum += lq_bf16_to_float(from[k]);
      sums[m * groups + g] = sum;
    }
    for (int64_t start = 0; start < stride; start += block)
      for (int64_t part = 0; part < parts; part++)
        for (int64_t lane = 0; lane < 32; lane++) {
          int64_t k = start + lane * parts + (w->swapped ? part ^ 1 : part);
          x[m * stride + start + part * 32 + lane] = k < w->k ? from[k] : 0;
        }
  }
  float values[32];
  for (int i = 0; i < 32; i++) values[i] = w->table[i & 15];
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
#pragma omp parallel for num_threads(lq_threads(w->n *w->k *a->m)) schedule(static)
  for (int64_t n = 0; n < w->n; n += SIDE)
    for (int64_t m = 0; m < a->m; m += FEW)
      (w->bits == 4 ? few_pairs_4 : few_pairs_2)(
          a, table, n, w->n - n < SIDE ? w->n - n : SIDE, x, stride, sums, groups, m, a->m - m < FEW ? a->m - m : FEW
      );
  return LQ_OK;
}
