// scaled_mm, int8, for x86 with AVX512-VNNI: y = x·weightᵀ·scales + bias + residual. lowering/scaled_mm_vnni.py
// says what it takes; docs/cpu.md why it is shaped like this, and what was measured. After tensors.h and avx512.h.
//
// Weights are read where they lie, row-major [N, K]: there is one copy of them, which every number of tokens shares.
//   dot (few tokens): an instruction multiplies 64 bytes of a weight row and of a token; lanes are summed at the end.
//   tile (more): tokens are packed so that lanes are 8 or 16 of them; four bytes of a weight row are broadcast to all.
// Weights stream from memory, so what runs ahead of the sums is prefetched into L2: the processor's own prefetching
// stops at the end of a page.
namespace {

constexpr int ROWS = 12;                // weight rows of a tile: with two vectors of tokens 24 of 32 registers sum
constexpr int64_t FEW = 10;             // tokens up to which the dot form is the faster one
constexpr int64_t L1 = 32 << 10;        // bytes; the dot form reads all its tokens once per weight row
constexpr int64_t L2_SHARE = 512 << 10; // bytes of packed tokens that stay in a core's L2 while weights pass
constexpr int64_t AHEAD = 8 << 10;      // bytes from the weights in use to those prefetched
constexpr int64_t ALIAS = 4 << 10;      // rows so far apart all fall into one set of the L1 cache

struct Arguments {
  int64_t M, N, K;
  const uint8_t* x;             // [M, K], 128 added
  const int8_t* weight;         // [N, K]
  const float* x_scale;         // [M], or one for all with x_scale_step 0
  int64_t x_scale_step;
  const float* weight_scale;    // [N]
  const int32_t* compensation;  // [N]: 128 times the sum of each weight row
  const float* bias;            // [N] or null
  const void* residual;         // [M, N] of y's dtype, or null
  void* y;                      // [M, N]
  ScalarType dtype;
};

// The intrinsics for this let GCC give every sum a register more than there are, and spill.
inline void multiply_add(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

inline void multiply_add(__m256i& sums, __m256i unsigned_bytes, __m256i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

inline void prefetch(const int8_t* data) { _mm_prefetch(reinterpret_cast<const char*>(data), _MM_HINT_T1); }

// ---- from sums to y

// y[m, n…n+15], in float32 and in the order of qcompile.ops.epilogue, so that the bits are the same.
inline void finish(const Arguments& a, int64_t m, int64_t n, __mmask16 mask, __m512i sums) {
  sums = _mm512_sub_epi32(sums, _mm512_maskz_loadu_epi32(mask, a.compensation + n));
  __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a.x_scale[m * a.x_scale_step]),
                               _mm512_maskz_loadu_ps(mask, a.weight_scale + n));
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
  if (a.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, a.bias + n));
  int64_t index = m * a.N + n;
  if (a.residual) y = _mm512_add_ps(y, load_float(a.residual, index, mask, a.dtype));
  store_float(a.y, index, mask, a.dtype, y);
}

// ---- dot

// The four vectors' sums over their lanes.
inline __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// One weight row times M tokens. One row at a time: a single stream is what the memory system follows best.
template <int M>
inline void dot_row(const uint8_t* x, const int8_t* weight, int64_t K, int32_t (&sums)[M]) {
  __m512i acc[M + 3];
  UNROLL for (int m = 0; m < M + 3; ++m) acc[m] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + LINE <= K; k += LINE) {
    if (M > 1) prefetch(weight + k + AHEAD);  // with one token the processor itself looks far enough ahead
    __m512i w = _mm512_loadu_si512(weight + k);
    UNROLL for (int m = 0; m < M; ++m) multiply_add(acc[m], _mm512_loadu_si512(x + m * K + k), w);
  }
  if (k < K) {
    __mmask64 mask = first_bytes(K - k);
    __m512i w = _mm512_maskz_loadu_epi8(mask, weight + k);
    UNROLL for (int m = 0; m < M; ++m) multiply_add(acc[m], _mm512_maskz_loadu_epi8(mask, x + m * K + k), w);
  }
  UNROLL for (int m = 0; m < M; m += 4) {
    __m128i four = sum_lanes(acc[m], acc[m + 1], acc[m + 2], acc[m + 3]);
    std::memcpy(sums + m, &four, std::min(4, M - m) * sizeof(int32_t));
  }
}

// Up to 16 weight rows from n on times M tokens from m on.
template <int M>
void dot_rows(const Arguments& a, int64_t m, int64_t n, int64_t rows) {
  alignas(LINE) int32_t sums[M][LANES];
  for (int64_t r = 0; r < rows; ++r) {
    int32_t row[M];
    dot_row<M>(a.x + m * a.K, a.weight + (n + r) * a.K, a.K, row);
    UNROLL for (int i = 0; i < M; ++i) sums[i][r] = row[i];
  }
  for (int i = 0; i < M; ++i) finish(a, m + i, n, first(rows), _mm512_load_si512(sums[i]));
}

