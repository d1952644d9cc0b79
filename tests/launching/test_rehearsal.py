"""The end of a rank in a rehearsal: it waits for what is still being done, and not for threads that wait for work."""

import subprocess
import sys

from nbutils.common.paths import ROOT

RANK = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from nbutils.launching.rehearsal import end_here

pool = ThreadPoolExecutor(1)  # torch.compile leaves one
pool.submit(print, "compiled", flush=True).result()
threading.Thread(target=lambda: (time.sleep(1), print("written", flush=True))).start()
end_here()
"""


def test_a_rank_ends_beside_an_executor_and_waits_for_a_thread_that_writes():
    done = subprocess.run([sys.executable, "-c", RANK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["compiled", "written"]), done.stderr
