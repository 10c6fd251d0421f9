// A registered file: how it was named, and a descriptor of our own for as long as it is used.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "transport/transport.h"

namespace tent {

// "ro:/path", "rw,create,direct:/path": this side opens the file. The access comes first, then flags in any order.
struct NamedFile {
  int flags = 0;   // for open(2)
  std::string path;
};

// Nothing where the text is not of this form: then the caller has opened the file. As in NIXL's POSIX plugin.
std::optional<NamedFile> parse_file_name(const std::string& text);

struct File {
  Fd fd;
  uint64_t offset = 0;   // transfers stay within [offset, offset + size); a size of 0: anywhere
  uint64_t size = 0;
  bool readable = false;
  bool writable = false;
  std::string name;      // for people

  bool holds(uint64_t at, uint64_t bytes) const;
};

// Opens what `name` says, or duplicates `descriptor`: the caller may close theirs, and a number that is given to another
// file later does no harm. Throws std::invalid_argument where there is no such file.
std::shared_ptr<const File> open_file(uint64_t descriptor, const std::string& name, uint64_t offset, uint64_t size);

}  // namespace tent
