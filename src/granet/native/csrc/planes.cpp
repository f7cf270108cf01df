#include "planes.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace granet {

namespace {

const Kernels& choose() {
  const char* forced = std::getenv("GRANET_ISA");
  const bool any = forced == nullptr || *forced == 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && (any || std::strncmp(forced, "avx512", 6) == 0)) return kernels_avx512();
  if (avx2 && (any || std::strcmp(forced, "avx2") == 0 || std::strcmp(forced, "avxvnni") == 0)) return kernels_avx2();
#endif
  static_cast<void>(any);
  return kernels_generic();
}

struct Release {
  void operator()(float* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<float, Release> data;
  int64_t floats = 0;
};

// Fills one row of a plane: `count` positions, read from every sx-th column.
void pack_row(const float* from, const Image& image, int64_t sx, int64_t count, int64_t batch, float* to) {
  if (batch == 1) {
    if (sx == 1) {
      std::memcpy(to, from, sizeof(float) * count);
    } else if (sx == 2) {
      take_every_second(from, to, count);
    } else {
      for (int64_t x = 0; x < count; ++x) to[x] = from[x * sx];
    }
  } else if (sx == 1) {
    kernels().transpose(from, image.image_stride, to, batch, image.images, count);
  } else {
    for (int64_t n = 0; n < image.images; ++n) {
      for (int64_t x = 0; x < count; ++x) to[x * batch + n] = from[n * image.image_stride + x * sx];
    }
  }
}

void unpack_row(const float* from, const Image& image, int64_t sx, int64_t count, int64_t batch, float* to) {
  if (batch == 1) {
    if (sx == 1) {
      std::memcpy(to, from, sizeof(float) * count);
    } else {
      for (int64_t x = 0; x < count; ++x) to[x * sx] = from[x];
    }
  } else if (sx == 1) {
    kernels().transpose(from, batch, to, image.image_stride, count, image.images);
  } else {
    for (int64_t n = 0; n < image.images; ++n) {
      for (int64_t x = 0; x < count; ++x) to[n * image.image_stride + x * sx] = from[x * batch + n];
    }
  }
}

}  // namespace

void take_every_second(const float* __restrict__ from, float* __restrict__ to, int64_t count) {
  for (int64_t x = 0; x < count; ++x) to[x] = from[2 * x];
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<Tile> tiles(int64_t positions, int32_t longest, int64_t at_least) {
  const int64_t width = kernels().width;
  const int64_t vectors = (positions + width - 1) / width;
  int64_t count = std::max((vectors + longest - 1) / longest, std::min(at_least, vectors));
  std::vector<Tile> result;
  result.reserve(count);
  int64_t start = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t length = vectors / count + (t < vectors % count ? 1 : 0);
    result.push_back({start * width, static_cast<int32_t>(length)});
    start += length;
  }
  return result;
}

void pack(const float* from, const Image& image, float* planes, const Planes& layout, const Phase* phases,
          int64_t phase_count, int64_t sy, int64_t sx, int64_t first_channel, int64_t last_channel) {
  if (image.height == 1 && image.width == 1 && layout.batch > 1 && phase_count == 1 && phases->y == 0 &&
      phases->x == 0) {
    // The features of a linear layer need a single transpose of the whole block.
    for (int64_t c = first_channel; c < last_channel; ++c) {
      float* plane = planes + c * layout.stride;
      std::memset(plane, 0, sizeof(float) * layout.front);
      std::memset(plane + layout.front + image.images, 0,
                  sizeof(float) * (layout.stride - layout.front - image.images));
    }
    kernels().transpose(from + first_channel, image.image_stride, planes + first_channel * layout.stride + layout.front,
                        layout.stride, image.images, last_channel - first_channel);
    return;
  }
  for (int64_t c = first_channel; c < last_channel; ++c) {
    const float* channel = from + c * image.height * image.width;
    for (int64_t f = 0; f < phase_count; ++f) {
      float* plane = planes + (c * phase_count + f) * layout.stride;
      const int64_t rows = steps(image.height, phases[f].y, sy);
      const int64_t columns = steps(image.width, phases[f].x, sx);
      if (image.images == layout.batch) {
        clear_around(plane, layout, rows, columns);
      } else {
        std::memset(plane, 0, sizeof(float) * layout.stride);
      }
      if (layout.batch == 1 && sx == 1 && sy == 1 && columns == image.width && columns == layout.pitch) {
        std::memcpy(plane + layout.front, channel, sizeof(float) * rows * columns);
        continue;
      }
      for (int64_t y = 0; y < rows; ++y) {
        pack_row(channel + (phases[f].y + y * sy) * image.width + phases[f].x, image, sx, columns, layout.batch,
                 plane + layout.front + y * layout.pitch * layout.batch);
      }
    }
  }
}

void unpack(const float* planes, const Planes& layout, float* to, const Image& image, const Phase* phases,
            int64_t phase_count, int64_t sy, int64_t sx, int64_t first_channel, int64_t last_channel) {
  if (image.height == 1 && image.width == 1 && layout.batch > 1 && phase_count == 1 && phases->y == 0 &&
      phases->x == 0) {
    kernels().transpose(planes + first_channel * layout.stride + layout.front, layout.stride, to + first_channel,
                        image.image_stride, last_channel - first_channel, image.images);
    return;
  }
  for (int64_t c = first_channel; c < last_channel; ++c) {
    float* channel = to + c * image.height * image.width;
    for (int64_t f = 0; f < phase_count; ++f) {
      const float* plane = planes + (c * phase_count + f) * layout.stride + layout.front;
      const int64_t rows = steps(image.height, phases[f].y, sy);
      const int64_t columns = steps(image.width, phases[f].x, sx);
      for (int64_t y = 0; y < rows; ++y) {
        unpack_row(plane + y * layout.pitch * layout.batch, image, sx, columns, layout.batch,
                   channel + (phases[f].y + y * sy) * image.width + phases[f].x);
      }
    }
  }
}

float* scratch(int slot, int64_t floats) {
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.floats < floats) {
    const int64_t rounded = (floats + 1023) / 1024 * 1024;
    buffer.data.reset();
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(64, sizeof(float) * rounded)));
    if (!buffer.data) throw std::bad_alloc();
    buffer.floats = rounded;
  }
  return buffer.data.get();
}

}  // namespace granet
