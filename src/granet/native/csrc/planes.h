// Planes, the layout that the kernels compute on, and conversions from and to the NCHW layout of tensors.
//
// A plane holds one channel of `batch` images, images innermost (with a stride: one phase of a channel):
//
//   [front zeros][row 0: width x batch | gap zeros][row 1 ...]...[zeros up to stride]
//
// `pitch` - width columns of zeros separate the rows, so a convolution's tap is one fixed shift of the flat position,
// and padding needs no branch. A stride of 2 splits the input into phases (even and odd rows and columns). Each phase
// is a plane of its own, so the convolution becomes one of stride 1.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace granet {

struct Planes {
  int64_t height, width;  // of one plane, in positions
  int64_t pitch;          // positions from one row to the next
  int64_t batch;          // images, innermost
  int64_t front;          // zeros before the first position, in floats; a multiple of 16
  int64_t stride;         // floats from one plane to the next

  int64_t positions() const { return height > 0 && width > 0 ? ((height - 1) * pitch + width) * batch : 0; }
};

// Part of an NCHW tensor: `images` images (at most Planes::batch) of channels x height x width floats.
struct Image {
  int64_t channels, height, width;
  int64_t images;
  int64_t image_stride;
};

struct Phase {
  int64_t y, x;  // first row and column
};

struct Tile {
  int64_t start;  // first position, in floats
  int32_t vectors;
};

const Kernels& kernels();

// Divides `positions` floats into tiles of about the same length, none longer than `longest` vectors.
std::vector<Tile> tiles(int64_t positions, int32_t longest, int64_t at_least = 1);

// Fills planes[c * phases + f] with every sy-th row and sx-th column of channel c from phase f on, and the rest with 0.
void pack(const float* from, const Image& image, float* planes, const Planes& layout, const Phase* phases,
          int64_t phase_count, int64_t sy, int64_t sx, int64_t first_channel, int64_t last_channel);

// The inverse of `pack`. Positions of `to` that are in no phase keep their values.
void unpack(const float* planes, const Planes& layout, float* to, const Image& image, const Phase* phases,
            int64_t phase_count, int64_t sy, int64_t sx, int64_t first_channel, int64_t last_channel);

// The byte `fill` everywhere in a plane but in its first `rows` x `columns` positions.
template <typename T>
void clear_around(T* plane, const Planes& layout, int64_t rows, int64_t columns, int fill = 0) {
  const int64_t row = layout.pitch * layout.batch, filled = columns * layout.batch;
  std::memset(plane, fill, sizeof(T) * layout.front);
  if (filled < row) {
    for (int64_t y = 0; y + 1 < rows; ++y) {
      std::memset(plane + layout.front + y * row + filled, fill, sizeof(T) * (row - filled));
    }
  }
  const int64_t end = layout.front + (rows > 0 && columns > 0 ? (rows - 1) * row + filled : 0);
  std::memset(plane + end, fill, sizeof(T) * (layout.stride - end));
}

// Returns how many of `size` rows or columns a phase has that begins with `first`.
inline int64_t steps(int64_t size, int64_t first, int64_t step) {
  return size > first ? (size - first + step - 1) / step : 0;
}

// to[x] = from[2 * x]. The step is fixed, so that the compiler can shuffle vectors.
void take_every_second(const float* from, float* to, int64_t count);

// Returns memory of this thread, at least `floats` long and aligned to a cache line. It is reused by later calls.
float* scratch(int slot, int64_t floats);

}  // namespace granet
