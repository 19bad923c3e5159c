"""Which handlers of a replay are not the ones that were recorded."""

from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any

import msgspec

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.recording.messages import RecordedHandler, Session
from vmibridge.recording.session import LEFT_OUT, recorded_handler, settings_text

_MAX_NAMED = 10


def handler_changes(
    session: Session | None, handlers: Iterable[BridgeHandler[Any]], *, has_config: bool
) -> Iterator[str]:
    """One line for each thing that has changed. `has_config`: handlers have settings of a file."""
    if session is None:
        yield "the recording does not say which handlers were recorded"
        return
    if session.part > 1:
        yield (
            f"this is part {session.part} of a recording: handlers lack the state of those before"
        )
    now = {handler.name: handler for handler in handlers}
    for then in session.handlers:
        handler = now.get(then.name)
        if handler is not None:
            yield from _changes(then, handler, recorded_handler(handler), has_config=has_config)
        elif then.name != "host":  # the server adds the handshake by itself
            yield f"handler {then.name}: was recorded, and is not loaded now"


def is_as_recorded(then: RecordedHandler, handler: BridgeHandler[Any]) -> bool:
    """Whether it is known that nothing of a handler has changed: not its source, nor what it
    imports of its project, nor what it was made with."""
    now = recorded_handler(handler)
    if now.sha256 is None or (then.settings is None and signature(type(handler)).parameters):
        return False
    return next(_changes(then, handler, now, has_config=True), None) is None


def _changes(
    then: RecordedHandler, handler: BridgeHandler[Any], now: RecordedHandler, *, has_config: bool
) -> Iterator[str]:
    if now.sha256 != then.sha256:
        source = then.source or now.source or "its source"
        yield f"handler {then.name}: {source} has changed since the recording"
    yield from _module_changes(then, now)
    yield from _setting_changes(then, settings_text(handler), has_config=has_config)


def _module_changes(then: RecordedHandler, now: RecordedHandler) -> Iterator[str]:
    # One that it does not import now is in its source, which has changed, too.
    changed = [
        name for name, digest in then.modules.items() if now.modules.get(name, digest) != digest
    ]
    if changed:
        more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
        names = ", ".join(changed[:_MAX_NAMED])
        what = (
            "a module that it imports has" if len(changed) == 1 else "modules that it imports have"
        )
        yield f"handler {then.name}: {what} changed since the recording: {names}{more}"


def _setting_changes(then: RecordedHandler, now: str | None, *, has_config: bool) -> Iterator[str]:
    if then.settings is None or then.settings == now:
        return
    try:
        before = msgspec.json.decode(then.settings, type=dict[str, msgspec.Raw])
        after = msgspec.json.decode(now or "{}", type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return
    left_out = msgspec.json.encode(LEFT_OUT)
    changed = [
        f"{name} was {_shown(before.get(name))}, is {_shown(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
        and left_out not in (before.get(name), after.get(name))
    ]
    if changed:
        what = "; ".join(changed[:_MAX_NAMED])
        hint = "" if has_config else "; give the configuration file of the recording with --config"
        yield f"handler {then.name}: its settings have changed since the recording: {what}{hint}"


def _shown(value: msgspec.Raw | None) -> str:
    text = "not there" if value is None else bytes(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}..."
