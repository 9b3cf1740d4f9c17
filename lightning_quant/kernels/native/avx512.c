/* AVX512 with VNNI and VBMI; bfloat16 products where the machine has them. For few rows a weight's codes are unpacked in
   registers; for many, panels of 64 channels are unpacked once into the cache and multiplied by a 6 x 64 tile of sums. */
#include "avx512_few.h"
#include "avx512_pairs.h"
#include "avx512_int8.h"
#include "avx512_many.h"

static int linear_codes(const lq_linear_args *a) {
  const lq_weight *w = &a->weight;
  if (w->kind != LQ_INT || w->flat) return LQ_REFUSED;
  int64_t segment = w->group < w->k ? w->group : w->k;
  if (segment < w->k && segment % 8) return LQ_REFUSED;           /* whole bytes of codes */
  if (segment > LONGEST) {
    if (w->group < w->k) return LQ_REFUSED;
    segment = LONGEST;
  }
  /* sums over long rows of bytes repay adding up each lane at their end; others repay panels earlier */
  const int many = a->m > (w->bits == 8 && w->k >= 1024 ? 64 : 8);
  coded c;
  int status = encode(a, &c, segment);
  if (status) return status;
  return many ? codes_many(a, &c) : codes_few(a, &c);
}

static int linear(const lq_linear_args *a) {
  if (a->input != LQ_INPUT_FLOAT) return linear_codes(a);
  if (a->m <= 16 && a->dtype == LQ_BF16 && !a->exact && lq_has_bf16() && pairs_fit(&a->weight)) return linear_pairs(a);
  if (a->m <= 8) return linear_few(a);
  return linear_many(a, !a->exact && lq_has_bf16());
}

static void quantize_tensor(
    const void *x, int32_t dtype, int64_t count, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *out
) {
  const __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps((float)zero);
  const __m512 bottom = _mm512_set1_ps((float)low), top = _mm512_set1_ps((float)high);
#pragma omp parallel for num_threads(lq_threads(count * 4))
  for (int64_t i = 0; i < count; i += LANES) {
    __m512 v = _mm512_mul_ps(load16(x, dtype, i, first(count - i)), inverse);
    v = _mm512_add_ps(_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), offset);
    v = _mm512_min_ps(_mm512_max_ps(v, bottom), top); /* max takes its second operand for nan */
    _mm_mask_storeu_epi8(out + i, first(count - i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
}

const lq_kernels lq_avx512 = {linear, dequantize, quantize_tensor};
