// The optimiser steps on compactly stored moments, for the CPU.
//
// The same fp32 operations in the same order as reference.py, block by block of 128 elements, with a block's
// numbers in registers and the first-level cache: parameters, gradients and codes are read once and written once, and
// nothing as large as a parameter is allocated.
//
//   step(items)  ->  tasks of some blocks, handed out to threads
//     task  ->  for each block:  1 load gradient, codes   2 new moments, new parameter   3 scales   4 new codes
//     matrix format, besides:    5 maxima of the rows and columns of the task into the parameter's
//   last task of a matrix  ->  maxima of this step become the divisors of the next; a piece's are left as found
//
// Dividing and taking roots keep one unit of the processor busy, coding all the others. So a block is coded while the
// next one is stepped (`step_whole`), vector by vector.
//
// The compiler is told which step to build, by the macros below, and makes no other: a library holds one format, dtype,
// rounding and optimiser. So building takes a second, and no choice costs the inner loop anything.
//
// Compiled without contraction (-ffp-contract=off): a fused multiply-add would round differently from PyTorch.
// Maxima are taken over the bits of non-negative floats as integers, so a NaN is larger than everything and
// shows in its block, and the order of threads does not matter.
//
// Vectors are the processor's: 16 floats with AVX-512, 8 with AVX2, 4 otherwise. The compiler's vector types do the
// arithmetic; wider ones than the processor's it would take apart, number by number. Intrinsics stand where they have
// no operator, or GCC makes several instructions of one.

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

#ifndef PACKLIGHT_KIND        // what the moments are stored as: Kind below
#define PACKLIGHT_KIND 0
#endif
#ifndef PACKLIGHT_BF16        // parameters and gradients; fp32 otherwise
#define PACKLIGHT_BF16 0
#endif
#ifndef PACKLIGHT_ROUNDING    // of parameters: Rounding below
#define PACKLIGHT_ROUNDING 0
#endif
#ifndef PACKLIGHT_MOMENTS     // 2: AdamW; 1: SGD with momentum
#define PACKLIGHT_MOMENTS 2
#endif
#ifndef PACKLIGHT_STOCHASTIC  // round second moments at random
#define PACKLIGHT_STOCHASTIC 0
#endif

#if defined __AVX512F__
#define WIDTH 64
#elif defined __AVX2__
#define WIDTH 32
#else
#define WIDTH 16
#endif

namespace {

using Floats = float __attribute__((vector_size(WIDTH)));
using Ints = int32_t __attribute__((vector_size(WIDTH)));
using Words = uint32_t __attribute__((vector_size(WIDTH)));
using Shorts = uint16_t __attribute__((vector_size(WIDTH / 2)));
using Bytes = uint8_t __attribute__((vector_size(WIDTH / 4)));
struct BFloat16 { uint16_t bits; };

enum Kind { FP32 = 0, BITS4 = 1, BITS4_MATRIX = 2, BITS8 = 3, FP8 = 4 };
enum Rounding { NEAREST = 0, STOCHASTIC = 1, MASTER24 = 2, MASTER32 = 3 };

constexpr Kind KIND = (Kind)PACKLIGHT_KIND;
constexpr Rounding ROUNDING = (Rounding)PACKLIGHT_ROUNDING;
constexpr bool ADAMW = PACKLIGHT_MOMENTS == 2, STOCHASTICALLY = PACKLIGHT_STOCHASTIC;
constexpr bool FOUR_BITS = KIND == BITS4 || KIND == BITS4_MATRIX, MATRIX = KIND == BITS4_MATRIX && ADAMW;
#if PACKLIGHT_BF16
using Param = BFloat16;
#else
using Param = float;
#endif

constexpr int LANES = WIDTH / 4, BLOCK = 128, HALF = 64, GROUP = 32, GROUPS = BLOCK / GROUP;
constexpr int SCALES = KIND == BITS8 ? GROUPS : 1;
constexpr int VECTORS = GROUP / LANES;             // of each half, in one turn of the inner loop
constexpr int ERROR_BYTES = ROUNDING == MASTER24 ? 1 : ROUNDING == MASTER32 ? 2 : 0;
constexpr int64_t TASK_BLOCKS = 512;               // 64 Ki elements: far more than it takes to hand out a task
// Of a large matrix, whose columns each task has to begin with and end with. It has so many at most: memory that the
// threads need does not grow beyond them. Shorter pieces of rows would cost time, as each is a new stream from memory.
constexpr int64_t MATRIX_TASK_BLOCKS = 2048, MATRIX_TASKS = 64, STRIP_COLUMNS = 8192;
constexpr int64_t PREFETCH_BLOCKS = 4;             // about the latency of memory
constexpr float SMALLEST_SCALE = 0x1p-118f;
constexpr float TO_INTEGER = 8388608.f;            // 2^23: x + it has the integer nearest to x in its lowest bits
constexpr float LEVEL_SLACK = 1.f - 1.f / 65536;
constexpr float LEVELS = (KIND == BITS8 ? 256.f : 16.f) * LEVEL_SLACK;
constexpr float MAXIMA_RANGE = 64.f, MAXIMA_SLACK = 1.4f;
constexpr float SMALLEST_MAXIMUM = 1e-30f, LARGEST_MAXIMUM = 1e30f, UNKNOWN_ROW = 1.f, UNKNOWN_COLUMN = 1e30f;
constexpr uint32_t MULTIPLIER_1 = 0x7feb352du, MULTIPLIER_2 = 0x846ca68bu, WEYL = 0x9e3779b9u;
constexpr uint32_t PARAMETER_STREAM = 0x5bd1e995u;
constexpr float INFINITE = __builtin_inff();

}  // namespace

// One parameter: pointers and sizes, all 64 bits wide, in the order in which cpu.py writes them.
struct Item {
    Param* param;
    const Param* grad;
    uint8_t* error;
    uint8_t* exp_avg[3];     // fp32: values; else codes, scale, power
    uint8_t* exp_avg_sq[3];  // fp32: values; else codes, scale, power
    float *rows, *cols;      // matrix: (2, rows) and (2, cols)
    int64_t numel, columns;
    uint32_t key, shift;     // of random bits; what a piece's place in its parameter adds to their offsets
    int64_t deferred, spare; // matrix: leave maxima as they were found
};

struct Tables {
    const float* values;     // of the 4-bit first moment, 16
    const int32_t* cells;    // their borders, 32
    const float* expanded;   // FP8: (256, 128)
    const float* borders;    // FP8: (256, 128)
    const float* limits;     // FP8: (256)
    const uint8_t* cells_of_borders;  // FP8: (256, 1024), see expanded_codes
    const uint8_t* cells_of_values;   // FP8: (256, 1024)
    const int32_t* shifts;   // FP8: (256)
};

