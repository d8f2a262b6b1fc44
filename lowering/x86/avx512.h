// Vectors of 512 bits: numbers in and out, transposition. After tensors.h.
namespace {

constexpr int LANES = 16;  // 32-bit numbers of a vector

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << std::min<int64_t>(count, LANES)) - 1); }

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

inline __m512 load_float(const void* data, int64_t index, __mmask16 mask, ScalarType dtype) {
  if (dtype == ScalarType::Float) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const int16_t*>(data) + index);
  if (dtype == ScalarType::Half) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// To the nearest, ties to even, as torch rounds; the processor's own instruction flushes subnormal numbers.
inline __m256i to_bfloat16(__m512 value) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

inline void store_float(void* data, int64_t index, __mmask16 mask, ScalarType dtype, __m512 value) {
  if (dtype == ScalarType::Float) return _mm512_mask_storeu_ps(static_cast<float*>(data) + index, mask, value);
  __m256i half = dtype == ScalarType::Half ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                           : to_bfloat16(value);
  _mm256_mask_storeu_epi16(static_cast<int16_t*>(data) + index, mask, half);
}

// 16 vectors of 16 int32: rows become columns.
inline void transpose(__m512i (&v)[LANES]) {
  __m512i t[LANES];
  UNROLL for (int g = 0; g < LANES; g += 4) {
    __m512i a = _mm512_unpacklo_epi32(v[g], v[g + 1]), b = _mm512_unpackhi_epi32(v[g], v[g + 1]);
    __m512i c = _mm512_unpacklo_epi32(v[g + 2], v[g + 3]), d = _mm512_unpackhi_epi32(v[g + 2], v[g + 3]);
    t[g] = _mm512_unpacklo_epi64(a, c);
    t[g + 1] = _mm512_unpackhi_epi64(a, c);
    t[g + 2] = _mm512_unpacklo_epi64(b, d);
    t[g + 3] = _mm512_unpackhi_epi64(b, d);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88), d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace
