// The meaning of an image's outputs, as JSON: shared by zoo-infer and zoo-serve.

#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <export_zoo/metadata.hpp>
#include <export_zoo/postprocess.hpp>

namespace prediction {

// Whether an image has one vector of values, not one for each pixel or token.
inline bool is_of_image(const export_zoo::Port& output) {
  return std::all_of(output.shape.begin() + std::min<std::ptrdiff_t>(2, std::ssize(output.shape)), output.shape.end(),
                     [](auto size) { return size == 1; });
}

inline nlohmann::json class_of(std::size_t index, float probability, const std::vector<std::string>& labels) {
  const auto label = index < labels.size() ? labels[index] : std::to_string(index);
  return {{"index", index}, {"label", label}, {"probability", probability}};
}

// classification: the `top` best classes. multilabel: the classes that are a yes, best first. binary: whether it is a
// yes. Other tasks: the values.
inline nlohmann::json of_image(const export_zoo::Metadata& metadata, std::span<const float> values, std::size_t top) {
  namespace ez = export_zoo;
  const auto& output = metadata.output;
  const auto& labels = metadata.labels;
  nlohmann::json found;
  if (output.task == "binary") {
    const bool yes = values.front() > ez::threshold(output);
    found["positive"] = yes;
    found["probability"] = ez::probabilities(output, values).front();
    if (labels.size() == 2) found["label"] = labels[yes ? 1 : 0];
  } else if (output.task == "classification" || output.task == "multilabel") {
    const bool several = output.task == "multilabel";
    const auto scores = ez::probabilities(output, values);
    found["classes"] = nlohmann::json::array();
    for (const auto& [index, score] : ez::top_k(scores, several ? scores.size() : top)) {
      if (several && !(values[index] > ez::threshold(output))) continue;
      found["classes"].push_back(class_of(index, score, labels));
    }
  } else {
    found[output.task == "embedding" ? "embedding" : "values"] = values;
  }
  return found;
}

}  // namespace prediction
