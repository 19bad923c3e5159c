#include "numbers.h"

#include <stddef.h>

/* asm-generic/errno-base.h and errno.h. */
const char *number_text(uint32_t number)
{
    static const struct { uint32_t number; const char *text; } TEXTS[] = {
        {1, "not permitted"},
        {2, "there is none of this name"},
        {NUMBER_EIO, "input or output failed"},
        {9, "the transfer is not under way any more"},
        {12, "no memory"},
        {NUMBER_EACCES, "not allowed"},
        {16, "in use"},
        {NUMBER_EEXIST, "the name is taken"},
        {20, "a part of the name is no folder"},
        {21, "it is a folder"},
        {22, "this name, or this value, is not taken"},
        {24, "too many are open"},
        {27, "too large"},
        {28, "no space is left"},
        {30, "nothing can be written there"},
        {32, "nobody reads it any more"},
        {NUMBER_ERANGE, "there is too little room"},
        {36, "the name is too long"},
        {38, "the system cannot do this"},
        {40, "too many links"},
        {NUMBER_ENODATA, "bytes are missing"},
        {NUMBER_EBADMSG, "the SHA-256 is another one"},
        {105, "too many gaps"},
        {110, "it took too long"},
        {NUMBER_ESTALE, "another program has taken it over"},
        {122, "the quota is used up"},
    };

    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++) {
        if (TEXTS[i].number == number) {
            return TEXTS[i].text;
        }
    }
    return NULL;
}
