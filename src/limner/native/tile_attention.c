/* Attention over key segments in bfloat16 for CPUs with AMX.

   Shapes: S queries, R keys of a segment, H heads, D head dimension, a multiple of 32 and at most 256. A flash kernel (Dao et
   al. 2022, online softmax). A thread takes one head and QUERIES of its queries; of KEYS keys at a time it lays out K and V as
   right operands of tile products. For 32 queries it makes the scores (queries x keys), the softmax's terms, rounded to
   bfloat16, and adds their product with V to the sums. Scores, sums and terms' sums are float32, the result is rounded once.
   What a query gets depends on neither batch nor threads. */

#define QUERIES_AT_ONCE 1024
#define KEYS_AT_ONCE 512
#define LARGEST_DIM 256

/* 2^x for x <= 0, relative error 4e-5, which rounding to bfloat16 hides (Taylor series of degree 4 around the nearest
   integer). A NaN stays. */
static inline __m512 exp2_short(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* What one thread works with. `terms` and `scores` are of 32 queries; `highest` and `total` of each query (base 2). */
typedef struct {
    char *queries; /* (blocks of 32, D / 32, 2, 16 queries, 32 values) bfloat16 */
    char *keys;    /* (blocks of 32 keys, D / 32, 2, 16 pairs of values, 16 keys) */
    char *values;  /* (blocks of 32 keys, D / 32, 2, 16 pairs of keys, 16 values) */
    char *scores;  /* (blocks of 16 keys, 2, 16 queries, 16 keys) float32 */
    char *terms;   /* (blocks of 32 keys, 2, 16 queries, 32 keys) bfloat16 */
    char *sums;    /* (blocks of 32 queries, D / 16, 2, 16 queries, 16 values) float32 */
    float *highest, *total, *shrink;
} Space;

static i64 space_bytes(i64 dim)
{
    return QUERIES_AT_ONCE * dim * 6 + 2 * KEYS_AT_ONCE * dim * 2 + KEYS_AT_ONCE * BLOCK * 6 + 2 * QUERIES_AT_ONCE * 4 + 2 * BLOCK * 4;
}

static Space space_at(char *at, i64 dim)
{
    Space s;
    s.queries = at, at += QUERIES_AT_ONCE * dim * 2;
    s.sums = at, at += QUERIES_AT_ONCE * dim * 4;
    s.keys = at, at += KEYS_AT_ONCE * dim * 2;
    s.values = at, at += KEYS_AT_ONCE * dim * 2;
    s.scores = at, at += KEYS_AT_ONCE * BLOCK * 4;
    s.terms = at, at += KEYS_AT_ONCE * BLOCK * 2;
    s.highest = (float *)at, at += QUERIES_AT_ONCE * 4;
    s.total = (float *)at, at += QUERIES_AT_ONCE * 4;
    s.shrink = (float *)at;
    return s;
}

static void lay_queries(const bf16 *q, i64 row, i64 num, i64 dim, char *to)
{
    for (i64 i = 0; i < (num + BLOCK - 1) / BLOCK * BLOCK; i++)
        for (i64 p = 0; p < dim / 32; p++) {
            char *at = to + (i / BLOCK * (dim / 32) + p) * PAIR + i % BLOCK * LINE;
            _mm512_store_si512(at, i < num ? _mm512_loadu_si512(q + i * row + p * 32) : _mm512_setzero_si512());
        }
}

/* `num` keys of a segment's head from `first` on, at most KEYS_AT_ONCE; the rest of the last 32 are 0. */
static void lay_keys(const Segment *s, i64 head, i64 heads, i64 first, i64 num, i64 dim, const Space *to)
{
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    bf16 wide[16][LARGEST_DIM] __attribute__((aligned(64)));
    const bf16 *rows[16];
    for (i64 block = 0; block < (num + 15) / 16 + ((num + 15) / 16 & 1); block++) {
        const i64 some = least(16, num - block * 16);
        for (i64 i = 0; i < some; i++) {
            const i64 key = first + block * 16 + i;
            rows[i] = row_of(s->k, key * s->k_row + head * s->k_head, s->k_scale, key * heads + head, dim, wide[i]);
        }
        for (i64 p = 0; p < dim / 32; p++) {
            __m512i r[16];
            for (i64 i = 0; i < 16; i++) r[i] = i < some ? _mm512_loadu_si512(rows[i] + p * 32) : _mm512_setzero_si512();
            transpose(r);
            char *at = to->keys + (block / 2 * (dim / 32) + p) * PAIR + block % 2 * TILE;
            for (i64 i = 0; i < 16; i++) _mm512_store_si512(at + i * LINE, r[i]);
        }
        for (i64 i = 0; i < some; i++) {
            const i64 key = first + block * 16 + i;
            rows[i] = row_of(s->v, key * s->v_row + head * s->v_head, s->v_scale, key * heads + head, dim, wide[i]);
        }
        for (i64 p = 0; p < dim / 32; p++)
            for (i64 i = 0; i < 16; i += 2) {
                const __m512i a = i < some ? _mm512_loadu_si512(rows[i] + p * 32) : _mm512_setzero_si512();
                const __m512i b = i + 1 < some ? _mm512_loadu_si512(rows[i + 1] + p * 32) : _mm512_setzero_si512();
                char *at = to->values + (block / 2 * (dim / 32) + p) * PAIR + (block % 2 * 8 + i / 2) * LINE;
                _mm512_store_si512(at, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(at + TILE, _mm512_permutex2var_epi16(a, high, b));
            }
    }
    MEMORY();
}

/* scores = queries x keys, both of them blocks of 32. */
static inline void score(const char *queries, const char *keys, i64 dim, char *scores)
{
    zero_tiles();
    for (i64 p = 0; p < dim / 32; p++, queries += PAIR, keys += PAIR) {
        ADD_PRODUCTS(_tile_dpbf16ps, queries, keys);
    }
    FOUR_TILES(_tile_stored, scores, PAIR, TILE, PAIR + TILE);
}

/* 2^((score - middle) factor + shift) of 16 keys. */
static inline __m512 term(const char *scores, __m512 middle, __m512 factor, __m512 shift)
{
    return exp2_short(_mm512_fmadd_ps(_mm512_sub_ps(_mm512_load_ps(scores), middle), factor, shift));
}

/* The softmax's terms of 32 queries and `num` keys, in base 2; `scale` of the scores and `bias` are, too. Returns whether sums
   so far shrink. */
static int soften(const Space *s, i64 first, i64 num, float scale, float bias)
{
    const i64 blocks = (num + 15) / 16;
    const __mmask16 last = (__mmask16)(0xffff >> (blocks * 16 - num));
    int shrinks = 0;
    for (i64 i = 0; i < BLOCK; i++) {
        const char *row = s->scores + i / 16 * TILE + i % 16 * LINE;
        char *to = s->terms + i / 16 * TILE + i % 16 * LINE;
        __m512 top[4];
        for (int j = 0; j < 4; j++) top[j] = _mm512_set1_ps(LOWEST);
        i64 b = 0;
        for (; b + 4 < blocks; b += 4)
            for (int j = 0; j < 4; j++) top[j] = _mm512_max_ps(top[j], _mm512_load_ps(row + (b + j) * PAIR));
        for (; b + 1 < blocks; b++) top[0] = _mm512_max_ps(top[0], _mm512_load_ps(row + b * PAIR));
        top[1] = _mm512_mask_max_ps(top[1], last, top[1], _mm512_load_ps(row + b * PAIR));
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
        const float before = s->highest[first + i], after = most * scale + bias > before ? most * scale + bias : before;
        /* what is subtracted first is a score itself, so that the highest has the term 1 also where scores have no fractions */
        const __m512 factor = _mm512_set1_ps(scale), middle = _mm512_set1_ps(most), shift = _mm512_set1_ps(most * scale + bias - after);
        __m512 total = _mm512_setzero_ps(), other = _mm512_setzero_ps();
        for (b = 0; b < blocks; b += 2) {
            __m512 p0 = term(row + b * PAIR, middle, factor, shift), p1 = _mm512_setzero_ps();
            if (b + 1 < blocks) p1 = term(row + (b + 1) * PAIR, middle, factor, shift);
            if (b + 2 >= blocks) {
                if (b + 1 < blocks)
                    p1 = _mm512_maskz_mov_ps(last, p1);
                else
                    p0 = _mm512_maskz_mov_ps(last, p0);
            }
            total = _mm512_add_ps(total, p0);
            other = _mm512_add_ps(other, p1);
            _mm512_store_si512(to + b / 2 * PAIR, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
        }
        const float shrink = before > LOWEST ? _mm512_cvtss_f32(exp2_negative(_mm512_set1_ps(before - after))) : 0.0f;
        s->total[first + i] = s->total[first + i] * shrink + _mm512_reduce_add_ps(_mm512_add_ps(total, other));
        s->highest[first + i] = after;
        s->shrink[i] = shrink;
        shrinks |= shrink != 1.0f;
    }
    MEMORY();
    return shrinks;
}

/* sums = sums * shrink + terms x values, of 32 queries; the first block of keys begins them. */
static void add_values(const Space *s, char *sums, i64 num, i64 dim, int shrinks, int begins)
{
    const i64 blocks = (num + BLOCK - 1) / BLOCK;
    if (shrinks && !begins) {
        for (i64 p = 0; p < dim / 16; p++)
            for (i64 i = 0; i < BLOCK; i++) {
                float *at = (float *)(sums + p * PAIR + i * LINE);
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(s->shrink[i])));
            }
        MEMORY();
    }
    for (i64 p = 0; p < dim / 32; p++) {
        char *at = sums + p * 2 * PAIR;
        if (begins) {
            zero_tiles();
        } else {
            FOUR_TILES(_tile_loadd, at, PAIR, TILE, PAIR + TILE);
        }
        for (i64 b = 0; b < blocks; b++) {
            const char *terms = s->terms + b * PAIR, *values = s->values + (b * (dim / 32) + p) * PAIR;
            ADD_PRODUCTS(_tile_dpbf16ps, terms, values);
        }
        FOUR_TILES(_tile_stored, at, PAIR, TILE, PAIR + TILE);
    }
    MEMORY();
}

static void write_out(const Space *s, i64 num, i64 dim, bf16 *out, i64 row)
{
    for (i64 i = 0; i < num; i++) {
        const __m512 factor = _mm512_set1_ps(1.0f / s->total[i]);
        const char *from = s->sums + i / BLOCK * (dim / 16) * PAIR + i % BLOCK * LINE;
        for (i64 p = 0; p < dim / 16; p++) store16(out + i * row + p * 16, _mm512_mul_ps(_mm512_load_ps(from + p * PAIR), factor));
    }
}

i64 limner_tiles_attention_space(i64 dim) { return space_bytes(dim); }

/* softmax(q k^T scale) v over the keys of all segments, with `scale` in base 2. Distances are in values. */
void limner_tiles_attend(const bf16 *q, i64 q_row, i64 q_head, i64 queries, i64 heads, i64 dim, const Segment *segments,
                         i64 num_segments, float scale, bf16 *out, i64 out_row, i64 out_head, char *space, int threads)
{
    const i64 parts = (queries + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE;
    const i64 each = ((queries + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel num_threads(threads)
    {
        const Space s = space_at(space + omp_get_thread_num() * space_bytes(dim), dim);
        shape_tiles();
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < heads * parts; task++) {
            const i64 head = task / parts, start = task % parts * each, num = least(each, queries - start);
            if (num <= 0) continue;
            const i64 blocks = (num + BLOCK - 1) / BLOCK;
            lay_queries(q + start * q_row + head * q_head, q_row, num, dim, s.queries);
            for (i64 i = 0; i < blocks * BLOCK; i++) s.highest[i] = LOWEST, s.total[i] = 0.0f;
            int begins = 1;
            for (i64 g = 0; g < num_segments; g++)
                for (i64 first = 0; first < segments[g].num; first += KEYS_AT_ONCE) {
                    const i64 some = least(segments[g].num - first, KEYS_AT_ONCE);
                    lay_keys(segments + g, head, heads, first, some, dim, &s);
                    for (i64 b = 0; b < blocks; b++) {
                        for (i64 k = 0; k < (some + BLOCK - 1) / BLOCK; k++)
                            score(s.queries + b * (dim / 32) * PAIR, s.keys + k * (dim / 32) * PAIR, dim, s.scores + k * 2 * PAIR);
                        MEMORY();
                        const int shrinks = soften(&s, b * BLOCK, some, scale, segments[g].bias);
                        add_values(&s, s.sums + b * (dim / 16) * PAIR, some, dim, shrinks, begins);
                    }
                    begins = 0;
                }
            write_out(&s, num, dim, out + start * out_row + head * out_head, out_row);
        }
        _tile_release();
    }
}
