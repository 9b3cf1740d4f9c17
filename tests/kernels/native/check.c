/* Random calls of the C library with buffers of the exact size, every instruction set against the portable one. Built with
   sanitizers, so that a byte read or written outside of them stops the program. */
#include "lq.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int lq_use(int wanted);
int lq_linear(const lq_linear_args *args);
void lq_dequantize(const lq_weight *weight, const int64_t *rows, int64_t count, int32_t dtype, void *out);
void lq_quantize_tensor(
    const void *x, int32_t dtype, int64_t count, float scale, int32_t zero, int32_t low, int32_t high, uint8_t *out
);
int32_t lq_fake_quantize(const lq_fake_args *args);
void lq_fake_mask(const lq_fake_args *args);
int32_t lq_fake_learn(const lq_fake_args *args, float *by_scale, float *by_zero, float factor);
void lq_release(void);

static int compared; /* outputs of two instruction sets */
static uint64_t state = 88172645463325252ull;
static uint32_t roll(uint32_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (uint32_t)(state >> 33) % below;
}
static float number(void) { return ((int)roll(2001) - 1000) / 500.0f; }

static const int sizes[] = {2, 4, 2}; /* bytes of a dtype: bf16, f32, f16 by (dtype + 1) % 3 */

static void fill(void *at, int dtype, int64_t count) {
  for (int64_t i = 0; i < count; i++) lq_store(at, dtype, i, number());
}