using DotRows = void (*)(const Arguments&, int64_t, int64_t, int64_t);
constexpr DotRows DOT_ROWS[FEW] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>, dot_rows<5>,
                                   dot_rows<6>, dot_rows<7>, dot_rows<8>, dot_rows<9>, dot_rows<10>};

void run_dot(const Arguments& a) {
  int64_t blocks = (a.N + LANES - 1) / LANES;
  int64_t grain = 1 + (16 << 10) / (LANES * (a.K + 1));  // waking a thread takes as long as reading some kilobytes
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * LANES; n < std::min(end * LANES, a.N); n += LANES)
      DOT_ROWS[a.M - 1](a, 0, n, std::min<int64_t>(LANES, a.N - n));
  });
}

// ---- tile

// A vector of L int32, one per token.
template <int L>
struct Tokens;

template <>
struct Tokens<16> {
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const uint8_t* data) { return _mm512_loadu_si512(data); }
  static Vector broadcast(int32_t value) { return _mm512_set1_epi32(value); }
  static __m512i widen(Vector v) { return v; }
  static void store(uint8_t* data, __m512i v) { _mm512_storeu_si512(data, v); }
};

template <>
struct Tokens<8> {
  using Vector = __m256i;
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const uint8_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }
  static Vector broadcast(int32_t value) { return _mm256_set1_epi32(value); }
  static __m512i widen(Vector v) { return _mm512_zextsi256_si512(v); }
  static void store(uint8_t* data, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), _mm512_castsi512_si256(v));
  }
};

// Bytes of L packed tokens.
template <int L>
int64_t packed_size(int64_t K) {
  return (K + 3) / 4 * 4 * L;
}

// Up to L tokens of K bytes → [K/4, L, 4], filled up with zeros on both sides.
template <int L>
void pack(const uint8_t* x, int64_t tokens, int64_t K, uint8_t* packed) {
  for (int64_t k = 0; k < K; k += LINE) {
    __m512i v[LANES];
    __mmask64 mask = first_bytes(K - k);
    UNROLL for (int i = 0; i < LANES; ++i)
        v[i] = i < L && i < tokens ? _mm512_maskz_loadu_epi8(mask, x + i * K + k) : _mm512_setzero_si512();
    transpose(v);
    int64_t groups = std::min<int64_t>(LANES, (K - k + 3) / 4);
    for (int64_t i = 0; i < groups; ++i) Tokens<L>::store(packed + (k / 4 + i) * L * 4, v[i]);
  }
}

inline int32_t up_to_four_bytes(const int8_t* data, int64_t count) {
  int32_t value = 0;
  std::memcpy(&value, data, static_cast<size_t>(count));
  return value;
}

// Weight rows as a tile reads them.
struct Rows {
  const int8_t* data;
  int64_t pitch;        // bytes from one to the next
  const int8_t* ahead;  // what will be read next: as many bytes as are here
};

// R weight rows, from n on, times V·L packed tokens, from m on.
template <int L, int V, int R>
void tile(const Arguments& a, const uint8_t* packed, const Rows& rows, int64_t m, int64_t n) {
  using T = Tokens<L>;
  typename T::Vector acc[R][V];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) acc[r][v] = T::zero();
  int64_t groups = a.K / 4, left = a.K % 4, stride = packed_size<L>(a.K);
  for (int64_t k = 0; k < groups; ++k) {
    typename T::Vector token[V];
    prefetch(rows.ahead + k * LINE);
    UNROLL for (int v = 0; v < V; ++v) token[v] = T::load(packed + v * stride + k * L * 4);
    UNROLL for (int r = 0; r < R; ++r) {
      auto w = T::broadcast(up_to_four_bytes(rows.data + r * rows.pitch + k * 4, 4));
      UNROLL for (int v = 0; v < V; ++v) multiply_add(acc[r][v], token[v], w);
    }
  }
  if (left)
    UNROLL for (int r = 0; r < R; ++r) {
      auto w = T::broadcast(up_to_four_bytes(rows.data + r * rows.pitch + groups * 4, left));
      UNROLL for (int v = 0; v < V; ++v) multiply_add(acc[r][v], T::load(packed + v * stride + groups * L * 4), w);
    }
  UNROLL for (int v = 0; v < V; ++v) {
    __m512i sums[LANES];
    UNROLL for (int r = 0; r < LANES; ++r) sums[r] = r < R ? T::widen(acc[r][v]) : _mm512_setzero_si512();
    transpose(sums);
    int64_t from = m + v * L, tokens = std::min<int64_t>(L, a.M - from);
    for (int64_t i = 0; i < tokens; ++i) finish(a, from + i, n, first(R), sums[i]);
  }
}

