"""A model is judged in a process of its own, so that a crash or a hang takes no other with it."""

import multiprocessing
from multiprocessing.connection import Connection

import torch

from tests.causal_lms.judge import OURS, Verdict, judge


def in_a_process(model_type: str, timeout: float) -> Verdict:
    """`judge(model_type)` in a process that has imported everything and compiled nothing yet."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_judge, args=(theirs, model_type))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return ours.recv()
        return Verdict(model_type, OURS, reason=f"no answer within {timeout:.0f} s")
    except EOFError:
        process.join()
        return Verdict(model_type, OURS, reason=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _judge(answer: Connection, model_type: str) -> None:
    torch.set_num_threads(1)
    answer.send(judge(model_type))
