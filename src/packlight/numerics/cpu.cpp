// The optimiser steps on compactly stored moments, for the CPU.
//
// The same fp32 operations in the same order as reference.py, block by block of 128 elements, with a block's
// numbers in registers and the first-level cache: parameters, gradients and codes are read once and written once, and
// nothing as large as a parameter is allocated. Vectors are 16 floats wide through the compiler's vector types;
// it splits them where the processor's are narrower. Only table look-ups and conversions have intrinsics.
//
//   step(items)  ->  tasks of some blocks, handed out to threads
//     task  ->  for each block:  1 load gradient, codes   2 new moments, new parameter   3 scales   4 new codes
//     matrix format, besides:    5 a thread's column maxima into the parameter's, when it leaves the parameter
//   finish       ->  maxima of this step become the divisors of the next
//
// Compiled without contraction (-ffp-contract=off): a fused multiply-add would round differently from PyTorch.
// Maxima are taken over the bits of non-negative floats as integers, so a NaN is larger than everything and
// shows in its block, and the order of threads does not matter.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));
struct BFloat16 { uint16_t bits; };

constexpr int LANES = 16, BLOCK = 128, HALF = 64, GROUP = 32, GROUPS = BLOCK / GROUP;
constexpr int64_t TASK_BLOCKS = 512;            // 64 Ki elements: far more than it takes to hand out a task
constexpr int PREFETCH_ELEMENTS = 512;          // four blocks ahead: about the latency of memory
constexpr float SMALLEST_SCALE = 0x1p-118f;
constexpr float ROUNDING = 8388608.f;           // 2^23: x + it has the integer nearest to x in its lowest bits
constexpr float LEVEL_SLACK = 1.f - 1.f / 65536;
constexpr float MAXIMA_RANGE = 64.f, MAXIMA_SLACK = 1.4f;
constexpr float SMALLEST_MAXIMUM = 1e-30f, LARGEST_MAXIMUM = 1e30f, UNKNOWN_ROW = 1.f, UNKNOWN_COLUMN = 1e30f;
constexpr uint32_t MULTIPLIER_1 = 0x7feb352du, MULTIPLIER_2 = 0x846ca68bu, WEYL = 0x9e3779b9u;
constexpr uint32_t PARAMETER_STREAM = 0x5bd1e995u;

// What a parameter's moments are stored as; cpu.py numbers them alike.
enum Kind : int64_t { FP32 = 0, BITS4 = 1, BITS4_MATRIX = 2, BITS8 = 3, FP8 = 4 };
enum Rounding : int { NEAREST = 0, STOCHASTIC = 1, MASTER24 = 2, MASTER32 = 3 };

}  // namespace

// One parameter: pointers and sizes, all 64 bits wide, in the order in which cpu.py writes them.
struct Item {
    void* param;
    const void* grad;
    void* error;
    void* exp_avg[3];     // fp32: values; else codes, scale, power
    void* exp_avg_sq[3];  // fp32: values; else codes, scale, power
    float *rows, *cols;   // matrix: (2, rows) and (2, cols)
    int64_t numel, columns, kind, key, spare;
};

struct Tables {
    const float* values;     // of the 4-bit first moment, 16
    const int32_t* cells;    // their borders, 32
    const float* expanded;   // FP8: (256, 128)
    const float* borders;    // FP8: (256, 128)
    const float* limits;     // FP8: (256)
};

namespace {

struct Numbers {  // settings.AdamWNumbers
    float beta1, gradient_to_m, beta2, root_beta2, gradient_to_root, decay, root_to_denom, denom_eps, coefficient, l2;
    // In double precision and rounded once, as in Python.
    float root_unit(float levels) const { return (float)((double)root_beta2 / (double)levels); }
};
struct SGDNumbers {  // settings.SGDNumbers
    float momentum, gradient_to_m, m_to_p, gradient_to_p, coefficient, l2;
};

// ---- vectors

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat(int32_t x) { return x - Ints{}; }
INLINE Floats as_floats(Ints x) { return (Floats)x; }
INLINE float as_float(int32_t x) { float y; memcpy(&y, &x, 4); return y; }
INLINE int32_t as_int(float x) { int32_t y; memcpy(&y, &x, 4); return y; }
#ifdef __AVX512F__  // of a NaN and a number, whichever comes second
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#else
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
#endif
INLINE Ints magnitude(Floats x) { return (Ints)x & 0x7fffffff; }
INLINE Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }

INLINE int32_t largest(Ints x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
#endif
}

