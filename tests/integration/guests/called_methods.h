/*
 * Calls each method of the handler `Called` (tests/helpers/called_methods.py) by the header that is
 * made of it, in C and in C++, in a program, in the kernel, and with nothing below it.
 */
#ifndef CALLED_METHODS_H
#define CALLED_METHODS_H

#include "called.h"

enum { PASSED = 0x600d, ROOM = 20000 };

/* Ours to give and theirs to fill; both may have pages that were never touched. */
struct called_buffers {
    unsigned char *ours, *theirs;
};

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            return __LINE__;                                                                 \
        }                                                                                    \
    } while (0)

static unsigned called_numbers(const struct vmibridge_caller *caller)
{
    uint64_t large;
    int64_t below;
    int16_t narrow;
    uint32_t three;

    CHECK(!vmibridge_called_unsigned(caller, 0xff, 0xffff, 0xffffffffu, 1ull << 63, &large));
    CHECK(large == (1ull << 63) + 0xffffffffull + 0xffff + 0xff);
    CHECK(!vmibridge_called_signed(caller, -128, -32768, -2147483647 - 1, -(1ll << 62), &below));
    CHECK(below == -(1ll << 62) - 2147483648ll - 32768 - 128);
    CHECK(!vmibridge_called_signed(caller, 127, 32767, 2147483647, 1ll << 62, &below));
    CHECK(below == (1ll << 62) + 2147483647 + 32767 + 127);
    CHECK(!vmibridge_called_narrow(caller, 5, 700, &narrow) && narrow == -695);
    CHECK(!vmibridge_called_narrow(caller, 5, -700, &narrow) && narrow == 705);
    CHECK(!vmibridge_called_three(caller, 0xffffffffu, 3, -1, &three) && three == 1);
    CHECK(!vmibridge_called_three(caller, 0, 0, 0, 0));
    return PASSED;
}

static unsigned called_members(const struct vmibridge_caller *caller)
{
    const vmibridge_called_flags both = VMIBRIDGE_CALLED_FLAGS_A | VMIBRIDGE_CALLED_FLAGS_TOP;
    enum vmibridge_called_mode mode;
    vmibridge_called_flags flags;
    vmibridge_status status;
    bool yes;

    CHECK(!vmibridge_called_members(caller, VMIBRIDGE_CALLED_MODE_WRITE, 0, &mode));
    CHECK(mode == VMIBRIDGE_CALLED_MODE_WRITE);
    CHECK(!vmibridge_called_members(caller, VMIBRIDGE_CALLED_MODE_NEITHER, 0, &mode));
    CHECK(mode == VMIBRIDGE_CALLED_MODE_NEITHER);
    CHECK(!vmibridge_called_members(caller, VMIBRIDGE_CALLED_MODE_READ, both, &mode));
    CHECK(mode == VMIBRIDGE_CALLED_MODE_NEITHER);
    status = vmibridge_called_members(caller, (enum vmibridge_called_mode)9, 0, &mode);
    CHECK(vmibridge_kind_of(status) == VMIBRIDGE_KIND_INVALID_PARAMETERS);
    CHECK(vmibridge_code_of(status) == 1);
    status = vmibridge_called_members(caller, VMIBRIDGE_CALLED_MODE_READ, 2, &mode);
    CHECK(vmibridge_code_of(status) == 2 && mode == 0);
    CHECK(!vmibridge_called_combine(caller, both, false, &flags));
    CHECK(flags == VMIBRIDGE_CALLED_FLAGS_TOP);
    CHECK(!vmibridge_called_combine(caller, VMIBRIDGE_CALLED_FLAGS_B, true, &flags));
    CHECK(flags == (VMIBRIDGE_CALLED_FLAGS_B | VMIBRIDGE_CALLED_FLAGS_TOP));
    CHECK(!vmibridge_called_negate(caller, true, &yes) && !yes);
    CHECK(!vmibridge_called_negate(caller, false, &yes) && yes);
    return PASSED;
}

static unsigned called_texts(const struct vmibridge_caller *caller)
{
    static const vmibridge_char16 WIDE[] = {'w', 0x4e16, 0};
    uint32_t lengths;

    CHECK(!vmibridge_called_texts(caller, "name", WIDE, "", &lengths) && lengths == 0x000204);
    CHECK(!vmibridge_called_texts(caller, "", WIDE + 2, 0, &lengths) && lengths == 0xff0000);
    return PASSED;
}

