/* Products of activations and weights, both int8 or both bfloat16, for CPUs with AMX (Intel, from Sapphire Rapids on); compiled
   by build.py when first used. Sums of int8 are exact in 32 bits, multiplied by the scales in float32; those of bfloat16 are
   float32, in an order that does not depend on what else is multiplied. Both are rounded once.

   Shapes: M rows of activations, N features, K values of a row, a multiple of 64 bytes. Weights (N, K) are read as they are
   stored. A tile is 16 lines of 64 bytes. The left operand of a tile product is 16 features, its lines as they lie in memory;
   the right one is 16 rows of activations, laid out so that a line has 32 bits of each (4 values or 2, transposed). So no
   second copy of the weights is kept: a thread copies some features at a time into whole tiles, and lays out activations once
   a call.

   The blocks follow the caches: a round of CHUNK bytes of K has 2 x 16 KiB in the first one (a pair of tiles by CHUNK of
   either operand), and sums, weights and activations of a round have 1 MiB in the second. What the next round reads comes from
   the third, which gives a thread 25 GB/s, the limit of all this: so it is fetched step by step, between the products. Which
   thread computes a block does not change it. */

#define ROWS 384          /* rows and features of which a thread has sums at a time */
#define FEATURES 384
#define WIDE_FEATURES 256 /* of bfloat16 */
#define CHUNK 512
#define SUMS (ROWS * FEATURES * 4)
#define SLAB (4 * ROWS * 12288) /* bytes of rows that are laid out at a time: memory that need not be mapped for each call */

/* `num` rows, at most 32, to (lines of K, 2, 16 x 32 bits, 16 rows); rows that are not there are 0. Bytes around `zero` become
   signed ones. */
static void lay_out(const uint8_t *x, i64 row, i64 num, i64 lines, uint8_t zero, char *to)
{
    const __m512i middle = _mm512_set1_epi8((char)zero);
    for (i64 half = 0; half < 2; half++)
        for (i64 p = 0; p < lines; p++) {
            __m512i r[16];
            for (i64 i = 0; i < 16; i++) {
                const i64 m = half * 16 + i;
                r[i] = m < num ? _mm512_xor_si512(_mm512_loadu_si512(x + m * row + p * LINE), middle) : _mm512_setzero_si512();
            }
            transpose(r);
            for (i64 i = 0; i < 16; i++) _mm512_store_si512(to + p * PAIR + half * TILE + i * LINE, r[i]);
        }
}

/* Everything a product reads and writes. Scales are those of int8; bfloat16 has none (NULL). Of a gated product, `gate` is half
   of the features and the result has as many: the first half through SiLU, times the second. Else `gate` is 0. */
typedef struct {
    const uint8_t *x;
    i64 x_row; /* in bytes, as w_row */
    const float *x_scale;
    const int8_t *w;
    i64 w_row;
    const float *w_scale;
    i64 gate;
    void *out;
    i64 out_row; /* in values */
    int wide;    /* results are float32, else bfloat16 */
    i64 rows, features, width; /* width in bytes */
} Product;

/* The feature of a line of the laid out weights: of a gated product 16 gates and their 16 values take turns. */
static inline i64 feature_of(const Product *p, i64 line)
{
    return p->gate ? line / BLOCK * 16 + line % 16 + (line % BLOCK < 16 ? 0 : p->gate) : line;
}

static void copy_weights(const Product *p, i64 first, i64 num, char *to)
{
    const i64 lines = p->width / LINE;
    for (i64 n = 0; n < num; n++) {
        const int8_t *from = p->w + feature_of(p, first + n) * p->w_row;
        for (i64 start = 0; start < lines; start += CHUNK / LINE) {
            const i64 some = least(lines - start, CHUNK / LINE);
            char *at = to + start * LINE * num + n / BLOCK * (some * PAIR) + n % BLOCK * LINE;
            for (i64 i = 0; i < some; i++) _mm512_store_si512(at + i * PAIR, _mm512_loadu_si512(from + (start + i) * LINE));
        }
    }
}

/* 16 sums of a feature, with the scales. */
static inline __m512 result_of(const Product *p, const char *sums, i64 feature, __m512 x_scale)
{
    const __m512i sum = _mm512_load_si512(sums);
    if (!p->w_scale) return _mm512_castsi512_ps(sum);
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(p->w_scale[feature])), x_scale);
}