INLINE Floats root(Floats x) {
#ifdef __AVX512F__
    return (Floats)_mm512_sqrt_ps((__m512)x);
#else
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = __builtin_sqrtf(x[i]);
    return y;
#endif
}

INLINE Floats floor(Floats x) {
#ifdef __AVX512F__
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = __builtin_floorf(x[i]);
    return y;
#endif
}

INLINE Words widened(Bytes x) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu8_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

INLINE Bytes narrowed(Words x) {
#ifdef __AVX512F__
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

INLINE Words widened(Shorts x) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

INLINE Shorts halved(Words x) {  // the low halves
#ifdef __AVX512F__
    return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, Shorts);
#endif
}

// A table of 16, by the lowest four bits of an index.
INLINE Floats looked_up(Floats table, Words index) {
#ifdef __AVX512F__
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = table[index[i] & 15];
    return y;
#endif
}

// A table of 32, by the lowest five bits of an index.
INLINE Ints looked_up(Ints low, Ints high, Ints index) {
#ifdef __AVX512F__
    return (Ints)_mm512_permutex2var_epi32((__m512i)low, (__m512i)index, (__m512i)high);
#else
    Ints y;
    for (int i = 0; i < LANES; i++) y[i] = index[i] & 16 ? high[index[i] & 15] : low[index[i] & 15];
    return y;
#endif
}

// A table of any size, in memory.
INLINE Floats gathered(const float* table, Ints index) {
#ifdef __AVX512F__
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    Floats y;
    for (int i = 0; i < LANES; i++) y[i] = table[index[i]];
    return y;
#endif
}

template <class V, class T> INLINE V load(const T* at) { V x; memcpy(&x, at, sizeof x); return x; }
template <class V, class T> INLINE void store(T* at, V x) { memcpy(at, &x, sizeof x); }
INLINE Floats loaded(const float* at) { return load<Floats>(at); }
INLINE Floats loaded(const BFloat16* at) { return (Floats)(widened(load<Shorts>(at)) << 16); }

const Floats LEVELS = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
const Words LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// ---- random bits, as in noise.py

INLINE Words words(uint64_t offset, uint32_t key) {
    Words x = LANE * MULTIPLIER_1 + ((uint32_t)offset * MULTIPLIER_1 + (uint32_t)(offset >> 32) * WEYL + key);
    return (x ^ x >> 15) * MULTIPLIER_2;
}
INLINE Floats uniform(Words word, bool second_half, float least = 0.f) {  // between least and least + 1
    Words bits = second_half ? (word << 7 & 0x7fff80u) | 0x3f800040u : word >> 9 | 0x3f800001u;
    return (Floats)bits - (1.f - least);
}

// ---- parameters

// `rounded` where x is finite; arithmetic sets the highest bit of a NaN's 23, so it remains one when cut off.
INLINE Words finite_or(Floats x, Words rounded, Words otherwise) {
#ifdef __AVX512DQ__
    return (Words)_mm512_mask_mov_epi32((__m512i)rounded, _mm512_fpclass_ps_mask((__m512)x, 0x99), (__m512i)otherwise);
#else
    return ((Words)x & 0x7f800000u) == 0x7f800000u ? otherwise : rounded;
#endif
}

struct Parameters { int rounding; uint32_t key; };

INLINE Floats with_error(Floats x, const void*, int64_t, const float*, const Parameters&) { return x; }
INLINE Floats with_error(Floats x, const void* error, int64_t at, const BFloat16*, const Parameters& how) {
    if (how.rounding == MASTER24) {
        Words bytes = widened(load<Bytes>((const uint8_t*)error + at));
        return (Floats)((Ints)x + ((Ints)(bytes << 24) >> 16));
    }
    if (how.rounding == MASTER32) {
        Words shorts = widened(load<Shorts>((const uint16_t*)error + at));
        return (Floats)((Ints)x + ((Ints)(shorts << 16) >> 16));
    }
    return x;
}

INLINE void put(float* at, Floats x, void*, int64_t, uint64_t, const Parameters&) { store(at, x); }
INLINE void put(BFloat16* at, Floats x, void* error, int64_t e, uint64_t offset, const Parameters& how) {
    Words bits = (Words)x, rounded;
    if (how.rounding == NEAREST) {
        rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    } else if (how.rounding == STOCHASTIC) {
        Words word = words(offset & ~(uint64_t)HALF, how.key ^ PARAMETER_STREAM);
        rounded = bits + (offset & HALF ? word & 0xffffu : word >> 16);
    } else {
        rounded = bits + 0x8000u;
        Ints rest = (Ints)(bits - (rounded & 0xffff0000u));
        Ints finite = (Ints)((bits & 0x7f800000u) != 0x7f800000u);
        if (how.rounding == MASTER24) {
            rest = (rest + 128) >> 8;
            rest = (rest > 127 ? splat(127) : rest) & finite;
            store((uint8_t*)error + e, narrowed((Words)rest));
        } else {
            store((uint16_t*)error + e, halved((Words)(rest & finite)));
        }
    }
    store(at, halved(finite_or(x, rounded, bits) >> 16));
}

