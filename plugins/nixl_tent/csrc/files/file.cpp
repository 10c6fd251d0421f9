#include "files/file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace tent {
namespace {

constexpr mode_t MODE = 0644;
constexpr uint64_t END = INT64_MAX;   // of the largest file

}  // namespace

std::optional<NamedFile> parse_file_name(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos || colon + 1 == text.size()) return std::nullopt;
  NamedFile named{0, text.substr(colon + 1)};
  std::istringstream words(text.substr(0, colon));
  std::string word;
  std::getline(words, word, ',');
  if (word == "rw") named.flags = O_RDWR;
  else if (word != "ro") return std::nullopt;
  while (std::getline(words, word, ',')) {
    if (word == "direct") named.flags |= O_DIRECT;
    else if (word == "sync") named.flags |= O_SYNC;
    else if (word == "noatime") named.flags |= O_NOATIME;
    else if (word == "create") named.flags |= O_CREAT;
    else return std::nullopt;
  }
  return named;
}

bool File::holds(uint64_t at, uint64_t bytes) const {
  if (at > END || bytes > END - at) return false;
  return size == 0 || (at >= offset && bytes <= size && at - offset <= size - bytes);
}

std::shared_ptr<const File> open_file(uint64_t descriptor, const std::string& name, uint64_t offset, uint64_t size) {
  auto file = std::make_shared<File>();
  file->offset = offset;
  file->size = size;
  if (const auto named = parse_file_name(name)) {
    file->name = named->path;
    file->fd = Fd(open(named->path.c_str(), named->flags | O_CLOEXEC, MODE));
  } else {
    file->name = "descriptor " + std::to_string(descriptor);
    if (descriptor > INT_MAX)
      throw std::invalid_argument("devId of a file must be its descriptor, got " + std::to_string(descriptor));
    file->fd = Fd(fcntl(static_cast<int>(descriptor), F_DUPFD_CLOEXEC, 0));
  }
  if (!file->fd) throw std::invalid_argument("cannot use file " + file->name + ": " + std::strerror(errno));
  struct stat kind {};
  if (fstat(file->fd.get(), &kind) != 0 || !(S_ISREG(kind.st_mode) || S_ISBLK(kind.st_mode)))
    throw std::invalid_argument("cannot use file " + file->name + ": neither a regular file nor a block device");
  const int access = fcntl(file->fd.get(), F_GETFL) & O_ACCMODE;
  file->readable = access != O_WRONLY;
  file->writable = access != O_RDONLY;
  return file;
}

}  // namespace tent
