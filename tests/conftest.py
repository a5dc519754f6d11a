"""For all tests."""

import signal
import threading

# A shell that runs the tests in the background hands them an ignored SIGINT; the tests of Ctrl-C need the ordinary one.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