static inline __m512 scales_of(const Product *p, i64 m, i64 num)
{
    return p->x_scale ? _mm512_maskz_loadu_ps((__mmask16)((1u << num) - 1), p->x_scale + m) : _mm512_setzero_ps();
}

/* Two rows of results of 16 activations each, a feature and the next one, to pairs of bfloat16. */
static inline __m512i paired(__m512 first, __m512 second)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* Sums of 32 features (two tiles, PAIR apart, rows of x in the lanes) to results: `num` rows of 32. */
static void finish(const Product *p, const char *sums, i64 m, i64 n, i64 num)
{
    const __m512 x_scale = scales_of(p, m, num);
    __m512i r[16];
    if (p->wide) {
        for (i64 half = 0; half < 2; half++) {
            for (i64 i = 0; i < 16; i++)
                r[i] = _mm512_castps_si512(result_of(p, sums + half * PAIR + i * LINE, n + half * 16 + i, x_scale));
            transpose(r);
            for (i64 i = 0; i < num; i++) _mm512_storeu_si512((float *)p->out + (m + i) * p->out_row + n + half * 16, r[i]);
        }
        return;
    }
    for (i64 i = 0; i < 16; i++) {
        const char *at = sums + i / 8 * PAIR + i % 8 * 2 * LINE;
        r[i] = paired(result_of(p, at, n + 2 * i, x_scale), result_of(p, at + LINE, n + 2 * i + 1, x_scale));
    }
    transpose(r);
    for (i64 i = 0; i < num; i++) _mm512_storeu_si512((bf16 *)p->out + (m + i) * p->out_row + n, r[i]);
}

/* Sums of 32 gates and their values (two blocks of 16 and 16) to results: `num` rows of 32. `n` counts results. */
static void finish_gated(const Product *p, const char *blocks[2], i64 m, i64 n, i64 num)
{
    const __m512 x_scale = scales_of(p, m, num);
    __m512i r[16];
    for (i64 i = 0; i < 16; i++) {
        __m512 both[2];
        for (i64 j = 0; j < 2; j++) {
            const i64 feature = n + 2 * i + j;
            const char *at = blocks[i / 8] + (2 * i + j) % 16 * LINE;
            const __m512 gate = result_of(p, at, feature, x_scale);
            both[j] = _mm512_mul_ps(silu(gate), result_of(p, at + PAIR, p->gate + feature, x_scale));
        }
        r[i] = paired(both[0], both[1]);
    }
    transpose(r);
    for (i64 i = 0; i < num; i++) _mm512_storeu_si512((bf16 *)p->out + (m + i) * p->out_row + n, r[i]);
}

/* What is fetched of the next round while a block is computed: so many lines at each step, from `at` on. */
typedef struct {
    const char *at;
    i64 each;
} Fetch;

/* Part `i` of `num` of 32 rows or features, `lines` of K, fetched in `steps`. */
static inline Fetch part_of(const char *next, i64 lines, i64 i, i64 num, i64 steps)
{
    const i64 each = (lines * BLOCK + num * steps - 1) / (num * steps);
    return (Fetch){next + i * each * steps * LINE, each};
}

static inline void fetch(Fetch *of)
{
    for (i64 i = 0; i < of->each; i++, of->at += LINE) _mm_prefetch(of->at, _MM_HINT_T1);
}

/* Add the products of a round to the sums (4 tiles) of 32 features and 32 rows; the first round begins them. `wide`: they are
   of bfloat16. */
static inline void multiply(char *sums, const char *w, const char *x, i64 lines, int begins, int wide, Fetch *w_next,
                            Fetch *x_next)
{
    MEMORY();
    if (begins)
        zero_tiles();
    else
        FOUR_TILES(_tile_loadd, sums, TILE, 2 * TILE, 3 * TILE);
    for (i64 i = 0; i < lines; i++, w += PAIR, x += PAIR) {
        fetch(w_next);
        fetch(x_next);
        if (wide)
            ADD_PRODUCTS(_tile_dpbf16ps, w, x);
        else
            ADD_PRODUCTS(_tile_dpbssd, w, x);
    }
    FOUR_TILES(_tile_stored, sums, TILE, 2 * TILE, 3 * TILE);
    MEMORY();
}

