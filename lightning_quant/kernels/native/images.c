/* Programs of int8 convolutions: a part of a network that runs image by image, so that what lies between its layers stays in the
   cache. Compiled once for each instruction set.

   Between steps there are maps, float32 [h, w, channels to a multiple of 16], and frames, codes [h, w, channels to a multiple of 4]
   with a border of the zero point, as the next convolution pads them. Both lie in an arena that each thread has. */
#include "lq.h"

#include <math.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#endif

#ifndef LQ_TABLE
#define LQ_TABLE lq_base
#endif
#define PASTED(table) table##_images
#define NAME(table) PASTED(table)

#define LANES 16
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  const lq_program *program;
  char *arena;
  int64_t image;
} lq_run;

/* where an image lies: in the arena, or in a tensor given by the caller */
INLINE char *place(const lq_run *r, const lq_place *at) {
  if (at->tensor < 0) return r->arena + at->offset;
  const lq_tensor *t = &r->program->tensors[at->tensor];
  return (char *)t->data + r->image * t->stride;
}

INLINE float clamp(float v, float low, float high) {
  v = v > low ? v : low; /* nan too; in this form each is one instruction */
  return v < high ? v : high;
}

INLINE uint8_t code_of(float v, const lq_step *s) {
  return (uint8_t)((int32_t)rintf(clamp(v * s->inverse, s->code_low, s->code_high)) + s->code_zero);
}

/* neighbours -> codes; the fields are read once, as bytes may be anything's */
static void codes_of(const lq_step *s, const float *restrict from, int64_t count, uint8_t *restrict to) {
  const float inverse = s->inverse, low = s->code_low, high = s->code_high;
  const int32_t zero = s->code_zero;
  for (int64_t i = 0; i < count; i++) to[i] = (uint8_t)((int32_t)rintf(clamp(from[i] * inverse, low, high)) + zero);
}

/* the border of a frame beside its row y, and above the first or below the last */
static void border(const lq_step *s, uint8_t *frame, int64_t y) {
  const int64_t row = s->code_row, left = (int64_t)s->left * s->code_pixel, right = (int64_t)s->right * s->code_pixel;
  uint8_t *at = frame + (y + s->top) * row;
  memset(at, s->code_zero, (size_t)left);
  memset(at + row - right, s->code_zero, (size_t)right);
  if (y == 0) memset(frame, s->code_zero, (size_t)(s->top * row));
  if (y == s->out_h - 1) memset(at + row, s->code_zero, (size_t)(s->bottom * row));
}

INLINE uint8_t *frame_pixel(const lq_step *s, uint8_t *frame, int64_t y, int64_t x) {
  return frame + (y + s->top) * s->code_row + (x + s->left) * s->code_pixel;
}

/* --- convolution: codes -> floats and codes ------------------------------------------------------------------------ */

typedef struct {
  const uint8_t *in;
  const float *other;
  float *out;
  uint8_t *codes;
} row_t;

#ifdef __AVX512VNNI__
enum { LQ_OUT = 1, LQ_CODES = 2, LQ_OTHER = 4 }; /* what the end of a convolution does */

