/* Products with the non-zero weights of a layer alone, for the CPU: inference.py builds it.
 *
 * A weight is one multiply-add of whole vectors. For that the images (or tokens) of a batch lie
 * innermost in a padded copy of a part of the input, small enough for the cache; a weight's place
 * is where in it the input of the first output lies, and the inputs of the next outputs follow. So
 * padding, stride (the copy holds every stride-th row and column together), dilation and groups
 * are a matter of places alone, and a linear layer is a convolution of images of one pixel. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 16 /* images or tokens done together, in vectors as wide as the machine's registers */
#if defined(__AVX512F__)
#define WIDTH 16
#define WIDEST 16 /* sums of LANES that registers hold */
#elif defined(__AVX__)
#define WIDTH 8
#define WIDEST 4
#else
#define WIDTH 4
#define WIDEST 2
#endif
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int64_t integer;
typedef struct { float value; int32_t place; } Weight; /* the place counts pixels of the copy */

/* Strides count elements. Every field is 8 bytes: inference.py fills them in this order. */
typedef struct {
  integer images, channels, height, width;          /* of the input */
  integer of_image, of_channel, of_row, of_column;  /* its strides */
  integer outputs, out_height, out_width;
  integer to_image, to_channel, to_row, to_column;  /* the output's strides */
  integer stride_rows, stride_columns, pad_rows, pad_columns;
  integer row_phases, column_phases;                /* rows with these remainders are needed */
  integer rows, columns;                            /* of one phase of a channel of the copy */
  integer chunk, band;                              /* images and output rows done at a time */
  integer is_linear;                                /* one pixel, and channels side by side */
  integer scratch;                                  /* elements of a thread's memory */
} Geometry;

static inline integer least(integer a, integer b) { return a < b ? a : b; }

/* The sums of HIGH rows of WIDE times LANES outputs, over one output channel's weights. */
#define EACH(HIGH, WIDE)                                       \
  _Pragma("GCC unroll 16") for (int r = 0; r < HIGH; r++)      \
    _Pragma("GCC unroll 64") for (int c = 0; c < WIDE * LANES / WIDTH; c++)
#define BLOCK(HIGH, WIDE)                                                                        \
  static void block_##HIGH##_##WIDE(const Weight *w, const Weight *end, float bias,              \
                                    const float *in, integer scale, integer pitch, float *out,   \
                                    integer out_pitch) {                                         \
    vector sum[HIGH][WIDE * LANES / WIDTH];                                                      \
    EACH(HIGH, WIDE) sum[r][c] = bias - (vector){0};                                             \
    for (; w < end; w++) {                                                                       \
      const float *at = in + w->place * scale;                                                   \
      EACH(HIGH, WIDE) sum[r][c] += w->value * *(const vector *)(at + r * pitch + WIDTH * c);    \
    }                                                                                            \
    EACH(HIGH, WIDE) *(vector *)(out + r * out_pitch + WIDTH * c) = sum[r][c];                   \
  }
BLOCK(1, 1) BLOCK(2, 1) BLOCK(4, 1) BLOCK(1, 2) BLOCK(2, 2) BLOCK(4, 2)
BLOCK(1, 4) BLOCK(2, 4) BLOCK(4, 4) BLOCK(1, 8) BLOCK(2, 8) BLOCK(1, 16)
typedef void Block(const Weight *, const Weight *, float, const float *, integer, integer, float *,
                   integer);
static Block *const blocks[5][3] = { /* by the logarithms of WIDE and HIGH */
  {block_1_1, block_2_1, block_4_1}, {block_1_2, block_2_2, block_4_2},
  {block_1_4, block_2_4, block_4_4}, {block_1_8, block_2_8, 0}, {block_1_16, 0, 0}};

/* One output channel: any number of rows of any number of groups of LANES. */
static void channel(const Weight *w, const Weight *end, float bias, const float *in, integer scale,
                    integer pitch, float *out, integer out_pitch, integer rows, integer groups) {
  int wide = 4, high; /* logarithms */
  for (integer c = 0; c < groups; c += 1 << wide) {
    while (1 << wide > least(WIDEST, groups - c)) wide--;
    for (integer r = 0; r < rows; r += 1 << high) {
      for (high = 2; 1 << high > rows - r || 1 << (high + wide) > WIDEST; high--);
      blocks[wide][high](w, end, bias, in + r * pitch + c * LANES, scale, pitch,
                         out + r * out_pitch + c * LANES, out_pitch);
    }
  }
}

