/* One step of Adam or SGD with p-norm weight decay, in one pass over the memory of a list of
 * tensors: the shrinks Reweighted and Exact of shrink.py, where the notation is, with hold_zeros.
 *
 * Plain C for the CPU (OpenMP) and, with the same arithmetic, CUDA for NVRTC: native.py builds it
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
#define LARGE 1e300
#else
typedef float real;
#define ABS fabsf
#define SQRT sqrtf
#define SMALLEST 0x1p-126f
#define LARGE 1e37f
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

/* Every field of Tensor and Options is 8 bytes: native.py fills them in this order. */
typedef struct {
  storage *param;           /* w, updated in place */
  const storage *grad;      /* the gradient of the loss */
  storage *first, *second;  /* Adam's moments; first alone is SGD's momentum buffer, else null */
  storage *largest;         /* AMSGrad's largest second moment, else null */
  const float *device_step; /* the step's number on a GPU; null where the corrections are given */
  double correction1, correction2; /* 1 - beta1^step and 1 - beta2^step */
  integer is_first;         /* whether SGD's momentum begins with this gradient */
  integer numel;            /* elements of each of them */
} Tensor;

#define COEFFICIENTS 11
#if defined(__AVX512DQ__) && STORAGE != 64 && !defined(__CUDACC__)
#define TERMS 7 /* of each column of the table, which only this processor's loop looks into */
#endif
typedef struct {
  double lr, beta1, beta2, eps; /* Adam's; SGD: beta1 is the momentum, beta2 the dampening */
  double p, lambda_p, weight_decay;
  double limit, branch, slope, offset, coefficients[COEFFICIENTS]; /* of decay.py's ProximalFit */
  const float *table; /* of decay.py's proximal_table, or null */
  const float *device_lr, *device_p, *device_lambda_p; /* the value on a GPU, or null */
  integer rule;                 /* one of enum Rule */
  integer maximize, nesterov;   /* flags: the gradient's sign; SGD's look ahead */
  integer exact, hold_zeros;    /* flags: Exact instead of Reweighted; a weight at 0 stays there */
} Options;

enum Rule { SGD, MOMENTUM, ADAM, AMSGRAD };
enum Exponent { NO_DECAY, P_HALF, P_ONE, P_THREE_HALVES, P_TWO, P_ANY };

/* What the element-wise loops need of Options, for one tensor at one step. */
typedef struct {
  real sign, keep1, blend1, keep2, blend2, look_ahead, own, rate, root_scale, eps;
  real scale, step, exponent, log_step, limit, per_branch, slope, offset;
  real coefficients[COEFFICIENTS];
#ifdef TERMS
  const float *table;
  real threshold, meeting; /* the smallest moved weight that survives; u0 of proximal_table */
#endif
  int decay, exact, hold, polish; /* decay: an enum Exponent; polish: Newton steps after the fit */
} Scalars;

INLINE int exponent_of(double p) {
  return p == 0.5 ? P_HALF : p == 1 ? P_ONE : p == 1.5 ? P_THREE_HALVES : p == 2 ? P_TWO : P_ANY;
}

INLINE double correction(double beta, const float *step, double given) {
#ifdef __CUDACC__ /* in single precision: a thread block waits for it */
  if (step) return -(double)expm1f(*step * (float)log(beta));
#endif
  return given;
}

