/*
 * The guest's end of the bridge protocol, for C11 without a library: GCC and Clang, 64-bit and
 * 32-bit x86 code, in a program, in a Linux kernel module, or with nothing below it.
 *
 *   vmibridge_call        one request by CPUID, VMCALL or VMMCALL
 *   vmibridge_stamped     whether a standard handler has answered it
 *   vmibridge_ask         a request that is sent again while the host tells to wait
 *   vmibridge_handshake   what is there on the host; vmibridge_deadlines, vmibridge_limit
 *   vmibridge_self_test   whether every register of a call gets through
 *   vmibridge_caller      how to call: what headers take that `vmibridge guest-header` makes of the
 *                         handlers, and the functions above with `_by`, as vmibridge_ask_by, which
 *                         call by a device, too
 *
 * The registers of a call:
 *
 *                x64 VMCALL     x86 VMCALL     x64 CPUID      x86 CPUID
 *   magic        ecx            ebp            eax            eax
 *   request      edx 0-15       edx 0-15       ecx 0-15       ecx 0-15
 *   method       edx 16-31      edx 16-31      ecx 16-31      ecx 16-31
 *   value1       r8             esi            r8             ebx
 *   value2       r9             edi            r9             edx
 *   value3       r10            -              r10            esi
 *   value4       r11            -              r11            edi
 *
 * The values of the answer are in rax, rbx, rcx, rdx (eax to edx). VMMCALL is like VMCALL. Both
 * carry the signature of Xen's guest request, too, which a hypervisor may ask for that has other
 * hypercalls: x64 eax 0x22, edi 0x18, rsi 0; x86 eax 0x22, ebx 0x18, ecx 0.
 *
 * CPUID does no harm where there is no host. VMCALL and VMMCALL may be undefined there: a program
 * gets SIGILL, and a kernel an exception. So begin with vmibridge_handshake by VMIBRIDGE_CPUID.
 *
 * The host reads and writes memory by the addresses that a call has among its values. It brings
 * no page in, so touch a buffer before you name it. The functions of a generated header do so
 * when the host tells them to.
 */
#ifndef VMIBRIDGE_H
#define VMIBRIDGE_H

#ifdef __KERNEL__
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif

#if !defined(__x86_64__) && !defined(__i386__)
#error "vmibridge.h is for x86"
#endif

/* --- the standard contract -------------------------------------------------------------- */

#define VMIBRIDGE_MAGIC 0x42494d56u                /* "VMIB" */
#define VMIBRIDGE_STAMP3 0x213353522d494d56ull     /* "VMI-RS3!" */
#define VMIBRIDGE_STAMP4 0x213453522d494d56ull     /* "VMI-RS4!" */

/* value1 of a gate: what the guest does next. */
#define VMIBRIDGE_CONTINUE 0u
#define VMIBRIDGE_WAIT 1u
#define VMIBRIDGE_ABORT 0xffffffffu
/* What the ready-made handlers have in value1 instead of VMIBRIDGE_WAIT: an encoded status. */
#define VMIBRIDGE_STATUS_WAITING 0x100u

/* The request of the host itself, and its methods. */
#define VMIBRIDGE_HOST 0x0000u
#define VMIBRIDGE_HOST_VERSION 0x0001u   /* value1: version, value2: features */
#define VMIBRIDGE_HOST_DEADLINES 0x0002u /* value1: soft, value2: hard, in milliseconds */
#define VMIBRIDGE_HOST_LIMITS 0x0003u    /* value1: the limit, value2: how many there are */
#define VMIBRIDGE_HOST_ECHO_LOW 0x0010u  /* value1 and value2 come back */
#define VMIBRIDGE_HOST_ECHO_HIGH 0x0011u /* value3 and value4 come back, as value1 and value2 */

#define VMIBRIDGE_VERSION_MAJOR 1u   /* what this file is written for */
#define VMIBRIDGE_NO_END 0xffffffffu /* a time without end, and what 32 bits cannot hold */

#define VMIBRIDGE_FEATURE_WAIT (1u << 0)   /* a request may be answered WAIT: send it again */
#define VMIBRIDGE_FEATURE_POLICY (1u << 1) /* requests may be denied */
#define VMIBRIDGE_FEATURE_QUOTA (1u << 2)  /* the rate of requests, or their bytes, are limited */

#define VMIBRIDGE_LIMIT_ACCESS 1u         /* bytes of memory that the host takes in one piece */
#define VMIBRIDGE_LIMIT_IN_FLIGHT 2u      /* requests of this VM at a time */
#define VMIBRIDGE_LIMIT_RESULT_TIMEOUT 3u /* milliseconds that a result is kept */

