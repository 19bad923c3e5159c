/*
 * The connection of one vCPU to the host.
 *
 * A host is not trusted with time: whatever it does not send, sends in single bytes or asks for in a
 * loop, an exchange ends at a moment that was fixed when it began. The socket's own timeouts only
 * wake the vCPU to look at the clock, and whether QEMU is ending; the usual exchange pays for
 * neither.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include "plugin.h"

#define HANDSHAKE 5.0
#define PAUSE 0.05
/* Seconds until a vCPU looks for a host again: after one that was not there, */
#define LONG_PAUSE 1.0
/* and after one that was there and did not do its part. */
enum { LOOK_UP = 250000 };
/* Microseconds. */
enum { MAX_REASON = 512 };

/* Whether the exchange may go on after a call that was interrupted, or has come to its timeout. */
static bool may_go_on(double until)
{
    return (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK) && now() < until &&
           !is_shutting_down();
}

static bool read_all(struct vcpu *vcpu, void *to, size_t size, double until)
{
    for (char *at = to; size;) {
        ssize_t got = recv(vcpu->fd, at, size, 0);
        if (got < 0 && may_go_on(until)) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        at += got;
        size -= (size_t)got;
        if (size && now() >= until) {
            return false;
        }
    }
    return true;
}

static bool send_all(struct vcpu *vcpu, const void *from, size_t size, double until)
{
    for (const char *at = from; size;) {
        ssize_t sent = send(vcpu->fd, at, size, MSG_NOSIGNAL);
        if (sent < 0 && may_go_on(until)) {
            continue;
        }
        if (sent <= 0) {
            return false;
        }
        at += sent;
        size -= (size_t)sent;
        if (size && now() >= until) {
            return false;
        }
    }
    return true;
}

