/*
 * Goes through vmibridge.h, for the handler `Work` of tests/integration/test_c_header.py. Ends with
 * eax = 0x600d, or the number of the check that failed, and how often it slept in edx.
 *
 *   -DHOW=1|2|3   the instruction
 */
#include "vmibridge.h"

enum { REQUEST = 0x0100, MIX = 1, GATE = 2, ABORTS = 3, WAITS = 4, NO_SUCH_REQUEST = 0x0199 };
enum { PASSED = 0x600d, SECRET = 0x5ec2e7 };

#define CHECK(number, condition)                                                             \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            return number;                                                                   \
        }                                                                                    \
    } while (0)

static uint32_t slept;

static void doze(void *state)
{
    slept += *(uint32_t *)state == SECRET;
}

static uint32_t check_calls(void)
{
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, REQUEST, MIX, 70, 20, 0, 0};
    struct vmibridge_response response = vmibridge_call(HOW, &packet);

    CHECK(1, vmibridge_stamped(&response));
    CHECK(2, response.value1 == 50 && response.value2 == 140);
    CHECK(3, vmibridge_verified(&response, VMIBRIDGE_STAMP3, VMIBRIDGE_STAMP4));
    CHECK(4, !vmibridge_verified(&response, VMIBRIDGE_STAMP3 + 1, VMIBRIDGE_STAMP4));
    CHECK(5, !vmibridge_verified(&response, VMIBRIDGE_STAMP3, VMIBRIDGE_STAMP4 + 1));
    packet.request = NO_SUCH_REQUEST;
    response = vmibridge_call(HOW, &packet);
    CHECK(6, !vmibridge_stamped(&response));
    return PASSED;
}

static uint32_t check_gates(void)
{
    uint32_t secret = SECRET;
    struct vmibridge_retry retry = {10, VMIBRIDGE_WAIT, 2, doze, &secret};
    const struct vmibridge_retry short_of = {3, VMIBRIDGE_WAIT, 0, NULL, NULL};
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, REQUEST, GATE, 5, 0, 0, 0};
    struct vmibridge_response response;

    CHECK(10, vmibridge_ask(HOW, &packet, &retry, &response) == VMIBRIDGE_ANSWERED);
    CHECK(11, response.value1 == VMIBRIDGE_CONTINUE && response.value2 == 0x77);
    CHECK(12, packet.value1 == 5 && packet.value2 == 5 && slept == 5);
    packet.method = ABORTS;
    CHECK(13, vmibridge_ask(HOW, &packet, &retry, &response) == VMIBRIDGE_ANSWERED);
    CHECK(14, (uint32_t)response.value1 == VMIBRIDGE_ABORT && slept == 5);
    packet.method = WAITS;
    CHECK(15, vmibridge_ask(HOW, &packet, &short_of, &response) == VMIBRIDGE_WAITING);
    retry.attempts = 0; /* once it is sent, whatever is said */
    CHECK(16, vmibridge_ask(HOW, &packet, &retry, &response) == VMIBRIDGE_WAITING);
    retry.attempts = 2;
    packet.value1 = packet.value2 = packet.value3 = packet.value4 = 0;
    for (retry.counter = 1; retry.counter <= 4; retry.counter++) {
        CHECK(17, vmibridge_ask(HOW, &packet, &retry, &response) == VMIBRIDGE_WAITING);
    }
    CHECK(18, packet.value1 == 1 && packet.value2 == 1 && packet.value3 == 1 && packet.value4 == 1);
    packet.request = NO_SUCH_REQUEST;
    CHECK(19, vmibridge_ask(HOW, &packet, &retry, &response) == VMIBRIDGE_NOBODY);
    return PASSED;
}

static uint32_t check_handshake(void)
{
    uint32_t one = 0, other = 0;

    CHECK(30, vmibridge_handshake(HOW, &one, &other));
    CHECK(31, one == 0x10000 && other == (VMIBRIDGE_FEATURE_WAIT | VMIBRIDGE_FEATURE_QUOTA));
    CHECK(32, vmibridge_deadlines(HOW, &one, &other));
    CHECK(33, one == 250 && other == VMIBRIDGE_NO_END);
    CHECK(34, vmibridge_limit(HOW, VMIBRIDGE_LIMIT_ACCESS, &one) && one == 16u << 20);
    CHECK(35, vmibridge_limit(HOW, VMIBRIDGE_LIMIT_IN_FLIGHT, &one) && one == 17);
    CHECK(36, vmibridge_limit(HOW, VMIBRIDGE_LIMIT_RESULT_TIMEOUT, &one) && one == 30000);
    CHECK(37, !vmibridge_limit(HOW, VMIBRIDGE_LIMIT_RESULT_TIMEOUT + 1, &one));
    CHECK(38, vmibridge_self_test(HOW));
    return PASSED;
}

__attribute__((used)) uint64_t guest(void);
uint64_t guest(void)
{
    uint32_t (*const checks[])(void) = {check_handshake, check_calls, check_gates};
    uint32_t passed = PASSED;

    for (unsigned i = 0; i < sizeof checks / sizeof *checks && passed == PASSED; i++) {
        passed = checks[i]();
    }
    /* eax, and edx in 32-bit code; all of rax in 64-bit code. */
    return passed | (uint64_t)slept << 32;
}

__asm__(".section .entry, \"ax\"\n"
        ".globl _start\n"
        "_start:\n"
        "    call guest\n"
        "    hlt\n"
        ".text\n");
