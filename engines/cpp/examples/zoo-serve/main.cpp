// zoo-serve: a small HTTP service, an example to start from.
//
//   POST /v1/predict   a JPEG or PNG as the body -> classes (or what the output means) as JSON; ?top=5, ?logits=1
//   GET  /healthz      200 while it serves
//   GET  /metrics      for Prometheus

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <map>
#include <mutex>
#include <semaphore>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <httplib.h>
#include <nlohmann/json.hpp>

#include <export_zoo/engine.hpp>
#include <export_zoo/error.hpp>
#include <export_zoo/postprocess.hpp>
#include <export_zoo/preprocess.hpp>
#include <export_zoo/version.h>

#include "batcher.hpp"
#include "connection.hpp"
#include "prediction.hpp"
#include "setup.hpp"

namespace {

namespace ez = export_zoo;
using zoo_serve::Clock;
using zoo_serve::Connection;

struct Settings {
  std::string bundle;
  std::string host = "127.0.0.1";
  int port = 8080;
  ez::Options engine;
  int streams = 0;
  std::size_t batch = 0;
  int wait_us = 2000;
  std::size_t queue = 256;
  std::size_t max_bytes = 10 << 20;
  std::uint64_t max_pixels = 50'000'000;
  std::size_t threads = 256;
  int timeout_s = 5;
  int deadline_ms = 10000;
  int grace_s = 30;
  int admin_port = 0;
};

// Metrics that /metrics reports.
class Metrics {
 public:
  void answered(int status, Clock::duration time) {
    const std::lock_guard lock(mutex_);
    ++answers_[status];
    const double seconds = std::chrono::duration<double>(time).count();
    seconds_ += seconds;
    for (std::size_t i = 0; i < kBounds.size(); ++i) counts_.at(i) += seconds <= kBounds.at(i);
    ++count_;
  }

  std::string text(const zoo_serve::Batcher& batcher) const {
    const std::lock_guard lock(mutex_);
    std::ostringstream out;
    out << "# TYPE zoo_serve_requests_total counter\n";
    for (const auto& [status, count] : answers_) {
      out << "zoo_serve_requests_total{status=\"" << status << "\"} " << count << '\n';
    }
    out << "# TYPE zoo_serve_request_seconds histogram\n";
    for (std::size_t i = 0; i < kBounds.size(); ++i) {
      out << "zoo_serve_request_seconds_bucket{le=\"" << kBounds.at(i) << "\"} " << counts_.at(i) << '\n';
    }
    out << "zoo_serve_request_seconds_bucket{le=\"+Inf\"} " << count_ << '\n';
    out << std::setprecision(17);  // for the sum, which grows; the labels above stay 0.1, not 0.10000000000000001
    out << "zoo_serve_request_seconds_sum " << seconds_ << "\nzoo_serve_request_seconds_count " << count_ << '\n';
    out << "# TYPE zoo_serve_batches_total counter\nzoo_serve_batches_total " << batcher.batches() << '\n';
    out << "# TYPE zoo_serve_images_total counter\nzoo_serve_images_total " << batcher.images() << '\n';
    out << "# TYPE zoo_serve_dropped_total counter\nzoo_serve_dropped_total " << batcher.dropped() << '\n';
    out << "# TYPE zoo_serve_expected_seconds gauge\nzoo_serve_expected_seconds "
        << std::chrono::duration<double>(batcher.expected()).count() << '\n';
    out << "# TYPE zoo_serve_waiting gauge\nzoo_serve_waiting " << batcher.waiting() << '\n';
    return out.str();
  }

 private:
  static constexpr std::array<double, 9> kBounds{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5};
  mutable std::mutex mutex_;
  std::map<int, std::uint64_t> answers_;
  std::array<std::uint64_t, kBounds.size()> counts_{};
  std::uint64_t count_ = 0;
  double seconds_ = 0;
};

// Prevents a second server on the same port, which httplib allows.
void own_port(socket_t socket) {
  const int yes = 1;
  static_cast<void>(setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)));
}