namespace {

struct Numbers {
#if PACKLIGHT_MOMENTS == 2  // settings.AdamWNumbers
    float m_decay, gradient_to_m, beta2, root_beta2, gradient_to_root, decay, root_to_denom, denom_eps, coefficient, l2;
    static constexpr float m_to_p = 0, gradient_to_p = 0;
#else  // settings.SGDNumbers
    float m_decay, gradient_to_m, m_to_p, gradient_to_p, coefficient, l2;
    static constexpr float beta2 = 0, root_beta2 = 0, gradient_to_root = 0, decay = 0, root_to_denom = 0, denom_eps = 0;
#endif
};

// ---- vectors

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat(int32_t x) { return x - Ints{}; }
INLINE Floats as_floats(Ints x) { return (Floats)x; }
INLINE float as_float(int32_t x) { float y; memcpy(&y, &x, 4); return y; }
INLINE int32_t as_int(float x) { int32_t y; memcpy(&y, &x, 4); return y; }
INLINE Ints magnitude(Floats x) { return (Ints)x & 0x7fffffff; }
INLINE Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
template <class V, class T> INLINE V load(const T* at) { V x; memcpy(&x, at, sizeof x); return x; }
template <class V, class T> INLINE void store(T* at, V x) { memcpy(at, &x, sizeof x); }
INLINE Floats loaded(const float* at) { return load<Floats>(at); }
INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined __AVX512F__  // smaller, larger: of a NaN and a number, whichever comes second
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Words larger(Words a, Words b) { return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b); }
INLINE uint32_t largest(Words x) { return _mm512_reduce_max_epu32((__m512i)x); }
INLINE Floats root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
INLINE Words widened(Bytes x) { return (Words)_mm512_cvtepu8_epi32((__m128i)x); }
INLINE Words widened(Shorts x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE Bytes lowest_bytes(Words x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
INLINE Shorts low_halves(Words x) { return (Shorts)_mm512_cvtepi32_epi16((__m512i)x); }
INLINE Floats gathered(const float* table, Ints index) {
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
}
INLINE Ints gathered(const uint8_t* table, Ints index) {
    return (Ints)_mm512_i32gather_epi32((__m512i)index, table, 1) & 0xff;
}
#elif defined __AVX2__
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Words larger(Words a, Words b) { return (Words)_mm256_max_epu32((__m256i)a, (__m256i)b); }
INLINE uint32_t largest(Words x) {
    __m128i y = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
}
INLINE Floats root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
INLINE Words widened(Bytes x) { return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x)); }
INLINE Words widened(Shorts x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE Shorts low_halves(Words x) {
    const __m256i y = (__m256i)(x & 0xffffu);
    return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
INLINE Bytes lowest_bytes(Words x) {
    const __m128i y = (__m128i)low_halves(x & 0xffu);
    return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(y, y));
}
INLINE Floats gathered(const float* table, Ints index) { return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4); }
INLINE Ints gathered(const uint8_t* table, Ints index) {
    return (Ints)_mm256_i32gather_epi32((const int*)table, (__m256i)index, 1) & 0xff;
}
#else
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Words larger(Words a, Words b) { return a > b ? a : b; }
INLINE uint32_t largest(Words x) {
    uint32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
INLINE Floats root(Floats x) {
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = __builtin_sqrtf(x[i]);
    return y;
}
INLINE Words widened(Bytes x) { return __builtin_convertvector(x, Words); }
INLINE Words widened(Shorts x) { return __builtin_convertvector(x, Words); }
INLINE Bytes lowest_bytes(Words x) { return __builtin_convertvector(x, Bytes); }
INLINE Shorts low_halves(Words x) { return __builtin_convertvector(x, Shorts); }
INLINE Floats gathered(const float* table, Ints index) {
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = table[index[i]];
    return y;
}
INLINE Ints gathered(const uint8_t* table, Ints index) {
    Ints y;
    for (int i = 0; i < LANES; i++) y[i] = table[index[i]];
    return y;
}
#endif

INLINE Words lanes() {
    Words x;
    for (int i = 0; i < LANES; i++) x[i] = (uint32_t)i;
    return x;
}

// The lowest bytes of vectors that follow each other.
INLINE void store_bytes(uint8_t* at, const Words (&x)[VECTORS]) {
#if defined __AVX2__ && !defined __AVX512F__
    auto byte = [&](int i) { return (__m256i)(x[i] & 0xffu); };
    const __m256i y = _mm256_packus_epi16(_mm256_packus_epi32(byte(0), byte(1)), _mm256_packus_epi32(byte(2), byte(3)));
    // Instructions that pack do so in each half of a vector.
    store(at, _mm256_permutevar8x32_epi32(y, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
    for (int i = 0; i < VECTORS; i++) store(at + i * LANES, lowest_bytes(x[i]));
#endif
}

// The high halves of two vectors.
INLINE void store_high_halves(BFloat16* at, Words a, Words b) {
#if defined __AVX2__ && !defined __AVX512F__
    const __m256i y = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
    store(at, _mm256_permute4x64_epi64(y, 0xd8));
#else
    store(at, low_halves(a >> 16));
    store(at + LANES, low_halves(b >> 16));
#endif
}

// ---- tables of 16 and of borders

#if WIDTH == 64
struct Table { Floats values; };
INLINE Table table_of(const float* values) { return {loaded(values)}; }
INLINE Floats looked_up(const Table& table, Words index) {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table.values);
}
#else
struct Table { const float* values; };
INLINE Table table_of(const float* values) { return {values}; }
INLINE Floats looked_up(const Table& table, Words index) {
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = table.values[index[i] & 15];
    return y;
}
#endif

#if WIDTH == 32
INLINE Floats of_8(Floats table, Words index) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
// b where the highest bit is set, a elsewhere.
INLINE Floats chosen(Floats a, Floats b, Words highest) {
    return (Floats)_mm256_blendv_ps((__m256)a, (__m256)b, (__m256)highest);
}
#endif

// Four vectors go together, from e, e + LANES, e + HALF and e + HALF + LANES on, operation by operation. So neighbours
// among instructions do not wait for each other, and a processor that looks ahead some dozens of them is busy.
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
template <class V> struct Four {
    V v[4];
    V& operator[](int i) { return v[i]; }
    const V& operator[](int i) const { return v[i]; }
};
INLINE int place(int i) { return (i & 1) * LANES + (i & 2) * (HALF / 2); }

#if WIDTH == 32
// Two nibbles of 16 bytes each, such that unpacking bytes, then words, puts them into vectors in their order.
INLINE __m256i nibbles_of(const uint8_t* codes) {
    const __m256i twice = _mm256_broadcastsi128_si256(load<__m128i>(codes));
    const __m256i order = _mm256_setr_epi32(0x03020100, 0x0b0a0908, 0x03020100, 0x0b0a0908,
                                            0x07060504, 0x0f0e0d0c, 0x07060504, 0x0f0e0d0c);
    const __m256i spread = _mm256_shuffle_epi8(twice, order);
    return _mm256_and_si256(_mm256_srlv_epi32(spread, _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4)), _mm256_set1_epi8(15));
}
// Floats of which these are the high halves; the low halves are zero, or given.
INLINE Four<Floats> joined(__m256i low_1, __m256i low_2, __m256i high_1, __m256i high_2) {
    return {(Floats)_mm256_unpacklo_epi16(low_1, high_1), (Floats)_mm256_unpackhi_epi16(low_1, high_1),
            (Floats)_mm256_unpacklo_epi16(low_2, high_2), (Floats)_mm256_unpackhi_epi16(low_2, high_2)};
}
#endif

// The bytes of a table's 16 numbers, by their places in a number.
struct Planes { alignas(16) uint8_t bytes[4][16]; };

INLINE Planes planes_of(const float* values) {
    Planes planes;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++) planes.bytes[k][i] = (uint8_t)((uint32_t)as_int(values[i]) >> 8 * k);
    return planes;
}

