/* AVX512 with VNNI and VBMI; bfloat16 products where the machine has them. For few rows a weight's codes are unpacked in
   registers; for many, panels of 64 channels are unpacked once into the cache and multiplied by a 6 x 64 tile of sums. */
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

/* --- few rows ---------------------------------------------------------------------------------------------------- */

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

/* --- few rows of bfloat16 --- */

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

/* --- many rows --------------------------------------------------------------------------------------------------- */

/* rows r, 32-bit columns c -> rows c, columns r */
INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
  }
}

/* a tile of sums, `steps` 32-bit columns deep; `sums` are floats or integers, 64 a row */
#define TILE(NAME, VECTOR, ZERO, LOAD, STORE, DOT)                                                                            \
  INLINE void NAME(const int rows, int64_t steps, const uint32_t *x, int64_t stride, const char *panel, void *sums, int add) { \
    VECTOR s[TALL][4];                                                                                                         \
    for (int m = 0; m < rows; m++)                                                                                             \
      for (int j = 0; j < 4; j++) s[m][j] = add ? LOAD((char *)sums + (m * 4 + j) * 64) : ZERO();                              \
    for (int64_t i = 0; i < steps; i++, panel += 256) {                                                                        \
      __m512i v[4];                                                                                                            \
      for (int j = 0; j < 4; j++) v[j] = _mm512_loadu_si512(panel + 64 * j);                                                   \
      for (int m = 0; m < rows; m++) {                                                                                         \
        __m512i b = _mm512_set1_epi32((int)x[m * stride + i]);                                                                 \
        for (int j = 0; j < 4; j++) s[m][j] = DOT(s[m][j], v[j], b);                                                           \
      }                                                                                                                        \
    }                                                                                                                          \
    for (int m = 0; m < rows; m++)                                                                                             \
      for (int j = 0; j < 4; j++) STORE((char *)sums + (m * 4 + j) * 64, s[m][j]);                                             \
  }                                                                                                                            \
  static void NAME##_of(int64_t rows, int64_t steps, const uint32_t *x, int64_t stride, const char *panel, void *sums, int add) { \
    switch (rows) {                                                                                                            \
      case 1: NAME(1, steps, x, stride, panel, sums, add); break;                                                              \
      case 2: NAME(2, steps, x, stride, panel, sums, add); break;                                                              \
      case 3: NAME(3, steps, x, stride, panel, sums, add); break;                                                              \
      case 4: NAME(4, steps, x, stride, panel, sums, add); break;                                                              \
      case 5: NAME(5, steps, x, stride, panel, sums, add); break;                                                              \
      default: NAME(6, steps, x, stride, panel, sums, add);                                                                    \
    }                                                                                                                          \
  }

TILE(tile_bf16, __m512, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, dot_bf16)
INLINE __m512 dot_f32(__m512 sum, __m512i v, __m512i b) { return _mm512_fmadd_ps((__m512)v, (__m512)b, sum); }
TILE(tile_f32, __m512, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, dot_f32)
TILE(tile_int8, __m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, dot_int8)

/* 64 bfloat16 values of the row, by a table of its group's values */
INLINE void pairs64(const reader *r, int64_t k, __m512i *low, __m512i *high) {
  const int64_t group = group_of(r, k);
  __m512 values = _mm512_sub_ps(r->table, _mm512_set1_ps(zero_value(r->w, r->n, group)));
  values = _mm512_mul_ps(values, _mm512_set1_ps(row_scale(r, group)));
  __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
  __m512i codes = codes64(&r->u, r->row, r->row_bytes, k);
  *low = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes)), table);
  *high = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1)), table);
}

/* channels n0 .. n0 + 63 from input k on, `size` of them (a multiple of 64): floats [size][64], or pairs of bfloat16
   [size / 2][64][2]; where a channel has one scale, without it */
