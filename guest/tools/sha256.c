#include "sha256.h"

#include "platform.h"

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotated(uint32_t value, unsigned bits)
{
    return value >> bits | value << (32 - bits);
}

static inline uint32_t big_endian(const unsigned char *at)
{
    uint32_t value;

    __builtin_memcpy(&value, at, sizeof value);
    return __builtin_bswap32(value);
}

static void add_block(uint32_t state[8], const unsigned char *block)
{
    uint32_t w[64], a, b, c, d, e, f, g, h, first, second;
    unsigned i;

    for (i = 0; i < 16; i++) {
        w[i] = big_endian(block + 4 * i);
    }
    for (; i < 64; i++) {
        first = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        second = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + first + w[i - 7] + second;
    }
    a = state[0], b = state[1], c = state[2], d = state[3];
    e = state[4], f = state[5], g = state[6], h = state[7];
    for (i = 0; i < 64; i++) {
        first = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
        second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first;
        d = c, c = b, b = a, a = first + second;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

void sha256_begin(struct sha256 *hash)
{
    static const uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

    memcpy(hash->state, START, sizeof START);
    hash->size = 0;
}

void sha256_add(struct sha256 *hash, const void *data, size_t size)
{
    const unsigned char *at = data;
    size_t known = hash->size % SHA256_BLOCK, part;

    hash->size += size;
    if (known) {
        part = SHA256_BLOCK - known < size ? SHA256_BLOCK - known : size;
        memcpy(hash->rest + known, at, part);
        if (known + part < SHA256_BLOCK) {
            return;
        }
        add_block(hash->state, hash->rest);
        at += part;
        size -= part;
    }
    for (; size >= SHA256_BLOCK; at += SHA256_BLOCK, size -= SHA256_BLOCK) {
        add_block(hash->state, at);
    }
    memcpy(hash->rest, at, size);
}

void sha256_end(struct sha256 *hash, unsigned char digest[SHA256_SIZE])
{
    static const unsigned char PADDING[SHA256_BLOCK] = {0x80};
    const uint64_t bits = __builtin_bswap64(hash->size * 8);
    const size_t known = hash->size % SHA256_BLOCK;
    uint32_t word;
    unsigned i;

    sha256_add(hash, PADDING, (known < 56 ? 56 : 120) - known);
    sha256_add(hash, &bits, sizeof bits);
    for (i = 0; i < 8; i++) {
        word = __builtin_bswap32(hash->state[i]);
        memcpy(digest + 4 * i, &word, sizeof word);
    }
}
