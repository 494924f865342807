// Distinct rows of floats, numbered in order of appearance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fused_ops::rnn {

class Distinct {
 public:
  explicit Distinct(int64_t width) : width_(width) {}

  void clear() {
    rows_.clear();
    seen_ = 0;
    std::fill(table_.begin(), table_.end(), -1);
  }

  // The number of `row`. A row equal to an earlier one gets that one's, while looking has paid off.
  int32_t number(const float* row) {
    const auto fresh = static_cast<int32_t>(rows_.size());
    ++seen_;
    if (worthwhile_ && seen_ > TRIAL && 4 * fresh > 3 * TRIAL && 4 * fresh > 3 * seen_) worthwhile_ = false;
    if (worthwhile_) {
      if (2 * rows_.size() >= table_.size()) grow();
      int32_t& place = find(row);
      if (place >= 0) return place;
      place = fresh;
    }
    rows_.push_back(row);
    return fresh;
  }

  const std::vector<const float*>& rows() const { return rows_; }

 private:
  static constexpr int64_t TRIAL = 64;

  uint64_t hash(const float* row) const {
    uint64_t lanes[4] = {1, 2, 3, 4};
    int64_t i = 0;
    for (; i + 8 <= width_; i += 8)
      for (int lane = 0; lane < 4; ++lane) {
        uint64_t word;
        std::memcpy(&word, row + i + 2 * lane, sizeof(word));
        lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15u;
      }
    for (; i < width_; ++i) {
      uint32_t word;
      std::memcpy(&word, row + i, sizeof(word));
      lanes[0] = (lanes[0] ^ word) * 0x9e3779b97f4a7c15u;
    }
    uint64_t all = 0;
    for (const uint64_t lane : lanes) all = (all ^ lane ^ lane >> 32) * 0x9e3779b97f4a7c15u;
    return all >> 32;
  }

  int32_t& find(const float* row) {
    for (uint64_t at = hash(row);; ++at) {
      int32_t& place = table_[at & (table_.size() - 1)];
      if (place < 0 || std::memcmp(rows_[place], row, width_ * sizeof(float)) == 0) return place;
    }
  }

  void grow() {
    table_.assign(std::max<size_t>(2 * table_.size(), 256), -1);
    for (size_t i = 0; i < rows_.size(); ++i) find(rows_[i]) = static_cast<int32_t>(i);
  }

  const int64_t width_;
  std::vector<const float*> rows_;
  std::vector<int32_t> table_;
  int64_t seen_ = 0;
  bool worthwhile_ = true;
};

}  // namespace fused_ops::rnn
