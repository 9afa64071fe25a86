/* The C interface, in C99: values of Python to the bit, and all errors. c_api_test BUNDLES. */

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <export_zoo/export_zoo.h>

static int failures = 0;

#define CHECK(condition)                                                                                      \
  do {                                                                                                        \
    if (!(condition)) {                                                                                       \
      fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, export_zoo_last_error()); \
      ++failures;                                                                                             \
    }                                                                                                         \
  } while (false)

/* The call fails with this code, and its message has this part. */
#define FAILS(code, part, call) \
  do {                          \
    CHECK((call) == (code));    \
    CHECK(told(part));          \
  } while (false)

static bool told(const char *part) { return strstr(export_zoo_last_error(), part) != NULL; }

static char directory[4096];

static const char *path_of(const char *name) {
  static char path[8192];
  snprintf(path, sizeof(path), "%s/%s", directory, name);
  return path;
}

static void *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) {
    fprintf(stderr, "%s: cannot be read: run ctest\n", path);
    exit(1);
  }
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size + 1);
  if (bytes == NULL || fread(bytes, 1, *size, file) != *size) exit(1);
  fclose(file);
  return bytes;
}

/* The values of a float32 .npy file. */
static float *read_npy(const char *name, size_t *count) {
  size_t size = 0;
  unsigned char *bytes = read_file(path_of(name), &size);
  const size_t begin = 10U + bytes[8] + 256U * bytes[9];
  *count = (size - begin) / sizeof(float);
  memmove(bytes, bytes + begin, size - begin);
  return (float *)(void *)bytes;
}

static export_zoo_engine *load(const char *bundle, const char *name) {
  export_zoo_options options = EXPORT_ZOO_OPTIONS_INIT;
  options.engine = name;
  export_zoo_engine *engine = NULL;
  CHECK(export_zoo_engine_load(path_of(bundle), &options, &engine) == EXPORT_ZOO_OK);
  if (engine == NULL) exit(1);
  return engine;
}

static int64_t number(const export_zoo_engine *engine, int key) {
  int64_t found = -1;
  CHECK(export_zoo_engine_number(engine, key, &found) == EXPORT_ZOO_OK);
  return found;
}

/* Infers the first images of a file, and compares them with the values of another. */
static void check_values(const export_zoo_engine *engine, int64_t batch, int64_t height, int64_t width,
                         const char *inputs, const char *outputs) {
  size_t in_file = 0;
  size_t count = 0;
  size_t given = 0;
  float *input = read_npy(inputs, &in_file);
  CHECK(export_zoo_engine_input_count(engine, batch, height, width, &given) == EXPORT_ZOO_OK && given <= in_file);
  float *want = read_npy(outputs, &in_file);
  CHECK(export_zoo_engine_output_count(engine, batch, height, width, &count) == EXPORT_ZOO_OK && count <= in_file);
  float *found = calloc(count, sizeof(float));
  export_zoo_context *context = NULL;
  CHECK(export_zoo_context_create(engine, &context) == EXPORT_ZOO_OK);
  for (int i = 0; i < 2; ++i) {
    CHECK(export_zoo_infer(context, input, given, batch, height, width, found, count) == EXPORT_ZOO_OK);
    CHECK(memcmp(found, want, count * sizeof(float)) == 0);
  }
  export_zoo_context_free(context);
  free(found);
  free(want);
  free(input);
}

static void test_values(void) {
  const char *names[] = {"onnxruntime-fp32", "onnxruntime-int8"};
  for (int i = 0; i < 2; ++i) {
    char outputs[128];
    export_zoo_engine *engine = load("resnet18.bundle", names[i]);
    snprintf(outputs, sizeof(outputs), "resnet18-%s.npy", names[i]);
    check_values(engine, 8, 0, 0, "resnet18-inputs.npy", outputs);
    check_values(engine, 1, 64, 64, "resnet18-inputs.npy", outputs);
    export_zoo_engine_free(engine);
    engine = load("dynamic.bundle", names[i]);
    snprintf(outputs, sizeof(outputs), "dynamic-%s-61x79.npy", names[i]);
    check_values(engine, 8, 61, 79, "dynamic-inputs-61x79.npy", outputs);
    export_zoo_engine_free(engine);
  }
}

