// A device behind PyTorch's PrivateUse1 whose memory is the host's and whose arithmetic is the CPU's.
//
// Every operator is answered by one boxed fallback: it makes CPU tensors on the very bytes of the
// device's, calls the CPU's kernel, and hands its results back as the device's, without a copy. In
// between it refuses what the simulated chip would refuse, charges memory, counts, and tells Python
// of what a real card would do on the host or in another dtype.
//
// It proves neither the numerics nor the speed of hardware.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace simulated {

using at::ScalarType;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr int MOST_DEVICES = 16;

int device_count = 1;
thread_local DeviceIndex current = 0;

// --- what is told to Python ---------------------------------------------------------------------

// Called with a kind and an operator's name, the first time each is seen from a place; the callee
// finds that place on Python's own stack.
py::object& listener() {
  static auto* held = new py::object();  // never destroyed: the interpreter may be gone before us
  return *held;
}

void tell(const char* kind, const std::string& name) {
  py::gil_scoped_acquire gil;
  if (listener() && !listener().is_none()) listener()(kind, name);
}

// --- memory -------------------------------------------------------------------------------------

struct Memory {
  std::atomic<int64_t> used{0}, peak{0}, given{0}, freed{0}, refused{0};
  size_t capacity = 0;
};
Memory memory[MOST_DEVICES];

void charge(int device, int64_t bytes) {
  auto& one = memory[device];
  const int64_t now = one.used.fetch_add(bytes) + bytes;
  if (one.capacity && now > static_cast<int64_t>(one.capacity)) {
    one.used.fetch_sub(bytes);
    one.refused++;
    auto gib = [](double value) { return value / (1 << 30); };
    // the words of torch_npu 2.13
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", bytes / 1048576.0,
        " MiB (NPU ", device, "; ", gib(one.capacity), " GiB total capacity; ", gib(now - bytes),
        " GiB already allocated; ", gib(now - bytes), " GiB current active; ",
        gib(double(one.capacity) - double(now - bytes)), " GiB free) [simulated]");
  }
  one.given++;
  int64_t peak = one.peak.load();
  while (now > peak && !one.peak.compare_exchange_weak(peak, now)) {
  }
}

// What a storage holds on to: bytes of its own, or the storage of a CPU kernel's result.
struct Held {
  int device;
  int64_t bytes;
  void* own;
  c10::Storage adopted;
};

void let_go(void* pointer) {
  auto* held = static_cast<Held*>(pointer);
  memory[held->device].used.fetch_sub(held->bytes);
  memory[held->device].freed++;
  if (held->own) c10::free_cpu(held->own);
  delete held;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current;
    if (bytes == 0) return {nullptr, nullptr, &let_go, Device(KIND, device)};
    charge(device, bytes);
    void* own = c10::alloc_cpu(bytes);
    return {own, new Held{device, int64_t(bytes), own, {}}, &let_go, Device(KIND, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    const auto& one = memory[device];
    for (auto* row : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                      &stats.requested_bytes}) {
      (*row)[0].current = one.used;
      (*row)[0].peak = one.peak;
    }
    stats.num_ooms = one.refused;
    stats.num_device_alloc = one.given;
    stats.num_device_free = one.freed;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    memory[device].given = memory[device].freed = 0;
  }
  void resetPeakStats(DeviceIndex device) override {
    memory[device].peak = memory[device].used.load();
  }
#if TORCH_VERSION_MINOR >= 10
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {memory[device].capacity - memory[device].used, memory[device].capacity};
  }
#endif
};
Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

