/* The C ABI between Python and the native core.
 *
 * Rules for every function (ARCHITECTURE.md, "The native boundary"):
 *   - The core never calls Python and knows no dataset format: it gets byte ranges, recipes, rows.
 *   - Memory: every pointer is owned by the caller. Plan arrays are copied by imseq_engine_start;
 *     rows of a batch are lent from imseq_engine_start or imseq_engine_release until
 *     imseq_engine_next has returned their batch. The core frees only what it allocated.
 *   - Errors: a status below zero fills the error struct of the caller, which may be NULL.
 *     Statuses of zero and above are answers, not errors. No function throws.
 *   - Threads: functions without an engine are pure and may run on any thread at once. Engine
 *     functions may run on any thread at once, except that one thread at a time may call
 *     imseq_engine_next.
 *   - Fork: in a child process every engine function is refused with IMSEQ_ERROR_FORK, and
 *     imseq_engine_destroy does nothing.
 *
 * Any change of a struct or prototype raises IMSEQ_ABI; test_abi.py compares this file with its
 * mirror in Python.
 */
#ifndef IMAGENET_SEQ_H
#define IMAGENET_SEQ_H

#include <stddef.h>
#include <stdint.h>

#define IMSEQ_API __attribute__((visibility("default")))
#define IMSEQ_CHECKED __attribute__((visibility("default"), warn_unused_result))

