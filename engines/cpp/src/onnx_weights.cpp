#include "onnx_weights.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

namespace export_zoo::detail {

namespace {

// Messages of onnx.proto on the way to tensors, and their fields that are such messages.
enum class Message { model, graph, node, attribute, function, sparse_tensor, tensor, external_data };

struct Field {
  Message of;
  std::uint64_t number;
  Message is;
};

constexpr std::array kFields{
    Field{Message::model, 7, Message::graph},
    Field{Message::model, 25, Message::function},
    Field{Message::graph, 1, Message::node},
    Field{Message::graph, 5, Message::tensor},
    Field{Message::graph, 15, Message::sparse_tensor},
    Field{Message::node, 5, Message::attribute},
    Field{Message::attribute, 5, Message::tensor},
    Field{Message::attribute, 6, Message::graph},
    Field{Message::attribute, 10, Message::tensor},
    Field{Message::attribute, 11, Message::graph},
    Field{Message::attribute, 22, Message::sparse_tensor},
    Field{Message::attribute, 23, Message::sparse_tensor},
    Field{Message::function, 7, Message::node},
    Field{Message::function, 11, Message::attribute},
    Field{Message::sparse_tensor, 1, Message::tensor},
    Field{Message::sparse_tensor, 2, Message::tensor},
    Field{Message::tensor, 13, Message::external_data},
};
constexpr int kMostDeep = 64;
constexpr std::uint64_t kMostText = 1 << 16;

// Reads protobuf's wire format, and of it only what leads to external data: weights are skipped.
class Reader {
 public:
  explicit Reader(const Source& graph) : file_(graph.open()), size_(graph.size().value_or(0)) {}

  std::set<std::string> found() {
    walk(Message::model, size_, 0);
    return std::move(found_);
  }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("is no ONNX file"); }

  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = file_->get();
      if (byte == std::istream::traits_type::eof()) fail();
      ++at_;
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if ((byte & 0x80) == 0) return value;
    }
    fail();
  }

  void skip(std::uint64_t bytes, std::uint64_t end) {
    if (bytes > end - at_) fail();
    at_ += bytes;
    constexpr std::uint64_t kBuffered = 4096;  // a seek empties the buffer
    if (bytes < kBuffered) {
      file_->ignore(static_cast<std::streamsize>(bytes));
    } else {
      file_->seekg(static_cast<std::streamoff>(at_));
    }
  }

  // Calls take(field, type, length) for each field; length is of text and messages alone.
  template <typename Take>
  void fields(std::uint64_t end, Take take) {
    while (at_ < end) {
      const auto tag = varint();
      switch (tag & 7) {
        case 0: varint(); break;
        case 1: skip(8, end); break;
        case 5: skip(4, end); break;
        case 2: {
          const auto length = varint();
          if (at_ > end || length > end - at_) fail();
          take(tag >> 3, length);
          break;
        }
        default: fail();
      }
    }
    if (at_ != end) fail();
  }

  void walk(Message message, std::uint64_t end, int depth) {
    if (depth > kMostDeep) fail();
    if (message == Message::external_data) return read_entry(end);
    fields(end, [&](std::uint64_t number, std::uint64_t length) {
      const auto* known = std::find_if(kFields.begin(), kFields.end(), [&](const Field& field) {
        return field.of == message && field.number == number;
      });
      if (known == kFields.end()) return skip(length, end);
      walk(known->is, at_ + length, depth + 1);
    });
  }

  void read_entry(std::uint64_t end) {
    std::string key;
    std::string value;
    fields(end, [&](std::uint64_t number, std::uint64_t length) {
      if (length > kMostText) fail();
      std::string text(length, '\0');
      if (!file_->read(text.data(), static_cast<std::streamsize>(length))) fail();
      at_ += length;
      (number == 1 ? key : value) = text;
    });
    if (key == "location") found_.insert(value);
  }

  std::unique_ptr<std::istream> file_;
  std::uint64_t size_;
  std::uint64_t at_ = 0;
  std::set<std::string> found_;
};

}  // namespace

std::set<std::string> weight_files(const Source& graph) { return Reader(graph).found(); }

}  // namespace export_zoo::detail
