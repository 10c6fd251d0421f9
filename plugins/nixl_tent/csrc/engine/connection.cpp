#include "engine/connection.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "engine/direct.h"

namespace tent {
namespace {

constexpr size_t MOST_VECTORS = 256;
constexpr size_t SCRATCH = 256 << 10;

char* scratch() {
  thread_local std::vector<char> bytes(SCRATCH);
  return bytes.data();
}

bool overlaps(const iovec& row, const uint8_t* begin, size_t size) {
  const auto* start = static_cast<const uint8_t*>(row.iov_base);
  return start < begin + size && begin < start + row.iov_len;
}

}  // namespace

Connection::Connection() = default;
Connection::~Connection() = default;

Io Sender::flush(int fd, uint64_t& bytes) {
  while (!frames_.empty()) {
    std::array<iovec, MOST_VECTORS> vectors{};
    size_t count = 0;
    for (Outgoing& frame : frames_) {
      if (count + 1 >= MOST_VECTORS) break;
      size_t skip = frame.sent;
      if (skip < frame.head.size()) {
        vectors[count++] = {frame.head.data() + skip, frame.head.size() - skip};
        skip = 0;
      } else {
        skip -= frame.head.size();
      }
      for (const iovec& row : frame.payload) {
        if (skip >= row.iov_len) {
          skip -= row.iov_len;
          continue;
        }
        if (count == MOST_VECTORS) break;
        vectors[count++] = {static_cast<char*>(row.iov_base) + skip, row.iov_len - skip};
        skip = 0;
      }
    }
    msghdr message{};
    message.msg_iov = vectors.data();
    message.msg_iovlen = count;
    const ssize_t got = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK ? Io::blocked : Io::closed;
    }
    bytes += static_cast<uint64_t>(got);
    for (auto left = static_cast<size_t>(got); left > 0;) {
      Outgoing& frame = frames_.front();
      const size_t rest = frame.head.size() + frame.payload_bytes - frame.sent;
      const size_t step = std::min(rest, left);
      frame.sent += step;
      left -= step;
      if (step == rest) frames_.pop_front();
    }
  }
  return Io::more;
}

void Sender::own_rest(Outgoing& frame) {
  for (const iovec& row : frame.payload) frame.head.append(static_cast<const char*>(row.iov_base), row.iov_len);
  frame.payload.clear();
  frame.payload_bytes = 0;
}

void Sender::release_memory(const uint8_t* begin, size_t size) {
  for (Outgoing& frame : frames_)
    if (std::any_of(frame.payload.begin(), frame.payload.end(),
                    [&](const iovec& row) { return overlaps(row, begin, size); }))
      own_rest(frame);
}

bool Receiver::touches(const uint8_t* begin, size_t size) const {
  return filling() && std::any_of(into_.begin(), into_.end(),
                                  [&](const iovec& row) { return overlaps(row, begin, size); });
}

size_t Receiver::targets(std::array<iovec, MAX_SEGMENTS + 1>& out, size_t budget) {
  size_t count = 0;
  if (stage_ == Stage::payload && left_ > 0) {
    if (drain_) {
      out[count++] = {scratch(), std::min(left_, SCRATCH)};
      if (left_ > SCRATCH) return count;
    } else if (!keep_) {
      size_t offered = 0;
      for (size_t i = at_; i < into_.size() && count < MAX_SEGMENTS && offered < budget; ++i) {
        out[count++] = into_[i];
        offered += into_[i].iov_len;
      }
      if (offered < left_) return count;
    }
  }
  // Whatever follows the payload lands in the buffer by the same call.
  out[count++] = {buffer_.data() + end_, buffer_.size() - end_};
  return count;
}

void Receiver::advance(size_t size) {
  left_ -= size;
  while (!drain_ && !keep_ && size > 0) {
    iovec& row = into_[at_];
    const size_t step = std::min(size, row.iov_len);
    row.iov_base = static_cast<char*>(row.iov_base) + step;
    row.iov_len -= step;
    size -= step;
    if (row.iov_len == 0) ++at_;
  }
}

void Receiver::store(const char* data, size_t size) {
  if (keep_) {
    text.append(data, size);
  } else if (!drain_) {
    size_t done = 0;
    for (size_t i = at_; done < size; ++i) {
      const size_t step = std::min(size - done, into_[i].iov_len);
      std::memcpy(into_[i].iov_base, data + done, step);
      done += step;
    }
  }
  advance(size);
}

std::optional<std::string> Receiver::parse(FrameHandler& handler, bool& progress) {
  progress = false;
  const size_t have = end_ - begin_;
  if (stage_ == Stage::header) {
    if (have < sizeof(Header)) return std::nullopt;
    std::memcpy(&header, buffer_.data() + begin_, sizeof header);
    if (auto wrong = problem(header, trusted)) return wrong;
    begin_ += sizeof header;
    stage_ = Stage::rows;
  } else if (stage_ == Stage::rows) {
    const size_t want = header.segments * sizeof(Segment);
    if (have < want) return std::nullopt;
    rows.resize(header.segments);
    if (want > 0) std::memcpy(rows.data(), buffer_.data() + begin_, want);
    begin_ += want;
    text.clear();
    left_ = header.payload;
    FrameHandler::Destination destination;
    if (auto wrong = handler.on_header(destination)) return wrong;
    into_ = std::move(destination.into);
    at_ = 0;
    keep_ = destination.keep;
    drain_ = !keep_ && into_.empty();
    stage_ = Stage::payload;
  } else {
    const size_t step = std::min(have, left_);
    if (left_ > 0 && step == 0) return std::nullopt;
    store(buffer_.data() + begin_, step);
    begin_ += step;
    if (left_ > 0) return std::nullopt;
    stage_ = Stage::header;
    if (auto wrong = handler.on_payload()) return wrong;
  }
  progress = true;
  return std::nullopt;
}

Io Receiver::read(int fd, FrameHandler& handler, size_t budget, uint64_t& bytes, std::string& error) {
  for (size_t through = 0; through < budget;) {
    for (bool progress = true; progress;)
      if (auto wrong = parse(handler, progress)) {
        error = *wrong;
        return Io::closed;
      }
    if (begin_ == end_) {
      begin_ = end_ = 0;
    } else if (begin_ > 0) {
      std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    std::array<iovec, MAX_SEGMENTS + 1> vectors;
    msghdr message{};
    message.msg_iov = vectors.data();
    message.msg_iovlen = targets(vectors, budget);
    const ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK ? Io::blocked : Io::closed;
    }
    if (got == 0) return Io::closed;
    bytes += static_cast<uint64_t>(got);
    through += static_cast<size_t>(got);
    const bool straight = stage_ == Stage::payload && left_ > 0 && !keep_;
    const size_t payload = straight ? std::min(left_, static_cast<size_t>(got)) : 0;
    if (payload > 0) advance(payload);
    end_ += static_cast<size_t>(got) - payload;
  }
  // What is complete must not wait for more bytes to arrive.
  for (bool progress = true; progress;)
    if (auto wrong = parse(handler, progress)) {
      error = *wrong;
      return Io::closed;
    }
  return Io::more;
}

}  // namespace tent
