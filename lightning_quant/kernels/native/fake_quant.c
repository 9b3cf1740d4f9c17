/* Fake quantization, forward and backward: plain loops that compilers vectorize, compiled once for each instruction set.

   A tensor is `rows` of `columns`; each row is cut into groups of `group` elements, the last of which may be shorter, and each group
   has a scale; row r has the scales of row r % period. Work is cut into chunks of CHUNK elements whose partial results are merged in
   their order, so that the number of threads changes nothing. */
#include "lq.h"

#include <math.h>

#ifndef LQ_TABLE
#define LQ_TABLE lq_base
#endif
#define JOIN(a, b) a##b
#define NAME(table) JOIN(table, _fake)

#define CHUNK 8192
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  int64_t start, count, index; /* elements of the tensor, and their scale */
} lq_part;

typedef struct {
  float low, high;
  int32_t wrong; /* nan or inf are among them */
} lq_range;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t groups_of(const lq_fake_args *a) { return ceil_div(a->columns, a->group); }

static int64_t chunks_of(const lq_fake_args *a) { return ceil_div(a->group, CHUNK); }

INLINE lq_part part_of(const lq_fake_args *a, int64_t i, int64_t groups, int64_t chunks) {
  const int64_t segment = chunks == 1 ? i : i / chunks, from = chunks == 1 ? 0 : i % chunks * CHUNK;
  const int64_t row = groups == 1 ? segment : segment / groups, group = groups == 1 ? 0 : segment % groups;
  int64_t size = a->columns - group * a->group;
  if (size > a->group) size = a->group;
  size -= from;
  lq_part part = {row * a->columns + group * a->group + from, size > CHUNK ? CHUNK : size, row % a->period * groups + group};
  return part;
}

/* --- ranges --- */

INLINE lq_range range_of(const void *restrict x, int64_t count, int32_t dtype) {
  float low = INFINITY, high = -INFINITY, wrong = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : wrong)
  for (int64_t i = 0; i < count; i++) {
    const float v = lq_load(x, dtype, i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    wrong += v * 0.0f; /* nan for what is not finite */
  }
  lq_range range = {low, high, wrong != 0};
  return range;
}

static lq_range find_range(const lq_fake_args *a, lq_part part) {
  if (a->dtype == LQ_F32) return range_of((const float *)a->x + part.start, part.count, LQ_F32);
  return range_of((const uint16_t *)a->x + part.start, part.count, LQ_BF16);
}

/* numerics.py's _qparams, with its operations in its order */
static void qparams_of(const lq_fake_args *a, lq_range range, float *scale, int32_t *zero) {
  const float low = range.low < 0 ? range.low : 0, high = range.high > 0 ? range.high : 0;
  const float steps = (float)(a->high - a->low);
  float found;
  *zero = 0;
  if (a->symmetric) {
    found = (a->low == 0 || high > -low ? high : -low) / a->bound;
    if (found < LQ_MIN_SCALE) found = LQ_MIN_SCALE;
  } else {
    found = high / steps - low / steps; /* the difference itself may overflow */
    if (found < LQ_MIN_SCALE) found = LQ_MIN_SCALE;
    const float at = (float)a->low - rintf(low / found);
    *zero = (int32_t)(at < a->low ? a->low : at > a->high ? a->high : at);
  }
  *scale = range.wrong ? NAN : low == 0 && high == 0 ? 1.0f : found;
}

/* --- one part of a tensor --- */

typedef struct {
  float scale, inverse, zero, low, high;
} lq_grid;

INLINE lq_grid grid_of(const lq_fake_args *a, int64_t index) {
  float zero = a->zero ? a->zero_is_float ? ((const float *)a->zero)[index] : (float)((const int32_t *)a->zero)[index] : 0.0f;
  const float low = (float)a->low, high = (float)a->high;
  if (a->zero_is_float) {
    zero = rintf(zero);
    zero = zero < low ? low : zero > high ? high : zero;
  }
  lq_grid grid = {a->scale[index], 1.0f / a->scale[index], zero, low, high};
  return grid;
}

