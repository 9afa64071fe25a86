#include <stdio.h>
#include <stdlib.h>

#include <export_zoo/export_zoo.h>

static void check(int code) {
  if (code == EXPORT_ZOO_OK) return;
  fprintf(stderr, "%s\n", export_zoo_last_error()); /* says what is wrong, and what to do */
  exit(1);
}

int main(int argc, char **argv) {
  static unsigned char jpeg[1 << 24];
  FILE *file = argc == 3 ? fopen(argv[2], "rb") : NULL;
  if (file == NULL) {
    fprintf(stderr, "usage: classify BUNDLE IMAGE\n");
    return 2;
  }
  const size_t bytes = fread(jpeg, 1, sizeof(jpeg), file);
  fclose(file);

  export_zoo_options options = EXPORT_ZOO_OPTIONS_INIT;
  options.least = EXPORT_ZOO_STATE_VERIFIED;
  export_zoo_engine *engine;   /* shared by all threads */
  export_zoo_context *context; /* one per thread */
  export_zoo_preprocessor *preprocessor;
  check(export_zoo_engine_load(argv[1], &options, &engine));
  check(export_zoo_context_create(engine, &context));
  check(export_zoo_preprocessor_create(engine, 0, 0, &preprocessor)); /* 0 0: the bundle's own size */

  size_t values, classes, best = 0;
  check(export_zoo_engine_input_count(engine, 1, 0, 0, &values));
  check(export_zoo_engine_output_count(engine, 1, 0, 0, &classes));
  float *input = malloc(values * sizeof(float));
  float *scores = malloc(classes * sizeof(float));
  check(export_zoo_preprocess(preprocessor, jpeg, bytes, input, values));
  check(export_zoo_infer(context, input, values, 1, 0, 0, scores, classes));
  check(export_zoo_probabilities(engine, scores, scores, classes));
  for (size_t i = 1; i < classes; ++i) best = scores[i] > scores[best] ? i : best;
  printf("class %zu, %g %%\n", best, 100 * scores[best]);

  free(scores);
  free(input);
  export_zoo_preprocessor_free(preprocessor);
  export_zoo_context_free(context);
  export_zoo_engine_free(engine);
  return 0;
}
