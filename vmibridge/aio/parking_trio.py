"""What `loops` needs of trio; imported where trio runs."""

from trio import move_on_after
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from vmibridge.aio.parking import Parking


class TrioParking(Parking):
    """A parking for tasks of trio."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: Task | None = None

    async def wait(self) -> None:
        self._task = current_task()
        await wait_task_rescheduled(self._cancelled)

    async def wait_for(self, seconds: float) -> None:
        with move_on_after(max(0.0, seconds)):
            await self.wait()

    def _cancelled(self, _: object) -> Abort:
        self._task = None
        return Abort.SUCCEEDED

    def wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            reschedule(task)