/* P neighbouring pixels, V vectors of 16 channels */
INLINE void block(const lq_step *s, const row_t *r, int64_t x, int64_t lane, const int P, const int V, const int ends) {
  const int64_t advance = (int64_t)s->in_pixel * s->stride_w, count = s->taps;
  const uint8_t *in = r->in + x * advance;
  const int8_t *weight = s->weight + lane * count * 64;
  __m512i sum[2][16]; /* registers: every index is known once this is inlined */
#pragma GCC unroll 2
  for (int v = 0; v < V; v++)
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) sum[v][p] = _mm512_loadu_si512(s->start + (lane + v) * LANES);
  for (int64_t k = 0; k < count; k++) {
    const uint8_t *at = in + s->offsets[k];
    __m512i w[2];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) w[v] = _mm512_loadu_si512(weight + (v * count + k) * 64);
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      int32_t four;
      memcpy(&four, at + p * advance, 4);
      const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[v][p] = _mm512_dpbusd_epi32(sum[v][p], codes, w[v]);
    }
  }
  const __m512 low = _mm512_set1_ps(s->low), high = _mm512_set1_ps(s->high), inverse = _mm512_set1_ps(s->inverse);
  const __m512 code_low = _mm512_set1_ps(s->code_low), code_high = _mm512_set1_ps(s->code_high);
  const __m512i zero = _mm512_set1_epi32(s->code_zero);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    const int64_t other_pixel = s->other_pixel, out_pixel = s->out_pixel, code_pixel = s->code_pixel;
    const int64_t n = (lane + v) * LANES;
    const __m512 scale = _mm512_loadu_ps(s->scale + n), bias = _mm512_loadu_ps(s->bias + n);
    const int64_t left = s->code_pixel - n;
    const __mmask16 kept = !(ends & LQ_CODES) || left >= LANES ? 0xFFFF : (__mmask16)((1u << left) - 1u);
    const float *other = r->other + x * other_pixel + n;
    float *out = r->out + x * out_pixel + n;
    uint8_t *codes = r->codes + x * code_pixel + n;
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[v][p]), scale, bias);
      if (ends & LQ_OTHER) value = _mm512_add_ps(value, _mm512_loadu_ps(other));
      value = _mm512_min_ps(_mm512_max_ps(value, low), high);
      if (ends & LQ_OUT) _mm512_storeu_ps(out, value);
      if (ends & LQ_CODES) {
        __m512 level = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(value, inverse), code_low), code_high);
        __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(level), zero));
        _mm_mask_storeu_epi8(codes, kept, bytes);
      }
      other += other_pixel, out += out_pixel, codes += code_pixel;
    }
  }
}

INLINE void row_of(const lq_step *s, const row_t *r, int64_t lane, const int V, const int P, const int ends) {
  int64_t x = 0;
  for (; x + P <= s->out_w; x += P) block(s, r, x, lane, P, V, ends);
  if (P > 8 && x + 8 <= s->out_w) block(s, r, x, lane, 8, V, ends), x += 8;
  if (P > 4 && x + 4 <= s->out_w) block(s, r, x, lane, 4, V, ends), x += 4;
  if (P > 2 && x + 2 <= s->out_w) block(s, r, x, lane, 2, V, ends), x += 2;
  if (x < s->out_w) block(s, r, x, lane, 1, V, ends);
}

#define ROW(ENDS)                                                   \
  static void row_##ENDS(const lq_step *s, const row_t *r, int64_t lane, int64_t lanes) { \
    if (lanes == 2) row_of(s, r, lane, 2, 8, ENDS);                 \
    else row_of(s, r, lane, 1, 16, ENDS);                           \
  }
ROW(1) ROW(2) ROW(3) ROW(5) ROW(6) ROW(7)
#undef ROW

static void conv_row(const lq_step *s, const row_t *r, int64_t lane, int64_t lanes) {
  switch ((r->other ? LQ_OTHER : 0) | (r->out ? LQ_OUT : 0) | (r->codes ? LQ_CODES : 0)) {
    case 1: row_1(s, r, lane, lanes); break;
    case 2: row_2(s, r, lane, lanes); break;
    case 3: row_3(s, r, lane, lanes); break;
    case 5: row_5(s, r, lane, lanes); break;
    case 6: row_6(s, r, lane, lanes); break;
    default: row_7(s, r, lane, lanes);
  }
}
#else
static void conv_row(const lq_step *s, const row_t *r, int64_t lane, int64_t lanes) {
  const int64_t advance = (int64_t)s->in_pixel * s->stride_w;
  for (int64_t v = lane; v < lane + lanes; v++) {
    const int64_t n = v * LANES, kept = MIN(LANES, s->code_pixel - n);
    for (int64_t x = 0; x < s->out_w; x++) {
      const uint8_t *in = r->in + x * advance;
      const int8_t *weight = s->weight + v * s->taps * 64;
      int32_t sum[LANES];
      memcpy(sum, s->start + n, sizeof sum);
#ifdef __AVX2__
      __m256i low = _mm256_loadu_si256((const __m256i *)sum), high = _mm256_loadu_si256((const __m256i *)(sum + 8));
      for (int64_t k = 0; k < s->taps; k++, weight += 64) {
        int32_t four;
        memcpy(&four, in + s->offsets[k], 4);
        /* pairs of 16 bits: those of 8 saturate */
        const __m256i codes = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
        __m256i part[4];
        for (int i = 0; i < 4; i++)
          part[i] = _mm256_madd_epi16(codes, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weight + 16 * i))));
        /* sums of neighbours come as 0 1 4 5 | 2 3 6 7 */
        low = _mm256_add_epi32(low, _mm256_permute4x64_epi64(_mm256_hadd_epi32(part[0], part[1]), 0xD8));
        high = _mm256_add_epi32(high, _mm256_permute4x64_epi64(_mm256_hadd_epi32(part[2], part[3]), 0xD8));
      }
      _mm256_storeu_si256((__m256i *)sum, low);
      _mm256_storeu_si256((__m256i *)(sum + 8), high);