static void test_preprocessing(void) {
  const int64_t sizes[][2] = {{0, 0}, {64, 64}, {96, 50}};
  const char *files[] = {"dynamic-inputs-64x64.npy", "dynamic-inputs-64x64.npy", "dynamic-inputs-96x50.npy"};
  size_t bytes = 0;
  void *jpeg = read_file(path_of("images/00-baseline.jpg"), &bytes);
  export_zoo_engine *engine = load("dynamic.bundle", "onnxruntime-fp32");
  for (int i = 0; i < 3; ++i) {
    size_t count = 0;
    size_t in_file = 0;
    export_zoo_preprocessor *preprocessor = NULL;
    CHECK(export_zoo_preprocessor_create(engine, sizes[i][0], sizes[i][1], &preprocessor) == EXPORT_ZOO_OK);
    CHECK(export_zoo_preprocessor_count(preprocessor, &count) == EXPORT_ZOO_OK);
    float *want = read_npy(files[i], &in_file);
    float *found = calloc(count, sizeof(float));
    CHECK(8 * count == in_file);
    CHECK(export_zoo_preprocess(preprocessor, jpeg, bytes, found, count) == EXPORT_ZOO_OK);
    CHECK(memcmp(found, want, count * sizeof(float)) == 0);
    FAILS(EXPORT_ZOO_ERROR_SHAPE, "one image needs", export_zoo_preprocess(preprocessor, jpeg, bytes, found, count - 1));
    FAILS(EXPORT_ZOO_ERROR_IMAGE, "", export_zoo_preprocess(preprocessor, jpeg, bytes / 2, found, count));
    FAILS(EXPORT_ZOO_ERROR_IMAGE, "", export_zoo_preprocess(preprocessor, jpeg, 0, found, count));
    FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "file is NULL", export_zoo_preprocess(preprocessor, NULL, 0, found, count));
    FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "output is NULL", export_zoo_preprocess(preprocessor, jpeg, bytes, NULL, count));
    FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "count is NULL", export_zoo_preprocessor_count(preprocessor, NULL));
    export_zoo_preprocessor_free(preprocessor);
    free(want);
    free(found);
  }
  export_zoo_preprocessor *preprocessor = NULL;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_preprocessor_create(NULL, 0, 0, &preprocessor));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "address", export_zoo_preprocessor_create(engine, 0, 0, NULL));
  FAILS(EXPORT_ZOO_ERROR_SHAPE, "0x64", export_zoo_preprocessor_create(engine, 0, 64, &preprocessor));
  FAILS(EXPORT_ZOO_ERROR_SHAPE, "-1x-1", export_zoo_preprocessor_create(engine, -1, -1, &preprocessor));
  CHECK(preprocessor == NULL);
  float value = 0;
  size_t count = 0;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "preprocessor is NULL", export_zoo_preprocess(NULL, jpeg, bytes, &value, 1));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "preprocessor is NULL", export_zoo_preprocessor_count(NULL, &count));
  export_zoo_engine_free(engine);
  free(jpeg);
}

