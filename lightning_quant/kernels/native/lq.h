/* Kernels for packed weights on CPUs: plain C, called through ctypes. See docs/kernels.md for the layout of words and the paths. */
#ifndef LQ_H
#define LQ_H

#include <stddef.h>
#include <stdint.h>

enum { LQ_F32 = 0, LQ_BF16 = 1, LQ_F16 = 2 };
enum { LQ_INT = 0, LQ_CODEBOOK = 1, LQ_E4M3 = 2, LQ_E5M2 = 3 };
enum { LQ_INPUT_FLOAT = 0, LQ_INPUT_DYNAMIC = 1, LQ_INPUT_STATIC = 2 };
enum { LQ_ZERO_NONE = 0, LQ_ZERO_PACKED = 1, LQ_ZERO_ONE = 2 };

/* A packed weight [n, k]: rows of little-endian words, `bits` a code, and how a code becomes a value:
   (code + low - zero_point) * scale, or table[code] * scale. */
typedef struct {
  int64_t n, k;
  const uint32_t *words;
  int64_t row_words;
  const float *scale;
  int64_t scale_stride; /* floats from one channel's scales to the next's; 0 if all share one */
  int64_t group;        /* neighbours that share a scale; k where a channel or all do */
  const int32_t *zero;
  int64_t zero_stride; /* groups of a channel */
  int32_t zero_kind;
  int32_t flat; /* groups run over the flattened weight */
  int32_t bits, kind, low;
  int32_t swapped; /* the first code of a byte is its high half */
  float table[16]; /* of codes of at most four bits; narrower codes repeat */
} lq_weight;

typedef struct {
  lq_weight weight;
  const void *x; /* [m, k], rows x_stride elements apart */
  int64_t m, x_stride;
  void *y; /* [m, n], dense */
  int32_t dtype, y_dtype;
  int32_t exact; /* neither the input nor the weight is rounded to bfloat16 */
  const void *bias;
  int32_t bias_dtype;
  int32_t input;                     /* LQ_INPUT_... */
  int32_t in_low, in_high, in_symmetric; /* the input's smallest and largest code */
  const float *in_scale; /* static */
  const int32_t *in_zero;
  const float *x_scale; /* one factor for each row of a float input, or NULL */
} lq_linear_args;

/* The input as codes: int8 rows of `stride`, less lq_shift(), and each row's scale and zero point (less the same). */
typedef struct {
  int8_t *codes;
  int64_t stride;
  float *scale;
  int32_t *zero;
  int32_t any_zero;
} lq_codes;

typedef struct {
  int (*linear)(const lq_linear_args *);
  void (*dequantize)(const lq_weight *, const int64_t *rows, int64_t count, int32_t dtype, void *out);
  void (*quantize_tensor)(const void *x, int32_t dtype, int64_t count, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *out);
} lq_kernels;

extern const lq_kernels lq_base, lq_avx2, lq_avx512;

/* --- programs of steps that run image by image (images.c) --- */

enum { LQ_CONV, LQ_QUANTIZE, LQ_COPY, LQ_MAX_POOL, LQ_MEAN, LQ_STORE };

/* where a step reads or writes: a tensor of the program's, or (below 0) an offset into the arena */
typedef struct {
  int32_t used, tensor;
  int64_t offset;
} lq_place;

typedef struct {
  void *data;
  int64_t stride; /* bytes from one image to the next */
} lq_tensor;

/* distances are in elements; what a step has no use for is 0 */
typedef struct {
  int32_t kind;
  int32_t in_h, in_w, in_c, out_h, out_w, out_c;
  int32_t stride_h, stride_w, window_h, window_w;
  int32_t top, left, bottom, right; /* the border of `codes`, or of a pool */
  int32_t shift;                    /* the first channel that is written */
  lq_place in, other, out, codes;   /* `other` is added */
  int64_t in_row, in_pixel, in_channel, other_row, other_pixel, out_row, out_pixel, out_channel, code_row, code_pixel;
  float low, high; /* what values are clamped to: ReLU */
  float inverse, code_low, code_high; /* codes: clamp(x * inverse) rounded, then + code_zero */
  int32_t code_zero;
  /* convolutions: weight [channels / 16, taps, 16, 4], where a tap is 4 neighbouring codes, `offsets[tap]` from the first one */
  int64_t taps;
  const int32_t *offsets;
  const int8_t *weight;
  const int32_t *start; /* what sums start from, as codes have a zero point */
  const float *scale, *bias;
} lq_step;

typedef struct {
  const lq_step *steps;
  int64_t count;
  lq_tensor *tensors;
  int64_t images, arena, work; /* bytes of scratch, and multiplications of an image */
} lq_program;

int lq_base_images(const lq_program *), lq_avx2_images(const lq_program *), lq_avx512_images(const lq_program *);

/* --- fake quantization, in fake_quant.c --- */