#ifdef __cplusplus
extern "C" {
#endif

#define IMSEQ_ABI 7

/* ---- status ---------------------------------------------------------------------------------- */

enum {
  IMSEQ_OK = 0,
  IMSEQ_TIMEOUT = 1,     /* nothing within the time-out; call again */
  IMSEQ_END = 2,         /* the plan is done */
  IMSEQ_CANCELLED = 3,   /* the engine was cancelled or destroyed while the call waited */
  IMSEQ_NOT_DECODED = 4, /* damaged, or not an image the core decodes: left to Pillow */

  IMSEQ_ERROR_ARGUMENT = -1, /* an argument is invalid */
  IMSEQ_ERROR_MEMORY = -2,
  IMSEQ_ERROR_READ = -3,    /* the operating system refused a read: see os_errno */
  IMSEQ_ERROR_DATA = -4,    /* the bytes read differ from what the index says */
  IMSEQ_ERROR_SAMPLE = -5,  /* Python reported a row or block as failed */
  IMSEQ_ERROR_FORK = -6,    /* the engine belongs to the parent process */
  IMSEQ_ERROR_CAPACITY = -7 /* the output buffer is too small; the size needed is reported */
};

typedef struct imseq_error {
  int32_t code;     /* the status returned */
  int32_t os_errno; /* 0 where no system call failed */
  int64_t sample;   /* index of the sample, -1 unknown */
  int64_t offset;   /* byte offset in the file or stream, -1 unknown */
  char message[512];
} imseq_error;

/* ---- version --------------------------------------------------------------------------------- */

IMSEQ_API int32_t imseq_abi(void);
/* "0.1.0, GCC 12.2.0, x86-64"; a static string. */
IMSEQ_API const char* imseq_build_info(void);

/* The kernels in use: "portable", "avx2", "avx512" or "neon"; at first the best that this processor
 * has. All give the same bits. */
IMSEQ_API const char* imseq_cpu(void);
IMSEQ_CHECKED int32_t imseq_use_cpu(const char* level, imseq_error* error);

/* ---- one sample ------------------------------------------------------------------------------ */

enum { IMSEQ_UINT8 = 0, IMSEQ_FLOAT32 = 1, IMSEQ_FLOAT16 = 2, IMSEQ_BFLOAT16 = 3 };
enum { IMSEQ_CHW = 0, IMSEQ_HWC = 1 };
enum { IMSEQ_FILTER_BOX = 0, IMSEQ_FILTER_BILINEAR = 1, IMSEQ_FILTER_BICUBIC = 2 };
/* Order of the two resize passes, which depends on the Pillow version to be matched. */
enum { IMSEQ_PASSES_HORIZONTAL_FIRST = 0, IMSEQ_PASSES_PILLOW_13 = 1 };
enum {
  IMSEQ_GEOMETRY_RANDOM_RESIZED_CROP = 1, /* torchvision RandomResizedCrop */
  IMSEQ_GEOMETRY_RESIZE_CROP = 2, /* torchvision Resize (optional), then CenterCrop (optional) */
  IMSEQ_GEOMETRY_FIXED_CROP = 3   /* a given crop, resized to the output */
};
/* CenterCrop's offset of a crop c in a side n: int(round((n - c) / 2.0)), or (n - c) // 2. */
enum { IMSEQ_CENTER_ROUND = 0, IMSEQ_CENTER_FLOOR = 1 };

/* What the core does to every sample: crop, resize, flip, convert to the output format. */
typedef struct imseq_recipe {
  int32_t geometry;
  int32_t out_height, out_width; /* pixels of a row of the batch */
  int32_t filter, passes, dtype, layout;
  int32_t strict; /* 1: decode all of an unpacked file, not only the crop, to find damage */
  /* RANDOM_RESIZED_CROP */
  double scale_min, scale_max; /* fraction of the image's area */
  double ratio_min, ratio_max; /* width / height */
  /* RESIZE_CROP: resize_height = 0: no resize; resize_width = 0: the shorter side becomes
     resize_height and the longer at most resize_max (0: no limit). crop_height = 0: no crop, and
     then the resized image must have the output's size. */
  int32_t resize_height, resize_width, resize_max;
  int32_t crop_height, crop_width, center_rule;
  /* FIXED_CROP, in pixels of the image */
  int32_t fixed_top, fixed_left, fixed_height, fixed_width, fixed_flip;
  double flip_probability;
  int64_t max_pixels; /* larger images are left to Pillow (its MAX_IMAGE_PIXELS); 0: no limit */
  const void* table;  /* 3 x 256 values of dtype (channel, byte); NULL for uint8 */
} imseq_recipe;

/* The only input of a sample's random draws. */
typedef struct imseq_key {
  uint64_t seed;
  int64_t epoch, sample;
} imseq_key;

/* The geometry drawn for one image: crop the box, resize it, cut the window, flip. */
typedef struct imseq_view {
  int32_t top, left, height, width;      /* box, pixels of the image */
  int32_t resized_height, resized_width; /* size the box is resized to */
  int32_t window_top, window_left;       /* of the output in the resized box; may be negative, */
  int32_t flip;                          /* outside it the output is zero, as CenterCrop pads */
} imseq_view;

enum { IMSEQ_SAMPLE_CLEAN = 1 }; /* flag: known to be free of anomalies (packs) */

typedef struct imseq_header {
  int32_t width, height, num_components;
  int32_t h_sampling[4], v_sampling[4];
  int32_t restart_interval; /* MCUs, 0: none */
  int32_t progressive;      /* 1 for SOF2 */
  int32_t supported;        /* 1: the core decodes it */
  int64_t entropy_offset;   /* first byte of the entropy-coded data of the first scan */
} imseq_header;

/* Read a JPEG's header. IMSEQ_NOT_DECODED: the bytes are no JPEG, or its header is damaged. */
IMSEQ_CHECKED int32_t imseq_read_header(const uint8_t* bytes, size_t size, imseq_header* out,
                                        imseq_error* error);

/* Draw the geometry of a sample: a pure function. */
IMSEQ_CHECKED int32_t imseq_draw(const imseq_recipe* recipe, const imseq_key* key, int32_t width,
                                 int32_t height, imseq_view* out, imseq_error* error);

/* Decode one JPEG into a row of out_height x out_width x 3 values. IMSEQ_NOT_DECODED leaves the row
 * undefined. */
IMSEQ_CHECKED int32_t imseq_decode(const imseq_recipe* recipe, const imseq_key* key,
                                   const uint8_t* bytes, size_t size, uint32_t flags, void* row,
                                   imseq_error* error);

/* One of several samples that are decoded together. */
typedef struct imseq_sample {
  imseq_key key;
  const uint8_t* bytes;
  int64_t size;
  void* row;
  uint32_t flags;
  int32_t status; /* out: IMSEQ_OK, IMSEQ_NOT_DECODED, or an error */
} imseq_sample;

/* Time of each stage of decoding, in ticks of the processor's counter. */
typedef struct imseq_times {
  int64_t header;  /* header, tables, geometry and weights of the resize */
  int64_t markers; /* restart markers and byte stuffing */
  int64_t entropy, idct;
  int64_t colour; /* chroma upsampling and colour conversion */
  int64_t resize;
  int64_t store; /* conversion to the row's dtype and layout */
} imseq_times;

enum { IMSEQ_MAX_GROUP = 8 };

/* Decode up to IMSEQ_MAX_GROUP samples, interleaved in this thread: faster than one after the
 * other, with the same results. times: added to; NULL: not measured. Each sample has its own
 * status; the first error is returned. */
IMSEQ_CHECKED int32_t imseq_decode_group(const imseq_recipe* recipe, imseq_sample* samples,
                                         int32_t num_samples, imseq_times* times,
                                         imseq_error* error);

/* The same for pixels that are decoded already: height x width x 3 bytes, rows without gaps. */
IMSEQ_CHECKED int32_t imseq_apply(const imseq_recipe* recipe, const imseq_key* key,
                                  const uint8_t* pixels, int32_t width, int32_t height, void* row,
                                  imseq_error* error);

/* ---- packing --------------------------------------------------------------------------------- */

enum { IMSEQ_STRIP_METADATA = 1 };

/* A pack's four Huffman tables (DC and AC of the first component, DC and AC of the others), each as
 * the payload of a DHT segment. */
enum { IMSEQ_TABLES_BYTES = 416 };

/* Re-code a JPEG losslessly into canonical form: baseline, with the pack's Huffman tables (NULL:
 * tables fitted to the image), a restart marker every restart_interval MCUs and the intervals'
 * sizes in APP9. Decodes the whole stream; any anomaly is IMSEQ_NOT_DECODED.
 * *out_size: the bytes written, or with IMSEQ_ERROR_CAPACITY a sufficient capacity. */
IMSEQ_CHECKED int32_t imseq_transcode(const uint8_t* bytes, size_t size, int32_t restart_interval,
                                      uint32_t options, const uint8_t* tables, uint8_t* out,
                                      size_t capacity, size_t* out_size, imseq_header* header,
                                      imseq_error* error);

/* Add to counts[4 * 256] (table, symbol) how often the re-coded JPEG has each symbol.
 * IMSEQ_NOT_DECODED: the image is damaged or unsupported, and nothing is added. */
IMSEQ_CHECKED int32_t imseq_count_symbols(const uint8_t* bytes, size_t size,
                                          int32_t restart_interval, uint64_t* counts,
                                          imseq_error* error);

/* Fit tables to a pack whose images have about these counts, each below 2^48: a pure function.
 * Every baseline image can be coded with them. out: IMSEQ_TABLES_BYTES. */
IMSEQ_CHECKED int32_t imseq_fit_tables(const uint64_t* counts, uint8_t* out, imseq_error* error);

/* CRC-32C (Castagnoli, RFC 3720) of bytes, continuing from crc (0 to begin). */
IMSEQ_API uint32_t imseq_crc32c(uint32_t crc, const uint8_t* bytes, size_t size);

/* ---- files and memory ------------------------------------------------------------------------ */

/* Find a file's size and the physical address of its first byte on the disk (FIEMAP; -1: the file
 * system does not say). */
IMSEQ_CHECKED int32_t imseq_look_up(const char* path, int64_t* size_bytes, int64_t* address,
                                    imseq_error* error);
/* Reserve room on the disk for an open file, if possible in one piece, without changing its size.
 * Does nothing if the file system can't. */
IMSEQ_CHECKED int32_t imseq_preallocate(int32_t fd, int64_t size_bytes, imseq_error* error);
/* Bytes that the table of kept blocks takes of the memory lent for them. */
IMSEQ_API int64_t imseq_kept_table_bytes(int64_t num_keys);

/* ---- the engine ------------------------------------------------------------------------------ */

typedef struct imseq_engine imseq_engine;

enum {
  IMSEQ_ROWS_DECODED = 0,            /* by the core; Python fills those it can't decode */
  IMSEQ_ROWS_FINISHED_BY_PYTHON = 1, /* the same, and then Python finishes every row */
  IMSEQ_ROWS_FROM_BYTES = 2,         /* Python gets the bytes of every row and fills it */
  IMSEQ_ROWS_READ = 3                /* bytes are read, and checked if asked for, but not decoded */
};

typedef struct imseq_engine_config {
  int32_t num_decoders;       /* threads that decode, >= 1 */
  int32_t num_readers;        /* threads that read, >= 1 */
  int32_t num_slots;          /* batches in memory at once, >= 1 */
  int32_t rows;               /* IMSEQ_ROWS_... */
  int32_t verify_checksums;   /* 1: check the CRC-32C of each sample until it was right once */
  int32_t direct;             /* 1: bypass the page cache (O_DIRECT) if possible */
  int64_t row_bytes;          /* bytes of a row of a batch */
  int64_t block_budget_bytes; /* limit of reading ahead, except for what decoders wait for */
  const char* disk_lock;      /* prefix of lock files (read/disk_lock.h), copied; NULL: no turns */
  /* for kept blocks (read/kept.h): page-aligned memory, zero when new, lent until
     imseq_engine_close has returned; NULL: none */
  void* kept;
  int64_t kept_bytes, kept_keys; /* all block keys are below kept_keys */
  int64_t kept_floor_bytes;      /* keep no more blocks while less memory is available */
  int32_t record_requests;       /* 1: record for imseq_engine_requests */
  int32_t reserved;
  imseq_recipe recipe; /* its table is copied */
} imseq_engine_config;

/* One epoch of one rank. All arrays are copied. A position is a place in the order of delivery. */
typedef struct imseq_plan {
  uint64_t seed;
  int64_t epoch;
  int64_t num_positions, num_batches, num_blocks, num_files;
  int64_t slot_rows;          /* rows that each slot's memory holds */
  const int64_t* batch_begin; /* [num_batches + 1] first position of each batch */
  const int64_t* sample;      /* [num_positions] index of the sample: the same bytes in all plans */
  const int64_t* draw;        /* [num_positions] or NULL: replaces the sample in its key */
  const int32_t* block;       /* [num_positions] block that holds it */
  const int64_t* offset;      /* [num_positions] bytes in the block; python block: ordinal in it */
  const int64_t* length;      /* [num_positions] bytes; -1: to the end of the block */
  const uint32_t* checksum;   /* [num_positions] or NULL: CRC-32C */
  const uint8_t* flags;       /* [num_positions] or NULL: IMSEQ_SAMPLE_... */
  const int32_t* block_file;  /* [num_blocks] file; -1: python block. In the order of reading */
  const int64_t* block_offset; /* [num_blocks] bytes; python block: its number in the source */
  const int64_t* block_length; /* [num_blocks] bytes; -1: to the end of the file */
  const int64_t* block_key; /* [num_blocks] or NULL: of a kept block, in all plans; -1: not kept */
  /* [num_windows + 1] first block of each window: a window's files are looked up and then read in
     the order of their disk addresses */
  const int64_t* window_begin;
  int64_t num_windows;       /* 0: blocks are read in the order of the plan */
  const char* root;          /* folder that paths are relative to */
  const char* paths;         /* paths of the files used, one after the other, not terminated */
  const int64_t* path_begin; /* [num_files + 1] */
} imseq_plan;

typedef struct imseq_batch {
  int64_t batch;      /* number in the plan */
  int64_t begin, end; /* positions */
  int32_t slot, reserved;
} imseq_batch;

enum { IMSEQ_TASK_ROW = 1, IMSEQ_TASK_BLOCK = 2 };

/* Work for Python. bytes are valid until the row is finished. */
typedef struct imseq_task {
  int32_t kind, slot;
  int64_t ticket;           /* identifies the task in imseq_engine_finish_...; never reused */
  int64_t position;         /* row: position. block: index in the plan's blocks */
  int64_t sample;           /* row: sample. block: its number in the source (block_offset) */
  int64_t draw;             /* row: replaces the sample in its key */
  int64_t batch, row_index; /* row of the batch */
  void* row;                /* memory to fill; with prefix_done the core has filled it */
  const uint8_t* bytes;     /* the encoded image; NULL with prefix_done */
  int64_t size;
  int32_t prefix_done, reserved;
} imseq_task;

/* Counters since imseq_engine_create; times are sums over threads. */
typedef struct imseq_stats {
  int64_t read_bytes, read_requests, read_seeks;
  int64_t read_ns;                   /* inside read calls */
  int64_t read_wait_ns;              /* readers without a block they may read: decoding is slower */
  int64_t read_lock_wait_ns;         /* readers that waited for their turn at the disk */
  int64_t read_direct_requests;      /* of read_requests: bypassed the page cache */
  int64_t read_lookups;              /* files looked up before a window was read */
  int64_t read_cached_bytes;         /* of read_bytes: found in the page cache */
  int64_t read_kept_bytes;           /* of kept blocks; not in read_bytes */
  int64_t decode_samples, decode_ns; /* rows the core decoded */
  int64_t decode_wait_read_ns;       /* decoders that waited for a block */
  int64_t decode_wait_batch_ns;      /* decoders that waited for a free batch: training is slower */
  int64_t python_rows, python_blocks;
  int64_t batch_count;
  int64_t batch_wait_ns; /* imseq_engine_next without a ready batch: training waits */
  int64_t block_bytes, block_bytes_peak; /* memory in blocks now and at most */
  int64_t kept_bytes, kept_blocks;       /* kept, by all processes that share the memory */
  int64_t block_budget_bytes;            /* limit of block_bytes */
} imseq_stats;

/* An unanswered read request. */
typedef struct imseq_pending {
  int64_t age_ns; /* -1: there is none */
  int64_t offset; /* bytes in the file */
  char path[512];
} imseq_pending;

/* A range that was read from a file. */
typedef struct imseq_request {
  int64_t epoch, file; /* number of the file in the plan */
  int64_t offset, length;
  int32_t direct; /* 1: bypassed the page cache */
  int32_t locked; /* 1: the reader held the disk's lock */
  int32_t cached; /* 1: came from the page cache */
  int32_t reserved;
} imseq_request;

IMSEQ_CHECKED int32_t imseq_engine_create(const imseq_engine_config* config, imseq_engine** out,
                                          imseq_error* error);
/* Announce the plan that will probably be started next: its blocks are read after those of the
 * current plan, within the budget. Replaces a plan announced before. */
IMSEQ_CHECKED int32_t imseq_engine_prepare(imseq_engine* engine, const imseq_plan* plan,
                                           imseq_error* error);
/* Begin a plan; rows[num_slots] lends memory for as many batches. The plan before must have ended.
 * plan NULL: the prepared one; otherwise a prepared one is dropped. */
IMSEQ_CHECKED int32_t imseq_engine_start(imseq_engine* engine, const imseq_plan* plan,
                                         void* const* rows, imseq_error* error);
/* Wait for the next batch in plan order. Its memory is then the caller's again. */
IMSEQ_CHECKED int32_t imseq_engine_next(imseq_engine* engine, int64_t timeout_ns, imseq_batch* out,
                                        imseq_error* error);
/* Lend memory for the slot's next batch. Slots are released in the order of their batches. */
IMSEQ_CHECKED int32_t imseq_engine_release(imseq_engine* engine, int32_t slot, void* rows,
                                           imseq_error* error);
/* End the plan now, and a prepared one; not at the same time as imseq_engine_prepare. Returns when
 * no thread of the core uses lent rows any more. Finishing a row or block later returns
 * IMSEQ_CANCELLED. */
IMSEQ_CHECKED int32_t imseq_engine_cancel(imseq_engine* engine, imseq_error* error);
IMSEQ_CHECKED int32_t imseq_engine_stats(imseq_engine* engine, imseq_stats* out,
                                         imseq_error* error);
/* The oldest unanswered request, to report a stalled disk. */
IMSEQ_CHECKED int32_t imseq_engine_pending(imseq_engine* engine, imseq_pending* out,
                                           imseq_error* error);
/* Move up to capacity recorded requests, oldest first, to out; *count: their number. */
IMSEQ_CHECKED int32_t imseq_engine_requests(imseq_engine* engine, imseq_request* out,
                                            int64_t capacity, int64_t* count, imseq_error* error);
/* Cancel, and end the core's threads for good. From then on imseq_engine_start, next, release and
 * take, including calls that wait, return IMSEQ_CANCELLED. May be called twice, and during other
 * calls. */
IMSEQ_CHECKED int32_t imseq_engine_close(imseq_engine* engine, imseq_error* error);
/* Close and free. No other call may be running or follow. */
IMSEQ_API void imseq_engine_destroy(imseq_engine* engine);

/* Wait for a python row or block: work for Python's threads. */
IMSEQ_CHECKED int32_t imseq_engine_take(imseq_engine* engine, int64_t timeout_ns, imseq_task* out,
                                        imseq_error* error);
/* failure: NULL if the row is filled; otherwise the reason, which imseq_engine_next reports as
 * IMSEQ_ERROR_SAMPLE in place of the batch. */
IMSEQ_CHECKED int32_t imseq_engine_finish_row(imseq_engine* engine, int64_t ticket,
                                              const char* failure, imseq_error* error);
/* Sample i of the block lies at offsets[i] and has lengths[i] bytes; everything is copied. */
IMSEQ_CHECKED int32_t imseq_engine_finish_block(imseq_engine* engine, int64_t ticket,
                                                const uint8_t* bytes, int64_t size,
                                                const int64_t* offsets, const int64_t* lengths,
                                                int64_t num_samples, const char* failure,
                                                imseq_error* error);

#ifdef __cplusplus
}
#endif
#endif
