"""Frames over NATS, for both ends. nats-py is an extra: no module here but `patched` imports it at
its top, so that all of them can be imported without it.

| module | holds |
|---|---|
| `client`, `login`, `patched` | one connection by nats-py; what nats-py lacks |
| `subjects`, `message` | where a message goes, and what is in it |
| `dial`, `agent_link`, `attempts`, `peers`, `accesses` | the end of an agent: who has which trap |
| `listener`, `server_link` | the end of a server |
| `store` | recordings in JetStream |
"""
