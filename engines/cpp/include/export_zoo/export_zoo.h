/* The library for C99, and for languages that call C. The C++ interface is in engine.hpp and its neighbours.
 *
 * Functions that return int return EXPORT_ZOO_OK or another export_zoo_code. Functions that return text return NULL if
 * they fail. export_zoo_last_error() then says what is wrong, and what to do.
 *
 * Later versions only append: codes, keys, fields of export_zoo_options, functions. Programs call them unchanged.
 */
#ifndef EXPORT_ZOO_EXPORT_ZOO_H
#define EXPORT_ZOO_EXPORT_ZOO_H

#include <stddef.h>
#include <stdint.h>

#include <export_zoo/version.h>
#include <export_zoo/visibility.hpp>

#ifdef __cplusplus
extern "C" {
#endif

/* Kinds of errors, for programs. */
typedef enum export_zoo_code {
  EXPORT_ZOO_OK = 0,
  EXPORT_ZOO_ERROR_BUNDLE = 1,          /* not a bundle, or its manifest is damaged or of another version */
  EXPORT_ZOO_ERROR_CHECKSUM = 2,        /* a file is missing, or is not the one that the manifest describes */
  EXPORT_ZOO_ERROR_STATE = 3,           /* the bundle failed its parity gate, or the engine has too weak a state */
  EXPORT_ZOO_ERROR_BACKEND_MISSING = 4, /* the runtime library was not found, or no engine can run here */
  EXPORT_ZOO_ERROR_BACKEND_VERSION = 5, /* the runtime library is too old, or did not build the engine */
  EXPORT_ZOO_ERROR_DEVICE = 6,          /* no such GPU here */
  EXPORT_ZOO_ERROR_SHAPE = 7,           /* wrong number of values, or a batch or size outside the verified range */
  EXPORT_ZOO_ERROR_IMAGE = 8,           /* bytes that cannot be decoded to an 8-bit RGB image */
  EXPORT_ZOO_ERROR_RUNTIME = 9,         /* the runtime library failed */
  EXPORT_ZOO_ERROR_CPU = 10,            /* on this CPU the INT8 engine's logits would differ from the verified ones */
  EXPORT_ZOO_ERROR_CANCELLED = 11,      /* export_zoo_context_cancel() was called */
  EXPORT_ZOO_ERROR_ARGUMENT = 100,      /* a pointer is NULL, or a value or struct_size is invalid */
  EXPORT_ZOO_ERROR_MEMORY = 101         /* out of memory */
} export_zoo_code;

/* How far an engine was compared with eager PyTorch, weakest first. */
typedef enum export_zoo_state {
  EXPORT_ZOO_STATE_DEFAULT = 0, /* EXPORT_ZOO_STATE_GRAPH_VERIFIED */
  EXPORT_ZOO_STATE_BUILT = 1,
  EXPORT_ZOO_STATE_GRAPH_VERIFIED = 2,
  EXPORT_ZOO_STATE_VERIFIED = 3
} export_zoo_state;

/* A loaded engine: immutable. All threads may use it at the same time. */
typedef struct export_zoo_engine export_zoo_engine;
/* Execution context: one thread at a time may use it. It keeps the engine alive, also after export_zoo_engine_free(). */
typedef struct export_zoo_context export_zoo_context;
/* Turns images into the network's input. All threads may use it at the same time. It does not need its engine. */
typedef struct export_zoo_preprocessor export_zoo_preprocessor;

/* Begin with EXPORT_ZOO_OPTIONS_INIT. Fields that are 0 or NULL, and fields beyond struct_size, have their defaults. */
typedef struct export_zoo_options {
  size_t struct_size;      /* sizeof(export_zoo_options) where the program was compiled */
  const char *engine;      /* engine name; NULL: the fastest engine in the strongest state that may be loaded here */
  const char *onnxruntime; /* libonnxruntime.so.1 or its directory; NULL: $EXPORT_ZOO_ONNXRUNTIME, then the system's */
  const char *openvino;    /* libopenvino_c.so or its directory; NULL: $EXPORT_ZOO_OPENVINO, then the system's */
  const char *tensorrt;    /* libnvinfer or libtensorrt_rtx; NULL: $EXPORT_ZOO_TENSORRT, then the system's */
  int32_t least;           /* export_zoo_state: weakest state that may be loaded */
  int32_t allow_failed;    /* 1: load from a bundle that failed its parity gate, for inspection */
  int32_t no_measure;      /* 1: do not time the engines here if no machine like this one timed them */
  int32_t threads;         /* of each stream; 0: the cores that this process may use, shared by the streams */
  int32_t streams;         /* contexts that compute at the same time; 0: one */
  int32_t device;          /* CUDA device of TensorRT */
  int32_t no_spinning;     /* 1: ONNX Runtime's threads that wait within a call leave their core to others */
  int32_t no_arena;        /* 1: ONNX Runtime gives its memory back after each call */
} export_zoo_options;

#define EXPORT_ZOO_OPTIONS_INIT {sizeof(export_zoo_options), NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, 0}

/* Version of the loaded library, such as "0.1.0"; EXPORT_ZOO_VERSION is that of the header. Any thread. */
EXPORT_ZOO_API const char *export_zoo_version(void);

/* Cores that this process may run on, at most the CPU quota of its container, rounded up. Any thread. */
EXPORT_ZOO_API int export_zoo_usable_cores(void);

/* Message of the last error in the calling thread, "" if there was none. It is valid until the next error in this
 * thread. Calls that succeed leave it. */
EXPORT_ZOO_API const char *export_zoo_last_error(void);

/* Gets a message of a runtime: "ONNX Runtime", "OpenVINO" or "TensorRT". The texts are valid during the call. It is
 * called from any thread, also from several at once, and must not call this library. */
typedef void (*export_zoo_log_function)(void *user_data, int is_error, const char *runtime, const char *message);

/* Sends what runtimes log from now on to `log`, warnings and errors. NULL is the default: errors go to the standard
 * error output, warnings are dropped. Any thread; a call of the function before may still run when it returns. */
EXPORT_ZOO_API int export_zoo_set_log(export_zoo_log_function log, void *user_data);

/* Loads an engine of the bundle, a directory, after checking its files' hashes; `options` may be NULL. Free the engine
 * with export_zoo_engine_free(). On an error, *engine is NULL. Any thread, several at once. */
EXPORT_ZOO_API int export_zoo_engine_load(const char *bundle, const export_zoo_options *options,
                                          export_zoo_engine **engine);

/* Frees the engine and the texts that it gave. No other thread may use them any more. NULL does nothing. */
EXPORT_ZOO_API void export_zoo_engine_free(export_zoo_engine *engine);

/* Keys of export_zoo_engine_text(). */
typedef enum export_zoo_text {
  EXPORT_ZOO_TEXT_JSON = 0,        /* all of the metadata, shapes and labels too: docs/cpp.md */
  EXPORT_ZOO_TEXT_MODEL = 1,       /* "resnet50" */
  EXPORT_ZOO_TEXT_ENGINE = 2,      /* "onnxruntime-int8" */
  EXPORT_ZOO_TEXT_PRECISION = 3,   /* "int8" */
  EXPORT_ZOO_TEXT_STATE = 4,       /* "built", "graph verified" or "verified" */
  EXPORT_ZOO_TEXT_BACKEND = 5,     /* "ONNX Runtime 1.31.1" */
  EXPORT_ZOO_TEXT_WHY = 6,         /* why this engine was chosen, and why others were left out */
  EXPORT_ZOO_TEXT_INPUT_NAME = 7,
  EXPORT_ZOO_TEXT_OUTPUT_NAME = 8,
  EXPORT_ZOO_TEXT_TASK = 9,        /* "classification", "binary", "multilabel", "regression", ... */
  EXPORT_ZOO_TEXT_SCORES = 10      /* "logits", "probabilities" or "values" */
} export_zoo_text;

/* Keys of export_zoo_engine_number(). */
typedef enum export_zoo_number {
  EXPORT_ZOO_NUMBER_BATCH_MIN = 0, /* verified batch sizes */
  EXPORT_ZOO_NUMBER_BATCH_OPT = 1,
  EXPORT_ZOO_NUMBER_BATCH_MAX = 2,
  EXPORT_ZOO_NUMBER_HEIGHT_MIN = 3, /* verified input sizes; all three are equal without --dynamic-size */
  EXPORT_ZOO_NUMBER_HEIGHT_OPT = 4,
  EXPORT_ZOO_NUMBER_HEIGHT_MAX = 5,
  EXPORT_ZOO_NUMBER_WIDTH_MIN = 6,
  EXPORT_ZOO_NUMBER_WIDTH_OPT = 7,
  EXPORT_ZOO_NUMBER_WIDTH_MAX = 8,
  EXPORT_ZOO_NUMBER_LABELS = 9,     /* count of class names; 0 if they are unknown */
  EXPORT_ZOO_NUMBER_OUTPUTS = 10    /* count of the network's outputs */
} export_zoo_number;

/* A text about the bundle and the engine, in UTF-8, which is valid while the engine is. Any thread. */
EXPORT_ZOO_API const char *export_zoo_engine_text(const export_zoo_engine *engine, int key);

/* A number about the bundle and the engine. Any thread. */
EXPORT_ZOO_API int export_zoo_engine_number(const export_zoo_engine *engine, int key, int64_t *number);

/* Name of a class, which is valid while the engine is. NULL if there is no such label. Any thread. */
EXPORT_ZOO_API const char *export_zoo_engine_label(const export_zoo_engine *engine, size_t index);

/* Numbers of float values that a batch of images of this size has in the input and in the output. Height and width 0
 * stand for the size that the bundle was made for, here and below. Any thread. */
EXPORT_ZOO_API int export_zoo_engine_input_count(const export_zoo_engine *engine, int64_t batch, int64_t height,
                                                 int64_t width, size_t *count);
EXPORT_ZOO_API int export_zoo_engine_output_count(const export_zoo_engine *engine, int64_t batch, int64_t height,
                                                  int64_t width, size_t *count);

/* The same of any of the EXPORT_ZOO_NUMBER_OUTPUTS outputs; 0 is the first one. Any thread. */
EXPORT_ZOO_API int export_zoo_engine_output_count_of(const export_zoo_engine *engine, size_t output, int64_t batch,
                                                     int64_t height, int64_t width, size_t *count);

/* Creates a context; each thread needs its own. Free it with export_zoo_context_free(). On an error, *context is NULL.
 * Any thread. */
EXPORT_ZOO_API int export_zoo_context_create(const export_zoo_engine *engine, export_zoo_context **context);

/* Frees the context. No thread may use it any more. NULL does nothing. */
EXPORT_ZOO_API void export_zoo_context_free(export_zoo_context *context);

/* Writes the network's first output for `batch` preprocessed images, image by image, to `output`. `input_count` and
 * `output_count` are the numbers of values there, and must be those of the functions above. Nothing is written on
 * EXPORT_ZOO_ERROR_SHAPE. One thread at a time for each context. */
EXPORT_ZOO_API int export_zoo_infer(export_zoo_context *context, const float *input, size_t input_count, int64_t batch,
                                    int64_t height, int64_t width, float *output, size_t output_count);

/* The same of all outputs: `outputs` are EXPORT_ZOO_NUMBER_OUTPUTS pointers, `output_counts` the numbers of values
 * there. */
EXPORT_ZOO_API int export_zoo_infer_all(export_zoo_context *context, const float *input, size_t input_count,
                                        int64_t batch, int64_t height, int64_t width, float *const *outputs,
                                        const size_t *output_counts, size_t outputs_count);

/* Makes the call of this context that runs now, if there is one, end soon with EXPORT_ZOO_ERROR_CANCELLED. Any thread.
 * NULL does nothing. */
EXPORT_ZOO_API void export_zoo_context_cancel(export_zoo_context *context);

/* Creates the preprocessor of the engine's bundle, for inputs of this size. Free it with
 * export_zoo_preprocessor_free(). On an error, *preprocessor is NULL. Any thread. */
EXPORT_ZOO_API int export_zoo_preprocessor_create(const export_zoo_engine *engine, int64_t height, int64_t width,
                                                  export_zoo_preprocessor **preprocessor);

/* Frees the preprocessor. No other thread may use it any more. NULL does nothing. */
EXPORT_ZOO_API void export_zoo_preprocessor_free(export_zoo_preprocessor *preprocessor);

/* Number of float values of one image. Any thread. */
EXPORT_ZOO_API int export_zoo_preprocessor_count(const export_zoo_preprocessor *preprocessor, size_t *count);

/* Writes the values of one image to `output`, from the bytes of a JPEG or PNG file. `output_count` is
 * export_zoo_preprocessor_count(). Any thread. */
EXPORT_ZOO_API int export_zoo_preprocess(const export_zoo_preprocessor *preprocessor, const void *file,
                                         size_t file_size, float *output, size_t output_count);

/* Writes the probabilities of one image's `count` logits; they add up to 1. The two may be the same memory. Any
 * thread. */
EXPORT_ZOO_API int export_zoo_softmax(const float *logits, float *probabilities, size_t count);

/* The same for one image's values: softmax or sigmoid, as the engine's task says. Probabilities, and the values of
 * regressions and embeddings, are copied as they are. Any thread. */
EXPORT_ZOO_API int export_zoo_probabilities(const export_zoo_engine *engine, const float *values, float *probabilities,
                                            size_t count);

#ifdef __cplusplus
}
#endif

#endif