/* nan becomes the lowest code, as in torch's operator for one scale, or stays */
INLINE float clamp(float level, lq_grid g, int32_t keep_nan) {
  level = keep_nan ? (level < g.low ? g.low : level) : (level >= g.low ? level : g.low);
  return level > g.high ? g.high : level;
}

INLINE int32_t quantize_of(const void *restrict x, void *restrict y, int64_t count, const lq_grid g, int32_t dtype, int32_t keep_nan) {
  int32_t clipped = 0;
#pragma omp simd reduction(| : clipped)
  for (int64_t i = 0; i < count; i++) {
    const float level = rintf(lq_load(x, dtype, i) * g.inverse) + g.zero;
    const float code = clamp(level, g, keep_nan);
    clipped |= code != level; /* nan too */
    lq_store(y, dtype, i, (code - g.zero) * g.scale);
  }
  return clipped;
}

INLINE void mask_of(const void *restrict x, const void *restrict grad, void *restrict by_x, int64_t count, const lq_grid g, int32_t dtype) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float level = rintf(lq_load(x, dtype, i) * g.inverse) + g.zero;
    const float inside = (level >= g.low) & (level <= g.high) ? 1.0f : 0.0f;
    lq_store(by_x, dtype, i, lq_load(grad, dtype, i) * inside);
  }
}

/* a part's share of the gradients by scale and zero point: LSQ, arXiv:1902.08153, section 2.1; LSQ+, arXiv:2004.09576 */
INLINE void learn_of(
    const void *restrict x, const void *restrict grad, void *restrict by_x, int64_t count, const lq_grid g, int32_t dtype, double *sums
) {
  float rises = 0, shifts = 0;
#pragma omp simd reduction(+ : rises, shifts)
  for (int64_t i = 0; i < count; i++) {
    const float slope = lq_load(grad, dtype, i), ratio = lq_load(x, dtype, i) * g.inverse;
    const float level = rintf(ratio) + g.zero, code = clamp(level, g, 1);
    const int32_t inside = (level >= g.low) & (level <= g.high);
    rises += slope * (code - g.zero - (inside ? ratio : 0.0f));
    shifts += inside ? 0.0f : slope * -g.scale;
    lq_store(by_x, dtype, i, slope * (inside ? 1.0f : 0.0f));
  }
  sums[0] = rises;
  sums[1] = shifts;
}

/* where a part begins in a tensor, which may be NULL */
static void *part_at(const lq_fake_args *a, const void *tensor, lq_part part) {
  return tensor ? (char *)tensor + part.start * (a->dtype == LQ_F32 ? 4 : 2) : NULL;
}

static int32_t quantize_part(const lq_fake_args *a, lq_part part) {
  const lq_grid grid = grid_of(a, part.index);
  const void *x = part_at(a, a->x, part);
  void *y = part_at(a, a->y, part);
  if (a->dtype == LQ_F32)
    return a->keep_nan ? quantize_of(x, y, part.count, grid, LQ_F32, 1) : quantize_of(x, y, part.count, grid, LQ_F32, 0);
  return a->keep_nan ? quantize_of(x, y, part.count, grid, LQ_BF16, 1) : quantize_of(x, y, part.count, grid, LQ_BF16, 0);
}

static void mask_part(const lq_fake_args *a, lq_part part) {
  const lq_grid grid = grid_of(a, part.index);
  const void *x = part_at(a, a->x, part), *grad = part_at(a, a->grad, part);
  void *by_x = part_at(a, a->y, part);
  if (a->dtype == LQ_F32) mask_of(x, grad, by_x, part.count, grid, LQ_F32);
  else mask_of(x, grad, by_x, part.count, grid, LQ_BF16);
}

static void learn_part(const lq_fake_args *a, lq_part part, double *sums) {
  const lq_grid grid = grid_of(a, part.index);
  const void *x = part_at(a, a->x, part), *grad = part_at(a, a->grad, part);
  void *by_x = part_at(a, a->y, part);
  if (a->dtype == LQ_F32) learn_of(x, grad, by_x, part.count, grid, LQ_F32, sums);
  else learn_of(x, grad, by_x, part.count, grid, LQ_BF16, sums);
}

/* --- whole tensors --- */

