// How bindings run work on a workspace: now, or recorded to be repeated later.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "dense.h"

namespace edgemoe {

/// Runs work without the GIL, or adds it to the recording in `Workspace::notes` if one is open. Work must hold
/// addresses and values only.
template <class Work>
void run(Workspace& ws, Work work) {
  if (ws.notes.is_open()) return ws.notes.add(std::move(work));
  pybind11::gil_scoped_release release;
  work();
}

/// The same for work(position), which is called with the position of each repetition.
template <class Work>
void run_at(Workspace& ws, int pos, Work work) {
  if (ws.notes.is_open()) return ws.notes.add([&ws, work = std::move(work)] { work(ws.notes.pos); });
  pybind11::gil_scoped_release release;
  work(pos);
}

}  // namespace edgemoe
