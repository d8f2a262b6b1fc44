// scaled_mm, int8, for x86 without VNNI: y = x·weightᵀ·scales + bias + residual. lowering/scaled_mm_avx.py says what
// it takes; docs/cpu.md why it is shaped like this, and what was measured. After tensors.h.
//
// u8·s8 products saturate in the instruction for them, so bytes become int16 on their way into registers, and vpmaddwd
// sums pairs of products exactly. Compiled for vectors of 512 bits where AVX512 is on, else of 256. Weights are read
// where they lie, row-major [N, K], as by scaled_mm_vnni.cpp, and in the same two forms:
//   dot (few tokens): a vector of a weight row times one of a token; lanes are summed at the end.
//   tile (more): tokens are packed so that lanes are tokens; two numbers of a weight row are broadcast to all.
namespace {

#if VECTOR_BITS == 512
#define NAME "scaled_mm_avx512"
using Vector = __m512i;
constexpr int TILE_ROWS = 8;  // weight rows of a tile: with three vectors of tokens 24 of 32 registers sum
inline Vector load(const void* data) { return _mm512_loadu_si512(data); }
inline void store(void* data, Vector v) { _mm512_storeu_si512(data, v); }
inline Vector broadcast(int32_t value) { return _mm512_set1_epi32(value); }
inline Vector zero() { return _mm512_setzero_si512(); }
inline Vector widened(const int8_t* data) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
inline void multiply_add(Vector& sums, Vector a, Vector b) {
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}
inline __m256i folded(Vector v) {  // half as many sums
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#else
#define NAME "scaled_mm_avx2"
using Vector = __m256i;
constexpr int TILE_ROWS = 4;  // with three vectors of tokens 12 of 16 registers sum
inline Vector load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }
inline void store(void* data, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(data), v); }
inline Vector broadcast(int32_t value) { return _mm256_set1_epi32(value); }
inline Vector zero() { return _mm256_setzero_si256(); }
inline Vector widened(const int8_t* data) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
inline void multiply_add(Vector& sums, Vector a, Vector b) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}
inline __m256i folded(Vector v) { return v; }
#endif

constexpr int64_t SHORTS = sizeof(Vector) / 2;  // int16 of a vector
constexpr int64_t LANES = sizeof(Vector) / 4;   // int32 of a vector: tokens of a group
constexpr int64_t ROWS = 8;                     // weight rows of a block: an 8 × 8 transposition ends it
constexpr int64_t GROUPS = 3;                   // vectors of tokens that a tile takes at most
constexpr int64_t FEW = 12;                     // tokens up to which the dot form is the faster one
constexpr int64_t TOKENS = 96;                  // that share one widening of weight rows
constexpr int64_t PART = 2048;                  // of K: 96 tokens of it stay in L2 while rows pass, 8 rows in L1
constexpr int64_t PANEL = 64;                   // weight rows that pass meanwhile
constexpr int64_t AHEAD = 8 << 10;              // bytes from the weights in use to those prefetched

struct Arguments {
  int64_t M, N, K;
  const int8_t* x;            // [M, K]
  const int8_t* weight;       // [N, K]
  const float* x_scale;       // [M], or one for all with x_scale_step 0; null if the sums are wanted
  int64_t x_scale_step;
  const float* weight_scale;  // [N]
  const float* bias;          // [N] or null
  const void* residual;       // [M, N] of y's dtype, or null
  void* y;                    // [M, N]
  ScalarType dtype;           // of y: int32 for the sums

  int64_t padded() const { return (K + SHORTS - 1) / SHORTS * SHORTS; }  // numbers of a widened row
};

inline void prefetch(const int8_t* data) { _mm_prefetch(reinterpret_cast<const char*>(data), _MM_HINT_T1); }

// Memory that begins at a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new char[count * sizeof(T) + LINE]) {
    auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + LINE - 1) / LINE * LINE);
  }
  T* data() const { return data_; }

 private:
  std::unique_ptr<char[]> memory_;
  T* data_;
};

// `count` numbers, filled up with zeros to `padded`, a whole number of vectors.
inline void widen(const int8_t* data, int64_t count, int64_t padded, int16_t* wide) {
  int64_t k = 0;
  for (; k + SHORTS <= count; k += SHORTS) store(wide + k, widened(data + k));
  for (; k < padded; k += SHORTS) {
    int8_t rest[SHORTS] = {};
    if (k < count) std::memcpy(rest, data + k, static_cast<size_t>(count - k));
    store(wide + k, widened(rest));
  }
}

