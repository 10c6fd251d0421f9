// SHA-256 (FIPS 180-4) and HMAC (RFC 2104), for the handshake only: nothing per slice is hashed.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace tent {

using Digest = std::array<uint8_t, 32>;

Digest sha256(std::string_view data);
Digest hmac_sha256(std::string_view key, std::string_view data);

// Takes the same time wherever the first difference is.
bool equal_digests(const Digest& a, const Digest& b);

std::string random_bytes(size_t count);
uint64_t random_u64();

}  // namespace tent
