// A stand-in for CANN's libopapi.so: its aclnn operators, computed by libtorch on the CPU.
//
// An operator has two functions: one that takes the arguments and says how much workspace it needs,
// and one that runs. torch_npu calls the second from its own queue, so the work waits until then.
// What a real kernel rounds, or refuses beyond what is programmed here, is not known from it.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>

#define API extern "C" __attribute__((visibility("default")))

using at::Scalar;
using at::Tensor;

struct aclTensor { Tensor t; };
struct aclScalar { Scalar s; };
struct aclIntArray { std::vector<int64_t> v; };
struct aclFloatArray { std::vector<float> v; };
struct aclBoolArray { std::vector<bool> v; };
struct aclTensorList { std::vector<Tensor> v; };
struct aclScalarList { std::vector<Scalar> v; };
struct Work { const char* name; std::function<void()> run; };

// short, because a hundred operators name them
typedef const aclTensor* T;
typedef const aclScalar* S;
typedef const aclIntArray* I;
typedef const aclTensorList* TL;

extern "C" void standin_say(const char*);

static at::ScalarType dtype_of(int code) {
  switch (code) {
    case 0: return at::kFloat;
    case 1: return at::kHalf;
    case 2: return at::kChar;
    case 3: return at::kInt;
    case 4: return at::kByte;
    case 6: return at::kShort;
    case 9: return at::kLong;
    case 11: return at::kDouble;
    case 12: return at::kBool;
    case 16: return at::kComplexFloat;
    case 17: return at::kComplexDouble;
    case 27: return at::kBFloat16;
  }
  TORCH_CHECK(false, "stand-in CANN: dtype ", code);
}

// --- tensors and lists --------------------------------------------------------------------------

API aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t count, int code,
                               const int64_t* strides, int64_t offset, int, const int64_t*,
                               uint64_t, void* data) {
  static char nothing[64];
  const auto dtype = dtype_of(code);
  char* start = data ? static_cast<char*>(data) + offset * c10::elementSize(dtype) : nothing;
  return new aclTensor{at::from_blob(start, at::IntArrayRef(sizes, count),
                                     at::IntArrayRef(strides, count),
                                     at::TensorOptions().dtype(dtype))};
}
// after an operator whose result's shape depends on its values
API int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* count) {
  const auto shape = tensor->t.sizes();
  *count = shape.size();
  *sizes = new int64_t[shape.size()];
  std::copy(shape.begin(), shape.end(), *sizes);
  return 0;
}
API aclScalar* aclCreateScalar(void* value, int code) {
  switch (dtype_of(code)) {
    case at::kFloat: return new aclScalar{*static_cast<float*>(value)};
    case at::kLong: return new aclScalar{*static_cast<int64_t*>(value)};
    case at::kInt: return new aclScalar{int64_t(*static_cast<int*>(value))};
    case at::kBool: return new aclScalar{*static_cast<bool*>(value)};
    case at::kHalf: return new aclScalar{float(*static_cast<at::Half*>(value))};
    case at::kBFloat16: return new aclScalar{float(*static_cast<at::BFloat16*>(value))};
    default: return new aclScalar{*static_cast<double*>(value)};
  }
}
API aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray{{values, values + count}};
}
API aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
  return new aclFloatArray{{values, values + count}};
}
API aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return new aclBoolArray{std::vector<bool>(values, values + count)};
}
API aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
  auto* list = new aclTensorList;
  for (uint64_t i = 0; i < count; i++) {
    list->v.push_back(tensors[i] ? tensors[i]->t : Tensor());
    delete tensors[i];
  }
  return list;
}
API aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
  auto* list = new aclScalarList;
  for (uint64_t i = 0; i < count; i++) {
    list->v.push_back(scalars[i]->s);
    delete scalars[i];
  }
  return list;
}
#define DESTROYS(kind) \
  API int aclDestroy##kind(const acl##kind* one) { delete one; return 0; }
DESTROYS(Tensor)
DESTROYS(Scalar)
DESTROYS(IntArray)
DESTROYS(FloatArray)
DESTROYS(BoolArray)
DESTROYS(TensorList)
DESTROYS(ScalarList)