INLINE Four<Floats> looked_up(const Table& table, const Planes& planes, const uint8_t* codes) {
#if WIDTH == 32
    const __m256i nibbles = nibbles_of(codes);
    auto plane = [&](int place) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(planes.bytes[place])), nibbles);
    };
    const __m256i a = plane(0), b = plane(1), c = plane(2), d = plane(3);
    (void)table;
    return joined(_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b), _mm256_unpacklo_epi8(c, d),
                  _mm256_unpackhi_epi8(c, d));
#else
    (void)planes;
    Four<Floats> y;
    for (int i = 0; i < 2; i++) {
        const Words bytes = widened(load<Bytes>(codes + i * LANES));
        y[i] = looked_up(table, bytes), y[i + 2] = looked_up(table, bytes >> 4);
    }
    return y;
#endif
}

// Codes plus 1.
INLINE Four<Floats> levels_of(const uint8_t* codes) {
#if WIDTH == 32
    const __m256i nibbles = nibbles_of(codes);
    // The high bytes of the numbers 1 to 16, whose other bytes are zero.
    static constexpr uint8_t highs[2][16] = {
        {0x80, 0, 0x40, 0x80, 0xa0, 0xc0, 0xe0, 0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80},
        {0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41}};
    const __m256i third = _mm256_broadcastsi128_si256(load<__m128i>(highs[0]));
    const __m256i fourth = _mm256_broadcastsi128_si256(load<__m128i>(highs[1]));
    const __m256i c = _mm256_shuffle_epi8(third, nibbles), d = _mm256_shuffle_epi8(fourth, nibbles), zero = {};
    return joined(zero, zero, _mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
#else
    Four<Floats> y;
    for (int i = 0; i < 2; i++) {
        const Words bytes = widened(load<Bytes>(codes + i * LANES));
        y[i] = floats((Ints)((bytes & 15u) + 1u)), y[i + 2] = floats((Ints)((bytes >> 4) + 1u));
    }
    return y;
#endif
}

// Where the 15 borders between codes are; a border has the code below it in its own lowest bits (books.py).
#if WIDTH == 32
// A parabola puts each border of a sign into a cell of its own, of eight, as an instruction's table has eight cells.
// None is nearer than 0.03 to a cell's edge, so this may be rounded in any way.
struct Borders { Floats positive, negative; };

INLINE Words cell_of(Floats x) {
    const Floats y = as_floats(magnitude(x));
#ifdef __FMA__
    const __m256 slope = _mm256_fnmadd_ps((__m256)y, _mm256_set1_ps(.02f), _mm256_set1_ps(.795f));
    return (Words)_mm256_fmadd_ps((__m256)y, slope, _mm256_set1_ps(TO_INTEGER));
#else
    return (Words)(y * (.795f - y * .02f) + TO_INTEGER);
#endif
}
NOINLINE Borders borders_of(const int32_t* cells) {
    int32_t positive[8] = {}, negative[8] = {};
    for (int i = 0; i < 32; i++) {
        const float border = as_float(cells[i]);
        if (border - border == 0) (border < 0 ? negative : positive)[cell_of(splat(border))[0] & 7] = cells[i];
    }
    // A cell without a border gets a NaN, which nothing is above, with the code of the whole cell.
    for (int i = 7; i >= 0; i--)
        if (!negative[i]) negative[i] = as_int(INFINITE) | (i == 7 ? 0 : (negative[i + 1] & 15) + 1);
    for (int i = 0; i < 8; i++)
        if (!positive[i]) positive[i] = as_int(INFINITE) | (((i ? positive[i - 1] : negative[0]) & 15) + 1);
    return {loaded((const float*)positive), loaded((const float*)negative)};
}
INLINE Floats border_of(const Borders& borders, Floats x, Words cell) {
    return chosen(of_8(borders.positive, cell), of_8(borders.negative, cell), (Words)x);
}
#else
struct Borders { const int32_t* cells; };

INLINE Borders borders_of(const int32_t* cells) { return {cells}; }
INLINE Words cell_of(Floats x) { return (Words)(x + (TO_INTEGER + 15.f)); }
INLINE Floats border_of(const Borders& borders, Floats, Words cell) {
#if WIDTH == 64
    const __m512i low = load<__m512i>(borders.cells), high = load<__m512i>(borders.cells + LANES);
    return (Floats)_mm512_permutex2var_epi32(low, (__m512i)cell, high);
#else
    Ints y;
    for (int i = 0; i < LANES; i++) y[i] = borders.cells[cell[i] & 31];
    return as_floats(y);
#endif
}
#endif

// ---- random bits, as in noise.py

// What a block has in common, and the words of the vectors at e and e + HALF: offsets of blocks are multiples of 128.
INLINE uint32_t first_word(uint64_t offset, uint32_t key) {
    return (uint32_t)offset * MULTIPLIER_1 + (uint32_t)(offset >> 32) * WEYL + key;
}
INLINE Words words(uint32_t first, int e) {
    const Words x = (lanes() + (uint32_t)e) * MULTIPLIER_1 + first;
    return (x ^ x >> 15) * MULTIPLIER_2;
}
INLINE Floats uniform(Words word, bool second_half, float least) {  // between least and least + 1
    const Words bits = second_half ? (word << 7 & 0x7fff80u) | 0x3f800040u : word >> 9 | 0x3f800001u;
    return (Floats)bits - (1.f - least);
}

// ---- parameters

INLINE Floats parameters(const float* at, const uint8_t*, int) { return loaded(at); }
INLINE Floats parameters(const BFloat16* at, const uint8_t* error, int e) {
    const Words x = widened(load<Shorts>(at)) << 16;
    if (ROUNDING == MASTER24) return (Floats)((Ints)x + ((Ints)(widened(load<Bytes>(error + e)) << 24) >> 16));
    if (ROUNDING == MASTER32) return (Floats)((Ints)x + ((Ints)(widened(load<Shorts>(error + 2 * e)) << 16) >> 16));
    return (Floats)x;
}
INLINE Floats gradients(const float* at) { return loaded(at); }
INLINE Floats gradients(const BFloat16* at) { return (Floats)(widened(load<Shorts>(at)) << 16); }

// The bits of a new parameter, its bf16 in their high halves; what is beyond them goes to `error`. A NaN stays as it
// is: rounding might carry through all of its bits.
INLINE Words rounded(Floats x, uint8_t* error, int e, Words random) {
    const Words bits = (Words)x;
    if (ROUNDING == NEAREST) return x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits;
    if (ROUNDING == STOCHASTIC) return x == x ? bits + (e & HALF ? random & 0xffffu : random >> 16) : bits;
    const Words high = bits + 0x8000u;
    const Words finite = (Words)((bits & 0x7f800000u) != 0x7f800000u);
    Ints rest = (Ints)(bits - (high & 0xffff0000u));
    if (ROUNDING == MASTER24) {
        rest = (rest + 128) >> 8;
        store(error + e, lowest_bytes((Words)(rest > 127 ? splat(127) : rest) & finite));
    } else {
        store(error + 2 * e, low_halves((Words)rest & finite));
    }
    return (high & finite) | (bits & ~finite);
}

// ---- one block

// A block of a parameter: where its numbers are, and which they are.
struct Block {
    Param* param;
    const Param* grad;
    uint8_t *error, *m_codes, *s_codes, *m_scale, *s_scale, *m_power, *s_power;
    uint64_t offset;             // of its first element in the parameter
    int length;                  // BLOCK, or fewer at the parameter's end
    int in_row;                  // elements that belong to the first of its rows
    const float *row;            // matrix: its row's divisors, old ones here, new ones `rows` further
    const float *old_column, *inverse_column;
    uint32_t* column_most;       // maxima of this step of the task's columns
};

// A block's new values until they are coded. `s` is what is coded of the second moment: roots over divisors, or v.
struct Work {
    alignas(64) float m[BLOCK], s[BLOCK];
    float m_inverse[GROUPS], s_inverse[GROUPS];
    uint32_t first_word;         // of the random bits for its codes
    uint32_t row_most[2];        // of its row, and of the next, where it has elements of that
    Block at;
};

// What is the same for all blocks of a parameter.
struct Step {
    Numbers numbers;
    Tables tables;
    Table book;
    Planes planes;
    Borders borders;
    uint32_t key, shift;
    int64_t rows;                // of a matrix
};

INLINE float widened(uint16_t bf16) { return as_float((int32_t)((uint32_t)bf16 << 16)); }
// A scale; an infinite one comes of a gradient whose square was too large, and makes the block NaN, so that it shows.
INLINE float scale_at(const uint8_t* scales, int i) {
    const float scale = KIND == BITS8 ? widened(load<uint16_t>(scales + 2 * i)) : load<float>(scales + 4 * i);
    return scale + (scale - scale);
}
// Store a scale, and return the span of codes divided by it. bf16 is rounded up, so that no ratio exceeds 1.
INLINE float put_scale(uint8_t* scales, int i, uint32_t most, float span) {
    uint32_t bits = most & 0x7fffffffu;
    if (KIND == BITS8) {
        if (bits <= 0x7f800000u) bits = (bits + 0xffff) & 0xffff0000u;
        store(scales + 2 * i, (uint16_t)(bits >> 16));
    } else {
        store(scales + 4 * i, bits);
    }
    const float scale = as_float((int32_t)bits);
    return scale >= SMALLEST_SCALE ? span / scale : 0.f;
}

// ---- FP8 with range expansion

INLINE Floats expanded_values(Words codes, const float* values) {
    return as_floats((Ints)gathered(values, (Ints)codes & 127) ^ ((Ints)codes & 128) << 24);
}

// How far the bits of a ratio are below those of 1 tells its cell, and a cell holds one border at most: the table has
// the code below it (cpu.py). So a code costs two look-ups and a comparison.
template <bool SECOND>
INLINE Four<Words> expanded_codes(const Four<Floats>& x, int power, const Four<Floats>& noise, const Tables& tables) {
    constexpr bool AT_RANDOM = SECOND && STOCHASTICALLY;
    const float *values = tables.expanded + 128 * power, *borders = tables.borders + 128 * power;
    const uint8_t* cells = (AT_RANDOM ? tables.cells_of_values : tables.cells_of_borders) + 1024 * power;
    const int shift = tables.shifts[power];
    Four<Floats> y, below, above;
    Four<Ints> cell, code;
    Four<Words> result;
    EACH y[i] = as_floats(magnitude(x[i]));
    EACH y[i] = y[i] == y[i] ? y[i] : Floats{};  // a NaN gets the lowest code
    EACH cell[i] = as_int(1.f) - (Ints)y[i];
    EACH cell[i] = (cell[i] & ~(cell[i] >> 31)) >> shift;
    EACH cell[i] = cell[i] > 1023 ? splat(1023) : cell[i];
    EACH code[i] = gathered(cells, cell[i]);
    if (AT_RANDOM) {
        EACH code[i] = code[i] - (y[i] >= gathered(values + 1, code[i]));
        EACH code[i] = code[i] > 126 ? splat(126) : code[i];
        EACH below[i] = gathered(values, code[i]);
        EACH above[i] = gathered(values + 1, code[i]);
        EACH code[i] = code[i] - (y[i] - below[i] > noise[i] * (above[i] - below[i]));
    } else {
        EACH code[i] = code[i] - (y[i] > gathered(borders, code[i]));
    }
    EACH code[i] = code[i] > 126 ? splat(126) : code[i];
    EACH code[i] = SECOND ? (code[i] < 1 ? splat(1) : code[i]) : code[i] | ((Ints)(x[i] < 0.f) & 128);
    EACH result[i] = (Words)code[i];
    return result;
}

// Zeros of a signed block have a code of their own; in an unsigned one they need the whole range below it.
template <bool SECOND> NOINLINE int expansion_power(const float* x, int length, uint32_t most, const Tables& tables) {
    Floats least = splat(INFINITE);
    for (int e = 0; e < BLOCK; e += LANES) {
        const Floats y = as_floats(magnitude(loaded(x + e)));
        const Ints ignored = SECOND ? (Ints)lanes() + e >= length : (Ints)(y == 0.f);
        least = ignored | (y >= least) ? least : y;
    }
    float smallest = INFINITE;
    for (int i = 0; i < LANES; i++) smallest = least[i] >= smallest ? smallest : least[i];
    const float range = as_float((int32_t)(most & 0x7fffffffu)) / smallest;
    Ints fit = {};
    for (int j = 16; j < 256; j += LANES) fit -= splat(range) <= loaded(tables.limits + j);
    int power = 15;
    for (int i = 0; i < LANES; i++) power += fit[i];
    return power > 16 ? power : 16;
}

// ---- coding

// The codes of four vectors in their lowest bits, unless they are four bits wide.
template <bool SECOND> INLINE Four<Words> codes_of(const Work& work, int e, const Step& step) {
    Four<Floats> x;
    Four<Words> code;
    EACH x[i] = loaded((SECOND ? work.s : work.m) + e + place(i)) *
        (SECOND ? work.s_inverse : work.m_inverse)[KIND == BITS8 ? (e + place(i)) / GROUP : 0];
    Four<Floats> noise = {};
    if (SECOND && STOCHASTICALLY) {
        const Words random[2] = {words(work.first_word, e), words(work.first_word, e + LANES)};
        EACH noise[i] = uniform(random[i & 1], i >= 2, KIND == FP8 ? 0.f : -.5f);
    }
    if (KIND == FP8) {
        const int power = *(SECOND ? work.at.s_power : work.at.m_power);
        code = expanded_codes<SECOND>(x, power, noise, step.tables);
    } else if (SECOND) {  // integers nearest to the root, or to a shifted one
        if (STOCHASTICALLY) EACH x[i] = x[i] + noise[i];
        EACH code[i] = (Words)(larger(x[i], splat(1.f)) + (TO_INTEGER - 1.f));
    } else if (FOUR_BITS) {
        Four<Words> cell;
        Four<Floats> border;
        EACH cell[i] = cell_of(x[i]);
        EACH border[i] = border_of(step.borders, x[i], cell[i]);
        EACH code[i] = (Words)((Ints)border[i] - (x[i] > border[i]));
    } else {  // integers, negative ones as well
        Four<Floats> y;
        EACH y[i] = x[i] * 254.f / (as_floats(magnitude(x[i])) + 1.f);
        EACH code[i] = (Words)(y[i] + 1.5f * TO_INTEGER);
    }
    return code;
}

// The codes of a quarter of each half of a block.
struct Codes {
    Words low[VECTORS], high[VECTORS];

    __attribute__((always_inline)) void add(const Four<Words>& codes, int at) {
        for (int i = 0; i < 2; i++) {
            low[at + i] = FOUR_BITS ? (codes[i] & 15u) + (codes[i + 2] << 4) : codes[i];
            high[at + i] = codes[i + 2];
        }
    }
    __attribute__((always_inline)) void put(uint8_t* codes, int j) const {
        store_bytes(codes + j, low);
        if (!FOUR_BITS) store_bytes(codes + HALF + j, high);
    }
};

// Step 3 of a block: scales, and what the values are multiplied by to make codes.
INLINE void put_scales(Work& work, const uint32_t* m_most, const uint32_t* s_most, const Step& step) {
    if (KIND == FP32) return;
    constexpr float span = KIND == BITS8 || KIND == FP8 ? 1.f : 15.f;
    for (int i = 0; i < SCALES; i++) {
        work.m_inverse[i] = put_scale(work.at.m_scale, i, m_most[i], span);
        if (ADAMW) work.s_inverse[i] = put_scale(work.at.s_scale, i, s_most[i], KIND == FP8 ? 1.f : LEVELS);
    }
    if (KIND != FP8) return;
    *work.at.m_power = (uint8_t)expansion_power<false>(work.m, work.at.length, m_most[0], step.tables);
    if (ADAMW) *work.at.s_power = (uint8_t)expansion_power<true>(work.s, work.at.length, s_most[0], step.tables);
}

// Step 4 of a block by itself.
NOINLINE void encode(const Work& work, const Step& step) {
    if (KIND == FP32) return;
    for (int j = 0; j < HALF; j += GROUP) {
        Codes m, s;
        for (int i = 0; i < VECTORS; i += 2) {
            m.add(codes_of<false>(work, j + i * LANES, step), i);
            if (ADAMW) s.add(codes_of<true>(work, j + i * LANES, step), i);
        }
        m.put(work.at.m_codes, j);
        if (ADAMW) s.put(work.at.s_codes, j);
    }
}

// ---- stepping

// What codes of a block are multiplied by.
struct Worth {
    float m_unit[GROUPS], s_unit[GROUPS], row_unit, next_row_unit, row_inverse, next_row_inverse;

    __attribute__((always_inline)) Worth(const Block& at, const Step& step, bool edge) {
        if (KIND == FP32) return;
        const Numbers& n = step.numbers;
        // In double precision and rounded once, as in Python.
        const float s_factor = KIND == FP8 ? n.beta2 : (float)((double)n.root_beta2 / (double)LEVELS);
        for (int i = 0; i < SCALES; i++) {
            m_unit[i] = scale_at(at.m_scale, i) * n.m_decay;
            if (ADAMW) s_unit[i] = scale_at(at.s_scale, i) * s_factor;
        }
        if (!MATRIX) return;
        row_unit = at.row[0] * s_unit[0], row_inverse = 1.f / at.row[step.rows];
        if (!edge || at.in_row >= at.length) return;
        next_row_unit = at.row[1] * s_unit[0], next_row_inverse = 1.f / at.row[step.rows + 1];
    }
};

// Largest magnitudes; NaNs may have a sign, which is cut off at the end.
struct Most { Words m, s, row, next_row; };

// What codes stand for, before they are multiplied by a unit.
template <bool SECOND> INLINE Four<Floats> decoded(const Block& at, int e, const Step& step) {
    const uint8_t* codes = (SECOND ? at.s_codes : at.m_codes) + e;
    Four<Floats> x = {};
    if (FOUR_BITS) return SECOND ? levels_of(codes) : looked_up(step.book, step.planes, codes);
    if (KIND == FP32) return x;
    Four<Words> code;
    EACH code[i] = widened(load<Bytes>(codes + place(i)));
    if (KIND == FP8) {
        const float* values = step.tables.expanded + 128 * *(SECOND ? at.s_power : at.m_power);
        EACH x[i] = expanded_values(code[i], values);
    } else if (SECOND) {
        EACH x[i] = floats((Ints)(code[i] + 1u));
    } else {
        EACH x[i] = floats((Ints)(code[i] << 24) >> 24);
        EACH x[i] = x[i] / (254.f - as_floats(magnitude(x[i])));
    }
    return x;
}

// Four vectors of a block on their way through steps 1 and 2. EDGE: blocks that are short or in two rows, and AdamW's
// rare L2 weight decay, whose branch would cost the others a tenth.
template <bool EDGE> struct Vectors {
    Work& work;
    const Worth& worth;
    const Step& step;
    const int e;
    Four<Floats> g, m, v, s, move;

    // New moments; the roots take long.
    __attribute__((always_inline)) void begin() {
        const Block& at = work.at;
        const Numbers& n = step.numbers;
        EACH g[i] = gradients(at.grad + e + place(i));
        if (!ADAMW || (EDGE && n.l2 != 0)) EACH g[i] = g[i] * n.coefficient;
        if ((!ADAMW || EDGE) && n.l2 != 0)
            EACH g[i] = g[i] + parameters(at.param + e + place(i), at.error, e + place(i)) * n.l2;
        if (ADAMW) {
            v = decoded<true>(at, e, step);
            if (KIND == FP32) EACH v[i] = loaded((const float*)at.s_codes + e + place(i)) * n.beta2;
            else EACH v[i] = v[i] * s_unit(e + place(i));
            if (FOUR_BITS || KIND == BITS8) EACH v[i] = v[i] * v[i];
            EACH s[i] = g[i] * n.gradient_to_root;
            EACH s[i] = s[i] * s[i];
            EACH v[i] = v[i] + s[i];
            EACH s[i] = root(v[i]);
        }
        m = decoded<false>(at, e, step);
        EACH m[i] = KIND == FP32 ? loaded((const float*)at.m_codes + e + place(i)) * n.m_decay
                                 : m[i] * worth.m_unit[KIND == BITS8 ? (e + place(i)) / GROUP : 0];
        EACH m[i] = m[i] + g[i] * n.gradient_to_m;
    }
    // What a level of the second moment is worth.
    __attribute__((always_inline)) Floats s_unit(int at) const {
        const Floats unit = splat(worth.s_unit[KIND == BITS8 ? at / GROUP : 0]);
        if (!MATRIX) return unit;
        Floats by_row = splat(worth.row_unit);
        if (EDGE) by_row = (Ints)lanes() + at < work.at.in_row ? by_row : splat(worth.next_row_unit);
        return smaller(by_row, loaded(work.at.old_column + at) * unit);
    }
    // The parameter's change, in which dividing takes long.
    __attribute__((always_inline)) void go_on() {
        const Numbers& n = step.numbers;
        if (ADAMW) {
            EACH move[i] = s[i] * n.root_to_denom;
            EACH move[i] = move[i] + n.denom_eps;
            EACH move[i] = m[i] / move[i];
        } else {
            EACH move[i] = m[i] * n.m_to_p;
            if (n.gradient_to_p != 0) EACH move[i] = move[i] + g[i] * n.gradient_to_p;
        }
    }
    // What is to be stored of the moments, and the largest of it.
    __attribute__((always_inline)) void keep(Most& low, Most& high) {
        if (MATRIX) divide(low, high);
        EACH {
            const Ints exists = (Ints)lanes() + (e + place(i)) < work.at.length;
            if (KIND == FP8) s[i] = v[i];
            if (EDGE && ADAMW) s[i] = exists ? s[i] : Floats{};
            if (EDGE && KIND != FP32) m[i] = exists ? m[i] : Floats{};
        }
        if (KIND == FP32) {
            EACH store((float*)work.at.m_codes + e + place(i), m[i]);
            if (ADAMW) EACH store((float*)work.at.s_codes + e + place(i), v[i]);
            return;
        }
        EACH store(work.m + e + place(i), m[i]);
        EACH (i < 2 ? low : high).m = larger((i < 2 ? low : high).m, (Words)magnitude(m[i]));
        if (!ADAMW) return;
        EACH store(work.s + e + place(i), s[i]);
        EACH (i < 2 ? low : high).s = larger((i < 2 ? low : high).s, (Words)s[i]);
    }
    // Row and column maxima of roots, and roots over the divisors.
    __attribute__((always_inline)) void divide(Most& low, Most& high) {
        const Block& at = work.at;
        EACH {
            const int o = e + place(i);
            const Ints in_row = (Ints)lanes() + o < at.in_row;
            Most& most = i < 2 ? low : high;
            if (EDGE) s[i] = (Ints)lanes() + o < at.length ? s[i] : Floats{};
            store(at.column_most + o, larger((Words)s[i], load<Words>(at.column_most + o)));
            Floats inverse = splat(worth.row_inverse);
            if (EDGE) inverse = in_row ? inverse : splat(worth.next_row_inverse);
            most.row = larger(most.row, EDGE ? (Words)s[i] & (Words)in_row : (Words)s[i]);
            if (EDGE) most.next_row = larger(most.next_row, (Words)s[i] & ~(Words)in_row);
            s[i] = s[i] * larger(inverse, loaded(at.inverse_column + o));
        }
    }
    // New parameters.
    __attribute__((always_inline)) void put(uint32_t first_word) const {
        const Block& at = work.at;
        Four<Floats> p;
        EACH p[i] = parameters(at.param + e + place(i), at.error, e + place(i));
        if (ADAMW) EACH p[i] = p[i] * step.numbers.decay;
        EACH p[i] = p[i] - move[i];
        write(at.param + e, p, first_word);
    }
    __attribute__((always_inline)) void write(float* to, const Four<Floats>& p, uint32_t) const {
        EACH store(to + place(i), p[i]);
    }
    __attribute__((always_inline)) void write(BFloat16* to, const Four<Floats>& p, uint32_t first_word) const {
        Four<Words> bits;
        Words random[2] = {};
        if (ROUNDING == STOCHASTIC) random[0] = words(first_word, e), random[1] = words(first_word, e + LANES);
        EACH bits[i] = rounded(p[i], work.at.error, e + place(i), random[i & 1]);
        store_high_halves(to, bits[0], bits[1]);
        store_high_halves(to + HALF, bits[2], bits[3]);
    }
};

// Steps 1 to 3 of one block, and step 4 of the one before it.
template <bool EDGE, bool BEFORE> INLINE void step_block(Work& work, const Work& before, const Step& step) {
    const Block& at = work.at;
    const Worth worth(at, step, EDGE);
    uint32_t m_most[GROUPS], s_most[GROUPS];
    Most low = {}, high = {};
    const uint32_t first = first_word(at.offset, step.key ^ PARAMETER_STREAM) + step.shift;
    work.first_word = first_word(at.offset, step.key) + step.shift;
    #pragma GCC unroll 2
    for (int j = 0; j < HALF; j += GROUP) {
        if (KIND == BITS8) low = high = Most{};
        Codes m, s;
        #pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i += 2) {
            const int k = j + i * LANES;
            Vectors<EDGE> vectors{work, worth, step, k, {}, {}, {}, {}, {}};
            vectors.begin();
            if (KIND != FP32 && BEFORE) m.add(codes_of<false>(before, k, step), i);
            vectors.go_on();
            vectors.keep(low, high);
            if (KIND != FP32 && BEFORE && ADAMW) s.add(codes_of<true>(before, k, step), i);
            vectors.put(first);
        }
        if (KIND != FP32 && BEFORE) {
            m.put(before.at.m_codes, j);
            if (ADAMW) s.put(before.at.s_codes, j);
        }
        if (KIND == BITS8) {
            m_most[j / GROUP] = largest(low.m), m_most[(j + HALF) / GROUP] = largest(high.m);
            if (ADAMW) s_most[j / GROUP] = largest(low.s), s_most[(j + HALF) / GROUP] = largest(high.s);
        }
    }
    if (KIND != BITS8) m_most[0] = largest(larger(low.m, high.m)), s_most[0] = largest(larger(low.s, high.s));
    if (MATRIX) work.row_most[0] = largest(larger(low.row, high.row)) & 0x7fffffffu;
    if (MATRIX && EDGE) work.row_most[1] = largest(larger(low.next_row, high.next_row)) & 0x7fffffffu;
    put_scales(work, m_most, s_most, step);
}
NOINLINE void step_edge(Work& work, const Work& before, const Step& step) { step_block<true, true>(work, before, step); }
NOINLINE void step_whole(Work& work, const Work& before, const Step& step) { step_block<false, true>(work, before, step); }

