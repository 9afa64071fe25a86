#include "connection.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace zoo_serve {

namespace {

thread_local Connection* served = nullptr;
thread_local std::optional<Clock::time_point> connected;  // the client whose connection this thread takes next

void address(int (*of)(int, sockaddr*, socklen_t*), int socket, std::string& ip, int& port) {
  sockaddr_storage found{};
  socklen_t size = sizeof found;
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (of(socket, reinterpret_cast<sockaddr*>(&found), &size) != 0) return;
  if (found.ss_family == AF_INET) {
    const auto* four = reinterpret_cast<const sockaddr_in*>(&found);
    inet_ntop(AF_INET, &four->sin_addr, text.data(), text.size());
    port = ntohs(four->sin_port);
  } else if (found.ss_family == AF_INET6) {
    const auto* six = reinterpret_cast<const sockaddr_in6*>(&found);
    inet_ntop(AF_INET6, &six->sin6_addr, text.data(), text.size());
    port = ntohs(six->sin6_port);
  }
  ip = text.data();
}

}  // namespace

Connection::Connection(socket_t socket, Clock::duration patience)
    : socket_(socket),
      patience_(patience),
      start_(connected.value_or(Clock::now())),
      read_until_(Clock::now() + patience) {
  served = this;
}

Connection::~Connection() { served = nullptr; }

Connection* Connection::current() noexcept { return served; }

bool Connection::wait_for(short event, Clock::time_point until) const {
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
    if (left <= 0) return false;
    pollfd asked{socket_, event, 0};
    const int found = poll(&asked, 1, static_cast<int>(left));
    if (found > 0) return true;
    if (found < 0 && errno != EINTR) return false;
  }
}

bool Connection::gone() const {
  pollfd asked{socket_, POLLRDHUP, 0};
  return poll(&asked, 1, 0) > 0 && (asked.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

bool Connection::is_readable() const { return begin_ < end_ || wait_for(POLLIN, read_until_); }

bool Connection::is_writable() const { return wait_for(POLLOUT, Clock::now() + patience_); }

ssize_t Connection::read(char* to, std::size_t size) {
  if (begin_ == end_) {
    if (left_ == 0 || !wait_for(POLLIN, read_until_)) return -1;
    ssize_t got = 0;
    do got = recv(socket_, buffer_.data(), std::min(buffer_.size(), left_), 0);
    while (got < 0 && errno == EINTR);
    if (got <= 0) return got;
    left_ -= static_cast<std::size_t>(got);
    begin_ = 0;
    end_ = static_cast<std::size_t>(got);
  }
  const auto count = std::min(size, end_ - begin_);
  std::memcpy(to, buffer_.data() + begin_, count);
  begin_ += count;
  return static_cast<ssize_t>(count);
}

ssize_t Connection::write(const char* from, std::size_t size) {
  if (!is_writable()) return -1;
  ssize_t sent = 0;
  do sent = send(socket_, from, size, MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  return sent;
}

void Connection::end() {
  ::shutdown(socket_, SHUT_WR);
  const auto until = Clock::now() + kLinger;
  while (refused_ && !whole_ && wait_for(POLLIN, until)) {
    if (recv(socket_, buffer_.data(), buffer_.size(), 0) <= 0) break;
  }
}

void Connection::get_remote_ip_and_port(std::string& ip, int& port) const { address(getpeername, socket_, ip, port); }

void Connection::get_local_ip_and_port(std::string& ip, int& port) const { address(getsockname, socket_, ip, port); }

void Pool::enqueue(std::function<void()> serve) {
  httplib::ThreadPool::enqueue([at = Clock::now(), serve = std::move(serve)] {
    connected = at;
    serve();
    connected.reset();
  });
}

bool Server::process_and_close_socket(socket_t socket) {
  bool good = false;
  {
    Connection connection(socket, patience_);
    bool closed = false;
    good = process_request(connection, true, closed, nullptr);
    connection.end();
  }
  ::close(socket);
  return good;
}

}  // namespace zoo_serve
