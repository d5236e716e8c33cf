// The optimiser steps on compactly stored moments, for the CPU.
//
// The same fp32 operations in the same order as reference.py, block by block of 128 elements, with a block's
// numbers in registers and the first-level cache: parameters, gradients and codes are read once and written once, and
// nothing as large as a parameter is allocated.
//
//   step(items)  ->  tasks of some blocks, handed out to threads
//     task  ->  for each block:  1 load gradient, codes   2 new moments, new parameter   3 scales   4 new codes
//     matrix format, besides:    5 maxima of the rows and columns of the task into the parameter's
//   last task of a matrix  ->  maxima of this step become the divisors of the next
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
// Of a matrix, a task has so many columns at most: their maxima and divisors stay in the first-level cache.
constexpr int64_t STRIP_COLUMNS = 2048;
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
    int64_t numel, columns, key, spare[2];
};

struct Tables {
    const float* values;     // of the 4-bit first moment, 16
    const int32_t* cells;    // their borders, 32
    const float* expanded;   // FP8: (256, 128)
    const float* borders;    // FP8: (256, 128)
    const float* limits;     // FP8: (256)
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
INLINE Floats floor(Floats x) {
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
INLINE Words widened(Bytes x) { return (Words)_mm512_cvtepu8_epi32((__m128i)x); }
INLINE Words widened(Shorts x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE Bytes lowest_bytes(Words x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
INLINE Shorts low_halves(Words x) { return (Shorts)_mm512_cvtepi32_epi16((__m512i)x); }
INLINE Floats gathered(const float* table, Ints index) {
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
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
INLINE Floats floor(Floats x) { return (Floats)_mm256_floor_ps((__m256)x); }
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
INLINE Floats floor(Floats x) {
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = __builtin_floorf(x[i]);
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

struct Table { Floats part[16 / LANES]; };

INLINE Table table_of(const float* values, float factor) {
    Table table;
    for (int i = 0; i < 16 / LANES; i++) table.part[i] = loaded(values + i * LANES) * factor;
    return table;
}

#if WIDTH == 32
INLINE Floats of_8(Floats table, Words index) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
// b where the highest bit is set, a elsewhere.
INLINE Floats chosen(Floats a, Floats b, Words highest) {
    return (Floats)_mm256_blendv_ps((__m256)a, (__m256)b, (__m256)highest);
}
#endif

// By the low or the high four bits of bytes.
template <bool HIGH> INLINE Floats looked_up(const Table& table, Words bytes) {
    const Words index = HIGH ? bytes >> 4 : bytes;
#if WIDTH == 64
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table.part[0]);
#elif WIDTH == 32
    return chosen(of_8(table.part[0], index), of_8(table.part[1], index), bytes << (HIGH ? 24 : 28));
#else
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = ((const float*)&table)[index[i] & 15];
    return y;
#endif
}

// Where the 15 borders between codes are; a border has the code below it in its own lowest bits (books.py).
#if WIDTH == 32
// A parabola puts each border of a sign into a cell of its own, of eight, as an instruction's table has eight cells.
struct Borders { Floats positive, negative; };

INLINE Words cell_of(Floats x) {
    const Floats y = as_floats(magnitude(x));
    return (Words)(y * (.795f - y * .02f) + TO_INTEGER);
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
INLINE Floats border_beside(const Borders& borders, Floats x) {
    const Words cell = cell_of(x);
    return chosen(of_8(borders.positive, cell), of_8(borders.negative, cell), (Words)x);
}
#else
struct Borders { const int32_t* cells; };

INLINE Borders borders_of(const int32_t* cells) { return {cells}; }
INLINE Floats border_beside(const Borders& borders, Floats x) {
    const Ints cell = (Ints)(x + (TO_INTEGER + 15.f));
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

INLINE Words words(uint64_t offset, uint32_t key) {
    const uint32_t first = (uint32_t)offset * MULTIPLIER_1 + (uint32_t)(offset >> 32) * WEYL + key;
    const Words x = lanes() * MULTIPLIER_1 + first;
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
    uint32_t row_most[2];        // of its row, and of the next, where it has elements of that
    Block at;
};

// What is the same for all blocks of a parameter.
struct Step {
    Numbers numbers;
    Tables tables;
    Borders borders;
    uint32_t key;
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

// A code is guessed through logarithms, and settled by the exact borders beside it.
INLINE Ints guessed_code(Floats ratio, float power) {
    const Ints bits = (Ints)ratio;
    const Floats x = as_floats((bits & 0x7fffff) | 0x3f800000);
    Floats log2 = (((-0.08001088f * x + 0.63551112f) * x - 2.09940228f) * x + 4.04961689f) * x - 2.50561466f;
    log2 = (floats((bits >> 23) - 127) + log2) * power + 8.807355f;  // of 448 ratio^k
    log2 = larger(log2, splat(-20.f));
    const Floats whole = floor(log2), rest = log2 - whole;
    const Floats exp2 = ((0.0790857f * rest + 0.22451634f) * rest + 0.69639055f) * rest + 0.99989669f;
    const Floats y = as_floats((__builtin_convertvector(whole, Ints) + 127) << 23) * exp2;
    const Ints normal = (((Ints)y + 0x80000) >> 20) - (120 << 3);                   // three bits of mantissa
    const Ints subnormal = __builtin_convertvector(y * 512.f + 0.5f, Ints);         // steps of 2^-9
    const Ints code = y < 0.015625f ? subnormal : normal;
    return code > 126 ? splat(126) : code < 0 ? Ints{} : code;
}

template <bool SECOND> INLINE Words expanded_codes(Floats ratio, int power, Floats random, const Tables& tables) {
    constexpr int lowest = SECOND ? 1 : 0;
    const float *values = tables.expanded + 128 * power, *borders = tables.borders + 128 * power;
    Floats y = as_floats(magnitude(ratio));
    y = y == y ? y : Floats{};  // a NaN gets the lowest code
    Ints code = guessed_code(y, (float)power / 16.f);
    if (SECOND && STOCHASTICALLY) {
        code = code + (y < gathered(values, code));
        code = code > 0 ? code : Ints{};
        const Ints next = code < 126 ? code + 1 : code;
        code = (y >= gathered(values, next)) & (next > code) ? next : code;
        const Floats below = gathered(values, code), above = gathered(values, code < 126 ? code + 1 : code);
        code = code - (y - below > random * (above - below));
    } else {
        const Ints under = code > 0 ? code - 1 : Ints{};
        code = code - (y > gathered(borders, code)) + ((y <= gathered(borders, under)) & (code > 0));
    }
    code = code > 126 ? splat(126) : code < lowest ? splat(lowest) : code;
    return (Words)(SECOND ? code : code | ((ratio < 0.f) & 128));
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

// Levels in the lowest bits, nearest to or below a random shift of what comes.
INLINE Words root_codes(Floats levels, Words random, bool second_half) {
    if (STOCHASTICALLY) levels = levels + uniform(random, second_half, -.5f);
    return (Words)(larger(levels, splat(1.f)) + (TO_INTEGER - 1.f));
}

INLINE Words signed_codes(Floats x, const Borders& borders) {
    const Floats border = border_beside(borders, x);
    return (Words)((Ints)border - (x > border));
}

// The codes of a vector in their lowest bits, unless they are four bits wide.
template <bool SECOND> INLINE Words codes_of(const Work& work, int e, Words random, const Step& step) {
    const int group = KIND == BITS8 ? e / GROUP : 0;
    const Floats ratio = loaded((SECOND ? work.s : work.m) + e) * (SECOND ? work.s_inverse : work.m_inverse)[group];
    if (KIND == FP8) {
        const Floats share = SECOND && STOCHASTICALLY ? uniform(random, e >= HALF, 0.f) : Floats{};
        return expanded_codes<SECOND>(ratio, *(SECOND ? work.at.s_power : work.at.m_power), share, step.tables);
    }
    if (SECOND) return root_codes(ratio, random, e >= HALF);
    if (FOUR_BITS) return signed_codes(ratio, step.borders);
    // An integer in the lowest bits, a negative one as well.
    return (Words)(ratio * 254.f / (as_floats(magnitude(ratio)) + 1.f) + 1.5f * TO_INTEGER);
}

// The codes of vector i of both halves of a quarter of a block.
struct Codes {
    Words low[VECTORS], high[VECTORS];

    template <bool SECOND> __attribute__((always_inline)) void make(const Work& work, int j, int i, const Step& step) {
        const int k = j + i * LANES;
        Words random = {};
        if (SECOND && STOCHASTICALLY) random = words(work.at.offset + k, step.key);
        const Words first = codes_of<SECOND>(work, k, random, step);
        const Words second = codes_of<SECOND>(work, k + HALF, random, step);
        low[i] = FOUR_BITS ? (first & 15u) + (second << 4) : first, high[i] = second;
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
        for (int i = 0; i < VECTORS; i++) {
            m.make<false>(work, j, i, step);
            if (ADAMW) s.make<true>(work, j, i, step);
        }
        m.put(work.at.m_codes, j);
        if (ADAMW) s.put(work.at.s_codes, j);
    }
}

// ---- stepping

// What codes of a block are worth: values of the first moment, decayed; of the second v, or what a level is worth.
struct Worth {
    Table m, v;
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
        if (FOUR_BITS) m = table_of(step.tables.values, m_unit[0]);
        if (KIND == BITS4 && ADAMW) {
            static constexpr float counts[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
            v = table_of(counts, s_unit[0]);
            for (Floats& part : v.part) part = part * part;
        }
        if (!MATRIX) return;
        row_unit = at.row[0] * s_unit[0], row_inverse = 1.f / at.row[step.rows];
        if (!edge || at.in_row >= at.length) return;
        next_row_unit = at.row[1] * s_unit[0], next_row_inverse = 1.f / at.row[step.rows + 1];
    }
};

// Largest magnitudes; NaNs may have a sign, which is cut off at the end.
struct Most { Words m, s, row, next_row; };

// Steps 1 and 2 of the vector at e. EDGE: blocks that are short or in two rows, and AdamW's rare L2 weight decay, whose
// branch would cost the others a tenth.
template <bool EDGE>
INLINE Floats step_vector(Work& work, int e, Words m_bytes, Words s_bytes, const Worth& worth, const Step& step, Most& most) {
    const Block& at = work.at;
    const Numbers& n = step.numbers;
    const int group = KIND == BITS8 ? e / GROUP : 0;
    const Ints exists = EDGE ? (Ints)lanes() + e < at.length : Ints{};
    const Ints in_row = EDGE ? (Ints)lanes() + e < at.in_row : Ints{};
    Floats p = parameters(at.param + e, at.error, e), g = gradients(at.grad + e), m;
    if (!ADAMW || (EDGE && n.l2 != 0)) g = g * n.coefficient;
    if ((!ADAMW || EDGE) && n.l2 != 0) g = g + p * n.l2;
    if (FOUR_BITS) m = e < HALF ? looked_up<false>(worth.m, m_bytes) : looked_up<true>(worth.m, m_bytes);
    if (KIND == FP32) m = loaded((const float*)at.m_codes + e) * n.m_decay;
    if (KIND == BITS8) {
        const Floats level = floats((Ints)(m_bytes << 24) >> 24);
        m = level / (254.f - as_floats(magnitude(level))) * worth.m_unit[group];
    }
    if (KIND == FP8) m = expanded_values(m_bytes, step.tables.expanded + 128 * *at.m_power) * worth.m_unit[0];
    m = m + g * n.gradient_to_m;
    if (ADAMW) {
        const Floats gs = g * n.gradient_to_root;
        Floats old, unit;
        if (KIND == FP32) old = loaded((const float*)at.s_codes + e) * n.beta2;
        if (KIND == FP8) old = expanded_values(s_bytes, step.tables.expanded + 128 * *at.s_power) * worth.s_unit[0];
        if (KIND == BITS4) old = e < HALF ? looked_up<false>(worth.v, s_bytes) : looked_up<true>(worth.v, s_bytes);
        if (KIND == BITS4_MATRIX) {
            Floats by_row = splat(worth.row_unit);
            if (EDGE) by_row = in_row ? by_row : splat(worth.next_row_unit);
            unit = smaller(by_row, loaded(at.old_column + e) * worth.s_unit[0]);
        }
        if (KIND == BITS8) unit = splat(worth.s_unit[group]);
        if (KIND == BITS4_MATRIX || KIND == BITS8) {
            const Words code = KIND == BITS8 ? s_bytes : e < HALF ? s_bytes & 15u : s_bytes >> 4;
            old = floats((Ints)(code + 1u)) * unit;
            old = old * old;
        }
        const Floats v = old + gs * gs;
        Floats s = root(v);
        p = p * n.decay - m / (s * n.root_to_denom + n.denom_eps);
        if (EDGE) s = exists ? s : Floats{};
        if (MATRIX) {
            store(at.column_most + e, larger((Words)s, load<Words>(at.column_most + e)));
            Floats inverse = splat(worth.row_inverse);
            if (EDGE) {
                inverse = in_row ? inverse : splat(worth.next_row_inverse);
                most.row = larger(most.row, (Words)s & (Words)in_row);
                most.next_row = larger(most.next_row, (Words)s & ~(Words)in_row);
            } else {
                most.row = larger(most.row, (Words)s);
            }
            s = s * larger(inverse, loaded(at.inverse_column + e));
        }
        if (KIND == FP8) s = EDGE ? (exists ? v : Floats{}) : v;
        if (KIND == FP32) {
            store((float*)at.s_codes + e, v);
        } else {
            most.s = larger(most.s, (Words)s);
            store(work.s + e, s);
        }
    } else {
        Floats move = m * n.m_to_p;
        if (n.gradient_to_p != 0) move = move + g * n.gradient_to_p;
        p = p - move;
    }
    if (KIND == FP32) {
        store((float*)at.m_codes + e, m);
    } else {
        if (EDGE) m = exists ? m : Floats{};
        most.m = larger(most.m, (Words)magnitude(m));
        store(work.m + e, m);
    }
    return p;
}

INLINE void put(float* at, Floats a, Floats b, const Block&, int, Words, Words) { store(at, a), store(at + LANES, b); }
INLINE void put(BFloat16* at, Floats a, Floats b, const Block& block, int e, Words random_a, Words random_b) {
    const Words first = rounded(a, block.error, e, random_a);
    store_high_halves(at, first, rounded(b, block.error, e + LANES, random_b));
}

// Steps 1 to 3 of one block, and step 4 of the one before it.
template <bool EDGE, bool BEFORE> INLINE void step_block(Work& work, const Work& before, const Step& step) {
    const Block& at = work.at;
    const Worth worth(at, step, EDGE);
    uint32_t m_most[GROUPS], s_most[GROUPS];
    Most low = {}, high = {};
    #pragma GCC unroll 1
    for (int j = 0; j < HALF; j += GROUP) {
        if (KIND == BITS8) low = high = Most{};
        Codes m, s;
        #pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i += 2) {
            Floats p[4];
            Words random[2] = {};
            #pragma GCC unroll 2
            for (int next = 0; next < 2; next++) {
                const int k = j + (i + next) * LANES;
                Words m_low = {}, m_high = {}, s_low = {}, s_high = {};
                if (KIND != FP32) {
                    m_low = widened(load<Bytes>(at.m_codes + k));
                    m_high = FOUR_BITS ? m_low : widened(load<Bytes>(at.m_codes + k + HALF));
                    if (ADAMW) s_low = widened(load<Bytes>(at.s_codes + k));
                    if (ADAMW) s_high = FOUR_BITS ? s_low : widened(load<Bytes>(at.s_codes + k + HALF));
                }
                p[next] = step_vector<EDGE>(work, k, m_low, s_low, worth, step, low);
                p[2 + next] = step_vector<EDGE>(work, k + HALF, m_high, s_high, worth, step, high);
                if (PACKLIGHT_BF16 && ROUNDING == STOCHASTIC) random[next] = words(at.offset + k, step.key ^ PARAMETER_STREAM);
                if (KIND != FP32 && BEFORE) {
                    m.make<false>(before, j, i + next, step);
                    if (ADAMW) s.make<true>(before, j, i + next, step);
                }
            }
            const int k = j + i * LANES;
            put(at.param + k, p[0], p[1], at, k, random[0], random[1]);
            put(at.param + k + HALF, p[2], p[3], at, k + HALF, random[0], random[1]);
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

Block block_at(const Item& item, int64_t block) {
    Block at{};
    const int64_t o = block * BLOCK, codes = FOUR_BITS ? block * HALF : KIND == FP32 ? o * 4 : o;
    const int64_t scales = KIND == BITS8 ? block * GROUPS * 2 : block * 4;
    at.param = item.param + o, at.grad = item.grad + o, at.error = item.error + o * ERROR_BYTES;
    at.m_codes = item.exp_avg[0] + codes, at.s_codes = item.exp_avg_sq[0] + codes;
    at.m_scale = item.exp_avg[1] + scales, at.s_scale = item.exp_avg_sq[1] + scales;
    at.m_power = item.exp_avg[2] + block, at.s_power = item.exp_avg_sq[2] + block;
    at.offset = (uint64_t)o, at.length = (int)least_of(BLOCK, item.numel - o), at.in_row = at.length;
    return at;
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
    Block block(const Block& at) {
        copy_all(at, false);
        memcpy(grad, at.grad, (size_t)at.length * sizeof(Param));
        Block own = at;
        own.param = param, own.grad = grad, own.error = error;
        own.m_codes = m_codes, own.s_codes = s_codes, own.m_scale = m_scale, own.s_scale = s_scale;
        return own;
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
    // Step a block, and return it with what was found out about it.
    const Work& add(const Block& at) {
        Work &work = works[now], &before = works[1 - now];
        if (at.length < BLOCK) {
            Short own;
            work.at = own.block(at);
            step_edge(work, before, step);
            encode(work, step), drop();
            own.finish(at);
            return work;
        }
        work.at = at;
        const bool edge = at.in_row < BLOCK || (ADAMW && step.numbers.l2 != 0);
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
        rotate(item->rows, row_most, rows, UNKNOWN_ROW);
        rotate(item->cols, column_most, columns, UNKNOWN_COLUMN);
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
    float old[STRIP_COLUMNS + BLOCK], inverse[STRIP_COLUMNS + BLOCK];
    uint32_t most[STRIP_COLUMNS + BLOCK];
    int64_t count = 0;

    void enter(const Matrix& matrix, int64_t first) {
        const float* divisors = matrix.item->cols;
        count = least_of(matrix.width, matrix.columns - first) + BLOCK;
        for (int64_t i = 0, j = first; i < count; i++, j = j + 1 == matrix.columns ? 0 : j + 1)
            old[i] = divisors[j], inverse[i] = divisors[matrix.columns + j];
        for (int64_t i = 0; i < count; i += LANES) store(inverse + i, 1.f / loaded(inverse + i));
        memset(most, 0, (size_t)count * 4);
    }
    void leave(const Matrix& matrix, int64_t first) const {
        for (int64_t i = 0, j = first; i < count; i++, j = j + 1 == matrix.columns ? 0 : j + 1)
            raise_to(matrix.column_most + j, most[i] & 0x7fffffffu);
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
        line.add(block_at(item, b));
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
            Block at = block_at(item, b);
            const int64_t column = b * BLOCK - row * matrix.columns, i = column - task.column;
            at.in_row = (int)least_of(BLOCK, matrix.columns - column), at.row = item.rows + row;
            at.old_column = columns.old + i, at.inverse_column = columns.inverse + i;
            at.column_most = columns.most + i;
            const Work& work = line.add(at);
            if (work.row_most[0] > most) most = work.row_most[0];
            if (at.in_row < BLOCK) reached = work.row_most[1];
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
        for (int64_t b = 0; b < blocks; b += TASK_BLOCKS) tasks.push_back({i, b, least_of(blocks, b + TASK_BLOCKS), 0, 0, 0});
        return {};
    }
    const int64_t columns = items[i].columns, rows = numel / columns, before = (int64_t)tasks.size();
    const int64_t strips = (columns + STRIP_COLUMNS - 1) / STRIP_COLUMNS;
    const int64_t width = strips == 1 ? columns : ((columns + strips - 1) / strips + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t height = (TASK_BLOCKS * BLOCK + width - 1) / width;
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
    Step common{{}, *tables, borders_of(tables->cells), 0, 0};
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
            step.key = (uint32_t)item.key, step.rows = matrix.rows;
            if (MATRIX) run_rows(matrix, task, line, columns);
            else run_blocks(item, task, line);
        }
    }
}

void packlight_count(float* const* counters, int64_t num_counters, float amount) {
    for (int64_t i = 0; i < num_counters; i++) *counters[i] += amount;
}

}  // extern "C"
