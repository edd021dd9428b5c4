/* The random words of philox.py on a processor: the same bits as NumPy's, at a tenth of the time.

   Built when the package is installed (hatch_build.py), and loaded by native.py. Without a C compiler NumPy does it.
   The layout is philox.py's: a block is 128 columns of a row, made of 32 counters, whose four words are 32 columns
   apart. Logarithm, root, sine and cosine stay NumPy's, for a normal to have the same bits whether this was built or
   not. */

#include <stdint.h>

#define ROUNDS 7
#define GROUP 32

/* One copy of a function for each set of instructions; the one that fits the processor is chosen when it is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__)
#if !defined(__clang__) && __GNUC__ >= 12
#define WIDEST "arch=x86-64-v4" /* takes half the time that AVX-512's foundation alone does */
#else
#define WIDEST "avx512f"
#endif
#define FOR_EACH_PROCESSOR __attribute__((target_clones(WIDEST, "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef struct {
    uint32_t seed_low, seed_high, draw, last;
} stream;

INLINE void counters(stream s, uint32_t row, uint32_t group, int count, uint32_t words[4 * GROUP]) {
    for (int i = 0; i < count; i++) {
        uint32_t c0 = row, c1 = group + (uint32_t)i, c2 = s.draw, c3 = s.last;
        uint32_t k0 = s.seed_low, k1 = s.seed_high;
        for (int r = 0; r < ROUNDS; r++) {
            uint64_t product0 = (uint64_t)c0 * 0xD2511F53u, product1 = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)product1;
            c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)product0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[i] = c0;
        words[GROUP + i] = c1;
        words[2 * GROUP + i] = c2;
        words[3 * GROUP + i] = c3;
    }
}

INLINE stream of_line(const int64_t *keys, int64_t line, int64_t rows, uint32_t last) {
    const int64_t *key = keys + 2 * (line / rows);
    uint64_t seed = (uint64_t)key[0];
    stream s = {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)(uint64_t)key[1], last};
    return s;
}

/* The number that says which functions with which arguments are here; native.py asks for it. */
int64_t vbdl_philox_version(void) { return 2; }

/* Words of lines begin, begin + 1, ..., end - 1 of (draws x rows): out is (end - begin, columns).
   keys: (draws, 2), the seed and the number of each draw. last: layer << 4 | stream. */
FOR_EACH_PROCESSOR
void vbdl_philox_words(const int64_t *keys, uint32_t last, int64_t first_row, int64_t rows, int64_t columns,
                       int64_t begin, int64_t end, int64_t *out) {
    uint32_t words[4 * GROUP];
    for (int64_t line = begin; line < end; line++) {
        stream s = of_line(keys, line, rows, last);
        uint32_t row = (uint32_t)(uint64_t)(first_row + line % rows);
        for (int64_t column = 0; column < columns; column += 4 * GROUP) {
            int64_t left = columns - column;
            if (left >= 4 * GROUP) {
                counters(s, row, (uint32_t)(column / 4), GROUP, words);
                for (int i = 0; i < 4 * GROUP; i++) out[i] = words[i];
                out += 4 * GROUP;
            } else {
                counters(s, row, (uint32_t)(column / 4), left < GROUP ? (int)left : GROUP, words);
                for (int i = 0; i < left; i++) out[i] = words[i];
                out += left;
            }
        }
    }
}

/* Of the same lines whether each word is at least the threshold, which is in [0, 2**32]: out is (end - begin, columns). */
FOR_EACH_PROCESSOR
void vbdl_philox_keep(const int64_t *keys, uint32_t last, int64_t first_row, int64_t rows, int64_t columns,
                      int64_t begin, int64_t end, int64_t threshold, uint8_t *out) {
    uint32_t words[4 * GROUP], least = (uint32_t)threshold;
    uint8_t some = threshold <= 0xFFFFFFFF;
    for (int64_t line = begin; line < end; line++) {
        stream s = of_line(keys, line, rows, last);
        uint32_t row = (uint32_t)(uint64_t)(first_row + line % rows);
        for (int64_t column = 0; column < columns; column += 4 * GROUP) {
            int64_t left = columns - column;
            if (left >= 4 * GROUP) {
                counters(s, row, (uint32_t)(column / 4), GROUP, words);
                for (int i = 0; i < 4 * GROUP; i++) out[i] = (words[i] >= least) & some;
                out += 4 * GROUP;
            } else {
                counters(s, row, (uint32_t)(column / 4), left < GROUP ? (int)left : GROUP, words);
                for (int i = 0; i < left; i++) out[i] = (words[i] >= least) & some;
                out += left;
            }
        }
    }
}

/* Of the same lines the pairs of words that make normals, as floats: a number in (0, 1] and an angle in radians.
   uniform, angle: (end - begin, pairs, width) with width = min(columns, 32), and pairs = 2 for each block of 128
   columns, of which there is one whose second pair is left out if columns <= 64. */
FOR_EACH_PROCESSOR
void vbdl_philox_pairs(const int64_t *keys, uint32_t last, int64_t first_row, int64_t rows, int64_t columns,
                       int64_t begin, int64_t end, float *uniform, float *angle) {
    uint32_t words[4 * GROUP];
    int width = columns < GROUP ? (int)columns : GROUP, pairs = columns <= 2 * GROUP ? 1 : 2;
    for (int64_t line = begin; line < end; line++) {
        stream s = of_line(keys, line, rows, last);
        uint32_t row = (uint32_t)(uint64_t)(first_row + line % rows);
        for (int64_t column = 0; column < columns; column += 4 * GROUP) {
            if (width == GROUP) {
                counters(s, row, (uint32_t)(column / 4), GROUP, words);
                for (int p = 0; p < pairs; p++) {
                    for (int i = 0; i < GROUP; i++) {
                        uniform[i] = ((float)words[2 * p * GROUP + i] + 0.5f) * 0x1p-32f;
                        angle[i] = (float)(int32_t)words[(2 * p + 1) * GROUP + i] * (float)(6.283185307179586 * 0x1p-32);
                    }
                    uniform += GROUP;
                    angle += GROUP;
                }
            } else {
                counters(s, row, (uint32_t)(column / 4), width, words);
                for (int i = 0; i < width; i++) {
                    uniform[i] = ((float)words[i] + 0.5f) * 0x1p-32f;
                    angle[i] = (float)(int32_t)words[GROUP + i] * (float)(6.283185307179586 * 0x1p-32);
                }
                uniform += width;
                angle += width;
            }
        }
    }
}
