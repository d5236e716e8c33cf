// Grouped codes of saved activations, for the CPU: what groups.py defines, bit for bit.
//
// A tile has as many groups as a vector has lanes, so that the maxima of a tile are one vector, and its scales cost one
// division. A tile is read twice, the second time from the first-level cache; a tensor with a single scale is read
// twice from memory.
//
//   encode tile:  1 maxima   2 scales and their inverses   3 codes
//   decode tile:  1 values of the codes, times the scale   2 not beyond the dtype's range   3 rounded to the dtype
//
// Groups with elements that are not finite are marked by their scale's sign and go another way, which is compiled from
// the same functions (MARKED), so that the others pay nothing for it.
//
// A tile with fewer elements, the last of a tensor, is done in a place of its own that is filled up with zeros.
//
// Compiled without contraction (-ffp-contract=off): a fused multiply-add would round differently from PyTorch.
// Vectors are the processor's: 16 floats wide with AVX-512, otherwise 8. Intrinsics stand only where GCC's vector types
// cost far more: conversions, and maxima across a vector.

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
using MaskBits = uint16_t;
#else
constexpr int LANES = 8;
using MaskBits = uint8_t;
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
using SignedShorts = int16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));
using SignedBytes = int8_t __attribute__((vector_size(LANES)));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };
struct Bool { uint8_t bits; };

constexpr int64_t MASK_CHUNK = 4096;            // elements, a multiple of 16: threads share no byte
constexpr float ROUNDING = 12582912.f;          // 1.5 * 2^23: x + it has the integer nearest to x in its lowest bits
constexpr int32_t INFINITY_BITS = 0x7f800000, NAN_BITS = 0x7fc00000;

// How groups.py's formats are numbered by groups_cpu.py.
enum Kind : int { FP8 = 0, FP8_TENSOR = 1, INT8 = 2, INT4 = 3 };
enum Type : int { FP32 = 0, BF16 = 1, FP16 = 2, BOOL = 3 };

template <int KIND> constexpr bool IS_E4M3 = KIND == FP8 || KIND == FP8_TENSOR;
template <int KIND> constexpr int QUARTER_CODE = KIND == INT8 ? 127 : 7;  // of integers, and its negative
template <int KIND, bool MARKED> constexpr float LARGEST = IS_E4M3<KIND> ? 448.f : QUARTER_CODE<KIND> - (MARKED ? 2 : 1);
// What infinity and NaN have as codes in a marked group.
template <int KIND> constexpr int32_t PLUS_INFINITY = IS_E4M3<KIND> ? 0x7f : QUARTER_CODE<KIND> - 1;
template <int KIND> constexpr int32_t MINUS_INFINITY = IS_E4M3<KIND> ? 0xff : 1 - QUARTER_CODE<KIND>;
template <int KIND> constexpr int32_t NOT_A_NUMBER = IS_E4M3<KIND> ? 0x80 : -1 - QUARTER_CODE<KIND>;
// Elements of a group; of the format without groups as many as are done at once.
template <int KIND> constexpr int GROUP = KIND == INT8 ? 128 : KIND == INT4 ? 32 : KIND == FP8 ? 16 : 64;
constexpr int HALF = GROUP<INT4> / 2;  // what lies between the elements of a byte
template <int KIND> constexpr int TILE = LANES * GROUP<KIND>;
template <int KIND> constexpr int CODES_A_BYTE = KIND == INT4 ? 2 : 1;

// ---- vectors

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat(int32_t x) { return x - Ints{}; }
INLINE float as_float(int32_t x) { float y; memcpy(&y, &x, 4); return y; }
INLINE int32_t as_int(float x) { int32_t y; memcpy(&y, &x, 4); return y; }
INLINE Ints magnitude(Floats x) { return (Ints)x & 0x7fffffff; }
template <class V, class T> INLINE V load(const T* at) { V x; memcpy(&x, at, sizeof x); return x; }
template <class V, class T> INLINE void store(T* at, V x) { memcpy(at, &x, sizeof x); }

