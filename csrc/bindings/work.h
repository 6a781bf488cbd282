// How bindings run what computes on a workspace: now, or as part of what is noted.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "dense.h"

namespace edgemoe {

/// Does work without Python's lock, or adds it to what the workspace notes. It must hold addresses and values only.
template <class Work>
void run(Workspace& ws, Work work) {
  if (ws.notes.is_open()) return ws.notes.add(std::move(work));
  pybind11::gil_scoped_release release;
  work();
}

/// The same of work(position), of a token that is at another one when it is repeated.
template <class Work>
void run_at(Workspace& ws, int pos, Work work) {
  if (ws.notes.is_open()) return ws.notes.add([&ws, work = std::move(work)] { work(ws.notes.pos); });
  pybind11::gil_scoped_release release;
  work(pos);
}

}  // namespace edgemoe