// --- how an operator is written -----------------------------------------------------------------

static std::mutex counts_lock;
static std::map<std::string, long> counts;
API void standin_counts(char* text, size_t most) {
  std::string all;
  std::lock_guard<std::mutex> locked(counts_lock);
  for (const auto& [name, count] : counts) all += name + "=" + std::to_string(count) + " ";
  snprintf(text, most, "%s", all.c_str());
}

static int run(Work* work) {
  {
    std::lock_guard<std::mutex> locked(counts_lock);
    counts[work->name]++;
  }
  int code = 0;
  try {
    c10::InferenceMode inference;
    work->run();
  } catch (std::exception& error) {
    fprintf(stderr, "[stand-in CANN] %s: %s\n", work->name, error.what());
    code = 561103;
  }
  delete work;
  return code;
}

// aclnn kernels have no float64: 161002 and this text make the error that torch_npu's users see
static bool refused(const char* argument, const Tensor& tensor) {
  if (tensor.scalar_type() != at::kDouble) return false;
  const auto text = std::string("EZ1001: ") + argument + " not implemented for DT_DOUBLE, should be"
      " in dtype support list [DT_UINT8,DT_INT8,DT_INT16,DT_INT32,DT_INT64,DT_BOOL,DT_FLOAT16,"
      "DT_FLOAT,DT_BFLOAT16,]. [stand-in CANN]";
  standin_say(text.c_str());
  return true;
}

static Tensor of(T tensor) { return tensor ? tensor->t : Tensor(); }
static std::optional<Tensor> maybe(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}
static void put(Tensor to, const Tensor& what) { to.copy_(what); }

#define WS uint64_t *bytes, Work **work
#define RUNS(name) API int name(void*, uint64_t, Work* work, void*) { return run(work); }
#define ACLNN(name, arguments, ...)            \
  API int name##GetWorkspaceSize arguments {   \
    *bytes = 0;                                \
    *work = new Work{#name, __VA_ARGS__};      \
    return 0;                                  \
  }                                            \
  RUNS(name)
#define NO_DOUBLE(name, arguments, checked, ...)      \
  API int name##GetWorkspaceSize arguments {          \
    if (refused("self", checked->t)) return 161002;   \
    *bytes = 0;                                       \
    *work = new Work{#name, __VA_ARGS__};             \
    return 0;                                         \
  }                                                   \
  RUNS(name)
#define V(x) x = of(x)
#define UN(name, f) ACLNN(name, (T a, T o, WS), [V(a), V(o)] { put(o, f(a)); })
#define BIN(name, f) ACLNN(name, (T a, T b, T o, WS), [V(a), V(b), V(o)] { put(o, f(a, b)); })
#define BINS(name, f) \
  ACLNN(name, (T a, S b, T o, WS), [V(a), b = b->s, V(o)] { put(o, f(a, b)); })

// --- the operators ------------------------------------------------------------------------------

