/* Products of many rows: panels of unpacked codes, multiplied by tiles of sums. */
#pragma once
#include "avx512_int8.h"

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
