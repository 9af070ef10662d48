/* Attention over key segments in bfloat16, for CPUs with AVX-512 BF16; compiled by kernels.py when first used.

   Shapes: S queries, R keys of a segment, H heads, D head dimension (a multiple of 16, at most 256).
   A flash kernel (Dao et al. 2022, online softmax) in transposed form: scores are keys x queries, so that the softmax runs
   down columns, 16 queries a register and without a horizontal reduction, and the probabilities leave it as the right
   operand of the second product (pairs of keys in 32 bits, as VDPBF16PS reads them) without being laid out anew.
   Scores, softmax and sums are float32. What a query gets depends on neither batch nor threads. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define QUERIES 64           /* queries of a task: 4 registers */
#define KEYS 128             /* keys of a block */
#define MAX_DIM 256
#define LOWEST -1e30f

typedef uint16_t bf16;
typedef int64_t i64;

/* 2^x for x <= 0, relative error 3e-7 (Taylor series of degree 5 around the nearest integer) */
static inline __m512 exp2_negative(__m512 x)
{
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline i64 blocks_of(i64 n) { return (n + KEYS - 1) / KEYS; }

/* Values of one head that a packed segment takes, K and V each: whole blocks. */
i64 limner_packed_size(i64 n, i64 dim) { return blocks_of(n) * KEYS * dim; }

/* K (R, H, D) to [H][R][D]; V (R, H, D) to [H][block][D / 4][key pair][4][2]. Rows after the last are zero. */
void limner_pack(const bf16 *k, i64 k_row, i64 k_head, const bf16 *v, i64 v_row, i64 v_head, i64 n, i64 heads, i64 dim,
                 bf16 *k_out, bf16 *v_out, int threads)
{
    i64 blocks = blocks_of(n), size = limner_packed_size(n, dim);
#pragma omp parallel for collapse(2) num_threads(threads)
    for (i64 h = 0; h < heads; h++)
        for (i64 b = 0; b < blocks; b++) {
            i64 first = b * KEYS, some = n - first < KEYS ? n - first : KEYS;
            bf16 *to = k_out + h * size + first * dim;
            for (i64 i = 0; i < some; i++)
                memcpy(to + i * dim, k + (first + i) * k_row + h * k_head, dim * sizeof(bf16));
            memset(to + some * dim, 0, (KEYS - some) * dim * sizeof(bf16));
            to = v_out + h * size + first * dim;
            for (i64 pair = 0; pair < KEYS / 2; pair++) {
                const bf16 *even = v + (first + 2 * pair) * v_row + h * v_head, *odd = even + v_row;
                for (i64 g = 0; g < dim / 4; g++) {
                    __m128i low = _mm_setzero_si128(), high = low;
                    if (2 * pair < some) low = _mm_loadl_epi64((const __m128i *)(even + 4 * g));
                    if (2 * pair + 1 < some) high = _mm_loadl_epi64((const __m128i *)(odd + 4 * g));
                    _mm_storeu_si128((__m128i *)(to + (g * (KEYS / 2) + pair) * 8), _mm_unpacklo_epi16(low, high));
                }
            }
        }
}

/* out[4][QUERIES] += left x right over `depth` pairs: left[pair] at left + row * left_row + pair * left_pair, 32 bits each;
   right [depth][QUERIES]. */
static inline __attribute__((always_inline)) void product(const int32_t *left, i64 left_row, i64 left_pair,
                                                          const int32_t *right, i64 depth, __m512 sum[4][4])
{
    for (i64 p = 0; p < depth; p++) {
        __m512bh r[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) r[j] = (__m512bh)_mm512_load_si512(right + p * QUERIES + 16 * j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512bh l = (__m512bh)_mm512_set1_epi32(left[i * left_row + p * left_pair]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], l, r[j]);
        }
    }
}

