// A stand-in for CANN's libascendcl.so: the host's memory as the device's, streams that are done at
// once. Enough for the real torch_npu to be imported, to allocate and to copy on a machine without an
// NPU. It computes nothing; what would compute ends the process (see the end of this file).

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default")))
#define DONE(name, ...) API int name(__VA_ARGS__) { return 0; }

namespace {

constexpr int OK = 0, BAD_DEVICE = 107001, NO_CONTEXT = 107002, OUT_OF_MEMORY = 207001;
constexpr int MOST_DEVICES = 64;

const char* setting(const char* name, const char* fallback) {
  const char* found = getenv(name);
  return found ? found : fallback;
}

int device_count() {
  static const int count = atoi(setting("STANDIN_DEVICES", "2"));
  return count;
}

size_t capacity() {
  static const size_t bytes = size_t(atof(setting("STANDIN_GIB", "64")) * (1ull << 30));
  return bytes;
}

double milliseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

thread_local int current = -1;
int contexts[MOST_DEVICES];

struct Block {
  size_t bytes;
  int device;
};
std::mutex lock;
std::map<void*, Block> blocks;
size_t used[MOST_DEVICES];

struct Stream {
  int device;
};
struct Event {
  double at;
};

std::string said;

}  // namespace

// --- process, devices, contexts -----------------------------------------------------------------

DONE(aclInit, const char*)
DONE(aclFinalize)
API int aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) return BAD_DEVICE;
  current = device;
  return OK;
}
DONE(aclrtResetDevice, int32_t)
API int aclrtGetDevice(int32_t* device) {
  if (current < 0) return NO_CONTEXT;
  *device = current;
  return OK;
}
API int aclrtGetDeviceCount(uint32_t* count) {
  *count = device_count();
  return OK;
}
API int aclrtGetCurrentContext(void** context) {
  if (current < 0) return NO_CONTEXT;
  *context = &contexts[current];
  return OK;
}
API int aclrtSetCurrentContext(void* context) {
  current = int(static_cast<int*>(context) - contexts);
  return OK;
}
API const char* aclrtGetSocName() { return setting("STANDIN_SOC", "Ascend910B3"); }
API int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return OK;
}
DONE(aclrtDeviceEnablePeerAccess, int32_t, uint32_t)
API int aclrtDeviceGetBareTgid(int32_t* id) {
  *id = 1;
  return OK;
}
API int aclGetDeviceCapability(uint32_t, int, int64_t* value) {
  *value = 24;
  return OK;
}
API int aclrtGetDeviceInfo(uint32_t, int, int64_t* value) {
  *value = 24;
  return OK;
}
DONE(aclrtGetDeviceUtilizationRate, int32_t, void*)
API int aclrtQueryDeviceStatus(int32_t, int* status) {
  *status = 0;
  return OK;
}
DONE(aclrtSetDeviceSatMode, int)

// --- memory -------------------------------------------------------------------------------------

API int aclrtMalloc(void** pointer, size_t bytes, int) {
  const int device = current < 0 ? 0 : current;
  std::lock_guard<std::mutex> locked(lock);
  if (used[device] + bytes > capacity()) return OUT_OF_MEMORY;
  if (posix_memalign(pointer, 512, bytes ? bytes : 512)) return OUT_OF_MEMORY;
  blocks[*pointer] = {bytes, device};
  used[device] += bytes;
  return OK;
}
API int aclrtMallocAlign32(void** pointer, size_t bytes, int flag) {
  return aclrtMalloc(pointer, bytes, flag);
}
API int aclrtFree(void* pointer) {
  std::lock_guard<std::mutex> locked(lock);
  const auto block = blocks.find(pointer);
  if (block != blocks.end()) {
    used[block->second.device] -= block->second.bytes;
    blocks.erase(block);
  }
  free(pointer);
  return OK;
}
API int aclrtMallocHost(void** pointer, size_t bytes) {
  return posix_memalign(pointer, 512, bytes ? bytes : 512) ? OUT_OF_MEMORY : OK;
}
API int aclrtFreeHost(void* pointer) {
  free(pointer);
  return OK;
}
API int aclrtGetMemInfo(int, size_t* left, size_t* total) {
  *total = capacity();
  *left = capacity() - used[current < 0 ? 0 : current];
  return OK;
}
API int aclrtMemcpy(void* to, size_t, const void* from, size_t bytes, int) {
  if (bytes) memmove(to, from, bytes);
  return OK;
}
API int aclrtMemcpyAsync(void* to, size_t most, const void* from, size_t bytes, int kind, void*) {
  return aclrtMemcpy(to, most, from, bytes, kind);
}
API int aclrtMemcpyAsyncWithCondition(void* to, size_t most, const void* from, size_t bytes,
                                      int kind, void*) {
  return aclrtMemcpy(to, most, from, bytes, kind);
}
API int aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
  memset(to, value, bytes);
  return OK;
}
API int aclrtMemsetAsync(void* to, size_t, int32_t value, size_t bytes, void*) {
  memset(to, value, bytes);
  return OK;
}