INLINE Scalars prepare(const Options *o, const Tensor *t) {
  Scalars c;
  double lr = o->device_lr ? (double)*o->device_lr : o->lr;
  double p = o->device_p ? (double)*o->device_p : o->p;
  double lambda_p = o->device_lambda_p ? (double)*o->device_lambda_p : o->lambda_p;
  int adam = o->rule >= ADAM, first = !adam && t->is_first;
  c.sign = o->maximize ? -1 : 1;
  c.keep1 = (real)(first ? 0 : o->beta1);
  c.blend1 = (real)(adam ? 1 - o->beta1 : first ? 1 : 1 - o->beta2);
  c.keep2 = (real)o->beta2;
  c.blend2 = (real)(1 - o->beta2);
  c.look_ahead = (real)(o->nesterov ? o->beta1 : 1);
  c.own = (real)(o->nesterov ? 1 : 0);
  c.rate = (real)(adam ? lr / correction(o->beta1, t->device_step, t->correction1) : lr);
  c.root_scale =
      (real)(adam ? 1 / sqrt(correction(o->beta2, t->device_step, t->correction2)) : 1);
  c.eps = (real)o->eps;
  double scale = 1 / (1 + lr * o->weight_decay), step = lr * lambda_p * scale;
  c.scale = (real)scale;
  c.step = (real)step;
  c.log_step = (real)log2(step);
  c.exponent = (real)(p < 1e30 ? p - 2 : 1e30); /* finite in float, so that 0 * it is 0 */
  c.decay = c.step == 0 ? NO_DECAY : exponent_of(p);
  c.limit = (real)o->limit;
#ifdef TERMS
  c.threshold = (real)(o->table ? pow(step / o->limit, 1 / (2 - p)) : 0);
  c.meeting = (real)(o->table ? pow(o->limit / o->branch, 1 / (2 - p)) : 0);
  c.table = c.threshold > 4 * SMALLEST ? o->table : 0; /* so that its inverse is finite */
#endif
  c.per_branch = (real)(1 / o->branch);
  c.slope = (real)o->slope;
  c.offset = (real)o->offset;
  for (int k = 0; k < COEFFICIENTS; k++) c.coefficients[k] = (real)o->coefficients[k];
  c.exact = o->exact && c.decay != NO_DECAY;
  c.hold = (int)o->hold_zeros;
  c.polish = sizeof(real) == 8 ? 2 : p > 0.98 && p < 1;
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

/* step |w|^(p-2) for any p, from log_step = log2(step). */
INLINE real power_log(real x, real exponent, real log_step) {
  return exponent * (x == 0 ? (real)-1e30 : log_2(x)) + log_step;
}
INLINE real power(real x, real exponent, real log_step) {
  return exp_2(power_log(x, exponent, log_step));
}

/* The shrink Reweighted: 1 / (1 + step |w|^(p-2)). */
INLINE real factor_of(real w, int p, real exponent, real step, real log_step) {
  real x = ABS(w);
  switch (p) {
    case P_HALF: /* |w|^(3/2), bounded so that the quotient is not inf / inf */
      x *= SQRT(x);
      x = x < (real)1e30 ? x : (real)1e30;
      return x / (x + step);
    case P_ONE: return x / (x + step);
    case P_THREE_HALVES: x = SQRT(x); return x / (x + step);
    case P_TWO: return 1 / (1 + step);
    case P_ANY: return 1 / (1 + power(x, exponent, log_step));
    default: return 1;
  }
}

/* The shrink Exact: with r = step |w|^(p-2), the h between 0 and 1 that has h + r h^(p-1) = 1.
 * Where it has a closed form (P_THREE_HALVES in float: for a step up to 1e18): */
INLINE real closed_form(real w, int p, real step) {
  real x = ABS(w);
  if (p == P_ONE) return x > step ? 1 - step / x : 0;
  if (p == P_TWO) return 1 / (1 + step);
  real root = step / 2 + SQRT(step * step / 4 + x), inverse = 1 / root; /* P_THREE_HALVES */
  /* Together they are 1; the smaller one is the more precise. */
  real lost = step * inverse, kept = x * inverse * inverse;
  return x < SMALLEST ? 0 : lost < (real)0.5 ? 1 - lost : kept;
}

/* Elsewhere first r, */
INLINE real ratio_of(real w, int p, const Scalars *c) {
  real x = ABS(w);
  return p == P_HALF ? c->step / (x * SQRT(x)) : power(x, c->exponent, c->log_step);
}

/* then h by the fit of decay.py, up to r = limit; beyond it 0, which is right for p < 1. */
INLINE real fitted(real r, int below_1, const Scalars *c) {
  const real *k = c->coefficients;
  real inside = 1 - r * c->per_branch;
  real z = below_1 ? SQRT(inside > 0 ? inside : 0) : r;
  z = c->slope * z + c->offset;
  real z2 = z * z;
  real even = k[0] + z2 * (k[2] + z2 * (k[4] + z2 * (k[6] + z2 * (k[8] + z2 * k[10]))));
  real odd = k[1] + z2 * (k[3] + z2 * (k[5] + z2 * (k[7] + z2 * k[9])));
  return r <= c->limit ? 1 - r * (even + z * odd) : 0;
}

/* One Newton step towards the h of a weight that survives. */
INLINE real polished(real h, real r, const Scalars *c) {
  real a = c->exponent + 1, safe = h > 0 ? h : 1, other = r * exp_2(a * log_2(safe));
  return h > 0 ? h - (h + other - 1) / (1 + a * other / safe) : 0;
}

/* For 1 < p < 2 beyond the limit: Newton's method for log2 h, as in decay.py. */
INLINE real solved(real r, const Scalars *c) {
  real a = c->exponent + 1, y = log_2(r < LARGE ? r : LARGE), h = y > 0 ? -y / a : 0;
  for (int k = 0; k < 8; k++) {
    real one = exp_2(h), other = exp_2(a * h + y), sum = one + other;
    h -= log_2(sum) * sum / (one + a * other);
  }
  return h < -126 && sizeof(real) == 4 ? 0 : exp_2(h); /* exp_2 would stop at 2^-126 */
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

INLINE storage flushed(real w) { /* no subnormal weight: some CPUs crawl */
  return narrow(ABS(w) < SMALLEST ? 0 : w);
}

#ifdef __CUDACC__

#define TENSORS 40 /* what fits into a kernel's 4 KiB of arguments */
#define BLOCK 4096 /* elements a thread block; native.py knows both numbers */

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
    real w = load(t->param[i]), factor = c.hold && w == 0 ? 0 : 1;
    if (!c.exact) factor *= factor_of(w, c.decay, c.exponent, c.step, c.log_step);
    switch (launch.options.rule) {
      case SGD: w = moved(t, &c, w, i, SGD); break;
      case MOMENTUM: w = moved(t, &c, w, i, MOMENTUM); break;
      case ADAM: w = moved(t, &c, w, i, ADAM); break;
      default: w = moved(t, &c, w, i, AMSGRAD);
    }
    if (c.exact) {
      w *= c.scale * factor;
      real h;
      if (c.decay == P_HALF || c.decay == P_ANY) {
        real r = ratio_of(w, c.decay, &c);
        h = fitted(r, c.exponent < -1, &c);
        if (c.exponent > -1 && r > c.limit) h = solved(r, &c);
        else for (int k = 0; k < c.polish; k++) h = polished(h, r, &c);
      } else {
        h = closed_form(w, c.decay, c.step);
      }
      t->param[i] = flushed(w * h);
    } else {
      t->param[i] = flushed(w * (c.scale * factor));
    }
  }
}