// Host memory that counts as pinned: only the addresses are remembered.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* own = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<const char*>(own)] = bytes;
    return {own, own, &unpin, Device(c10::kCPU)};
  }
  static void unpin(void* own) {
    {
      std::lock_guard<std::mutex> lock(pinned_lock);
      pinned.erase(static_cast<const char*>(own));
    }
    c10::free_cpu(own);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
PinnedAllocator pinned_allocator;

// --- random numbers -----------------------------------------------------------------------------

// A stream of its own: as on hardware, its numbers are not the CPU's for the same seed.
constexpr uint64_t SALT = 0x9E3779B97F4A7C15ull;

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  uint64_t asked = c10::default_rng_seed_val, offset = 0;

  explicit Generator(DeviceIndex device)
      : GeneratorImpl(Device(KIND, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator(asked ^ SALT)) {}
  void set_current_seed(uint64_t seed) override {
    asked = seed;
    inner.set_current_seed(seed ^ SALT);
  }
  void set_offset(uint64_t value) override { offset = value; }
  uint64_t get_offset() const override { return offset; }
  uint64_t current_seed() const override { return asked; }
  uint64_t seed() override {
    const auto random = c10::detail::getNonDeterministicRandom();
    set_current_seed(random);
    return random;
  }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->asked = asked;
    copy->offset = offset;
    copy->inner = inner.clone();
    return copy;
  }
};

at::Generator& default_generator(DeviceIndex device) {
  static auto all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < MOST_DEVICES; i++) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all[device < 0 ? current : device];
}

