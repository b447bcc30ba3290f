// The C functions of the engine.
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "abi/status.h"
#include "engine/engine.h"
#include "imagenet_seq.h"

using imseq::check_config;
using imseq::fail;
using imseq::is_null;
using imseq::out_of_memory;

struct imseq_engine : imseq::Engine {
  using Engine::Engine;

  const pid_t owner = getpid();
};

namespace {

bool has_null(std::initializer_list<const void*> pointers) {
  return std::find(pointers.begin(), pointers.end(), nullptr) != pointers.end();
}

// Runs body on an engine of this process; no exception may cross the C boundary. arguments:
// pointers that must not be NULL.
template <class Body>
int32_t guarded(imseq_engine* engine, std::initializer_list<const void*> arguments,
                imseq_error* error, Body body) {
  if (engine == nullptr || has_null(arguments)) return is_null(error, "engine");
  if (engine->owner != getpid()) {
    return fail(
        error, IMSEQ_ERROR_FORK, -1, -1, 0,
        "this loader was made in process %d and can't be used in its forked child %d: make the "
        "Loader in the process that iterates it",
        static_cast<int>(engine->owner), static_cast<int>(getpid()));
  }
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return IMSEQ_OK;
    } else {
      return body();
    }
  } catch (const std::bad_alloc&) {
    return out_of_memory(error, "engine");
  } catch (const std::exception& exception) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "%s", exception.what());
  }
}

}  // namespace

int32_t imseq_engine_create(const imseq_engine_config* config, imseq_engine** out,
                            imseq_error* error) {
  if (has_null({config, out})) return is_null(error, "engine");
  if (const int32_t status = check_config(*config, error); status != IMSEQ_OK) return status;
  try {
    *out = new imseq_engine(*config);
    return IMSEQ_OK;
  } catch (const std::bad_alloc&) {
    return out_of_memory(error, "engine");
  } catch (const std::exception& exception) {
    return fail(error, IMSEQ_ERROR_MEMORY, -1, -1, 0, "cannot start %d threads: %s",
                config->num_decoders + config->num_readers, exception.what());
  }
}

int32_t imseq_engine_start(imseq_engine* engine, const imseq_plan* plan, void* const* rows,
                           imseq_error* error) {
  return guarded(engine, {rows}, error, [&] { return engine->start(plan, rows, error); });
}

int32_t imseq_engine_prepare(imseq_engine* engine, const imseq_plan* plan, imseq_error* error) {
  return guarded(engine, {plan}, error, [&] { return engine->prepare(*plan, error); });
}

int32_t imseq_engine_requests(imseq_engine* engine, imseq_request* out, int64_t capacity,
                              int64_t* count, imseq_error* error) {
  return guarded(engine, {out, count}, error, [&] { *count = engine->requests(out, capacity); });
}

int32_t imseq_engine_pending(imseq_engine* engine, imseq_pending* out, imseq_error* error) {
  return guarded(engine, {out}, error, [&] { engine->pending(out); });
}

int32_t imseq_engine_next(imseq_engine* engine, int64_t timeout_ns, imseq_batch* out,
                          imseq_error* error) {
  return guarded(engine, {out}, error, [&] { return engine->next(timeout_ns, out, error); });
}

int32_t imseq_engine_release(imseq_engine* engine, int32_t slot, void* rows, imseq_error* error) {
  return guarded(engine, {}, error, [&] { return engine->release(slot, rows, error); });
}

int32_t imseq_engine_cancel(imseq_engine* engine, imseq_error* error) {
  return guarded(engine, {}, error, [&] { engine->cancel(); });
}

int32_t imseq_engine_stats(imseq_engine* engine, imseq_stats* out, imseq_error* error) {
  return guarded(engine, {out}, error, [&] { engine->stats(out); });
}

void imseq_engine_destroy(imseq_engine* engine) {
  // In a forked child the threads do not exist and a mutex may be locked for ever: touch nothing.
  if (engine != nullptr && engine->owner == getpid()) delete engine;
}

int32_t imseq_engine_close(imseq_engine* engine, imseq_error* error) {
  return guarded(engine, {}, error, [&] { engine->close(); });
}

int32_t imseq_engine_take(imseq_engine* engine, int64_t timeout_ns, imseq_task* out,
                          imseq_error* error) {
  return guarded(engine, {out}, error, [&] { return engine->take(timeout_ns, out); });
}

int32_t imseq_engine_finish_row(imseq_engine* engine, int64_t ticket, const char* failure,
                                imseq_error* error) {
  return guarded(engine, {}, error, [&] { return engine->finish_row(ticket, failure, error); });
}

int32_t imseq_engine_finish_block(imseq_engine* engine, int64_t ticket, const uint8_t* bytes,
                                  int64_t size, const int64_t* offsets, const int64_t* lengths,
                                  int64_t num_samples, const char* failure, imseq_error* error) {
  return guarded(engine, {}, error, [&] {
    return engine->finish_block(ticket, bytes, size, offsets, lengths, num_samples, failure, error);
  });
}