// ---- codes

INLINE Words nearest(Floats scaled, Ints low, Ints high) {
    Ints cell = (Ints)(scaled + (ROUNDING + 15.f));
    Ints border = looked_up(low, high, cell);
    return (Words)(border - (scaled > as_floats(border)));
}

template <bool STOCHASTICALLY> INLINE Words root_code(Floats levels, Words random, bool second_half) {
    if (STOCHASTICALLY) levels = levels + uniform(random, second_half, -.5f);
    return (Words)(larger(levels, splat(1.f)) + (ROUNDING - 1.f));
}

INLINE float inverse(float scale, float span) { return scale >= SMALLEST_SCALE ? span / scale : 0.f; }
INLINE float rounded_up(float x) { return x != x ? x : as_float((int32_t)((uint32_t)(as_int(x) + 0xffff) & 0xffff0000u)); }
INLINE float widened(BFloat16 x) { return as_float((int32_t)((uint32_t)x.bits << 16)); }

// ---- one block

// A block of a parameter: where its numbers are, and which they are.
template <class T> struct Block {
    T* param;
    const T* grad;
    uint8_t* error;
    uint8_t *m_codes, *s_codes, *m_power, *s_power;
    void *m_scale, *s_scale;
    uint64_t offset;       // of its first element in the parameter
    int length = BLOCK;    // fewer at the parameter's end
    int in_row = BLOCK;    // elements that belong to the first of its rows
    int64_t row = 0, column = 0;
};

// What a matrix format's roots are multiplied and divided by; columns are repeated once beyond their end.
struct Divisors {
    const float *old_row, *inverse_row, *old_column, *inverse_column;
    int32_t *row_most, *column_most;  // maxima of this step: of the parameter's rows, of the thread's columns
};

template <int KIND> constexpr int SCALES = KIND == BITS8 ? GROUPS : 1;
template <int KIND> constexpr bool FOUR_BITS = KIND == BITS4 || KIND == BITS4_MATRIX;

