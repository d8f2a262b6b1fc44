// Attention of many queries for x86 with AVX512, in float32: y = softmax(q·kᵀ·scale + mask)·v.
// lowering/attention_cpu.py says what it takes; docs/cpu.md what was measured. After tensors.h and avx512.h.
//
// Lanes are queries, 32 at a time, so that maxima, sums and exponentials need nothing across lanes. Keys come in
// blocks; a running maximum rescales what was summed before (online softmax: Milakov, Gimelshein, arXiv:1805.02867,
// as in FlashAttention, arXiv:2205.14135). A block that the mask hides from all 32 queries is not computed: whatever
// mask a model builds, causal attention costs half.
namespace {

constexpr int64_t QUERIES = 2 * LANES;
constexpr int64_t KEYS = 48;          // keys of a block: four times as many as a tile's rows
constexpr int64_t QUERY_BLOCK = 256;  // queries that share one conversion of the keys and values to float32
constexpr float LOWEST = -3.4028234663852886e38f;

// A [B, H, rows, columns] tensor whose last dimension is contiguous.
struct Strided {
  const void* data;
  ScalarType dtype;
  int64_t batch, head, row;  // strides, in elements

  int64_t at(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

struct Attention {
  int64_t B, H, L, S, D, E;  // queries L of D channels, keys S, values of E channels
  int64_t group;             // query heads that share a head of keys and values
  Strided query, key, value, mask;  // mask.data may be null
  bool causal;
  float scale;
  void* y;  // [B, L, H, E]
  ScalarType dtype;
};

inline __m512 load16(const Strided& t, int64_t index, int64_t count) {
  return load_float(t.data, index, first(count), t.dtype);
}

// Rows of `columns` numbers each → float32, contiguous.
void widen(const Strided& t, int64_t b, int64_t h, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += LANES)
      _mm512_mask_storeu_ps(out + r * columns + c, first(columns - c), load16(t, t.at(b, h, r) + c, columns - c));
}

// Up to 32 rows from r on, of `columns` numbers → [columns, 32] float32; rows that are missing are zeros.
void widen_columns(const Strided& t, int64_t b, int64_t h, int64_t r, int64_t rows, int64_t from, int64_t columns,
                   float factor, float* out) {
  for (int64_t half = 0; half < QUERIES; half += LANES)
    for (int64_t c = 0; c < columns; c += LANES) {
      __m512i v[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) {
        bool is_there = half + i < rows;
        __m512 row = is_there ? load16(t, t.at(b, h, r + half + i) + from + c, columns - c) : _mm512_setzero_ps();
        v[i] = _mm512_castps_si512(_mm512_mul_ps(row, _mm512_set1_ps(factor)));
      }
      transpose(v);
      int64_t count = std::min<int64_t>(LANES, columns - c);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(out + (c + i) * QUERIES + half, v[i]);
    }
}

// e^x for x ≤ 0, to within 2 units in the last place; below −104 it is 0.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order NaN stays NaN
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// out[r, 32] (+)= Σ_k left[r·row + k·step] · right[k, 32] for R rows.
template <int R, bool ADD>
inline void product(const float* left, int64_t row, int64_t step, const float* right, int64_t K, float* out) {
  __m512 acc[R][2];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < 2; ++v)
      acc[r][v] = ADD ? _mm512_loadu_ps(out + r * QUERIES + v * LANES) : _mm512_setzero_ps();
  for (int64_t k = 0; k < K; ++k) {
    __m512 a = _mm512_loadu_ps(right + k * QUERIES), b = _mm512_loadu_ps(right + k * QUERIES + LANES);
    UNROLL for (int r = 0; r < R; ++r) {
      __m512 w = _mm512_set1_ps(left[r * row + k * step]);
      acc[r][0] = _mm512_fmadd_ps(w, a, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(w, b, acc[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < 2; ++v)
      _mm512_storeu_ps(out + r * QUERIES + v * LANES, acc[r][v]);
}

template <bool ADD>
void products(const float* left, int64_t row, int64_t step, const float* right, int64_t rows, int64_t K, float* out) {
  for (; rows >= 12; rows -= 12, left += 12 * row, out += 12 * QUERIES) product<12, ADD>(left, row, step, right, K, out);
  for (; rows >= 4; rows -= 4, left += 4 * row, out += 4 * QUERIES) product<4, ADD>(left, row, step, right, K, out);
  for (; rows > 0; --rows, left += row, out += QUERIES) product<1, ADD>(left, row, step, right, K, out);
}

// What 32 queries have seen so far, and room to work.
struct Queries {
  explicit Queries(const Attention& a)
      : memory(new float[(a.D + 2 * KEYS + a.E) * QUERIES]),
        query(memory.get()), scores(query + a.D * QUERIES), bias(scores + KEYS * QUERIES), sums(bias + KEYS * QUERIES) {}

  void begin(const Attention& a, int64_t b, int64_t h, int64_t l) {
    widen_columns(a.query, b, h, l, std::min(QUERIES, a.L - l), 0, a.D, a.scale, query);
    std::fill(sums, sums + a.E * QUERIES, 0.0f);
    for (int v = 0; v < 2; ++v) largest[v] = _mm512_set1_ps(LOWEST), total[v] = _mm512_setzero_ps();
  }

  std::unique_ptr<float[]> memory;
  float* query;   // [D, 32], scaled
  float* scores;  // [KEYS, 32]
  float* bias;    // [KEYS, 32]
  float* sums;    // [E, 32]
  __m512 largest[2], total[2];
};

// The mask's part of a block of keys, as float32 lanes; false if it hides every key from every query.
bool read_mask(const Attention& a, Queries& q, int64_t b, int64_t h, int64_t l, int64_t s, int64_t keys) {
  int64_t rows = std::min(QUERIES, a.L - l);
  if (a.mask.data) widen_columns(a.mask, b, h, l, rows, s, keys, 1.0f, q.bias);
  else std::fill(q.bias, q.bias + keys * QUERIES, 0.0f);
  __mmask16 seen = 0;
  for (int64_t k = 0; k < keys; ++k)
    for (int64_t v = 0; v < 2; ++v) {
      float* place = q.bias + k * QUERIES + v * LANES;
      __m512 value = _mm512_loadu_ps(place);
      if (a.causal) {
        int64_t before = std::clamp<int64_t>(s + k - l - v * LANES, 0, LANES);  // lanes that must not see this key
        value = _mm512_mask_mov_ps(value, first(before), _mm512_set1_ps(-INFINITY));
        _mm512_storeu_ps(place, value);
      }
      seen |= _mm512_mask_cmp_ps_mask(first(rows - v * LANES), value, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    }
  return seen;
}

// Scores of a block of keys become shares relative to the largest score so far; earlier sums are rescaled to it.
void soften(Queries& q, int64_t keys, int64_t E) {
  for (int64_t v = 0; v < 2; ++v) {
    __m512 largest = q.largest[v];
    for (int64_t k = 0; k < keys; ++k) {
      float* score = q.scores + k * QUERIES + v * LANES;
      __m512 value = _mm512_add_ps(_mm512_loadu_ps(score), _mm512_loadu_ps(q.bias + k * QUERIES + v * LANES));
      largest = _mm512_max_ps(value, largest);
      _mm512_storeu_ps(score, value);
    }
    __m512 rescale = exponential(_mm512_sub_ps(q.largest[v], largest));
    __m512 total = _mm512_mul_ps(q.total[v], rescale);
    for (int64_t k = 0; k < keys; ++k) {
      float* score = q.scores + k * QUERIES + v * LANES;
      __m512 share = exponential(_mm512_sub_ps(_mm512_loadu_ps(score), largest));
      total = _mm512_add_ps(total, share);
      _mm512_storeu_ps(score, share);
    }
    for (int64_t e = 0; e < E; ++e) {
      float* sum = q.sums + e * QUERIES + v * LANES;
      _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), rescale));
    }
    q.largest[v] = largest, q.total[v] = total;
  }
}

// Sums over totals, back to one row per query; a query that saw no key gets zeros.
void write(const Attention& a, const Queries& q, int64_t b, int64_t h, int64_t l) {
  for (int64_t v = 0; v < 2; ++v) {
    __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), q.total[v]);
    share = _mm512_mask_mov_ps(share, _mm512_cmp_ps_mask(q.total[v], _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_setzero_ps());
    int64_t rows = std::min<int64_t>(LANES, a.L - l - v * LANES);
    for (int64_t e = 0; e < a.E; e += LANES) {
      __m512i sums[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) {
        __m512 sum = e + i < a.E ? _mm512_loadu_ps(q.sums + (e + i) * QUERIES + v * LANES) : _mm512_setzero_ps();
        sums[i] = _mm512_castps_si512(_mm512_mul_ps(sum, share));
      }
      transpose(sums);
      for (int64_t i = 0; i < rows; ++i)
        store_float(a.y, ((b * a.L + l + v * LANES + i) * a.H + h) * a.E + e, first(a.E - e), a.dtype,
                    _mm512_castsi512_ps(sums[i]));
    }
  }
}

// The queries from l to `end` of one head.
void attend(const Attention& a, int64_t b, int64_t h, int64_t l, int64_t end) {
  int64_t reach = a.causal ? std::min(a.S, end) : a.S;
  std::unique_ptr<float[]> memory(new float[reach * (a.D + a.E)]);
  float *key = memory.get(), *value = key + reach * a.D;
  widen(a.key, b, h / a.group, reach, a.D, key);
  widen(a.value, b, h / a.group, reach, a.E, value);
  Queries q(a);
  for (; l < end; l += QUERIES) {
    q.begin(a, b, h, l);
    for (int64_t s = 0; s < reach; s += KEYS) {
      int64_t keys = std::min(KEYS, reach - s);
      if (!read_mask(a, q, b, h, l, s, keys)) continue;
      products<false>(key + s * a.D, a.D, 1, q.query, keys, a.D, q.scores);
      soften(q, keys, a.E);
      products<true>(value + s * a.E, 1, a.E, q.scores, a.E, keys, q.sums);
    }
    write(a, q, b, h, l);
  }
}

Strided strided(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && is_writable(t.scalar_type()) && (t.size(3) == 1 || t.stride(3) == 1),
                  "qcompile_cpu::attention needs ", name, " [B, H, rows, columns], floating, with contiguous rows");
  return {t.data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, bool causal, double scale) {
  Strided q = strided(query, "query"), k = strided(key, "key"), v = strided(value, "value");
  int64_t B = query.size(0), H = query.size(1), G = key.size(1), L = query.size(2), S = key.size(2), D = query.size(3), E = value.size(3);
  STD_TORCH_CHECK(key.size(0) == B && value.size(0) == B && value.size(1) == G && G > 0 &&
                      H % G == 0 && key.size(3) == D && value.size(2) == S,
                  "qcompile_cpu::attention needs query [B, H, L, D], key [B, G, S, D] and value [B, G, S, E] with G "
                  "dividing H");
  Strided m{nullptr, q.dtype, 0, 0, 0};
  if (mask) {
    m = strided(*mask, "mask");
    STD_TORCH_CHECK(mask->size(0) == B && mask->size(1) == H && mask->size(2) == L && mask->size(3) == S,
                    "qcompile_cpu::attention needs mask [B, H, L, S], expanded if need be");
  }
  Tensor y = empty({B, H, L, E}, {L * H * E, E, H * E, 1}, q.dtype);
  Attention a{B, H, L, S, D, E, H / G, q, k, v, m, causal, static_cast<float>(scale), y.data_ptr(), q.dtype};
  int64_t blocks = (L + QUERY_BLOCK - 1) / QUERY_BLOCK;
  torch::stable::parallel_for(0, B * H * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t head = i / blocks, l = i % blocks * QUERY_BLOCK;
      attend(a, head / H, head % H, l, std::min(L, l + QUERY_BLOCK));
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcompile_cpu, CPU, attention_library) {
  attention_library.impl("attention", TORCH_BOX(&attention));
}