/* --- one call ----------------------------------------------------------------------------- */

/* What a register of a value holds: 64 bits in 64-bit code, else 32. */
#ifdef __x86_64__
typedef uint64_t vmibridge_word;
#else
typedef uint32_t vmibridge_word;
#endif

/* An address as a value. */
#define VMIBRIDGE_ADDRESS(pointer) ((vmibridge_word)(uintptr_t)(pointer))

/* The instruction that a request is sent by. */
enum vmibridge_how { VMIBRIDGE_CPUID = 1, VMIBRIDGE_VMCALL = 2, VMIBRIDGE_VMMCALL = 3 };

/* A request. Where the form has no register for a value, it is not sent: the host sees 0. */
struct vmibridge_packet {
    uint32_t magic;
    uint16_t request, method;
    vmibridge_word value1, value2, value3, value4;
};

/* An answer. A value that the host left out is what was in its register at the call. */
struct vmibridge_response {
    vmibridge_word value1, value2, value3, value4;
};

#define VMIBRIDGE_ASM_CPUID "cpuid"
#define VMIBRIDGE_ASM_VMCALL ".byte 0x0f, 0x01, 0xc1"
#define VMIBRIDGE_ASM_VMMCALL ".byte 0x0f, 0x01, 0xd9"

#ifdef __x86_64__

/* rbx is not among the operands: some code models and stack frames keep it for themselves. */
#define VMIBRIDGE_TRAP(instruction)                                                          \
    __asm__ volatile("movq %%rbx, %[b]\n\t" instruction "\n\txchgq %%rbx, %[b]"              \
                     : "+a"(a), [b] "=&r"(b), "+c"(c), "+d"(d)                               \
                     : "D"(di), "S"(si), "r"(r8), "r"(r9), "r"(r10), "r"(r11)                \
                     : "memory")

/*
 * Send one request, and return what is in the registers then. Changes no other register. Without
 * a host that is what the instruction does natively: check the stamps before anything else.
 */
static inline struct vmibridge_response vmibridge_call(enum vmibridge_how how,
                                                       const struct vmibridge_packet *packet)
{
    /* Nothing is between the registers and their use that a compiler could put a call into. */
    const uint64_t value1 = packet->value1, value2 = packet->value2;
    const uint64_t value3 = packet->value3, value4 = packet->value4;
    const uint64_t code = packet->request | (uint64_t)packet->method << 16;
    const uint32_t magic = packet->magic;
    const uint64_t di = 0x18, si = 0;
    struct vmibridge_response response;
    uint64_t a, b, c, d;
    register uint64_t r8 __asm__("r8") = value1;
    register uint64_t r9 __asm__("r9") = value2;
    register uint64_t r10 __asm__("r10") = value3;
    register uint64_t r11 __asm__("r11") = value4;

    if (how == VMIBRIDGE_CPUID) {
        a = magic;
        c = code;
        d = 0;
        VMIBRIDGE_TRAP(VMIBRIDGE_ASM_CPUID);
    } else {
        a = 0x22;
        c = magic;
        d = code;
        if (how == VMIBRIDGE_VMCALL) {
            VMIBRIDGE_TRAP(VMIBRIDGE_ASM_VMCALL);
        } else {
            VMIBRIDGE_TRAP(VMIBRIDGE_ASM_VMMCALL);
        }
    }
    response.value1 = a;
    response.value2 = b;
    response.value3 = c;
    response.value4 = d;
    return response;
}

#else

/*
 * All registers are in use, and ebx and ebp may be the compiler's own: they are loaded from
 * memory, and put back from the stack.
 */
#define VMIBRIDGE_TRAP(instruction)                                                          \
    __asm__ volatile("pushl %%ebx\n\t"                                                       \
                     "pushl %%ebp\n\t"                                                       \
                     "pushl %%eax\n\t"                                                       \
                     "movl 4(%%eax), %%ebx\n\t"                                              \
                     "movl 8(%%eax), %%ecx\n\t"                                              \
                     "movl 12(%%eax), %%edx\n\t"                                             \
                     "movl 16(%%eax), %%esi\n\t"                                             \
                     "movl 20(%%eax), %%edi\n\t"                                             \
                     "movl 24(%%eax), %%ebp\n\t"                                             \
                     "movl (%%eax), %%eax\n\t" instruction "\n\t"                            \
                     "popl %%ebp\n\t"                                                        \
                     "movl %%eax, (%%ebp)\n\t"                                               \
                     "movl %%ebx, 4(%%ebp)\n\t"                                              \
                     "movl %%ecx, 8(%%ebp)\n\t"                                              \
                     "movl %%edx, 12(%%ebp)\n\t"                                             \
                     "popl %%ebp\n\t"                                                        \
                     "popl %%ebx"                                                            \
                     : "+a"(at)                                                              \
                     :                                                                       \
                     : "ecx", "edx", "esi", "edi", "memory")

