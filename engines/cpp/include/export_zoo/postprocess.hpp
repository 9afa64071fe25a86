#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <export_zoo/metadata.hpp>
#include <export_zoo/visibility.hpp>

namespace export_zoo {

/// Probabilities of one image's logits; they add up to 1.
[[nodiscard]] EXPORT_ZOO_API std::vector<float> softmax(std::span<const float> logits);

/// The same for values that decide each for itself (binary, multilabel): 1 / (1 + exp(-x)).
[[nodiscard]] EXPORT_ZOO_API std::vector<float> sigmoid(std::span<const float> logits);

/// Probabilities of one image's values: softmax or sigmoid of logits, as `output.task` says. Probabilities, and the
/// values of regressions and embeddings, are returned as they are.
[[nodiscard]] EXPORT_ZOO_API std::vector<float> probabilities(const Port& output, std::span<const float> values);

/// Values above it are a yes, for binary and multilabel: 0.5 if the output's scores are probabilities, otherwise 0.
[[nodiscard]] EXPORT_ZOO_API float threshold(const Port& output) noexcept;

struct Class {
  std::size_t index;
  float score;
};

/// The k largest scores of one image, largest first. Equal scores are ordered by index; NaN comes last.
[[nodiscard]] EXPORT_ZOO_API std::vector<Class> top_k(std::span<const float> scores, std::size_t k);

}  // namespace export_zoo