#ifdef __AVX512F__  // of a NaN and a number, whichever comes second
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE Words widened(Bytes x) { return (Words)_mm512_cvtepu8_epi32((__m128i)x); }
INLINE Words widened(Shorts x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE Bytes lowest_bytes(Words x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
INLINE Shorts low_halves(Words x) { return (Shorts)_mm512_cvtepi32_epi16((__m512i)x); }
INLINE Floats floats(Ints x) { return (Floats)_mm512_cvtepi32_ps((__m512i)x); }
INLINE MaskBits bits(Ints truth) { return _mm512_test_epi32_mask((__m512i)truth, (__m512i)truth); }
INLINE bool any(Ints truth) { return bits(truth) != 0; }
#else
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
INLINE Words widened(Bytes x) { return __builtin_convertvector(x, Words); }
INLINE Words widened(Shorts x) { return __builtin_convertvector(x, Words); }
INLINE Bytes lowest_bytes(Words x) { return __builtin_convertvector(x, Bytes); }
INLINE Shorts low_halves(Words x) { return __builtin_convertvector(x, Shorts); }
INLINE Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
#ifdef __AVX2__
INLINE MaskBits bits(Ints truth) { return (MaskBits)_mm256_movemask_ps((__m256)truth); }
#else
INLINE MaskBits bits(Ints truth) {
    uint32_t all = 0;
    for (int i = 0; i < LANES; i++) all |= (truth[i] & 1u) << i;
    return (MaskBits)all;
}
#endif
INLINE bool any(Ints truth) { return bits(truth) != 0; }
#endif

INLINE int32_t largest(Ints x) {
    int32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

// The largest numbers of as many vectors as one has lanes, in their order.
INLINE Ints largest_of_each(const Ints* vectors) {
#ifdef __AVX512F__
    // Halves that are interleaved and compared: 16 vectors of 16 become 8 of 2 x 8, 4 of 4 x 4, 2 of 8 x 2, one.
    auto v = [&](int i) { return (__m512i)vectors[i]; };
    auto two = [](__m512i a, __m512i b) { return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
    auto four = [](__m512i a, __m512i b) { return _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); };
    auto of_four = [&](int i) { return four(two(v(i), v(i + 1)), two(v(i + 2), v(i + 3))); };
    auto eight = [](__m512i a, __m512i b) {
        return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    };
    const __m512i low = eight(of_four(0), of_four(4)), high = eight(of_four(8), of_four(12));
    return (Ints)_mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
#else
    Ints most;
    for (int i = 0; i < LANES; i++) most[i] = largest(vectors[i]);
    return most;
#endif
}

// ---- half precision

INLINE Floats from_halves(Shorts x) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps((__m256i)x);
#elif defined __F16C__
    return (Floats)_mm256_cvtph_ps((__m128i)x);
#else
    const Words all = widened(x);
    const Ints most = (Ints)(all & 0x7fffu) << 13, sign = (Ints)((all & 0x8000u) << 16);
    const Ints normal = most + (112 << 23) + ((most >= (31 << 23)) & (112 << 23));
    // A subnormal's bits behind the one of 2^-14.
    const Ints subnormal = (Ints)((Floats)(most + (113 << 23)) - 0x1p-14f);
    return (Floats)((most < (1 << 23) ? subnormal : normal) | sign);
#endif
}

INLINE Shorts to_halves(Floats x) {
#ifdef __AVX512F__
    return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined __F16C__
    return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const Ints most = magnitude(x), sign = (Ints)((Words)x >> 16 & 0x8000u);
    const Ints normal = (most - (112 << 23) + 0xfff + (most >> 13 & 1)) >> 13;
    // 0.5 has a last bit of 2^-24, as have the subnormal halves.
    const Ints subnormal = (Ints)((Floats)most + 0.5f) - (126 << 23);
    const Ints finite = most < (113 << 23) ? subnormal : normal, infinite = splat(0x7c00);
    return low_halves((Words)((most > INFINITY_BITS ? splat(0x7e00) : most < (143 << 23) ? finite : infinite) | sign));
#endif
}

// ---- elements

INLINE Floats loaded(const float* at) { return load<Floats>(at); }
INLINE Floats loaded(const BFloat16* at) { return (Floats)(widened(load<Shorts>(at)) << 16); }
INLINE Floats loaded(const Half* at) { return from_halves(load<Shorts>(at)); }

template <class T> constexpr float MOST = FLT_MAX;
template <> constexpr float MOST<BFloat16> = 0x1.fep127f;
template <> constexpr float MOST<Half> = 65504.f;

INLINE void put(float* at, Floats x) { store(at, x); }
INLINE void put(Half* at, Floats x) { store(at, to_halves(x)); }
INLINE void put(BFloat16* at, Floats x) {
#ifdef __AVX512BF16__  // it flushes subnormals, of which there are none
    store(at, (Shorts)_mm512_cvtneps_pbh((__m512)x));
#else  // the only NaN is that of a scale, and its low bits are zeros
    store(at, low_halves(((Words)x + 0x7fffu + ((Words)x >> 16 & 1u)) >> 16));
#endif
}

// With less, fp16's subnormals could not tell a code from zero.
template <int KIND, class T> constexpr float SMALLEST_SCALE = 0x1p-112f;
template <int KIND> constexpr float SMALLEST_SCALE<KIND, Half> = IS_E4M3<KIND> ? 0x1p-15f : 0x1p-22f;

// ---- codes

INLINE Ints negative(Floats x) { return (Ints)x >> 31; }  // -1 or 0

INLINE Ints e4m3_codes(Floats x, Floats ratio) {
    const Ints most = magnitude(ratio), bits = magnitude(x);
    const Ints normal = ((most + 0x7ffff + (most >> 20 & 1)) >> 20) - (120 << 3);
    const Ints rounded = (Ints)((Floats)most + 0x1p14f) - (141 << 23);  // 2^14 has a last bit of 2^-9
    const Ints subnormal = larger(rounded, bits > 0 ? splat(1) : splat(0));
    return (most < (121 << 23) ? subnormal : normal) | ((Ints)((Words)x >> 24) & 0x80);
}

template <int KIND> INLINE Ints integer_codes(Floats x, Floats ratio) {
    const Ints code = (Ints)(ratio + ROUNDING), quarter = negative(x) & 2 * QUARTER_CODE<KIND> ^ QUARTER_CODE<KIND>;
    return (code == as_int(ROUNDING)) & (magnitude(x) != 0) ? quarter : code;
}

// The codes of a vector, in the lowest bits.
template <int KIND, bool MARKED> INLINE Words codes_of(Floats x, float inverse) {
    const Ints finite = magnitude(x) < INFINITY_BITS;
    const Floats numbers = MARKED ? (Floats)((Ints)x & finite) : x, ratio = numbers * inverse;
    Ints code;
    if constexpr (IS_E4M3<KIND>) code = e4m3_codes(numbers, ratio);
    else code = integer_codes<KIND>(numbers, ratio);
    if constexpr (MARKED) {
        if (IS_E4M3<KIND>) code = code == 0x80 ? splat(0) : code;  // what would be a negative zero
        const Ints infinity = negative(x) ? splat(MINUS_INFINITY<KIND>) : splat(PLUS_INFINITY<KIND>);
        const Ints special = magnitude(x) > INFINITY_BITS ? splat(NOT_A_NUMBER<KIND>) : infinity;
        code = finite ? code : special;
    }
    return (Words)code;
}

// E4M3 is half precision with a shorter exponent: 2^8 times the value, subnormals too.
INLINE Floats e4m3_values(Bytes codes) {
    const SignedShorts wide = __builtin_convertvector((SignedBytes)codes, SignedShorts);
    return from_halves((Shorts)wide << 7 & (uint16_t)0xbfff);
}

template <int KIND> INLINE Floats integer_values(Ints codes) {
#ifdef __AVX512F__
    if (KIND == INT4) {
        const Floats values = {0, 1, 2, 3, 4, 5, 6, .25f, -8, -.25f, -6, -5, -4, -3, -2, -1};
        return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
    }
#endif
    const Floats values = floats(codes);
    const Floats quarter = (Floats)((Ints)values & INT32_MIN | as_int(.25f));
    return magnitude(values) == as_int((float)QUARTER_CODE<KIND>) ? quarter : values;
}

template <int KIND, bool MARKED, class T> INLINE void encode_group(const T* x, uint8_t* codes, float inverse) {
    if constexpr (KIND == INT4) {
        for (int i = 0; i < HALF; i += LANES) {
            const Words low = codes_of<KIND, MARKED>(loaded(x + i), inverse);
            const Words high = codes_of<KIND, MARKED>(loaded(x + HALF + i), inverse);
            store(codes + i, lowest_bytes((low & 15u) | high << 4));
        }
        return;
    }
    for (int i = 0; i < GROUP<KIND>; i += LANES) store(codes + i, lowest_bytes(codes_of<KIND, MARKED>(loaded(x + i), inverse)));
}

// Put results; `codes` tell which of a marked group are infinite or NaN.
template <int KIND, bool MARKED, class T> INLINE void put_within(T* at, Floats x, Ints codes) {
    x = larger(splat(-MOST<T>), smaller(splat(MOST<T>), x));
    if constexpr (MARKED) {
        x = codes == PLUS_INFINITY<KIND> ? (Floats)splat(INFINITY_BITS) : x;
        x = codes == MINUS_INFINITY<KIND> ? -(Floats)splat(INFINITY_BITS) : x;
        x = codes == NOT_A_NUMBER<KIND> ? (Floats)splat(NAN_BITS) : x;
    }
    put(at, x);
}

template <int KIND, bool MARKED, class T> INLINE void put_integers(T* at, Ints codes, float scale) {
    put_within<KIND, MARKED>(at, integer_values<KIND>(codes) * scale, codes);
}

// The scale is above zero here.
template <int KIND, bool MARKED, class T> INLINE void decode_group(const uint8_t* codes, float scale, T* y) {
    if constexpr (KIND == INT4) {
        for (int i = 0; i < HALF; i += LANES) {
            const Words bytes = widened(load<Bytes>(codes + i));
            put_integers<KIND, MARKED>(y + i, (Ints)(bytes << 28) >> 28, scale);
            put_integers<KIND, MARKED>(y + HALF + i, (Ints)(bytes << 24) >> 28, scale);
        }
        return;
    }
    for (int i = 0; i < GROUP<KIND>; i += LANES) {
        const Bytes bytes = load<Bytes>(codes + i);
        const Ints wide = (Ints)widened(bytes);
        if constexpr (KIND == INT8) put_integers<KIND, MARKED>(y + i, (Ints)((Words)wide << 24) >> 24, scale);
        else put_within<KIND, MARKED>(y + i, e4m3_values(bytes) * (scale * 256.f), wide);  // no scale lets this overflow
    }
}

// ---- tiles

template <int KIND> constexpr int64_t NUM_CODE_BYTES(int64_t n) {
    if (KIND != INT4) return n;
    return n / GROUP<KIND> * HALF + std::min<int64_t>(n % GROUP<KIND>, HALF);
}

// The bits of a magnitude; with MARKED, of one that is not finite zero.
template <bool MARKED> INLINE Ints counted(Floats x) {
    const Ints most = magnitude(x);
    return MARKED ? most & (most < INFINITY_BITS) : most;
}

template <int KIND, bool MARKED, class T> INLINE Ints maxima(const T* x) {
    Ints most[LANES];
    for (int g = 0; g < LANES; g++) {
        most[g] = counted<MARKED>(loaded(x + g * GROUP<KIND>));
        for (int i = LANES; i < GROUP<KIND>; i += LANES)
            most[g] = larger(most[g], counted<MARKED>(loaded(x + g * GROUP<KIND> + i)));
    }
    return largest_of_each(most);
}

// A scale as bits, rounded up to bf16.
template <int KIND, bool MARKED, class T> INLINE Ints scales_of(Ints most) {
    const Ints quotient = (Ints)((Floats)most / LARGEST<KIND, MARKED>);
    return larger((quotient + 0xffff) & ~0xffff, splat(as_int(SMALLEST_SCALE<KIND, T>)));
}

// A tile in which some groups are to be marked.
template <int KIND, class T>
__attribute__((noinline)) void encode_marked_tile(const T* x, Ints most, uint8_t* codes, uint16_t* scales) {
    constexpr int GROUP_BYTES = GROUP<KIND> / CODES_A_BYTE<KIND>;
    const Ints marked = most >= INFINITY_BITS, finite = maxima<KIND, true>(x);
    const Ints scale = marked ? scales_of<KIND, true, T>(finite) : scales_of<KIND, false, T>(finite);
    store(scales, low_halves((Words)(scale | (marked & INT32_MIN)) >> 16));
    const Floats inverse = 1.f / (Floats)scale;
    for (int g = 0; g < LANES; g++) {
        if (marked[g]) encode_group<KIND, true>(x + g * GROUP<KIND>, codes + g * GROUP_BYTES, inverse[g]);
        else encode_group<KIND, false>(x + g * GROUP<KIND>, codes + g * GROUP_BYTES, inverse[g]);
    }
}

template <int KIND, class T> INLINE void encode_tile(const T* x, uint8_t* codes, uint16_t* scales) {
    constexpr int GROUP_BYTES = GROUP<KIND> / CODES_A_BYTE<KIND>;
    const Ints most = maxima<KIND, false>(x);
    if (any(most >= INFINITY_BITS)) return encode_marked_tile<KIND>(x, most, codes, scales);
    const Ints scale = scales_of<KIND, false, T>(most);
    store(scales, low_halves((Words)scale >> 16));
    const Floats inverse = 1.f / (Floats)scale;
    for (int g = 0; g < LANES; g++) encode_group<KIND, false>(x + g * GROUP<KIND>, codes + g * GROUP_BYTES, inverse[g]);
}

template <int KIND, class T>
__attribute__((noinline)) void decode_marked_tile(const uint8_t* codes, Floats scale, T* y) {
    constexpr int GROUP_BYTES = GROUP<KIND> / CODES_A_BYTE<KIND>;
    for (int g = 0; g < LANES; g++) {
        if (scale[g] < 0) decode_group<KIND, true>(codes + g * GROUP_BYTES, -scale[g], y + g * GROUP<KIND>);
        else decode_group<KIND, false>(codes + g * GROUP_BYTES, scale[g], y + g * GROUP<KIND>);
    }
}

template <int KIND, class T> INLINE void decode_tile(const uint8_t* codes, const uint16_t* scales, T* y) {
    constexpr int GROUP_BYTES = GROUP<KIND> / CODES_A_BYTE<KIND>;
    const Floats scale = (Floats)(widened(load<Shorts>(scales)) << 16);
    if (any(scale < 0)) return decode_marked_tile<KIND>(codes, scale, y);
    for (int g = 0; g < LANES; g++) decode_group<KIND, false>(codes + g * GROUP_BYTES, scale[g], y + g * GROUP<KIND>);
}

template <int KIND, class T> void encode_groups(const T* x, int64_t n, uint8_t* codes, uint16_t* scales, int threads) {
    const int64_t tiles = n / TILE<KIND>, done = tiles * TILE<KIND>;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tiles; t++)
        encode_tile<KIND>(x + t * TILE<KIND>, codes + t * NUM_CODE_BYTES<KIND>(TILE<KIND>), scales + t * LANES);
    if (done == n) return;
    T last[TILE<KIND>] = {};
    uint8_t last_codes[TILE<KIND>];
    uint16_t last_scales[LANES];
    memcpy(last, x + done, (n - done) * sizeof(T));
    encode_tile<KIND>(last, last_codes, last_scales);
    memcpy(codes + NUM_CODE_BYTES<KIND>(done), last_codes, NUM_CODE_BYTES<KIND>(n - done));
    memcpy(scales + tiles * LANES, last_scales, (n - done + GROUP<KIND> - 1) / GROUP<KIND> * sizeof(uint16_t));
}

template <int KIND, class T> void decode_groups(const uint8_t* codes, const uint16_t* scales, int64_t n, T* y, int threads) {
    const int64_t tiles = n / TILE<KIND>, done = tiles * TILE<KIND>;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tiles; t++)
        decode_tile<KIND>(codes + t * NUM_CODE_BYTES<KIND>(TILE<KIND>), scales + t * LANES, y + t * TILE<KIND>);
    if (done == n) return;
    T last[TILE<KIND>];
    uint8_t last_codes[TILE<KIND>] = {};
    uint16_t last_scales[LANES] = {};
    memcpy(last_codes, codes + NUM_CODE_BYTES<KIND>(done), NUM_CODE_BYTES<KIND>(n - done));
    memcpy(last_scales, scales + tiles * LANES, (n - done + GROUP<KIND> - 1) / GROUP<KIND> * sizeof(uint16_t));
    decode_tile<KIND>(last_codes, last_scales, last);
    memcpy(y + done, last, (n - done) * sizeof(T));
}

