"""Several processes of one run: how they start, what they tell each other on the host, and how all end when one does.

What is said here goes through jax.distributed's coordination service and not through the devices, so that a process may wait for
another as long as it must; only `total` and `any_of` are device work.

When one fails. A process that raises says why, tells the others, and all exit within about POLL_SECONDS. One that vanishes (killed, its
machine gone) or whose threads all stand still is missed after HEARTBEAT_SECONDS at the latest: jax then ends the others with "Terminating
process because the JAX distributed service detected fatal errors". One that lives but does not go on is named by process 0 every
STUCK_SECONDS, with the place where each process is. In each case the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rec_jax.types import RecJaxError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START_SECONDS = 300  # that processes wait for each other to start
HEARTBEAT_SECONDS = 60  # of silence, and a process counts as dead
STUCK_SECONDS = 300.0  # without any process going on, and it is said which is where
POLL_SECONDS = 2.0  # between looks at the others
BARRIER_SECONDS = 24 * 3600  # a wait is not bounded by its length: a dead process ends it

_numbers = itertools.count()  # of barriers and gathers: every process makes the same ones in the same order
_doing = ["starting"]  # what this process is at
_over = threading.Event()  # this process ends


def start() -> None:
    """Joins the processes of this run, where the environment says that there are several; else does nothing.

    Cloud TPU pods, SLURM and Kubernetes are recognised by jax; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      RecJaxError: some of these variables without the others, or numbers that are none.
    """
    given = [name for name in VARIABLES if name in os.environ]
    if given and len(given) < len(VARIABLES):
        raise RecJaxError(f"only {', '.join(given)} set; several processes need all of {', '.join(VARIABLES)}")
    several_tpu_hosts = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    several_slurm_tasks = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if not (given or several_tpu_hosts or several_slurm_tasks):
        return
    place: dict[str, Any] = {}
    if given:
        address, count, index = (os.environ[name] for name in VARIABLES)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise RecJaxError(f"JAX_PROCESS_ID={index!r} of JAX_NUM_PROCESSES={count!r}: expected 0 <= id < number")
        place = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    # Its handler would swallow SIGTERM wherever the training loop has not set its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**place, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if place_of()[1] > 1:
        watch = threading.Thread(target=_watch, name="other processes", daemon=True)
        watch.start()
        atexit.register(_end_watch, watch)  # runs before jax's own, which takes the client away


def place_of() -> tuple[int, int]:
    """(index of this process, number of processes); (0, 1) where there is one. Starts no device."""
    if not jax.distributed.is_initialized():
        return 0, 1
    state = _state()
    return state.process_id, state.num_processes


def _state() -> Any:
    """jax.distributed's state: there is no public way to its client, and the public barrier is device work, which may not wait long."""
    from jax._src import distributed

    return distributed.global_state


def at(doing: str) -> None:
    """Notes what this process is at, for the message when nothing goes on."""
    _doing[0] = doing


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if place_of()[1] > 1:
        _state().client.wait_at_barrier(f"rec_jax/{next(_numbers)}/{name}", BARRIER_SECONDS * 1000)


def first(make: Callable[[], Any]) -> Any:
    """What `make` gives, called by process 0 before the others, which then find what it keeps on disk; every process must call it."""
    index, _ = place_of()
    if index > 0:
        barrier("first")
    out = make()
    if index == 0:
        barrier("first")
    return out


def gather(value: Any) -> list[Any]:
    """A JSON value of each process -> those of all, in their order; every process must call it."""
    index, count = place_of()
    if count == 1:
        return [value]
    client, number = _state().client, next(_numbers)
    client.key_value_set(f"rec_jax/gather/{number}/{index}", json.dumps(value))
    client.wait_at_barrier(f"rec_jax/gather/{number}", BARRIER_SECONDS * 1000)
    out = [json.loads(client.blocking_key_value_get(f"rec_jax/gather/{number}/{p}", 60_000)) for p in range(count)]
    client.wait_at_barrier(f"rec_jax/gathered/{number}", BARRIER_SECONDS * 1000)
    client.key_value_delete(f"rec_jax/gather/{number}/{index}")
    return out


