"""Go through the rows: measure what is not finished, each row in a process of its own, and show every one.

A fresh process begins with an empty GPU and without Dynamo's caches, so a row does not depend on the rows before it,
and a crash or an illegal memory access takes one row with it and no more.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fusepass.bench.measure import Tell, measure
from fusepass.bench.picture import draw
from fusepass.bench.results import due, failed, read, troubles, write
from fusepass.bench.rows import Row
from fusepass.bench.table import Display, show
from fusepass.report import one_line


def preview(rows: list[Row], folder: Path, environment: dict[str, str], screen: Console, force: bool) -> None:
    """Say for each row whether it would be measured, and why."""
    for row in rows:
        row, why = due(row, environment, read(folder / row.file), force)
        screen.print(f"{row.label}: {f'measure ({why})' if why else 'skip (finished)'}, {row.file}", soft_wrap=True)
    screen.print(f"modes: {', '.join(rows[0].modes)}", soft_wrap=True)


def go_through(
    rows: list[Row], folder: Path, environment: dict[str, str], screen: Console, force: bool, verbose: bool
) -> int:
    """Measure and record the rows that are not finished (all with `force`), print every row's table, and draw what
    the folder holds if that can be drawn. Returns the exit code: 0, or 1 if there was trouble in any row."""
    found = False
    try:
        with Display(screen, len(rows)) as display:
            for display.done, row in enumerate(rows):
                record = read(folder / row.file)
                row, why = due(row, environment, record, force)
                number = f"[bold]{display.done + 1}/{len(rows)} {row.label}[/]"
                if why or record is None:
                    screen.print(f"\n{number}: {why}", soft_wrap=True)
                    measured = measure_apart(row, display.tell, verbose)
                    if record and failed(measured) and not failed(record):
                        screen.print(
                            f"[red]failed; {row.file} keeps what was measured on {record['date']}[/]", soft_wrap=True
                        )
                        record = measured
                    else:
                        record = write(folder / row.file, row, environment, measured)
                else:
                    screen.print(f"\n{number}: skipped, finished on {record['date']} at this commit", soft_wrap=True)
                show(record, screen)
                for line in troubles(record):
                    screen.print(f"[red]{escape(line)}[/]", soft_wrap=True)
                    found = True
    finally:
        for kind in ("decode", "prefill"):
            try:
                if path := draw(folder, kind):
                    screen.print(f"wrote {path}", soft_wrap=True)
            except Exception as fault:  # the records are written: how the rows went is the exit code
                screen.print(f"[red]{kind}.png is not drawn: {escape(one_line(fault))}[/]", soft_wrap=True)
    return int(found)


def measure_apart(row: Row, tell: Tell, verbose: bool = False) -> dict[str, Any]:
    """What `measure` returns, from a process that ends with this call; {"error": ...} if it failed or died. What
    compilers print there is shown if `verbose`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        child = context.Process(target=_child, args=(row, sender, None if verbose else str(log)))
        child.start()
        sender.close()
        try:
            while (message := receiver.recv())[0] == "tell":
                tell(*message[1])
            child.join(30)
            return message[1]
        except EOFError:
            child.join()
            lines = log.read_text(errors="replace").split("\n") if log.exists() else []
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return {"error": f"its process ended with exit code {child.exitcode}: {last}"[:300]}
        finally:
            child.kill()
            child.join()


def _child(row: Row, sender: Connection, log: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if log:
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    try:
        result = measure(row, lambda *line: sender.send(("tell", line)))
    except Exception as fault:
        traceback.print_exc()
        result = {"error": one_line(fault)}
    sender.send(("result", result))