INLINE float get_scale(const void* at, int i, bool small) {
    return small ? widened(((const BFloat16*)at)[i]) : ((const float*)at)[i];
}
INLINE float set_scale(void* at, int i, float scale, bool small) {
    if (!small) return ((float*)at)[i] = scale;
    scale = rounded_up(scale);
    ((BFloat16*)at)[i].bits = (uint16_t)((uint32_t)as_int(scale) >> 16);
    return scale;
}
INLINE void raise_to(int32_t* at, int32_t most) {
    int32_t now = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (most > now && !__atomic_compare_exchange_n(at, &now, most, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

// FP8 with range expansion: a code is guessed through logarithms, and settled by the exact borders beside it.
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
void expanded_values(float* to, const uint8_t* codes, int power, const Tables& tables) {
    const float* values = tables.expanded + 128 * power;
    for (int e = 0; e < BLOCK; e += LANES) {
        const Ints code = (Ints)widened(load<Bytes>(codes + e));
        const Floats x = gathered(values, code & 127);
        store(to + e, as_floats((Ints)x ^ (code & 128) << 24));
    }
}
// Zeros of a signed block have a code of their own; in an unsigned one they need the whole range below it.
int expansion_power(const float* x, int length, float most, bool is_signed, const Tables& tables) {
    Floats least = splat(INFINITY);
    for (int e = 0; e < BLOCK; e += LANES) {
        const Floats y = as_floats(magnitude(loaded(x + e)));
        const Ints ignored = is_signed ? (Ints)(y == 0.f) : ((Ints)LANE + e >= length);
        least = ignored | (y >= least) ? least : y;
    }
    float smallest = INFINITY;
    for (int i = 0; i < LANES; i++) smallest = least[i] >= smallest ? smallest : least[i];
    const float range = most / smallest;
    Ints fit = {};
    for (int j = 16; j < 256; j += LANES) fit -= splat(range) <= loaded(tables.limits + j);
    int power = 15;
    for (int i = 0; i < LANES; i++) power += fit[i];
    return std::max(power, 16);
}
void expanded_codes(uint8_t* codes, const float* x, float scale, int power, bool is_signed, const float* random,
                    const Tables& tables) {
    const float *values = tables.expanded + 128 * power, *borders = tables.borders + 128 * power;
    for (int e = 0; e < BLOCK; e += LANES) {
        const Floats ratio = loaded(x + e) * scale;
        Floats y = as_floats(magnitude(ratio));
        y = y == y ? y : Floats{};  // a NaN gets the lowest code
        Ints code = guessed_code(y, (float)power / 16.f);
        if (random) {
            code = code + (y < gathered(values, code));
            code = code > 0 ? code : Ints{};
            const Ints next = code < 126 ? code + 1 : code;
            code = (y >= gathered(values, next)) & (next > code) ? next : code;
            const Floats below = gathered(values, code), above = gathered(values, code < 126 ? code + 1 : code);
            code = code - (y - below > loaded(random + e) * (above - below));
        } else {
            const Ints under = code > 0 ? code - 1 : Ints{};
            code = code - (y > gathered(borders, code)) + ((y <= gathered(borders, under)) & (code > 0));
        }
        const int lowest = is_signed ? 0 : 1;
        code = code > 126 ? splat(126) : code < lowest ? splat(lowest) : code;
        if (is_signed) code = code | ((ratio < 0.f) & 128);
        store(codes + e, narrowed((Words)code));
    }
}

// The new values of a block until its scales are known.
struct Values { alignas(64) float m[BLOCK], s[BLOCK], random[BLOCK]; };

template <int KIND, bool SECOND, bool STOCHASTICALLY>
INLINE void encode(uint8_t* codes, uint8_t* power, void* scales, const float* x, int length, const Ints* most,
                   uint64_t offset, uint32_t key, const Tables& tables, Values& values) {
    constexpr float span = KIND == BITS8 ? (SECOND ? 256.f * LEVEL_SLACK : 1.f)
                         : KIND == FP8 ? 1.f : (SECOND ? 16.f * LEVEL_SLACK : 15.f);
    float inverses[GROUPS];
    for (int i = 0; i < SCALES<KIND>; i++)
        inverses[i] = inverse(set_scale(scales, i, as_float(largest(most[i])), KIND == BITS8), span);
    if constexpr (FOUR_BITS<KIND>) {
        const Ints low = load<Ints>(tables.cells), high = load<Ints>(tables.cells + LANES);
        #pragma GCC unroll 4
        for (int k = 0; k < HALF; k += LANES) {
            Floats a = loaded(x + k) * inverses[0], b = loaded(x + k + HALF) * inverses[0];
            Words first, second;
            if constexpr (SECOND) {
                Words random = {};
                if (STOCHASTICALLY) random = words(offset + k, key);
                first = root_code<STOCHASTICALLY>(a, random, false);
                second = root_code<STOCHASTICALLY>(b, random, true);
            } else {
                first = nearest(a, low, high);
                second = nearest(b, low, high);
            }
            store(codes + k, narrowed((first & 15u) | second << 4));
        }
    } else if constexpr (KIND == BITS8) {
        #pragma GCC unroll 8
        for (int e = 0; e < BLOCK; e += LANES) {
            Floats a = loaded(x + e) * inverses[e / GROUP];
            if constexpr (SECOND) {
                Words random = {};
                if (STOCHASTICALLY) random = words(offset + (e & ~HALF), key);
                store(codes + e, narrowed(root_code<STOCHASTICALLY>(a, random, e >= HALF) & 255u));
            } else {
                Floats y = a * 254.f / (as_floats(magnitude(a)) + 1.f);
                Words level = (Words)(y + 1.5f * ROUNDING);  // the nearest integer, negative ones as well, in its low bits
                store(codes + e, narrowed((y == y ? level : Words{}) & 255u));
            }
        }
    } else if constexpr (KIND == FP8) {
        *power = (uint8_t)expansion_power(x, length, as_float(largest(most[0])), !SECOND, tables);
        if (STOCHASTICALLY)
            for (int e = 0; e < BLOCK; e += LANES)
                store(values.random + e, uniform(words(offset + (e & ~HALF), key), e >= HALF));
        expanded_codes(codes, x, inverses[0], *power, !SECOND, STOCHASTICALLY ? values.random : nullptr, tables);
    }
}

// Steps 1 to 4. ADAMW: two moments; else SGD's momentum buffer alone. EDGE: blocks that are short or in two rows, and
// AdamW's rare L2 weight decay, whose branch would cost the others a tenth.
template <class T, int KIND, bool ADAMW, bool STOCHASTICALLY, bool EDGE>
INLINE void step_block(const Block<T>& at, const Numbers& n, const SGDNumbers& sgd, const Parameters& how,
                       uint32_t key, const Tables& tables, const Divisors& by, Values& values) {
    constexpr bool MATRIX = KIND == BITS4_MATRIX;
    const Floats book = loaded(tables.values);
    const float m_decay = ADAMW ? n.beta1 : sgd.momentum, g_to_m = ADAMW ? n.gradient_to_m : sgd.gradient_to_m;
    const float l2 = ADAMW ? n.l2 : sgd.l2, coefficient = ADAMW ? n.coefficient : sgd.coefficient;
    constexpr float levels = (KIND == BITS8 ? 256.f : 16.f) * LEVEL_SLACK;
    float m_unit[GROUPS] = {}, s_unit[GROUPS] = {};
    Ints m_most[GROUPS] = {}, s_most[GROUPS] = {}, row_most = {}, next_row_most = {};
    float row_unit = 0, next_row_unit = 0, row_inverse = 0, next_row_inverse = 0;
    if constexpr (KIND != FP32)
        for (int i = 0; i < SCALES<KIND>; i++) {
            m_unit[i] = get_scale(at.m_scale, i, KIND == BITS8) * m_decay;
            if constexpr (ADAMW)
                s_unit[i] = get_scale(at.s_scale, i, KIND == BITS8) * (KIND == FP8 ? n.beta2 : n.root_unit(levels));
        }
    if constexpr (MATRIX && ADAMW) {
        row_unit = by.old_row[at.row] * s_unit[0], row_inverse = by.inverse_row[at.row];
        if (EDGE && at.in_row < at.length)
            next_row_unit = by.old_row[at.row + 1] * s_unit[0], next_row_inverse = by.inverse_row[at.row + 1];
    }
    if constexpr (KIND == FP8) {
        expanded_values(values.m, at.m_codes, *at.m_power, tables);
        if (ADAMW) expanded_values(values.s, at.s_codes, *at.s_power, tables);
    }
    #pragma GCC unroll 4
    for (int k = 0; k < HALF; k += LANES) {
        Words m_codes = {}, s_codes = {};
        if constexpr (FOUR_BITS<KIND>) {
            m_codes = widened(load<Bytes>(at.m_codes + k));
            if (ADAMW) s_codes = widened(load<Bytes>(at.s_codes + k));
        }
        #pragma GCC unroll 2
        for (int e = k; e < BLOCK; e += HALF) {
            Floats p = with_error(loaded(at.param + e), at.error, e, at.param, how);
            Floats g = loaded(at.grad + e);
            if (!ADAMW || (EDGE && l2 != 0)) g = g * coefficient;
            if ((!ADAMW || EDGE) && l2 != 0) g = g + p * l2;
            Floats m;
            if constexpr (FOUR_BITS<KIND>) m = looked_up(book, e < HALF ? m_codes : m_codes >> 4) * m_unit[0];
            if constexpr (KIND == FP8) m = loaded(values.m + e) * m_unit[0];
            if constexpr (KIND == FP32) m = loaded((float*)at.m_codes + e) * m_decay;
            if constexpr (KIND == BITS8) {
                Floats level = floats((Ints)(widened(load<Bytes>(at.m_codes + e)) << 24) >> 24);
                m = level / (254.f - as_floats(magnitude(level))) * m_unit[e / GROUP];
            }
            m = m + g * g_to_m;
            if constexpr (ADAMW) {
                Floats gs = g * n.gradient_to_root, v;
                if constexpr (KIND == FP32) v = loaded((float*)at.s_codes + e) * n.beta2 + gs * gs;
                if constexpr (KIND == FP8) v = loaded(values.s + e) * s_unit[0] + gs * gs;
                if constexpr (FOUR_BITS<KIND> || KIND == BITS8) {
                    Floats unit = splat(s_unit[KIND == BITS8 ? e / GROUP : 0]);
                    if constexpr (MATRIX) {
                        Floats by_row = splat(row_unit);
                        if (EDGE) by_row = (Ints)LANE + e < at.in_row ? by_row : splat(next_row_unit);
                        unit = smaller(by_row, loaded(by.old_column + at.column + e) * s_unit[0]);
                    }
                    Floats level;
                    if constexpr (KIND == BITS8) level = floats((Ints)(widened(load<Bytes>(at.s_codes + e)) + 1u));
                    else level = looked_up(LEVELS, e < HALF ? s_codes : s_codes >> 4);
                    Floats old = level * unit;
                    v = old * old + gs * gs;
                }
                v = as_floats(magnitude(v));  // a NaN may be negative, and maxima are taken over bits
                Floats s = root(v);
                p = p * n.decay - m / (s * n.root_to_denom + n.denom_eps);
                if (EDGE) s = (Ints)LANE + e < at.length ? s : Floats{};
                if constexpr (MATRIX) {
                    int32_t* column = by.column_most + at.column + e;
                    store(column, larger(load<Ints>(column), (Ints)s));
                    Floats inverse = splat(row_inverse);
                    if (EDGE) {
                        Ints first = (Ints)LANE + e < at.in_row;
                        inverse = first ? inverse : splat(next_row_inverse);
                        row_most = larger(row_most, (Ints)s & first);
                        next_row_most = larger(next_row_most, (Ints)s & ~first);
                    } else {
                        row_most = larger(row_most, (Ints)s);
                    }
                    s = s * larger(inverse, loaded(by.inverse_column + at.column + e));
                }
                if constexpr (KIND == FP8) s = EDGE ? ((Ints)LANE + e < at.length ? v : Floats{}) : v;
                s_most[KIND == BITS8 ? e / GROUP : 0] = larger(s_most[KIND == BITS8 ? e / GROUP : 0], (Ints)s);
                if constexpr (KIND == FP32) store((float*)at.s_codes + e, v);
                else store(values.s + e, s);
            } else {
                Floats move = m * sgd.m_to_p;
                if (sgd.gradient_to_p != 0) move = move + g * sgd.gradient_to_p;
                p = p - move;
            }
            put(at.param + e, p, at.error, e, at.offset + e, how);
            if constexpr (KIND == FP32) {
                store((float*)at.m_codes + e, m);
            } else {
                if (EDGE) m = (Ints)LANE + e < at.length ? m : Floats{};
                m_most[KIND == BITS8 ? e / GROUP : 0] = larger(m_most[KIND == BITS8 ? e / GROUP : 0], magnitude(m));
                store(values.m + e, m);
            }
        }
    }
    if constexpr (MATRIX && ADAMW) {
        raise_to(by.row_most + at.row, largest(row_most));
        if (EDGE && at.in_row < at.length) raise_to(by.row_most + at.row + 1, largest(next_row_most));
    }
    if constexpr (KIND == FP32) return;
    encode<KIND, false, false>(at.m_codes, at.m_power, at.m_scale, values.m, at.length, m_most, at.offset, key, tables, values);
    if constexpr (ADAMW)
        encode<KIND, true, STOCHASTICALLY>(at.s_codes, at.s_power, at.s_scale, values.s, at.length, s_most, at.offset, key, tables, values);
}

// ---- tasks

struct Task { int64_t item, first, last; };  // blocks first to last - 1

// The divisors of a matrix format's parameter, in fp32.
struct Matrix {
    std::vector<float> inverse_row, old_column, inverse_column;
    std::vector<int32_t> row_most, column_most;

    explicit Matrix(const Item& item) {
        const int64_t columns = item.columns, rows = item.numel / columns;
        inverse_row.resize(rows), row_most.resize(rows), column_most.resize(columns);
        old_column.resize(columns + BLOCK), inverse_column.resize(columns + BLOCK);
        for (int64_t i = 0; i < rows; i++) inverse_row[i] = 1.f / item.rows[rows + i];
        for (int64_t j = 0; j < columns + BLOCK; j++) {
            old_column[j] = item.cols[j % columns];
            inverse_column[j] = 1.f / item.cols[columns + j % columns];
        }
    }

    void finish(const Item& item) const {
        rotate(item.rows, row_most, UNKNOWN_ROW);
        rotate(item.cols, column_most, UNKNOWN_COLUMN);
    }

    static void rotate(float* maxima, const std::vector<int32_t>& most, float unknown) {
        const size_t n = most.size();
        auto usable = [](float x) { return x >= SMALLEST_MAXIMUM && x <= LARGEST_MAXIMUM; };
        float least = 0;
        for (size_t i = 0; i < n; i++)
            if (usable(as_float(most[i]))) least = std::max(least, as_float(most[i]) / MAXIMA_RANGE);
        for (size_t i = 0; i < n; i++) {
            float now = as_float(most[i]);
            float next = usable(now) ? std::max(now, least) : unknown, used = maxima[n + i];
            maxima[i] = used;
            maxima[n + i] = next > used * MAXIMA_SLACK || used > next * MAXIMA_SLACK ? next : used;
        }
    }
};

// A thread's column maxima of the parameter that it works on.
struct Columns {
    std::vector<int32_t> most;
    Matrix* matrix = nullptr;

    void enter(Matrix* next) {
        if (next == matrix) return;
        leave();
        matrix = next;
        if (matrix) most.assign(matrix->inverse_column.size(), 0);
    }
    void leave() {
        if (!matrix) return;
        const size_t columns = matrix->column_most.size();
        for (size_t j = 0; j < most.size(); j++)
            if (most[j]) raise_to(&matrix->column_most[j % columns], most[j]);
        matrix = nullptr;
    }
};

struct Call {
    const Item* items;
    Numbers adamw;
    SGDNumbers sgd;
    int rounding;
    Tables tables;
};

template <class T, int KIND> Block<T> block_at(const Item& item, int64_t block, int error_bytes) {
    Block<T> at;
    const int64_t o = block * BLOCK, codes = FOUR_BITS<KIND> ? block * HALF : KIND == FP32 ? o * 4 : o;
    const int64_t scales = KIND == BITS8 ? block * GROUPS * 2 : block * 4;
    at.param = (T*)item.param + o, at.grad = (const T*)item.grad + o;
    at.error = (uint8_t*)item.error + o * error_bytes, at.offset = (uint64_t)o;
    at.m_codes = (uint8_t*)item.exp_avg[0] + codes, at.s_codes = (uint8_t*)item.exp_avg_sq[0] + codes;
    at.m_scale = (uint8_t*)item.exp_avg[1] + scales, at.s_scale = (uint8_t*)item.exp_avg_sq[1] + scales;
    at.m_power = (uint8_t*)item.exp_avg[2] + block, at.s_power = (uint8_t*)item.exp_avg_sq[2] + block;
    at.length = (int)std::min<int64_t>(BLOCK, item.numel - o);
    return at;
}

// The last block of a parameter, shorter than the others, in a place of its own.
template <class T, int KIND> struct Short {
    alignas(64) T param[BLOCK] = {}, grad[BLOCK] = {};
    alignas(64) uint8_t error[2 * BLOCK] = {}, m_codes[4 * BLOCK] = {}, s_codes[4 * BLOCK] = {};
    float m_scale[GROUPS] = {}, s_scale[GROUPS] = {};

    template <class Step> void run(const Block<T>& at, bool adamw, int error_bytes, const Step& step) {
        const size_t n = at.length, codes = FOUR_BITS<KIND> ? std::min<size_t>(n, HALF) : KIND == FP32 ? 4 * n : n;
        const size_t scales = KIND == FP32 ? 0 : KIND == BITS8 ? (n + GROUP - 1) / GROUP * 2 : 4;
        Block<T> own = at;
        own.param = param, own.grad = grad, own.error = error;
        own.m_codes = m_codes, own.s_codes = s_codes, own.m_scale = m_scale, own.s_scale = s_scale;
        auto copy = [&](bool back, void* here, void* there, size_t bytes) {
            if (bytes) back ? memcpy(there, here, bytes) : memcpy(here, there, bytes);
        };
        auto all = [&](bool back) {
            copy(back, param, at.param, n * sizeof(T));
            copy(back, error, at.error, n * error_bytes);
            copy(back, m_codes, at.m_codes, codes);
            copy(back, m_scale, at.m_scale, scales);
            if (adamw) copy(back, s_codes, at.s_codes, codes), copy(back, s_scale, at.s_scale, scales);
        };
        all(false);
        memcpy(grad, at.grad, n * sizeof(T));
        step(own);
        if (FOUR_BITS<KIND>)  // elements that there are not have code 0
            for (size_t i = n < HALF ? 0 : n - HALF; i < HALF; i++) m_codes[i] &= 15;
        all(true);
    }
};

template <class T, int KIND, bool ADAMW, bool STOCHASTICALLY>
void run_task(const Call& call, const Task& task, Matrix* matrix, Columns& columns) {
    const Item& item = call.items[task.item];
    const int error_bytes = !item.error ? 0 : call.rounding == MASTER24 ? 1 : call.rounding == MASTER32 ? 2 : 0;
    const Parameters how{call.rounding, (uint32_t)item.key};
    Divisors by{};
    constexpr bool MATRIX = KIND == BITS4_MATRIX && ADAMW;
    if (MATRIX) {
        columns.enter(matrix);
        by = {item.rows, matrix->inverse_row.data(), matrix->old_column.data(), matrix->inverse_column.data(),
              matrix->row_most.data(), columns.most.data()};
    }
    Values values;
    for (int64_t b = task.first; b < task.last; b++) {
        Block<T> at = block_at<T, KIND>(item, b, error_bytes);
        if (MATRIX) {
            at.row = b * BLOCK / item.columns, at.column = b * BLOCK % item.columns;
            at.in_row = (int)std::min<int64_t>(BLOCK, item.columns - at.column);
        }
        if (at.length == BLOCK && at.in_row == BLOCK && (!ADAMW || call.adamw.l2 == 0)) {
            for (int i = 0; i < BLOCK; i += 64 / (int)sizeof(T)) {
                __builtin_prefetch(at.param + PREFETCH_ELEMENTS + i, 1);
                __builtin_prefetch(at.grad + PREFETCH_ELEMENTS + i, 0);
            }
            __builtin_prefetch(at.m_codes + PREFETCH_ELEMENTS / 2, 1);
            if (ADAMW) __builtin_prefetch(at.s_codes + PREFETCH_ELEMENTS / 2, 1);
            step_block<T, KIND, ADAMW, STOCHASTICALLY, false>(at, call.adamw, call.sgd, how, how.key, call.tables, by, values);
            continue;
        }
        auto edge = [&](const Block<T>& own) {
            step_block<T, KIND, ADAMW, STOCHASTICALLY, true>(own, call.adamw, call.sgd, how, how.key, call.tables, by, values);
        };
        if (at.length == BLOCK) edge(at);
        else { Short<T, KIND> last; last.run(at, ADAMW, error_bytes, edge); }
    }
}

template <class T, bool ADAMW, bool STOCHASTICALLY>
void run_kind(const Call& call, const Task& task, Matrix* matrix, Columns& columns) {
    switch (call.items[task.item].kind) {
        case FP32: return run_task<T, FP32, ADAMW, false>(call, task, matrix, columns);
        case BITS4: return run_task<T, BITS4, ADAMW, STOCHASTICALLY>(call, task, matrix, columns);
        case BITS8: return run_task<T, BITS8, ADAMW, STOCHASTICALLY>(call, task, matrix, columns);
        case FP8: return run_task<T, FP8, ADAMW, STOCHASTICALLY>(call, task, matrix, columns);
        case BITS4_MATRIX:
            if constexpr (ADAMW) return run_task<T, BITS4_MATRIX, ADAMW, STOCHASTICALLY>(call, task, matrix, columns);
    }
}

template <bool ADAMW> void run(const Call& call, int64_t num_items, bool bf16, bool stochastic, int threads) {
    std::vector<Task> tasks;
    std::vector<Matrix> matrices;
    std::vector<int64_t> matrix_of(num_items, -1);
    for (int64_t i = 0; i < num_items; i++) {
        const int64_t blocks = (call.items[i].numel + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; b += TASK_BLOCKS) tasks.push_back({i, b, std::min(blocks, b + TASK_BLOCKS)});
        if (call.items[i].kind != BITS4_MATRIX) continue;
        matrix_of[i] = (int64_t)matrices.size();
        matrices.emplace_back(call.items[i]);
    }
    const int64_t num_tasks = (int64_t)tasks.size();
    #pragma omp parallel num_threads(threads)
    {
        Columns columns;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < num_tasks; t++) {
            const int64_t m = matrix_of[tasks[t].item];
            Matrix* matrix = m < 0 ? nullptr : &matrices[m];
            if (bf16 && stochastic) run_kind<BFloat16, ADAMW, true>(call, tasks[t], matrix, columns);
            else if (bf16) run_kind<BFloat16, ADAMW, false>(call, tasks[t], matrix, columns);
            else if (stochastic) run_kind<float, ADAMW, true>(call, tasks[t], matrix, columns);
            else run_kind<float, ADAMW, false>(call, tasks[t], matrix, columns);
        }
        columns.leave();
    }
    for (int64_t i = 0; i < num_items; i++)
        if (matrix_of[i] >= 0) matrices[matrix_of[i]].finish(call.items[i]);
}

}  // namespace

extern "C" {

void packlight_adamw_step(const Item* items, int64_t num_items, const float* numbers, const Tables* tables, int bf16,
                          int rounding, int stochastic, int threads) {
    Call call{items, {}, {}, rounding, *tables};
    memcpy(&call.adamw, numbers, sizeof call.adamw);
    run<true>(call, num_items, bf16, stochastic, threads);
}

void packlight_sgd_step(const Item* items, int64_t num_items, const float* numbers, const Tables* tables, int bf16,
                        int rounding, int threads) {
    Call call{items, {}, {}, rounding, *tables};
    memcpy(&call.sgd, numbers, sizeof call.sgd);
    run<false>(call, num_items, bf16, false, threads);
}

void packlight_count(float* const* counters, int64_t num_counters, float amount) {
    for (int64_t i = 0; i < num_counters; i++) *counters[i] += amount;
}

}  // extern "C"
