#include "wire/metadata.h"

#include <stdexcept>

#include "wire/frame.h"

namespace tent {
namespace {

constexpr std::string_view CONNECTION = "TENTc";
constexpr std::string_view REGION = "TENTr";
constexpr uint8_t VERSION = 2;
constexpr size_t MAX_ENDPOINTS = 64;

void open(Reader& reader, std::string_view mark, const char* what) {
  if (reader.raw(mark.size()) != mark)
    throw std::invalid_argument(std::string(what) + " is not TENT metadata: both agents need this backend");
  if (const int version = reader.take<uint8_t>(); reader.good() && version != VERSION)
    throw std::invalid_argument(std::string(what) + " has version " + std::to_string(version) +
                                ", this side reads " + std::to_string(VERSION) +
                                ": install the same kimi-stack on both sides");
}

void close(const Reader& reader, const char* what) {
  if (!reader.complete()) throw std::invalid_argument(std::string(what) + " is cut short or damaged");
}

}  // namespace

std::string encode(const ConnectionInfo& info) {
  std::string out(CONNECTION);
  put(out, VERSION);
  put_text(out, info.engine);
  put_text(out, info.key);
  put_text(out, info.host);
  put(out, static_cast<uint16_t>(info.endpoints.size()));
  for (const Endpoint& endpoint : info.endpoints) {
    put_text(out, endpoint.transport);
    put_text(out, endpoint.interface);
    put_text(out, endpoint.address);
    put(out, endpoint.port);
    put(out, endpoint.prefix);
    put(out, endpoint.mbits);
  }
  put_text(out, info.hosted);
  return out;
}

ConnectionInfo decode_connection(std::string_view blob) {
  constexpr const char* what = "connection info";
  Reader reader(blob);
  open(reader, CONNECTION, what);
  ConnectionInfo info;
  info.engine = reader.text(16);
  info.key = reader.text(32);
  info.host = reader.text(128);
  const auto count = reader.take<uint16_t>();
  if (count > MAX_ENDPOINTS) throw std::invalid_argument("connection info lists too many endpoints");
  for (uint16_t i = 0; i < count && reader.good(); ++i) {
    Endpoint endpoint;
    endpoint.transport = reader.text(16);
    endpoint.interface = reader.text(64);
    endpoint.address = reader.text(108);
    endpoint.port = reader.take<uint16_t>();
    endpoint.prefix = reader.take<uint8_t>();
    endpoint.mbits = reader.take<uint32_t>();
    info.endpoints.push_back(std::move(endpoint));
  }
  info.hosted = reader.text(MAX_HOSTED);
  close(reader, what);
  if (info.engine.size() != 16 || info.key.size() != 32)
    throw std::invalid_argument("connection info is cut short or damaged");
  return info;
}

std::string encode(const RegionInfo& info) {
  std::string out(REGION);
  put(out, VERSION);
  put(out, info.token);
  put(out, info.address);
  put(out, info.length);
  put(out, info.slot);
  put(out, info.kind);
  put(out, info.device);
  put_text(out, info.hosted);
  return out;
}

RegionInfo decode_region(std::string_view blob) {
  constexpr const char* what = "region info";
  Reader reader(blob);
  open(reader, REGION, what);
  RegionInfo info;
  info.token = reader.take<uint64_t>();
  info.address = reader.take<uint64_t>();
  info.length = reader.take<uint64_t>();
  info.slot = reader.take<uint32_t>();
  info.kind = reader.take<uint8_t>();
  info.device = reader.take<uint64_t>();
  info.hosted = reader.text(MAX_HOSTED);
  close(reader, what);
  if (info.kind > 1) throw std::invalid_argument("region info names an unknown kind of memory");
  if (info.address + info.length < info.address) throw std::invalid_argument("region info wraps around");
  return info;
}

}  // namespace tent