/* The results of `num` blocks of 32 laid out rows, from `m` on, and of `along` blocks of weights, the first of which is `n`. */
static void multiply_block(const Product *p, const char *x, i64 m, i64 num, const char *w, i64 n, i64 along, char *sums)
{
    const i64 lines = p->width / LINE;
    for (i64 start = 0; start < lines; start += CHUNK / LINE) {
        const i64 some = least(lines - start, CHUNK / LINE), later = least(lines - start - some, CHUNK / LINE);
        const char *chunk = w + start * LINE * along * BLOCK;
        for (i64 b = 0; b < along; b++)
            for (i64 r = 0; r < num; r++) {
                char *at = sums + (b * num + r) * 4 * TILE;
                Fetch w_next = part_of(chunk + (along * some + b * later) * PAIR, later, r, num, some);
                Fetch x_next = part_of(x + (r * lines + start + some) * PAIR, later, b, along, some);
                multiply(at, chunk + b * some * PAIR, x + (r * lines + start) * PAIR, some, start == 0, !p->w_scale, &w_next,
                         &x_next);
                if (later || (p->gate && b % 2 == 0)) continue;
                for (i64 half = 0; half < 2; half++) {
                    const i64 row = m + r * BLOCK + half * 16, left = least(16, p->rows - row);
                    if (left <= 0) break;
                    if (p->gate)
                        finish_gated(p, (const char *[]){at - num * 4 * TILE + half * TILE, at + half * TILE}, row,
                                     (n + b - 1) * 16, left);
                    else
                        finish(p, at + half * TILE, row, (n + b) * BLOCK, left);
                }
            }
    }
}

/* The rows that are laid out at a time: few where they are wide. */
static i64 slab_of(i64 rows, i64 width)
{
    const i64 most = SLAB / width / ROWS, some = most < 1 ? 1 : least(most, 4);
    return least(rows, some * ROWS);
}

/* Bytes of working space for `rows` rows of `width` bytes. */
i64 limner_tiles_space(i64 rows, i64 width, int wide, int threads)
{
    const i64 laid_out = (slab_of(rows, width) + BLOCK - 1) / BLOCK * BLOCK * width;
    return laid_out + threads * (SUMS + (wide ? WIDE_FEATURES : FEATURES) * width);
}

/* Distances and `width` in bytes, that of results in values. Without scales x and w are bfloat16. `features` are a multiple of
   32, of a gated product of 64; `space` begins at a multiple of 64. */
void limner_tiles_product(const uint8_t *x, i64 x_row, const float *x_scale, const int8_t *w, i64 w_row, const float *w_scale,
                          i64 gate, void *out, i64 out_row, int wide, i64 rows, i64 features, i64 width, char *space,
                          int threads)
{
    const Product p = {x, x_row, x_scale, w, w_row, w_scale, gate, out, out_row, wide, rows, features, width};
    const i64 lines = width / LINE, most = w_scale ? FEATURES : WIDE_FEATURES, along = (features + most - 1) / most;
    const i64 slab = slab_of(rows, width);
    char *own_spaces = space + (slab + BLOCK - 1) / BLOCK * BLOCK * width;
#pragma omp parallel num_threads(threads)
    {
        char *sums = own_spaces + omp_get_thread_num() * (SUMS + most * width), *weights = sums + SUMS;
        shape_tiles();
        for (i64 first = 0; first < rows; first += slab) {
            const i64 blocks = (least(rows - first, slab) + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic, 1)
            for (i64 b = 0; b < blocks; b++) {
                const i64 m = first + b * BLOCK;
                lay_out(x + m * x_row, x_row, least(BLOCK, rows - m), lines, w_scale ? 128 : 0, space + b * lines * PAIR);
            }
            /* few features: threads share their rows too, each with a copy of the weights */
            const i64 across = (blocks * BLOCK + ROWS - 1) / ROWS, shares = least(across, (3 * threads + along - 1) / along);
#pragma omp for schedule(dynamic, 1)
            for (i64 task = 0; task < along * shares; task++) {
                const i64 n = task / shares * most, num = least(features - n, most), share = task % shares;
                copy_weights(&p, n, num, weights);
                MEMORY();
                for (i64 part = across * share / shares; part < across * (share + 1) / shares; part++) {
                    const i64 b = part * (ROWS / BLOCK), some = least(blocks - b, ROWS / BLOCK);
                    multiply_block(&p, space + b * lines * PAIR, first + b * BLOCK, some, weights, n / BLOCK, num / BLOCK, sums);
                }
            }
        }
        _tile_release();
    }
}
