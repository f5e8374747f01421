"""Ends a command within seconds of Ctrl-C or SIGTERM, even in the middle of one long call into C.

Python runs its signal handlers between two instructions of the main thread, so a backward of a minute delays them by a
minute. What a signal does at once is to write its number to the wake-up descriptor, on which a thread of ours waits: it
gives the main thread a moment to come to its end by itself, then says the last words in its place and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Seconds that the main thread has to come to its end, and that everything has.
GRACE, LIMIT = 2.0, 4.0


class Stop:
    """What is done when a command is asked to stop.

    Args:
        last_words: Called once, from whichever thread ends the command: says what there is and how to see it.
    """

    def __init__(self, last_words: Callable[[], object] = lambda: None) -> None:
        import psutil  # comes with the recipes, where all long work is; in the end there is no time for it

        self._process = psutil.Process()
        self.last_words = last_words
        #: The signal that came; None so far.
        self.signal: int | None = None
        self._unwound = threading.Event()
        self._ending = threading.Lock()

    def watch(self, descriptor: socket.socket) -> None:
        """Waits for a signal, or for the descriptor's other end to be closed; the body of the watching thread."""
        with descriptor:
            while (number := descriptor.recv(1)) and number[0] not in SIGNALS:
                pass
        if not number:
            return
        self.signal = number[0]
        deadline = threading.Timer(LIMIT, self._exit)
        deadline.daemon = True
        deadline.start()
        if not self._unwound.wait(GRACE):
            self._say_last_words()
            self._exit()

    def finish(self) -> NoReturn:
        """Ends the command from the main thread, once it has come out of its work."""
        self._unwound.set()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # asking twice is no reason to be cut off in the middle of a word
        self._say_last_words()
        raise SystemExit(128 + (self.signal or 0)) from None

    def _say_last_words(self) -> None:
        if not self._ending.acquire(blocking=False):
            time.sleep(LIMIT)  # the other thread is at it, and ends the process
        self.last_words()

    def _exit(self) -> None:
        import psutil

        sys.stdout.flush()
        # Not W&B's writer, which finishes its file when this process is gone.
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "wandb" not in child.name():
                    child.kill()
        os._exit(128 + (self.signal or 0))


@contextlib.contextmanager
def stoppable(last_words: Callable[[], object] = lambda: None) -> Iterator[Stop]:
    """Has Ctrl-C and SIGTERM end the work inside within 5 seconds, and the process with exit code 130 or 143.

    A signal that the process was started to ignore, as a shell's background jobs ignore Ctrl-C, stays ignored. Outside
    of the main thread, where Python has no signals, nothing is changed.

    Args:
        last_words: As `Stop` takes it; may be set later.

    Raises:
        SystemExit: After a signal.
    """
    stop = Stop(last_words)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        raise KeyboardInterrupt  # Lightning ends a fit gracefully by it, for either signal

    handlers: dict[int, Any] = {n: signal.getsignal(n) for n in SIGNALS}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    watched, written = socket.socketpair()
    written.setblocking(False)
    earlier = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, args=(watched,), daemon=True).start()
    try:
        yield stop
    except BaseException:  # Lightning turns a KeyboardInterrupt into SystemExit(1), others may into anything
        if stop.signal is None:
            raise
        stop.finish()
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        written.close()