// ---- one scale for all

template <bool MARKED, class T> int32_t largest_magnitude(const T* x, int64_t n, int threads) {
    constexpr int SIZE = TILE<FP8_TENSOR>;
    const int64_t tiles = n / SIZE;
    int32_t most = 0;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(max : most)
    for (int64_t t = 0; t < tiles; t++) most = std::max(most, largest(maxima<FP8_TENSOR, MARKED>(x + t * SIZE)));
    T last[SIZE] = {};
    if (n > tiles * SIZE) memcpy(last, x + tiles * SIZE, (n - tiles * SIZE) * sizeof(T));
    return std::max(most, largest(maxima<FP8_TENSOR, MARKED>(last)));
}

template <bool MARKED, class T> float encode_whole(const T* x, int64_t n, int32_t most, uint8_t* codes, int threads) {
    constexpr int SIZE = GROUP<FP8_TENSOR>;
    const float scale = std::max(as_float(most) / LARGEST<FP8_TENSOR, MARKED>, SMALLEST_SCALE<FP8_TENSOR, T>);
    const float inverse = 1.f / scale;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t g = 0; g < n / SIZE; g++) encode_group<FP8_TENSOR, MARKED>(x + g * SIZE, codes + g * SIZE, inverse);
    const int64_t rest = n % SIZE;
    if (rest) {
        T last[SIZE] = {};
        uint8_t last_codes[SIZE];
        memcpy(last, x + n - rest, rest * sizeof(T));
        encode_group<FP8_TENSOR, MARKED>(last, last_codes, inverse);
        memcpy(codes + n - rest, last_codes, rest);
    }
    return MARKED ? -scale : scale;
}