UN(aclnnRsqrt, at::rsqrt)
UN(aclnnNeg, at::neg)
UN(aclnnSin, at::sin)
UN(aclnnCos, at::cos)
UN(aclnnExp, at::exp)
UN(aclnnLog, at::log)
UN(aclnnAbs, at::abs)
UN(aclnnReciprocal, at::reciprocal)
UN(aclnnSilu, at::silu)
UN(aclnnRelu, at::relu)
UN(aclnnSigmoid, at::sigmoid)
UN(aclnnTanh, at::tanh)
UN(aclnnSqrt, at::sqrt)
UN(aclnnIsFinite, at::isfinite)
UN(aclnnLogicalNot, at::logical_not)
UN(aclnnBitwiseNot, at::bitwise_not)
UN(aclnnFloor, at::floor)
UN(aclnnCeil, at::ceil)
ACLNN(aclnnGelu, (T a, T o, WS), [V(a), V(o)] { put(o, at::gelu(a, "tanh")); })
ACLNN(aclnnGeluV2, (T a, int64_t m, T o, WS), [V(a), V(o), m] { put(o, at::gelu(a, m == 1 ? "tanh" : "none")); })
ACLNN(aclnnAdd, (T a, T b, S al, T o, WS), [V(a), V(b), al = al->s, V(o)] { put(o, at::add(a, b, al)); })
ACLNN(aclnnAdds, (T a, S b, S al, T o, WS), [V(a), b = b->s, al = al->s, V(o)] { put(o, at::add(a, b, al)); })
ACLNN(aclnnInplaceAdd, (T a, T b, S al, WS), [V(a), V(b), al = al->s] { put(a, at::add(a, b, al)); })
ACLNN(aclnnInplaceAdds, (T a, S b, S al, WS), [V(a), b = b->s, al = al->s] { put(a, at::add(a, b, al)); })
ACLNN(aclnnSub, (T a, T b, S al, T o, WS), [V(a), V(b), al = al->s, V(o)] { put(o, at::sub(a, b, al)); })
ACLNN(aclnnSubs, (T a, S b, S al, T o, WS), [V(a), b = b->s, al = al->s, V(o)] { put(o, at::sub(a, b, al)); })
ACLNN(aclnnRsubs, (T a, S b, S al, T o, WS), [V(a), b = b->s, al = al->s, V(o)] { put(o, at::rsub(a, b, al)); })
ACLNN(aclnnInplaceSub, (T a, T b, S al, WS), [V(a), V(b), al = al->s] { put(a, at::sub(a, b, al)); })
BIN(aclnnMul, at::mul)
BINS(aclnnMuls, at::mul)
BIN(aclnnDiv, at::div)
BINS(aclnnDivs, at::div)
BIN(aclnnMinimum, at::minimum)
BIN(aclnnMaximum, at::maximum)
BINS(aclnnPowTensorScalar, at::pow)
BIN(aclnnEqTensor, at::eq)
BIN(aclnnNeTensor, at::ne)
BIN(aclnnLtTensor, at::lt)
BIN(aclnnGtTensor, at::gt)
BIN(aclnnLeTensor, at::le)
BIN(aclnnGeTensor, at::ge)
BINS(aclnnEqScalar, at::eq)
BINS(aclnnNeScalar, at::ne)
BINS(aclnnLtScalar, at::lt)
BINS(aclnnGtScalar, at::gt)
BINS(aclnnLeScalar, at::le)
BINS(aclnnGeScalar, at::ge)
BIN(aclnnLogicalAnd, at::logical_and)
BIN(aclnnLogicalOr, at::logical_or)
BIN(aclnnBitwiseAndTensor, at::bitwise_and)
BIN(aclnnBitwiseOrTensor, at::bitwise_or)
ACLNN(aclnnPowScalarTensor, (S a, T b, T o, WS), [a = a->s, V(b), V(o)] { put(o, at::pow(a, b)); })
ACLNN(aclnnInplaceMul, (T a, T b, WS), [V(a), V(b)] { put(a, at::mul(a, b)); })
ACLNN(aclnnInplaceMuls, (T a, S b, WS), [V(a), b = b->s] { put(a, at::mul(a, b)); })
ACLNN(aclnnInplaceDiv, (T a, T b, WS), [V(a), V(b)] { put(a, at::div(a, b)); })
ACLNN(aclnnInplaceDivs, (T a, S b, WS), [V(a), b = b->s] { put(a, at::div(a, b)); })
ACLNN(aclnnMm, (T a, T b, T o, int8_t, WS), [V(a), V(b), V(o)] { put(o, at::mm(a, b)); })
ACLNN(aclnnMatmul, (T a, T b, T o, int8_t, WS), [V(a), V(b), V(o)] { put(o, at::matmul(a, b)); })
ACLNN(aclnnBatchMatMul, (T a, T b, T o, int8_t, WS), [V(a), V(b), V(o)] { put(o, at::bmm(a, b)); })
ACLNN(aclnnAddmm, (T c, T a, T b, S be, S al, T o, int8_t, WS), [V(c), V(a), V(b), be = be->s, al = al->s, V(o)] { put(o, at::addmm(c, a, b, be, al)); })
ACLNN(aclnnBaddbmm, (T c, T a, T b, S be, S al, T o, int8_t, WS), [V(c), V(a), V(b), be = be->s, al = al->s, V(o)] { put(o, at::baddbmm(c, a, b, be, al)); })
ACLNN(aclnnCat, (TL l, int64_t d, T o, WS), [v = l->v, d, V(o)] { put(o, at::cat(v, d)); })
ACLNN(aclnnStack, (TL l, int64_t d, T o, WS), [v = l->v, d, V(o)] { put(o, at::stack(v, d)); })
ACLNN(aclnnMean, (T a, I d, bool k, int ty, T o, WS), [V(a), d = d->v, k, ty, V(o)] { put(o, at::mean(a, d, k, dtype_of(ty))); })
ACLNN(aclnnMeanV2, (T a, I d, bool k, bool, T o, WS), [V(a), d = d->v, k, V(o)] { put(o, at::mean(a, d, k)); })
ACLNN(aclnnReduceSum, (T a, I d, bool k, int ty, T o, WS), [V(a), d = d->v, k, ty, V(o)] { put(o, at::sum(a, d, k, dtype_of(ty))); })
ACLNN(aclnnLayerNorm, (T a, I ns, T w, T b, double eps, T o, T m, T r, WS), [V(a), ns = ns->v, V(w), V(b), eps, V(o), V(m), V(r)] { auto x = at::native_layer_norm(a, ns, maybe(w), maybe(b), eps); put(o, std::get<0>(x)); if (m.defined()); put(m, std::get<1>(x)); if (r.defined()); put(r, std::get<2>(x)); })
ACLNN(aclnnGroupNorm, (T a, T w, T b, int64_t n, int64_t c, int64_t hw, int64_t g, double eps, T o, T m, T r, WS), [V(a), V(w), V(b), n, c, hw, g, eps, V(o), V(m), V(r)] { auto x = at::native_group_norm(a.contiguous(), maybe(w), maybe(b), n, c, hw, g, eps); put(o, std::get<0>(x)); })
ACLNN(aclnnRmsNorm, (T a, T g, double eps, T o, T r, WS), [V(a), V(g), eps, V(o), V(r)] { auto f = a.to(at::kFloat); auto q = at::rsqrt(f.pow(2).mean(-1, true) + eps); put(o, (f * q).to(a.scalar_type()) * g); put(r, q); })
ACLNN(aclnnConvolution, (T a, T w, T b, I s, I p, I d, bool tr, I op, int64_t g, T o, int8_t, WS), [V(a), V(w), V(b), s = s->v, p = p->v, d = d->v, tr, op = op->v, g, V(o)] { put(o, at::convolution(a, w, maybe(b), s, p, d, tr, op, g)); })
NO_DOUBLE(aclnnRepeatInterleaveIntWithDim, (T a, int64_t r, int64_t d, int64_t os, T o, WS), a, [V(a), r, d, V(o)] { put(o, at::repeat_interleave(a, r, d)); })
ACLNN(aclnnRepeatInterleaveInt, (T a, int64_t r, int64_t os, T o, WS), [V(a), r, V(o)] { put(o, at::repeat_interleave(a, r)); })
ACLNN(aclnnRepeat, (T a, I r, T o, WS), [V(a), r = r->v, V(o)] { put(o, a.repeat(r)); })
ACLNN(aclnnArange, (S a, S b, S c, T o, WS), [a = a->s, b = b->s, c = c->s, V(o)] { put(o, at::arange(a, b, c, o.options())); })
ACLNN(aclnnLinspace, (S a, S b, int64_t n, T o, WS), [a = a->s, b = b->s, n, V(o)] { put(o, at::linspace(a, b, n, o.options())); })
ACLNN(aclnnEmbedding, (T w, T i, T o, WS), [V(w), V(i), V(o)] { put(o, at::embedding(w, i)); })
ACLNN(aclnnInplaceCopy, (T a, T b, WS), [V(a), V(b)] { put(a, b); })
ACLNN(aclnnCast, (T a, int d, T o, WS), [V(a), V(o)] { put(o, a); })
ACLNN(aclnnInplaceFillScalar, (T a, S v, WS), [V(a), v = v->s] { Tensor x = a; x.fill_(v); })
ACLNN(aclnnInplaceFillTensor, (T a, T v, WS), [V(a), V(v)] { Tensor x = a; x.fill_(v); })
ACLNN(aclnnInplaceZero, (T a, WS), [V(a)] { Tensor x = a; x.zero_(); })
ACLNN(aclnnInplaceOne, (T a, WS), [V(a)] { Tensor x = a; x.fill_(1); })
ACLNN(aclnnClamp, (T a, S lo, S hi, T o, WS), [V(a), l = lo ? std::optional<Scalar>(lo->s) : std::nullopt, h = hi ? std::optional<Scalar>(hi->s) : std::nullopt, V(o)] { put(o, at::clamp(a, l, h)); })
BINS(aclnnClampMin, at::clamp_min)
BINS(aclnnClampMax, at::clamp_max)
ACLNN(aclnnSWhere, (T c, T a, T b, T o, WS), [V(c), V(a), V(b), V(o)] { put(o, at::where(c, a, b)); })
ACLNN(aclnnArgMax, (T a, int64_t d, bool k, T o, WS), [V(a), d, k, V(o)] { put(o, at::argmax(a, d, k)); })
ACLNN(aclnnIndex, (T a, TL ix, T o, WS), [V(a), v = ix->v, V(o)] { c10::List<std::optional<Tensor>> l; for (auto& t : v) l.push_back(t.defined() && t.numel() ? std::optional<Tensor>(t) : std::nullopt); put(o, at::index(a, l)); })
ACLNN(aclnnUpsampleNearest2d, (T a, I s, T o, WS), [V(a), s = s->v, V(o)] { put(o, at::upsample_nearest2d(a, s)); })
ACLNN(aclnnUpsampleNearest2dV2, (T a, I s, float, float, T o, WS), [V(a), s = s->v, V(o)] { put(o, at::upsample_nearest2d(a, s)); })
ACLNN(aclnnSoftmax, (T a, int64_t d, T o, WS), [V(a), d, V(o)] { put(o, at::softmax(a, d)); })
ACLNN(aclnnPermute, (T a, I d, T o, WS), [V(a), d = d->v, V(o)] { put(o, a.permute(d)); })
ACLNN(aclnnAll, (T a, I d, bool k, T o, WS), [V(a), V(o)] { put(o, at::all(a.to(at::kBool))); })
ACLNN(aclnnAny, (T a, I d, bool k, T o, WS), [V(a), V(o)] { put(o, at::any(a.to(at::kBool))); })
ACLNN(aclnnConstantPadNd, (T a, I p, S v, T o, WS), [V(a), p = p->v, v = v->s, V(o)] { put(o, at::constant_pad_nd(a, p, v)); })
ACLNN(aclnnInplaceNormal, (T a, float m, float s, int64_t seed, int64_t off, WS), [V(a), m, s, seed, off] { auto g = at::detail::createCPUGenerator(seed * 1000003 + off); Tensor x = a; x.normal_(m, s, g); })
ACLNN(aclnnInplaceUniform, (T a, double lo, double hi, uint64_t seed, uint64_t off, WS), [V(a), lo, hi, seed, off] { auto g = at::detail::createCPUGenerator(seed * 1000003 + off); Tensor x = a; x.uniform_(lo, hi, g); })
ACLNN(aclnnFlashAttentionScore, (T q, T k, T v, T pse, T drop, T pad, T am, I prefix, double scale, double keep, int64_t pre, int64_t nxt, int64_t heads, char* layout, int64_t inner, int64_t sparse, T smax, T ssum, T sout, T o, WS),
  [V(q), V(k), V(v), V(am), scale, heads, lay = std::string(layout), sparse, V(smax), V(ssum), V(o)] {
        auto sp = [&](const Tensor& x, int64_t n) { if (lay == "BSND") return x.transpose(1, 2); if (lay == "BNSD") return x; if (lay == "BSH") return x.unflatten(-1, {n, -1}).transpose(1, 2); TORCH_CHECK(false, "layout ", lay); };
    int64_t D = lay == "BSH" ? q.size(2) / heads : q.size(3); int64_t nk = lay == "BSND" ? k.size(2) : lay == "BNSD" ? k.size(1) : k.size(2) / D;
    std::optional<Tensor> m; if (am.defined() && am.numel()) m = am.to(at::kBool).logical_not();
    auto r = at::scaled_dot_product_attention(sp(q, heads), sp(k, nk), sp(v, nk), sparse == 2 || sparse == 3 ? std::nullopt : m, 0.0, sparse == 2 || sparse == 3, scale, nk != heads);
    if (lay == "BSND") r = r.transpose(1, 2); else if (lay == "BSH") r = r.transpose(1, 2).flatten(2);
    put(o, r); })