#else

#define BLOCK 256 /* elements whose factors stay in the fastest cache */
#define CHUNK 32 /* elements that take the long way together */

/* A loop for each constant `value`: inside, the compiler sees no branch. */
#define CASE(value, loop) case value: { enum { K = value }; loop } break;

#if defined(__AVX512DQ__) && STORAGE != 64
#include <immintrin.h>
#define ALL(x) _mm512_set1_ps(x)
/* `power` of 16 numbers, log2 and 2^y to about 1e-7 each, in half the operations. With m in [1, 2)
 * and c the centre of that sixteenth of [1, 2) in which m lies,
 * log2(2^e m) = e + log2(c) + log2(1 + (m / c - 1)). */
INLINE __m512 power_16(__m512 x, __m512 exponent, __m512 log_step) {
  const __m512 inverse = _mm512_setr_ps( /* 1 / c, rounded */
      0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f,
      0.711111128f, 0.680851042f, 0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
      0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f);
  const __m512 log_centre = _mm512_setr_ps( /* -log2(inverse) */
      0.0443940759f, 0.129283011f, 0.209453329f, 0.285402209f, 0.357552052f, 0.426264763f,
      0.491853058f, 0.554588914f, 0.614709854f, 0.67242527f, 0.727920413f, 0.781359732f,
      0.832889974f, 0.882643044f, 0.930737436f, 0.977279842f);
  __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); /* of |x| */
  __m512i c = _mm512_srli_epi32(_mm512_castps_si512(m), 19); /* the lowest four bits count */
  __m512 r = _mm512_fmsub_ps(m, _mm512_permutexvar_ps(c, inverse), ALL(1));
  __m512 log = _mm512_fmadd_ps(r, ALL(-0.3609925f), ALL(0.48123223f));
  log = _mm512_fmadd_ps(r, log, ALL(-0.72134743f));
  log = _mm512_fmadd_ps(r, log, ALL(1.44269497f));
  log = _mm512_fmadd_ps(
      r, log, _mm512_add_ps(_mm512_getexp_ps(x), _mm512_permutexvar_ps(c, log_centre)));
  __m512 y = _mm512_fmadd_ps(exponent, log, log_step); /* x = 0 has the logarithm -inf */
  __m512 f = _mm512_reduce_ps(y, 0);                   /* y less the nearest integer; inf: 0 */
  __m512 exp = _mm512_fmadd_ps(f, ALL(0.00132764606f), ALL(0.00967554124f));
  exp = _mm512_fmadd_ps(f, exp, ALL(0.0555071331f));
  exp = _mm512_fmadd_ps(f, exp, ALL(0.240221197f));
  exp = _mm512_fmadd_ps(f, exp, ALL(0.693146967f));
  exp = _mm512_fmadd_ps(f, exp, ALL(1.00000007f));
  return _mm512_scalef_ps(exp, _mm512_sub_ps(y, f));
}