// --- streams and events: everything is done at once ---------------------------------------------

API int aclrtCreateStream(void** stream) {
  *stream = new Stream{current};
  return OK;
}
API int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) {
  return aclrtCreateStream(stream);
}
DONE(aclrtDestroyStream, void*)
DONE(aclrtDestroyStreamForce, void*)
DONE(aclrtSynchronizeStream, void*)
DONE(aclrtSynchronizeStreamWithTimeout, void*, int32_t)
DONE(aclrtSynchronizeDevice)
DONE(aclrtSynchronizeDeviceWithTimeout, int32_t)
API int aclrtStreamQuery(void*, int* status) {
  *status = 0;
  return OK;
}
DONE(aclrtSetStreamFailureMode, void*, uint64_t)
DONE(aclrtSetStreamAttribute, void*, int, void*)
API int aclrtStreamGetId(void* stream, int32_t* id) {
  *id = int(reinterpret_cast<intptr_t>(stream));
  return OK;
}
API int aclrtGetStreamAvailableNum(uint32_t* count) {
  *count = 100;
  return OK;
}
API int aclrtCreateEvent(void** event) {
  *event = new Event{0};
  return OK;
}
API int aclrtCreateEventWithFlag(void** event, uint32_t) { return aclrtCreateEvent(event); }
API int aclrtCreateEventExWithFlag(void** event, uint32_t) { return aclrtCreateEvent(event); }
API int aclrtDestroyEvent(void* event) {
  delete static_cast<Event*>(event);
  return OK;
}
API int aclrtRecordEvent(void* event, void*) {
  static_cast<Event*>(event)->at = milliseconds();
  return OK;
}
DONE(aclrtResetEvent, void*, void*)
API int aclrtQueryEventStatus(void*, int* status) {
  *status = 1;
  return OK;
}
API int aclrtQueryEvent(void*, int* status) {
  *status = 0;
  return OK;
}
API int aclrtQueryEventWaitStatus(void*, int* status) {
  *status = 0;
  return OK;
}
DONE(aclrtSynchronizeEvent, void*)
DONE(aclrtSynchronizeEventWithTimeout, void*, int32_t)
DONE(aclrtStreamWaitEvent, void*, void*)
API int aclrtEventElapsedTime(float* gone, void* from, void* to) {
  *gone = float(static_cast<Event*>(to)->at - static_cast<Event*>(from)->at);
  return OK;
}
API int aclrtEventGetTimestamp(void* event, uint64_t* at) {
  *at = uint64_t(static_cast<Event*>(event)->at * 1e3);
  return OK;
}

// --- versions, settings, words ------------------------------------------------------------------