// the result's shape depends on the values: the caller asks for it afterwards
ACLNN(aclnnUniqueConsecutive,
      (T a, bool inverse, bool counted, int64_t dim, T o, T oi, T oc, WS),
      [V(a), inverse, counted, dim, o = const_cast<aclTensor*>(o), oi = const_cast<aclTensor*>(oi),
       oc = const_cast<aclTensor*>(oc)] {
        const auto along = dim == 1000 ? std::nullopt : std::optional<int64_t>(dim);
        const auto [values, places, counts] = at::unique_consecutive(a, inverse, counted, along);
        auto fill = [](aclTensor* to, const Tensor& what) {
          to->t = to->t.flatten().narrow(0, 0, what.numel()).view(what.sizes());
          put(to->t, what);
        };
        fill(o, values);
        if (inverse) fill(oi, places);
        if (counted) fill(oc, counts);
      })

// without these torch_npu takes an operator of the older kind, or the host
ACLNN(aclnnTriu, (T a, int64_t k, T o, WS), [V(a), k, V(o)] { put(o, at::triu(a, k)); })
ACLNN(aclnnTril, (T a, int64_t k, T o, WS), [V(a), k, V(o)] { put(o, at::tril(a, k)); })
UN(aclnnIsNegInf, at::isneginf)
UN(aclnnIsPosInf, at::isposinf)
ACLNN(aclnnInplaceMaskedFillScalar, (T a, T m, S v, WS),
      [V(a), V(m), v = v->s] { put(a, at::masked_fill(a, m, v)); })
