/* What the AVX512 kernels share: codes of weights and of inputs, and floats, as vectors. */
#pragma once
#include "lq.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define WIDE 64  /* channels of a panel, and codes that are unpacked at once */
#define TALL 6   /* rows of a tile */
#define LONGEST 32768 /* products of codes whose sum fits an int32 */
#define DEPTH 512 /* codes of a panel's channel that are held at once, where scales allow */

/* gcc 12 copies the sums around the intrinsics */
INLINE __m512 dot_bf16(__m512 sum, __m512i v, __m512i b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(v), "v"(b));
  return sum;
}

INLINE __m512i dot_int8(__m512i sum, __m512i unsigned_codes, __m512i codes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_codes), "v"(codes));
  return sum;
}

/* --- codes ------------------------------------------------------------------------------------------------------- */

/* how 64 codes leave the stream of bits: eight of them are `bits` bytes, brought into one quadword, then cut */
typedef struct {
  __m512i bytes, shifts, mask;
  int64_t size; /* of 64 codes, in bytes */
  int bits;
} unpacker;

static unpacker make_unpacker(const lq_weight *w) {
  unpacker u;
  uint8_t bytes[64], shifts[64];
  for (int i = 0; i < 64; i++) {
    int in = i & 7, code = w->swapped ? in ^ 1 : in;
    bytes[i] = (uint8_t)((i >> 3) * w->bits + (in < w->bits ? in : 0));
    shifts[i] = (uint8_t)(code * w->bits);
  }
  u.bytes = _mm512_loadu_si512(bytes);
  u.shifts = _mm512_loadu_si512(shifts);
  u.mask = _mm512_set1_epi8((char)((1 << w->bits) - 1));
  u.bits = w->bits;
  u.size = 8 * w->bits;
  return u;
}

/* 64 codes from inputs k on (a multiple of 8); zeros past the row's end */
INLINE __m512i codes64(const unpacker *u, const uint8_t *row, int64_t row_bytes, int64_t k) {
  int64_t at = k * u->bits >> 3, left = row_bytes - at;
  int64_t size = left < u->size ? (left < 0 ? 0 : left) : u->size;
  __mmask64 some = size >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << size) - 1;
  __m512i v = _mm512_maskz_loadu_epi8(some, row + at);
  if (u->bits == 8) return v;
  v = _mm512_permutexvar_epi8(u->bytes, v);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(u->shifts, v), u->mask);
}

INLINE __m512i quarter(__m512i v, int t) {
  switch (t) {
    case 0: return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(v));
    case 1: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 1));
    case 2: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 2));
    default: return _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 3));
  }
}

INLINE __m512 fp8(__m512i code, int kind) {
  __m512i half = kind == LQ_E5M2
                     ? _mm512_slli_epi32(code, 8)
                     : _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 8),
                                       _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7F)), 7));
  __m512 v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
  if (kind == LQ_E5M2) return v;
  __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(code, _mm512_set1_epi32(0x7F)), _mm512_set1_epi32(0x7F));
  return _mm512_mask_blend_ps(nan, _mm512_mul_ps(v, _mm512_set1_ps(256.0f)), _mm512_set1_ps(NAN));
}

/* what a row of weights needs to become values */
typedef struct {
  const lq_weight *w;
  const uint8_t *row;
  int64_t n, row_bytes;
  __m512 table;
  unpacker u;
  int shift;       /* log2 of the group, or -1 */
  int64_t uniform; /* neighbours of which every run has one scale: 64, 16 or 1 */
  int unscaled;    /* the channel's one scale is left to the end */
} reader;

static reader make_reader(const lq_weight *w) {
  reader r;
  r.w = w;
  r.u = make_unpacker(w);
  r.table = _mm512_loadu_ps(w->table);
  r.row_bytes = w->row_words * 4;
  r.shift = w->group & (w->group - 1) ? -1 : __builtin_ctzll((unsigned long long)w->group);
  r.uniform = w->flat ? 1 : w->group % WIDE == 0 || w->group >= w->k ? WIDE : w->group % LANES == 0 ? LANES : 1;
  r.unscaled = 0;
  r.n = 0;
  r.row = NULL;
  return r;
}

INLINE void at_row(reader *r, int64_t n) {
  r->n = n;
  r->row = (const uint8_t *)(r->w->words + n * r->w->row_words);
}

enum { BY_TABLE, BY_INT, BY_E4M3, BY_E5M2 };