struct BadQuery : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Service {
 public:
  explicit Service(const Settings& settings)
      : settings_(settings),
        limits_(limits()),
        setup_(zoo_serve::set_up(settings.bundle, settings.engine, settings.streams, limits_.batch)),
        engine_(setup_.engine),
        preprocess_(engine_.metadata().preprocess),
        batcher_(std::move(setup_.contexts), limits_),
        decoders_(ez::usable_cores()),
        server_(std::chrono::seconds(settings.timeout_s)),
        admin_(std::chrono::seconds(settings.timeout_s)) {
    if (!prediction::is_of_image(engine_.metadata().output)) {
      throw ez::Error(ez::ErrorCode::shape, engine_.metadata().model + " gives values for each pixel or token, this "
                                                "service only values of an image: use the library");
    }
    server_.new_task_queue = [this] { return new zoo_serve::Pool(settings_.threads); };
    server_.set_payload_max_length(settings.max_bytes);
    // One request per connection: otherwise, httplib would read the rest of a refused body as the next request.
    server_.set_keep_alive_max_count(1);
    server_.set_tcp_nodelay(true);  // otherwise, each answer's body waits 40 ms for the ACK of its headers
    server_.set_socket_options(own_port);
    server_.set_pre_routing_handler([this](const auto& request, auto& response) { return admit(request, response); });
    // Before the client sends a body that would be refused.
    server_.set_expect_100_continue_handler([this](const auto& request, auto& response) {
      const bool refused = admit(request, response) == httplib::Server::HandlerResponse::Handled;
      return refused ? response.status : 100;
    });
    server_.set_exception_handler([this](const auto&, auto& response, const std::exception_ptr&) {
      response.status = 500;
      reply(response, {{"error", "unexpected"}});
      metrics_.answered(500, {});
    });
    server_.set_read_timeout(settings.timeout_s);
    server_.set_write_timeout(settings.timeout_s);
    // With a content reader: otherwise, httplib would cut a body that curl labels as a form at 8 KiB.
    server_.Post("/v1/predict", [this](const httplib::Request& request, httplib::Response& response,
                                       const httplib::ContentReader& reader) { predict(request, response, reader); });
    server_.set_error_handler([](const auto&, auto& response) {
      Connection::current()->refuse();
      if (response.body.empty()) reply(response, {{"error", "HTTP " + std::to_string(response.status)}});
    });
    tell(server_);
    tell(admin_);
    admin_.set_pre_routing_handler([](const auto& request, auto& response) {
      whole(request);
      if (reads(request)) return httplib::Server::HandlerResponse::Unhandled;
      response.status = 405;
      response.set_header("Allow", "GET, HEAD");
      reply(response, {{"error", request.method + ": only GET and HEAD are served on --admin-port"}});
      return httplib::Server::HandlerResponse::Handled;
    });
    admin_.set_keep_alive_max_count(1);
    admin_.set_tcp_nodelay(true);
    admin_.set_socket_options(own_port);
  }

  // Serves until stop() is called. Returns false if the port is not available.
  bool run() {
    const bool served = serve();
    ended_ = true;
    return served;
  }

  // Lets waiting requests finish. If they take longer than --grace seconds, or one of `signals` comes again, ends the
  // process with exit code 1. One that comes within a second is taken for the first.
  void stop(const sigset_t& signals) {
    stopping_ = true;
    const auto first = Clock::now();
    const auto deadline = first + std::chrono::seconds(settings_.grace_s) + kEnd;
    while (!ended_) {
      server_.stop();  // does nothing while the server does not run yet
      if (Clock::now() > deadline) {
        std::cerr << "zoo-serve: requests did not end within " << settings_.grace_s << " s\n";
        std::_Exit(1);
      }
      const timespec pause{0, 10'000'000};
      // `timeout` of coreutils, and others, signal the process and then its group.
      if (sigtimedwait(&signals, nullptr, &pause) > 0 && Clock::now() - first > kSameSignal) {
        std::cerr << "zoo-serve: ended by a second signal, before requests were answered\n";
        std::_Exit(1);
      }
    }
  }

