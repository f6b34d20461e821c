// The XLA FFI handler: checks what Python passed, chooses the instruction set, spreads the panels over threads.
//
// Written against XLA's stable C interface (xla/ffi/api/c_api.h, version 0.3, copied from jaxlib 0.10.2), which needs
// one header and nothing of the installed jaxlib to compile.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "convert.h"
#include "product.h"
#include "xla/ffi/api/c_api.h"

namespace lq {
namespace {

// Best first.
const std::vector<const Kernel*>& kernels() {
  static const std::vector<const Kernel*> all = {
#ifdef LQ_AMX
      &kAmx,
#endif
#ifdef LQ_AVX512_VNNI
      &kAvx512Vnni,
#endif
#ifdef LQ_AVX512
      &kAvx512,
#endif
#ifdef LQ_AVX2
      &kAvx2,
#endif
#ifdef LQ_NEON
      &kNeon,
#endif
      &kPlain,
  };
  return all;
}

struct Failure {
  XLA_FFI_Error_Code code;
  std::string message;
};

[[noreturn]] void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  throw Failure{XLA_FFI_Error_Code_INVALID_ARGUMENT, text};
}

void expect(bool condition, const char* what) {
  if (!condition) fail("lq_kernels: %s", what);
}

Type type_of(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_F32: return Type::kF32;
    case XLA_FFI_DataType_BF16: return Type::kBF16;
    case XLA_FFI_DataType_F16: return Type::kF16;
    case XLA_FFI_DataType_U8: return Type::kU8;
    case XLA_FFI_DataType_S8: return Type::kS8;
    case XLA_FFI_DataType_U32: return Type::kU32;
    case XLA_FFI_DataType_S32: return Type::kS32;
    default: fail("lq_kernels: unsupported element type %d", static_cast<int>(type));
  }
}

bool is_float(Type type) { return type == Type::kF32 || type == Type::kBF16 || type == Type::kF16; }

// The attribute `name` as an array of T.
template <class T>
const T* attribute(const XLA_FFI_Attrs& attrs, const char* name, XLA_FFI_DataType type, int64_t* size) {
  for (int64_t i = 0; i < attrs.size; ++i) {
    if (std::string(attrs.names[i]->ptr, attrs.names[i]->len) != name) continue;
    expect(attrs.types[i] == XLA_FFI_AttrType_ARRAY, "an attribute is no array");
    const auto* array = static_cast<const XLA_FFI_Array*>(attrs.attrs[i]);
    expect(array->dtype == type, "an attribute has another type than expected");
    *size = static_cast<int64_t>(array->size);
    return static_cast<const T*>(array->data);
  }
  fail("lq_kernels: no attribute %s", name);
}

// Hands out the call's operands in order.
class Operands {
 public:
  explicit Operands(const XLA_FFI_Args& args) : args_(args) {}

  const XLA_FFI_Buffer& next(int64_t rank) {
    expect(used_ < args_.size, "too few operands");
    const auto* buffer = static_cast<const XLA_FFI_Buffer*>(args_.args[used_++]);
    if (buffer->rank != rank) fail("lq_kernels: operand %d has %d axes", int(used_ - 1), int(buffer->rank));
    return *buffer;
  }

  bool done() const { return used_ == args_.size; }

 private:
  const XLA_FFI_Args& args_;
  int64_t used_ = 0;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The integers of the attribute `layout`, in the order of call.py.
struct Layout {
  int64_t isa;        // index into kernels(); -1: the best that this processor has
  int64_t threads;    // 0: all of XLA's
  int64_t prepared;   // planes [panels, rows, kPanel], scales likewise; otherwise [rows, N]
  int64_t codebook;   // the last operand
  int64_t out_features;
  int64_t segments;
};

struct SegmentLayout {
  int64_t bits, length, group, has_zeros;
};

Grouped grouped(const XLA_FFI_Buffer& buffer, const Layout& layout, int64_t groups) {
  Grouped g{buffer.data, type_of(buffer.dtype), 0, 0};
  if (layout.prepared) {
    expect(buffer.dims[0] == divide_up(layout.out_features, kPanel) && buffer.dims[1] == groups &&
               buffer.dims[2] == kPanel, "scales or zeros are not of the segment's shape");
    g.row = kPanel, g.panel = groups * kPanel;
  } else {
    expect(buffer.dims[0] == groups && buffer.dims[1] == layout.out_features,
           "scales or zeros are not of the segment's shape");
    g.row = layout.out_features, g.panel = kPanel;
  }
  return g;
}

Plane plane_of(const XLA_FFI_Buffer& buffer, const Layout& layout, int64_t length, int width, int low) {
  expect(buffer.dtype == XLA_FFI_DataType_U32, "planes are uint32");
  const int64_t rows = divide_up(length * width, 32);
  Plane plane{static_cast<const uint32_t*>(buffer.data), rows, 0, 0, width, low};
  if (layout.prepared) {
    expect(buffer.dims[0] == divide_up(layout.out_features, kPanel) && buffer.dims[1] == rows &&
               buffer.dims[2] == kPanel, "a plane is not of the segment's shape");
    plane.row = kPanel, plane.panel = rows * kPanel;
  } else {
    expect(buffer.dims[0] == rows && buffer.dims[1] == layout.out_features, "a plane is not of the segment's shape");
    plane.row = layout.out_features, plane.panel = kPanel;
  }
  return plane;
}

Segment read_segment(const Layout& layout, const SegmentLayout& s, float zero_point, Operands* operands) {
  static const int kWidths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};
  expect(s.bits >= 1 && s.bits <= 8, "widths are 1 to 8");
  expect(s.length > 0 && s.group > 0, "a segment is empty");
  expect(s.group % kBlock == 0 || s.group >= s.length, "groups are multiples of 32 or whole segments");
  Segment segment = {};
  segment.bits = static_cast<int>(s.bits);
  segment.length = s.length;
  segment.group = s.group;
  segment.zero_point = zero_point;
  const int64_t rank = layout.prepared ? 3 : 2, groups = divide_up(s.length, s.group);
  int low = 0;
  for (; segment.planes < 3 && kWidths[s.bits][segment.planes]; ++segment.planes) {
    const int width = kWidths[s.bits][segment.planes];
    segment.plane[segment.planes] = plane_of(operands->next(rank), layout, s.length, width, low);
    low += width;
  }
  segment.scales = grouped(operands->next(rank), layout, groups);
  expect(is_float(segment.scales.type), "scales are float32, bfloat16 or float16");
  if (s.has_zeros) segment.zeros = grouped(operands->next(rank), layout, groups);
  return segment;
}

