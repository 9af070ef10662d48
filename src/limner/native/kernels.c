/* Attention over key segments, and what lies between the matrix products, in bfloat16 for CPUs with AVX-512 BF16; compiled
   by build.py when first used. Everything is computed in float32 and rounded once.

   Attention. Shapes: S queries, R keys of a segment, H heads, D head dimension (a multiple of 16, at most 256).
   A flash kernel (Dao et al. 2022, online softmax) in transposed form: scores are keys x queries, so that the softmax runs
   down columns, 16 queries a register and without a horizontal reduction, and the probabilities leave it as the right
   operand of the second product (pairs of keys in 32 bits, as VDPBF16PS reads them) without being laid out anew. Keys and
   values are read where they are; one block of them at a time is laid out, or widened from int8, in the cache. What a query
   gets depends on neither batch nor threads. */

#define QUERIES 64           /* queries of a product: 4 registers */
#define GROUPS 4             /* such groups of queries that share a block of keys, at most */
#define KEYS 128             /* keys of a block */
#define MAX_DIM 256

/* A block of K to [key][D], and of V to [D / 4][key pair][4][2]; `rows` is `some` rounded up to 4, rows after it are zero. */
static void stage(const Segment *s, i64 head, i64 heads, i64 first, i64 some, i64 rows, i64 dim, bf16 *k_out, bf16 *v_out)
{
    _Alignas(64) bf16 space[2][MAX_DIM], zeros[MAX_DIM] = {0};
    for (i64 i = 0; i < some; i++) {
        i64 key = first + i;
        const bf16 *row = row_of(s->k, key * s->k_row + head * s->k_head, s->k_scale, key * heads + head, dim, space[0]);
        memcpy(k_out + i * dim, row, dim * sizeof(bf16));
    }
    memset(k_out + some * dim, 0, (rows - some) * dim * sizeof(bf16));
    for (i64 pair = 0; pair < rows / 2; pair++) {
        const bf16 *row[2];
        for (int j = 0; j < 2; j++) {
            i64 key = first + 2 * pair + j;
            row[j] = 2 * pair + j < some ? row_of(s->v, key * s->v_row + head * s->v_head, s->v_scale, key * heads + head,
                                                  dim, space[j])
                                         : zeros;
        }
        for (i64 g = 0; g < dim / 4; g++) {
            __m128i even = _mm_loadl_epi64((const __m128i *)(row[0] + 4 * g));
            __m128i odd = _mm_loadl_epi64((const __m128i *)(row[1] + 4 * g));
            _mm_store_si128((__m128i *)(v_out + (g * (KEYS / 2) + pair) * 8), _mm_unpacklo_epi16(even, odd));
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

/* What one group of queries needs while it goes over the keys. */
typedef struct {
    _Alignas(64) int32_t queries[MAX_DIM / 2 * QUERIES];
    _Alignas(64) float sums[MAX_DIM * QUERIES];
    __m512 top[4], total[4];
} Group;

/* What one thread needs: half a megabyte, too much for a small stack. */
typedef struct {
    Group groups[GROUPS];
    _Alignas(64) bf16 k[KEYS * MAX_DIM], v[KEYS * MAX_DIM];
    _Alignas(64) float scores[KEYS * QUERIES];
    _Alignas(64) int32_t weights[KEYS / 2 * QUERIES];
} Workspace;

i64 limner_workspace(void) { return sizeof(Workspace); }

static const uint16_t INTERLEAVE[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11,
                                        27, 12, 28, 13, 29, 14, 30, 15, 31};

/* Two rows of numbers to pairs in 32 bits, the even row low. */
static inline __m512i pairs(__m512 even, __m512 odd)
{
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(INTERLEAVE), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

static void start(Group *group, const bf16 *q, i64 q_row, i64 num, i64 dim)
{
    for (int j = 0; j < 4; j++) group->top[j] = _mm512_set1_ps(LOWEST), group->total[j] = _mm512_setzero_ps();
    memset(group->sums, 0, dim * QUERIES * sizeof(float));
    for (i64 i = 0; i < QUERIES; i++)
        for (i64 p = 0; p < dim / 2; p++) {
            int32_t pair = 0;
            if (i < num) memcpy(&pair, q + i * q_row + 2 * p, sizeof(pair));
            group->queries[p * QUERIES + i] = pair;
        }
}

/* `bias` is added to the scores after their scaling, in units of log2. */
static void add_block(Group *group, Workspace *own, i64 some, i64 rows, i64 dim, __m512 scale, __m512 bias)
{
    const bf16 *k = own->k, *v = own->v;
    float *scores = own->scores;
    int32_t *weights = own->weights;
    __m512 highest[4];
    for (int j = 0; j < 4; j++) highest[j] = _mm512_set1_ps(LOWEST);
    for (i64 i = 0; i < rows; i += 4) {
        __m512 sum[4][4];
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
        product((const int32_t *)(k + i * dim), dim / 2, 1, group->queries, dim / 2, sum);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < 4; j++) {
                if (i + r >= some) sum[r][j] = _mm512_set1_ps(LOWEST);
                highest[j] = _mm512_max_ps(sum[r][j], highest[j]);
                _mm512_store_ps(scores + (i + r) * QUERIES + 16 * j, sum[r][j]);
            }
    }
    for (int j = 0; j < 4; j++) {
        __m512 before = group->top[j], top = _mm512_max_ps(before, _mm512_fmadd_ps(highest[j], scale, bias));
        const __m512 less = _mm512_sub_ps(top, bias);
        __m512 shrink = exp2_negative(_mm512_sub_ps(before, top)), sum = _mm512_setzero_ps();
        for (i64 i = 0; i < rows; i += 2) {
            __m512 even = _mm512_load_ps(scores + i * QUERIES + 16 * j);
            __m512 odd = _mm512_load_ps(scores + (i + 1) * QUERIES + 16 * j);
            even = exp2_negative(_mm512_fmsub_ps(even, scale, less));
            odd = exp2_negative(_mm512_fmsub_ps(odd, scale, less));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            _mm512_store_si512(weights + i / 2 * QUERIES + 16 * j, pairs(even, odd));
        }
        group->top[j] = top;
        group->total[j] = _mm512_fmadd_ps(group->total[j], shrink, sum);
        if (_mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_OQ))
            for (i64 d = 0; d < dim; d++) {
                float *at = group->sums + d * QUERIES + 16 * j;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
            }
    }
    for (i64 g = 0; g < dim / 4; g++) {
        __m512 sum[4][4];
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_load_ps(group->sums + (4 * g + r) * QUERIES + 16 * j);
        product((const int32_t *)v + g * (KEYS / 2) * 4, 1, 4, weights, rows / 2, sum);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < 4; j++) _mm512_store_ps(group->sums + (4 * g + r) * QUERIES + 16 * j, sum[r][j]);
    }
}

static void finish(Group *group, i64 num, i64 dim, bf16 *out, i64 out_row)
{
    for (int j = 0; j < 4; j++) {
        __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_set1_ps(1e-30f), group->total[j]));
        for (i64 d = 0; d < dim; d += 2) {
            __m512 even = _mm512_mul_ps(_mm512_load_ps(group->sums + d * QUERIES + 16 * j), inverse);
            __m512 odd = _mm512_mul_ps(_mm512_load_ps(group->sums + (d + 1) * QUERIES + 16 * j), inverse);
            _mm512_store_si512(group->queries + d / 2 * QUERIES + 16 * j, pairs(even, odd));
        }
    }
    for (i64 i = 0; i < num; i++)
        for (i64 p = 0; p < dim / 2; p++) memcpy(out + i * out_row + 2 * p, group->queries + p * QUERIES + i, 4);
}