// Packed tokens: groups of 16, the last of which may be one of 8.
struct Packed {
  const uint8_t* data;
  int64_t stride;  // bytes of a group of 16
  int64_t from, to;
  bool half;  // whether group to − 1 is one of 8
};

// R weight rows times packed tokens.
template <int R>
void tile_row(const Arguments& a, const Packed& packed, const Rows& rows, int64_t n) {
  int64_t g = packed.from, whole = packed.to - packed.half;
  for (; g + 2 <= whole; g += 2) tile<16, 2, R>(a, packed.data + g * packed.stride, rows, g * 16, n);
  if (g < whole) tile<16, 1, R>(a, packed.data + g * packed.stride, rows, g * 16, n);
  if (packed.half) tile<8, 1, R>(a, packed.data + whole * packed.stride, rows, whole * 16, n);
}

// The weight rows of one block, from n on: a whole tile, or what is left of N.
void tile_block(const Arguments& a, const Packed& packed, Rows rows, int64_t n) {
  if (n + ROWS <= a.N) return tile_row<ROWS>(a, packed, rows, n);
  for (; n + 4 <= a.N; n += 4, rows.data += 4 * rows.pitch) tile_row<4>(a, packed, rows, n);
  for (; n < a.N; ++n, rows.data += rows.pitch) tile_row<1>(a, packed, rows, n);
}

// Copies of a block's weight rows at distances that fall into different sets of the cache.
class Spread {
 public:
  explicit Spread(int64_t K) : pitch_(K + LINE), copy_(K % ALIAS ? nullptr : new int8_t[ROWS * pitch_]) {}

  Rows rows(const Arguments& a, int64_t n) {
    const int8_t* data = a.weight + n * a.K;
    const int8_t* ahead = data + ROWS * a.K;
    if (!copy_) return {data, a.K, ahead};
    for (int64_t r = 0; r < std::min<int64_t>(ROWS, a.N - n); ++r)
      std::memcpy(copy_.get() + r * pitch_, data + r * a.K, static_cast<size_t>(a.K));
    return {copy_.get(), pitch_, ahead};
  }

 private:
  int64_t pitch_;
  std::unique_ptr<int8_t[]> copy_;
};

void run_tiles(const Arguments& a) {
  int64_t groups = (a.M + 15) / 16, stride = packed_size<16>(a.K);
  bool half = a.M % 16 && a.M % 16 <= 8;
  std::unique_ptr<uint8_t[]> packed(new uint8_t[groups * stride]);
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      auto pack_group = half && g == groups - 1 ? pack<8> : pack<16>;
      pack_group(a.x + g * 16 * a.K, a.M - g * 16, a.K, packed.get() + g * stride);
    }
  });
  int64_t at_once = std::max<int64_t>(2, L2_SHARE / std::max<int64_t>(1, stride) / 2 * 2);
  int64_t blocks = (a.N + ROWS - 1) / ROWS;
  int64_t grain = 1 + (1 << 20) / (ROWS * (a.M + 1) * (a.K + 1));  // waking a thread takes as long as a million products
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Spread spread(a.K);
    for (int64_t g = 0; g < groups; g += at_once) {
      int64_t to = std::min(groups, g + at_once);
      Packed part{packed.get(), stride, g, to, half && to == groups};
      for (int64_t n = begin * ROWS; n < std::min(end * ROWS, a.N); n += ROWS) tile_block(a, part, spread.rows(a, n), n);
    }
  });
}

// ---- the operator

void run(const Arguments& a) {
  if (a.M == 0 || a.N == 0) return;
  if (a.M <= 2 || (a.M <= FEW && a.M * a.K <= L1)) return run_dot(a);
  run_tiles(a);
}

Tensor scaled_mm(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor compensation,
                 std::optional<Tensor> bias, std::optional<Tensor> residual, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "qcompile_cpu::scaled_mm needs x [M, K] and weight [N, K]");
  STD_TORCH_CHECK(is_writable(dtype), "qcompile_cpu::scaled_mm writes float32, bfloat16 or float16");
  int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  bool per_token = x_scale.numel() != 1;
  Tensor y = empty({M, N}, {N, 1}, dtype);
  run({M, N, K,
       data<const uint8_t>(x, ScalarType::Byte, M * K, "x"),
       data<const int8_t>(weight, ScalarType::Char, N * K, "weight"),
       data<const float>(x_scale, ScalarType::Float, per_token ? M : 1, "x_scale"), per_token ? 1 : 0,
       data<const float>(weight_scale, ScalarType::Float, N, "weight_scale"),
       data<const int32_t>(compensation, ScalarType::Int, N, "compensation"),
       data<const float>(bias, ScalarType::Float, N, "bias"),
       data<const void>(residual, dtype, M * N, "residual"),
       y.data_ptr(), dtype});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, library) { library.impl("scaled_mm", TORCH_BOX(&scaled_mm)); }
