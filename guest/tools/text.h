/* Texts: put together in memory of a fixed size, compared, and read as numbers. */
#ifndef VMIB_TEXT_H
#define VMIB_TEXT_H

#include "platform.h"

#include <stdarg.h>

/* A text that grows up to its size. What is too much is left out; there is always a NUL. */
struct text { char *start; size_t size, length; };

struct text text_in(char *start, size_t size);

/*
 * Add what `form` says, where
 *
 *   %s  a text              %u  unsigned          %l  uint64_t, in decimal
 *   %%  a percent sign      %x  uint64_t, in hexadecimal
 */
void text_add(struct text *text, const char *form, ...);
void text_add_list(struct text *text, const char *form, va_list list);

/* Print on standard output or standard error, in one piece. */
void print(platform_file file, const char *form, ...);

size_t text_length(const char *text);
bool text_is(const char *one, const char *other);

/* What is behind the last separator of a path. */
const char *text_last_part(const char *path);

/* A number in decimal, or in hexadecimal behind 0x. false: it is none, or has more than 64 bits. */
bool text_number(const char *text, uint64_t *number);

/* Divide, without what a 32-bit compiler calls for that; returns the remainder. */
uint32_t divide(uint64_t *value, uint32_t by);

#endif