/* softmax(factor' q k^T) v over segments; q and out (S, H, D). `factor` is that of the scores times log2(e); `space` has a
   Workspace for each thread, aligned to 64 bytes. */
void limner_attend(const bf16 *q, i64 q_row, i64 q_head, i64 num_q, i64 heads, i64 dim, const Segment *segments,
                   i64 num_segments, float factor, bf16 *out, i64 out_row, i64 out_head, void *space, int threads)
{
    i64 at_once = GROUPS * QUERIES;
    while (at_once > QUERIES && heads * ((num_q + at_once - 1) / at_once) < 4 * threads) at_once /= 2; /* work for all */
    const i64 blocks = (num_q + at_once - 1) / at_once;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (i64 task = 0; task < heads * blocks; task++) {
        Workspace *own = (Workspace *)space + omp_get_thread_num();
        i64 head = task / blocks, first = task % blocks * at_once, used = 0, num[GROUPS];
        for (; used * QUERIES < at_once && first + used * QUERIES < num_q; used++) {
            i64 from = first + used * QUERIES;
            num[used] = num_q - from < QUERIES ? num_q - from : QUERIES;
            start(&own->groups[used], q + from * q_row + head * q_head, q_row, num[used], dim);
        }
        for (i64 s = 0; s < num_segments; s++)
            for (i64 key = 0; key < segments[s].num; key += KEYS) {
                i64 some = segments[s].num - key < KEYS ? segments[s].num - key : KEYS, rows = (some + 3) / 4 * 4;
                stage(&segments[s], head, heads, key, some, rows, dim, own->k, own->v);
                for (i64 g = 0; g < used; g++)
                    add_block(&own->groups[g], own, some, rows, dim, _mm512_set1_ps(factor),
                              _mm512_set1_ps(segments[s].bias));
            }
        for (i64 g = 0; g < used; g++)
            finish(&own->groups[g], num[g], dim, out + (first + g * QUERIES) * out_row + head * out_head, out_row);
    }
}

