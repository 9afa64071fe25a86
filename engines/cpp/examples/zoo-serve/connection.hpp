// A client's connection, with limits on the time and the bytes that its request may take.
#pragma once

#include <array>
#include <chrono>
#include <functional>
#include <string>

#include <httplib.h>

namespace zoo_serve {

using Clock = std::chrono::steady_clock;

inline constexpr std::size_t kMostHeaderBytes = 64 << 10;
inline constexpr auto kLinger = std::chrono::milliseconds(500);

class Connection : public httplib::Stream {
 public:
  // Reads until `patience` has passed. Each write may wait as long. Does not close the socket. The client connected when
  // `Pool` got its connection, or now.
  Connection(socket_t socket, Clock::duration patience);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() override;

  // The connection whose request this thread serves; nullptr outside of one.
  [[nodiscard]] static Connection* current() noexcept;

  // The request's body may take until then, and as many bytes.
  void read_body(std::size_t bytes, Clock::time_point until) {
    read_until_ = until;
    left_ = bytes;
  }

  // The request has been read to its end.
  void read_all() noexcept { whole_ = true; }

  void refuse() noexcept { refused_ = true; }

  // Ends the answer, and takes what a client still sends of a request that was refused before its end, for half a second
  // at most. Closed at once, the connection would be reset, and the client lose the answer (RFC 9112, section 9.6).
  void end();

  // Whether the client has closed its side: nobody waits for the answer.
  [[nodiscard]] bool gone() const;

  // When the client connected: a connection may have waited for a thread.
  [[nodiscard]] Clock::time_point start() const noexcept { return start_; }

  [[nodiscard]] bool is_readable() const override;
  [[nodiscard]] bool is_writable() const override;
  ssize_t read(char* to, std::size_t size) override;
  ssize_t write(const char* from, std::size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  [[nodiscard]] socket_t socket() const override { return socket_; }

 private:
  [[nodiscard]] bool wait_for(short event, Clock::time_point until) const;

  socket_t socket_;
  Clock::duration patience_;
  Clock::time_point start_;
  Clock::time_point read_until_;
  std::array<char, 16384> buffer_{};  // httplib reads headers byte by byte
  std::size_t left_ = kMostHeaderBytes;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  bool whole_ = false;
  bool refused_ = false;
};

// Threads that serve connections; more connections wait.
class Pool : public httplib::ThreadPool {
 public:
  using httplib::ThreadPool::ThreadPool;
  void enqueue(std::function<void()> serve) override;
};

// Serves one request per connection through `Connection`.
class Server : public httplib::Server {
 public:
  explicit Server(std::chrono::seconds patience) : patience_(patience) {}

  // httplib lets five connections wait. In a larger burst, connections would be reset.
  void widen() { ::listen(svr_sock_, SOMAXCONN); }

 private:
  bool process_and_close_socket(socket_t socket) override;

  std::chrono::seconds patience_;
};

}  // namespace zoo_serve
