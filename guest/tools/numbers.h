/* The error numbers of Linux, which the host's handlers answer with, whatever the guest runs. */
#ifndef VMIB_NUMBERS_H
#define VMIB_NUMBERS_H

#include <stdint.h>

enum number {
    NUMBER_EIO = 5, NUMBER_EACCES = 13, NUMBER_EEXIST = 17, NUMBER_ERANGE = 34,
    NUMBER_ENODATA = 61, NUMBER_EBADMSG = 74, NUMBER_ESTALE = 116
};

/* What it means; NULL: it is not known here. */
const char *number_text(uint32_t number);

#endif
