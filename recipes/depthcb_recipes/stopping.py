"""Ends a command within seconds of Ctrl-C or SIGTERM, even during a long call into C.

Python runs signal handlers between bytecode instructions of the main thread, so a backward pass of one minute delays
them by up to a minute. The signal number, however, is written to the wake-up descriptor immediately. A thread waits on
it, gives the main thread a moment to finish, then prints the final message itself and ends the process.
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
#: Seconds after the signal until the main thread, and until the whole process, must have finished.
GRACE, LIMIT = 2.0, 4.0


class Stop:
    """Handles a request to stop a command.

    Args:
        last_words: Called once, by the thread that ends the command, to print which results exist and how to view them.
    """

    def __init__(self, last_words: Callable[[], object] = lambda: None) -> None:
        import psutil  # a dependency of the recipes; importing it only after a signal would take too long

        self._process = psutil.Process()
        self.last_words = last_words
        #: The received signal, or None.
        self.signal: int | None = None
        self._unwound = threading.Event()
        self._ending = threading.Lock()

    def watch(self, descriptor: socket.socket) -> None:
        """Waits for a signal or for the descriptor to be closed; the target of the watching thread."""
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
        """Ends the command from the main thread, after the stack has been unwound."""
        self._unwound.set()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the message
        self._say_last_words()
        raise SystemExit(128 + (self.signal or 0)) from None

    def _say_last_words(self) -> None:
        if not self._ending.acquire(blocking=False):
            time.sleep(LIMIT)  # the other thread prints the message and ends the process
        self.last_words()

    def _exit(self) -> None:
        import psutil

        sys.stdout.flush()
        # W&B's writer is not killed: it completes its file after this process has ended.
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "wandb" not in child.name():
                    child.kill()
        os._exit(128 + (self.signal or 0))


@contextlib.contextmanager
def stoppable(last_words: Callable[[], object] = lambda: None) -> Iterator[Stop]:
    """Makes Ctrl-C and SIGTERM end the process within 5 seconds, with exit code 130 or 143.

    Signals that the process was started to ignore (Ctrl-C in background jobs of a shell) remain ignored. Outside the
    main thread, where Python does not receive signals, this has no effect.

    Args:
        last_words: See `Stop`; can also be set later.

    Raises:
        SystemExit: After a signal.
    """
    stop = Stop(last_words)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        raise KeyboardInterrupt  # makes Lightning end a fit gracefully, for either signal

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
    except BaseException:  # Lightning turns KeyboardInterrupt into SystemExit(1); others may raise anything
        if stop.signal is None:
            raise
        stop.finish()
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        written.close()
