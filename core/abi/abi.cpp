// The functions of imagenet_seq.h: they check pointers, and let no exception cross the C boundary.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <string>
#include <system_error>
#include <type_traits>

#include "abi/status.h"
#include "cpu/cpu.h"
#include "engine/engine.h"
#include "imagenet_seq.h"
#include "jpeg/header.h"
#include "pack/huffman.h"
#include "pack/transcode.h"
#include "read/crc32c.h"
#include "read/file_reader.h"
#include "read/kept.h"
#include "sample/decode.h"
#include "sample/draw.h"

using namespace imseq;

struct imseq_engine : Engine {
  using Engine::Engine;

  const pid_t owner = getpid();
};

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

// Runs body if none of the pointers is NULL. who: the function, for the message.
template <class Body>
int32_t guarded(const char* who, std::initializer_list<const void*> pointers, imseq_error* error,
                Body body) {
  if (has_null(pointers)) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "%s: expected pointers, got NULL", who);
  }
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return IMSEQ_OK;
    } else {
      return body();
    }
  } catch (const std::exception&) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "%s: no memory", who);
  }
}

// The same with a valid recipe, which is one of the pointers.
template <class Body>
int32_t with_recipe(const char* who, const imseq_recipe* recipe,
                    std::initializer_list<const void*> pointers, imseq_error* error, Body body) {
  return guarded(who, pointers, error, [&] {
    const int32_t status = check_recipe(*recipe, error);
    return status == IMSEQ_OK ? body() : status;
  });
}

// The same on an engine of this process.
template <class Body>
int32_t on_engine(imseq_engine* engine, std::initializer_list<const void*> pointers,
                  imseq_error* error, Body body) {
  if (engine != nullptr && engine->owner != getpid()) {
    return fail(
        error, IMSEQ_ERROR_FORK, -1, -1, 0,
        "this loader was made in process %d and can't be used in its forked child %d: make the "
        "Loader in the process that iterates it",
        static_cast<int>(engine->owner), static_cast<int>(getpid()));
  }
  return guarded("engine", {engine}, error,
                 [&] { return guarded("engine", pointers, error, body); });
}

// One per thread: a decoder keeps its scratch memory, so single calls are cheap too.
SampleDecoder& decoder_of_thread() {
  static thread_local const auto decoder = std::make_unique<SampleDecoder>();
  return *decoder;
}

// Runs body with this thread's transcoder, which it trims, whatever happens.
template <class Body>
int32_t with_transcoder(const char* who, const uint8_t* bytes, size_t size,
                        int32_t restart_interval, std::initializer_list<const void*> pointers,
                        imseq_error* error, Body body) {
  if (bytes == nullptr && size > 0) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "bytes: expected a pointer, got NULL");
  }
  if (restart_interval < 0 || restart_interval > 65535) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "restart_interval: expected 0 to 65535 MCUs, got %d", restart_interval);
  }
  static thread_local Transcoder transcoder;
  const int32_t status = guarded(who, pointers, error, [&] { return body(transcoder); });
  transcoder.trim();
  return status;
}

void describe(const JpegHeader& header, bool supported, imseq_header* out) {
  *out = imseq_header{};
  out->width = header.width;
  out->height = header.height;
  out->num_components = header.num_components;
  for (size_t c = 0; c < static_cast<size_t>(header.num_components); ++c) {
    out->h_sampling[c] = header.components[c].h_sampling;
    out->v_sampling[c] = header.components[c].v_sampling;
  }
  out->restart_interval = header.restart_interval;
  out->progressive = header.frame_marker == kSof2 ? 1 : 0;
  out->supported = supported ? 1 : 0;
  out->entropy_offset = static_cast<int64_t>(header.entropy_offset);
}

}  // namespace

int32_t imseq_abi(void) { return IMSEQ_ABI; }

const char* imseq_build_info(void) {
  return IMSEQ_VERSION ", " IMSEQ_COMPILER ", " IMSEQ_ARCHITECTURE;
}

const char* imseq_cpu(void) { return cpu_level_name(cpu_level()); }

int32_t imseq_use_cpu(const char* level, imseq_error* error) {
  return guarded("imseq_use_cpu", {level}, error, [&] {
    std::string supported;
    for (const CpuLevel known :
         {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kNeon}) {
      if (!cpu_has(known)) continue;
      const char* name = cpu_level_name(known);
      if (std::strcmp(level, name) == 0) {
        use_cpu_level(known);
        return static_cast<int32_t>(IMSEQ_OK);
      }
      supported += supported.empty() ? name : std::string(", ") + name;
    }
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                "kernels '%s': expected one that this processor has (%s)", level,
                supported.c_str());
  });
}

