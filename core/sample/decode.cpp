#include "sample/decode.h"

#include <array>
#include <chrono>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "abi/status.h"
#include "cpu/cpu.h"
#include "jpeg/header.h"
#include "jpeg/lanes.h"
#include "jpeg/region.h"
#include "resize/resizer.h"
#include "sample/draw.h"
#include "sample/store.h"

namespace imseq {

namespace {

// These two bound the memory of a thread when images are large. While the open images hold more
// than this, no further one is opened.
constexpr size_t kManyBytes = 16 << 20;
// A finished image keeps at most this much for the next one: enough for 1.4 megapixels.
constexpr size_t kKeptBytes = 2 << 20;

Soundness soundness_of(const imseq_recipe& recipe, uint32_t flags) {
  if ((flags & IMSEQ_SAMPLE_CLEAN) != 0) return Soundness::kRegion;
  return recipe.strict != 0 ? Soundness::kAll : Soundness::kMarkers;
}

int32_t out_of_memory(imseq_error* error, const imseq_key& key, size_t size) {
  return fail(error, IMSEQ_ERROR_MEMORY, key.sample, -1, 0, "no memory to decode %zu bytes", size);
}

// A counter of the processor that is cheap to read.
inline int64_t ticks() {
#if defined(__x86_64__)
  return static_cast<int64_t>(__builtin_ia32_rdtsc());
#elif defined(__aarch64__)
  int64_t value;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(value));
  return value;
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// Adds the ticks between its construction and destruction to a stage. times null: measures nothing.
class StageTimer {
 public:
  StageTimer(imseq_times* times, int64_t imseq_times::* stage)
      : times_(times), stage_(stage), begin_(times == nullptr ? 0 : ticks()) {}
  ~StageTimer() {
    if (times_ != nullptr) times_->*stage_ += ticks() - begin_;
  }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  imseq_times* times_;
  int64_t imseq_times::* stage_;
  int64_t begin_;
};

int64_t sum(const imseq_times& times) {
  return times.header + times.markers + times.entropy + times.idct + times.colour + times.resize +
         times.store;
}

// One image on its way from bytes to a row of the batch.
struct Image {
  imseq_sample* sample = nullptr;
  JpegHeader header;
  int num_planes = 0;
  imseq_view view;
  RegionDecoder region;
  Resizer resizer;
};

}  // namespace

// Gives the lanes the intervals of one image after the other, so that no lane is idle at the end of
// an image, or for a file without restart markers, while there are other images.
struct SampleDecoder::State final : LaneWork {
  State() : lanes(std::make_unique<std::array<Lane, kMaxLanes>>()) {}

  int32_t decode(const imseq_recipe& new_recipe, imseq_sample* new_samples, int new_num_samples,
                 imseq_times* new_times, imseq_error* new_error);
  int32_t apply(const imseq_recipe& apply_recipe, const imseq_key& key, const uint8_t* pixels,
                int width, int height, void* row);
  bool advance(Lane* lane) override;

 private:
  void run_lanes();
  bool begin_interval(Lane* lane);
  Image* open_next();
  int32_t open(Image* image, Soundness soundness);
  void begin_resizing(Image* image, int num_planes) {
    image->num_planes = num_planes;
    image->resizer.begin(image->view, recipe->out_height, recipe->out_width, num_planes,
                         recipe->filter, recipe->passes);
  }
  void finish(Image* image);
  void report(imseq_sample* sample, int32_t status);
  template <typename FillRow>
  void resize_and_store(Image& image, void* row, const FillRow& fill_row);
  void store_rows(Image& image, int* num_stored, void* row);

  Image*& image_of(const Lane* lane) {
    return image_of_lane[static_cast<size_t>(lane - lanes->data())];
  }

  std::unique_ptr<std::array<Lane, kMaxLanes>> lanes;
  std::array<Image*, kMaxLanes> image_of_lane{};
  std::array<Image, kMaxLanes + 2> images;  // one for each lane, one being opened, one waiting
  std::vector<Image*> unused;
  Image* current = nullptr;  // the image whose intervals go to the lanes
  Image* waiting = nullptr;  // opened, but decoded with other tables than the lanes use now
  const FlatEntry* flat = nullptr;
  FlatTables flat_tables;
  PixelStore store;
  uint64_t next_id = 1;

