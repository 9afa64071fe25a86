#include <export_zoo/postprocess.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace export_zoo {

std::vector<float> softmax(std::span<const float> logits) {
  std::vector<float> found(logits.begin(), logits.end());
  if (found.empty()) return found;
  if (std::any_of(found.begin(), found.end(), [](float value) { return std::isnan(value); })) {
    std::fill(found.begin(), found.end(), std::numeric_limits<float>::quiet_NaN());
    return found;
  }
  const float largest = *std::max_element(found.begin(), found.end());
  if (std::isinf(largest)) {  // inf - inf is not a number: the largest share it among themselves
    const auto share = 1 / static_cast<float>(std::count(found.begin(), found.end(), largest));
    for (auto& value : found) value = value == largest ? share : 0;
    return found;
  }
  double sum = 0;
  for (auto& value : found) {
    value = std::exp(value - largest);
    sum += value;
  }
  for (auto& value : found) value = static_cast<float>(value / sum);
  return found;
}

std::vector<float> sigmoid(std::span<const float> logits) {
  std::vector<float> found(logits.begin(), logits.end());
  for (auto& value : found) value = static_cast<float>(1 / (1 + std::exp(-static_cast<double>(value))));
  return found;
}

std::vector<float> probabilities(const Port& output, std::span<const float> values) {
  if (output.scores == "logits") {
    if (output.task == "classification") return softmax(values);
    if (output.task == "binary" || output.task == "multilabel") return sigmoid(values);
  }
  return {values.begin(), values.end()};
}

float threshold(const Port& output) noexcept { return output.scores == "probabilities" ? 0.5F : 0.0F; }

std::vector<Class> top_k(std::span<const float> scores, std::size_t k) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  k = std::min(k, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(),
                    [&](std::size_t a, std::size_t b) {
                      if (std::isnan(scores[a]) || std::isnan(scores[b])) {  // after all numbers
                        return std::isnan(scores[a]) == std::isnan(scores[b]) ? a < b : std::isnan(scores[b]);
                      }
                      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                    });
  std::vector<Class> found;
  for (std::size_t i = 0; i < k; ++i) found.push_back({order[i], scores[order[i]]});
  return found;
}

}  // namespace export_zoo
