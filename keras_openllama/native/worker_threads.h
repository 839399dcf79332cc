/* Items of work that several threads share. */

#ifndef WORKER_THREADS_H
#define WORKER_THREADS_H

#include <stdint.h>

/* Does an item of `task` in the thread of this number. */
typedef void (*DoItem)(const void *task, int64_t item, int64_t thread);

/* Does items 0 to `items` - 1, in any order, in up to `threads` threads. */
void share_items(DoItem do_item, const void *task, int64_t items, int64_t threads);

#endif