#else
      for (int64_t k = 0; k < s->taps; k++, weight += 64) {
        const uint8_t *at = in + s->offsets[k];
        for (int i = 0; i < LANES; i++)
          sum[i] += at[0] * weight[4 * i] + at[1] * weight[4 * i + 1] + at[2] * weight[4 * i + 2] + at[3] * weight[4 * i + 3];
      }
#endif
      float value[LANES];
      for (int i = 0; i < LANES; i++) value[i] = (float)sum[i] * s->scale[n + i] + s->bias[n + i];
      if (r->other)
        for (int i = 0; i < LANES; i++) value[i] += r->other[x * s->other_pixel + n + i];
      for (int i = 0; i < LANES; i++) value[i] = clamp(value[i], s->low, s->high);
      if (r->out) memcpy(r->out + x * s->out_pixel + n, value, sizeof value);
      if (r->codes)
        for (int64_t i = 0; i < kept; i++) r->codes[x * s->code_pixel + n + i] = code_of(value[i], s);
    }
  }
}
#endif

static void conv(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const uint8_t *in = (const uint8_t *)place(r, &s->in);
  const float *other = s->other.used ? (const float *)place(r, &s->other) : NULL;
  float *out = s->out.used ? (float *)place(r, &s->out) : NULL;
  uint8_t *codes = s->codes.used ? (uint8_t *)place(r, &s->codes) : NULL;
  const int64_t lanes = (s->out_c + LANES - 1) / LANES;
  for (int64_t lane = 0; lane < lanes; lane += 2)
    for (int64_t y = first; y < last; y++) {
      const row_t row = {
          in + y * s->stride_h * s->in_row, other ? other + y * s->other_row : NULL, out ? out + y * s->out_row : NULL,
          codes ? frame_pixel(s, codes, y, 0) : NULL};
      conv_row(s, &row, lane, MIN(2, lanes - lane));
      if (codes && !lane) border(s, codes, y);
    }
}

/* --- the rest ------------------------------------------------------------------------------------------------------- */

#ifdef __AVX512VNNI__
/* 16 codes of 4 channels, interleaved: a channel's floats are neighbours, those of the next one `next` floats away */
INLINE __m512i four_codes(const lq_step *s, const float *from, int64_t next, int64_t channels, __mmask16 pixels) {
  const __m512 inverse = _mm512_set1_ps(s->inverse), low = _mm512_set1_ps(s->code_low), high = _mm512_set1_ps(s->code_high);
  const __m512i zero = _mm512_set1_epi32(s->code_zero);
  __m512i found = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    if (i >= channels) break;
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(pixels, from + i * next), inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(v), zero);
    found = _mm512_or_si512(found, _mm512_slli_epi32(code, 8 * i));
  }
  return found;
}

