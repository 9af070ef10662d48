/* What the sources of this folder share; build.py puts it before each of them. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

/* 2^x for x <= 0, relative error 3e-7 (Taylor series of degree 5 around the nearest integer). What rounding has put above
   0 counts as 0. Of a NaN, minimum and maximum give the second operand: it stays NaN. */
static inline __m512 exp2_negative(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_setzero_ps(), x));
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

static inline __m512 load16(const bf16 *at)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

static inline void store16(bf16 *at, __m512 x) { _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(x)); }

/* x / (1 + e^-x), without overflow. */
static inline __m512 silu(__m512 x)
{
    __m512 e = exp2_negative(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-1.4426950f)));
    __m512 over = _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
    return _mm512_mask_mul_ps(over, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), over, e);
}

#define LOWEST -1e30f /* under every score */

/* K and V (R, H, D) with distances in values: bfloat16, or int8 with a scale for each row and head, (R, H) contiguous.
   `bias` is added to the scores of all its keys, as log2 of a weight. */
typedef struct {
    const void *k, *v;
    i64 k_row, k_head, v_row, v_head;
    const float *k_scale, *v_scale;
    i64 num;
    float bias;
} Segment;

/* One row of a segment's head as bfloat16: itself, or `space` after widening. */
static inline const bf16 *row_of(const void *x, i64 at, const float *scale, i64 scale_at, i64 dim, bf16 *space)
{
    if (!scale) return (const bf16 *)x + at;
    const __m512 factor = _mm512_set1_ps(scale[scale_at]);
    for (i64 i = 0; i < dim; i += 16) {
        __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)x + at + i)));
        store16(space + i, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factor));
    }
    return space;
}
