// The C functions that describe the build, decode single images, or look at files.
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "abi/status.h"
#include "cpu/cpu.h"
#include "imagenet_seq.h"
#include "jpeg/header.h"
#include "read/kept.h"
#include "read/place.h"
#include "sample/decode.h"
#include "sample/draw.h"

namespace imseq {

namespace {

#if defined(__clang__)
#define IMSEQ_COMPILER "Clang " __clang_version__
#else
#define IMSEQ_COMPILER "GCC " __VERSION__
#endif

#if defined(__x86_64__)
#define IMSEQ_ARCHITECTURE "x86-64"
#elif defined(__aarch64__)
#define IMSEQ_ARCHITECTURE "ARM64"
#else
#define IMSEQ_ARCHITECTURE "another architecture"
#endif

// One per thread: a decoder keeps its scratch memory, so single calls are cheap too.
SampleDecoder& decoder_of_thread() {
  static thread_local const auto decoder = std::make_unique<SampleDecoder>();
  return *decoder;
}

}  // namespace

}  // namespace imseq

int32_t imseq_abi(void) { return IMSEQ_ABI; }

const char* imseq_build_info(void) {
  return IMSEQ_VERSION ", " IMSEQ_COMPILER ", " IMSEQ_ARCHITECTURE;
}

const char* imseq_cpu(void) { return imseq::cpu_level_name(imseq::cpu_level()); }

int32_t imseq_use_cpu(const char* level, imseq_error* error) try {
  using imseq::CpuLevel;
  if (level == nullptr) return imseq::is_null(error, "imseq_use_cpu");
  std::string supported;
  for (const CpuLevel known :
       {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
    if (!imseq::cpu_has(known)) continue;
    const char* name = imseq::cpu_level_name(known);
    if (std::strcmp(level, name) == 0) {
      imseq::use_cpu_level(known);
      return IMSEQ_OK;
    }
    supported += supported.empty() ? name : std::string(", ") + name;
  }
  return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                     "kernels '%s': expected one that this processor has (%s)", level,
                     supported.c_str());
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_use_cpu");
}

int32_t imseq_read_header(const uint8_t* bytes, size_t size, imseq_header* out,
                          imseq_error* error) try {
  if (bytes == nullptr || out == nullptr) return imseq::is_null(error, "imseq_read_header");
  imseq::JpegHeader header;
  const imseq::JpegKind kind = imseq::parse_jpeg(bytes, size, &header);
  if (kind == imseq::JpegKind::kDamaged) return IMSEQ_NOT_DECODED;
  imseq::describe(header, kind == imseq::JpegKind::kBaseline, out);
  return IMSEQ_OK;
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_read_header");
}

int32_t imseq_draw(const imseq_recipe* recipe, const imseq_key* key, int32_t width, int32_t height,
                   imseq_view* out, imseq_error* error) {
  if (recipe == nullptr || key == nullptr || out == nullptr) {
    return imseq::is_null(error, "imseq_draw");
  }
  const int32_t status = imseq::check_recipe(*recipe, error);
  return status != IMSEQ_OK ? status : imseq::draw_view(*recipe, *key, width, height, out);
}

int32_t imseq_decode(const imseq_recipe* recipe, const imseq_key* key, const uint8_t* bytes,
                     size_t size, uint32_t flags, void* row, imseq_error* error) try {
  if (recipe == nullptr || key == nullptr || bytes == nullptr || row == nullptr) {
    return imseq::is_null(error, "imseq_decode");
  }
  const int32_t status = imseq::check_recipe(*recipe, error);
  if (status != IMSEQ_OK) return status;
  imseq_sample sample{*key, bytes, static_cast<int64_t>(size), row, flags, IMSEQ_OK};
  const int32_t error_status =
      imseq::decoder_of_thread().decode(*recipe, &sample, 1, nullptr, error);
  return error_status < 0 ? error_status : sample.status;
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_decode");
}

int32_t imseq_decode_group(const imseq_recipe* recipe, imseq_sample* samples, int32_t num_samples,
                           imseq_times* times, imseq_error* error) try {
  if (recipe == nullptr || samples == nullptr) return imseq::is_null(error, "imseq_decode_group");
  if (num_samples < 0 || num_samples > IMSEQ_MAX_GROUP) {
    return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                       "num_samples: expected 0 to %d, got %d", IMSEQ_MAX_GROUP, num_samples);
  }
  for (int32_t i = 0; i < num_samples; ++i) {
    if (samples[i].bytes == nullptr || samples[i].row == nullptr || samples[i].size < 0) {
      return imseq::fail(error, IMSEQ_ERROR_ARGUMENT, samples[i].key.sample, -1, 0,
                         "expected bytes, a size and a row, got NULL or a negative size");
    }
  }
  const int32_t status = imseq::check_recipe(*recipe, error);
  if (status != IMSEQ_OK) return status;
  return imseq::decoder_of_thread().decode(*recipe, samples, num_samples, times, error);
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_decode_group");
}

int32_t imseq_apply(const imseq_recipe* recipe, const imseq_key* key, const uint8_t* pixels,
                    int32_t width, int32_t height, void* row, imseq_error* error) try {
  if (recipe == nullptr || key == nullptr || pixels == nullptr || row == nullptr) {
    return imseq::is_null(error, "imseq_apply");
  }
  const int32_t status = imseq::check_recipe(*recipe, error);
  if (status != IMSEQ_OK) return status;
  return imseq::decoder_of_thread().apply(*recipe, *key, pixels, width, height, row, error);
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_apply");
}

int32_t imseq_look_up(const char* path, int64_t* size_bytes, int64_t* address,
                      imseq_error* error) try {
  if (path == nullptr || size_bytes == nullptr || address == nullptr) {
    return imseq::is_null(error, "imseq_look_up");
  }
  imseq::FilePlace place;
  const int32_t status = imseq::look_up(path, &place, error);
  *size_bytes = place.size_bytes;
  *address = place.address;
  return status;
} catch (const std::exception&) {
  return imseq::out_of_memory(error, "imseq_look_up");
}

int64_t imseq_kept_table_bytes(int64_t num_keys) {
  return imseq::KeptBlocks::table_bytes(num_keys);
}