// ---- from sums to y

inline __m256 from_half(const void* data, ScalarType dtype) {
  __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(data));
  if (dtype == ScalarType::Half) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// To the nearest, ties to even, as torch rounds.
inline __m128i to_bfloat16(__m256 value) {
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  __m128i low = _mm256_castsi256_si128(kept), high = _mm256_extracti128_si256(kept, 1);
  return _mm_packus_epi32(low, high);
}

inline __m128i to_half(__m256 value, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return to_bfloat16(value);
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

// Eight numbers of a dtype, `count` of which are in memory.
inline __m256 load_floats(const void* data, int64_t index, int64_t count, ScalarType dtype) {
  alignas(LINE) char whole[32] = {};
  int64_t size = is_half(dtype) ? 2 : 4;
  const void* from = static_cast<const char*>(data) + index * size;
  if (count < 8) from = std::memcpy(whole, from, static_cast<size_t>(count * size));
  return is_half(dtype) ? from_half(from, dtype) : _mm256_loadu_ps(static_cast<const float*>(from));
}

inline void store_floats(void* data, int64_t index, int64_t count, ScalarType dtype, __m256 value) {
  alignas(LINE) char whole[32];
  int64_t size = is_half(dtype) ? 2 : 4;
  char* to = static_cast<char*>(data) + index * size;
  void* at = count < 8 ? whole : to;
  if (is_half(dtype)) _mm_storeu_si128(static_cast<__m128i*>(at), to_half(value, dtype));
  else _mm256_storeu_ps(static_cast<float*>(at), value);
  if (count < 8) std::memcpy(to, whole, static_cast<size_t>(count * size));
}

inline void transpose(__m256i (&v)[8]) {
  __m256i t[8];
  UNROLL for (int g = 0; g < 8; g += 4) {
    __m256i a = _mm256_unpacklo_epi32(v[g], v[g + 1]), b = _mm256_unpackhi_epi32(v[g], v[g + 1]);
    __m256i c = _mm256_unpacklo_epi32(v[g + 2], v[g + 3]), d = _mm256_unpackhi_epi32(v[g + 2], v[g + 3]);
    t[g] = _mm256_unpacklo_epi64(a, c);
    t[g + 1] = _mm256_unpackhi_epi64(a, c);
    t[g + 2] = _mm256_unpacklo_epi64(b, d);
    t[g + 3] = _mm256_unpackhi_epi64(b, d);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x20);
    v[4 + i] = _mm256_permute2x128_si256(t[i], t[4 + i], 0x31);
  }
}

// y[m…m+tokens−1, n…n+rows−1] from sums [8, step], a row of them for each weight row; in float32 and in the order of
// qcompile.ops.epilogue, so that the bits are the same.
void finish(const Arguments& a, int64_t m, int64_t tokens, int64_t n, int64_t rows, const int32_t* sums, int64_t step) {
  bool scaled = a.x_scale;
  __m256 weight_scale = scaled ? load_floats(a.weight_scale, n, rows, ScalarType::Float) : _mm256_setzero_ps();
  __m256 bias = a.bias ? load_floats(a.bias, n, rows, ScalarType::Float) : _mm256_setzero_ps();
  for (int64_t t = 0; t < tokens; t += 8) {
    __m256i v[8];
    UNROLL for (int r = 0; r < 8; ++r)
        v[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * step + t));
    transpose(v);
    for (int64_t i = 0; i < std::min<int64_t>(8, tokens - t); ++i) {
      int64_t token = m + t + i, index = token * a.N + n;
      if (!scaled) {
        store_floats(a.y, index, rows, a.dtype, _mm256_castsi256_ps(v[i]));
        continue;
      }
      __m256 scale = _mm256_mul_ps(_mm256_set1_ps(a.x_scale[token * a.x_scale_step]), weight_scale);
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(v[i]), scale);
      if (a.bias) y = _mm256_add_ps(y, bias);
      if (a.residual) y = _mm256_add_ps(y, load_floats(a.residual, index, rows, a.dtype));
      store_floats(a.y, index, rows, a.dtype, y);
    }
  }
}

// ---- dot