static unsigned called_by_buffers(const struct vmibridge_caller *caller,
                                  const struct called_buffers *buffers)
{
    vmibridge_status status;
    uint64_t total, sum = 5;
    uint32_t size, i;

    /* Pages that nobody has touched: those of `ours` are read, and those of `theirs` filled. */
    CHECK(!vmibridge_called_total(caller, 5, buffers->ours, ROOM, &total));
    CHECK(!vmibridge_called_fill(caller, 0xa5, buffers->theirs, ROOM, &size) && size == ROOM);
    for (i = 0; i < ROOM; i++) {
        CHECK(buffers->theirs[i] == 0xa5);
        buffers->ours[i] = (unsigned char)(7 * i + i / 256);
        sum += buffers->ours[i];
    }
    CHECK(!vmibridge_called_total(caller, 5, buffers->ours, ROOM, &total) && total == sum);
    CHECK(!vmibridge_called_total(caller, 5, buffers->ours, 0, &total) && total == 5);
    CHECK(!vmibridge_called_reverse(caller, buffers->ours, ROOM, buffers->theirs, ROOM, &size));
    CHECK(size == ROOM);
    for (i = 0; i < ROOM; i++) {
        CHECK(buffers->theirs[i] == buffers->ours[ROOM - 1 - i]);
    }
    CHECK(!vmibridge_called_reverse(caller, 0, 0, buffers->theirs, 1, &size) && size == 1);
    CHECK(!vmibridge_called_reverse(caller, 0, 9, 0, 9, &size) && size == 3);
    CHECK(VMIBRIDGE_CALLED_TOTAL_DATA_LIMIT == ROOM);
    status = vmibridge_called_total(caller, 5, buffers->ours, ROOM + 1, &total);
    CHECK(status == (VMIBRIDGE_KIND_INVALID_PARAMETERS << 8 | 2 << 16) && total == 0);
    return PASSED;
}

static unsigned called_the_rest(const struct vmibridge_caller *caller)
{
    /* Not a copy of the other: for that clang calls memcpy, which is not there. */
    struct vmibridge_caller impatient = vmibridge_by(caller->how);
    struct vmibridge_response response;
    vmibridge_status status;
    uint32_t nothing = 1;
    uint64_t inverted;
    uint8_t sum;

    status = vmibridge_called_fails(caller, VMIBRIDGE_CALLED_PROBLEM_NOT_THERE, &nothing);
    CHECK(vmibridge_kind_of(status) == VMIBRIDGE_KIND_FAILED && nothing == 0);
    CHECK(vmibridge_code_of(status) == VMIBRIDGE_CALLED_PROBLEM_NOT_THERE);
    CHECK(vmibridge_native_of(status) == (sizeof(void *) == 8 ? 0xc0000034u : 0));
    CHECK(!vmibridge_called_slow(caller, 1ull << 40 | (uint64_t)caller->how, &inverted));
    CHECK(inverted == ~(1ull << 40 | (uint64_t)caller->how));
    impatient.sleep = caller->sleep;
    impatient.send = caller->send;
    impatient.state = caller->state;
    impatient.attempts = 1;
    CHECK(vmibridge_called_slow(&impatient, 77, &inverted) == VMIBRIDGE_STATUS_WAITING);
    CHECK(!vmibridge_called_nothing(caller));
    CHECK(!vmibridge_called_slow(caller, 77, &inverted) && inverted == ~(uint64_t)77);
    CHECK(!vmibridge_called_plain(caller, 5, 6, 0, 0, &response));
    CHECK(response.value1 == ~(vmibridge_word)5 && response.value2 == 11);
    CHECK(!vmibridge_called_keywords(caller, 1, 2, 3, 4, &sum) && sum == 10);
    CHECK(VMIBRIDGE_CALLED_ANSWER == 42);
    return PASSED;
}

/* 0x600d, or the line of the check that failed. */
static unsigned call_all(const struct vmibridge_caller *caller, const struct called_buffers *buffers)
{
    unsigned passed = called_numbers(caller);

    passed = passed == PASSED ? called_members(caller) : passed;
    passed = passed == PASSED ? called_texts(caller) : passed;
    passed = passed == PASSED ? called_by_buffers(caller, buffers) : passed;
    return passed == PASSED ? called_the_rest(caller) : passed;
}

#endif
