"""The worker processes of a loader, when the run that they belong to is stopped."""

import multiprocessing
import multiprocessing.process
import os
import signal
import threading


def outlive_stop_signals(_index: int, _count: int) -> None:
    """Let this worker go on after SIGINT and SIGTERM, until the training closes it or has ended.

    Clusters and terminals send these signals to all processes of a job. The training then takes the steps that its
    processes agree on, for which it needs batches. Grain calls this in each worker at its start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if (training := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(training,), name="end with the training", daemon=True).start()


def _end_after(training: multiprocessing.process.BaseProcess) -> None:
    """End this worker once the training has ended, however it did: Grain's workers would wait for it forever."""
    training.join()
    os._exit(0)