int32_t imseq_read_header(const uint8_t* bytes, size_t size, imseq_header* out,
                          imseq_error* error) {
  return guarded("imseq_read_header", {bytes, out}, error, [&] {
    JpegHeader header;
    const JpegKind kind = parse_jpeg(bytes, size, &header);
    if (kind == JpegKind::kDamaged) return IMSEQ_NOT_DECODED;
    describe(header, kind == JpegKind::kBaseline, out);
    return IMSEQ_OK;
  });
}

int32_t imseq_draw(const imseq_recipe* recipe, const imseq_key* key, int32_t width, int32_t height,
                   imseq_view* out, imseq_error* error) {
  return with_recipe("imseq_draw", recipe, {recipe, key, out}, error,
                     [&] { return draw_view(*recipe, *key, width, height, out); });
}

int32_t imseq_decode(const imseq_recipe* recipe, const imseq_key* key, const uint8_t* bytes,
                     size_t size, uint32_t flags, void* row, imseq_error* error) {
  return with_recipe("imseq_decode", recipe, {recipe, key, bytes, row}, error, [&] {
    imseq_sample sample{*key, bytes, static_cast<int64_t>(size), row, flags, IMSEQ_OK};
    const int32_t status = decoder_of_thread().decode(*recipe, &sample, 1, nullptr, error);
    return status < 0 ? status : sample.status;
  });
}

int32_t imseq_decode_group(const imseq_recipe* recipe, imseq_sample* samples, int32_t num_samples,
                           imseq_times* times, imseq_error* error) {
  return with_recipe("imseq_decode_group", recipe, {recipe, samples}, error, [&] {
    if (num_samples < 0 || num_samples > IMSEQ_MAX_GROUP) {
      return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "num_samples: expected 0 to %d, got %d",
                  IMSEQ_MAX_GROUP, num_samples);
    }
    for (int32_t i = 0; i < num_samples; ++i) {
      if (!has_null({samples[i].bytes, samples[i].row}) && samples[i].size >= 0) continue;
      return fail(error, IMSEQ_ERROR_ARGUMENT, samples[i].key.sample, -1, 0,
                  "expected bytes, a size and a row, got NULL or a negative size");
    }
    return decoder_of_thread().decode(*recipe, samples, num_samples, times, error);
  });
}

int32_t imseq_apply(const imseq_recipe* recipe, const imseq_key* key, const uint8_t* pixels,
                    int32_t width, int32_t height, void* row, imseq_error* error) {
  return with_recipe("imseq_apply", recipe, {recipe, key, pixels, row}, error, [&] {
    return decoder_of_thread().apply(*recipe, *key, pixels, width, height, row, error);
  });
}

int32_t imseq_transcode(const uint8_t* bytes, size_t size, int32_t restart_interval,
                        uint32_t options, const uint8_t* tables, uint8_t* out, size_t capacity,
                        size_t* out_size, imseq_header* header, imseq_error* error) {
  const auto transcode = [&](Transcoder& transcoder) {
    const bool strip = (options & IMSEQ_STRIP_METADATA) != 0;
    size_t entropy_offset = 0;
    const int32_t status = transcoder.transcode(bytes, size, {restart_interval, strip, tables}, out,
                                                capacity, out_size, &entropy_offset, error);
    if (status == IMSEQ_OK && header != nullptr) {
      describe(transcoder.header(), true, header);
      header->restart_interval = restart_interval;
      header->progressive = 0;
      header->entropy_offset = static_cast<int64_t>(entropy_offset);
    }
    return status;
  };
  // Whoever only asks for the capacity gives no memory.
  const void* const memory = capacity > 0 ? static_cast<const void*>(out) : out_size;
  return with_transcoder("imseq_transcode", bytes, size, restart_interval, {memory, out_size},
                         error, transcode);
}

int32_t imseq_count_symbols(const uint8_t* bytes, size_t size, int32_t restart_interval,
                            uint64_t* counts, imseq_error* error) {
  const auto count = [&](Transcoder& transcoder) {
    const bool counted = transcoder.count_symbols(bytes, size, restart_interval, counts);
    return counted ? IMSEQ_OK : IMSEQ_NOT_DECODED;
  };
  return with_transcoder("imseq_count_symbols", bytes, size, restart_interval, {counts}, error,
                         count);
}

int32_t imseq_fit_tables(const uint64_t* counts, uint8_t* out, imseq_error* error) {
  static_assert(IMSEQ_TABLES_BYTES == kPackTablesBytes);
  return guarded("imseq_fit_tables", {counts, out}, error, [&] {
    for (size_t i = 0; i < 4 * 256; ++i) {
      if (counts[i] < kMaxSymbolCount) continue;
      return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0,
                  "counts[%zu]: expected less than 2^48, got %llu", i,
                  static_cast<unsigned long long>(counts[i]));
    }
    uint8_t* end = out;
    for (size_t table = 0; table < 4; ++table) {
      const HuffmanKind kind = kind_of_table(table);
      end = write_dht(fit_pack_code(counts + table * 256, kind), table, end);
    }
    return static_cast<int32_t>(IMSEQ_OK);
  });
}