/* Copies numbers; true where one of them is NaN or infinite. */
static inline int load(const float *from, integer stride, integer count, float *to) {
  int bad = 0;
  for (integer i = 0; i < count; i++) {
    to[i] = from[i * stride];
    bad |= !(to[i] - to[i] == 0);
  }
  return bad;
}

/* Writes sums, plus the residual where there is one, and then ReLU where it is wanted. */
static inline void store(const float *sum, const float *residual, int relu, float *to,
                         integer count) {
  for (integer i = 0; i < count; i++) {
    float x = sum[i] + (residual ? residual[i] : 0);
    to[i] = relu && x < 0 ? 0 : x;
  }
}

/* Copies what `rows` output rows from y on need of `chunk` images from n on; true where one of the
 * numbers is NaN or infinite. */
static int copy(const Geometry *g, const float *in, integer n, integer chunk, integer y,
                integer rows, float *to) {
  int bad = 0;
  /* Where pixel follows pixel, many are copied at once. */
  int is_line = g->of_image == 1 && g->of_column == chunk && g->stride_columns == 1;
  rows += g->rows - g->band;
  for (integer c = 0; c < g->channels; c++)
    for (integer p = 0; p < g->row_phases; p++)
      for (integer r = 0; r < rows; r++)
        for (integer q = 0; q < g->column_phases; q++) {
          integer line = ((c * g->row_phases + p) * g->rows + r) * g->column_phases + q;
          float *start = to + line * g->columns * chunk, *end = start + g->columns * chunk;
          integer row = (y + r) * g->stride_rows + p - g->pad_rows;
          integer column = q - g->pad_columns; /* of the input */
          const float *from = in + n * g->of_image + c * g->of_channel + row * g->of_row;
          for (; column < 0 && start < end; column += g->stride_columns, start += chunk)
            memset(start, 0, (size_t)chunk * sizeof(float));
          integer width = row >= 0 && row < g->height ? g->width : 0;
          for (integer pixels = 1; column < width && start < end; start += pixels * chunk) {
            if (is_line) pixels = least(width - column, (end - start) / chunk);
            bad |= load(from + column * g->of_column, g->of_image, pixels * chunk, start);
            column += pixels * g->stride_columns;
          }
          memset(start, 0, (size_t)(end - start) * sizeof(float));
        }
  return bad;
}

#if defined(__GNUC__) && !defined(__clang__)
typedef int32_t places __attribute__((vector_size(4 * WIDTH)));
/* Transposes WIDTH x WIDTH numbers: halves change places, then quarters, and so on. */
static inline void transpose_block(vector *v) {
  places index;
  _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++) index[i] = i;
  _Pragma("GCC unroll 4") for (int s = WIDTH / 2; s; s /= 2) {
    places low = index + (((index & s) != 0) & (WIDTH - s)), high = low + s;
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++)
      if (!(i & s)) {
        vector a = v[i], b = v[i + s];
        v[i] = __builtin_shuffle(a, b, low), v[i + s] = __builtin_shuffle(a, b, high);
      }
  }
}
#else
static inline void transpose_block(vector *v) {
  for (int i = 0; i < WIDTH; i++)
    for (int j = 0; j < i; j++) {
      float x = v[i][j];
      v[i][j] = v[j][i], v[j][i] = x;
    }
}
#endif

/* to[c][r] = from[r][c]; true where one of the numbers is NaN or infinite. */
static int transpose(const float *from, integer pitch, integer rows, integer columns, float *to,
                     integer to_pitch) {
  vector sum = {0}; /* of x - x */
  for (integer r = 0; r < rows; r += WIDTH)
    for (integer c = 0; c < columns; c += WIDTH) {
      vector v[WIDTH] = {{0}};
      integer high = least(WIDTH, rows - r), wide = least(WIDTH, columns - c);
      for (integer i = 0; i < high; i++)
        if (wide == WIDTH)
          v[i] = *(const vector *)(from + (r + i) * pitch + c);
        else
          memcpy(&v[i], from + (r + i) * pitch + c, (size_t)wide * sizeof(float));
      for (integer i = 0; i < WIDTH; i++) sum += v[i] - v[i];
      transpose_block(v);
      for (integer i = 0; i < wide; i++)
        if (high == WIDTH)
          *(vector *)(to + (c + i) * to_pitch + r) = v[i];
        else
          memcpy(to + (c + i) * to_pitch + r, &v[i], (size_t)high * sizeof(float));
    }
  int bad = 0;
  for (int i = 0; i < WIDTH; i++) bad |= sum[i] != 0;
  return bad;
}

