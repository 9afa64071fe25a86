// Each test is a process of its own: once a runtime is loaded, it stays.

#include <gmock/gmock.h>

#include <export_zoo/engine.hpp>

#include "support.hpp"

namespace {

namespace ez = export_zoo;
namespace fs = std::filesystem;
using testing::HasSubstr;

class MissingRuntime : public support::WithBundles {};

TEST_F(MissingRuntime, IsToldWithWhatWasTriedAndCanBeGivenAfterwards) {
  const auto bundle = support::bundles() / "resnet18.bundle";
  const std::string right = std::getenv("EXPORT_ZOO_ONNXRUNTIME");
  setenv("EXPORT_ZOO_ONNXRUNTIME", "/nowhere/libonnxruntime.so", 1);
  auto [code, message] = support::error_of([&] { static_cast<void>(ez::Engine::load(bundle)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_missing);
  EXPECT_THAT(message, HasSubstr("/nowhere/libonnxruntime.so"));
  EXPECT_THAT(message, HasSubstr("EXPORT_ZOO_ONNXRUNTIME"));

  ez::Options options;
  options.onnxruntime = "libm.so.6";  // a library, but another one
  std::tie(code, message) = support::error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_version);
  EXPECT_THAT(message, HasSubstr("OrtGetApiBase"));

  options.onnxruntime = right;
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle, options)));
  options.onnxruntime = "/elsewhere/libonnxruntime.so";
  std::tie(code, message) = support::error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_version) << "two in one process";
}

TEST_F(MissingRuntime, IsFoundByItsDirectory) {
  ez::Options options;
  options.onnxruntime = support::bundles();
  const auto absent = support::error_of([&] { static_cast<void>(ez::Engine::load(support::bundles() / "resnet18.bundle", options)); });
  EXPECT_EQ(absent.first, ez::ErrorCode::backend_missing);
  EXPECT_THAT(absent.second, HasSubstr("there is no libonnxruntime.so in it"));
  options.onnxruntime = fs::path(std::getenv("EXPORT_ZOO_ONNXRUNTIME")).parent_path();
  const auto bundle = support::bundles() / "resnet18.bundle";
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle, options)));
  EXPECT_NO_THROW(static_cast<void>(ez::Engine::load(bundle, options))) << "the same one again";
  options.onnxruntime = support::bundles();  // a directory without it
  const auto [code, message] = support::error_of([&] { static_cast<void>(ez::Engine::load(bundle, options)); });
  EXPECT_EQ(code, ez::ErrorCode::backend_version);
  EXPECT_THAT(message, HasSubstr("already runs ONNX Runtime"));
}

}  // namespace