inline int32_t sum_lanes(Vector v) {
  __m256i eight = folded(v);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// One weight row times M widened tokens, `pitch` numbers apart.
template <int M>
inline void dot_row(const int16_t* x, int64_t pitch, const int8_t* weight, int64_t K, int32_t* sums) {
  Vector acc[M];
  UNROLL for (int m = 0; m < M; ++m) acc[m] = zero();
  int64_t k = 0;
  for (; k + SHORTS <= K; k += SHORTS) {
    if (M > 1) prefetch(weight + k + AHEAD);  // with one token the processor itself looks far enough ahead
    Vector w = widened(weight + k);
    UNROLL for (int m = 0; m < M; ++m) multiply_add(acc[m], load(x + m * pitch + k), w);
  }
  if (k < K) {
    int16_t rest[SHORTS];
    widen(weight + k, K - k, SHORTS, rest);
    UNROLL for (int m = 0; m < M; ++m) multiply_add(acc[m], load(x + m * pitch + k), load(rest));
  }
  UNROLL for (int m = 0; m < M; ++m) sums[m] = sum_lanes(acc[m]);
}

template <int M>
void dot_rows(const Arguments& a, const int16_t* x, int64_t n, int64_t rows) {
  alignas(LINE) int32_t sums[ROWS][16] = {};
  for (int64_t r = 0; r < rows; ++r) dot_row<M>(x, a.padded(), a.weight + (n + r) * a.K, a.K, sums[r]);
  finish(a, 0, M, n, rows, sums[0], 16);
}

using DotRows = void (*)(const Arguments&, const int16_t*, int64_t, int64_t);
constexpr DotRows DOT_ROWS[FEW] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,  dot_rows<5>,  dot_rows<6>,
                                   dot_rows<7>, dot_rows<8>, dot_rows<9>, dot_rows<10>, dot_rows<11>, dot_rows<12>};

void run_dot(const Arguments& a) {
  Buffer<int16_t> x(a.M * a.padded());
  for (int64_t m = 0; m < a.M; ++m) widen(a.x + m * a.K, a.K, a.padded(), x.data() + m * a.padded());
  int64_t grain = 1 + (16 << 10) / (ROWS * (a.K + 1));  // waking a thread takes as long as reading some kilobytes
  torch::stable::parallel_for(0, (a.N + ROWS - 1) / ROWS, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * ROWS; n < std::min(end * ROWS, a.N); n += ROWS)
      DOT_ROWS[a.M - 1](a, x.data(), n, std::min<int64_t>(ROWS, a.N - n));
  });
}

// ---- tile

// Up to LANES tokens of K numbers → [padded/2, LANES, 2], filled up with zeros on both sides.
void pack(const Arguments& a, int64_t m, int16_t* packed) {
  for (int64_t k = 0; k < a.padded(); k += 16)
    for (int64_t from = 0; from < LANES; from += 8) {
      __m256i v[8];
      for (int64_t i = 0; i < 8; ++i) {
        int8_t bytes[16] = {};
        if (m + from + i < a.M && k < a.K)
          std::memcpy(bytes, a.x + (m + from + i) * a.K + k, static_cast<size_t>(std::min<int64_t>(16, a.K - k)));
        v[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      }
      transpose(v);
      UNROLL for (int i = 0; i < 8; ++i)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + ((k / 2 + i) * LANES + from) * 2), v[i]);
    }
}

// TILE_ROWS widened weight rows times V groups of packed tokens, added to sums [TILE_ROWS, TOKENS]. count: numbers of a row.
template <int V>
void tile(const int16_t* packed, int64_t stride, const int16_t* rows, int64_t count, const int8_t* ahead, int32_t* sums) {
  Vector acc[TILE_ROWS][V];
  UNROLL for (int r = 0; r < TILE_ROWS; ++r)
      UNROLL for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * TOKENS + v * LANES);
  for (int64_t k = 0; k < count; k += 2) {
    Vector token[V];
    prefetch(ahead + k * TILE_ROWS / 2);
    UNROLL for (int v = 0; v < V; ++v) token[v] = load(packed + v * stride + k * LANES);
    UNROLL for (int r = 0; r < TILE_ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, rows + r * PART + k, sizeof pair);
      Vector w = broadcast(pair);
      UNROLL for (int v = 0; v < V; ++v) multiply_add(acc[r][v], token[v], w);
    }
  }
  UNROLL for (int r = 0; r < TILE_ROWS; ++r)
      UNROLL for (int v = 0; v < V; ++v) store(sums + r * TOKENS + v * LANES, acc[r][v]);
}

using Tile = void (*)(const int16_t*, int64_t, const int16_t*, int64_t, const int8_t*, int32_t*);
constexpr Tile TILES[GROUPS] = {tile<1>, tile<2>, tile<3>};