at::Generator inside(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// --- guard and hooks ----------------------------------------------------------------------------

double milliseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

void check_index(DeviceIndex device) {
  TORCH_CHECK(
      device >= 0 && device < device_count,
      "exchangeDevice: NPU function error: aclrtSetDevice, error code is 107001\n[Error]: Invalid "
      "device ID.\n\tdevice ", int(device), ", device count ", device_count, " [simulated]");
}

struct Moment {
  double at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = KIND;
  c10::DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device to) const override {
    const auto from = current;
    setDevice(to);
    return {KIND, from};
  }
  Device getDevice() const override { return {KIND, current}; }
  void setDevice(Device to) const override {
    if (!to.has_index()) return;
    check_index(to.index());
    current = to.index();
  }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::Stream getStream(Device of) const override {
    return c10::Stream(c10::Stream::DEFAULT, of.has_index() ? of : Device(KIND, current));
  }
  c10::Stream getDefaultStream(Device of) const override { return getStream(of); }
  c10::Stream getNewStream(Device of, int = 0) const override {
    static std::atomic<int64_t> next{1};
    const auto where = of.has_index() ? of : Device(KIND, current);
    return c10::Stream(c10::Stream::UNSAFE, where, next++);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return c10::Stream(c10::Stream::DEFAULT, to.device());
  }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new Moment;
    static_cast<Moment*>(*event)->at = milliseconds();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Moment*>(event);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void* from, void* to, const DeviceIndex) const override {
    return static_cast<Moment*>(to)->at - static_cast<Moment*>(from)->at;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  void setCurrentDevice(DeviceIndex to) const override {
    check_index(to);
    current = to;
  }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex to) const override {
    const auto from = current;
    if (to >= 0) setCurrentDevice(to);
    return from;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return exchangeDevice(to); }
  const at::Generator& getDefaultGenerator(DeviceIndex of) const override {
    return default_generator(of);
  }
  at::Generator getNewGenerator(DeviceIndex of) const override {
    return at::make_generator<Generator>(of < 0 ? current : of);
  }
  Device getDeviceFromPtr(void*) const override { return {KIND, current}; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override {
    const auto* address = static_cast<const char*>(pointer);
    std::lock_guard<std::mutex> lock(pinned_lock);
    auto after = pinned.upper_bound(address);
    if (after == pinned.begin()) return false;
    --after;
    return address < after->first + after->second;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const auto before = current;
    current = storage.device().index();
    auto fresh = allocator.allocate(bytes);
    current = before;
    const auto kept = std::min<size_t>(bytes, storage.nbytes());
    if (kept) std::memcpy(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
Hooks hooks;
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// --- what the chip refuses ----------------------------------------------------------------------

using Dtypes = uint64_t;  // a bit for each ScalarType
Dtypes refused = 0;       // by every operator that computes
std::unordered_map<std::string, Dtypes> refused_by;  // by this operator, with or without overload
std::unordered_set<std::string> registered;  // by torch_npu; anything else it runs on the host
bool casts_double = true;                    // .double() on the device gives float32

std::mutex counts_lock;
std::map<std::string, int64_t> counts;
std::atomic<int64_t> calls{0}, to_device{0}, to_host{0}, waits{0};

Dtypes bit(ScalarType dtype) { return 1ull << int(dtype); }

const char* ascend_name(ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "DT_DOUBLE";
    case at::kComplexFloat: return "DT_COMPLEX64";
    case at::kComplexDouble: return "DT_COMPLEX128";
    case at::kBFloat16: return "DT_BFLOAT16";
    case at::kHalf: return "DT_FLOAT16";
    case at::kFloat: return "DT_FLOAT";
    case at::kLong: return "DT_INT64";
    case at::kInt: return "DT_INT32";
    default: return c10::toString(dtype);
  }
}

// These move bytes; a chip that does not compute in a dtype still copies it.
const std::unordered_set<std::string> MOVES = {
    "aten::copy_", "aten::_copy_from", "aten::_to_copy", "aten::empty", "aten::empty_strided",
    "aten::view", "aten::as_strided", "aten::detach", "aten::_local_scalar_dense", "aten::set_",
    "aten::resize_", "aten::_reshape_alias", "aten::alias", "aten::clone", "aten::to"};

// These look at bytes in another shape; torch_npu takes them from torch.
const std::unordered_set<std::string> VIEWS = {
    "aten::view", "aten::alias", "aten::detach", "aten::as_strided", "aten::t", "aten::transpose",
    "aten::permute", "aten::expand", "aten::slice", "aten::select", "aten::split",
    "aten::split_with_sizes", "aten::unbind", "aten::unsqueeze", "aten::squeeze",
    "aten::_unsafe_view", "aten::chunk", "aten::diagonal", "aten::view_as_real",
    "aten::view_as_complex", "aten::unfold"};

void check_dtypes(const std::string& name, const std::string& overload,
                  const std::vector<ScalarType>& dtypes) {
  if (MOVES.count(name)) return;
  Dtypes bad = refused;
  for (const auto& key : {name, name + "." + overload}) {
    const auto rule = refused_by.find(key);
    if (rule != refused_by.end()) bad |= rule->second;
  }
  for (auto dtype : dtypes) {
    TORCH_CHECK(!(bad & bit(dtype)), "call aclnn", name.substr(name.find("::") + 2),
                " failed, error code is 161002\nERR00100 PTA call acl api failed.\nEZ1001: tensor "
                "not implemented for ", ascend_name(dtype),
                ", should be in dtype support list of the simulated chip");
  }
}

void count(const std::string& name, const std::string& overload) {
  const auto full = overload.empty() ? name : name + "." + overload;
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(counts_lock);
    first = counts[full]++ == 0;
  }
  if (first && !registered.empty() && name.rfind("aten::", 0) == 0 && !VIEWS.count(name) &&
      !registered.count(full.substr(6)))
    tell("host", full.substr(6));
}

// --- the same bytes, on the other device --------------------------------------------------------

Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != KIND) return tensor;
  auto storage = tensor.storage();
  auto drop = [](void* held) { delete static_cast<c10::Storage*>(held); };
  c10::DataPtr bytes(storage.mutable_data(), new c10::Storage(storage), drop, Device(c10::kCPU));
  // with an allocator and resizable, or kernels with out= refuse it
  c10::Storage same(c10::Storage::use_byte_size_t{}, storage.nbytes(), std::move(bytes),
                    c10::GetDefaultCPUAllocator(), true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                     tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  // matmul chooses between two kernels by whether its second argument wants a gradient
  if (tensor.requires_grad() && tensor.is_leaf()) alias.unsafeGetTensorImpl()->set_requires_grad(true);
  return alias;
}