template <class T> void encode_whole(const T* x, int64_t n, uint8_t* codes, float* scale, int threads) {
    const int32_t most = largest_magnitude<false>(x, n, threads);
    if (most < INFINITY_BITS) *scale = encode_whole<false>(x, n, most, codes, threads);
    else *scale = encode_whole<true>(x, n, largest_magnitude<true>(x, n, threads), codes, threads);
}

template <bool MARKED, class T> void decode_whole(const uint8_t* codes, float scale, int64_t n, T* y, int threads) {
    constexpr int SIZE = GROUP<FP8_TENSOR>;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t g = 0; g < n / SIZE; g++) decode_group<FP8_TENSOR, MARKED>(codes + g * SIZE, scale, y + g * SIZE);
    const int64_t rest = n % SIZE;
    if (!rest) return;
    T last[SIZE];
    uint8_t last_codes[SIZE] = {};
    memcpy(last_codes, codes + n - rest, rest);
    decode_group<FP8_TENSOR, MARKED>(last_codes, scale, last);
    memcpy(y + n - rest, last, rest * sizeof(T));
}

template <class T> void decode_whole(const uint8_t* codes, const float* scale, int64_t n, T* y, int threads) {
    if (*scale < 0) decode_whole<true>(codes, -*scale, n, y, threads);
    else decode_whole<false>(codes, *scale, n, y, threads);
}