// Groups from…to−1 of packed tokens.
struct Packed {
  const int16_t* data;
  int64_t stride;  // numbers of a group
  int64_t from, to;
};

// What a thread works in.
struct Workspace {
  Buffer<int16_t> wide{ROWS * PART};
  Buffer<int32_t> sums{PANEL * TOKENS};
};

// Weight rows n…end−1, PANEL at most, times at most TOKENS packed tokens. K is taken in parts, so that the tokens' part
// stays in L2 while the rows pass.
void tile_rows(const Arguments& a, const Packed& packed, const Workspace& space, int64_t n, int64_t end) {
  int32_t* sums = space.sums.data();
  std::memset(sums, 0, PANEL * TOKENS * sizeof(int32_t));
  for (int64_t k = 0; k < a.K; k += PART) {
    int64_t count = std::min(PART, a.K - k), padded = std::min(PART, a.padded() - k);
    for (int64_t first = n; first < end; first += ROWS) {
      for (int64_t r = 0; r < ROWS; ++r)
        widen(a.weight + (first + r) * a.K + k, first + r < end ? count : 0, padded, space.wide.data() + r * PART);
      for (int64_t g = packed.from, groups; g < packed.to; g += groups) {
        groups = std::min(GROUPS, packed.to - g);
        const int16_t* tokens = packed.data + g * packed.stride + k * LANES;
        for (int64_t r = 0; r < ROWS; r += TILE_ROWS)
          TILES[groups - 1](tokens, packed.stride, space.wide.data() + r * PART, padded,
                            a.weight + (first + ROWS + r) * a.K + k,
                            sums + (first - n + r) * TOKENS + (g - packed.from) * LANES);
      }
    }
  }
  int64_t m = packed.from * LANES, tokens = std::min(packed.to * LANES, a.M) - m;
  for (int64_t first = n; first < end; first += ROWS)
    finish(a, m, tokens, first, std::min(ROWS, end - first), sums + (first - n) * TOKENS, TOKENS);
}

void run_tiles(const Arguments& a) {
  int64_t groups = (a.M + LANES - 1) / LANES, stride = a.padded() * LANES;
  Buffer<int16_t> packed(groups * stride);
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) pack(a, g * LANES, packed.data() + g * stride);
  });
  int64_t grain = 1 + (1 << 20) / (ROWS * (a.M + 1) * (a.K + 1));  // waking a thread takes as long as a million products
  torch::stable::parallel_for(0, (a.N + ROWS - 1) / ROWS, grain, [&](int64_t begin, int64_t end) {
    Workspace space;
    int64_t last = std::min(end * ROWS, a.N);
    for (int64_t g = 0; g < groups; g += TOKENS / LANES)
      for (int64_t n = begin * ROWS; n < last; n += PANEL)
        tile_rows(a, {packed.data(), stride, g, std::min(groups, g + TOKENS / LANES)}, space, n,
                  std::min(last, n + PANEL));
  });
}

// ---- the operator

void run(const Arguments& a) {
  if (a.M == 0 || a.N == 0) return;
  a.M <= FEW ? run_dot(a) : run_tiles(a);
}

Tensor scaled_mm(Tensor x, Tensor weight, std::optional<Tensor> x_scale, std::optional<Tensor> weight_scale,
                 std::optional<Tensor> bias, std::optional<Tensor> residual, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "qcompile_cpu needs x [M, K] and weight [N, K]");
  bool sums = dtype == ScalarType::Int;
  STD_TORCH_CHECK(sums || is_writable(dtype), "qcompile_cpu writes float32, bfloat16 or float16, or sums as int32");
  STD_TORCH_CHECK(sums ? !x_scale && !weight_scale && !bias && !residual : x_scale && weight_scale,
                  "qcompile_cpu needs both scales, or for sums none and nothing to add");
  int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  bool per_token = x_scale && x_scale->numel() != 1;
  Tensor y = empty({M, N}, {N, 1}, dtype);
  run({M, N, K,
       data<const int8_t>(x, ScalarType::Char, M * K, "x"),
       data<const int8_t>(weight, ScalarType::Char, N * K, "weight"),
       data<const float>(x_scale, ScalarType::Float, per_token ? M : 1, "x_scale"), per_token ? 1 : 0,
       data<const float>(weight_scale, ScalarType::Float, N, "weight_scale"),
       data<const float>(bias, ScalarType::Float, N, "bias"),
       data<const void>(residual, dtype, M * N, "residual"),
       y.data_ptr(), dtype});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, library) { library.impl(NAME, TORCH_BOX(&scaled_mm)); }
