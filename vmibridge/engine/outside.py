"""Calls of `vmi.outside` that taps see, or that a conductor serves.

A call is told when it has come to something, so its place among what else is told is that of
then. One that is cut off by a cancellation is told, too: without that, a replay would take it for
one that is not in the recording. One with a wrong key or function comes not here: it is no call.
"""

from vmibridge.bridge.context import BridgeContext, Door
from vmibridge.bridge.outside import Fetch, encoded, fetched
from vmibridge.engine.vm_taps import Taps
from vmibridge.engine.watching import HandlerWatch
from vmibridge.errors import OutsideError, OutsideRefusedError
from vmibridge.vm.conductor import Conductor, OutsideCall
from vmibridge.vm.trap import TrapEvent

__all__ = ["outside_for"]


def outside_for(
    taps: Taps | None, conductor: Conductor | None, watch: HandlerWatch | None
) -> Door | None:
    """What calls of `vmi.outside` of a VM go to; `None`: nobody wants to know."""
    if taps is None or not (taps.hears_outside or conductor is not None):
        return None
    return _OutsideCalls(taps, conductor, watch)


class _OutsideCalls:
    """See the module."""

    def __init__(self, taps: Taps, conductor: Conductor | None, watch: HandlerWatch | None) -> None:
        self._taps = taps
        self._conductor = conductor
        self._watch = watch

    async def __call__(self, context: BridgeContext, key: str, fetch: Fetch) -> bytes:
        """The value, encoded. Raises `OutsideError`."""
        watch = self._watch
        # In a task that the handler has started it is not one of its steps.
        if watch is None or watch.stepping is not context or context in watch.outside:
            return await self._get(context, key, fetch, None)
        watch.outside.add(context)
        try:
            return await self._get(context, key, fetch, watch)
        finally:
            watch.outside.discard(context)

    async def _get(
        self, context: BridgeContext, key: str, fetch: Fetch, watch: HandlerWatch | None
    ) -> bytes:
        number = context.count_outside(key)
        before = -1 if watch is None else watch.suspensions
        event, first = context.event, context.first_seq
        conductor = self._conductor
        call: OutsideCall | None = None
        is_new = False
        try:
            if conductor is not None:
                call = await conductor.outside(event, key, number)
            is_new = call is None
            if call is None:
                data = encoded(key, await fetched(key, fetch))
                at_once = watch is not None and watch.suspensions == before
                call = OutsideCall(key, number, data, at_once=at_once)
        except OutsideError as error:
            at_once = watch is not None and watch.suspensions == before
            call = OutsideCall(key, number, None, error.text, error.types, at_once)
            is_new = not isinstance(error, OutsideRefusedError)
            await self._tell(event, first, call, is_new=is_new)
            raise
        except BaseException:  # it was cut off: the handler gets that
            cut_off = OutsideCall(key, number)
            if is_new and conductor is not None:
                conductor.called_outside(event, cut_off)
            self._taps.outside_called(event, first, cut_off)
            raise
        await self._tell(event, first, call, is_new=is_new)
        if call.data is None:
            raise OutsideError(key, call.types, call.error or "")
        return call.data

    async def _tell(self, event: TrapEvent, first: int, call: OutsideCall, *, is_new: bool) -> None:
        """What a call came to; `is_new`: its function was called."""
        if is_new and self._conductor is not None:
            self._conductor.called_outside(event, call)
        if self._taps.outside_called(event, first, call):
            await self._taps.room()
