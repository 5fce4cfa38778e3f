/* One step of Adam or SGD with p-norm weight decay, in one pass over the memory of a list of
 * tensors: w <- (w - alpha u) / (1 + alpha (lambda_p |w|^(p-2) + weight_decay)).
 *
 * Plain C for the CPU (OpenMP) and, with the same arithmetic, CUDA for NVRTC: fused.py builds it
 * once a storage type, which STORAGE names: 64 and 32 (double, float), 16 (half), 17 (bfloat16).
 * The last two are computed in float. */

#ifdef __CUDACC__
#define INLINE __device__ __forceinline__
#define RESTRICT __restrict__
#else
#include <math.h>
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#endif

#if STORAGE == 64
typedef double real;
#define ABS fabs
#define SQRT sqrt
#define SMALLEST 0x1p-1022 /* the smallest normal number */
#else
typedef float real;
#define ABS fabsf
#define SQRT sqrtf
#define SMALLEST 0x1p-126f
#endif

typedef long long integer;
typedef union { float value; int bits; } Word;

INLINE int bits_of(float x) { Word word; word.value = x; return word.bits; }
INLINE float float_of(int bits) { Word word; word.bits = bits; return word.value; }

#if STORAGE == 17
typedef unsigned short storage;
INLINE real load(storage x) { return float_of((int)((unsigned)x << 16)); }
INLINE storage narrow(real x) { /* round to nearest, ties to even; NaN stays NaN */
  unsigned bits = (unsigned)bits_of(x);
  unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (storage)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
#elif STORAGE == 16 && defined(__CUDACC__)
typedef unsigned short storage;
INLINE real load(storage x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
INLINE storage narrow(real x) {
  storage y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#else
#if STORAGE == 16
typedef _Float16 storage;
#else
typedef real storage;
#endif
INLINE real load(storage x) { return (real)x; }
INLINE storage narrow(real x) { return (storage)x; }
#endif

/* Every field of Tensor and Options is 8 bytes: fused.py fills them in this order. */
typedef struct {
  storage *param;
  const storage *grad;
  storage *first, *second, *largest; /* moments, or SGD's momentum buffer; null where unused */
  storage *auxiliary;                /* q = 1 / (1 + s), null where s follows w at once */
  const float *device_step;          /* the step count on a GPU, null where `step` holds it */
  integer step, refresh, numel;      /* refresh: whether s is refreshed in this step */
} Tensor;

typedef struct {
  double lr, beta1, beta2, eps, p, lambda_p, weight_decay, auxiliary_beta;
  const float *device_lr; /* a learning rate on a GPU, null where `lr` holds it */
  integer rule, maximize, nesterov, reweight_every; /* SGD: beta1 is momentum, beta2 dampening */
} Options;

enum Rule { SGD, MOMENTUM, ADAM, AMSGRAD };
enum Exponent { NO_DECAY, P_HALF, P_ONE, P_THREE_HALVES, P_TWO, P_ANY };

/* What the element-wise loops need of Options, for one tensor at one step. */
typedef struct {
  real sign, keep1, blend1, keep2, blend2, look_ahead, own, rate, root_scale, eps;
  real scale, step, exponent, log_step, auxiliary_beta;
  int decay, auxiliary_decay, refresh;
} Scalars;

INLINE int exponent_of(double p) {
  return p == 0.5 ? P_HALF : p == 1 ? P_ONE : p == 1.5 ? P_THREE_HALVES : p == 2 ? P_TWO : P_ANY;
}

INLINE Scalars prepare(const Options *o, const Tensor *t) {
  Scalars c;
  double lr = o->device_lr ? (double)*o->device_lr : o->lr;
  double count = t->device_step ? (double)*t->device_step : (double)t->step;
  int adam = o->rule >= ADAM, first = !adam && count == 1;
  c.sign = o->maximize ? -1 : 1;
  c.keep1 = (real)(first ? 0 : o->beta1);
  c.blend1 = (real)(adam ? 1 - o->beta1 : first ? 1 : 1 - o->beta2);
  c.keep2 = (real)o->beta2;
  c.blend2 = (real)(1 - o->beta2);
  c.look_ahead = (real)(o->nesterov ? o->beta1 : 1);
  c.own = (real)(o->nesterov ? 1 : 0);
  c.rate = (real)(adam ? lr / (1 - pow(o->beta1, count)) : lr);
  c.root_scale = (real)(adam ? 1 / sqrt(1 - pow(o->beta2, count)) : 1);
  c.eps = (real)o->eps;
  /* 1 + alpha (lambda_p s + weight_decay) = (1 + step s) / scale. */
  double scale = 1 / (1 + lr * o->weight_decay), step = lr * o->lambda_p * scale;
  c.scale = (real)scale;
  c.step = (real)step;
  c.log_step = (real)log2(step);
  c.exponent = (real)(o->p < 1e30 ? o->p - 2 : 1e30); /* finite in float, so that 0 * it is 0 */
  c.auxiliary_beta = (real)o->auxiliary_beta;
  c.auxiliary_decay = exponent_of(o->p);
  c.decay = c.step == 0 ? NO_DECAY : c.auxiliary_decay;
  c.refresh = t->device_step ? ((integer)count - 1) % o->reweight_every == 0 : (int)t->refresh;
  return c;
}

#if STORAGE == 64 || defined(__CUDACC__)
INLINE real log_2(real x) { return log2(x); }
INLINE real exp_2(real x) { return exp2(x); }
#else
/* The C library's log2f and exp2f are calls, which no compiler turns into vector code. These two
 * are accurate to about 1e-7. Independent halves of each polynomial keep its latency short. */
INLINE float log_2(float x) { /* x > 0, finite; below the smallest normal number, that number's */
  const int one = 0x3f800000, half_root = 0x3f3504f3, smallest = 0x00800000; /* 1, sqrt(1/2) */
  int bits = bits_of(x);
  bits = (bits > smallest ? bits : smallest) + (one - half_root);
  float exponent = (float)((bits >> 23) - 127);
  float f = float_of((bits & 0x7fffff) + half_root) - 1, f2 = f * f, f4 = f2 * f2;
  float low = (1.442695f - 0.721347199f * f) + (0.480910281f - 0.360716249f * f) * f2;
  float high = (0.287939048f - 0.238675993f * f) + (0.215213039f - 0.208931961f * f) * f2;
  return exponent + f * (low + f4 * (high + f4 * 0.129259838f));
}

INLINE float exp_2(float y) { /* at most 2^128, which is infinity; at least 2^-126 */
  const float round = 0x1.8p23f; /* adding it leaves no fraction bits */
  y = y < -126 ? -126 : y;
  y = y > 128 ? 128 : y;
  float n = (y + round) - round, f = y - n, f2 = f * f;
  float low = (1 + 0.693147188f * f) + (0.240226511f + 0.055503571f * f) * f2;
  float high = 0.00961803081f + 0.00133908674f * f + 0.000154697231f * f2;
  return float_of(bits_of(low + high * (f2 * f2)) + (int)((unsigned)(int)n << 23));
}
#endif

/* 1 / (1 + step |w|^(p-2)) in two parts, because one loop over both is bound by its latency:
 * the logarithm of step |w|^(p-2) if p is P_ANY, else the factor itself; and its completion. */
INLINE real factor_begun(real w, int p, real exponent, real step, real log_step) {
  real x = ABS(w);
  switch (p) {
    case P_HALF: /* |w|^(3/2), bounded so that the quotient is not inf / inf */
      x *= SQRT(x);
      x = x < (real)1e30 ? x : (real)1e30;
      return x / (x + step);
    case P_ONE: return x / (x + step);
    case P_THREE_HALVES: x = SQRT(x); return x / (x + step);
    case P_TWO: return 1 / (1 + step);
    case P_ANY: return exponent * (x == 0 ? (real)-1e30 : log_2(x)) + log_step;
    default: return 1;
  }
}
INLINE real factor_completed(real y) { return 1 / (1 + exp_2(y)); }

INLINE real relaxed(real q, real fresh, real beta) {
  q = beta * q + (1 - beta) * fresh;
  return q < SMALLEST ? 0 : q;
}
INLINE real factor_of_auxiliary(real q, const Scalars *c) {
  return c->decay == NO_DECAY ? 1 : q / (q + c->step * (1 - q));
}

/* w - alpha u for element i, after updating its moments. */
INLINE real moved(const Tensor *t, const Scalars *c, real w, integer i, int rule) {
  real g = c->sign * load(t->grad[i]);
  if (rule == SGD) return w - c->rate * g;
  if (rule == MOMENTUM) {
    real buffer = c->keep1 * load(t->first[i]) + c->blend1 * g;
    t->first[i] = narrow(buffer);
    return w - c->rate * (c->own * g + c->look_ahead * buffer);
  }
  real m = load(t->first[i]), v = load(t->second[i]);
  m += c->blend1 * (g - m);
  v = c->keep2 * v + c->blend2 * g * g;
  t->first[i] = narrow(m);
  t->second[i] = narrow(v);
  if (rule == AMSGRAD) {
    real largest = load(t->largest[i]);
    v = largest >= v ? largest : v;
    t->largest[i] = narrow(v);
  }
  return w - c->rate * (m / (SQRT(v) * c->root_scale + c->eps));
}

INLINE storage decayed(real w, real factor, const Scalars *c) {
  w *= c->scale * factor;
  return narrow(ABS(w) < SMALLEST ? 0 : w); /* no subnormal weight: some CPUs crawl */
}

#ifdef __CUDACC__

#define TENSORS 40 /* what fits into a kernel's 4 KiB of arguments */
#define BLOCK 4096 /* elements a thread block; fused.py knows both numbers */

typedef struct {
  Options options;
  integer count, first_block[TENSORS];
  Tensor tensors[TENSORS];
} Launch;

extern "C" __global__ void step_cuda(const Launch launch) {
  __shared__ Scalars shared;
  int j = 0;
  while (j + 1 < launch.count && launch.first_block[j + 1] <= blockIdx.x) j++;
  const Tensor *t = &launch.tensors[j];
  if (threadIdx.x == 0) shared = prepare(&launch.options, t);
  __syncthreads();
  const Scalars c = shared;
  integer begin = (blockIdx.x - launch.first_block[j]) * BLOCK;
  integer end = begin + BLOCK < t->numel ? begin + BLOCK : t->numel;
  for (integer i = begin + threadIdx.x; i < end; i += blockDim.x) {
    real w = load(t->param[i]), factor;
    if (t->auxiliary) {
      real q = load(t->auxiliary[i]);
      if (c.refresh) {
        real fresh = factor_begun(w, c.auxiliary_decay, c.exponent, 1, 0);
        if (c.auxiliary_decay == P_ANY) fresh = factor_completed(fresh);
        t->auxiliary[i] = narrow(relaxed(q, fresh, c.auxiliary_beta));
        q = load(t->auxiliary[i]);
      }
      factor = factor_of_auxiliary(q, &c);
    } else {
      factor = factor_begun(w, c.decay, c.exponent, c.step, c.log_step);
      if (c.decay == P_ANY) factor = factor_completed(factor);
    }
    switch (launch.options.rule) {
      case SGD: w = moved(t, &c, w, i, SGD); break;
      case MOMENTUM: w = moved(t, &c, w, i, MOMENTUM); break;
      case ADAM: w = moved(t, &c, w, i, ADAM); break;
      default: w = moved(t, &c, w, i, AMSGRAD);
    }
    t->param[i] = decayed(w, factor, &c);
  }
}

#else

#define BLOCK 256 /* elements whose factors stay in the fastest cache */

/* A loop for each constant `value`: inside, the compiler sees no branch. */
#define CASE(value, loop) case value: { enum { K = value }; loop } break;

static void factors(const storage *RESTRICT w, real *RESTRICT f, int n, int p, real exponent,
                    real step, real log_step) {
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) f[i] = factor_begun(load(w[i]), K, exponent, step, log_step);
  switch (p) {
    CASE(NO_DECAY, LOOP) CASE(P_HALF, LOOP) CASE(P_ONE, LOOP) CASE(P_THREE_HALVES, LOOP)
    CASE(P_TWO, LOOP) CASE(P_ANY, LOOP)
  }
#undef LOOP
  if (p == P_ANY)
    for (int i = 0; i < n; i++) f[i] = factor_completed(f[i]);
}

static void relaxed_factors(const storage *RESTRICT w, storage *RESTRICT auxiliary,
                            real *RESTRICT f, int n, const Scalars *c) {
  if (c->refresh) {
    factors(w, f, n, c->auxiliary_decay, c->exponent, 1, 0);
    for (int i = 0; i < n; i++)
      auxiliary[i] = narrow(relaxed(load(auxiliary[i]), f[i], c->auxiliary_beta));
  }
  for (int i = 0; i < n; i++) f[i] = factor_of_auxiliary(load(auxiliary[i]), c);
}

static void step_block(const Tensor *t, const Scalars *c, integer begin, int n, int rule) {
  real f[BLOCK];
  storage *param = t->param + begin;
  if (t->auxiliary)
    relaxed_factors(param, t->auxiliary + begin, f, n, c);
  else
    factors(param, f, n, c->decay, c->exponent, c->step, c->log_step);
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) \
    param[i] = decayed(moved(t, c, load(param[i]), begin + i, K), f[i], c);
  switch (rule) { CASE(SGD, LOOP) CASE(MOMENTUM, LOOP) CASE(ADAM, LOOP) CASE(AMSGRAD, LOOP) }
#undef LOOP
}

#define GRAIN 32768 /* elements below which starting a thread costs more than it saves */

void step_cpu(const Tensor *tensors, integer count, const Options *options, int threads) {
  integer total = 0;
  for (integer j = 0; j < count; j++) total += tensors[j].numel;
  if (total < GRAIN) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (integer j = 0; j < count; j++) {
    const Tensor t = tensors[j];
    const Scalars c = prepare(options, &t);
    /* Without a barrier between tensors, a thread that the system holds up delays no other. */
#pragma omp for schedule(static) nowait
    for (integer begin = 0; begin < t.numel; begin += BLOCK)
      step_block(&t, &c, begin, (int)(begin + BLOCK < t.numel ? BLOCK : t.numel - begin),
                 (int)options->rule);
  }
}

#endif
