"""What `nsc` makes: an operator, an account and users of NATS, as JWTs that they have signed.

The claims are those of NATS' JWTs of version 2 (https://docs.nats.io, "JWT").
"""

import base64
import json
import time

import nkeys


def seed_of(prefix, number):
    """The seed of one key of these tests."""
    return nkeys.encode_seed(bytes([number]) * 32, prefix)


def public_key(seed):
    return nkeys.from_seed(bytearray(seed)).public_key.decode()


def _encoded(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _signed(seed, name, subject, claims, **more):
    header = _encoded(b'{"typ":"JWT","alg":"ed25519-nkey"}')
    body = {
        "jti": f"{name}{time.time_ns()}", "iat": int(time.time()), "iss": public_key(seed),
        "name": name, "sub": subject, "nats": {**claims, "version": 2}, **more,
    }  # fmt: skip
    start = header + b"." + _encoded(json.dumps(body).encode())
    return start + b"." + _encoded(nkeys.from_seed(bytearray(seed)).sign(start))


class Operator:
    """One operator with one account."""

    def __init__(self):
        self._operator = seed_of(nkeys.PREFIX_BYTE_OPERATOR, 1)
        self._account = seed_of(nkeys.PREFIX_BYTE_ACCOUNT, 2)
        self._users = 10

    @property
    def config(self):
        """Of a server that resolves the account from memory."""
        account = public_key(self._account)
        unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn"), -1)
        jwt = _signed(
            self._operator, "account", account,
            {"type": "account", "limits": {**unlimited, "leaf": -1, "wildcards": True}},
        )  # fmt: skip
        key = public_key(self._operator)
        operator = _signed(self._operator, "operator", key, {"type": "operator"})
        return f"""
            operator: {operator.decode()}
            resolver: MEMORY
            resolver_preload: {{ {account}: {jwt.decode()} }}
        """

    def credentials(self, file, *, seconds=3600, seed=None, **permissions):
        """Write those of a new user, which end after `seconds`; returns the file."""
        self._users += 1
        own = seed_of(nkeys.PREFIX_BYTE_USER, self._users)
        claims = {"type": "user", "subs": -1, "data": -1, "payload": -1,
                  "pub": {}, "sub": {}, **permissions}  # fmt: skip
        end = int(time.time()) + seconds
        jwt = _signed(self._account, "user", public_key(own), claims, exp=end)
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt.decode()}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{(seed or own).decode()}\n"
            "------END USER NKEY SEED------\n"
        )
        return file
