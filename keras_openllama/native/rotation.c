/* In one pass over memory. */

#include "rotation.h"

#include "rotate_row.h"
#include "worker_threads.h"

/* Heuristics: positions of an item of work; elements that one thread rotates alone. */
enum { POSITIONS = 64, SMALL = 1 << 17 };

static int64_t items_of(const Rotation *r) {
  return (r->length + POSITIONS - 1) / POSITIONS;
}

static void rotate_positions(const void *task, int64_t item, int64_t thread) {
  (void)thread;
  const Rotation *r = task;
  int64_t sequence = item / items_of(r), first = item % items_of(r) * POSITIONS;
  int64_t half = r->head_dim / 2, end = first + POSITIONS;
  if (end > r->length) end = r->length;
  for (int64_t position = first; position < end; position++) {
    int64_t table = sequence * r->table_sequence + position * half;
    for (int64_t head = 0; head < r->heads; head++)
      rotate_row(row_of(r->to, sequence, head, position),
                 row_of(r->from, sequence, head, position), r->cosines + table,
                 r->sines + table, half, r->direction);
  }
}

void rotate_heads(const Rotation *r) {
  int64_t size = r->sequences * r->heads * r->length * r->head_dim;
  share_items(rotate_positions, r, r->sequences * items_of(r),
              size < SMALL ? 1 : r->threads);
}