// A CPU kernel's fresh result becomes the device's: no copy, but charged.
Tensor adopt(const Tensor& result, int device) {
  if (!result.defined() || !result.device().is_cpu() || result.layout() != c10::kStrided)
    return result;
  auto storage = result.storage();
  const int64_t bytes = storage.nbytes();
  c10::DataPtr pointer(nullptr, Device(KIND, device));
  if (bytes) {
    charge(device, bytes);
    pointer = c10::DataPtr(storage.mutable_data(), new Held{device, bytes, nullptr, storage},
                           &let_go, Device(KIND, device));
  }
  c10::Storage own(c10::Storage::use_byte_size_t{}, bytes, std::move(pointer), &allocator, true);
  auto adopted = at::detail::make_tensor<c10::TensorImpl>(
      std::move(own), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), result.dtype());
  adopted.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(),
                                                       result.storage_offset());
  return adopted;
}

// A view that a CPU kernel made of an alias, as a view of the device's own tensor.
Tensor view_of(const Tensor& base, const Tensor& seen) {
  // the base's whole key set: with one key alone, "Cannot set version_counter for inference tensor"
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), seen.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(),
                                                    seen.storage_offset());
  if (seen.is_conj()) view._set_conj(true);
  return view;
}

// --- the fallback -------------------------------------------------------------------------------

struct Operator {
  std::string name, overload;
  int generator = -1;      // place of its generator among the arguments
  bool takes_both = false;  // indexing takes indices from the host
};

const Operator& look_up(const c10::OperatorHandle& handle) {
  static std::mutex lock;
  static std::unordered_map<const void*, Operator> known;
  std::lock_guard<std::mutex> locked(lock);
  const auto& schema = handle.schema();
  const auto there = known.find(&schema);
  if (there != known.end()) return there->second;
  Operator one{schema.name(), schema.overload_name()};
  for (size_t i = 0; i < schema.arguments().size(); i++)
    if (schema.arguments()[i].name() == "generator") one.generator = int(i);
  for (const char* start : {"aten::index", "aten::_index_put", "aten::_unsafe_index"})
    one.takes_both |= one.name.rfind(start, 0) == 0;
  return known.emplace(&schema, one).first->second;
}

// One call: its arguments, what they are on the CPU, and where its results belong.
class Call {
 public:
  Call(const c10::OperatorHandle& handle, torch::jit::Stack* stack)
      : handle_(handle), schema_(handle.schema()), op_(look_up(handle)), stack_(stack),
        begin_(stack->size() - schema_.arguments().size()) {}

  void run() {
    look();
    check_dtypes(op_.name, op_.overload, dtypes_);
    calls++;
    count(op_.name, op_.overload);
    to_aliases();
    handle_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    take_back();
  }

 private:
  void look() {
    for (size_t i = begin_; i < stack_->size(); i++) {
      const auto& value = (*stack_)[i];
      if (value.isTensor()) see(value.toTensor());
      else if (value.isTensorList()) for (const Tensor& one : value.toTensorList().vec()) see(one);
      else if (value.isOptionalTensorList()) {
        for (const auto& one : value.toOptionalTensorVector()) if (one.has_value()) see(*one);
      } else if (value.isDevice()) asked_ = value.toDevice();
      else if (value.isGenerator() && value.toGenerator().defined()) {
        TORCH_CHECK(value.toGenerator().device().type() == KIND,
                    "Expected a 'npu' device type for generator but found '",
                    value.toGenerator().device().type(), "'");
      }
      else if (value.isInt() && schema_.arguments()[i - begin_].name() == "dtype")
        asked_dtype_ = ScalarType(value.toInt());
    }
    if (asked_dtype_ && !asked_) dtypes_.push_back(*asked_dtype_);
    if (device_ < 0) device_ = asked_ && asked_->has_index() && asked_->type() == KIND
                                   ? asked_->index() : current;
    TORCH_CHECK(other_ < 0, "Expected all tensors to be on the same device, but found at least two "
                "devices, npu:", device_, " and npu:", other_, "! (", op_.name, ")");
    TORCH_CHECK(!host_ || op_.takes_both, "Expected all tensors to be on the same device. Expected "
                "NPU tensor, please check whether the input tensor device is correct. (", op_.name,
                ") ERR01002 OPS invalid type [simulated]");
  }