/*
 * Send one request, and return what is in the registers then. Changes no other register. Without
 * a host that is what the instruction does natively: check the stamps before anything else.
 */
static inline struct vmibridge_response vmibridge_call(enum vmibridge_how how,
                                                       const struct vmibridge_packet *packet)
{
    const uint32_t code = packet->request | (uint32_t)packet->method << 16;
    struct { uint32_t eax, ebx, ecx, edx, esi, edi, ebp; } registers;
    struct vmibridge_response response;
    void *at = &registers;

    registers.ebp = packet->magic;
    if (how == VMIBRIDGE_CPUID) {
        registers.eax = packet->magic;
        registers.ebx = packet->value1;
        registers.ecx = code;
        registers.edx = packet->value2;
        registers.esi = packet->value3;
        registers.edi = packet->value4;
        VMIBRIDGE_TRAP(VMIBRIDGE_ASM_CPUID);
    } else {
        registers.eax = 0x22;
        registers.ebx = 0x18;
        registers.ecx = 0;
        registers.edx = code;
        registers.esi = packet->value1;
        registers.edi = packet->value2;
        if (how == VMIBRIDGE_VMCALL) {
            VMIBRIDGE_TRAP(VMIBRIDGE_ASM_VMCALL);
        } else {
            VMIBRIDGE_TRAP(VMIBRIDGE_ASM_VMMCALL);
        }
    }
    response.value1 = registers.eax;
    response.value2 = registers.ebx;
    response.value3 = registers.ecx;
    response.value4 = registers.edx;
    return response;
}

#endif

/* Whether value3 and value4 of an answer are these: in 32-bit code, their low halves. */
static inline bool vmibridge_verified(const struct vmibridge_response *response, uint64_t value3,
                                      uint64_t value4)
{
    return response->value3 == (vmibridge_word)value3 && response->value4 == (vmibridge_word)value4;
}

/*
 * Whether an answer has both stamps of the standard contract. If not, the request was not answered:
 * there is no host, no handler for it, a policy denies it, or its handler failed or took too long.
 */
static inline bool vmibridge_stamped(const struct vmibridge_response *response)
{
    return vmibridge_verified(response, VMIBRIDGE_STAMP3, VMIBRIDGE_STAMP4);
}

/* --- callers: by an instruction, or in another way ------------------------------------------ */

/*
 * How requests are sent: the first argument of the functions whose names end with `_by`, and of
 * every function of a header that `vmibridge guest-header` has made. `vmibridge_by` makes one for
 * an instruction, and the header of the device beside this one makes one for a slot; it may be kept
 * and shared.
 */
struct vmibridge_caller {
    enum vmibridge_how how;     /* the instruction, which also says where the words are */
    uint32_t attempts;          /* how often a request is sent at the most while the host tells to
                                   wait; 0: without end */
    void (*sleep)(void *state); /* what to do before each further time, as in vmibridge_retry */
    /* Send one request in another way than by an instruction, such as by a device; NULL: by the
       instruction. It fills all of the response. */
    void (*send)(void *state, const struct vmibridge_packet *packet,
                 struct vmibridge_response *response);
    void *state;                /* what `sleep` and `send` are called with */
    /* Memory that the host can read and write where it cannot reach the caller's own: the buffers
       of a method are copied through it. NULL: it reaches all. One call at a time uses it. */
    void *room;
    size_t room_size;
    vmibridge_word room_address; /* where it is for the host */
};

/* Call by this instruction, and wait as long as the host tells to, without a system to sleep by. */
static inline struct vmibridge_caller vmibridge_by(enum vmibridge_how how)
{
    struct vmibridge_caller caller;

    caller.how = how;
    caller.attempts = 0;
    caller.sleep = 0;
    caller.send = 0;
    caller.state = 0;
    caller.room = 0;
    caller.room_size = 0;
    caller.room_address = 0;
    return caller;
}

