/* What vmib asks of the host beside files: one function a command. They end the program on failure. */
#ifndef VMIB_REQUESTS_H
#define VMIB_REQUESTS_H

#include "platform.h"
#include "vmibridge.h"

/* `level`: one of LOG_LEVELS. Without words, standard input is logged line by line. */
#define LOG_LEVELS "debug, info, warning or error"
bool log_level(const char *text, unsigned *level);
void log_words(unsigned level, int count, char **words);

void print_environment(const char *name);
void fetch(const char *url, const char *path);
void tell_exit(uint32_t status, const char *reason);
void ping(void);

/* Send it once, and print what comes back. Ends the program, if there are no stamps. */
void call(uint32_t magic, uint16_t request, uint16_t method, const vmibridge_word values[4]);

#endif