  // ---- arguments and progress of the call ----
  const imseq_recipe* recipe = nullptr;
  imseq_sample* samples = nullptr;
  int num_samples = 0;
  int next_sample = 0;
  // Samples whose stated interval sizes were wrong: decoded again by searching for the markers.
  std::array<imseq_sample*, IMSEQ_MAX_GROUP> doubtful{};
  size_t num_doubtful = 0, next_doubtful = 0;
  imseq_times* times = nullptr;
  imseq_error* error = nullptr;
  int32_t first_error = IMSEQ_OK;
};

int32_t SampleDecoder::State::decode(const imseq_recipe& new_recipe, imseq_sample* new_samples,
                                     int new_num_samples, imseq_times* new_times,
                                     imseq_error* new_error) {
  recipe = &new_recipe;
  samples = new_samples;
  num_samples = new_num_samples;
  next_sample = 0;
  num_doubtful = next_doubtful = 0;
  times = new_times;
  error = new_error;
  first_error = IMSEQ_OK;
  // From here on only open() allocates, and it catches exceptions: no lane or image is left
  // halfway.
  store.begin(*recipe);
  unused.clear();
  for (Image& image : images) unused.push_back(&image);
  while (waiting != nullptr || (waiting = open_next()) != nullptr) run_lanes();
  return first_error;
}

// Decodes images that use the same kind of tables, until the next one uses others or there is none.
void SampleDecoder::State::run_lanes() {
  current = waiting;
  waiting = nullptr;
  const ScanTables& tables = current->region.tables();
  flat = tables.flat;
  const LaneKernels& kernels = lane_kernels(cpu_level());
  const int num_lanes = flat != nullptr ? kernels.num_flat_lanes : kernels.num_image_lanes;
  const int64_t begin = times == nullptr ? 0 : ticks() - sum(*times);
  for (Lane* lane = lanes->data(); lane != lanes->data() + num_lanes; ++lane) {
    if (!begin_interval(lane)) lane->park(flat, tables.tables.entries());
  }
  (flat != nullptr ? kernels.flat : kernels.image)(lanes->data(), flat, this);
  // Entropy decoding took the time that no other stage did.
  if (times != nullptr) times->entropy += ticks() - sum(*times) - begin;
}

bool SampleDecoder::State::advance(Lane* lane) {
  Image* const image = image_of(lane);
  {
    const StageTimer timer(times, &imseq_times::idct);
    if (image->region.take_segment(lane)) return true;
  }
  if (image->region.done()) finish(image);
  if (begin_interval(lane)) return true;
  lane->park(flat, lane->entries);
  return false;
}

bool SampleDecoder::State::begin_interval(Lane* lane) {
  for (;;) {
    if (current != nullptr) {
      {
        const StageTimer timer(times, &imseq_times::markers);
        if (current->region.begin_interval(lane)) {
          image_of(lane) = current;
          return true;
        }
      }
      Image* const image = std::exchange(current, nullptr);
      // If no lane is decoding it any more, its stated interval sizes were wrong.
      if (image->region.done()) finish(image);
    }
    if (waiting == nullptr) waiting = open_next();
    if (waiting == nullptr || waiting->region.tables().flat != flat) return false;
    current = waiting;
    waiting = nullptr;
  }
}

// Opens the next image that the core can decode. Null: there is none, or open ones hold too much
// memory.
Image* SampleDecoder::State::open_next() {
  size_t open_bytes = 0;
  for (const Image& image : images) {
    if (image.sample != nullptr) open_bytes += image.region.num_bytes();
  }
  while (open_bytes <= kManyBytes) {
    const bool is_new = next_sample < num_samples;
    if (!is_new && next_doubtful == num_doubtful) return nullptr;
    Image* const image = unused.back();
    image->sample = is_new ? samples + next_sample++ : doubtful[next_doubtful++];
    const int32_t status =
        open(image, is_new ? soundness_of(*recipe, image->sample->flags) : Soundness::kMarkers);
    if (status == IMSEQ_OK) {
      unused.pop_back();
      return image;
    }
    report(image->sample, status);
    image->sample = nullptr;
    image->region.trim(kKeptBytes);
  }
  return nullptr;
}

int32_t SampleDecoder::State::open(Image* image, Soundness soundness) try {
  const imseq_sample& sample = *image->sample;
  const auto size = static_cast<size_t>(sample.size);
  {
    const StageTimer timer(times, &imseq_times::header);
    JpegHeader& header = image->header;
    if (parse_jpeg(sample.bytes, size, &header) != JpegKind::kBaseline) return IMSEQ_NOT_DECODED;
    const int64_t num_pixels = int64_t{header.width} * header.height;
    if (recipe->max_pixels > 0 && num_pixels > recipe->max_pixels) return IMSEQ_NOT_DECODED;
    const int32_t status =
        draw_view(*recipe, sample.key, header.width, header.height, &image->view);
    if (status != IMSEQ_OK) return status;
    begin_resizing(image, header.colour == JpegColour::kGrey ? 1 : 3);
  }
  const StageTimer timer(times, &imseq_times::markers);
  const bool any_open = unused.size() < images.size();  // this one still counts as unused
  // If the output shows only padding, a pixel is decoded all the same: Pillow would refuse a
  // damaged image.
  const Region& source = image->resizer.source();
  const bool opened = image->region.open(image->header, sample.bytes, size,
                                         source.height == 0 ? Region{0, 0, 1, 1} : source,
                                         soundness, &flat_tables, !any_open, next_id++);
  return opened ? IMSEQ_OK : IMSEQ_NOT_DECODED;
} catch (const std::bad_alloc&) {
  return IMSEQ_ERROR_MEMORY;
}

// fill_row(y, planes) writes row y of the image.
template <typename FillRow>
void SampleDecoder::State::resize_and_store(Image& image, void* row, const FillRow& fill_row) {
  const Region& source = image.resizer.source();
  int num_stored = 0;
  for (int y = source.top; y < source.top + source.height; ++y) {
    fill_row(y, image.resizer.source_planes());
    {
      const StageTimer timer(times, &imseq_times::resize);
      image.resizer.add_row();
    }
    store_rows(image, &num_stored, row);
  }
  store_rows(image, &num_stored, row);
  store.end_image();
}

void SampleDecoder::State::finish(Image* image) {
  RegionDecoder& region = image->region;
  if (!region.failed()) {
    resize_and_store(*image, image->sample->row, [&](int y, const std::array<uint8_t*, 3>& planes) {
      const StageTimer timer(times, &imseq_times::colour);
      region.row(y, planes.data());
    });
  }
  if (region.failed() && region.has_stated_sizes()) {
    doubtful[num_doubtful++] = image->sample;
  } else {
    report(image->sample, region.failed() ? IMSEQ_NOT_DECODED : IMSEQ_OK);
  }
  region.trim(kKeptBytes);
  image->sample = nullptr;
  unused.push_back(image);
  if (current == image) current = nullptr;
}

void SampleDecoder::State::report(imseq_sample* sample, int32_t status) {
  sample->status = status;
  if (status >= 0 || first_error != IMSEQ_OK) return;
  first_error = status;
  if (status == IMSEQ_ERROR_MEMORY) {
    out_of_memory(error, sample->key, static_cast<size_t>(sample->size));
  }
}

int32_t SampleDecoder::State::apply(const imseq_recipe& apply_recipe, const imseq_key& key,
                                    const uint8_t* pixels, int width, int height, void* row) {
  recipe = &apply_recipe;
  times = nullptr;
  Image& image = images[0];
  const int32_t status = draw_view(*recipe, key, width, height, &image.view);
  if (status != IMSEQ_OK) return status;
  begin_resizing(&image, 3);
  const Region& source = image.resizer.source();
  store.begin(*recipe);
  resize_and_store(image, row, [&](int y, const std::array<uint8_t*, 3>& planes) {
    const uint8_t* pixel = pixels + (static_cast<size_t>(y) * width + source.left) * 3;
    for (int x = 0; x < source.width; ++x, pixel += 3) {
      for (size_t c = 0; c < 3; ++c) planes[c][x] = pixel[c];
    }
  });
  return IMSEQ_OK;
}

// Stores the rows that are ready, from *num_stored on.
void SampleDecoder::State::store_rows(Image& image, int* num_stored, void* row) {
  Resizer& resizer = image.resizer;
  const bool flip = image.view.flip != 0 && !resizer.flips();
  const bool without_copy =
      store.stores_bytes_by_channel() && resizer.can_write_rows() && !flip && image.num_planes == 3;
  for (; *num_stored < resizer.num_ready(); ++*num_stored) {
    const int y = *num_stored;
    if (without_copy) {
      const StageTimer timer(times, &imseq_times::resize);
      resizer.write_row(y, store.bytes_of_row(y, row), store.channel_bytes());
      continue;
    }
    std::array<const uint8_t*, 3> planes{};
    {
      const StageTimer timer(times, &imseq_times::resize);
      planes = resizer.output_row(y);
    }
    if (image.num_planes == 1) planes = {planes[0], planes[0], planes[0]};
    const StageTimer timer(times, &imseq_times::store);
    store.store_row(planes, y, flip, row);
  }
}

SampleDecoder::SampleDecoder() : state_(std::make_unique<State>()) {}
SampleDecoder::~SampleDecoder() = default;

int32_t SampleDecoder::decode(const imseq_recipe& recipe, imseq_sample* samples, int num_samples,
                              imseq_times* times, imseq_error* error) {
  return state_->decode(recipe, samples, num_samples, times, error);
}

int32_t SampleDecoder::apply(const imseq_recipe& recipe, const imseq_key& key,
                             const uint8_t* pixels, int32_t width, int32_t height, void* row,
                             imseq_error* error) try {
  return state_->apply(recipe, key, pixels, width, height, row);
} catch (const std::bad_alloc&) {
  return out_of_memory(error, key, static_cast<size_t>(width) * static_cast<size_t>(height) * 3);
}

}  // namespace imseq
