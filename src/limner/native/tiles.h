/* Matrix tiles of CPUs with AMX (Intel, from Sapphire Rapids on): 16 lines of 64 bytes. build.py puts this after common.h. */

#include <sys/syscall.h>
#include <unistd.h>

#define LINE 64
#define TILE 1024
#define PAIR 2048           /* two tiles: 32 features, or 32 rows, by one line */
#define BLOCK 32

#define MEMORY() __asm__ volatile("" ::: "memory") /* tiles are read and written behind the compiler's back */

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shape;

static void shape_tiles(void)
{
    Shape shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = LINE, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape) : "memory");
}

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Add left times right, two tiles each, TILE bytes apart, to the four tiles 0 to 3: 0 and 1 are of the first left one. */
#define ADD_PRODUCTS(multiply, left, right)                                                                            \
    do {                                                                                                               \
        _tile_loadd(4, left, LINE);                                                                                    \
        _tile_loadd(6, right, LINE);                                                                                   \
        multiply(0, 4, 6);                                                                                             \
        _tile_loadd(7, (right) + TILE, LINE);                                                                          \
        multiply(1, 4, 7);                                                                                             \
        _tile_loadd(5, (left) + TILE, LINE);                                                                           \
        multiply(2, 5, 6);                                                                                             \
        multiply(3, 5, 7);                                                                                             \
    } while (0)

static inline void zero_tiles(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Load or store the four tiles: tile 0 at `at`, the others so many bytes after it. */
#define FOUR_TILES(move, at, first, second, third)                                                                     \
    do {                                                                                                               \
        move(0, at, LINE);                                                                                             \
        move(1, (at) + (first), LINE);                                                                                 \
        move(2, (at) + (second), LINE);                                                                                \
        move(3, (at) + (third), LINE);                                                                                 \
    } while (0)

/* 16 x 16 values of 32 bits. */
static inline void transpose(__m512i r[16])
{
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
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Ask the system for tiles; 0 if it gives them. */
int limner_tiles_ask(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }
