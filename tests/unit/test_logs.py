"""What commands do with the logs of other packages, and with what they raise where nobody listens."""

import subprocess
import sys

INTERRUPTED = """
import gc
import time
from visionfm_jax.logs import quiet_logs

def interrupted(*_):
    gc.callbacks.remove(interrupted)
    raise KeyboardInterrupt

quiet_logs()
gc.callbacks.append(interrupted)
gc.collect()
time.sleep(30)
"""


def test_an_interrupt_within_a_callback_is_not_lost():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=25)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in done.stderr