// ---- blocks of a parameter

INLINE void place(Block& at, const Item& item, int64_t block) {
    const int64_t o = block * BLOCK, codes = FOUR_BITS ? block * HALF : KIND == FP32 ? o * 4 : o;
    const int64_t scales = KIND == BITS8 ? block * GROUPS * 2 : block * 4;
    at.param = item.param + o, at.grad = item.grad + o, at.error = item.error + o * ERROR_BYTES;
    at.m_codes = item.exp_avg[0] + codes, at.s_codes = item.exp_avg_sq[0] + codes;
    at.m_scale = item.exp_avg[1] + scales, at.s_scale = item.exp_avg_sq[1] + scales;
    at.m_power = item.exp_avg[2] + block, at.s_power = item.exp_avg_sq[2] + block;
    at.offset = (uint64_t)o, at.length = (int)least_of(BLOCK, item.numel - o), at.in_row = at.length;
}

void prefetch(const Item& item, int64_t block) {
    const int64_t o = block * BLOCK, codes = FOUR_BITS ? HALF : KIND == FP32 ? 4 * BLOCK : BLOCK;
    for (int i = 0; i < BLOCK; i += 64 / (int)sizeof(Param)) {
        __builtin_prefetch(item.param + o + i, 1);
        __builtin_prefetch(item.grad + o + i, 0);
    }
    for (int i = 0; i < codes; i += 64) {
        __builtin_prefetch(item.exp_avg[0] + block * codes + i, 1);
        if (ADAMW) __builtin_prefetch(item.exp_avg_sq[0] + block * codes + i, 1);
    }
}

