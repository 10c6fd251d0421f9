// Runs a fuzzer without libFuzzer: the corpus as it is, then changed at random from a fixed seed.
//
//   tent_fuzz_NAME FOLDER [rounds]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::vector<std::string> corpus;
  for (const auto& file : files) {
    std::ifstream stream(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    run(corpus.back());
  }
  if (corpus.empty()) return 2;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 1000;
  std::mt19937 random(1);
  for (int i = 0; i < rounds; ++i) {
    std::string input = corpus[random() % corpus.size()];
    for (auto change = 1 + random() % 6; change > 0; --change) {
      const size_t at = input.empty() ? 0 : random() % input.size();
      switch (random() % 4) {
        case 0: input.insert(at, 1 + random() % 8, static_cast<char>(random())); break;
        case 1: if (!input.empty()) input.erase(at, 1 + random() % 8); break;
        case 2: if (!input.empty()) input[at] = static_cast<char>(random()); break;
        default: {
          const std::string& other = corpus[random() % corpus.size()];
          input.append(other, random() % (other.size() + 1), random() % 64);
        }
      }
    }
    run(input);
  }
  std::printf("%zu inputs, %d rounds\n", corpus.size(), rounds);
  return 0;
}