  void see(const Tensor& tensor) {
    if (!tensor.defined()) return;
    dtypes_.push_back(tensor.scalar_type());
    if (tensor.device().type() == KIND) {
      if (device_ < 0) device_ = tensor.device().index();
      else if (device_ != tensor.device().index()) other_ = tensor.device().index();
    } else if (tensor.device().is_cpu() && tensor.dim() > 0) {
      host_ = true;
    }
  }

  Tensor alias(const Tensor& tensor) {
    auto same = on_cpu(tensor);
    if (tensor.defined() && tensor.device().type() == KIND) aliases_.emplace_back(tensor, same);
    return same;
  }

  void to_aliases() {
    for (size_t i = begin_; i < stack_->size(); i++) {
      auto& value = (*stack_)[i];
      if (value.isTensor()) {
        if (value.toTensor().defined()) value = alias(value.toTensor());
      } else if (value.isTensorList()) {
        auto list = value.toTensorList().vec();
        for (auto& one : list) if (one.defined()) one = alias(one);
        value = c10::IValue(c10::List<Tensor>(list));
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (std::optional<Tensor> one : value.toOptionalTensorList())
          list.push_back(one.has_value() && one->defined() ? alias(*one) : one);
        value = c10::IValue(list);
      } else if (value.isDevice()) {
        if (value.toDevice().type() == KIND) value = c10::IValue(Device(c10::kCPU));
      } else if (value.isGenerator() && value.toGenerator().defined() &&
                 value.toGenerator().device().type() == KIND) {
        value = c10::IValue(inside(value.toGenerator()));
      }
    }
    // without one, the CPU's kernel would take the CPU's default generator
    if (op_.generator >= 0 && (*stack_)[begin_ + op_.generator].isNone())
      (*stack_)[begin_ + op_.generator] = c10::IValue(inside(default_generator(device_)));
  }

  void take_back() {
    for (size_t i = stack_->size() - schema_.returns().size(); i < stack_->size(); i++) {
      auto& value = (*stack_)[i];
      if (value.isTensor()) {
        value = back(value.toTensor());
      } else if (value.isTensorList()) {
        auto list = value.toTensorList().vec();
        for (auto& one : list) one = back(one);
        value = c10::IValue(c10::List<Tensor>(list));
      }
    }
  }

  Tensor back(const Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (auto& [ours, same] : aliases_)
      if (same.is_same(result)) return written(ours, result);
    auto* storage = result.storage().unsafeGetStorageImpl();
    for (auto& [ours, same] : aliases_)
      if (storage == same.storage().unsafeGetStorageImpl()) return view_of(ours, result);
    if (asked_ && asked_->is_cpu()) return result;
    const auto there = fresh_.find(storage);
    if (there != fresh_.end()) return view_of(there->second, result);
    return fresh_.emplace(storage, adopt(result, device_)).first->second;
  }

