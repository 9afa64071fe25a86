import sys
from ctypes import CDLL, byref, c_char_p, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

zoo = CDLL("libexport_zoo.so")
zoo.export_zoo_last_error.restype = c_char_p


def call(function, *arguments):
    if function(*arguments) != 0:
        raise RuntimeError(zoo.export_zoo_last_error().decode())


def pointer(array):
    return array.ctypes.data_as(c_void_p)


bundle, jpeg = sys.argv[1].encode(), Path(sys.argv[2]).read_bytes()
engine, context, preprocessor = c_void_p(), c_void_p(), c_void_p()
call(zoo.export_zoo_engine_load, bundle, None, byref(engine))
call(zoo.export_zoo_context_create, engine, byref(context))
own = c_int64(0), c_int64(0)  # the bundle's own height and width
call(zoo.export_zoo_preprocessor_create, engine, *own, byref(preprocessor))

one, values, classes = c_int64(1), c_size_t(), c_size_t()
call(zoo.export_zoo_engine_input_count, engine, one, *own, byref(values))
call(zoo.export_zoo_engine_output_count, engine, one, *own, byref(classes))
inputs, logits = np.empty(values.value, np.float32), np.empty(classes.value, np.float32)
call(zoo.export_zoo_preprocess, preprocessor, jpeg, c_size_t(len(jpeg)), pointer(inputs), values)
call(zoo.export_zoo_infer, context, pointer(inputs), values, one, *own, pointer(logits), classes)
print("class", logits.argmax())