/* HELLO, with the descriptor of the guest's memory where QEMU shares it. */
static bool send_hello(struct vcpu *vcpu, struct iovec *parts, int count)
{
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof settings.ram)]; } control = {{0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    size_t size = 0;
    for (int i = 0; i < count; i++) {
        size += parts[i].iov_len;
    }
    if (settings.ram >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(sizeof settings.ram);
        memcpy(CMSG_DATA(&control.head), &settings.ram, sizeof settings.ram);
    }
    return sendmsg(vcpu->fd, &message, MSG_NOSIGNAL) == (ssize_t)size;
}

void hang_up(struct vcpu *vcpu, double pause)
{
    if (vcpu->fd >= 0) {
        close(vcpu->fd);
    }
    vcpu->fd = -1;
    vcpu->retry_at = now() + pause;
}

static bool take_refusal(struct vcpu *vcpu, uint32_t length, double until)
{
    char why[MAX_REASON] = "";
    if (length < sizeof why && read_all(vcpu, why, length, until)) {
        say("the host refuses this plugin: %s", why);
        vcpu->refused = true;
    }
    return false;
}

static bool shake_hands(struct vcpu *vcpu, double until)
{
    struct {
        struct hello hello;
        char names[256];
    } body = {{PROTOCOL, API, settings.process, vcpu->number, (uint32_t)settings.vcpus, "",
               ARCHITECTURE, ARCHITECTURE_VERSION}, ""};
    memcpy(body.hello.target, settings.target, sizeof body.hello.target);
    size_t at = 0;
    for (unsigned i = 0; i < REGISTERS; i++) {
        at += (size_t)snprintf(body.names + at, sizeof body.names - at, "%s%s", i ? "," : "",
                               NAMES[i]);
    }
    struct frame frame = {HELLO, (uint32_t)(sizeof body.hello + at)};
    struct welcome welcome;
    struct iovec parts[] = {{&frame, sizeof frame}, {&body, frame.length}};
    if (!send_hello(vcpu, parts, 2) || !read_all(vcpu, &frame, sizeof frame, until)) {
        return false;
    }
    if (frame.type == REFUSED) {
        return take_refusal(vcpu, frame.length, until);
    }
    if (frame.type != WELCOME || frame.length < sizeof welcome) {
        say("%s", "the host speaks another protocol");
        return false;
    }
    if (!read_all(vcpu, &welcome, sizeof welcome, until)) {
        return false;
    }
    if (welcome.protocol != PROTOCOL || welcome.count > MAX_MAGICS ||
        frame.length != sizeof welcome + 4 * welcome.count) {
        say("%s", "the host speaks another protocol");
        return false;
    }
    if (!read_all(vcpu, vcpu->magics, 4 * welcome.count, until)) {
        return false;
    }
    vcpu->magic_count = welcome.count;
    vcpu->kinds = welcome.kinds & settings.kinds;
    vcpu->any = welcome.any;
    return true;
}

/* Whether there is a host. A unix socket without a listener refuses at once. */
bool connected(struct vcpu *vcpu)
{
    if (vcpu->fd >= 0) {
        return true;
    }
    if (!*settings.path || vcpu->refused || now() < vcpu->retry_at) {
        return false;
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, settings.path, sizeof address.sun_path);
    vcpu->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval look_up = {0, LOOK_UP};
    /* As much as the system allows: each time that it is full, both sides wait for the other. */
    int unsent = MAX_ACCESS;
    if (vcpu->fd < 0 ||
        setsockopt(vcpu->fd, SOL_SOCKET, SO_SNDBUF, &unsent, sizeof unsent) ||
        setsockopt(vcpu->fd, SOL_SOCKET, SO_RCVTIMEO, &look_up, sizeof look_up) ||
        setsockopt(vcpu->fd, SOL_SOCKET, SO_SNDTIMEO, &look_up, sizeof look_up) ||
        connect(vcpu->fd, (void *)&address, sizeof address)) {
        hang_up(vcpu, errno == EAGAIN ? LONG_PAUSE : PAUSE);
        return false;
    }
    double most = settings.patience < HANDSHAKE ? settings.patience : HANDSHAKE;
    if (!shake_hands(vcpu, now() + most)) {
        hang_up(vcpu, LONG_PAUSE);
        return false;
    }
    vcpu->ready = true;
    if (settings.verbose) {
        fprintf(stderr, "vmibridge plugin: vCPU %u has a host\n", vcpu->number);
    }
    return true;
}

static bool serve_read(struct vcpu *vcpu, const struct access *access, double until)
{
    bool done = access->size <= MAX_ACCESS &&
                !qemu_plugin_read_memory_hwaddr(access->address, vcpu->memory, access->size);
    struct { struct frame frame; uint32_t failed; } head = {
        {MEMORY, 4 + (done ? access->size : 0)}, !done};
    return send_all(vcpu, &head, sizeof head, until) &&
           (!done || send_all(vcpu, vcpu->memory->data, access->size, until));
}

static bool serve_write(struct vcpu *vcpu, const struct access *access, double until)
{
    if (access->size > MAX_ACCESS) {
        return false;
    }
    g_byte_array_set_size(vcpu->memory, access->size);
    if (!read_all(vcpu, vcpu->memory->data, access->size, until)) {
        return false;
    }
    struct { struct frame frame; uint32_t failed; } reply = {
        {MEMORY, 4}, qemu_plugin_write_memory_hwaddr(access->address, vcpu->memory) != 0};
    return send_all(vcpu, &reply, sizeof reply, until);
}

static bool serve(struct vcpu *vcpu, struct frame frame, double until)
{
    struct access access;
    if (frame.length < sizeof access || !read_all(vcpu, &access, sizeof access, until)) {
        return false;
    }
    if (frame.type == READ) {
        return frame.length == sizeof access && serve_read(vcpu, &access, until);
    }
    return (uint64_t)frame.length == sizeof access + (uint64_t)access.size &&
           serve_write(vcpu, &access, until);
}

/* The connection to a host that is lost has been closed. */
enum result ask(struct vcpu *vcpu, const struct trap *trap, double until, struct answer *answer)
{
    struct { struct frame frame; struct trap trap; } asked = {{TRAP, sizeof *trap}, *trap};
    bool is_fine = send_all(vcpu, &asked, sizeof asked, until);
    while (is_fine) {
        struct frame frame;
        is_fine = read_all(vcpu, &frame, sizeof frame, until);
        if (!is_fine) {
            break;
        }
        if (frame.type == ANSWER && frame.length == sizeof *answer &&
            read_all(vcpu, answer, sizeof *answer, until)) {
            return ANSWERED;
        }
        if (frame.type == NATIVE && !frame.length) {
            return RUN_NATIVELY;
        }
        is_fine = (frame.type == READ || frame.type == WRITE) && serve(vcpu, frame, until) &&
                  now() < until;
    }
    hang_up(vcpu, now() < until ? 0 : LONG_PAUSE);
    return LOST;
}