def total(x: np.ndarray) -> np.ndarray:
    """x [...] of each process -> their sum, in every process; every process must call it."""
    if place_of()[1] == 1:
        return x
    barrier("total")  # collectives on the CPU break when one process comes half a minute after another
    return np.asarray(_reduce()[1](_over_devices(x)))


def any_of(flag: bool) -> jax.Array:
    """A flag of each process -> their number, as a device array that is not waited for; every process must call it."""
    return _reduce()[1](_over_devices(np.asarray(flag, np.int32)))


@functools.cache
def _reduce() -> tuple[NamedSharding, Any]:
    """The sharding of one part per device, and the jitted sum of the parts [P, ...] -> [...]."""
    mesh = Mesh(np.asarray(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(lambda parts: parts.sum(0), out_shardings=whole)


def _over_devices(x: np.ndarray) -> jax.Array:
    """x [...] of each process -> [P, ...], a part per device: x on the process's first device, zeros on its others."""
    rest = np.zeros((jax.local_device_count() - 1, *x.shape), x.dtype)
    return jax.make_array_from_process_local_data(_reduce()[0], np.concatenate([x[None], rest]))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a whole run: if this process fails it says why and leaves at once, and the others leave with it and say so.

    An exception that all processes raise at the same place, and that is no error, is to be handled within.
    """
    index, count = place_of()
    try:
        yield
    except BaseException as e:
        if count == 1:
            raise
        cause = _failure()
        if cause is None:
            cause = f"process {index}: {type(e).__name__}: {str(e)[:500]}"
            if not isinstance(e, (RecJaxError, KeyboardInterrupt)):
                traceback.print_exc()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, or another has failed just now: that is said too
                _state().client.key_value_set("rec_jax/failed", cause)
        _leave(cause)
    else:
        # A process reads its first device's part of a result: its other devices may still be in a collective, and one that ends then
        # leaves the others waiting for it. Collectives run in their order: when a last one is through on all devices, all are.
        barrier("end")
        if count > 1:
            jax.block_until_ready(any_of(False))
        barrier("ended")


def _failure() -> str | None:
    """What another process has failed of, if one has."""
    try:
        return _state().client.key_value_try_get("rec_jax/failed")
    except jax.errors.JaxRuntimeError:  # not there, or process 0 is gone, which jax tells by itself
        return None


def _leave(cause: str) -> None:
    """Says the cause and ends this process without waiting for the others, which jax's own way to exit would do for minutes."""
    index, count = place_of()
    again = "The same command goes on from the last checkpoint."
    print(f"error: process {index} of {count} stops: {cause}\n{again}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if index == 0:
        time.sleep(2 * POLL_SECONDS)  # the service that tells the others lives in this process
    os._exit(1)


def _end_watch(watch: threading.Thread) -> None:
    """Ends the thread: one that is within jax's client while Python shuts down aborts the process."""
    _over.set()
    watch.join(HEARTBEAT_SECONDS)


def _watch() -> None:
    """In a thread of each process: leaves when another has failed, and says so when nothing goes on."""
    index, count = place_of()
    client, moved, seen = _state().client, time.monotonic(), list[str]()
    while not _over.wait(POLL_SECONDS):
        cause = _failure()
        if cause is not None:
            _leave(cause)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: jax ends this process
            client.key_value_set(f"rec_jax/at/{index}", _doing[0], allow_overwrite=True)
            if index > 0:
                continue
            where = [str(client.key_value_try_get(f"rec_jax/at/{p}")) for p in range(count)]
            if where != seen:
                seen, moved = where, time.monotonic()
        if index == 0 and time.monotonic() - moved > STUCK_SECONDS:
            places = "; ".join(f"process {p}: {place}" for p, place in enumerate(seen))
            advice = "If one of them is stuck, end it: the others stop then"
            print(f"nothing has gone on for {STUCK_SECONDS:.0f} s. {places}. {advice}", file=sys.stderr, flush=True)
            moved = time.monotonic()