// The last block of a parameter, shorter than the others, in a place of its own.
struct Short {
    alignas(64) Param param[BLOCK] = {}, grad[BLOCK] = {};
    alignas(64) uint8_t error[2 * BLOCK] = {}, m_codes[4 * BLOCK] = {}, s_codes[4 * BLOCK] = {};
    uint8_t m_scale[4 * GROUPS] = {}, s_scale[4 * GROUPS] = {};

    static void copy(bool back, void* here, void* there, size_t bytes) {
        if (bytes) back ? memcpy(there, here, bytes) : memcpy(here, there, bytes);
    }
    void copy_all(const Block& at, bool back) {
        const size_t n = (size_t)at.length, codes = FOUR_BITS ? (n < HALF ? n : HALF) : KIND == FP32 ? 4 * n : n;
        const size_t scales = KIND == FP32 ? 0 : KIND == BITS8 ? (n + GROUP - 1) / GROUP * 2 : 4;
        copy(back, param, at.param, n * sizeof(Param));
        copy(back, error, at.error, n * ERROR_BYTES);
        copy(back, m_codes, at.m_codes, codes);
        copy(back, m_scale, at.m_scale, scales);
        if (ADAMW) copy(back, s_codes, at.s_codes, codes), copy(back, s_scale, at.s_scale, scales);
    }
    void stand_in_for(Block& at) {
        copy_all(at, false);
        memcpy(grad, at.grad, (size_t)at.length * sizeof(Param));
        at.param = param, at.grad = grad, at.error = error;
        at.m_codes = m_codes, at.s_codes = s_codes, at.m_scale = m_scale, at.s_scale = s_scale;
    }
    void finish(const Block& at) {
        if (FOUR_BITS)  // elements that there are not have code 0
            for (int i = at.length < HALF ? 0 : at.length - HALF; i < HALF; i++) m_codes[i] &= 15;
        copy_all(at, true);
    }
};

