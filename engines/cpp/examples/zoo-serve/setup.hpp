// How an engine uses the cores: how many requests are computed at once, and on how many threads each.
#pragma once

#include <string>

#include <export_zoo/engine.hpp>

#include "batcher.hpp"

namespace zoo_serve {

struct Setup {
  export_zoo::Engine engine;
  Contexts contexts;
  std::string why;   // Engine::why of the first load, which chose the engine
  std::string told;  // "2 streams of 1 thread", and what was measured
};

// Opens the engine with `streams` of `options.threads` each. If neither is given (both 0), it finds the best here: it times
// streams of one thread, of two, of four, ..., on batches of `batch` images, and one stream of all threads; about half a
// second each. Without Options::measure, it is one stream of all threads. Throws Error.
Setup set_up(const std::string& bundle, export_zoo::Options options, int streams, std::size_t batch);

}  // namespace zoo_serve