enum { LQ_RANGE_GIVEN = 0, LQ_RANGE_NOW = 1, LQ_RANGE_SEEN = 2 };
enum { LQ_CLIPPED = 1, LQ_NOT_FINITE = 2, LQ_FAILED = 4 }; /* bits of what is returned */

/* A dense tensor of float32 or bfloat16, `rows` of `columns` in groups that share a scale; scales of row r are those of r % period. */
typedef struct {
  const void *x;
  void *y;          /* as x; the gradient by x in a backward pass */
  const void *grad; /* backward: as x */
  int64_t rows, columns, group, period;
  float *scale; /* [period, groups]; written unless the range is given */
  void *zero;   /* int32, or float32 to be rounded; the same */
  int32_t zero_is_float, keep_nan;
  int32_t dtype, low, high; /* codes */
  int32_t range;            /* LQ_RANGE_...: scales are given, those of each group as it is now, or of what was seen of the tensor */
  int32_t symmetric;
  float bound; /* what a symmetric range's largest magnitude is divided by */
  float *seen_low, *seen_high;
  float momentum; /* of a moving average; 0: all that was seen */
} lq_fake_args;

typedef struct {
  int32_t (*quantize)(const lq_fake_args *);
  void (*mask)(const lq_fake_args *);
  int32_t (*learn)(const lq_fake_args *, float *by_scale, float *by_zero, float factor);
  int32_t (*search)(const lq_fake_args *, const float *counts, const float *shrinks, int32_t steps, float *low, float *high);
} lq_fake_kernels;

extern const lq_fake_kernels lq_base_fake, lq_avx2_fake, lq_avx512_fake;

/* scratch that a thread keeps between calls; NULL if there is no memory */
void *lq_scratch(int slot, size_t bytes);
int lq_threads(int64_t work);
int lq_has_bf16(void);

#define LQ_MIN_SCALE 1.17549435e-38f

#define LQ_OK 0
#define LQ_REFUSED 1   /* the caller takes another path */
#define LQ_NO_MEMORY 2

/* --- what every instruction set shares --- */

static inline float lq_bf16_to_float(uint16_t v) {
  union { uint32_t u; float f; } c = {(uint32_t)v << 16};
  return c.f;
}

static inline uint16_t lq_float_to_bf16(float v) {
  union { float f; uint32_t u; } c = {v};
  if (v != v) return 0x7FC0;
  return (uint16_t)((c.u + 0x7FFF + ((c.u >> 16) & 1)) >> 16);
}

float lq_half_to_float(uint16_t v);
uint16_t lq_float_to_half(float v);

static inline float lq_load(const void *p, int32_t dtype, int64_t i) {
  if (dtype == LQ_F32) return ((const float *)p)[i];
  if (dtype == LQ_BF16) return lq_bf16_to_float(((const uint16_t *)p)[i]);
  return lq_half_to_float(((const uint16_t *)p)[i]);
}

static inline void lq_store(void *p, int32_t dtype, int64_t i, float v) {
  if (dtype == LQ_F32) ((float *)p)[i] = v;
  else if (dtype == LQ_BF16) ((uint16_t *)p)[i] = lq_float_to_bf16(v);
  else ((uint16_t *)p)[i] = lq_float_to_half(v);
}

static inline uint32_t lq_field(const uint32_t *words, int64_t stride, int64_t index, int bits) {
  int64_t bit = index * bits;
  const uint32_t *at = words + (bit >> 5) * stride;
  int shift = (int)(bit & 31);
  uint32_t v = at[0] >> shift;
  if (shift + bits > 32) v |= at[stride] << (32 - shift);
  return v & ((1u << bits) - 1u);
}

static inline uint32_t lq_code(const lq_weight *w, int64_t n, int64_t k) {
  return lq_field(w->words + n * w->row_words, 1, w->swapped ? k ^ 1 : k, w->bits);
}

static inline float lq_scale(const lq_weight *w, int64_t n, int64_t k) {
  if (w->flat) return w->scale[(n * w->k + k) / w->group];
  return w->scale[n * w->scale_stride + k / w->group];
}

/* the zero point as a code, 0 .. 2^bits - 1, of an integer weight; for symmetric ones the code of 0 */
static inline int32_t lq_zero(const lq_weight *w, int64_t n, int64_t k) {
  if (w->zero_kind == LQ_ZERO_PACKED) return (int32_t)lq_field((const uint32_t *)w->zero + k / w->group, w->zero_stride, n, w->bits);
  if (w->zero_kind == LQ_ZERO_ONE) return w->zero[0] - w->low;
  return -w->low;
}

/* what input codes are stored less: the zero point where that fits an int8, so that it need not be corrected for later */
static inline int32_t lq_shift(const lq_linear_args *a, int32_t zero) {
  if (a->in_high - a->in_low <= 127) return zero;
  return a->in_low == 0 ? 128 : 0;
}

/* the values of float8 codes: e4m3, e5m2 */
extern float lq_fp8_values[2][256];

#endif