static void attend_block(const bf16 *q, i64 q_row, i64 num_q, i64 dim, i64 num_segments, const bf16 *const *k,
                         const bf16 *const *v, const i64 *n, i64 head, float factor, bf16 *out, i64 out_row)
{
    _Alignas(64) int32_t queries[MAX_DIM / 2 * QUERIES];
    _Alignas(64) float scores[KEYS * QUERIES];
    _Alignas(64) int32_t weights[KEYS / 2 * QUERIES];
    _Alignas(64) float sums[MAX_DIM * QUERIES];
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 scale = _mm512_set1_ps(factor);
    __m512 top[4], total[4];
    for (int j = 0; j < 4; j++) top[j] = _mm512_set1_ps(LOWEST), total[j] = _mm512_setzero_ps();
    memset(sums, 0, dim * QUERIES * sizeof(float));
    for (i64 i = 0; i < QUERIES; i++)
        for (i64 p = 0; p < dim / 2; p++) {
            int32_t pair = 0;
            if (i < num_q) memcpy(&pair, q + i * q_row + 2 * p, sizeof(pair));
            queries[p * QUERIES + i] = pair;
        }

    for (i64 s = 0; s < num_segments; s++) {
        i64 size = limner_packed_size(n[s], dim);
        for (i64 first = 0; first < n[s]; first += KEYS) {
            i64 some = n[s] - first < KEYS ? n[s] - first : KEYS, rows = (some + 3) / 4 * 4;
            const bf16 *k_block = k[s] + head * size + first * dim, *v_block = v[s] + head * size + first * dim;
            __m512 highest[4];
            for (int j = 0; j < 4; j++) highest[j] = _mm512_set1_ps(LOWEST);
            for (i64 i = 0; i < rows; i += 4) {
                __m512 sum[4][4];
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
                product((const int32_t *)(k_block + i * dim), dim / 2, 1, queries, dim / 2, sum);
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < 4; j++) {
                        if (i + r >= some) sum[r][j] = _mm512_set1_ps(LOWEST);
                        highest[j] = _mm512_max_ps(highest[j], sum[r][j]);
                        _mm512_store_ps(scores + (i + r) * QUERIES + 16 * j, sum[r][j]);
                    }
            }
            for (int j = 0; j < 4; j++) {
                __m512 before = top[j];
                top[j] = _mm512_max_ps(before, _mm512_mul_ps(highest[j], scale));
                __m512 shrink = exp2_negative(_mm512_sub_ps(before, top[j])), sum = _mm512_setzero_ps();
                for (i64 i = 0; i < rows; i += 2) {
                    __m512 even = _mm512_load_ps(scores + i * QUERIES + 16 * j);
                    __m512 odd = _mm512_load_ps(scores + (i + 1) * QUERIES + 16 * j);
                    even = exp2_negative(_mm512_fmsub_ps(even, scale, top[j]));
                    odd = exp2_negative(_mm512_fmsub_ps(odd, scale, top[j]));
                    sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
                    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                    _mm512_store_si512(weights + i / 2 * QUERIES + 16 * j, _mm512_permutexvar_epi16(interleave, both));
                }
                total[j] = _mm512_fmadd_ps(total[j], shrink, sum);
                if (first > 0 || s > 0)
                    for (i64 d = 0; d < dim; d++) {
                        float *at = sums + d * QUERIES + 16 * j;
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
                    }
            }
            for (i64 g = 0; g < dim / 4; g++) {
                __m512 sum[4][4];
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < 4; j++) sum[r][j] = _mm512_load_ps(sums + (4 * g + r) * QUERIES + 16 * j);
                product((const int32_t *)v_block + g * (KEYS / 2) * 4, 1, 4, weights, rows / 2, sum);
                for (int r = 0; r < 4; r++)
                    for (int j = 0; j < 4; j++) _mm512_store_ps(sums + (4 * g + r) * QUERIES + 16 * j, sum[r][j]);
            }
        }
    }

    for (int j = 0; j < 4; j++) {
        __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total[j]);
        for (i64 d = 0; d < dim; d += 2) {
            __m512 even = _mm512_mul_ps(_mm512_load_ps(sums + d * QUERIES + 16 * j), inverse);
            __m512 odd = _mm512_mul_ps(_mm512_load_ps(sums + (d + 1) * QUERIES + 16 * j), inverse);
            __m512i both = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
            _mm512_store_si512(queries + d / 2 * QUERIES + 16 * j, both);
        }
    }
    for (i64 i = 0; i < num_q; i++)
        for (i64 p = 0; p < dim / 2; p++) memcpy(out + i * out_row + 2 * p, queries + p * QUERIES + i, 4);
}

/* softmax(factor' q k^T) v over packed segments of n[s] keys; q and out (S, H, D). `factor` is that of the scores times
   log2(e). */
void limner_attend(const bf16 *q, i64 q_row, i64 q_head, i64 num_q, i64 heads, i64 dim, i64 num_segments,
                   const bf16 *const *k, const bf16 *const *v, const i64 *n, float factor, bf16 *out, i64 out_row,
                   i64 out_head, int threads)
{
    i64 blocks = (num_q + QUERIES - 1) / QUERIES;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (i64 task = 0; task < heads * blocks; task++) {
        i64 head = task / blocks, first = task % blocks * QUERIES;
        attend_block(q + first * q_row + head * q_head, q_row, num_q - first < QUERIES ? num_q - first : QUERIES, dim,
                     num_segments, k, v, n, head, factor, out + first * out_row + head * out_head, out_row);
    }
}
