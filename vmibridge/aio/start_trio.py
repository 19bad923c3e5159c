"""How `own_tasks.starter` starts a task on trio; imported where trio runs.

`Nursery.start_soon` takes whatever somebody may call. It looks what that is and what it returns,
and makes a name of it: a quarter of what a task costs. Here one function is started each time.

This takes what is not public in trio: what `Runner.spawn_impl` does for a task of a nursery.
`tests/unit/aio/test_tasks_of_a_group.py` fails if any of it goes.
"""

from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any

from trio import Nursery
from trio._core._run import GLOBAL_RUN_CONTEXT, Task


def trio_starter(
    nursery: Nursery, function: Callable[[], Coroutine[Any, Any, None]]
) -> Callable[[], None]:
    """What starts tasks of a nursery that run `function`, each in a copy of the present context."""
    runner: Any = GLOBAL_RUN_CONTEXT.runner
    children, tasks, reschedule = nursery._children, runner.tasks, runner.reschedule
    context = copy_context()
    name = f"{function.__module__}.{function.__qualname__}"

    def start() -> None:
        if nursery._closed:
            raise RuntimeError("Nursery is closed to new arrivals")
        task = Task._create(
            coro=function(),
            parent_nursery=nursery,
            runner=runner,
            name=name,
            context=context.copy(),
            ki_protected=False,
        )
        tasks.add(task)
        children.add(task)
        task._activate_cancel_status(nursery._cancel_status)
        if "task_spawned" in runner.instruments:
            runner.instruments.call("task_spawned", task)
        reschedule(task, None)

    return start