/* RMSNorm over each head times `weight` (D), then the rotation of neighbouring pairs: x (rows, H, D) to out, contiguous.
   `cos`, `sin` (period, D / 2): row r has the angles of r % period. */
void limner_norm_rope(const bf16 *x, i64 x_row, i64 rows, i64 heads, i64 dim, const float *weight, float eps,
                      const float *cos, const float *sin, i64 period, bf16 *out, int threads)
{
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512 even_minus = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000LL));
#pragma omp parallel for num_threads(threads)
    for (i64 r = 0; r < rows; r++) {
        __m512 c[MAX_DIM / 16], s[MAX_DIM / 16];
        const float *row_cos = cos + r % period * (dim / 2), *row_sin = sin + r % period * (dim / 2);
        for (i64 i = 0; i < dim / 16; i++) {
            c[i] = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row_cos + 8 * i)));
            s[i] = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(row_sin + 8 * i)));
            s[i] = _mm512_xor_ps(s[i], even_minus);
        }
        for (i64 h = 0; h < heads; h++) {
            const bf16 *from = x + r * x_row + h * dim;
            bf16 *to = out + (r * heads + h) * dim;
            __m512 sum = _mm512_setzero_ps();
            for (i64 i = 0; i < dim / 16; i++) {
                __m512 v = load16(from + 16 * i);
                sum = _mm512_fmadd_ps(v, v, sum);
            }
            float mean = _mm512_reduce_add_ps(sum) / dim + eps;
            __m512 shrink = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(mean)));
            for (i64 i = 0; i < dim / 16; i++) {
                __m512 v = _mm512_mul_ps(_mm512_mul_ps(load16(from + 16 * i), shrink), _mm512_loadu_ps(weight + 16 * i));
                __m512 other = _mm512_permute_ps(v, 0xB1);
                store16(to + 16 * i, _mm512_fmadd_ps(v, c[i], _mm512_mul_ps(other, s[i])));
            }
        }
    }
}

/* silu(first half) * second half of rows of 2 `width` (a multiple of 16) values. */
void limner_gated_silu(const bf16 *x, i64 x_row, i64 rows, i64 width, bf16 *out, i64 out_row, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 r = 0; r < rows; r++)
        for (i64 i = 0; i < width; i += 16) {
            __m512 gate = load16(x + r * x_row + i), value = load16(x + r * x_row + width + i);
            store16(out + r * out_row + i, _mm512_mul_ps(silu(gate), value));
        }
}

/* Rows of `width` (a multiple of 16) values to bytes around 128 and a scale a row: x = (byte - 128) * scale. The scale is
   rounded to bfloat16, so that multiplying a bfloat16 result by it rounds nothing more; 127.5 becomes 255. A row with a
   NaN has the scale NaN: the largest is found on bits, where a NaN is above all numbers. */