// Steps block after block; each waits, stepped, to be coded beside the next.
struct Line {
    Work works[2] = {};
    alignas(64) uint8_t nowhere[BLOCK] = {};
    int now = 0;
    const Step& step;

    explicit Line(const Step& step) : step(step) { drop(); }
    // Let the codes of what waits go nowhere.
    void drop() {
        Block& at = works[1 - now].at;
        at.m_codes = at.s_codes = at.m_power = at.s_power = nowhere;
    }
    void finish() { encode(works[1 - now], step), drop(); }
    // The place of the next block: it is made there, as copying it would wait for the stores.
    Block& next() { return works[now].at; }
    // Step the next block, and return it with what was found out about it.
    const Work& add() {
        Work &work = works[now], &before = works[1 - now];
        if (work.at.length < BLOCK) {
            Short own;
            const Block at = work.at;
            own.stand_in_for(work.at);
            step_edge(work, before, step);
            encode(work, step), drop();
            own.finish(at);
            return work;
        }
        const bool edge = work.at.in_row < BLOCK || (ADAMW && step.numbers.l2 != 0);
        edge ? step_edge(work, before, step) : step_whole(work, before, step);
        now = 1 - now;
        return work;
    }
};

// ---- matrices

INLINE void raise_to(uint32_t* at, uint32_t most) {
    uint32_t now = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (most > now && !__atomic_compare_exchange_n(at, &now, most, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

// Blocks first to last - 1 of a parameter, or those that start in these rows of a matrix, from a column on.
struct Task {
    int64_t item, first, last, column;
    uint32_t head, tail;  // maxima of its first row, and of the row after its last, into which its last block may reach
};

// How a matrix is cut into tasks, and the maxima that they gather: of bits of floats, so that a NaN is the largest.
struct Matrix {
    const Item* item;
    Task* tasks;
    int64_t rows, columns, width, num_tasks, unfinished;
    uint32_t *column_most, *row_most;

    // Where rows are not cut, there may be many. Then a row's maximum replaces what the step has divided by, which is
    // needed no more, and only the first row of a task, which the task before may need, has to wait.
    bool is_whole() const { return width == columns; }

    // A matrix holds memory from its first task to its last, and not for the whole call.
    void open() {
        #pragma omp critical(packlight_matrix)
        if (!column_most) {
            column_most = new uint32_t[columns + (is_whole() ? 0 : rows)]();
            row_most = is_whole() ? (uint32_t*)item->rows : column_most + columns;
        }
    }
    void put_row(Task& task, int64_t row, uint32_t most) {
        if (!is_whole()) raise_to(row_most + row, most);
        else if (row == task.first) task.head = most;
        else row_most[row] = most;
    }
    void close() {
        if (__atomic_sub_fetch(&unfinished, 1, __ATOMIC_ACQ_REL)) return;
        uint32_t tail = 0;
        for (int64_t i = 0; is_whole() && i < num_tasks; tail = tasks[i++].tail)
            row_most[tasks[i].first] = tail > tasks[i].head ? tail : tasks[i].head;
        if (item->deferred) {
            memmove(item->rows, row_most, (size_t)rows * 4);
            memcpy(item->cols, column_most, (size_t)columns * 4);
        } else {
            rotate(item->rows, row_most, rows, UNKNOWN_ROW);
            rotate(item->cols, column_most, columns, UNKNOWN_COLUMN);
        }
        delete[] column_most;
    }
    // `most` may be where `maxima` are.
    static void rotate(float* maxima, const uint32_t* most, int64_t n, float unknown) {
        auto found = [&](int64_t i) { return as_float((int32_t)most[i]); };
        auto usable = [](float x) { return x >= SMALLEST_MAXIMUM && x <= LARGEST_MAXIMUM; };
        float least = 0;
        for (int64_t i = 0; i < n; i++)
            if (usable(found(i)) && found(i) / MAXIMA_RANGE > least) least = found(i) / MAXIMA_RANGE;
        for (int64_t i = 0; i < n; i++) {
            const float now = found(i), used = maxima[n + i], next = !usable(now) ? unknown : now > least ? now : least;
            maxima[i] = used;
            maxima[n + i] = next > used * MAXIMA_SLACK || used > next * MAXIMA_SLACK ? next : used;
        }
    }
};

// The columns of a task. Its last block may reach beyond them, and beyond the row's end.
struct Columns {
    float old[STRIP_COLUMNS + BLOCK + LANES], inverse[STRIP_COLUMNS + BLOCK + LANES];
    uint32_t most[STRIP_COLUMNS + BLOCK + LANES];
    int64_t count = 0;

    void enter(const Matrix& matrix, int64_t first) {
        const float* divisors = matrix.item->cols;
        count = least_of(matrix.width, matrix.columns - first) + BLOCK;
        for_runs(matrix.columns, first, [&](int64_t i, int64_t j, int64_t n) {
            memcpy(old + i, divisors + j, (size_t)n * 4);
            memcpy(inverse + i, divisors + matrix.columns + j, (size_t)n * 4);
        });
        for (int64_t i = 0; i < count; i += LANES) store(inverse + i, 1.f / loaded(inverse + i));
        memset(most, 0, (size_t)(count + LANES) * 4);
    }
    void leave(const Matrix& matrix, int64_t first) const {
        for_runs(matrix.columns, first, [&](int64_t i, int64_t j, int64_t n) {
            for (int64_t k = 0; k < n; k += LANES) {
                const int64_t end = least_of(n, k + LANES);
                if (end - k == LANES && !any_above(most + i + k, matrix.column_most + j + k)) continue;
                for (int64_t l = k; l < end; l++) raise_to(matrix.column_most + j + l, most[i + l] & 0x7fffffffu);
            }
        });
    }
    // Another thread may raise the second ones meanwhile, and raise_to looks again.
    static bool any_above(const uint32_t* a, const uint32_t* b) {
        const Words x = load<Words>(a) & 0x7fffffffu, y = load<Words>(b);
        return largest((Words)(x > y)) != 0;
    }
    // Calls f(place here, column, how many) for columns from `first` on, which begin again beyond the last.
    template <class F> void for_runs(int64_t columns, int64_t first, const F& f) const {
        const int64_t n = least_of(count, columns - first);
        f(0, first, n);
        if (count > n) f(n, 0, count - n);
    }
};

// ---- tasks

// Calls f(block, a later block) on first to last - 1; the later ones go on at `then`, where last is.
template <class F> INLINE void each_block(int64_t first, int64_t last, int64_t then, const F& f) {
    for (int64_t b = first; b < last; b++) {
        const int64_t later = b + PREFETCH_BLOCKS;
        f(b, later < last ? later : then + (later - last));
    }
}

void run_blocks(const Item& item, const Task& task, Line& line) {
    each_block(task.first, task.last, task.last, [&](int64_t b, int64_t later) {
        prefetch(item, later);
        place(line.next(), item, b);
        line.add();
    });
    line.finish();
}

void run_rows(Matrix& matrix, Task& task, Line& line, Columns& columns) {
    const Item& item = *matrix.item;
    const int64_t end = least_of(task.column + matrix.width, matrix.columns);
    auto start = [&](int64_t row, int64_t column) {  // the first block that starts there or later
        return (least_of(row * matrix.columns + column, item.numel) + BLOCK - 1) / BLOCK;
    };
    matrix.open();
    columns.enter(matrix, task.column);
    uint32_t reached = 0;  // maximum of what the last block has in the next row
    for (int64_t row = task.first; row < task.last; row++) {
        uint32_t most = reached;
        reached = 0;
        each_block(start(row, task.column), start(row, end), start(row + 1, task.column), [&](int64_t b, int64_t later) {
            prefetch(item, later);
            Block& at = line.next();
            place(at, item, b);
            const int64_t column = b * BLOCK - row * matrix.columns, i = column - task.column;
            at.in_row = (int)least_of(BLOCK, matrix.columns - column), at.row = item.rows + row;
            at.old_column = columns.old + i, at.inverse_column = columns.inverse + i;
            at.column_most = columns.most + i;
            const bool reaches = at.in_row < BLOCK;
            const Work& work = line.add();
            if (work.row_most[0] > most) most = work.row_most[0];
            if (reaches) reached = work.row_most[1];
        });
        matrix.put_row(task, row, most);
    }
    line.finish();
    task.tail = reached;
    if (!matrix.is_whole() && task.last < matrix.rows) raise_to(matrix.row_most + task.last, reached);
    columns.leave(matrix, task.column);
    matrix.close();
}

// Cut a parameter into tasks.
Matrix cut(const Item* items, int64_t i, std::vector<Task>& tasks) {
    const int64_t numel = items[i].numel, blocks = (numel + BLOCK - 1) / BLOCK;
    if (!MATRIX) {
        for (int64_t b = 0; b < blocks; b += TASK_BLOCKS)
            tasks.push_back({i, b, least_of(blocks, b + TASK_BLOCKS), 0, 0, 0});
        return {};
    }
    const int64_t columns = items[i].columns, rows = numel / columns, before = (int64_t)tasks.size();
    const int64_t strips = (columns + STRIP_COLUMNS - 1) / STRIP_COLUMNS;
    const int64_t width = strips == 1 ? columns : ((columns + strips - 1) / strips + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t wanted = least_of(MATRIX_TASK_BLOCKS, blocks / MATRIX_TASKS);
    const int64_t height = ((wanted > TASK_BLOCKS ? wanted : TASK_BLOCKS) * BLOCK + width - 1) / width;
    for (int64_t row = 0; row < rows; row += height)
        for (int64_t column = 0; column < columns; column += width)
            tasks.push_back({i, row, least_of(rows, row + height), column, 0, 0});
    const int64_t num_tasks = (int64_t)tasks.size() - before;
    return {items + i, nullptr, rows, columns, width, num_tasks, num_tasks, nullptr, nullptr};
}

}  // namespace

extern "C" {

void packlight_step(const Item* items, int64_t num_items, const float* numbers, const Tables* tables, int threads) {
    std::vector<Task> tasks;
    std::vector<Matrix> matrices;
    for (int64_t i = 0; i < num_items; i++) matrices.push_back(cut(items, i, tasks));
    Task* first = tasks.data();
    for (Matrix& matrix : matrices) matrix.tasks = first, first += matrix.num_tasks;
    Step common{{}, *tables, table_of(tables->values), planes_of(tables->values), borders_of(tables->cells), 0, 0, 0};
    memcpy(&common.numbers, numbers, sizeof common.numbers);
    const int64_t num_tasks = (int64_t)tasks.size();
    #pragma omp parallel num_threads(threads)
    {
        Step step = common;
        Line line(step);
        Columns columns;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < num_tasks; t++) {
            Task& task = tasks[(size_t)t];
            const Item& item = items[task.item];
            Matrix& matrix = matrices[(size_t)task.item];
            step.key = item.key, step.shift = item.shift, step.rows = matrix.rows;
            if (MATRIX) run_rows(matrix, task, line, columns);
            else run_blocks(item, task, line);
        }
    }
}

void packlight_count(float* const* counters, int64_t num_counters, float amount) {
    for (int64_t i = 0; i < num_counters; i++) *counters[i] += amount;
}

}  // extern "C"