/* Rows or groups with the range of now: their range is found, and they are quantized while they are in the cache. */
static int32_t quantize_ranged(const lq_fake_args *a, int64_t groups, int64_t count) {
  int32_t found = 0;
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns)) schedule(static) reduction(| : found)
  for (int64_t i = 0; i < count; i++) {
    const lq_part part = part_of(a, i, groups, 1);
    const lq_range range = find_range(a, part);
    if (range.wrong) found |= LQ_NOT_FINITE;
    qparams_of(a, range, a->scale + i, (int32_t *)a->zero + i);
    if (quantize_part(a, part)) found |= LQ_CLIPPED;
  }
  return found;
}

static int32_t quantize_static(const lq_fake_args *a, int64_t groups, int64_t chunks, int64_t count) {
  int32_t clipped = 0;
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns)) schedule(static) reduction(| : clipped)
  for (int64_t i = 0; i < count; i++) {
    const lq_part part = part_of(a, i, groups, chunks);
    if (part.count > 0) clipped |= quantize_part(a, part);
  }
  return clipped ? LQ_CLIPPED : 0;
}

/* Ranges of segments longer than a chunk, `[rows * groups]`. */
static void find_ranges(const lq_fake_args *a, int64_t groups, int64_t chunks, int64_t count, lq_range *parts) {
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const lq_part part = part_of(a, i, groups, chunks);
    const lq_range none = {INFINITY, -INFINITY, 0};
    parts[i] = part.count > 0 ? find_range(a, part) : none;
  }
  for (int64_t segment = 0; segment < count / chunks; segment++) {
    lq_range whole = {INFINITY, -INFINITY, 0};
    for (int64_t i = segment * chunks; i < (segment + 1) * chunks; i++) {
      if (parts[i].low < whole.low) whole.low = parts[i].low;
      if (parts[i].high > whole.high) whole.high = parts[i].high;
      whole.wrong |= parts[i].wrong;
    }
    parts[segment] = whole;
  }
}

/* observers.py's MinMaxObserver and MovingAverageObserver: what was seen takes in what is seen now */
static lq_range observe(const lq_fake_args *a, lq_range now) {
  float *low = a->seen_low, *high = a->seen_high;
  if (a->momentum == 0) {
    *low = now.low < *low ? now.low : *low;
    *high = now.high > *high ? now.high : *high;
  } else {
    *low = isinf(*low) ? now.low : *low + a->momentum * (now.low - *low);
    *high = isinf(*high) ? now.high : *high + a->momentum * (now.high - *high);
  }
  lq_range seen = {*low, *high, 0};
  return seen;
}

static int32_t quantize(const lq_fake_args *a) {
  const int64_t groups = groups_of(a), chunks = chunks_of(a), count = a->rows * groups * chunks;
  if (a->range == LQ_RANGE_GIVEN) return quantize_static(a, groups, chunks, count);
  if (a->rows != a->period) return LQ_FAILED; /* rows apart share a scale */
  if (chunks == 1 && a->range == LQ_RANGE_NOW) return quantize_ranged(a, groups, count);
  lq_range *ranges = lq_scratch(0, (size_t)count * sizeof(lq_range));
  if (!ranges) return LQ_FAILED;
  find_ranges(a, groups, chunks, count, ranges);
  int32_t found = 0;
  for (int64_t i = 0; i < a->rows * groups; i++) {
    if (ranges[i].wrong) found |= LQ_NOT_FINITE;
    if (a->range == LQ_RANGE_SEEN && ranges[i].wrong) return found; /* nothing was changed */
    const lq_range range = a->range == LQ_RANGE_SEEN ? observe(a, ranges[i]) : ranges[i];
    qparams_of(a, range, a->scale + i, (int32_t *)a->zero + i);
  }
  return found | quantize_static(a, groups, chunks, count);
}

static void mask(const lq_fake_args *a) {
  const int64_t groups = groups_of(a), chunks = chunks_of(a), count = a->rows * groups * chunks;
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const lq_part part = part_of(a, i, groups, chunks);
    if (part.count > 0) mask_part(a, part);
  }
}