// ---- masks

// Whether elements are not at most zero, by their bits: a negative NaN is not, and a flushed subnormal would be.
INLINE Ints above_zero(Ints x, int32_t infinity) { return (x > 0) | ((x & 0x7fffffff) > infinity); }
INLINE Ints is_set(const float* at) { return above_zero(load<Ints>(at), INFINITY_BITS); }
INLINE Ints is_set(const BFloat16* at) { return above_zero((Ints)(widened(load<Shorts>(at)) << 16), INFINITY_BITS); }
INLINE Ints is_set(const Half* at) { return above_zero((Ints)(widened(load<Shorts>(at)) << 16), 0x7c000000); }
INLINE Ints is_set(const Bool* at) { return (Ints)widened(load<Bytes>(at)) != 0; }

INLINE void put_bits(float* at, Words x) { store(at, x); }
INLINE void put_bits(BFloat16* at, Words x) { store(at, low_halves(x)); }
INLINE void put_bits(Half* at, Words x) { store(at, low_halves(x)); }
INLINE void put_bits(Bool* at, Words x) { store(at, lowest_bytes(x)); }

// The bits of a value, in every lane.
INLINE Words bits_of(const float*, float value) { return (Words)splat(value); }
INLINE Words bits_of(const Half*, float value) { return widened(to_halves(splat(value))); }
INLINE Words bits_of(const Bool*, float) { return Words{} + 1u; }
INLINE Words bits_of(const BFloat16*, float value) {
    const Words x = (Words)splat(value);
    return value != value ? Words{} + 0x7fc0u : (x + 0x7fffu + (x >> 16 & 1u)) >> 16;
}