/* Send one request by a caller. Check the stamps before anything else. */
static inline struct vmibridge_response vmibridge_send(const struct vmibridge_caller *caller,
                                                       const struct vmibridge_packet *packet)
{
    struct vmibridge_response response;

    if (!caller->send) {
        return vmibridge_call(caller->how, packet);
    }
    caller->send(caller->state, packet, &response);
    return response;
}

/* --- gates: to wait while the vCPU goes on -------------------------------------------------- */

/* How a request is sent again while the host tells to wait. */
struct vmibridge_retry {
    uint32_t attempts;           /* how often it is sent at the most; at least once */
    uint32_t wait;               /* value1 that tells to wait: VMIBRIDGE_WAIT, or another */
    unsigned counter;            /* 1 to 4: that value goes up by one each time; 0: none does. The
                                    host has to know that it does not name the request
                                    (`retry_values` of the method, or of the handler). */
    void (*sleep)(void *state);  /* what to do before each further time; NULL: pause shortly.
                                    Under an operating system, put the thread to sleep. */
    void *state;                 /* what `sleep` is called with */
};

/* What became of a request. */
enum vmibridge_result {
    VMIBRIDGE_ANSWERED, /* by anything else than to wait; with both stamps */
    VMIBRIDGE_NOBODY,   /* an answer lacks the stamps: see vmibridge_stamped */
    VMIBRIDGE_WAITING   /* the last attempt, too, was told to wait */
};

/* Keep the vCPU busy for a moment: about 10 ms in an emulator. */
static inline void vmibridge_pause(void)
{
    uint32_t left;

    for (left = 200000; left; left--) {
        __asm__ volatile("pause");
    }
}

/*
 * Send a standard request until it is answered with something else than to wait. `packet` is sent
 * as it is, but for the counter, which is left as it was last sent; `response` is the last answer.
 * What the values point to belongs to the host until then, but the host touches it only while a
 * vCPU waits for an answer. A gate has VMIBRIDGE_CONTINUE, VMIBRIDGE_ABORT, or what else the
 * handler has, in value1.
 */
static inline enum vmibridge_result vmibridge_ask_by(const struct vmibridge_caller *caller,
                                                     struct vmibridge_packet *packet,
                                                     const struct vmibridge_retry *retry,
                                                     struct vmibridge_response *response)
{
    uint32_t attempt;

    for (attempt = 1;; attempt++) {
        *response = vmibridge_send(caller, packet);
        if (!vmibridge_stamped(response)) {
            return VMIBRIDGE_NOBODY;
        }
        if ((uint32_t)response->value1 != retry->wait) {
            return VMIBRIDGE_ANSWERED;
        }
        if (attempt >= retry->attempts) {
            return VMIBRIDGE_WAITING;
        }
        if (retry->sleep) {
            retry->sleep(retry->state);
        } else {
            vmibridge_pause();
        }
        switch (retry->counter) {
        case 1:
            packet->value1++;
            break;
        case 2:
            packet->value2++;
            break;
        case 3:
            packet->value3++;
            break;
        case 4:
            packet->value4++;
            break;
        default:
            break;
        }
    }
}

/* The same by an instruction. */
static inline enum vmibridge_result vmibridge_ask(enum vmibridge_how how,
                                                  struct vmibridge_packet *packet,
                                                  const struct vmibridge_retry *retry,
                                                  struct vmibridge_response *response)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_ask_by(&caller, packet, retry, response);
}

/* --- the handshake --------------------------------------------------------------------------- */

/* Ask the host itself. `false`: there is none, it has no handshake, or it denies us. */
static inline bool vmibridge_ask_host_by(const struct vmibridge_caller *caller, uint16_t method,
                                         vmibridge_word value1,
                                         struct vmibridge_response *response)
{
    struct vmibridge_packet packet;

    packet.magic = VMIBRIDGE_MAGIC;
    packet.request = VMIBRIDGE_HOST;
    packet.method = method;
    packet.value1 = value1;
    packet.value2 = packet.value3 = packet.value4 = 0;
    *response = vmibridge_send(caller, &packet);
    return vmibridge_stamped(response);
}

/* The same by an instruction. */
static inline bool vmibridge_ask_host(enum vmibridge_how how, uint16_t method, vmibridge_word value1,
                                      struct vmibridge_response *response)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_ask_host_by(&caller, method, value1, response);
}