ACLNN(aclnnInplaceMaskedFillTensor, (T a, T m, T v, WS),
      [V(a), V(m), V(v)] { put(a, at::masked_fill(a, m, v.reshape({}))); })
ACLNN(aclnnCumsum, (T a, int64_t d, int code, T o, WS),
      [V(a), d, code, V(o)] { put(o, at::cumsum(a, d, dtype_of(code))); })

// fused kernels
ACLNN(aclnnGroupNormSilu, (T a, T w, T b, int64_t groups, double eps, T o, T m, T r, WS),
      [V(a), V(w), V(b), groups, eps, V(o)] {
        put(o, at::silu(at::group_norm(a, groups, maybe(w), maybe(b), eps)));
      })
static Tensor turned(const Tensor& x, int64_t mode) {
  if (mode == 1) {  // interleave
    const auto pairs = x.unflatten(-1, {-1, 2});
    return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
  }
  const auto halves = x.chunk(2, -1);
  return at::cat({-halves[1], halves[0]}, -1);
}
ACLNN(aclnnRotaryPositionEmbedding, (T x, T c, T s, int64_t mode, T o, WS),
      [V(x), V(c), V(s), mode, V(o)] { put(o, x * c + turned(x, mode) * s); })
ACLNN(aclnnRotaryPositionEmbeddingV2, (T x, T c, T s, int64_t mode, T rotate, T o, WS),
      [V(x), V(c), V(s), mode, V(o)] { put(o, x * c + turned(x, mode) * s); })