template <class T> void mask_encode(const T* x, int64_t n, uint8_t* out, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t start = 0; start < n; start += MASK_CHUNK) {
        const int64_t end = std::min(n, start + MASK_CHUNK);
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) store(out + i / 8, bits(is_set(x + i)));
        if (i == end) continue;
        T last[LANES] = {};
        memcpy(last, x + i, (end - i) * sizeof(T));
        const MaskBits rest = bits(is_set(last));
        memcpy(out + i / 8, &rest, (end - i + 7) / 8);
    }
}

template <class T> void mask_decode(const uint8_t* in, int64_t n, float value, T* y, int threads) {
    Words lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const Words one = bits_of(y, value);
    auto elements = [&](const uint8_t* at, size_t bytes) {
        MaskBits word = 0;
        memcpy(&word, at, bytes);
        return -((Words{} + word) >> lane & 1u) & one;
    };
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t start = 0; start < n; start += MASK_CHUNK) {
        const int64_t end = std::min(n, start + MASK_CHUNK);
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) put_bits(y + i, elements(in + i / 8, sizeof(MaskBits)));
        if (i == end) continue;
        T last[LANES];
        put_bits(last, elements(in + i / 8, (end - i + 7) / 8));
        memcpy(y + i, last, (end - i) * sizeof(T));
    }
}

