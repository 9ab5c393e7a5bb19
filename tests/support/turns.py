"""Calls in threads, none of which may wait for ever."""

import threading
import time


def soon(function):
    """The result of a call that must return: a thread that waits for ever is left behind."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert results, "the call does not return"
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def together(*functions, seconds=1.0):
    """Calls each again and again, in a thread of its own; returns what they raised."""
    end, errors = time.monotonic() + seconds, []

    def run(function):
        try:
            while time.monotonic() < end:
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 20)
        assert not thread.is_alive(), "threads wait for each other"
    return errors