  // In place, or out=: the caller's tensor, which the kernel may have resized.
  Tensor written(const Tensor& ours, const Tensor& result) {
    auto* impl = ours.unsafeGetTensorImpl();
    auto* storage = ours.storage().unsafeGetStorageImpl();
    if (result.storage().data() != ours.storage().data() ||
        result.storage().nbytes() != ours.storage().nbytes()) {
      auto grown = adopt(result, device_);
      storage->set_data_ptr_noswap(
          std::move(grown.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      storage->set_nbytes(result.storage().nbytes());
    }
    if (ours.sizes() != result.sizes() || ours.strides() != result.strides())
      impl->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    return ours;
  }

  const c10::OperatorHandle& handle_;
  const c10::FunctionSchema& schema_;
  const Operator& op_;
  torch::jit::Stack* stack_;
  size_t begin_;
  int device_ = -1, other_ = -1;
  bool host_ = false;
  std::optional<Device> asked_;
  std::optional<ScalarType> asked_dtype_;
  std::vector<ScalarType> dtypes_;
  std::vector<std::pair<Tensor, Tensor>> aliases_;
  std::unordered_map<const c10::StorageImpl*, Tensor> fresh_;
};

void fallback(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call(handle, stack).run();
}

// --- the few kernels that cannot be boxed -------------------------------------------------------

using Shape = at::IntArrayRef;
using MaybeDtype = std::optional<ScalarType>;
using MaybeLayout = std::optional<at::Layout>;
using MaybeDevice = std::optional<Device>;

Tensor empty(Shape size, MaybeDtype dtype, MaybeLayout, MaybeDevice device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  const auto where = c10::device_or_default(device);
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "Only dense CPU tensors can be pinned");
  const c10::DeviceGuard guard(where.type() == KIND ? where : Device(KIND, current));
  return at::detail::empty_generic(size, &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Shape size, Shape stride, MaybeDtype dtype, MaybeLayout, MaybeDevice device,
                     std::optional<bool>) {
  const auto where = c10::device_or_default(device);
  const c10::DeviceGuard guard(where.type() == KIND ? where : Device(KIND, current));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  const bool arrives = to.device().type() == KIND, leaves = from.device().type() == KIND;
  if (arrives && !leaves) to_device += from.nbytes();
  if (leaves && !arrives) to_host += from.nbytes();
  auto bytes = on_cpu(to);
  bytes.copy_(on_cpu(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  copy(target, from, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  waits++;
  return at::native::_local_scalar_dense_cpu(on_cpu(tensor));
}

// As torch_npu 2.13 does (ToKernelNpu.cpp): float64 on the device silently becomes float32.
Tensor to_copy(const Tensor& self, MaybeDtype dtype, MaybeLayout layout, MaybeDevice device,
               std::optional<bool> pin, bool non_blocking, std::optional<at::MemoryFormat> format) {
  const bool stays = self.device().type() == KIND && (!device || device->type() == KIND);
  if (stays && casts_double && dtype && *dtype == at::kDouble &&
      self.scalar_type() != at::kDouble) {
    TORCH_WARN_ONCE("Device do not support double dtype now, dtype cast replace with float.");
    tell("double", "_to_copy");
    dtype = at::kFloat;
  }
  if (stays && dtype && (refused & bit(*dtype))) check_dtypes("aten::Cast", "", {*dtype});
  return at::native::_to_copy(self, dtype, layout, device, pin, non_blocking, format);
}

// The CPU's own choice of kernel: torch's composite would take the plain one here, and the last bits
// would not be those of a CPU run.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value,
                 const std::optional<Tensor>& mask, double dropout, bool causal,
                 std::optional<double> scale, bool grouped) {
  const std::string name = "aten::scaled_dot_product_attention";
  check_dtypes(name, "", {query.scalar_type(), key.scalar_type(), value.scalar_type()});
  const bool masked = mask && mask->defined();
  TORCH_CHECK(key.device() == query.device() && value.device() == query.device() &&
                  (!masked || mask->device() == query.device()),
              "Expected all tensors to be on the same device (", name, ")");
  calls++;
  count(name, "");
  std::optional<Tensor> same;
  if (masked) same = on_cpu(*mask);
  at::NoGradGuard no_grad;
  auto mixed = at::scaled_dot_product_attention(on_cpu(query), on_cpu(key), on_cpu(value), same,
                                                dropout, causal, scale, grouped);
  return adopt(mixed, query.device().index());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_to_copy", to_copy);
  m.impl("scaled_dot_product_attention", attention);  // in inference mode there is no Autograd key
  // param.data = a tensor of the device: torch_npu takes it
  m.impl("_has_compatible_shallow_copy_type", [](const Tensor&, const Tensor&) { return true; });
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  // its queues do at once what they are told, so no memory is used again too early
  m.impl("record_stream", [](Tensor&, c10::Stream) {});
  m.impl("resize_", [](const Tensor& self, Shape size, std::optional<at::MemoryFormat> format)
                        -> const Tensor& { return at::native::resize_(self, size, format); });
  m.impl("as_strided", [](const Tensor& self, Shape size, Shape stride,
                          std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("view", [](const Tensor& self, Shape size) { return at::native::view(self, size); });
  m.impl("_reshape_alias", [](const Tensor& self, Shape size, Shape stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  m.impl("set_.source_Tensor", [](Tensor& self, const Tensor& source) -> Tensor& {
    return at::native::set_tensor_(self, source);
  });
  m.impl("set_.source_Storage", [](Tensor& self, at::Storage source) -> Tensor& {
    return at::native::set_(self, source);
  });
  m.impl("set_.source_Storage_storage_offset",
         [](Tensor& self, at::Storage source, int64_t offset, Shape size, Shape stride) -> Tensor& {
           return at::cpu::set_(self, source, offset, size, stride);
         });
}
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("scaled_dot_product_attention", attention);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
namespace {
using namespace at::autocast;
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  LOW(mm) LOW(matmul) LOW(linear) LOW(addmm) LOW(bmm) LOW(baddbmm)
  LOW(scaled_dot_product_attention) LOW(conv1d) LOW(conv2d) LOW(conv3d)
  FULL(layer_norm) FULL(group_norm) FULL(exp) FULL(log) FULL(rsqrt) FULL(softmax, int) FULL(sum)
}
}  // namespace
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

Dtypes mask_of(const std::vector<py::object>& dtypes) {
  Dtypes mask = 0;
  for (const auto& one : dtypes) mask |= bit(reinterpret_cast<THPDtype*>(one.ptr())->scalar_type);
  return mask;
}

}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simulated;
  m.def("set_devices", [](int many, size_t bytes) {
    TORCH_CHECK(0 <= many && many <= MOST_DEVICES, "at most ", MOST_DEVICES, " devices");
    device_count = many;
    for (auto& one : memory) one.capacity = bytes;
  });
  m.def("device_count", [] { return device_count; });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int device) { check_index(DeviceIndex(device)); current = device; });
  m.def("memory", [](int device) {
    check_index(DeviceIndex(device));
    const auto& one = memory[device];
    return std::map<std::string, int64_t>{
        {"used", one.used}, {"peak", one.peak}, {"capacity", int64_t(one.capacity)},
        {"given", one.given}, {"freed", one.freed}, {"refused", one.refused}};
  });
  m.def("reset_peak", [](int device) { memory[device].peak = memory[device].used.load(); });
  m.def("default_generator", [](int device) { return default_generator(DeviceIndex(device)); });
  m.def("refuse", [](const std::vector<py::object>& dtypes) { refused = mask_of(dtypes); });
  m.def("refuse_in", [](const std::string& name, const std::vector<py::object>& dtypes) {
    refused_by[name] = mask_of(dtypes);
  });
  m.def("allow_all", [] { refused = 0; refused_by.clear(); });
  m.def("cast_double", [](bool cast) { casts_double = cast; });
  m.def("set_registered", [](std::vector<std::string> names) {
    registered = {names.begin(), names.end()};
  });
  m.def("listen", [](py::object called) { listener() = std::move(called); });
  m.def("counts", [] {
    std::lock_guard<std::mutex> lock(counts_lock);
    return counts;
  });
  m.def("totals", [] {
    return std::map<std::string, int64_t>{
        {"calls", calls}, {"waits", waits}, {"bytes_to_device", to_device},
        {"bytes_to_host", to_host}};
  });
  m.def("forget", [] {
    std::lock_guard<std::mutex> lock(counts_lock);
    counts.clear();
    calls = waits = to_device = to_host = 0;
  });
  // operators that torch would take apart, and that torch_npu registers whole
  m.def("register_whole", [](const std::vector<std::string>& names) {
    static std::vector<std::unique_ptr<torch::Library>> libraries;
    libraries.push_back(std::make_unique<torch::Library>(
        torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__));
    for (const auto& name : names)
      libraries.back()->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  });
  // newer torch has one; without it an operator registered whole has no way past Autograd
  m.def("pass_autograd", [] {
    constexpr auto key = c10::DispatchKey::AutogradPrivateUse1;
    if (c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(key)) return;
    static torch::Library library(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
    library.fallback(torch::CppFunction::makeFallthrough());
  });
  m.def("on_cpu", &on_cpu);
  m.def("adopt", &adopt);
}