static int32_t learn(const lq_fake_args *a, float *by_scale, float *by_zero, float factor) {
  const int64_t groups = groups_of(a), chunks = chunks_of(a), count = a->rows * groups * chunks, scales = a->period * groups;
  double *sums = lq_scratch(0, (size_t)(2 * (count + scales)) * sizeof(double)), *totals = sums + 2 * count;
  if (!sums) return LQ_FAILED;
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns)) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    const lq_part part = part_of(a, i, groups, chunks);
    sums[2 * i] = sums[2 * i + 1] = 0;
    if (part.count > 0) learn_part(a, part, sums + 2 * i);
  }
  for (int64_t i = 0; i < 2 * scales; i++) totals[i] = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t segment = i / chunks, index = segment % scales;
    totals[2 * index] += sums[2 * i];
    totals[2 * index + 1] += sums[2 * i + 1];
  }
  for (int64_t i = 0; i < scales; i++) {
    if (by_scale) by_scale[i] = (float)totals[2 * i] * factor;
    if (by_zero) by_zero[i] = (float)totals[2 * i + 1] * factor;
  }
  return 0;
}

/* --- ranges with the least squared error: MSEObserver --- */

/* float within SPAN elements, double over them */
#define SPAN 256

static double error_of(const lq_fake_args *a, int64_t row, const float *counts, float low, float high) {
  const lq_range range = {low, high, 0};
  float scale;
  int32_t zero;
  qparams_of(a, range, &scale, &zero);
  const lq_grid g = {scale, 1.0f / scale, (float)zero, (float)a->low, (float)a->high};
  const float *x = (const float *)a->x + row * a->columns, *times = counts + row * a->columns;
  double total = 0;
  for (int64_t from = 0; from < a->columns; from += SPAN) {
    const int64_t to = from + SPAN < a->columns ? from + SPAN : a->columns;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; i++) {
      const float level = rintf(x[i] * g.inverse) + g.zero;
      const float off = (clamp(level, g, 1) - g.zero) * g.scale - x[i];
      sum += off * off * times[i];
    }
    total += sum;
  }
  return total;
}

typedef struct {
  float low, high;
} lq_ends;

/* candidate c of a stage: 0 shrinks both ends, 1 the upper one, 2 the lower one */
static lq_ends candidate(lq_ends full, int stage, float shrink) {
  const lq_ends ends = {stage == 1 ? full.low : full.low * shrink, stage == 2 ? full.high : full.high * shrink};
  return ends;
}

static int32_t search(const lq_fake_args *a, const float *counts, const float *shrinks, int32_t steps, float *low, float *high) {
  const int stages = a->symmetric ? 1 : 3;
  if (a->rows >= 16) {
#pragma omp parallel for num_threads(lq_threads(a->rows *a->columns *steps)) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) {
      lq_ends best = {low[row], high[row]};
      double least = error_of(a, row, counts, best.low, best.high);
      for (int stage = 0; stage < stages; stage++) {
        const lq_ends full = best;
        for (int32_t i = 0; i < steps; i++) {
          const lq_ends ends = candidate(full, stage, shrinks[i]);
          const double error = error_of(a, row, counts, ends.low, ends.high);
          if (error < least) least = error, best = ends;
        }
      }
      low[row] = best.low;
      high[row] = best.high;
    }
    return 0;
  }
  double *errors = lq_scratch(0, (size_t)steps * sizeof(double)); /* few rows: threads share the candidates of each */
  if (!errors) return LQ_FAILED;
  for (int64_t row = 0; row < a->rows; row++) {
    lq_ends best = {low[row], high[row]};
    double least = error_of(a, row, counts, best.low, best.high);
    for (int stage = 0; stage < stages; stage++) {
      const lq_ends full = best;
#pragma omp parallel for num_threads(lq_threads(a->columns *steps)) schedule(static)
      for (int32_t i = 0; i < steps; i++) {
        const lq_ends ends = candidate(full, stage, shrinks[i]);
        errors[i] = error_of(a, row, counts, ends.low, ends.high);
      }
      for (int32_t i = 0; i < steps; i++)
        if (errors[i] < least) least = errors[i], best = candidate(full, stage, shrinks[i]);
    }
    low[row] = best.low;
    high[row] = best.high;
  }
  return 0;
}

const lq_fake_kernels NAME(LQ_TABLE) = {quantize, mask, learn, search};
