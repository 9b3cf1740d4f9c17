/* What is called from outside, the choice of an instruction set, and what needs none. */
#include "lq.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
int omp_get_max_threads(void);
#endif

#define SLOTS 5
#define KEEP ((size_t)32 << 20) /* larger buffers go back to the system with the next small request */

static _Thread_local struct { void *at; size_t size; } scratch[SLOTS];

void *lq_scratch(int slot, size_t bytes) {
  if (scratch[slot].size < bytes || (scratch[slot].size > KEEP && bytes <= KEEP)) {
    free(scratch[slot].at);
    size_t size = (bytes + 4095) & ~(size_t)4095;
    scratch[slot].at = aligned_alloc(64, size);
    scratch[slot].size = scratch[slot].at ? size : 0;
  }
  return scratch[slot].at;
}

void lq_release(void) {
  for (int slot = 0; slot < SLOTS; slot++) {
    free(scratch[slot].at);
    scratch[slot].at = NULL;
    scratch[slot].size = 0;
  }
}

/* a fork and join costs some microseconds: work is in multiplications */
int lq_threads(int64_t work) {
#ifdef _OPENMP
  return work < 60000 ? 1 : omp_get_max_threads();
#else
  (void)work;
  return 1;
#endif
}

float lq_half_to_float(uint16_t v) {
  uint32_t sign = (uint32_t)(v & 0x8000) << 16, magnitude = v & 0x7FFF;
  union { uint32_t u; float f; } c;
  if (magnitude >= 0x7C00) c.u = sign | 0x7F800000 | (magnitude & 0x3FF) << 13;
  else {
    c.u = 0x77800000; /* 2^112 */
    float power = c.f;
    c.u = magnitude << 13;
    c.f *= power;
    c.u |= sign;
  }
  return c.f;
}

uint16_t lq_float_to_half(float v) {
  union { float f; uint32_t u; } c = {v};
  uint32_t sign = (c.u >> 16) & 0x8000, magnitude = c.u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00); /* rounds to infinity */
  if (magnitude < 0x38800000) {                                  /* subnormal: let the adder round */
    union { uint32_t u; float f; } half = {0x3F000000};
    c.u = magnitude;
    c.f += half.f;
    return (uint16_t)(sign | (c.u - 0x3F000000));
  }
  magnitude += 0xC8000FFF + ((magnitude >> 13) & 1); /* exponent 127 -> 15, half to even */
  return (uint16_t)(sign | magnitude >> 13);
}

float lq_fp8_values[2][256];

static float fp8(uint32_t code, int32_t kind) {
  if (kind == LQ_E5M2) return lq_half_to_float((uint16_t)(code << 8));
  if ((code & 0x7F) == 0x7F) return NAN;
  /* e4m3's exponent has a bias of 7, a half's of 15: the half is 2^-8 of the value, also where it is subnormal */
  return 256.0f * lq_half_to_float((uint16_t)((code & 0x80) << 8 | (code & 0x7F) << 7));
}

enum { BASE, AVX2, AVX512 };
static int level = -1;

static int best(void) {
#if defined(__x86_64__) && !defined(LQ_BASE_ONLY)
  __builtin_cpu_init();
#ifndef LQ_NO_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    return AVX512;
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return BASE;
}

int lq_has_bf16(void) {
#if defined(__x86_64__) && !defined(LQ_BASE_ONLY) && !defined(LQ_NO_AVX512)
  return level == AVX512 && __builtin_cpu_supports("avx512bf16");
#else
  return 0;
#endif
}

/* Take an instruction set: 0 portable, 1 AVX2, 2 AVX512, or the best below it that this machine has. */
int lq_use(int wanted) {
  int found = best();
  for (uint32_t code = 0; code < 256; code++) {
    lq_fp8_values[0][code] = fp8(code, LQ_E4M3);
    lq_fp8_values[1][code] = fp8(code, LQ_E5M2);
  }
  level = wanted < found ? wanted : found;
  return level;
}

static const lq_kernels *kernels(void) {
  if (level < 0) lq_use(AVX512);
#if defined(__x86_64__) && !defined(LQ_BASE_ONLY)
#ifndef LQ_NO_AVX512
  if (level == AVX512) return &lq_avx512;
#endif
  if (level == AVX2) return &lq_avx2;
#endif
  return &lq_base;
}

int lq_linear(const lq_linear_args *args) {
  if (args->m == 0 || args->weight.n == 0) return LQ_OK;
  if (args->weight.k == 0) return LQ_REFUSED;
  return kernels()->linear(args);
}

void lq_dequantize(const lq_weight *weight, const int64_t *rows, int64_t count, int32_t dtype, void *out) {
  kernels()->dequantize(weight, rows, count, dtype, out);
}

int lq_images(const lq_program *program) {
  if (level < 0) lq_use(AVX512);
#if defined(__x86_64__) && !defined(LQ_BASE_ONLY)
#ifndef LQ_NO_AVX512
  if (level == AVX512) return lq_avx512_images(program);
#endif
  if (level == AVX2) return lq_avx2_images(program);
#endif
  return lq_base_images(program);
}

/* Codes of a whole tensor with one scale, for operators outside of this library. */
void lq_quantize_tensor(
    const void *x, int32_t dtype, int64_t count, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *out
) {
  kernels()->quantize_tensor(x, dtype, count, scale, zero, low, high, out);
}

static const lq_fake_kernels *fake_kernels(void) {
  if (level < 0) lq_use(AVX512);
#if defined(__x86_64__) && !defined(LQ_BASE_ONLY)
#ifndef LQ_NO_AVX512
  if (level == AVX512) return &lq_avx512_fake;
#endif
  if (level == AVX2) return &lq_avx2_fake;
#endif
  return &lq_base_fake;
}

int32_t lq_fake_quantize(const lq_fake_args *args) {
  return args->rows * args->columns ? fake_kernels()->quantize(args) : 0;
}

/* the gradient by x: where x is inside the range */
void lq_fake_mask(const lq_fake_args *args) {
  if (args->rows * args->columns) fake_kernels()->mask(args);
}

/* The range of each row with the least squared error: `low` and `high`, the full range, `[rows]`, which contains 0, are replaced. Both
   ends are multiplied by each of `shrinks`, then an asymmetric range's upper, and its lower end. `counts` is how often an element of x
   occurs; x is float32. */
int32_t lq_fake_search(
    const lq_fake_args *args, const float *counts, const float *shrinks, int32_t steps, float *low, float *high
) {
  return args->rows * args->columns ? fake_kernels()->search(args, counts, shrinks, steps, low, high) : 0;
}

/* the gradients by x, scale and zero point, the last two unless NULL */
int32_t lq_fake_learn(const lq_fake_args *args, float *by_scale, float *by_zero, float factor) {
  return fake_kernels()->learn(args, by_scale, by_zero, factor);
}
