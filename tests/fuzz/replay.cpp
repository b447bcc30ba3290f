// A main for a fuzz target without libFuzzer: runs it on files, and on all files in folders.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz.h"

namespace {

namespace fs = std::filesystem;

void replay(const fs::path& path) {
  std::printf("%s\n", path.c_str());
  std::fflush(stdout);  // the last line names the file that a crash is about
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const imseq::fuzz::Bytes exact(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char** argv) {
  int num_files = 0;
  for (int i = 1; i < argc; ++i) {
    if (!fs::exists(argv[i])) {
      std::fprintf(stderr, "%s: expected a file or a folder, there is none\n", argv[i]);
      return 1;
    }
    if (!fs::is_directory(argv[i])) {
      replay(argv[i]);
      ++num_files;
      continue;
    }
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      replay(entry.path());
      ++num_files;
    }
  }
  std::printf("%d files replayed\n", num_files);
  return num_files > 0 ? 0 : 1;
}