static void test_metadata(void) {
  export_zoo_engine *engine = load("dynamic.bundle", "onnxruntime-int8");
  const struct {
    int key;
    const char *begin;
  } texts[] = {{EXPORT_ZOO_TEXT_JSON, "{"},
               {EXPORT_ZOO_TEXT_MODEL, "squeezenet1_1"},
               {EXPORT_ZOO_TEXT_ENGINE, "onnxruntime-int8"},
               {EXPORT_ZOO_TEXT_PRECISION, "int8"},
               {EXPORT_ZOO_TEXT_STATE, "verified"},
               {EXPORT_ZOO_TEXT_BACKEND, "ONNX Runtime 1."},
               {EXPORT_ZOO_TEXT_WHY, "asked for"},
               {EXPORT_ZOO_TEXT_INPUT_NAME, "input"},
               {EXPORT_ZOO_TEXT_OUTPUT_NAME, "logits"},
               {EXPORT_ZOO_TEXT_TASK, "classification"},
               {EXPORT_ZOO_TEXT_SCORES, "logits"}};
  for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); ++i) {
    const char *found = export_zoo_engine_text(engine, texts[i].key);
    CHECK(found != NULL && strncmp(found, texts[i].begin, strlen(texts[i].begin)) == 0);
    CHECK(found == export_zoo_engine_text(engine, texts[i].key));
  }
  const int64_t numbers[] = {1, 4, 8, 48, 64, 96, 48, 64, 96};
  for (int key = EXPORT_ZOO_NUMBER_BATCH_MIN; key <= EXPORT_ZOO_NUMBER_WIDTH_MAX; ++key) {
    CHECK(number(engine, key) == numbers[key]);
  }
  int64_t found = 0;
  CHECK(export_zoo_engine_text(engine, 11) == NULL && told("there is no text 11: give an export_zoo_text"));
  CHECK(export_zoo_engine_text(engine, -1) == NULL);
  CHECK(export_zoo_engine_text(NULL, EXPORT_ZOO_TEXT_JSON) == NULL && told("engine is NULL"));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "there is no number 99", export_zoo_engine_number(engine, 99, &found));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "number is NULL", export_zoo_engine_number(engine, 0, NULL));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_engine_number(NULL, 0, &found));
  export_zoo_engine_free(engine);

  engine = load("head-logit.bundle", "onnxruntime-fp32");
  CHECK(number(engine, EXPORT_ZOO_NUMBER_LABELS) == 2);
  CHECK(strcmp(export_zoo_engine_label(engine, 0), "no") == 0);
  CHECK(strcmp(export_zoo_engine_label(engine, 1), "yes") == 0);
  CHECK(export_zoo_engine_label(engine, 2) == NULL && told("there is no label 2: the bundle has 2"));
  CHECK(export_zoo_engine_label(NULL, 0) == NULL && told("engine is NULL"));
  float values[] = {0, 0};
  CHECK(export_zoo_probabilities(engine, values, values, 1) == EXPORT_ZOO_OK && values[0] == 0.5F && values[1] == 0);
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_probabilities(NULL, values, values, 1));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "values is NULL", export_zoo_probabilities(engine, NULL, values, 1));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "probabilities is NULL", export_zoo_probabilities(engine, values, NULL, 1));
  values[0] = 0;
  CHECK(export_zoo_softmax(values, values, 2) == EXPORT_ZOO_OK && values[0] == 0.5F && values[1] == 0.5F);
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "logits is NULL", export_zoo_softmax(NULL, values, 2));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "probabilities is NULL", export_zoo_softmax(values, NULL, 2));
  export_zoo_engine_free(engine);
}

static void test_errors_of_load(void) {
  export_zoo_engine *engine = NULL;
  export_zoo_options options = EXPORT_ZOO_OPTIONS_INIT;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "bundle is NULL", export_zoo_engine_load(NULL, NULL, &engine));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_engine_load(directory, NULL, NULL));
  FAILS(EXPORT_ZOO_ERROR_BUNDLE, "nothing.bundle", export_zoo_engine_load(path_of("nothing.bundle"), NULL, &engine));
  options.engine = "nothing";
  FAILS(EXPORT_ZOO_ERROR_BUNDLE, "no engine 'nothing': it has onnxruntime-fp32, onnxruntime-int8",
        export_zoo_engine_load(path_of("resnet18.bundle"), &options, &engine));
  options.engine = NULL;
  options.least = 4;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "options->least is 4", export_zoo_engine_load(directory, &options, &engine));
  options.least = EXPORT_ZOO_STATE_VERIFIED;
  options.threads = -1;
  FAILS(EXPORT_ZOO_ERROR_RUNTIME, "threads is -1", export_zoo_engine_load(directory, &options, &engine));
  options.threads = 0;
  options.streams = -1;
  FAILS(EXPORT_ZOO_ERROR_RUNTIME, "streams is -1", export_zoo_engine_load(directory, &options, &engine));
  CHECK(engine == NULL);
}