void limner_quantize_rows(const bf16 *x, i64 x_row, i64 rows, i64 width, uint8_t *out, float *scales, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 r = 0; r < rows; r++) {
        const bf16 *from = x + r * x_row;
        __m512i highest = _mm512_setzero_si512();
        for (i64 i = 0; i < width; i += 16)
            highest = _mm512_max_epi32(highest, _mm512_castps_si512(_mm512_abs_ps(load16(from + i))));
        __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(highest)));
        __m512 scale = _mm512_max_ps(_mm512_set1_ps(1e-30f), _mm512_div_ps(top, _mm512_set1_ps(127.0f)));
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(scale)), 16));
        scales[r] = _mm512_cvtss_f32(scale);
        __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
        for (i64 i = 0; i < width; i += 16) {
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load16(from + i), inverse));
            v = _mm512_add_epi32(_mm512_max_epi32(_mm512_min_epi32(v, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127)),
                                 _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i *)(out + r * width + i), _mm512_cvtepi32_epi8(v));
        }
    }
}

/* Feature maps with the channels of a pixel side by side: (pixels, C) of one picture, C a multiple of 16, in float32
   (`wide`) or bfloat16. */

static inline __m512 load_map(const void *x, int wide, i64 at)
{
    return wide ? _mm512_loadu_ps((const float *)x + at) : load16((const bf16 *)x + at);
}

/* Sums over pixels of the values of each channel and of their squares, in float64: out (2, C). One thread takes `chunk`
   pixels at a time, and `space` has (2, C) for each chunk: what is summed does not depend on threads. */
void limner_map_sums(const void *x, int wide, i64 pixels, i64 channels, i64 chunk, double *out, double *space, int threads)
{
    const i64 chunks = (pixels + chunk - 1) / chunk;
#pragma omp parallel for num_threads(threads)
    for (i64 k = 0; k < chunks; k++) {
        const i64 first = k * chunk, last = first + chunk < pixels ? first + chunk : pixels;
        double *sums = space + k * 2 * channels, *squares = sums + channels;
        memset(sums, 0, 2 * channels * sizeof(double));
        for (i64 p = first; p < last; p += 4) {
            const int some = last - p < 4 ? last - p : 4;
            for (i64 c = 0; c < channels; c += 16) {
                __m512d sum[2], square[2];
                for (int h = 0; h < 2; h++) {
                    sum[h] = _mm512_loadu_pd(sums + c + 8 * h);
                    square[h] = _mm512_loadu_pd(squares + c + 8 * h);
                }
                for (int i = 0; i < some; i++) {
                    const __m512 v = load_map(x, wide, (p + i) * channels + c);
                    const __m512d half[2] = {_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                                             _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
                    for (int h = 0; h < 2; h++) {
                        sum[h] = _mm512_add_pd(sum[h], half[h]);
                        square[h] = _mm512_fmadd_pd(half[h], half[h], square[h]);
                    }
                }
                for (int h = 0; h < 2; h++) {
                    _mm512_storeu_pd(sums + c + 8 * h, sum[h]);
                    _mm512_storeu_pd(squares + c + 8 * h, square[h]);
                }
            }
        }
    }
    memset(out, 0, 2 * channels * sizeof(double));
    for (i64 k = 0; k < chunks; k++)
        for (i64 c = 0; c < 2 * channels; c++) out[c] += space[k * 2 * channels + c];
}

/* silu(x scale + shift), with a scale and a shift for each channel; `out` may be x. */
void limner_map_silu(const void *x, int wide, i64 pixels, i64 channels, const float *scale, const float *shift, void *out,
                     int threads)
{
#pragma omp parallel for num_threads(threads)
    for (i64 p = 0; p < pixels; p++)
        for (i64 c = 0; c < channels; c += 16) {
            const i64 at = p * channels + c;
            __m512 v = _mm512_fmadd_ps(load_map(x, wide, at), _mm512_loadu_ps(scale + c), _mm512_loadu_ps(shift + c));
            if (wide)
                _mm512_storeu_ps((float *)out + at, silu(v));
            else
                store16((bf16 *)out + at, silu(v));
        }
}