static void panel_float(reader *r, int64_t n0, int64_t k, int64_t size, int64_t ahead, int pairs, char *panel) {
  const int tabled = pairs && r->uniform == WIDE && way(r->w) == BY_TABLE;
  for (int64_t i = 0; i < size; i += WIDE)
    for (int part = 0; part < 4; part++) {
      __m512i rows[4][LANES];
      for (int j = 0; j < LANES; j++) {
        int64_t n = n0 + part * LANES + j;
        __m512 v[4];
        if (n >= r->w->n) {
          for (int t = 0; t < 4; t++) rows[t][j] = _mm512_setzero_si512();
          continue;
        }
        at_row(r, n);
        _mm_prefetch((const char *)r->row + ((k + i) * r->u.bits >> 3) + ahead, _MM_HINT_T0);
        if (tabled) {
          pairs64(r, k + i, &rows[0][j], &rows[1][j]);
          continue;
        }
        values64(r, k + i, v);
        if (pairs) {
          rows[0][j] = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
          rows[1][j] = (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]);
        } else {
          for (int t = 0; t < 4; t++) rows[t][j] = (__m512i)v[t];
        }
      }
      for (int t = 0; t < (pairs ? 2 : 4); t++) {
        transpose16(rows[t]);
        char *at = panel + ((i / (pairs ? 2 : 1) + t * LANES) * 4 + part) * 64;
        for (int j = 0; j < LANES; j++) _mm512_storeu_si512(at + j * 256, rows[t][j]);
      }
    }
}

/* the same as codes in fours: [size / 4][64][4] */
static void panel_int8(
    const lq_weight *w, const unpacker *u, int64_t n0, int64_t k, int64_t size, int64_t ahead, char *panel
) {
  const int64_t row_bytes = w->row_words * 4;
  for (int64_t i = 0; i < size; i += WIDE)
    for (int part = 0; part < 4; part++) {
      __m512i rows[LANES];
      for (int j = 0; j < LANES; j++) {
        int64_t n = n0 + part * LANES + j;
        if (n >= w->n) {
          rows[j] = _mm512_setzero_si512();
          continue;
        }
        const uint8_t *row = (const uint8_t *)(w->words + n * w->row_words);
        _mm_prefetch((const char *)row + ((k + i) * u->bits >> 3) + ahead, _MM_HINT_T0);
        rows[j] = codes64(u, row, row_bytes, k + i);
      }
      transpose16(rows);
      char *at = panel + (i / 4 * 4 + part) * 64;
      for (int j = 0; j < LANES; j++) _mm512_storeu_si512(at + j * 256, rows[j]);
    }
}

/* sums of row m and 16 channels, times the row's scale, plus the bias */
INLINE void finish(const lq_linear_args *a, int64_t m, int64_t n0, int j, __m512 v, float scale, int bf16) {
  const int64_t n = n0 + j * LANES;
  const __mmask16 some = first(a->weight.n - n);
  if (!some) return;
  v = _mm512_mul_ps(v, _mm512_set1_ps(scale));
  if (a->bias) v = _mm512_add_ps(v, load16(a->bias, a->bias_dtype, n, some));
  if (bf16) _mm256_mask_storeu_epi16((uint16_t *)a->y + m * a->weight.n + n, some, (__m256i)_mm512_cvtneps_pbh(v));
  else store16(a->y, a->y_dtype, m * a->weight.n + n, v, some);
}

/* how far on, in bytes, what a panel reads next lies: its channels' next `depth` inputs, or the next channels' first ones */
INLINE int64_t next_panel(const lq_weight *w, int64_t k, int64_t depth) {
  return k + depth < w->k ? depth * w->bits / 8 : WIDE * w->row_words * 4 - k * w->bits / 8;
}

/* Tasks are panels x blocks of rows: as few blocks as keep every thread busy, since each unpacks the panel anew. */
static int64_t block_of_rows(const lq_linear_args *a, int threads) {
  int64_t panels = (a->weight.n + WIDE - 1) / WIDE, blocks = (a->m + 1023) / 1024;
  while (threads > 1 && panels * blocks < 16 * threads && (panels * blocks) % threads && a->m / (blocks + 1) >= 64) blocks++;
  int64_t block = (a->m + blocks - 1) / blocks;
  return (block + TALL - 1) / TALL * TALL;
}