static int round_of(int number_of) {
  lq_linear_args a = {0};
  lq_weight *w = &a.weight;
  const int widths[] = {2, 3, 4, 5, 6, 7, 8};
  const int64_t groups[] = {7, 8, 16, 24, 32, 64, 96, 128, 1 << 20};
  w->n = 1 + roll(90);
  w->k = roll(4) ? 1 + roll(400) : 64 * (1 + roll(20));
  w->bits = widths[roll(7)];
  w->kind = LQ_INT;
  if (w->bits == 4 && roll(2)) w->kind = LQ_CODEBOOK, w->swapped = 1;
  if (w->bits == 8 && roll(2)) w->kind = roll(2) ? LQ_E4M3 : LQ_E5M2;
  w->low = w->kind == LQ_INT && roll(2) ? -(1 << (w->bits - 1)) : 0;
  w->group = groups[roll(9)];
  if (w->group > w->k) w->group = w->k;
  w->flat = w->kind == LQ_CODEBOOK && w->k % w->group && roll(2);
  int64_t per_row = (w->k + w->group - 1) / w->group, scales = w->flat ? (w->n * w->k + w->group - 1) / w->group : w->n * per_row;
  w->scale_stride = w->flat ? 0 : per_row;
  w->row_words = (w->k * w->bits + 31) / 32;
  uint32_t *words = malloc(w->n * w->row_words * 4);
  for (int64_t i = 0; i < w->n * w->row_words; i++) words[i] = roll(1 << 16) << 16 | roll(1 << 16);
  if (w->kind == LQ_E4M3) /* no nan */
    for (int64_t i = 0; i < w->n * w->row_words; i++) words[i] &= 0xF7F7F7F7;
  if (w->kind == LQ_E5M2)
    for (int64_t i = 0; i < w->n * w->row_words; i++) words[i] &= 0xBFBFBFBF;
  for (int64_t n = 0; n < w->n; n++) /* padding is zeros, as pack makes it */
    for (int64_t bit = w->k * w->bits; bit < w->row_words * 32; bit++) words[n * w->row_words + bit / 32] &= ~(1u << bit % 32);
  float *scale = malloc(scales * 4);
  for (int64_t i = 0; i < scales; i++) scale[i] = 0.01f + roll(100) / 1000.0f;
  int64_t zeros = (w->n * w->bits + 31) / 32 * per_row;
  int32_t *zero = malloc(zeros * 4);
  for (int64_t i = 0; i < zeros; i++) zero[i] = (int32_t)(roll(1 << 16) << 16 | roll(1 << 16));
  if (w->kind == LQ_INT && roll(2)) w->zero_kind = LQ_ZERO_PACKED, w->zero = zero, w->zero_stride = per_row;
  for (int i = 0; i < 16; i++)
    w->table[i] = w->kind == LQ_CODEBOOK ? (i - 7.5f) / 8 : (float)((i & ((1 << (w->bits < 4 ? w->bits : 4)) - 1)) + w->low);
  w->words = words, w->scale = scale;
  const int64_t rows[] = {0, 1, 2, 3, 4, 5, 8, 9, 14, 33, 70};
  a.m = rows[roll(11)], a.x_stride = w->k + roll(3);
  a.dtype = a.y_dtype = roll(3);
  a.exact = roll(2);
  int width = sizes[(a.dtype + 1) % 3];
  void *x = malloc(a.m ? (a.m - 1) * a.x_stride * width + w->k * width : 1), *bias = malloc(w->n * 4);
  if (a.m) fill(x, a.dtype, (a.m - 1) * a.x_stride + w->k);
  fill(bias, LQ_F32, w->n);
  a.x = x, a.bias = roll(2) ? bias : NULL;
  float in_scale = 0.02f;
  int32_t in_zero = 3;
  if (w->kind == LQ_INT) {
    a.input = roll(3);
    int unsigned_ = roll(2), bits = roll(2) ? 8 : 4;
    a.in_low = unsigned_ ? 0 : -(1 << (bits - 1)), a.in_high = a.in_low + (1 << bits) - 1, a.in_symmetric = roll(2);
    a.in_scale = &in_scale, a.in_zero = &in_zero;
  }
  size_t bytes = a.m * w->n * width;
  void *expected = malloc(bytes + 1), *got = malloc(bytes + 1);
  float *all = malloc(w->n * w->k * 4), *some = malloc(w->n * w->k * 4);
  uint8_t *codes = malloc(w->n * w->k), *others = malloc(w->n * w->k);
  int bad = 0, reference = 1;
  for (int isa = 0; isa < 3 && !bad; isa++) {
    if (lq_use(isa) != isa) continue;
    lq_dequantize(w, NULL, w->n, LQ_F32, isa ? some : all);
    if (isa && memcmp(some, all, w->n * w->k * 4)) bad = 1;
    lq_quantize_tensor(all, LQ_F32, w->n * w->k, 0.03f, 5, 0, 200, isa ? others : codes);
    if (isa && memcmp(others, codes, w->n * w->k)) bad = 2;
    a.y = reference ? expected : got;
    int status = LQ_OK;
    if (isa) status = lq_linear(&a);
    else /* row by row, as it leaves more to the caller */
      for (int64_t m = 0; m < a.m && status == LQ_OK; m++) {
        lq_linear_args one = a;
        one.m = 1, one.x = (const char *)x + m * a.x_stride * width, one.y = (char *)expected + m * w->n * width;
        status = lq_linear(&one);
      }
    if (status == LQ_NO_MEMORY) bad = 3;
    if (status != LQ_OK) continue;
    compared += a.y == got;
    if (a.y == got) {
      double difference = 0, total = 0;
      for (int64_t i = 0; i < a.m * w->n; i++) {
        double p = lq_load(expected, a.y_dtype, i), q = lq_load(got, a.y_dtype, i);
        difference += (p - q) * (p - q), total += p * p;
      }
      /* bfloat16 products unless exact; sums in another order in any case */
      if (sqrt(difference) > (a.dtype == LQ_F32 && (a.exact || a.input) ? 2e-5 : 1e-2) * sqrt(total) + 1e-5) bad = 4;
    }
    reference = 0;
  }
  if (bad)
    printf("round %d: %d; n %d k %d bits %d kind %d group %d m %d dtype %d input %d\n", number_of, bad, (int)w->n, (int)w->k,
           w->bits, w->kind, (int)w->group, (int)a.m, a.dtype, a.input);
  free(words), free(scale), free(zero), free(x), free(bias), free(expected), free(got), free(all), free(some), free(codes), free(others);
  return bad;
}