/* 16 channels of 16 pixels at most */
static void planes(const lq_step *s, const float *from, int64_t channels, int64_t count, uint8_t *to, int64_t width) {
  const __mmask16 pixels = (__mmask16)((1u << count) - 1u), bytes = (__mmask16)((1u << width) - 1u);
  __m512i quad[4];
  for (int i = 0; i < 4; i++)
    quad[i] = four_codes(s, from + 4 * i * s->in_channel, s->in_channel, channels - 4 * i, pixels);
  /* in each 128 bits, pixels and quads of channels change places */
  const __m512i a = _mm512_unpacklo_epi32(quad[0], quad[1]), b = _mm512_unpackhi_epi32(quad[0], quad[1]);
  const __m512i c = _mm512_unpacklo_epi32(quad[2], quad[3]), d = _mm512_unpackhi_epi32(quad[2], quad[3]);
  __m128i pixel[4][4];
  const __m512i turned[4] = {
      _mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  for (int i = 0; i < 4; i++) memcpy(pixel[i], &turned[i], 64);
  for (int64_t x = 0; x < count; x++) _mm_mask_storeu_epi8(to + x * s->code_pixel, bytes, pixel[x & 3][x >> 2]);
}

static void quantize_planes(const lq_step *s, const float *row, uint8_t *to) {
  for (int64_t c = 0; c < s->out_c; c += LANES)
    for (int64_t x = 0; x < s->out_w; x += LANES)
      planes(
          s, row + c * s->in_channel + x, s->out_c - c, MIN(LANES, s->out_w - x), to + x * s->code_pixel + c,
          MIN(LANES, s->code_pixel - c)
      );
}
#else
static void quantize_planes(const lq_step *s, const float *row, uint8_t *to) {
  for (int64_t c = 0; c < s->out_c; c++)
    for (int64_t x = 0; x < s->out_w; x++) to[x * s->code_pixel + c] = code_of(row[c * s->in_channel + x], s);
}
#endif

/* floats, of which channels or pixels are neighbours -> codes */
static void quantize(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const float *in = (const float *)place(r, &s->in);
  uint8_t *codes = (uint8_t *)place(r, &s->codes);
  for (int64_t y = first; y < last; y++) {
    const float *row = in + y * s->in_row;
    uint8_t *at = frame_pixel(s, codes, y, 0);
    if (s->in_channel != 1) quantize_planes(s, row, at);
    else if (s->in_pixel == s->out_c && s->code_pixel == s->out_c) codes_of(s, row, s->out_w * s->out_c, at);
    else
      for (int64_t x = 0; x < s->out_w; x++) codes_of(s, row + x * s->in_pixel, s->out_c, at + x * s->code_pixel);
    for (int64_t x = 0; x < s->out_w; x++)
      for (int64_t c = s->out_c; c < s->code_pixel; c++) at[x * s->code_pixel + c] = 0;
    border(s, codes, y);
  }
}

/* floats in any layout -> a map, clamped; channels from `shift` on, pixels `stride` apart; the other channels are 0; plus `other` */
static void copy(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const float *in = (const float *)place(r, &s->in);
  const float *other = s->other.used ? (const float *)place(r, &s->other) : NULL;
  float *out = (float *)place(r, &s->out);
  for (int64_t y = first; y < last; y++)
    for (int64_t x = 0; x < s->out_w; x++) {
      const float *from = in + y * s->stride_h * s->in_row + x * s->stride_w * s->in_pixel;
      const float *more = other ? other + y * s->other_row + x * s->other_pixel : NULL;
      float *to = out + y * s->out_row + x * s->out_pixel;
      if (s->in_c != s->out_pixel) memset(to, 0, sizeof(float) * (size_t)s->out_pixel);
      to += s->shift;
      if (s->in_channel == 1)
        for (int64_t c = 0; c < s->in_c; c++) to[c] = clamp(from[c] + (more ? more[c] : 0.0f), s->low, s->high);
      else
        for (int64_t c = 0; c < s->in_c; c++) to[c] = clamp(from[c * s->in_channel], s->low, s->high);
    }
}

/* the largest value of each window; what lies outside counts for nothing */
static void max_pool(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const float *in = (const float *)place(r, &s->in);
  float *out = (float *)place(r, &s->out);
  for (int64_t y = first; y < last; y++)
    for (int64_t x = 0; x < s->out_w; x++) {
      float *to = out + y * s->out_row + x * s->out_pixel;
      for (int64_t c = 0; c < s->out_pixel; c++) to[c] = -INFINITY;
      for (int64_t i = 0; i < s->window_h; i++)
        for (int64_t j = 0; j < s->window_w; j++) {
          const int64_t from_y = y * s->stride_h - s->top + i, from_x = x * s->stride_w - s->left + j;
          if (from_y < 0 || from_y >= s->in_h || from_x < 0 || from_x >= s->in_w) continue;
          const float *from = in + from_y * s->in_row + from_x * s->in_pixel;
          for (int64_t c = 0; c < s->out_pixel; c++) to[c] = to[c] >= from[c] ? to[c] : from[c];
        }
    }
}

/* the mean of each channel, by the first thread */
static void mean(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const float *in = (const float *)place(r, &s->in);
  float *out = (float *)place(r, &s->out);
  if (first || !last) return;
  for (int64_t c = 0; c < s->out_c; c += LANES) {
    float sum[LANES] = {0};
    for (int64_t y = 0; y < s->in_h; y++)
      for (int64_t x = 0; x < s->in_w; x++)
        for (int64_t i = 0; i < LANES; i++) sum[i] += in[y * s->in_row + x * s->in_pixel + c + i];
    for (int64_t i = 0; i < MIN(LANES, s->out_c - c); i++) out[(c + i) * s->out_channel] = sum[i] / (float)(s->in_h * s->in_w);
  }
}

#ifdef __AVX512VNNI__
/* 16 pixels of 16 channels -> 16 channels of 16 pixels */
INLINE void turn(const float *from, int64_t pixel, int64_t count, float *to, int64_t channel, int64_t channels) {
  __m512 v[16], w[16];
  const __mmask16 kept = (__mmask16)((1u << count) - 1u);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = i < count ? _mm512_loadu_ps(from + i * pixel) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    w[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    w[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(w[4 * i]), b = _mm512_castps_pd(w[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(w[4 * i + 2]), d = _mm512_castps_pd(w[4 * i + 3]);
    v[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  /* v[4 i + j] holds channels j, 4 + j, 8 + j, 12 + j of pixels 4 i .. 4 i + 3 */
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 a = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88), d = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xDD);
    w[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    w[8 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
    w[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    w[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (i < channels) _mm512_mask_storeu_ps(to + i * channel, kept, w[i]);
}
#else
INLINE void turn(const float *from, int64_t pixel, int64_t count, float *to, int64_t channel, int64_t channels) {
  for (int64_t i = 0; i < MIN(LANES, channels); i++)
    for (int64_t x = 0; x < count; x++) to[i * channel + x] = from[x * pixel + i];
}
#endif

/* a map -> a tensor of the caller's, of which channels or pixels are neighbours */
static void store(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  const float *in = (const float *)place(r, &s->in);
  float *out = (float *)place(r, &s->out);
  for (int64_t y = first; y < last; y++) {
    const float *row = in + y * s->in_row;
    float *to = out + y * s->out_row;
    if (s->out_channel == 1)
      for (int64_t x = 0; x < s->out_w; x++) memcpy(to + x * s->out_pixel, row + x * s->in_pixel, sizeof(float) * (size_t)s->out_c);
    else
      for (int64_t c = 0; c < s->out_c; c += LANES)
        for (int64_t x = 0; x < s->out_w; x += LANES)
          turn(row + x * s->in_pixel + c, s->in_pixel, MIN(LANES, s->out_w - x), to + c * s->out_channel + x, s->out_channel, s->out_c - c);
  }
}

static void step(const lq_step *s, const lq_run *r, int64_t first, int64_t last) {
  switch (s->kind) {
    case LQ_CONV: conv(s, r, first, last); break;
    case LQ_QUANTIZE: quantize(s, r, first, last); break;
    case LQ_COPY: copy(s, r, first, last); break;
    case LQ_MAX_POOL: max_pool(s, r, first, last); break;
    case LQ_MEAN: mean(s, r, first, last); break;
    default: store(s, r, first, last);
  }
}

/* few images: the threads share each; else each thread has its own */
int NAME(LQ_TABLE)(const lq_program *p) {
  const int threads = lq_threads(p->work * p->images);
  if (p->images < threads) {
    char *arena = lq_scratch(4, (size_t)p->arena);
    if (!arena) return LQ_NO_MEMORY;
    for (int64_t image = 0; image < p->images; image++) {
      const lq_run run = {p, arena, image};
#pragma omp parallel num_threads(threads)
      {
#ifdef _OPENMP
        const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int64_t id = 0, all = 1;
#endif
        for (int64_t i = 0; i < p->count; i++) {
          const int64_t rows = p->steps[i].out_h;
          step(&p->steps[i], &run, rows * id / all, rows * (id + 1) / all);
#pragma omp barrier
        }
      }
    }
    return LQ_OK;
  }
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    char *arena = lq_scratch(4, (size_t)p->arena);
    failed = !arena;
#pragma omp for schedule(dynamic)
    for (int64_t image = 0; image < p->images; image++) {
      const lq_run run = {p, arena, image};
      for (int64_t i = 0; arena && i < p->count; i++) step(&p->steps[i], &run, 0, p->steps[i].out_h);
    }
  }
  return failed ? LQ_NO_MEMORY : LQ_OK;
}