// Reads the whole call. `segments` keeps what the product points to.
Product read_call(const XLA_FFI_CallFrame& frame, const Layout& layout, std::vector<Segment>* segments) {
  int64_t integers = 0, points = 0;
  const int64_t* raw = attribute<int64_t>(frame.attrs, "layout", XLA_FFI_DataType_S64, &integers);
  const float* zero_points = attribute<float>(frame.attrs, "zero_points", XLA_FFI_DataType_F32, &points);
  constexpr int64_t kHead = sizeof(Layout) / 8, kEach = sizeof(SegmentLayout) / 8;
  expect(layout.segments > 0 && integers == kHead + kEach * layout.segments && points == layout.segments,
         "the layout has another number of segments");

  Operands operands(frame.args);
  expect(frame.rets.size == 1, "one result");
  const XLA_FFI_Buffer& x = operands.next(2);
  const auto& y = *static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[0]);
  Product p = {};
  p.M = x.dims[0], p.K = x.dims[1], p.N = layout.out_features;
  p.x = x.data, p.x_type = type_of(x.dtype);
  p.y = y.data, p.y_type = type_of(y.dtype);
  expect(is_float(p.x_type) && is_float(p.y_type), "x and y are float32, bfloat16 or float16");
  expect(y.rank == 2 && y.dims[0] == p.M && y.dims[1] == p.N, "y is not [rows of x, channels]");
  for (int64_t i = 0, begin = 0; i < layout.segments; ++i) {
    const auto& s = reinterpret_cast<const SegmentLayout*>(raw + kHead)[i];
    segments->push_back(read_segment(layout, s, zero_points[i], &operands));
    Segment& segment = segments->back();
    segment.x_begin = begin;
    segment.padded_begin = p.padded_K;
    begin += segment.length;
    p.padded_K += divide_up(segment.length, kBlock) * kBlock;
    expect(i + 1 < layout.segments || begin == p.K, "x has another number of channels than the segments");
    expect(!layout.codebook || segment.bits <= 4, "a codebook has up to 16 entries");
  }
  if (layout.codebook) {
    const XLA_FFI_Buffer& codebook = operands.next(1);
    expect(codebook.dtype == XLA_FFI_DataType_F32 && codebook.dims[0] == 16, "a codebook is 16 float32");
    p.codebook = static_cast<const float*>(codebook.data);
  }
  expect(operands.done(), "too many operands");
  p.segments = segments->data();
  p.count = static_cast<int64_t>(segments->size());
  p.padded_N = layout.prepared;
  return p;
}

const Kernel& choose(const Product& p, int64_t isa) {
  if (isa >= 0) {
    expect(isa < static_cast<int64_t>(kernels().size()), "no such instruction set");
    const Kernel& kernel = *kernels()[isa];
    if (!kernel.supported()) fail("lq_kernels: this processor has no %s", kernel.name);
    if (!kernel.serves(p)) fail("lq_kernels: %s does not serve this product", kernel.name);
    return kernel;
  }
  for (const Kernel* kernel : kernels())
    if (kernel->supported() && kernel->serves(p) && kernel->prefers(p)) return *kernel;
  return kPlain;
}