INLINE int way(const lq_weight *w) {
  return w->kind == LQ_E4M3 ? BY_E4M3 : w->kind == LQ_E5M2 ? BY_E5M2 : w->bits <= 4 ? BY_TABLE : BY_INT;
}

/* values of 16 codes, without zero point and scale */
INLINE __m512 raw(const reader *r, const int by, __m512i codes, int t) {
  __m512i code = quarter(codes, t);
  if (by == BY_TABLE) return _mm512_permutexvar_ps(code, r->table);
  if (by == BY_INT) return _mm512_cvtepi32_ps(_mm512_add_epi32(code, _mm512_set1_epi32(r->w->low)));
  return fp8(code, by == BY_E4M3 ? LQ_E4M3 : LQ_E5M2);
}

INLINE int64_t group_of(const reader *r, int64_t k) { return r->shift >= 0 ? k >> r->shift : k / r->w->group; }

/* the zero point of a row's group, as a value on raw()'s scale */
INLINE float zero_value(const lq_weight *w, int64_t n, int64_t group) {
  if (w->zero_kind == LQ_ZERO_NONE) return 0.0f;
  if (w->zero_kind == LQ_ZERO_ONE) return (float)w->zero[0];
  return (float)((int32_t)lq_field((const uint32_t *)w->zero + group, w->zero_stride, n, w->bits) + w->low);
}

INLINE float row_scale(const reader *r, int64_t group) {
  return r->unscaled ? 1.0f : r->w->scale[r->n * r->w->scale_stride + group];
}

/* 64 values of the row from input k on; what lies past its end is any finite number */
INLINE void values64_by(const reader *r, const int by, int64_t k, __m512 out[4]) {
  const lq_weight *w = r->w;
  __m512i codes = codes64(&r->u, r->row, r->row_bytes, k);
  if (r->uniform == WIDE) {
    int64_t group = group_of(r, k);
    __m512 scale = _mm512_set1_ps(row_scale(r, group)), zero = _mm512_set1_ps(zero_value(w, r->n, group));
    for (int t = 0; t < 4; t++) out[t] = _mm512_mul_ps(_mm512_sub_ps(raw(r, by, codes, t), zero), scale);
    return;
  }
  if (r->uniform == LANES) {
    for (int t = 0; t < 4; t++) {
      int64_t group = group_of(r, k + LANES * t < w->k ? k + LANES * t : w->k - 1);
      __m512 zero = _mm512_set1_ps(zero_value(w, r->n, group)), scale = _mm512_set1_ps(row_scale(r, group));
      out[t] = _mm512_mul_ps(_mm512_sub_ps(raw(r, by, codes, t), zero), scale);
    }
    return;
  }
  float scales[WIDE], zeros[WIDE];
  for (int i = 0; i < WIDE;) {
    int64_t at = k + i < w->k ? k + i : w->k - 1, offset = w->flat ? r->n * w->k + at : at;
    int64_t stop = i + w->group - offset % w->group;
    if (stop > WIDE || at != k + i) stop = WIDE;
    float scale = lq_scale(w, r->n, at), zero = zero_value(w, r->n, at / w->group);
    for (; i < stop; i++) scales[i] = scale, zeros[i] = zero;
  }
  for (int t = 0; t < 4; t++) {
    __m512 zero = _mm512_loadu_ps(zeros + 16 * t), scale = _mm512_loadu_ps(scales + 16 * t);
    out[t] = _mm512_mul_ps(_mm512_sub_ps(raw(r, by, codes, t), zero), scale);
  }
}

INLINE void values64(const reader *r, int64_t k, __m512 out[4]) {
  switch (way(r->w)) {
    case BY_TABLE: values64_by(r, BY_TABLE, k, out); break;
    case BY_INT: values64_by(r, BY_INT, k, out); break;
    case BY_E4M3: values64_by(r, BY_E4M3, k, out); break;
    default: values64_by(r, BY_E5M2, k, out);
  }
}

/* --- floats ------------------------------------------------------------------------------------------------------ */

INLINE __mmask16 first(int64_t count) { return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1 << count) - 1); }

INLINE __m512 load16(const void *p, int32_t dtype, int64_t i, __mmask16 some) {
  if (dtype == LQ_F32) return _mm512_maskz_loadu_ps(some, (const float *)p + i);
  __m256i v = _mm256_maskz_loadu_epi16(some, (const uint16_t *)p + i);
  if (dtype == LQ_BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  return _mm512_cvtph_ps(v);
}

INLINE __m256i to_bf16(__m512 v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0)));
}