/* Whether there is a host of our major version. Then its version, and VMIBRIDGE_FEATURE bits. */
static inline bool vmibridge_handshake_by(const struct vmibridge_caller *caller, uint32_t *version,
                                          uint32_t *features)
{
    struct vmibridge_response response;

    if (!vmibridge_ask_host_by(caller, VMIBRIDGE_HOST_VERSION, 0, &response)) {
        return false;
    }
    *version = (uint32_t)response.value1;
    *features = (uint32_t)response.value2;
    return *version >> 16 == VMIBRIDGE_VERSION_MAJOR;
}

/* The same by an instruction. */
static inline bool vmibridge_handshake(enum vmibridge_how how, uint32_t *version,
                                       uint32_t *features)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_handshake_by(&caller, version, features);
}

/* The highest deadlines of any request, in milliseconds. `soft` 0: the host never tells to wait by
   itself. Either may be VMIBRIDGE_NO_END. */
static inline bool vmibridge_deadlines_by(const struct vmibridge_caller *caller, uint32_t *soft,
                                          uint32_t *hard)
{
    struct vmibridge_response response;

    if (!vmibridge_ask_host_by(caller, VMIBRIDGE_HOST_DEADLINES, 0, &response)) {
        return false;
    }
    *soft = (uint32_t)response.value1;
    *hard = (uint32_t)response.value2;
    return true;
}

/* The same by an instruction. */
static inline bool vmibridge_deadlines(enum vmibridge_how how, uint32_t *soft, uint32_t *hard)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_deadlines_by(&caller, soft, hard);
}

/* A VMIBRIDGE_LIMIT of the host. `false` also when it does not have it: an older one may not. */
static inline bool vmibridge_limit_by(const struct vmibridge_caller *caller, uint32_t limit,
                                      uint32_t *value)
{
    struct vmibridge_response response;

    if (!vmibridge_ask_host_by(caller, VMIBRIDGE_HOST_LIMITS, limit, &response) ||
        response.value2 < limit) {
        return false;
    }
    *value = (uint32_t)response.value1;
    return true;
}

/* The same by an instruction. */
static inline bool vmibridge_limit(enum vmibridge_how how, uint32_t limit, uint32_t *value)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_limit_by(&caller, limit, value);
}

/* One echo of the self-test, with patterns xored with `flip`. */
static inline bool vmibridge_echo(const struct vmibridge_caller *caller, uint16_t method,
                                  vmibridge_word flip)
{
    struct vmibridge_packet packet;
    struct vmibridge_response response;
    vmibridge_word first, second;

    /* No two of these bytes are the same, so that values in the wrong register show. */
    packet.magic = VMIBRIDGE_MAGIC;
    packet.request = VMIBRIDGE_HOST;
    packet.method = method;
    packet.value1 = (vmibridge_word)0x0123456789abcdefull ^ flip;
    packet.value2 = (vmibridge_word)0x1032547698badcfeull ^ flip;
    packet.value3 = (vmibridge_word)0x2b3c4d5e6f708192ull ^ flip;
    packet.value4 = (vmibridge_word)0x8796a5b4c3d2e1f0ull ^ flip;
    first = method == VMIBRIDGE_HOST_ECHO_LOW ? packet.value1 : packet.value3;
    second = method == VMIBRIDGE_HOST_ECHO_LOW ? packet.value2 : packet.value4;
    if (sizeof(vmibridge_word) == 4 && caller->how != VMIBRIDGE_CPUID &&
        method == VMIBRIDGE_HOST_ECHO_HIGH) {
        /* This form carries two values. */
        first = second = 0;
    }
    response = vmibridge_send(caller, &packet);
    return vmibridge_stamped(&response) && response.value1 == first && response.value2 == second;
}

/*
 * Whether every register of a call by this caller gets through, in both directions, with each bit
 * as 0 and as 1. One that works says nothing of the others: test the one that you will use.
 */
static inline bool vmibridge_self_test_by(const struct vmibridge_caller *caller)
{
    const vmibridge_word ones = ~(vmibridge_word)0;

    return vmibridge_echo(caller, VMIBRIDGE_HOST_ECHO_LOW, 0) &&
           vmibridge_echo(caller, VMIBRIDGE_HOST_ECHO_HIGH, 0) &&
           vmibridge_echo(caller, VMIBRIDGE_HOST_ECHO_LOW, ones) &&
           vmibridge_echo(caller, VMIBRIDGE_HOST_ECHO_HIGH, ones);
}

/* The same by an instruction. */
static inline bool vmibridge_self_test(enum vmibridge_how how)
{
    const struct vmibridge_caller caller = vmibridge_by(how);

    return vmibridge_self_test_by(&caller);
}