/* `pairs`: in bfloat16, else in float32 */
static int linear_many(const lq_linear_args *a, const int pairs) {
  const lq_weight *w = &a->weight;
  const int64_t width = pairs ? 2 : 4, depth = DEPTH * 2 / width;
  const int64_t padded = (w->k + WIDE - 1) / WIDE * WIDE;
  const int64_t stride = padded * width % 1024 ? padded : padded + WIDE / width; /* a tile's rows in different sets of the cache */
  const int threads = lq_threads(w->n * w->k * a->m);
  const int64_t block = block_of_rows(a, threads), blocks = (a->m + block - 1) / block, panels = (w->n + WIDE - 1) / WIDE;
  const int64_t run = panels * blocks / (threads * 4) > 1 ? panels * blocks / (threads * 4) : 1;
  const int unscaled = !w->flat && w->group >= w->k, bf16 = a->y_dtype == LQ_BF16 && lq_has_bf16();
  char *x = lq_scratch(0, (size_t)(a->m * stride * width));
  if (!x) return LQ_NO_MEMORY;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    reader r = make_reader(w);
    r.unscaled = unscaled;
    char *panel = lq_scratch(1, DEPTH * WIDE * 2);
    float *sums = lq_scratch(2, (size_t)block * WIDE * sizeof(float));
    failed = !panel || !sums;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < a->m; m++)
      for (int64_t k = 0; k < padded; k += LANES) {
        __m512 v = load16(a->x, a->dtype, m * a->x_stride + k, first(w->k - k));
        if (pairs) _mm256_storeu_si256((__m256i *)(x + (m * stride + k) * 2), to_bf16(v));
        else _mm512_storeu_ps(x + (m * stride + k) * 4, v);
      }
#pragma omp for schedule(dynamic, run) /* a thread's next panel is the one that was fetched ahead */
    for (int64_t task = 0; task < panels * blocks; task++) {
      if (!panel || !sums) continue;
      const int64_t n0 = task % panels * WIDE, m0 = task / panels * block, m1 = m0 + block < a->m ? m0 + block : a->m;
      for (int64_t k = 0; k < padded; k += depth) {
        int64_t size = padded - k < depth ? padded - k : depth;
        panel_float(&r, n0, k, size, next_panel(w, k, depth), pairs, panel);
        for (int64_t m = m0; m < m1; m += TALL)
          (pairs ? tile_bf16_of : tile_f32_of)(
              m1 - m < TALL ? m1 - m : TALL, size * width / 4, (const uint32_t *)(x + (m * stride + k) * width),
              stride * width / 4, panel, sums + (m - m0) * WIDE, k > 0
          );
      }
      __m512 scales[4];
      for (int j = 0; unscaled && j < 4; j++) {
        __mmask16 some = first(w->n - n0 - j * LANES);
        scales[j] = w->scale_stride ? _mm512_maskz_loadu_ps(some, w->scale + n0 + j * LANES) : _mm512_set1_ps(w->scale[0]);
      }
      for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
          __m512 v = _mm512_loadu_ps(sums + (m - m0) * WIDE + j * LANES);
          if (unscaled) v = _mm512_mul_ps(v, scales[j]);
          finish(a, m, n0, j, v, a->x_scale ? a->x_scale[m] : 1.0f, bf16);
        }
    }
  }
  return failed ? LQ_NO_MEMORY : LQ_OK;
}

/* a segment's scales and zero points, as codes, of a panel's channels */
INLINE void panel_params(const lq_weight *w, int64_t n0, int64_t s, float scales[WIDE], int32_t zeros[WIDE]) {
  for (int64_t i = 0; i < WIDE; i++) {
    int64_t n = n0 + i < w->n ? n0 + i : w->n - 1;
    scales[i] = segment_scale(w, n, s);
    zeros[i] = segment_zero(w, n, s);
  }
}

/* 16 of a row's integer sums, less what zero points add to them, times their scales */
INLINE __m512 scaled(const int32_t *sums, int32_t codes, const float *scales, const int32_t *zeros, int j) {
  __m512i offset = _mm512_mullo_epi32(_mm512_loadu_si512(zeros + j * LANES), _mm512_set1_epi32(codes));
  __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sums + j * LANES), offset);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_loadu_ps(scales + j * LANES));
}

/* a segment's integer sums, times their scales, to the floats in `totals` */
INLINE void fold(const int32_t *sums, float *totals, int32_t codes, const float *scales, const int32_t *zeros, int add) {
  for (int j = 0; j < 4; j++) {
    __m512 v = scaled(sums, codes, scales, zeros, j);
    _mm512_storeu_ps(totals + j * LANES, add ? _mm512_add_ps(v, _mm512_loadu_ps(totals + j * LANES)) : v);
  }
}