uint32_t imseq_crc32c(uint32_t crc, const uint8_t* bytes, size_t size) {
  return crc32c(crc, bytes, size);
}

int32_t imseq_look_up(const char* path, int64_t* size_bytes, int64_t* address, imseq_error* error) {
  return guarded("imseq_look_up", {path, size_bytes, address}, error, [&] {
    FilePlace place;
    const int32_t status = look_up(path, &place, error);
    *size_bytes = place.size_bytes;
    *address = place.address;
    return status;
  });
}

int32_t imseq_preallocate(int32_t fd, int64_t size_bytes, imseq_error* error) {
  if (size_bytes < 0) {
    return fail(error, IMSEQ_ERROR_ARGUMENT, -1, -1, 0, "size_bytes: expected 0 or more, got %lld",
                static_cast<long long>(size_bytes));
  }
#if defined(__linux__)
  while (size_bytes > 0 && ::fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size_bytes) != 0) {
    // Reserved room only makes reading faster.
    if (errno == EOPNOTSUPP || errno == ENOSYS) break;
    if (errno == EINTR) continue;
    return fail(error, IMSEQ_ERROR_READ, -1, -1, errno, "cannot set aside %lld bytes",
                static_cast<long long>(size_bytes));
  }
#endif
  return IMSEQ_OK;
}

int64_t imseq_kept_table_bytes(int64_t num_keys) { return KeptBlocks::table_bytes(num_keys); }

int32_t imseq_engine_create(const imseq_engine_config* config, imseq_engine** out,
                            imseq_error* error) {
  return guarded("engine", {config, out}, error, [&] {
    if (const int32_t status = check_config(*config, error); status != IMSEQ_OK) return status;
    try {
      *out = new imseq_engine(*config);
      return static_cast<int32_t>(IMSEQ_OK);
    } catch (const std::system_error& refusal) {
      return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "cannot start %d threads: %s",
                  config->num_decoders + config->num_readers, refusal.what());
    }
  });
}

int32_t imseq_engine_start(imseq_engine* engine, const imseq_plan* plan, void* const* rows,
                           imseq_error* error) {
  return on_engine(engine, {rows}, error, [&] { return engine->start(plan, rows, error); });
}

int32_t imseq_engine_prepare(imseq_engine* engine, const imseq_plan* plan, imseq_error* error) {
  return on_engine(engine, {plan}, error, [&] { return engine->prepare(*plan, error); });
}

int32_t imseq_engine_requests(imseq_engine* engine, imseq_request* out, int64_t capacity,
                              int64_t* count, imseq_error* error) {
  return on_engine(engine, {out, count}, error, [&] { *count = engine->requests(out, capacity); });
}

int32_t imseq_engine_pending(imseq_engine* engine, imseq_pending* out, imseq_error* error) {
  return on_engine(engine, {out}, error, [&] { engine->pending(out); });
}

int32_t imseq_engine_next(imseq_engine* engine, int64_t timeout_ns, imseq_batch* out,
                          imseq_error* error) {
  return on_engine(engine, {out}, error, [&] { return engine->next(timeout_ns, out, error); });
}

int32_t imseq_engine_release(imseq_engine* engine, int32_t slot, void* rows, imseq_error* error) {
  return on_engine(engine, {}, error, [&] { return engine->release(slot, rows, error); });
}

int32_t imseq_engine_cancel(imseq_engine* engine, imseq_error* error) {
  return on_engine(engine, {}, error, [&] { engine->cancel(); });
}

int32_t imseq_engine_stats(imseq_engine* engine, imseq_stats* out, imseq_error* error) {
  return on_engine(engine, {out}, error, [&] { engine->stats(out); });
}

void imseq_engine_destroy(imseq_engine* engine) {
  // In a forked child the threads do not exist and a mutex may be locked for ever: touch nothing.
  if (engine != nullptr && engine->owner == getpid()) delete engine;
}

int32_t imseq_engine_close(imseq_engine* engine, imseq_error* error) {
  return on_engine(engine, {}, error, [&] { engine->close(); });
}

int32_t imseq_engine_take(imseq_engine* engine, int64_t timeout_ns, imseq_task* out,
                          imseq_error* error) {
  return on_engine(engine, {out}, error, [&] { return engine->take(timeout_ns, out); });
}

int32_t imseq_engine_finish_row(imseq_engine* engine, int64_t ticket, const char* failure,
                                imseq_error* error) {
  return on_engine(engine, {}, error, [&] { return engine->finish_row(ticket, failure, error); });
}

int32_t imseq_engine_finish_block(imseq_engine* engine, int64_t ticket, const uint8_t* bytes,
                                  int64_t size, const int64_t* offsets, const int64_t* lengths,
                                  int64_t num_samples, const char* failure, imseq_error* error) {
  return on_engine(engine, {}, error, [&] {
    return engine->finish_block(ticket, bytes, size, offsets, lengths, num_samples, failure, error);
  });
}