template <class T> void encode(const T* x, int64_t n, int kind, uint8_t* codes, void* scales, int threads) {
    switch (kind) {
        case FP8: return encode_groups<FP8>(x, n, codes, (uint16_t*)scales, threads);
        case FP8_TENSOR: return encode_whole(x, n, codes, (float*)scales, threads);
        case INT8: return encode_groups<INT8>(x, n, codes, (uint16_t*)scales, threads);
        case INT4: return encode_groups<INT4>(x, n, codes, (uint16_t*)scales, threads);
    }
}

template <class T> void decode(const uint8_t* codes, const void* scales, int64_t n, int kind, T* y, int threads) {
    switch (kind) {
        case FP8: return decode_groups<FP8>(codes, (const uint16_t*)scales, n, y, threads);
        case FP8_TENSOR: return decode_whole(codes, (const float*)scales, n, y, threads);
        case INT8: return decode_groups<INT8>(codes, (const uint16_t*)scales, n, y, threads);
        case INT4: return decode_groups<INT4>(codes, (const uint16_t*)scales, n, y, threads);
    }
}

}  // namespace

extern "C" {

void packlight_group_encode(const void* x, int64_t n, int type, int kind, void* codes, void* scales, int threads) {
    switch (type) {
        case FP32: return encode((const float*)x, n, kind, (uint8_t*)codes, scales, threads);
        case BF16: return encode((const BFloat16*)x, n, kind, (uint8_t*)codes, scales, threads);
        case FP16: return encode((const Half*)x, n, kind, (uint8_t*)codes, scales, threads);
    }
}

void packlight_group_decode(const void* codes, const void* scales, int64_t n, int type, int kind, void* y, int threads) {
    switch (type) {
        case FP32: return decode((const uint8_t*)codes, scales, n, kind, (float*)y, threads);
        case BF16: return decode((const uint8_t*)codes, scales, n, kind, (BFloat16*)y, threads);
        case FP16: return decode((const uint8_t*)codes, scales, n, kind, (Half*)y, threads);
    }
}

void packlight_mask_encode(const void* x, int64_t n, int type, void* bits, int threads) {
    switch (type) {
        case FP32: return mask_encode((const float*)x, n, (uint8_t*)bits, threads);
        case BF16: return mask_encode((const BFloat16*)x, n, (uint8_t*)bits, threads);
        case FP16: return mask_encode((const Half*)x, n, (uint8_t*)bits, threads);
        case BOOL: return mask_encode((const Bool*)x, n, (uint8_t*)bits, threads);
    }
}

void packlight_mask_decode(const void* bits, int64_t n, int type, float value, void* y, int threads) {
    switch (type) {
        case FP32: return mask_decode((const uint8_t*)bits, n, value, (float*)y, threads);
        case BF16: return mask_decode((const uint8_t*)bits, n, value, (BFloat16*)y, threads);
        case FP16: return mask_decode((const uint8_t*)bits, n, value, (Half*)y, threads);
        case BOOL: return mask_decode((const uint8_t*)bits, n, value, (Bool*)y, threads);
    }
}

}  // extern "C"