/* Programs that were compiled with an older or a later header. */
static void test_versions_of_options(void) {
  export_zoo_engine *engine = NULL;
  struct {
    export_zoo_options known;
    void *later;
  } options = {EXPORT_ZOO_OPTIONS_INIT, NULL};
  options.known.engine = "onnxruntime-fp32";
  options.known.threads = -1; /* beyond the end of the older one */
  const size_t older = offsetof(export_zoo_options, onnxruntime);
  const size_t sizes[] = {older, offsetof(export_zoo_options, least), sizeof(options)};
  for (int i = 0; i < 3; ++i) {
    options.known.struct_size = sizes[i];
    if (sizes[i] == sizeof(options)) options.known.threads = 1;
    CHECK(export_zoo_engine_load(path_of("resnet18.bundle"), &options.known, &engine) == EXPORT_ZOO_OK);
    CHECK(strcmp(export_zoo_engine_text(engine, EXPORT_ZOO_TEXT_ENGINE), "onnxruntime-fp32") == 0);
    export_zoo_engine_free(engine);
  }
  options.later = &options;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "update the library", export_zoo_engine_load(directory, &options.known, &engine));
  const size_t wrong[] = {0, 1, sizeof(size_t) + 1, (size_t)-1, (size_t)1 << 20};
  for (int i = 0; i < 5; ++i) {
    options.known.struct_size = wrong[i];
    FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "EXPORT_ZOO_OPTIONS_INIT",
          export_zoo_engine_load(directory, &options.known, &engine));
  }
  CHECK(engine == NULL);
}

static void test_errors_of_inference(void) {
  export_zoo_engine *engine = load("dynamic.bundle", "onnxruntime-fp32");
  export_zoo_context *context = NULL;
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_context_create(NULL, &context));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "context is NULL", export_zoo_context_create(engine, NULL));
  CHECK(export_zoo_context_create(engine, &context) == EXPORT_ZOO_OK);
  size_t in = 0;
  size_t out = 0;
  CHECK(export_zoo_engine_input_count(engine, 1, 0, 0, &in) == EXPORT_ZOO_OK && in == 3U * 64U * 64U);
  CHECK(export_zoo_engine_output_count(engine, 8, 96, 50, &out) == EXPORT_ZOO_OK && out == 8000);
  CHECK(export_zoo_engine_output_count(engine, 1, 0, 0, &out) == EXPORT_ZOO_OK && out == 1000);
  const int64_t wrong[][3] = {{0, 0, 0}, {-1, 0, 0}, {9, 0, 0}, {1, 0, 64}, {1, 47, 64}, {1, 64, 97}, {INT64_MAX, 0, 0}};
  float *input = calloc(in, sizeof(float));
  float output[1000] = {1};
  for (int i = 0; i < 7; ++i) {
    const int64_t batch = wrong[i][0];
    const int64_t height = wrong[i][1];
    const int64_t width = wrong[i][2];
    size_t count = 1;
    FAILS(EXPORT_ZOO_ERROR_SHAPE, "range", export_zoo_engine_input_count(engine, batch, height, width, &count));
    FAILS(EXPORT_ZOO_ERROR_SHAPE, "range", export_zoo_engine_output_count(engine, batch, height, width, &count));
    FAILS(EXPORT_ZOO_ERROR_SHAPE, "range", export_zoo_infer(context, input, in, batch, height, width, output, out));
  }
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_engine_input_count(NULL, 1, 0, 0, &in));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "count is NULL", export_zoo_engine_input_count(engine, 1, 0, 0, NULL));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "engine is NULL", export_zoo_engine_output_count(NULL, 1, 0, 0, &in));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "count is NULL", export_zoo_engine_output_count(engine, 1, 0, 0, NULL));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "context is NULL", export_zoo_infer(NULL, input, in, 1, 0, 0, output, out));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "input is NULL", export_zoo_infer(context, NULL, in, 1, 0, 0, output, out));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "output is NULL", export_zoo_infer(context, input, in, 1, 0, 0, NULL, out));
  FAILS(EXPORT_ZOO_ERROR_SHAPE, "needs 12288", export_zoo_infer(context, input, in - 1, 1, 0, 0, output, out));
  FAILS(EXPORT_ZOO_ERROR_SHAPE, "gives 1000", export_zoo_infer(context, input, in, 1, 0, 0, output, out - 1));
  CHECK(output[0] == 1 && output[1] == 0);
  export_zoo_engine_free(engine); /* the context keeps it */
  CHECK(export_zoo_infer(context, input, in, 1, 0, 0, output, out) == EXPORT_ZOO_OK);
  CHECK(output[0] != 1);
  free(input);
  export_zoo_context_free(context);
  export_zoo_context_free(NULL);
  export_zoo_engine_free(NULL);
  export_zoo_preprocessor_free(NULL);
}

