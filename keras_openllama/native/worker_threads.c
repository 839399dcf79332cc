/* Threads are created for each call, which takes some 20 microseconds: calls take
   milliseconds, and a pool would not survive a fork of the process. */

#include "worker_threads.h"

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_THREADS = 256 };

typedef struct {
  DoItem do_item;
  const void *task;
  int64_t items;
  atomic_llong next_item, next_thread;
} Work;

static void *do_items(void *argument) {
  Work *work = argument;
  int64_t thread = atomic_fetch_add(&work->next_thread, 1), item;
  while ((item = atomic_fetch_add(&work->next_item, 1)) < work->items)
    work->do_item(work->task, item, thread);
  return NULL;
}

void share_items(DoItem do_item, const void *task, int64_t items, int64_t threads) {
  Work work = {.do_item = do_item, .task = task, .items = items};
  pthread_t others[MAX_THREADS];
  int64_t started = 0;
  if (threads > items) threads = items;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  /* If a thread cannot be created, the others do its items. */
  while (started < threads - 1 &&
         pthread_create(&others[started], NULL, do_items, &work) == 0)
    started++;
  do_items(&work);
  for (int64_t i = 0; i < started; i++) pthread_join(others[i], NULL);
}