 private:
  bool serve() {
    if (!server_.bind_to_port(settings_.host.c_str(), settings_.port)) return false;
    server_.widen();
    std::thread admin;
    if (settings_.admin_port > 0) {
      if (!admin_.bind_to_port(settings_.host.c_str(), settings_.admin_port)) return false;
      admin = std::thread([this] {
        admin_.listen_after_bind();
        admin_ended_ = true;
      });
    }
    const auto& info = engine_.info();
    std::cout << "zoo-serve: " << engine_.metadata().model << ' ' << info.name << " (" << name(info.state) << ", "
              << engine_.backend() << "; " << setup_.why << "; " << setup_.told << ") on http://" << settings_.host
              << ':' << settings_.port << std::endl;
    const bool served = stopping_ || server_.listen_after_bind();
    if (admin.joinable()) {
      while (!admin_ended_) {
        admin_.stop();  // does nothing while it does not run yet
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      admin.join();
    }
    return served;
  }

  static void reply(httplib::Response& response, const nlohmann::json& document) {
    response.set_content(document.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n",
                         "application/json");
  }

  void tell(httplib::Server& server) {
    server.Get("/healthz", [this](const auto&, auto& response) {
      response.status = stopping_ ? 503 : 200;
      reply(response, {{"status", stopping_ ? "stopping" : "ok"},
                       {"model", engine_.metadata().model},
                       {"engine", engine_.info().name},
                       {"state", name(engine_.info().state)},
                       {"backend", engine_.backend()},
                       {"setup", setup_.told},
                       {"why", setup_.why}});
    });
    server.Get("/metrics", [this](const auto&, auto& response) {
      response.set_content(metrics_.text(batcher_), "text/plain; version=0.0.4");
    });
  }

  void refuse(httplib::Response& response, int status, const std::string& why) {
    response.status = status;
    reply(response, {{"error", why}});
    metrics_.answered(status, {});
  }

  // Ignores a Range header: httplib would cut answers, of POST and errors, too, into as many parts as it lists. Servers
  // may ignore it (RFC 9110, 14.2).
  static void whole(const httplib::Request& request) { const_cast<httplib::Request&>(request).ranges.clear(); }

  // Whether the request only reads. httplib does not read the body of such a request.
  static bool reads(const httplib::Request& request) { return request.method == "GET" || request.method == "HEAD"; }

  // Refuses requests by their headers. Otherwise, httplib would read the body to its end first. Except with our own
  // reader, it would read it into memory, without a limit if the body is chunked or compressed.
  httplib::Server::HandlerResponse admit(const httplib::Request& request, httplib::Response& response) {
    using Handled = httplib::Server::HandlerResponse;
    whole(request);
    const bool predicts = request.path == "/v1/predict";
    if (!predicts && request.path != "/healthz" && request.path != "/metrics") {
      refuse(response, 404, request.path + ": POST the image to /v1/predict");
      return Handled::Handled;
    }
    if (predicts ? request.method != "POST" : !reads(request)) {
      response.set_header("Allow", predicts ? "POST" : "GET, HEAD");
      refuse(response, 405, request.method + ": POST an image to /v1/predict; GET /healthz and /metrics");
      return Handled::Handled;
    }
    if (!predicts) return Handled::Unhandled;
    if (stopping_) {
      response.set_header("Retry-After", "1");
      refuse(response, 503, "shutting down");
      return Handled::Handled;
    }
    // Two lengths, or a length and chunks, hide a second request in a body from one of two servers.
    const bool chunked = request.has_header("Transfer-Encoding");
    if (request.get_header_value_count("Content-Length") + request.get_header_value_count("Transfer-Encoding") > 1) {
      refuse(response, 400, "more than one Content-Length or Transfer-Encoding");
      return Handled::Handled;
    }
    if (chunked && lower(request.get_header_value("Transfer-Encoding")) != "chunked") {
      refuse(response, 501, "Transfer-Encoding: only chunked is known");
      return Handled::Handled;
    }
    if (request.has_header("Content-Encoding") && lower(request.get_header_value("Content-Encoding")) != "identity") {
      response.set_header("Accept-Encoding", "identity");
      refuse(response, 415, "Content-Encoding: send the image as it is; JPEG and PNG are compressed");
      return Handled::Handled;
    }
    if (request.is_multipart_form_data()) {  // httplib would throw on a chunked one
      refuse(response, 415, "forms are not supported: send the image itself, curl --data-binary @cat.jpg");
      return Handled::Handled;
    }
    const auto length = request.get_header_value("Content-Length");
    if (length.empty()) {
      if (chunked) return Handled::Unhandled;
      refuse(response, 411, "no body: send the image itself, curl --data-binary @cat.jpg");
      return Handled::Handled;
    }
    std::uint64_t size = 0;
    const auto [end, failed] = std::from_chars(length.data(), length.data() + length.size(), size);
    if (end != length.data() + length.size() || (failed != std::errc() && failed != std::errc::result_out_of_range)) {
      refuse(response, 400, "Content-Length: " + length + " is not a length");
      return Handled::Handled;
    }
    if (failed != std::errc() || size > settings_.max_bytes) {
      refuse(response, 413, "the body has more than " + std::to_string(settings_.max_bytes) + " bytes (--max-bytes)");
      return Handled::Handled;
    }
    return Handled::Unhandled;
  }

  zoo_serve::Limits limits() const {
    const auto metadata = ez::read_metadata(settings_.bundle);
    const auto most = static_cast<std::size_t>(metadata.batch_max);
    const auto wanted = settings_.batch > 0 ? settings_.batch : static_cast<std::size_t>(metadata.batch_opt);
    if (wanted > most || metadata.batch_min > 1) {
      throw ez::Error(ez::ErrorCode::shape, "--max-batch " + std::to_string(wanted) + ": the bundle was verified at " +
                                                std::to_string(metadata.batch_min) + " to " + std::to_string(most) +
                                                "; serving needs 1, too: give fewer, or export with --batch 1:OPT:MAX");
    }
    return {wanted, std::chrono::microseconds(settings_.wait_us), settings_.queue};
  }

  // Until when the client waits: X-Request-Timeout-Ms after it connected, at most --deadline.
  zoo_serve::Patience patience_of(const httplib::Request& request, const Connection& connection) const {
    int milliseconds = settings_.deadline_ms;
    if (request.get_header_value_count(kTimeout) > 1) throw BadQuery(std::string("more than one ") + kTimeout);
    if (request.has_header(kTimeout)) {
      const auto text = request.get_header_value(kTimeout);
      std::uint64_t given = 0;
      const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), given);
      const bool huge = failed == std::errc::result_out_of_range;
      if (end != text.data() + text.size() || (failed != std::errc() && !huge) || (given < 1 && !huge)) {
        throw BadQuery(std::string(kTimeout) + ": " + text + " is not a number of milliseconds");
      }
      if (!huge) milliseconds = static_cast<int>(std::min<std::uint64_t>(milliseconds, given));
    }
    return {connection.start() + std::chrono::milliseconds(milliseconds), [&connection] { return connection.gone(); }};
  }

  void predict(const httplib::Request& request, httplib::Response& response, const httplib::ContentReader& reader) {
    std::string body;
    auto& connection = *Connection::current();
    zoo_serve::Patience patience;
    std::size_t top = 0;
    try {
      patience = patience_of(request, connection);
      top = wanted(request);
    } catch (const BadQuery& error) {  // before the body is read
      response.status = 400;
      reply(response, {{"error", error.what()}, {"code", "query"}});
      metrics_.answered(400, {});
      return;
    }
    const auto deadline = std::min(Clock::now() + std::chrono::seconds(settings_.timeout_s), patience.deadline);
    // Chunks have lines of their own, of any length.
    connection.read_body(2 * settings_.max_bytes + zoo_serve::kMostHeaderBytes, deadline);
    const bool all = reader([&](const char* data, std::size_t size) {
      body.append(data, size);
      return body.size() <= settings_.max_bytes && Clock::now() < deadline;
    });
    const auto start = Clock::now();
    if (!all) {  // too large, too slow, or gone
      // httplib has set 413, or 400 for everything else.
      if (body.size() > settings_.max_bytes) response.status = 413;
      if (response.status != 413) response.status = start >= deadline ? 408 : 400;
      reply(response, {{"error", "HTTP " + std::to_string(response.status)}});
      metrics_.answered(response.status, Clock::now() - start);
      return;
    }
    connection.read_all();
    try {
      const bool with_logits = request.get_param_value("logits") == "1";
      zoo_serve::Batcher::Coming coming(batcher_, patience);
      const auto logits = coming.submit(prepare(body, patience)).get();
      if (Clock::now() > patience.deadline) throw zoo_serve::Late("the answer came after the deadline");
      reply(response, answer(logits, top, with_logits));
    } catch (const zoo_serve::Busy& error) {
      response.status = 503;
      response.set_header("Retry-After", "1");
      reply(response, {{"error", error.what()}});
    } catch (const zoo_serve::Late& error) {
      response.status = 504;
      reply(response, {{"error", error.what()}, {"code", "deadline"}});
    } catch (const ez::Error& error) {
      response.status = error.code() == ez::ErrorCode::image ? 400 : 500;
      reply(response, {{"error", error.what()}, {"code", name(error.code())}});
    } catch (const std::bad_alloc&) {
      response.status = 503;
      response.set_header("Retry-After", "1");
      reply(response, {{"error", "out of memory"}});
    }
    metrics_.answered(response.status == -1 ? 200 : response.status, Clock::now() - start);
  }

  // Decodes and preprocesses, at most one image per core at once: more would not be faster, and each takes memory.
  // Throws Late if nobody waits for it by the time that it is its turn.
  std::vector<float> prepare(const std::string& body, const zoo_serve::Patience& patience) {
    std::vector<float> input(preprocess_.size());
    if (!decoders_.try_acquire_until(patience.deadline)) throw zoo_serve::Late("the answer would come after the deadline");
    try {
      patience.check();
      preprocess_(ez::decode(std::as_bytes(std::span(body)), settings_.max_pixels), input);
    } catch (...) {
      decoders_.release();
      throw;
    }
    decoders_.release();
    return input;
  }

  static std::size_t wanted(const httplib::Request& request) {
    std::size_t top = 5;
    if (!request.has_param("top")) return top;
    const auto text = request.get_param_value("top");
    const auto* end = text.data() + text.size();
    const auto [read, failed] = std::from_chars(text.data(), end, top);
    if (read != end || failed != std::errc() || top < 1) throw BadQuery("top=" + text + " is not a number of classes");
    return top;
  }

  nlohmann::json answer(const std::vector<float>& logits, std::size_t top, bool with_logits) const {
    auto document = prediction::of_image(engine_.metadata(), logits, top);
    document["engine"] = engine_.info().name;
    if (with_logits) document["logits"] = logits;
    return document;
  }

  static std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
  }

  static constexpr auto kEnd = std::chrono::milliseconds(200);  // that an idle server takes to end
  static constexpr auto kSameSignal = std::chrono::seconds(1);
  static constexpr const char* kTimeout = "X-Request-Timeout-Ms";

  Settings settings_;
  zoo_serve::Limits limits_;
  zoo_serve::Setup setup_;
  ez::Engine engine_;
  ez::Preprocessor preprocess_;
  Metrics metrics_;
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> ended_ = false;
  std::atomic<bool> admin_ended_ = false;
  zoo_serve::Batcher batcher_;
  std::counting_semaphore<> decoders_;
  zoo_serve::Server server_;
  zoo_serve::Server admin_;
};

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Serve an engine of a bundle over HTTP.", "zoo-serve");
  app.add_option("bundle", settings.bundle, "Directory that `export-zoo export` wrote")->required();
  app.add_option("--host", settings.host, "Address to listen on")->capture_default_str();
  app.add_option("--port", settings.port, "Port to listen on")->check(CLI::Range(1, 65535))->capture_default_str();
  app.add_option("--engine", settings.engine.engine, "Name, such as onnxruntime-int8 (default: the fastest verified)");
  app.set_version_flag("--version", EXPORT_ZOO_VERSION);
  app.add_option("--onnxruntime", settings.engine.onnxruntime, "libonnxruntime.so.1 to load (or $EXPORT_ZOO_ONNXRUNTIME)");
  app.add_option("--openvino", settings.engine.openvino, "libopenvino_c.so to load, or its directory (or $EXPORT_ZOO_OPENVINO)");
  app.add_option("--tensorrt", settings.engine.tensorrt, "libnvinfer or libtensorrt_rtx to load");
  const std::map<std::string, ez::State> states{
      {"built", ez::State::built}, {"graph", ez::State::graph_verified}, {"verified", ez::State::verified}};
  app.add_option("--state", settings.engine.least, "Weakest state to load: built, graph (default) or verified")
      ->transform(CLI::CheckedTransformer(states));
  app.add_option("--streams", settings.streams,
                 "Batches that ONNX Runtime and OpenVINO compute at once (default: what is fastest here, if "
                 "--engine-threads is not given, either)")
      ->check(CLI::Range(1, 1024));
  app.add_option("--engine-threads,--ort-threads", settings.engine.threads,
                 "Threads of each stream (default: the cores that this process may use, shared by the streams)")
      ->check(CLI::Range(0, 1024));
  app.add_flag("!--no-measure", settings.engine.measure, "Time nothing at start: neither engines that no machine like this one timed, nor streams");
  app.add_option("--max-batch", settings.batch, "Maximum batch size (default: the bundle's optimum)")
      ->check(CLI::Range(1, 65536));
  app.add_option("--max-wait-us", settings.wait_us, "Maximum microseconds that a request waits for others")
      ->check(CLI::Range(0, 10000000))
      ->capture_default_str();
  app.add_option("--queue", settings.queue, "Maximum number of waiting requests")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--max-bytes", settings.max_bytes, "Maximum size of a body, in bytes")
      ->check(CLI::Range(std::uint64_t{1}, std::uint64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--max-pixels", settings.max_pixels, "Maximum size of an image, in pixels")
      ->check(CLI::Range(std::uint64_t{1}, std::uint64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--threads", settings.threads, "Number of connections served at once; more wait")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  app.add_option("--grace", settings.grace_s, "Seconds to finish requests after SIGTERM")
      ->check(CLI::Range(0, 3600))
      ->capture_default_str();
  app.add_option("--admin-port", settings.admin_port, "Port for /healthz and /metrics alone, which clients cannot occupy")
      ->check(CLI::Range(1, 65535));
  app.add_option("--deadline", settings.deadline_ms,
                 "Maximum milliseconds until an answer; a request may ask for fewer by X-Request-Timeout-Ms")
      ->check(CLI::Range(1, 3600000))
      ->capture_default_str();
  app.add_option("--timeout", settings.timeout_s, "Seconds in which a client must send its headers, and again its body")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  // One thread waits for signals. All others inherit the mask.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  try {
    Service service(settings);
    std::thread waiter([&] {
      int signal = 0;
      sigwait(&signals, &signal);
      service.stop(signals);
    });
    const bool served = service.run();
    if (!served) kill(getpid(), SIGTERM);  // wakes the waiter
    waiter.join();
    if (!served) {
      std::cerr << "zoo-serve: cannot listen on " << settings.host << ':' << settings.port
                << (settings.admin_port > 0 ? ", or on --admin-port" : "")
                << ": is the port taken? Give another --port, or an address of this machine as --host\n";
      return 1;
    }
  } catch (const ez::Error& error) {
    std::cerr << "zoo-serve: " << error.what() << " (" << name(error.code()) << ")\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "zoo-serve: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
