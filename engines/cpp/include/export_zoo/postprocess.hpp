#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// Probabilities of one image's logits; they add up to 1.
[[nodiscard]] EXPORT_ZOO_API std::vector<float> softmax(std::span<const float> logits);

struct Class {
  std::size_t index;
  float score;
};

/// The k largest scores of one image, largest first. Equal scores are ordered by index; NaN comes last.
[[nodiscard]] EXPORT_ZOO_API std::vector<Class> top_k(std::span<const float> scores, std::size_t k);

}  // namespace export_zoo