/* out = convolution of `in` + bias (+ residual, which lies as `out` does), then ReLU if wanted.
 * Returns whether the input holds NaN or infinity: then a product with a zero that was left out
 * would have been NaN, and the output is wrong. */
int convolve(const Geometry *g, const Weight *weights, const integer *ends, const float *bias,
             const float *in, const float *residual, float *out, float *memory, int relu,
             integer parts, int threads) {
  int bad = 0;
  integer chunks = (g->images + g->chunk - 1) / g->chunk;
  integer bands = (g->out_height + g->band - 1) / g->band, tasks = chunks * bands * parts;
#pragma omp parallel for num_threads(threads) reduction(| : bad) schedule(dynamic)
  for (integer task = 0; task < tasks; task++) {
    integer part = task % parts, n = task / parts / bands * g->chunk;
    integer y = task / parts % bands * g->band;
    integer chunk = least(g->chunk, g->images - n);
    integer rows = least(g->band, g->out_height - y);
    integer groups = (g->out_width * chunk + LANES - 1) / LANES;
    integer pitch = g->column_phases * g->columns * chunk, out_pitch = groups * LANES;
    float *mine = memory, *sums;
#ifdef _OPENMP
    mine += omp_get_thread_num() * g->scratch;
#endif
    sums = mine + g->channels * g->row_phases * g->rows * pitch + LANES * LANES; /* GAP */
    bad |= g->is_linear
               ? transpose(in + n * g->of_image, g->of_image, chunk, g->channels, mine, chunk)
               : copy(g, in, n, chunk, y, rows, mine);
    integer first = g->outputs * part / parts, last = g->outputs * (part + 1) / parts;
    for (integer o = first; o < last; o++) {
      float *to = out + n * g->to_image + o * g->to_channel + y * g->to_row;
      const float *added = residual ? residual + (to - out) : 0;
      integer place = g->is_linear ? (o - first) % LANES : 0; /* several are written together */
      channel(weights + (o ? ends[o - 1] : 0), weights + ends[o], bias ? bias[o] : 0, mine, chunk,
              pitch, sums + place * out_pitch, out_pitch, rows, groups);
      if (g->is_linear) {
        if (place == LANES - 1 || o == last - 1)
          transpose(sums, out_pitch, place + 1, chunk, to - place, g->to_image);
        continue;
      }
      integer pixels = g->to_column == chunk ? g->out_width : 1; /* that lie side by side */
      for (integer r = 0; r < rows; r++, to += g->to_row, added += added ? g->to_row : 0)
        for (integer x = 0; x < g->out_width; x += pixels)
          store(sums + r * out_pitch + x * chunk, added ? added + x * g->to_column : 0, relu,
                to + x * g->to_column, pixels * chunk);
    }
  }
  return bad;
}

/* A matrix for one vector at a time. Sixteen rows with about as many weights each are a slice:
 * it holds their first weights, then their second ones, filled up with zeros. */
typedef struct {
  integer rows, columns;
  const integer *ends; /* of the slices, in sixteens */
  const float *values;
  const uint16_t *places; /* columns */
  const int32_t *order;   /* the row of each sum, -1 for none */
  const float *bias;      /* or null */
} Matrix;

/* e^x for x <= 0, to 2 in the last place, in a form that compilers make vectors of. */
static inline float exponential(float x) {
  x = x < -87 ? -87 : x;
  float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
  float tail = 1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r / 720));
  return power.value * (1 + r * (1 + r * (0.5f + r * tail)));
}