/* `power` of n numbers x, or Reweighted's factor from it. x may be `to`. */
INLINE void powers(const real *x, real *to, int n, real exponent, real log_step, int as_factor) {
  const __m512 p_2 = ALL(exponent), log = ALL(log_step);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512 y = power_16(_mm512_loadu_ps(x + i), p_2, log);
    _mm512_storeu_ps(to + i, as_factor ? _mm512_div_ps(ALL(1), _mm512_add_ps(ALL(1), y)) : y);
  }
  for (; i < n; i++) {
    __m512 y = power_16(ALL(x[i]), p_2, log);
    y = as_factor ? _mm512_div_ps(ALL(1), _mm512_add_ps(ALL(1), y)) : y;
    to[i] = _mm512_cvtss_f32(y);
  }
}
#else
INLINE void powers(const real *x, real *to, int n, real exponent, real log_step, int as_factor) {
  /* Two loops, because one over both is bound by its latency. */
  _Pragma("omp simd") for (int i = 0; i < n; i++) to[i] = power_log(ABS(x[i]), exponent, log_step);
  _Pragma("omp simd") for (int i = 0; i < n; i++) {
    real y = exp_2(to[i]);
    to[i] = as_factor ? 1 / (1 + y) : y;
  }
}
#endif

static void factors(const storage *RESTRICT w, real *RESTRICT f, int n, int p, real exponent,
                    real step, real log_step) {
  if (p == P_ANY) {
    const real *x = sizeof(storage) == sizeof(real) ? (const real *)(const void *)w : f;
    if (x == f)
      for (int i = 0; i < n; i++) f[i] = load(w[i]);
    powers(x, f, n, exponent, log_step, 1);
    return;
  }
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) f[i] = factor_of(load(w[i]), K, exponent, step, log_step);
  switch (p) {
    CASE(NO_DECAY, LOOP) CASE(P_HALF, LOOP) CASE(P_ONE, LOOP) CASE(P_THREE_HALVES, LOOP)
    CASE(P_TWO, LOOP)
  }
#undef LOOP
}

#ifdef TERMS
/* The exact shrink of n moved weights for p < 1 by decay.py's proximal_table, where z is: 1 - h is
 * a polynomial in z's mantissa, and z's exponent with the mantissa's first bit chooses which. */
