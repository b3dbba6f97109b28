// Converts between ND, rows of elements as usual, and FRACTAL_NZ, the tiled format of NPU matrices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// NZ storage is [..., N1, M1, 16, N0], padded with zeros. N0 is as in torch_npu's FormatHelper.
inline int64_t nz_width(size_t element_size) { return element_size == 1 ? 32 : 16; }

inline std::vector<int64_t> nz_shape(const std::vector<int64_t> &sizes, size_t element_size) {
  int64_t n0 = nz_width(element_size), n = sizes.back();
  int64_t m = sizes.size() > 1 ? sizes[sizes.size() - 2] : 1;
  std::vector<int64_t> shape(sizes.begin(), sizes.size() > 1 ? sizes.end() - 2 : sizes.begin());
  for (int64_t v : {(n + n0 - 1) / n0, (m + 15) / 16, (int64_t)16, n0}) shape.push_back(v);
  return shape;
}

// sizes are those of the ND side; all but the last two are a batch.
inline void transdata(const char *in, char *out, const std::vector<int64_t> &sizes,
                      size_t element_size, bool to_nz) {
  int64_t n0 = nz_width(element_size), n = sizes.back(), batch = 1;
  int64_t m = sizes.size() > 1 ? sizes[sizes.size() - 2] : 1;
  for (size_t i = 0; i + 2 < sizes.size(); i++) batch *= sizes[i];
  int64_t m1 = (m + 15) / 16, n1 = (n + n0 - 1) / n0, per_matrix = m1 * 16 * n1 * n0;
  if (to_nz) memset(out, 0, (size_t)(batch * per_matrix) * element_size);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t j = 0; j < n1; j++)
      for (int64_t i = 0; i < m; i++) {
        size_t count = (size_t)std::min(n0, n - j * n0) * element_size;
        size_t nd = (size_t)(b * m * n + i * n + j * n0) * element_size;
        size_t nz = (size_t)(b * per_matrix + (j * m1 * 16 + i) * n0) * element_size;
        memcpy(out + (to_nz ? nz : nd), in + (to_nz ? nd : nz), count);
      }
}