/* --- methods: what generated headers call -------------------------------------------------- */

/*
 * What a function of a generated header returns: 0, or why it gave nothing. The fields are those of
 * an encoded status, without its stage. In 32-bit code the native code is not there, but 0.
 */
typedef uint64_t vmibridge_status;

/* Ours: an answer lacks the stamps, so the request was not answered: see vmibridge_stamped. */
#define VMIBRIDGE_NOT_ANSWERED 0x01000000u
/* Ours, too: the buffers do not fit into the room of the caller, and nothing was sent. */
#define VMIBRIDGE_NO_ROOM 0x02000000u

/* The kind of a status. A newer host may have others. */
enum vmibridge_kind {
    VMIBRIDGE_KIND_SUCCESS = 0x00,
    VMIBRIDGE_KIND_WAITING = 0x01,            /* the last attempt, too, was told to wait */
    VMIBRIDGE_KIND_TOUCH = 0x02,              /* a page is not present however often it is touched */
    VMIBRIDGE_KIND_INVALID_PARAMETERS = 0xfd, /* the code is the number of the parameter, from 1 */
    VMIBRIDGE_KIND_FAILED = 0xfe,             /* the code is the method's own */
    VMIBRIDGE_KIND_ABORTED = 0xff
};

/* The kind of a status that is not VMIBRIDGE_NOT_ANSWERED: a `vmibridge_kind`, or a newer one. */
static inline unsigned vmibridge_kind_of(vmibridge_status status)
{
    return (unsigned)(status >> 8) & 0xffu;
}

/* Its code, which is specific to its kind. */
static inline unsigned vmibridge_code_of(vmibridge_status status)
{
    return (unsigned)(status >> 16) & 0xffu;
}

/* Its native code: an NTSTATUS, an HRESULT or an errno; 0 in 32-bit code. */
static inline uint32_t vmibridge_native_of(vmibridge_status status)
{
    return (uint32_t)(status >> 32);
}

/* A unit of UTF-16, for texts that are encoded so: in C, u"text" is of these, and L"text" is on
   Windows. */
#if defined(__cplusplus) && defined(_WIN32)
typedef wchar_t vmibridge_char16;
#elif defined(__cplusplus)
typedef char16_t vmibridge_char16;
#else
typedef uint16_t vmibridge_char16;
#endif

/* In C++, a value without a name is undefined in an enum without a type. */
#ifdef __cplusplus
#define VMIBRIDGE_ENUM(type) : type
#else
#define VMIBRIDGE_ENUM(type)
#endif

/* What a word is: 4 bits for each. The word behind BYTES and ROOM is their size. */
#define VMIBRIDGE_WORD_NUMBER 0u
#define VMIBRIDGE_WORD_TEXT 1u
#define VMIBRIDGE_WORD_TEXT16 2u
#define VMIBRIDGE_WORD_BYTES 3u
#define VMIBRIDGE_WORD_ROOM 4u

/* One call of a method. Generated functions fill it. */
struct vmibridge_method_call {
    struct vmibridge_packet packet;
    struct vmibridge_response response; /* the last one */
    uint64_t block[5];      /* the result, then the words: for a 32-bit form, memory of the host's */
    uint64_t stamps[4];     /* of value1 to value4 of an answer */
    uint32_t limits[4];     /* of the buffer that begins with this word, in bytes */
    uint32_t kinds;         /* of the words */
    uint32_t wait, waiting; /* which bits of value1 tell to wait, and how */
    uint8_t stamped;        /* which of the stamps there are, a bit for each */
    uint8_t words;
    bool is_typed, is_wide;
};

/* A call of a method of the standard contract. `words`: how many it has; for a method that is not
   typed, they are the values as they are. */
static inline void vmibridge_begin_call(struct vmibridge_method_call *call, uint16_t request,
                                        uint16_t method, unsigned words, bool is_typed)
{
    call->packet.magic = VMIBRIDGE_MAGIC;
    call->packet.request = request;
    call->packet.method = method;
    call->block[0] = call->block[1] = call->block[2] = call->block[3] = call->block[4] = 0;
    call->stamps[2] = VMIBRIDGE_STAMP3;
    call->stamps[3] = VMIBRIDGE_STAMP4;
    call->stamped = 1u << 2 | 1u << 3;
    call->kinds = 0;
    call->wait = is_typed ? 0xff00u : 0;
    call->waiting = VMIBRIDGE_STATUS_WAITING;
    call->words = (uint8_t)words;
    call->is_typed = is_typed;
    call->is_wide = false;
}