/* With erf by Abramowitz and Stegun, 7.1.26, to 1.5e-7. */
static inline float gelu(float x) {
  float z = fabsf(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
  float sum = 1.421413741f + t * (-1.453152027f + t * 1.061405429f);
  float tail = exponential(-z * z) * t * (0.254829592f + t * (-0.284496736f + t * sum));
  return 0.5f * x * (x < 0 ? tail : 2 - tail);
}

enum { SET, ADD, GELU };

/* out = matrix in + bias, added to what is there, or with GELU; by all threads of the team. */
static inline void product(const Matrix *m, const float *in, float *out, int how) {
#pragma omp for schedule(static, 1)
  for (integer s = 0; s < (m->rows + LANES - 1) / LANES; s++) {
    float sum[LANES] = {0};
    for (integer k = s ? m->ends[s - 1] : 0; k < m->ends[s]; k++)
      for (int l = 0; l < LANES; l++)
        sum[l] += m->values[k * LANES + l] * in[m->places[k * LANES + l]];
    const int32_t *order = m->order + s * LANES;
    if (m->bias)
      for (int l = 0; l < LANES; l++) sum[l] += order[l] < 0 ? 0 : m->bias[order[l]];
    if (how == GELU)
      for (int l = 0; l < LANES; l++) sum[l] = gelu(sum[l]);
    for (int l = 0; l < LANES; l++)
      if (order[l] >= 0) out[order[l]] = sum[l] + (how == ADD ? out[order[l]] : 0);
  }
}

/* One product alone; returns whether the input holds NaN or infinity, as `convolve` does. */
int multiply(const Matrix *m, const float *in, float *out, int threads) {
  int bad = 0;
  for (integer k = 0; k < m->columns; k++) bad |= !(in[k] - in[k] == 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
  product(m, in, out, SET);
  return bad;
}

/* models/gpt.py's network, one token at a time: in Python, everything between the products takes
 * longer than they do. `compact` leaves heads with fewer values than keys, and narrower MLPs. */
typedef struct {
  const float *scale1, *shift1, *scale2, *shift2; /* of the layer norms; a shift may be null */
  Matrix qkv, mixed, up, down;
} Layer;
typedef struct {
  integer layers, width, heads, context, vocabulary;
  const float *tokens, *positions, *scale, *shift; /* embeddings, the last layer norm */
  const Layer *layer;
  float *cache; /* (layers, keys or values, heads, context, width / heads) */
  float *memory;
} Decoder;

static void norm(const float *in, const float *scale, const float *shift, integer width,
                 float *out) {
  float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
  for (integer i = 0; i < width; i++) mean += in[i];
  mean /= (float)width;
#pragma omp simd reduction(+ : variance)
  for (integer i = 0; i < width; i++) variance += (in[i] - mean) * (in[i] - mean);
  float factor = 1 / sqrtf(variance / (float)width + 1e-5f);
  for (integer i = 0; i < width; i++)
    out[i] = (in[i] - mean) * factor * scale[i] + (shift ? shift[i] : 0);
}

static float dot(const float *a, const float *b, integer count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (integer i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

/* One head: the position's key and value join the cache, and what it attends to is the output. */
static void attend(const float *query, const float *key, const float *value, integer size,
                   integer value_size, float *keys, float *values, integer position,
                   float *weights, float *out) {
  memcpy(keys + position * size, key, (size_t)size * sizeof(float));
  memcpy(values + position * size, value, (size_t)value_size * sizeof(float));
  float scale = 1 / sqrtf((float)size), largest = -INFINITY, sum = 0;
  for (integer t = 0; t <= position; t++) {
    weights[t] = scale * dot(query, keys + t * size, size);
    largest = weights[t] > largest ? weights[t] : largest;
  }
  for (integer t = 0; t <= position; t++) weights[t] = exponential(weights[t] - largest);
  for (integer t = 0; t <= position; t++) sum += weights[t];
  memset(out, 0, (size_t)value_size * sizeof(float));
  for (integer t = 0; t <= position; t++)
    for (integer i = 0; i < value_size; i++) out[i] += weights[t] / sum * values[t * size + i];
}

/* The logits of the token after the one at `position`, whose key and value join the cache. */
void decode(const Decoder *d, integer token, integer position, float *logits, int threads) {
  integer width = d->width, size = width / d->heads;
  float *x = d->memory, *normed = x + width, *mixed = normed + width, *qkv = mixed + width;
  float *weights = qkv + 3 * width, *hidden = weights + d->heads * d->context;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (integer i = 0; i < width; i++)
      x[i] = d->tokens[token * width + i] + d->positions[position * width + i];
    for (integer n = 0; n < d->layers; n++) {
      const Layer *layer = d->layer + n;
      integer value_size = layer->mixed.columns / d->heads;
#pragma omp single
      norm(x, layer->scale1, layer->shift1, width, normed);
      product(&layer->qkv, normed, qkv, SET);
#pragma omp for
      for (integer h = 0; h < d->heads; h++) {
        float *keys = d->cache + (2 * n * d->heads + h) * d->context * size;
        attend(qkv + h * size, qkv + width + h * size, qkv + 2 * width + h * value_size, size,
               value_size, keys, keys + d->heads * d->context * size, position,
               weights + h * d->context, mixed + h * value_size);
      }
      product(&layer->mixed, mixed, x, ADD);
#pragma omp single
      norm(x, layer->scale2, layer->shift2, width, normed);
      product(&layer->up, normed, hidden, GELU);
      product(&layer->down, hidden, x, ADD);
    }
#pragma omp single
    norm(x, d->scale, d->shift, width, normed);
#pragma omp for
    for (integer i = 0; i < d->vocabulary; i++)
      logits[i] = dot(normed, d->tokens + i * width, width);
  }
}