API void standin_say(const char* text) { said = text; }
API const char* aclGetRecentErrMsg() {
  static thread_local std::string kept;
  kept = said;
  said.clear();
  return kept.empty() ? nullptr : kept.c_str();
}
API int aclrtGetVersion(int32_t* major, int32_t* minor, int32_t* patch) {
  *major = 8;
  *minor = 5;
  *patch = 0;
  return OK;
}
API int aclsysGetVersionStr(char*, char* version) {
  strcpy(version, "8.5.0");
  return OK;
}
API int aclsysGetVersionNum(char*, int32_t* version) {
  *version = 80500000;
  return OK;
}
API int aclGetCannAttributeList(const void** list, size_t* count) {
  *list = nullptr;
  *count = 0;
  return OK;
}
API int aclGetCannAttribute(int, int32_t* value) {
  *value = 1;
  return OK;
}
DONE(aclrtSetOpWaitTimeout, uint32_t)
DONE(aclrtSetOpExecuteTimeOut, uint32_t)
int deterministic = 0;
constexpr int DETERMINISTIC = 0;  // ACL_OPT_DETERMINISTIC
API int standin_deterministic() { return deterministic; }
API int aclrtCtxSetSysParamOpt(int option, int64_t value) {
  if (option == DETERMINISTIC) deterministic = int(value);
  return OK;
}
API int aclrtSetSysParamOpt(int option, int64_t value) {
  return aclrtCtxSetSysParamOpt(option, value);
}
API int aclrtCtxGetSysParamOpt(int, int64_t* value) {
  *value = deterministic;
  return OK;
}
API int aclrtGetSysParamOpt(int, int64_t* value) {
  *value = deterministic;
  return OK;
}
DONE(aclSetCompileopt, int, const char*)
API int aclGetCompileoptSize(int) { return 64; }
// "disable" is jit_compile off; else moving a module casts its weights to a private format with an
// operator that is not here
API int aclGetCompileopt(int, char* value, size_t most) {
  snprintf(value, most, "disable");
  return OK;
}
API uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
DONE(MsprofRegisterCallback, uint32_t, void*)
DONE(MsprofReportAdditionalInfo, uint32_t, const void*, uint32_t)
DONE(MsprofReportApi, uint32_t, const void*)
DONE(MsprofReportCompactInfo, uint32_t, const void*, uint32_t)
API uint64_t MsprofSysCycleTime() { return 0; }
DONE(aclAppLog, ...)
DONE(aclmdlInitDump, ...)
DONE(aclmdlSetDump, ...)
DONE(aclmdlFinalizeDump, ...)

// --- what is not here ---------------------------------------------------------------------------

// A stub of something that computes, and returns 0, would be silent garbage: it ends the process.
#define NOT_HERE(name)                                                                  \
  API int name(...) {                                                                   \
    fprintf(stderr, "[stand-in CANN] %s would compute, and is not emulated\n", #name);  \
    abort();                                                                            \
  }
#define NOT_HERE_BY_NAME(name)                                                            \
  API int name(const char* operation, ...) {                                              \
    fprintf(stderr, "[stand-in CANN] the operator %s is not emulated\n", operation);      \
    abort();                                                                              \
  }
NOT_HERE_BY_NAME(aclopCompileAndExecute)
NOT_HERE_BY_NAME(aclopCompileAndExecuteV2)
NOT_HERE(rtKernelLaunch)
NOT_HERE(rtDevBinaryRegister)
NOT_HERE(rtFunctionRegister)
NOT_HERE(rtGetC2cCtrlAddr)
NOT_HERE(aclrtBinaryGetFunction)
NOT_HERE(aclrtBinaryLoadFromData)
NOT_HERE(aclrtGetFunctionAddr)
NOT_HERE(aclrtMallocPhysical)
NOT_HERE(aclrtFreePhysical)
NOT_HERE(aclrtMapMem)
NOT_HERE(aclrtUnmapMem)
NOT_HERE(aclrtReserveMemAddress)
NOT_HERE(aclrtReleaseMemAddress)
NOT_HERE(aclrtMemExportToShareableHandle)
NOT_HERE(aclrtMemImportFromShareableHandle)
NOT_HERE(aclrtMemSetPidToShareableHandle)
NOT_HERE(aclrtProcessReport)
// these describe such operators, and lead to aclopCompileAndExecute
DONE(aclCreateDataBuffer, ...)
DONE(aclDestroyDataBuffer, ...)
DONE(aclCreateTensorDesc, ...)
DONE(aclDestroyTensorDesc, ...)
DONE(aclGetTensorDescDimV2, ...)
DONE(aclGetTensorDescFormat, ...)
DONE(aclGetTensorDescNumDims, ...)
DONE(aclGetTensorDescType, ...)
DONE(aclSetTensorDescName, ...)
DONE(aclSetTensorFormat, ...)
DONE(aclSetTensorPlaceMent, ...)
DONE(aclSetTensorShape, ...)
DONE(aclopCreateAttr, ...)
DONE(aclopDestroyAttr, ...)
DONE(aclopSetAttrBool, ...)
DONE(aclopSetAttrDataType, ...)
DONE(aclopSetAttrFloat, ...)
DONE(aclopSetAttrInt, ...)
DONE(aclopSetAttrListBool, ...)
DONE(aclopSetAttrListFloat, ...)
DONE(aclopSetAttrListInt, ...)
DONE(aclopSetAttrListListInt, ...)
DONE(aclopSetAttrString, ...)