/* Fake quantization of a tensor, forward and backward; all but sums to the bit. */
static int fake_round(int number_of) {
  const int64_t columns[] = {1, 7, 31, 100, 9000, 20001}, group_sizes[] = {1, 7, 16, 32, 64, 9000};
  lq_fake_args a = {0};
  a.columns = columns[roll(6)], a.rows = a.columns > 8000 ? 1 + roll(3) : 1 + roll(40);
  a.group = roll(2) ? a.columns : group_sizes[roll(6)];
  a.range = roll(3), a.period = a.range == LQ_RANGE_GIVEN && roll(2) && a.rows % 2 == 0 ? a.rows / 2 : a.rows;
  if (a.range == LQ_RANGE_SEEN) a.rows = a.period = 1, a.group = a.columns;
  const int64_t count = a.rows * a.columns, scales = a.period * ((a.columns + a.group - 1) / a.group);
  int bits = 2 + roll(7), signed_ = roll(2);
  a.low = signed_ ? -(1 << (bits - 1)) : 0, a.high = a.low + (1 << bits) - 1;
  a.dtype = roll(2), a.symmetric = roll(2), a.keep_nan = roll(2), a.zero_is_float = a.range == LQ_RANGE_GIVEN && roll(2);
  a.bound = (a.high - a.low) / 2.0f, a.momentum = roll(2) ? 0.1f : 0.0f;
  int width = a.dtype == LQ_F32 ? 4 : 2, bad = 0;
  char *x = malloc(count * width), *grad = malloc(count * width), *all[2];
  for (int i = 0; i < 2; i++) all[i] = malloc(2 * count * width + scales * 8 + 8);
  fill(x, a.dtype, count), fill(grad, a.dtype, count);
  if (roll(8) == 0) lq_store(x, a.dtype, roll(count), roll(2) ? NAN : INFINITY);
  a.x = x, a.grad = grad;
  float *sums[2] = {malloc(scales * 8), malloc(scales * 8)};
  int reference = 1;
  for (int isa = 0; isa < 3 && !bad; isa++) {
    if (lq_use(isa) != isa) continue;
    float *scale = malloc(scales * 4), seen[2] = {-0.5f, 0.5f};
    int32_t *zero = malloc(scales * 4);
    for (int64_t i = 0; i < scales; i++) {
      scale[i] = 0.01f * (1 + i % 9), zero[i] = a.low + (int32_t)(i % 3);
      if (a.zero_is_float) ((float *)zero)[i] = a.low + 0.3f;
    }
    char *out = all[!reference];
    a.scale = scale, a.zero = zero, a.seen_low = seen, a.seen_high = seen + 1, a.y = out;
    memset(out, 0, 2 * count * width);
    if (lq_fake_quantize(&a) & LQ_FAILED) bad = 1;
    a.y = out + count * width;
    lq_fake_mask(&a);
    memcpy(out + 2 * count * width, scale, scales * 4), memcpy(out + 2 * count * width + scales * 4, zero, scales * 4);
    memcpy(out + 2 * count * width + scales * 8, seen, 8);
    char *by_x = malloc(count * width);
    a.y = by_x;
    if (lq_fake_learn(&a, sums[!reference], sums[!reference] + scales, 0.5f)) bad = 2;
    free(by_x), free(scale), free(zero);
    /* nan has many bits */
    for (int64_t i = 0; !reference && i < 2 * count; i++) {
      float p = lq_load(all[0], a.dtype, i), q = lq_load(all[1], a.dtype, i);
      if (p != q && (p == p || q == q)) bad = 3;
    }
    if (!reference && memcmp(all[0] + 2 * count * width + scales * 4, all[1] + 2 * count * width + scales * 4, scales * 4 + 8)) bad = 4;
    for (int64_t i = 0; !reference && i < 2 * scales; i++)
      if (fabs(sums[0][i] - sums[1][i]) > 1e-3 * (fabs(sums[0][i]) + a.columns)) bad = 5;
    compared += !reference;
    reference = 0;
  }
  if (bad)
    printf("fake round %d: %d; rows %d columns %d group %d period %d range %d dtype %d\n", number_of, bad, (int)a.rows, (int)a.columns,
           (int)a.group, (int)a.period, a.range, a.dtype);
  free(x), free(grad), free(all[0]), free(all[1]), free(sums[0]), free(sums[1]);
  return bad;
}

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 300, bad = 0;
  for (int i = 0; i < rounds; i++) bad += (round_of(i) != 0) + (fake_round(i) != 0);
  lq_release();
  printf("%d rounds, %d compared, %d bad, best instruction set %d\n", rounds, compared, bad, lq_use(2));
  return bad != 0;
}