/* Whether the stamps are there. */
static inline bool vmibridge_call_stamped(const struct vmibridge_method_call *call)
{
    const struct vmibridge_response *response = &call->response;

    return (!(call->stamped & 1u << 0) || response->value1 == (vmibridge_word)call->stamps[0]) &&
           (!(call->stamped & 1u << 1) || response->value2 == (vmibridge_word)call->stamps[1]) &&
           (!(call->stamped & 1u << 2) || response->value3 == (vmibridge_word)call->stamps[2]) &&
           (!(call->stamped & 1u << 3) || response->value4 == (vmibridge_word)call->stamps[3]);
}

/* Bring one page in; for writing by a write that changes nothing, also when others write there. */
static inline void vmibridge_touch(uintptr_t address, bool for_writing)
{
    volatile char *at = (volatile char *)address;

    if (for_writing) {
        __asm__ volatile("lock; orb $0, %0" : "+m"(*at));
    } else {
        (void)*at;
    }
}

/* Touch every page of memory, and return how many that are. */
static inline uint32_t vmibridge_touch_pages(uintptr_t address, size_t size, bool for_writing)
{
    uint32_t pages = 0;
    size_t left;

    while (size) {
        vmibridge_touch(address, for_writing);
        pages++;
        left = 4096 - (address & 4095);
        left = left < size ? left : size;
        address += left;
        size -= left;
    }
    return pages;
}

/* Touch every page of a text with units of this many bytes, up to its end or its limit. */
static inline uint32_t vmibridge_touch_text(uintptr_t address, size_t limit, unsigned unit)
{
    const volatile char *at = (const volatile char *)address;
    size_t done;

    /* One unit is behind the limit: the NUL. */
    for (done = 0; done <= limit; done += unit) {
        if (!at[done] && (unit == 1 || !at[done + 1])) {
            break;
        }
    }
    return (uint32_t)(((address & 4095) + done) / 4096 + 1);
}

/* Touch every page of every buffer of a call, and return how many they are. A buffer over its
   limit is left alone: the host will say so. */
static inline uint32_t vmibridge_touch_buffers(const struct vmibridge_method_call *call)
{
    uint32_t pages = 0;
    uintptr_t address;
    unsigned word, kind;

    for (word = 0; word < 4; word++) {
        kind = call->kinds >> 4 * word & 15u;
        address = (uintptr_t)call->block[word + 1];
        if (kind == VMIBRIDGE_WORD_NUMBER || !address) {
            continue;
        }
        if (kind == VMIBRIDGE_WORD_TEXT || kind == VMIBRIDGE_WORD_TEXT16) {
            pages += vmibridge_touch_text(address, call->limits[word], kind);
        } else if (call->block[word + 2] <= call->limits[word]) {
            pages += vmibridge_touch_pages(address, (size_t)call->block[word + 2],
                                           kind == VMIBRIDGE_WORD_ROOM);
        }
    }
    return pages + vmibridge_touch_pages((uintptr_t)call->block, sizeof call->block, true);
}

