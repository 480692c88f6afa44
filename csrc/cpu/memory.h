// Memory on a CPU: pages, what a thread keeps, and gradients whose memory is used again.
#pragma once

#include <cstdint>

namespace fastdiv {

// Ask for huge pages for memory that is about to be written for the first time.
void advise_huge_pages(void* data, int64_t bytes);

// Return memory of the calling thread, which keeps it.  Its next call may return the same.
void* thread_memory(int64_t bytes);

// Memory of gradients that is used again, so that its pages are there.  While somebody keeps it,
// memory that is given back waits for the next gradient of its size: one block of each of the last
// four sizes.
namespace warm {
void keep(bool begin);      // calls nest; the last end frees what waits
void* take(int64_t bytes);  // null unless somebody keeps it and it is worth it
void give_back(void* memory, int64_t bytes) noexcept;  // what take() returned
void empty();                                          // free what waits
int64_t waiting_bytes();
}  // namespace warm

}  // namespace fastdiv
