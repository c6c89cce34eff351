// Lines of memory that are needed next, asked for a few at a time while others are computed with. The
// machine's own prefetcher starts anew at each row of a tile.
#pragma once
#include "platform.h"

namespace partune {

class ReadAhead {
 public:
  PARTUNE_MEMBER ReadAhead() = default;  // of nothing

  // Rows of `columns` elements, `stride` apart, each in `chunks` pieces that lie `step` apart.
  template <typename T>
  PARTUNE_MEMBER ReadAhead(const T* first, int64_t rows, int64_t stride, int64_t columns, int64_t chunks,
                           int64_t step)
      : row_(reinterpret_cast<const char*>(first)),
        piece_(row_),
        stride_(stride * int64_t(sizeof(T))),
        step_(step * int64_t(sizeof(T))),
        chunks_(chunks),
        lines_((columns * int64_t(sizeof(T)) + kLine - 1) / kLine),
        left_(rows * chunks * lines_) {}

  PARTUNE_MEMBER bool is_empty() const { return left_ == 0; }

  // Spreads what is left over so many calls of ask().
  PARTUNE_MEMBER void spread(int64_t calls) { each_ = calls > 0 ? (left_ + calls - 1) / calls : 0; }

  PARTUNE_MEMBER void ask() {
    for (int64_t i = 0; i < each_; ++i) next();
  }

 private:
  static constexpr int64_t kLine = 64;

  PARTUNE_MEMBER void next() {
    if (left_ == 0) return;
    --left_;
    __builtin_prefetch(piece_ + line_ * kLine, 0, 2);
    if (++line_ < lines_) return;
    line_ = 0;
    if (++chunk_ < chunks_) {
      piece_ += step_;
    } else {
      chunk_ = 0;
      row_ += stride_;
      piece_ = row_;
    }
  }

  const char *row_ = nullptr, *piece_ = nullptr;
  int64_t stride_ = 0, step_ = 0, chunks_ = 0, lines_ = 0, left_ = 0;
  int64_t chunk_ = 0, line_ = 0, each_ = 0;
};

}  // namespace partune