static void shrink_by_table(float *v, int n, const Scalars *c) {
  __m512 terms[TERMS][2];
  for (int k = 0; k < 2 * TERMS; k++) terms[k / 2][k % 2] = _mm512_loadu_ps(c->table + 16 * k);
  const __m512 per_threshold = ALL(1 / c->threshold);
  for (int i = 0; i < n; i += 16) {
    __m512 w = _mm512_loadu_ps(v + i), x = _mm512_abs_ps(w);
    __m512 z = _mm512_sqrt_ps(_mm512_fmsub_ps(x, per_threshold, ALL(c->meeting)));
    __m512i column = _mm512_srli_epi32(_mm512_castps_si512(z), 22); /* the last five bits count */
    __m512 m = _mm512_getmant_ps(z, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero), lost = ALL(0);
    m = _mm512_sub_ps(m, ALL(1.5f));
    for (int k = TERMS - 1; k >= 0; k--)
      lost = _mm512_fmadd_ps(lost, m, _mm512_permutex2var_ps(terms[k][0], column, terms[k][1]));
    /* Beyond the table a weight loses less than float knows. NaN stays NaN. */
    __mmask16 loses = _mm512_cmp_ps_mask(z, ALL(4096), _CMP_NGE_UQ);
    __mmask16 survives = _mm512_cmp_ps_mask(x, ALL(c->threshold), _CMP_NLT_UQ);
    w = _mm512_mask3_fnmadd_ps(w, lost, w, loses);
    _mm512_storeu_ps(v + i, _mm512_maskz_mov_ps(survives, w));
  }
}
#endif

/* The exact shrink of n moved weights, where it has no closed form: by the table or the fit. */
static void shrink_exactly(real *RESTRICT v, int n, const Scalars *c) {
#ifdef TERMS
  if (c->table) {
    shrink_by_table(v, n, c);
    return;
  }
#endif
  real r[BLOCK], h[BLOCK];
  int below_1 = c->exponent < -1;
  if (c->decay == P_HALF)
    _Pragma("omp simd") for (int i = 0; i < n; i++) r[i] = ratio_of(v[i], P_HALF, c);
  else
    powers(v, r, n, c->exponent, c->log_step, 0);
  if (below_1)
    _Pragma("omp simd") for (int i = 0; i < n; i++) h[i] = fitted(r[i], 1, c);
  else
    _Pragma("omp simd") for (int i = 0; i < n; i++) h[i] = fitted(r[i], 0, c);
  for (int k = 0; k < c->polish; k++)
    _Pragma("omp simd") for (int i = 0; i < n; i++) h[i] = polished(h[i], r[i], c);
  /* Beyond the fit, for 1 < p < 2, are only weights that become very small: by CHUNK of them. */
  for (int begin = 0; !below_1 && begin < n; begin += CHUNK) {
    int end = begin + CHUNK < n ? begin + CHUNK : n, beyond = 0;
    for (int i = begin; i < end; i++) beyond |= (r[i] > c->limit) & (v[i] != 0);
    if (beyond)
      _Pragma("omp simd") for (int i = begin; i < end; i++)
        h[i] = r[i] > c->limit ? solved(r[i], c) : h[i];
  }
  for (int i = 0; i < n; i++) v[i] *= h[i];
}

static void step_block(const Tensor *t, const Scalars *c, integer begin, int n, int rule) {
  real f[BLOCK], v[BLOCK];
  storage *param = t->param + begin;
  if (!c->exact) {
    factors(param, f, n, c->decay, c->exponent, c->step, c->log_step);
    if (c->hold)
      for (int i = 0; i < n; i++) f[i] = load(param[i]) == 0 ? 0 : f[i];
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) \
    param[i] = flushed(moved(t, c, load(param[i]), begin + i, K) * (c->scale * f[i]));
    switch (rule) { CASE(SGD, LOOP) CASE(MOMENTUM, LOOP) CASE(ADAM, LOOP) CASE(AMSGRAD, LOOP) }
#undef LOOP
    return;
  }
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) v[i] = moved(t, c, load(param[i]), begin + i, K) * c->scale;
  switch (rule) { CASE(SGD, LOOP) CASE(MOMENTUM, LOOP) CASE(ADAM, LOOP) CASE(AMSGRAD, LOOP) }
#undef LOOP
  if (c->hold)
    for (int i = 0; i < n; i++) v[i] *= load(param[i]) == 0 ? 0 : 1;
#define LOOP _Pragma("omp simd") \
  for (int i = 0; i < n; i++) param[i] = flushed(v[i] * closed_form(v[i], K, c->step));
  switch (c->decay) {
    CASE(P_ONE, LOOP) CASE(P_THREE_HALVES, LOOP) CASE(P_TWO, LOOP)
#undef LOOP
    default:
      shrink_exactly(v, n, c);
      for (int i = 0; i < n; i++) param[i] = flushed(v[i]);
  }
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