static int codes_many(const lq_linear_args *a, const coded *c) {
  const lq_weight *w = &a->weight;
  const int64_t stride = c->input.stride;
  const int threads = lq_threads(w->n * w->k * a->m);
  const int64_t block = block_of_rows(a, threads), blocks = (a->m + block - 1) / block, panels = (w->n + WIDE - 1) / WIDE;
  const int64_t run = panels * blocks / (threads * 4) > 1 ? panels * blocks / (threads * 4) : 1;
  const int bf16 = a->y_dtype == LQ_BF16 && lq_has_bf16();
  /* one segment is summed as integers to its end, panel by panel; shorter ones are held several at once */
  const int64_t depth = c->segments == 1 ? 2 * DEPTH : (2 * DEPTH / c->segment ? 2 * DEPTH / c->segment : 1) * c->segment;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const unpacker u = make_unpacker(w);
    const int64_t held = (depth + WIDE - 1) / WIDE * WIDE;
    char *panel = lq_scratch(1, (size_t)held * WIDE);
    int32_t *sums = lq_scratch(2, (size_t)((block + 1) * WIDE) * 4);
    float *totals = lq_scratch(3, (size_t)((block + 1) * WIDE) * 4);
    float scales[WIDE];
    int32_t zeros[WIDE];
    failed = !panel || !sums || !totals;
#pragma omp for schedule(dynamic, run) /* a thread's next panel is the one that was fetched ahead */
    for (int64_t task = 0; task < panels * blocks; task++) {
      if (!panel || !sums || !totals) continue;
      const int64_t n0 = task % panels * WIDE, m0 = task / panels * block, m1 = m0 + block < a->m ? m0 + block : a->m;
      const int64_t tiles = (m1 - m0 + TALL - 1) / TALL + (c->input.any_zero != 0);
      for (int64_t k = 0; k < w->k; k += depth) {
        const int64_t size = w->k - k < depth ? w->k - k : depth;
        panel_int8(w, &u, n0, k, (size + WIDE - 1) / WIDE * WIDE, next_panel(w, k, depth), panel);
        for (int64_t part = 0; part < size; part += c->segment) {
          const int64_t width = size - part < c->segment ? size - part : c->segment, s = c->segments == 1 ? 0 : (k + part) / c->segment;
          const int last = c->segments > 1 || k + depth >= w->k;
          if (last) panel_params(w, n0, s, scales, zeros);
          for (int64_t tile = 0; tile < tiles; tile++) {
            /* the last tile may be the row of ones */
            const int64_t at = tile * TALL, m = m0 + at < m1 ? m0 + at : a->m, rows = m == a->m ? 1 : m1 - m < TALL ? m1 - m : TALL;
            const int64_t slot = m == a->m ? block : at;
            tile_int8_of(
                rows, (width + 3) / 4, (const uint32_t *)(c->input.codes + m * stride + k + part), stride / 4,
                panel + part * WIDE, sums + slot * WIDE, c->segments == 1 && k > 0
            );
            for (int64_t i = 0; last && (c->segments > 1 || m == a->m) && i < rows; i++)
              fold(sums + (slot + i) * WIDE, totals + (slot + i) * WIDE, c->sums[(m + i) * c->segments + s], scales, zeros, s > 0);
          }
          if (c->segments == 1) break;
        }
      }
      for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
          __m512 v = c->segments == 1 ? scaled(sums + (m - m0) * WIDE, c->sums[m], scales, zeros, j)
                                      : _mm512_loadu_ps(totals + (m - m0) * WIDE + j * LANES);
          if (c->input.any_zero) {
            __m512 whole = _mm512_loadu_ps(totals + block * WIDE + j * LANES);
            v = _mm512_fnmadd_ps(_mm512_set1_ps((float)c->input.zero[m]), whole, v);
          }
          finish(a, m, n0, j, v, c->input.scale[m], bf16);
        }
    }
  }
  return failed ? LQ_NO_MEMORY : LQ_OK;
}

/* --- which of them ----------------------------------------------------------------------------------------------- */

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