INLINE void store16(void *p, int32_t dtype, int64_t i, __m512 v, __mmask16 some) {
  if (dtype == LQ_F32) _mm512_mask_storeu_ps((float *)p + i, some, v);
  else if (dtype == LQ_BF16) _mm256_mask_storeu_epi16((uint16_t *)p + i, some, to_bf16(v));
  else _mm256_mask_storeu_epi16((uint16_t *)p + i, some, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static void dequantize(const lq_weight *w, const int64_t *rows, int64_t count, int32_t dtype, void *out) {
#pragma omp parallel num_threads(lq_threads(count *w->k))
  {
    reader r = make_reader(w);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
      at_row(&r, rows ? rows[i] : i);
      for (int64_t k = 0; k < w->k; k += WIDE) {
        __m512 v[4];
        values64(&r, k, v);
        for (int t = 0; t < 4; t++) store16(out, dtype, i * w->k + k + 16 * t, v[t], first(w->k - k - 16 * t));
      }
    }
  }
}

/* --- the input's codes ------------------------------------------------------------------------------------------- */

/* as generic.c's, 16 at a time */
static void quantize(const lq_linear_args *a, lq_codes *out) {
  const int64_t k = a->weight.k;
  int any = 0;
#pragma omp parallel for num_threads(lq_threads(a->m *k * 4)) reduction(| : any)
  for (int64_t m = 0; m < a->m; m++) {
    const int64_t start = m * a->x_stride;
    int8_t *codes = out->codes + m * out->stride;
    float scale;
    int32_t zero = 0;
    if (a->input == LQ_INPUT_STATIC) {
      scale = a->in_scale[0], zero = a->in_zero[0];
    } else {
      __m512 low = _mm512_setzero_ps(), high = low, wrong = low;
      if (a->in_symmetric && a->in_low < 0) { /* the largest magnitude, as bits: what is not finite is above all */
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < k; i += LANES) {
          __m512i v = _mm512_castps_si512(load16(a->x, a->dtype, start + i, first(k - i)));
          most = _mm512_max_epi32(most, _mm512_and_si512(v, _mm512_set1_epi32(0x7FFFFFFF)));
        }
        high = _mm512_castsi512_ps(most);
        if (_mm512_reduce_max_epi32(most) >= 0x7F800000) wrong = _mm512_set1_ps(NAN);
      } else
      for (int64_t i = 0; i < k; i += LANES) {
        __m512 v = load16(a->x, a->dtype, start + i, first(k - i));
        low = _mm512_min_ps(low, v);
        high = _mm512_max_ps(high, v);
        wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong); /* nan for what is not finite */
      }
      float smallest = _mm512_reduce_min_ps(low), largest = _mm512_reduce_max_ps(high);
      float range = (float)(a->in_high - a->in_low);
      if (a->in_symmetric) {
        float bound = a->in_low == 0 || largest > -smallest ? largest : -smallest;
        scale = bound / (float)a->in_high;
      } else {
        scale = largest / range - smallest / range;
      }
      if (scale < LQ_MIN_SCALE) scale = LQ_MIN_SCALE;
      if (!a->in_symmetric) {
        float at = (float)a->in_low - rintf(smallest / scale);
        zero = (int32_t)(at < a->in_low ? a->in_low : at > a->in_high ? a->in_high : at);
      }
      if (smallest == 0 && largest == 0) scale = 1;
      if (_mm512_reduce_add_ps(wrong) != 0) scale = NAN;
    }
    const int32_t shift = lq_shift(a, zero);
    __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps((float)zero);
    __m512 bottom = _mm512_set1_ps((float)a->in_low), top = _mm512_set1_ps((float)a->in_high);
    __m512i moved = _mm512_set1_epi32(shift);
    for (int64_t i = 0; i < out->stride; i += LANES) {
      __m512 v = load16(a->x, a->dtype, start + i, first(k - i));
      v = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      v = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(v, offset), bottom), top); /* max takes its second operand for nan */
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_sub_epi32(_mm512_cvtps_epi32(v), moved));
      _mm_mask_storeu_epi8(codes + i, first(out->stride - i), _mm_maskz_mov_epi8(first(k - i), bytes));
    }
    out->scale[m] = scale;
    out->zero[m] = zero - shift;
    any |= zero != shift;
  }
  out->any_zero = any;
}

INLINE int32_t sum_codes(const int8_t *at, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += WIDE) {
    __mmask64 some = count - i >= WIDE ? ~(__mmask64)0 : ((__mmask64)1 << (count - i)) - 1;
    sum = dot_int8(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(some, at + i));
  }
  return _mm512_reduce_add_epi32(sum);
}