/* Not a loop, which a compiler may take for a call of memcpy. */
static inline void vmibridge_copy(void *to, const void *from, size_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

/* The bytes of a buffer that belong to a call: of a text with its NUL, or up to its limit. */
static inline size_t vmibridge_buffer_size(const struct vmibridge_method_call *call, unsigned word,
                                           unsigned kind)
{
    const volatile char *at = (const volatile char *)(uintptr_t)call->block[word + 1];
    size_t size = 0;

    if (kind == VMIBRIDGE_WORD_BYTES || kind == VMIBRIDGE_WORD_ROOM) {
        /* The host refuses one over its limit, and does not look at it. */
        return call->block[word + 2] <= call->limits[word] ? (size_t)call->block[word + 2] : 0;
    }
    while (size <= call->limits[word] && (at[size] || (kind == 2 && at[size + 1]))) {
        size += kind;
    }
    return size + kind;
}

/*
 * Copy the buffers of a call into the caller's room. `words`: those of the block, with addresses in
 * the room. The block itself has its place at the room's start. `false`: they do not fit.
 */
static inline bool vmibridge_lend(const struct vmibridge_caller *caller,
                                  const struct vmibridge_method_call *call, uint64_t *words)
{
    size_t used = sizeof call->block, size;
    unsigned word, kind;

    for (word = 0; word < 5; word++) {
        words[word] = call->block[word];
    }
    for (word = 0; word < 4; word++) {
        kind = call->kinds >> 4 * word & 15u;
        if (kind == VMIBRIDGE_WORD_NUMBER || !call->block[word + 1]) {
            continue;
        }
        size = vmibridge_buffer_size(call, word, kind);
        if (used > caller->room_size || size > caller->room_size - used) {
            return false;
        }
        vmibridge_copy((char *)caller->room + used, (const void *)(uintptr_t)call->block[word + 1],
                       size);
        words[word + 1] = caller->room_address + used;
        used += (size + 7) & ~(size_t)7;
    }
    return sizeof call->block <= caller->room_size;
}

/* Copy back what the host may have written there. */
static inline void vmibridge_take_back(const struct vmibridge_caller *caller,
                                       const struct vmibridge_method_call *call,
                                       const uint64_t *words)
{
    unsigned word;

    for (word = 0; word < 4; word++) {
        if ((call->kinds >> 4 * word & 15u) == VMIBRIDGE_WORD_ROOM && call->block[word + 1]) {
            vmibridge_copy((void *)(uintptr_t)call->block[word + 1],
                           (char *)caller->room + (size_t)(words[word + 1] - caller->room_address),
                           vmibridge_buffer_size(call, word, VMIBRIDGE_WORD_ROOM));
        }
    }
}

/*
 * Send a request until it is answered: again while the host tells to wait, and again, a bounded
 * number of times, when it finds a page that is not present. Of a typed method, block[0] is then
 * what it gave, 0 where it gave nothing; of another, `response` is the answer.
 */
static inline vmibridge_status vmibridge_call_method(const struct vmibridge_caller *caller,
                                                     struct vmibridge_method_call *call)
{
    bool in_block = false;
    const bool is_lent = caller->room && call->is_typed;
    uint32_t attempts = 0, touches = 0, pages;
    uint64_t lent[5];
    const uint64_t *words = call->block;
    vmibridge_word block = VMIBRIDGE_ADDRESS(call->block);
    vmibridge_status status;

#ifdef __i386__
    in_block = call->is_typed &&
               (call->is_wide || call->words > (caller->how == VMIBRIDGE_CPUID ? 4 : 2));
#endif
    if (is_lent) {
        if (!vmibridge_lend(caller, call, lent)) {
            call->block[0] = 0;
            return VMIBRIDGE_NO_ROOM;
        }
        words = lent;
        block = caller->room_address;
        if (in_block) {
            vmibridge_copy(caller->room, lent, sizeof lent);
        }
    }
    call->packet.value1 = in_block ? block : (vmibridge_word)words[1];
    call->packet.value2 = in_block ? 0 : (vmibridge_word)words[2];
    call->packet.value3 = in_block ? 0 : (vmibridge_word)words[3];
    call->packet.value4 = in_block ? 0 : (vmibridge_word)words[4];
    for (;;) {
        call->response = vmibridge_send(caller, &call->packet);
        if (!vmibridge_call_stamped(call)) {
            status = VMIBRIDGE_NOT_ANSWERED;
            break;
        }
        status = call->response.value1;
        if (call->wait && ((uint32_t)status & call->wait) == call->waiting) {
            status = VMIBRIDGE_STATUS_WAITING;
            attempts++;
            if (caller->attempts && attempts >= caller->attempts) {
                break;
            }
            if (caller->sleep) {
                caller->sleep(caller->state);
            } else {
                vmibridge_pause();
            }
            continue;
        }
        if (!call->is_typed) {
            return 0;
        }
        status &= ~(uint64_t)0xff0000ffu;
        if (vmibridge_kind_of(status) != VMIBRIDGE_KIND_TOUCH) {
            break;
        }
        /* Once is enough, but where the system takes pages away in the meantime. */
        pages = vmibridge_touch_buffers(call);
        if (touches >= pages + 8) {
            break;
        }
        touches++;
    }
    if (is_lent && status != VMIBRIDGE_NOT_ANSWERED) {
        vmibridge_take_back(caller, call, words);
        if (in_block) {
            vmibridge_copy(call->block, caller->room, sizeof call->block[0]);
        }
    }
    if (status) {
        call->block[0] = 0;
    } else if (!in_block) {
        call->block[0] = call->response.value2;
    }
    return status;
}

#undef VMIBRIDGE_TRAP
#undef VMIBRIDGE_ASM_CPUID
#undef VMIBRIDGE_ASM_VMCALL
#undef VMIBRIDGE_ASM_VMMCALL

#endif