// The panels of one product as work to be shared. A helper may start after the call has returned (XLA's threads may be
// busy): it then finds nothing left and touches nothing but this, which it owns a share of.
struct Work {
  const Kernel* kernel;
  const Product* product;
  const void* scratch;
  int64_t panels;
  int64_t share;  // panels taken at a time
  std::atomic<int64_t> next{0}, finished{0};

  void run() {
    for (int64_t first; (first = next.fetch_add(share)) < panels;) {
      const int64_t last = std::min(panels, first + share);
      kernel->panels(*product, scratch, first, last);
      finished.fetch_add(last - first, std::memory_order_release);
    }
  }
};

void help(void* data) {
  std::unique_ptr<std::shared_ptr<Work>> work(static_cast<std::shared_ptr<Work>*>(data));
  (*work)->run();
}

int64_t pool_size(const XLA_FFI_CallFrame& frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {};
  args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
  args.ctx = frame.ctx;
  args.num_threads = &threads;
  if (XLA_FFI_Error* error = frame.api->XLA_FFI_ThreadPool_NumThreads(&args)) {
    XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    frame.api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return threads;
}

void schedule(const XLA_FFI_CallFrame& frame, const std::shared_ptr<Work>& work) {
  auto share = std::make_unique<std::shared_ptr<Work>>(work);
  XLA_FFI_ThreadPool_Schedule_Args args = {};
  args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
  args.ctx = frame.ctx;
  args.task = help;
  args.data = share.get();
  if (XLA_FFI_Error* error = frame.api->XLA_FFI_ThreadPool_Schedule(&args)) {
    XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    frame.api->XLA_FFI_Error_Destroy(&destroy);
    return;  // the calling thread does it all
  }
  share.release();
}

// Kept by the calling thread from one product to the next: fresh memory of this size would come from the system, page
// by page, in every call. A product that needs a lot takes it for itself alone.
void* scratch_of_thread(size_t bytes) {
  constexpr size_t kKeep = 16 << 20;
  static thread_local std::unique_ptr<void, decltype(&free)> memory(nullptr, free);
  static thread_local size_t size = 0;
  if (bytes > size || size > kKeep) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset();
    memory.reset(aligned_alloc(64, size));
    if (!memory) size = 0;
    if (!memory) throw Failure{XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "lq_kernels: out of memory"};
  }
  return memory.get();
}

void compute(const XLA_FFI_CallFrame& frame) {
  int64_t integers = 0;
  const int64_t* raw = attribute<int64_t>(frame.attrs, "layout", XLA_FFI_DataType_S64, &integers);
  expect(integers >= static_cast<int64_t>(sizeof(Layout) / 8), "the layout is too short");
  const Layout& layout = *reinterpret_cast<const Layout*>(raw);
  std::vector<Segment> segments;
  const Product product = read_call(frame, layout, &segments);
  if (product.M == 0 || product.N == 0) return;

  auto work = std::make_shared<Work>();
  work->kernel = &choose(product, layout.isa);
  work->product = &product;
  work->panels = divide_up(product.N, kPanel);
  void* scratch = scratch_of_thread(work->kernel->scratch_bytes(product));
  work->scratch = scratch;
  work->kernel->begin(product, scratch);

  int64_t threads = layout.threads == 1 ? 1 : pool_size(frame);
  if (layout.threads > 1 && layout.threads < threads) threads = layout.threads;
  if (work->panels < threads) threads = work->panels;
  work->share = threads == 1 ? work->panels : std::max<int64_t>(1, std::min<int64_t>(8, work->panels / (4 * threads)));
  for (int64_t i = 1; i < threads; ++i) schedule(frame, work);
  work->run();
  // Only panels that a helper has begun are waited for: this can't hang on threads that never come.
  for (int spins = 0; work->finished.load(std::memory_order_acquire) < work->panels; ++spins)
    if (spins > 1000) std::this_thread::yield();  // a helper's processor was taken away
}

XLA_FFI_Error* error_of(const XLA_FFI_Api* api, const Failure& failure) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, failure.message.c_str(),
                                    failure.code};
  return api->XLA_FFI_Error_Create(&args);
}

}  // namespace
}  // namespace lq

#define LQ_EXPORT extern "C" __attribute__((visibility("default")))

LQ_EXPORT XLA_FFI_Error* lq_quantized_matmul(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    metadata->traits = 0;
    metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  try {
    lq::compute(*frame);
  } catch (const lq::Failure& failure) {
    return lq::error_of(frame->api, failure);
  } catch (const std::bad_alloc&) {
    return lq::error_of(frame->api, {XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "lq_kernels: out of memory"});
  }
  return nullptr;
}

// Names of the instruction sets compiled in, best first; `supported` leaves those this processor has.
LQ_EXPORT const char* lq_instruction_sets(int supported) {
  static std::string names[2];
  std::string text;
  for (const lq::Kernel* kernel : lq::kernels())
    if (!supported || kernel->supported()) text += (text.empty() ? "" : " ") + std::string(kernel->name);
  names[supported != 0] = text;
  return names[supported != 0].c_str();
}