static void test_all_outputs(void) {
  export_zoo_engine *engine = load("Pixels.bundle", "onnxruntime-fp32");
  CHECK(number(engine, EXPORT_ZOO_NUMBER_OUTPUTS) == 2);
  size_t in = 0;
  size_t counts[2] = {0, 0};
  float *found[2] = {NULL, NULL};
  CHECK(export_zoo_engine_input_count(engine, 4, 0, 0, &in) == EXPORT_ZOO_OK);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(export_zoo_engine_output_count_of(engine, i, 4, 0, 0, &counts[i]) == EXPORT_ZOO_OK);
    found[i] = malloc(counts[i] * sizeof(float));
  }
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "there is no output 2: the network has 2",
        export_zoo_engine_output_count_of(engine, 2, 4, 0, 0, &in));
  size_t in_file = 0;
  float *inputs = read_npy("Pixels-inputs.npy", &in_file);
  export_zoo_context *context = NULL;
  CHECK(export_zoo_context_create(engine, &context) == EXPORT_ZOO_OK);
  CHECK(export_zoo_infer_all(context, inputs, in, 4, 0, 0, found, counts, 2) == EXPORT_ZOO_OK);
  const char *files[2] = {"Pixels-onnxruntime-fp32.npy", "Pixels-onnxruntime-fp32-output1.npy"};
  for (size_t i = 0; i < 2; ++i) {
    size_t count = 0;
    float *want = read_npy(files[i], &count);
    CHECK(counts[i] * 4 == count);
    CHECK(memcmp(found[i], want, counts[i] * sizeof(float)) == 0);
    free(want);
  }
  FAILS(EXPORT_ZOO_ERROR_SHAPE, "memory of 0 outputs", export_zoo_infer_all(context, inputs, in, 4, 0, 0, found, counts, 0));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "outputs is NULL", export_zoo_infer_all(context, inputs, in, 4, 0, 0, NULL, counts, 2));
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "output_counts is NULL",
        export_zoo_infer_all(context, inputs, in, 4, 0, 0, found, NULL, 2));
  float *none[2] = {found[0], NULL};
  FAILS(EXPORT_ZOO_ERROR_ARGUMENT, "a pointer in outputs is NULL",
        export_zoo_infer_all(context, inputs, in, 4, 0, 0, none, counts, 2));
  export_zoo_context_cancel(context); /* nothing runs */
  export_zoo_context_cancel(NULL);
  CHECK(export_zoo_infer_all(context, inputs, in, 4, 0, 0, found, counts, 2) == EXPORT_ZOO_OK);
  export_zoo_context_free(context);
  export_zoo_engine_free(engine);
  free(inputs);
  free(found[0]);
  free(found[1]);
}

static void test_sessions(void) {
  export_zoo_options options = EXPORT_ZOO_OPTIONS_INIT;
  options.engine = "onnxruntime-int8";
  options.no_spinning = 1;
  options.no_arena = 1;
  export_zoo_engine *engine = NULL;
  CHECK(export_zoo_engine_load(path_of("resnet18.bundle"), &options, &engine) == EXPORT_ZOO_OK);
  check_values(engine, 4, 0, 0, "resnet18-inputs.npy", "resnet18-onnxruntime-int8.npy");
  export_zoo_engine_free(engine);
}

static void test_version(void) {
  char version[32];
  snprintf(version, sizeof(version), "%d.%d.%d", EXPORT_ZOO_VERSION_MAJOR, EXPORT_ZOO_VERSION_MINOR,
           EXPORT_ZOO_VERSION_PATCH);
  CHECK(strcmp(version, EXPORT_ZOO_VERSION) == 0);
  CHECK(strcmp(export_zoo_version(), EXPORT_ZOO_VERSION) == 0);
  CHECK(export_zoo_usable_cores() >= 1);
  CHECK(export_zoo_set_log(NULL, NULL) == EXPORT_ZOO_OK);
  CHECK(strcmp(export_zoo_last_error(), "") == 0);
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  snprintf(directory, sizeof(directory), "%s", argv[1]);
  test_version();
  test_all_outputs();
  test_sessions();
  test_values();
  test_preprocessing();
  test_metadata();
  test_errors_of_load();
  test_versions_of_options();
  test_errors_of_inference();
  if (failures > 0) fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
